"""The Triton kernels of the backward of sparse_attn (see sparse_attn.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..launch import cdiv, jit, launch, processors, tl
from .sparse_attn import (
    _sizes,
    _tile,
    _whole_rows,
    sparse_attn_dot,
    sparse_attn_keys,
    sparse_attn_range,
    sparse_attn_rows,
)

MASKED = 2  # up to this many entries per chosen one, their gradient is collected by entry, from all tokens that may see it
QUERIES = [
    dict(BH=64, BN=32, num_warps=8, num_stages=1),
    dict(BH=16, BN=32, num_warps=4, num_stages=1),
    dict(BH=16, BN=16, num_warps=4, num_stages=1),
]
KEYS = [
    dict(BH=32, BK=32, num_warps=8, num_stages=1),
    dict(BH=16, BK=32, num_warps=8, num_stages=1),
    dict(BH=16, BK=16, num_warps=4, num_stages=1),
]
QUERIES_FP32 = [
    dict(BH=8, BN=16, num_warps=16, num_stages=1),
    dict(BH=8, BN=16, num_warps=8, num_stages=1),
]
KEYS_FP32 = [
    dict(BH=16, BK=8, num_warps=16, num_stages=1),
    dict(BH=16, BK=8, num_warps=8, num_stages=1),
]


@jit
def sparse_attn_backward_q(
    g_,
    q_,
    kv,
    entries,
    idx,
    seen_,
    lo,
    hi,
    cos,
    sin,
    lse_,
    g_q,
    g_entries,
    delta_,
    norm_,
    qr_,
    gr_,
    T,
    N,
    stride,
    K,
    E,
    H,
    D,
    scale,
    eps,
    SCATTER: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradient of q; what sparse_attn_backward_kv needs of a token; with SCATTER also the gradient of chosen entries, by atomics."""
    blocks = tl.cdiv(H, BH)
    t, h = (
        (tl.program_id(0) // blocks).to(tl.int64),
        tl.program_id(0) % blocks * BH + tl.arange(0, BH),
    )
    b, at, real = t // T, ((t * H + h) * D)[:, None], (h < H)[:, None]
    cos, sin = cos + t * (R // 2), sin + t * (R // 2)
    q, q_r, square = sparse_attn_rows(q_, at, real, cos, sin, D, R, BD, BR)
    g, g_r, unused = sparse_attn_rows(g_, at, real, cos, sin, D, R, BD, BR)
    r = tl.rsqrt(square / D + eps)
    norm = r * (scale * 1.4426950408889634)
    first, last, begin = sparse_attn_range(t, seen_, lo, hi, idx, K, E, W, BK)
    if entries is not None:
        entries += b * stride + begin * D
    if idx is not None:
        idx += t * K
    window = kv + (b * N + t % T) * D
    lse = tl.load(lse_ + t * H + h, mask=h < H, other=float("inf")) * 1.4426950408889634
    delta = tl.zeros([BH], tl.float32)
    for j in range(
        first // BN * BN, last, BN
    ):  # delta = sum_j p_j (g' . k_j) first: g . o would be a rounded one
        k, k_r, seen, e = sparse_attn_keys(
            j + tl.arange(0, BN), first, last, window, entries, idx, D, W, R, BD, BR
        )
        s = sparse_attn_dot(q, q_r, k, k_r) * norm[:, None]
        p = tl.where(seen[None], tl.exp2(s - lse[:, None]), 0.0)
        delta += tl.sum(p * sparse_attn_dot(g, g_r, k, k_r), 1)
    acc, acc_r, mean = (
        tl.zeros([BH, BD], tl.float32),
        tl.zeros([BH, BR], tl.float32),
        tl.zeros([BH], tl.float32),
    )
    d, i = tl.arange(0, BD), tl.arange(0, BR)
    for j in range(first // BN * BN, last, BN):
        n = j + tl.arange(0, BN)
        k, k_r, seen, e = sparse_attn_keys(n, first, last, window, entries, idx, D, W, R, BD, BR)
        s = sparse_attn_dot(q, q_r, k, k_r) * norm[:, None]
        p = tl.where(seen[None], tl.exp2(s - lse[:, None]), 0.0)
        g_s = p * (sparse_attn_dot(g, g_r, k, k_r) - delta[:, None])
        mean += tl.sum(g_s * s, 1)
        acc = tl.dot(g_s.to(k.dtype), k, acc, input_precision="ieee")
        acc_r = tl.dot(g_s.to(k.dtype), k_r, acc_r, input_precision="ieee")
        if SCATTER:
            g_s, p = tl.trans((g_s * (r * scale)[:, None]).to(k.dtype)), tl.trans(p.to(k.dtype))
            to, chosen = g_entries + ((b * E + e) * D)[:, None], (seen & (n >= W))[:, None]
            g_k = tl.dot(p, g_r, tl.dot(g_s, q_r, input_precision="ieee"), input_precision="ieee")
            tl.atomic_add(to + (D - R + i)[None], g_k, mask=chosen & (i < R)[None], sem="relaxed")
            g_k = tl.dot(p, g, tl.dot(g_s, q, input_precision="ieee"), input_precision="ieee")
            tl.atomic_add(to + d[None], g_k, mask=chosen & (d < D - R)[None], sem="relaxed")
    # Through the norm: the mean of (gradient of q') q' is sum_j g_s_j s_j / D, turned or not.
    mean = (mean * 0.6931471805599453 / D * r)[:, None]
    tl.store(
        g_q + at + d[None],
        (r[:, None] * (acc * scale - q.to(tl.float32) * mean)).to(g_q.dtype.element_ty),
        mask=real & (d < D - R)[None],
    )
    x, y = tl.split(
        tl.reshape(r[:, None] * (acc_r * scale - q_r.to(tl.float32) * mean), (BH, BR // 2, 2))
    )
    i2 = tl.arange(0, BR // 2)
    c = tl.load(cos + i2, mask=2 * i2 < R, other=0.0)[None]
    s = tl.load(sin + i2, mask=2 * i2 < R, other=0.0)[None]
    pair, inside = g_q + at + D - R + 2 * i2[None], real & (2 * i2 < R)[None]
    tl.store(pair, (x * c + y * s).to(g_q.dtype.element_ty), mask=inside)
    tl.store(pair + 1, (y * c - x * s).to(g_q.dtype.element_ty), mask=inside)
    narrow, inside = ((t * H + h) * R)[:, None] + i[None], real & (i < R)[None]
    tl.store(qr_ + narrow, q_r, mask=inside)
    tl.store(gr_ + narrow, g_r, mask=inside)
    tl.store(delta_ + t * H + h, delta, mask=h < H)
    tl.store(norm_ + t * H + h, norm, mask=h < H)


@jit
def sparse_attn_backward_kv(
    keys,
    chosen,
    lo,
    hi,
    begin,
    end,
    g_,
    q_,
    qr_,
    gr_,
    lse_,
    delta_,
    norm_,
    out,
    T,
    N,
    stride,
    H,
    D,
    W: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """Gradient of BK keys from one part of the tokens begin <= t < end that may see them.

    With W, keys are rows of windows, of which lo tokens see; else entries lo <= e < hi, or chosen ones.
    """
    block, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    n, d, i, hs = (
        block * BK + tl.arange(0, BK),
        tl.arange(0, BD),
        tl.arange(0, BR),
        tl.arange(0, BH),
    )
    row = keys + b * stride + n[:, None].to(tl.int64) * D
    k = tl.load(row + d[None], mask=(n < N)[:, None] & (d < D)[None], other=0.0)
    k_r = tl.load(row + (D - R + i)[None], mask=(n < N)[:, None] & (i < R)[None], other=0.0)
    at = b * tl.num_programs(0) + block
    first, last, blocks = tl.load(begin + at), tl.load(end + at), tl.cdiv(H, BH)
    span = tl.cdiv(last - first, tl.num_programs(1))
    first += tl.program_id(1) * span
    acc, acc_r = tl.zeros([BK, BD], tl.float32), tl.zeros([BK, BR], tl.float32)
    for step in range(first * blocks, tl.minimum(last, first + span) * blocks):
        t, h = b * T + step // blocks, step % blocks * BH + hs
        if chosen is not None:
            seen = tl.load(chosen + t * (N + 1) + n, mask=n < N, other=0) != 0
        elif W:
            seen = (n >= step // blocks + W - tl.load(lo + t)) & (n < step // blocks + W)
        else:
            seen = (n >= tl.load(lo + t)) & (n < tl.load(hi + t))
        head, real = t * H + h, (h < H)[:, None]
        q = tl.load(q_ + (head * D)[:, None] + d[None], mask=real & (d < D - R)[None], other=0.0)
        g = tl.load(g_ + (head * D)[:, None] + d[None], mask=real & (d < D - R)[None], other=0.0)
        q_r = tl.load(qr_ + (head * R)[:, None] + i[None], mask=real & (i < R)[None], other=0.0)
        g_r = tl.load(gr_ + (head * R)[:, None] + i[None], mask=real & (i < R)[None], other=0.0)
        norm = tl.load(norm_ + head, mask=h < H, other=0.0)[None]
        lse = tl.load(lse_ + head, mask=h < H, other=float("inf"))[None] * 1.4426950408889634
        delta = tl.load(delta_ + head, mask=h < H, other=0.0)[None]
        p = tl.where(
            seen[:, None], tl.exp2(sparse_attn_dot(k, k_r, q, q_r) * norm - lse), 0.0
        )  # [BK, BH]
        g_s = (p * (sparse_attn_dot(k, k_r, g, g_r) - delta) * (norm * 0.6931471805599453)).to(
            k.dtype
        )
        p = p.to(k.dtype)
        acc = tl.dot(p, g, tl.dot(g_s, q, acc, input_precision="ieee"), input_precision="ieee")
        acc_r = tl.dot(
            p, g_r, tl.dot(g_s, q_r, acc_r, input_precision="ieee"), input_precision="ieee"
        )
    to = out + ((tl.program_id(1) * tl.num_programs(2) + b) * N + n)[:, None] * D
    tl.store(to + d[None], acc, mask=(n < N)[:, None] & (d < D - R)[None])
    tl.store(to + (D - R + i)[None], acc_r, mask=(n < N)[:, None] & (i < R)[None])


def backward(g, lse, q, kv, seen, cos, sin, entries, lo, hi, idx, eps):
    (B, T, H, D), N, E = q.shape, kv.shape[1], 0 if entries is None else entries.shape[1]
    if not B * T:
        return (
            torch.empty_like(q),
            torch.zeros_like(kv),
            q.new_zeros(0 if entries is None else entries.shape),
            torch.empty_like(lse),
        )
    g, lse, q, kv, seen, cos, sin = (
        x.contiguous() for x in (g.to(q.dtype), lse, q, kv, seen, cos, sin)
    )
    entries = _whole_rows(entries)
    lo, hi, idx = (None if x is None else x.contiguous() for x in (lo, hi, idx))
    sizes, g_q = _sizes(q, kv, cos, idx), torch.empty_like(q)
    scatter = (
        idx is not None
        and E > MASKED * idx.shape[2]
        and not torch.are_deterministic_algorithms_enabled()
    )
    g_entries = q.new_zeros(B, E, D, dtype=torch.float32) if scatter else None
    delta, norm = torch.empty_like(lse), torch.empty_like(lse)
    q_r, g_r = q.new_empty(B, T, H, sizes["R"]), q.new_empty(B, T, H, sizes["R"])
    tile = _tile("sparse_attn_backward_q", QUERIES, QUERIES_FP32, q, " scatter" if scatter else "")
    launch(
        sparse_attn_backward_q,
        (B * T * cdiv(H, tile["BH"]),),
        g,
        q,
        kv,
        entries,
        idx,
        seen,
        lo,
        hi,
        cos,
        sin,
        lse,
        g_q,
        g_entries,
        delta,
        norm,
        q_r,
        g_r,
        T,
        N,
        0 if entries is None else entries.stride(0),
        0 if idx is None else idx.shape[2],
        E,
        H,
        D,
        D**-0.5,
        eps,
        SCATTER=scatter,
        **sizes,
        **tile,
    )
    tile = _tile("sparse_attn_backward_kv", KEYS, KEYS_FP32, q)

    def of_keys(keys, sees, chosen, lo, hi, W):
        """Sum over tokens; sees [B, T, blocks] says which tokens may see which blocks of keys."""
        blocks, t = sees.shape[2], torch.arange(T, device=q.device, dtype=torch.int32)[:, None]
        begin, end = torch.where(sees, t, T).amin(1), torch.where(sees, t + 1, 0).amax(1)
        splits = max(1, min(T, cdiv(2 * processors(q), max(1, B * blocks))))
        out = q.new_empty(splits, *keys.shape, dtype=torch.float32)
        launch(
            sparse_attn_backward_kv,
            (blocks, splits, B),
            keys,
            chosen,
            lo,
            hi,
            begin,
            end,
            g,
            q,
            q_r,
            g_r,
            lse,
            delta,
            norm,
            out,
            T,
            keys.shape[1],
            keys.stride(0),
            H,
            D,
            W=W,
            R=sizes["R"],
            BD=sizes["BD"],
            BR=sizes["BR"],
            **tile,
        )
        return out.sum(0)

    def starts(n):  # of the blocks of n keys
        return torch.arange(0, n, tile["BK"], device=q.device)

    t, W = torch.arange(T, device=q.device)[:, None], sizes["W"]
    g_kv = of_keys(
        kv,
        ((t < starts(N) + tile["BK"]) & (t + W > starts(N))).expand(B, -1, -1),
        None,
        seen,
        None,
        W,
    )
    if entries is None:
        g_entries = q.new_empty(0)
    elif idx is None:
        g_entries = of_keys(
            entries,
            (lo[..., None] < starts(E) + tile["BK"]) & (hi[..., None] > starts(E)),
            None,
            lo,
            hi,
            0,
        )
    elif not scatter:
        chosen = torch.zeros(B, T, E + 1, dtype=torch.uint8, device=q.device)  # last: a bin
        chosen.scatter_(2, torch.where(idx < 0, E, idx), 1)
        sees = (
            F.pad(chosen[..., :E], (0, -E % tile["BK"])).unflatten(2, (-1, tile["BK"])).amax(-1) > 0
        )
        g_entries = of_keys(entries, sees, chosen, None, None, 0)
    return g_q, g_kv.to(kv.dtype), g_entries.to(q.dtype), delta
