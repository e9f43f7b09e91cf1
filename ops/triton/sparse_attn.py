"""The Triton kernels of sparse_attn (see sparse_attn.py): forward, and the merge of its splits; parts of the backward."""

from __future__ import annotations

import torch

from ..launch import arch, cdiv, get_config, jit, launch, power_of_two, processors, tl

# ---------------------------------------------------------------------------------------------------------------------
# Kernels. A program serves one token and BH heads, the rows of its matrix products. Keys j < W are the window's, in
# order, the others entries: j - W is their place in idx, or counts from lo. The r rotated dims go through products of
# their own (q_r . k_r), so that the wide tiles [.., BD] are used as they lie in memory; the norm is a factor of scores.

FORWARD = [
    dict(BH=64, BN=32, num_warps=8, num_stages=2),
    dict(BH=64, BN=32, num_warps=8, num_stages=1),
    dict(BH=16, BN=32, num_warps=4, num_stages=2),
    dict(BH=16, BN=16, num_warps=4, num_stages=1),
]
# In fp32, which is there to check against, NVIDIA has no matrix instructions of full precision and rows take twice the room: it spills.
FORWARD_FP32 = [
    dict(BH=16, BN=16, num_warps=16, num_stages=1),
    dict(BH=16, BN=16, num_warps=8, num_stages=1),
]


@jit
def sparse_attn_turn(x, at, real, cos, sin, sign, R: tl.constexpr, BR: tl.constexpr):
    """Pairs from pointers x + at [n, 1] on, turned by the angles of one token: both halves [n, BR / 2] fp32."""
    i = tl.arange(0, BR // 2)
    inside = real & (2 * i < R)[None]
    a = tl.load(x + at + 2 * i[None], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + 2 * i[None] + 1, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + i, mask=2 * i < R, other=0.0)[None]
    s = tl.load(sin + i, mask=2 * i < R, other=0.0)[None] * sign
    return a * c - b * s, a * s + b * c


@jit
def sparse_attn_rows(x, at, real, cos, sin, D, R: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """Rows of q or g -> their dims that do not turn [n, BD] (zeros after), those that do, turned [n, BR], and sum of squares."""
    d = tl.arange(0, BD)
    wide = tl.load(x + at + d[None], mask=real & (d < D - R)[None], other=0.0)
    a, b = sparse_attn_turn(x, at + D - R, real, cos, sin, 1.0, R, BR)
    square = tl.sum(wide.to(tl.float32) * wide.to(tl.float32), 1) + tl.sum(a * a + b * b, 1)
    return wide, tl.interleave(a, b).to(wide.dtype), square


@jit
def sparse_attn_store(
    o_, at, real, o, cos, sin, D, R: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr
):
    """Store o' [n, BD] and turn its last dims back: they are read again in pairs.

    The program itself reads what it stored, here as in indexer_topk and sinkhorn: behind a barrier that is ordered on CDNA too,
    whose waves of a program share one L1 in which accesses keep their order. Between programs it would not be (see moe_last).
    """
    d, i = tl.arange(0, BD), tl.arange(0, BR // 2)
    tl.store(o_ + at + d[None], o.to(o_.dtype.element_ty), mask=real & (d < D)[None])
    tl.debug_barrier()
    a, b = sparse_attn_turn(o_, at + D - R, real, cos, sin, -1.0, R, BR)
    pair, inside = o_ + at + D - R + 2 * i[None], real & (2 * i < R)[None]
    tl.store(pair, a.to(o_.dtype.element_ty), mask=inside)
    tl.store(pair + 1, b.to(o_.dtype.element_ty), mask=inside)


@jit
def sparse_attn_range(t, seen, lo, hi, idx, K, E, W: tl.constexpr, BK: tl.constexpr):
    """Token t sees keys first <= j < last; its entries begin at the third result."""
    first, last, begin = W - tl.load(seen + t).to(tl.int32), W, tl.zeros([], tl.int64)
    if lo is not None:
        if idx is None:
            begin = tl.maximum(tl.load(lo + t), 0)
            last = W + tl.maximum(tl.minimum(tl.load(hi + t), E) - begin, 0).to(tl.int32)
        else:  # up to the last one chosen
            i = tl.arange(0, BK)
            chosen = tl.load(idx + t * K + i, mask=i < K, other=-1)
            last = W + tl.max(tl.where(chosen >= 0, i + 1, 0), 0)
    return first, last, begin


@jit
def sparse_attn_keys(
    j,
    first,
    last,
    window,
    entries,
    idx,
    D,
    W: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """Keys j [n] -> all their dims [n, BD], those that turn [n, BR], which are seen, which entries they are."""
    seen, row, e = (j >= first) & (j < last), window + j * D, j - W
    if entries is not None:
        if idx is not None:
            e = tl.load(idx + e, mask=seen & (j >= W), other=0)
            seen = seen & (e >= 0)
        row = tl.where(j < W, row, entries + e.to(tl.int64) * D)
    d, i = tl.arange(0, BD), tl.arange(0, BR)
    k = tl.load(row[:, None] + d[None], mask=seen[:, None] & (d < D)[None], other=0.0)
    k_r = tl.load(row[:, None] + (D - R + i)[None], mask=seen[:, None] & (i < R)[None], other=0.0)
    return k, k_r, seen, e


@jit
def sparse_attn_dot(a, a_r, b, b_r):
    """a b^T over all dims [n, m]; those that turn are zero in a or b, and come from a_r and b_r."""
    return tl.dot(
        a_r, tl.trans(b_r), tl.dot(a, tl.trans(b), input_precision="ieee"), input_precision="ieee"
    )


@jit
def sparse_attn_forward(
    q_,
    kv,
    entries,
    idx,
    seen_,
    lo,
    hi,
    cos,
    sin,
    sink,
    o_,
    lse_,
    acc_,
    l_,
    T,
    N,
    stride,
    K,
    E,
    H,
    D,
    scale,
    eps,
    span,
    SPLITS: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BH: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """o and lse; with SPLITS > 1 what sparse_attn_merge makes them of: maxima in lse_, sums in l_ and acc_, of one span of keys."""
    blocks, split = tl.cdiv(H, BH), tl.program_id(1)
    t, h = (
        (tl.program_id(0) // blocks).to(tl.int64),
        tl.program_id(0) % blocks * BH + tl.arange(0, BH),
    )
    b, at, real = t // T, ((t * H + h) * D)[:, None], (h < H)[:, None]
    cos, sin = cos + t * (R // 2), sin + t * (R // 2)
    q, q_r, square = sparse_attn_rows(q_, at, real, cos, sin, D, R, BD, BR)
    norm = tl.rsqrt(square / D + eps) * (scale * 1.4426950408889634)  # scores are powers of two
    first, last, begin = sparse_attn_range(t, seen_, lo, hi, idx, K, E, W, BK)
    if entries is not None:
        entries += b * stride + begin * D
    if idx is not None:
        idx += t * K
    start, end = first // BN * BN, last
    if SPLITS > 1:
        start, end = tl.maximum(start, split * span), tl.minimum(last, (split + 1) * span)
    top = tl.load(sink + h, mask=h < H, other=0.0).to(tl.float32) * 1.4426950408889634
    m = tl.maximum(top, -1e30)
    l, acc = tl.where(split == 0, tl.exp2(top - m), 0.0), tl.zeros([BH, BD], tl.float32)
    for j in range(start, end, BN):
        k, k_r, seen, e = sparse_attn_keys(
            j + tl.arange(0, BN),
            first,
            end,
            kv + (b * N + t % T) * D,
            entries,
            idx,
            D,
            W,
            R,
            BD,
            BR,
        )
        s = tl.where(seen[None], sparse_attn_dot(q, q_r, k, k_r) * norm[:, None], float("-inf"))
        higher = tl.maximum(m, tl.max(s, 1))
        p, shrink = tl.exp2(s - higher[:, None]), tl.exp2(m - higher)
        l, m = l * shrink + tl.sum(p, 1), higher
        acc = tl.dot(p.to(k.dtype), k, acc * shrink[:, None], input_precision="ieee")
    if SPLITS > 1:
        part, d = split * (tl.num_programs(0) // blocks) * H + t * H + h, tl.arange(0, BD)
        tl.store(lse_ + part, m, mask=h < H)
        tl.store(l_ + part, l, mask=h < H)
        tl.store(acc_ + (part * D)[:, None] + d[None], acc, mask=real & (d < D)[None])
    else:
        tl.store(lse_ + t * H + h, (m + tl.log2(l)) * 0.6931471805599453, mask=h < H)
        sparse_attn_store(o_, at, real, acc / l[:, None], cos, sin, D, R, BD, BR)


@jit
def sparse_attn_merge(
    acc_,
    m_,
    l_,
    cos,
    sin,
    o_,
    lse_,
    rows,
    H,
    D,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    BS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """One head of one token from the sums of all spans."""
    row, d, m, l = tl.program_id(0).to(tl.int64), tl.arange(0, BD), -1e30, 0.0
    acc = tl.zeros([BD], tl.float32)
    for c in range(0, SPLITS, BS):
        part = (c + tl.arange(0, BS)) * rows + row
        exists = c + tl.arange(0, BS) < SPLITS
        tops = tl.load(m_ + part, mask=exists, other=-1e30)
        higher = tl.maximum(m, tl.max(tops, 0))
        weight, shrink = tl.exp2(tops - higher), tl.exp2(m - higher)
        sums = tl.load(
            acc_ + (part * D)[:, None] + d[None], mask=exists[:, None] & (d < D)[None], other=0.0
        )
        l = l * shrink + tl.sum(tl.load(l_ + part, mask=exists, other=0.0) * weight, 0)
        acc, m = acc * shrink + tl.sum(sums * weight[:, None], 0), higher
    t = row // H
    tl.store(lse_ + row, (m + tl.log2(l)) * 0.6931471805599453)
    at, real = (row * D + tl.zeros([1, 1], tl.int64)), tl.full([1, 1], 1, tl.int1)
    sparse_attn_store(
        o_, at, real, (acc / l)[None], cos + t * (R // 2), sin + t * (R // 2), D, R, BD, BR
    )


def _sizes(q, kv, cos, idx):
    """What all kernels know of the shapes."""
    (T, H, D), R = q.shape[1:], 2 * cos.shape[-1]
    return dict(
        W=kv.shape[1] - T + 1,
        R=R,
        BD=power_of_two(D, 16),
        BR=power_of_two(R, 16),
        BK=16 if idx is None else power_of_two(idx.shape[2], 16),
    )


def _tile(name, candidates, candidates_fp32, q, note=""):
    (H, D), amd = q.shape[2:], arch(q).startswith("gfx")
    tile = get_config(
        name,
        f"H{H} D{D} {str(q.dtype)[6:]}{note}",
        candidates_fp32 if q.dtype.itemsize == 4 and not amd else candidates,
        q,
    )
    return {**tile, "BH": min(tile["BH"], power_of_two(H, 16))}


def _whole_rows(entries):
    """Entries whose rows lie one behind the other; their batches may be a cache's, further apart."""
    return (
        entries
        if entries is None or entries.stride()[1:] == (entries.shape[2], 1)
        else entries.contiguous()
    )


def _splits(work, programs, x):
    """(splits, span): how to cut `work` steps of every program so that all processors have some."""
    span = cdiv(work, max(1, min(work, processors(x) // max(programs, 1))))
    return cdiv(work, span), span


def forward_kernel(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps):
    B, T, H, D = q.shape
    if not B * T:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    q, kv, sink, seen, cos, sin = (x.contiguous() for x in (q, kv, sink, seen, cos, sin))
    lo, hi, idx = (None if x is None else x.contiguous() for x in (lo, hi, idx))
    entries = _whole_rows(entries)
    o, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    sizes, few = _sizes(q, kv, cos, idx), B * T <= 64
    tile = _tile("sparse_attn_forward", FORWARD, FORWARD_FP32, q, " decode" if few else "")
    keys = sizes["W"] + (
        0 if entries is None else entries.shape[1] if idx is None else idx.shape[2]
    )
    programs, splits, span = B * T * cdiv(H, tile["BH"]), 1, keys
    if few:
        splits, span = _splits(cdiv(keys, 2 * tile["BN"]), programs, q)
        span *= 2 * tile["BN"]
    acc, m, l = (
        (q.new_empty(splits, B, T, H, n, dtype=torch.float32) for n in (D, 1, 1))
        if splits > 1
        else (None, lse, None)
    )
    launch(
        sparse_attn_forward,
        (programs, splits),
        q,
        kv,
        entries,
        idx,
        seen,
        lo,
        hi,
        cos,
        sin,
        sink,
        o,
        m,
        acc,
        l,
        T,
        kv.shape[1],
        0 if entries is None else entries.stride(0),
        0 if idx is None else idx.shape[2],
        0 if entries is None else entries.shape[1],
        H,
        D,
        D**-0.5,
        eps,
        span,
        SPLITS=splits,
        **sizes,
        **tile,
    )
    if splits > 1:
        launch(
            sparse_attn_merge,
            (B * T * H,),
            acc,
            m,
            l,
            cos,
            sin,
            o,
            lse,
            B * T * H,
            H,
            D,
            SPLITS=splits,
            R=sizes["R"],
            BS=min(8, power_of_two(splits)),
            BD=sizes["BD"],
            BR=sizes["BR"],
            num_warps=4,
        )
    return o, lse
