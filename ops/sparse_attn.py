"""sparse_attn: multi-query attention over a sliding window and compressed entries, one softmax with a sink (docs/v4.md#attention).

Token t of a row sees, with K = V shared by all heads:
    window    kv[t + W - seen[t]] .. kv[t + W - 1]              (the last one is its own)
    entries   entries[lo[t]] .. entries[hi[t] - 1], all of them  if idx is None
              entries[i] for i in idx[t], i >= 0                 otherwise

    q'  = q * rsqrt(mean(q^2) + eps) per head, its last r dims rotated to the token's position
    s_j = q' . k_j / sqrt(D)         m = max(s_j, sink)      den = sum_j exp(s_j - m) + exp(sink - m)
    o'  = sum_j exp(s_j - m) k_j / den               lse = m + log(den)
    o   = o', its last r dims rotated back

    q [B, T, H, D]   kv [B, W - 1 + T, D]   sink [H] fp32   seen [B, T] int64   cos, sin [B, T, r/2] fp32
    entries [B, E, D], lo, hi [B, T] int64 or None   idx [B, T, K] int64 or None
    o [B, T, H, D] in the dtype of q   lse [B, T, H] fp32, without gradient

A call returns o; with_lse, a last argument that may be left out, makes it (o, lse), from which indexer_loss takes up.
Norm, rotation, scores and softmax are fp32; q', the probabilities and o' are rounded to the dtype of q.
Entries in idx are distinct. Gradients of chosen entries are added by atomics, in any order, where a context has more than
MASKED times as many entries as are chosen; torch.use_deterministic_algorithms(True) collects them by entry instead, which
reads more. All else is deterministic.
The reference cuts the tokens into blocks that share one band of the window, and into chunks that bound the scores held
at a time: it never builds a query x key x dim tensor for a long prefill. Errors: shapes that do not fit together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cpp import plain
from .launch import arch, cdiv, get_config, jit, launch, power_of_two, processors, tl
from .registry import Op, register, require
from .rope import reference as rotate
from .sparse_attn_cpp import SOURCE

CHUNK = 1 << 24  # elements (scores and gathered entries) held at a time
BLOCK = 64  # tokens that share one band of W - 1 + BLOCK window keys
MASKED = 2  # up to this many entries per chosen one, their gradient is collected by entry, from all tokens that may see it


def check(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps, with_lse=False):
    require(q.dim() == 4, f"sparse_attn: q {tuple(q.shape)} is not [B, T, H, D]")
    B, T, H, D = q.shape
    require(
        kv.dim() == 3
        and kv.shape[0] == B
        and kv.shape[1] >= T
        and kv.shape[2] == D
        and sink.shape == (H,)
        and seen.shape == cos.shape[:2] == sin.shape[:2] == (B, T)
        and 2 * cos.shape[2] <= D,
        f"sparse_attn: q {tuple(q.shape)}, kv {tuple(kv.shape)}, sink {tuple(sink.shape)}, seen {tuple(seen.shape)}, "
        f"cos {tuple(cos.shape)} do not fit",
    )
    if entries is not None:
        require(
            entries.dim() == 3
            and entries.shape[::2] == (B, D)
            and lo is not None
            and hi is not None
            and lo.shape == hi.shape == (B, T),
            f"sparse_attn: entries {tuple(entries.shape)} do not fit q {tuple(q.shape)}, or lo, hi are not [B, T]",
        )
    require(
        idx is None or entries is not None and idx.shape[:2] == (B, T),
        "sparse_attn: idx needs entries and shape [B, T, K]",
    )


def _chunks(q, kv, seen, cos, sin, entries, lo, hi, idx):
    """Cut the tokens, then hand each chunk's operands over, padded to whole blocks; yields (slice, operands)."""
    B, T, H, D = q.shape
    n = min(T, BLOCK)  # tokens in a block
    band = kv.shape[1] - T + n
    held = max(H, D // n) * band + (
        0 if entries is None else entries.shape[1] * H if idx is None else idx.shape[2] * (H + D)
    )
    step = max(1, CHUNK // (B * held * n)) * n
    for c in range(0, T, step):
        now, size = slice(c, min(c + step, T)), min(step, T - c)
        pad = -size % n
        keys = F.pad(kv[:, c : c + size + band - n], (0, 0, 0, pad))
        rows = [
            None if t is None else F.pad(t[:, now], (0,) * (2 * (t.dim() - 2)) + (0, pad))
            for t in (cos, sin, seen, lo, hi, idx)
        ]
        yield now, (F.pad(q[:, now], (0, 0, 0, 0, 0, pad)), keys, n, band, *rows)


def _normalized(q, eps):
    """-> q / rms [.., D] fp32, 1 / rms [.., 1]"""
    v = q.float()
    r = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return v * r, r


def _scores(q, keys, n, band, seen, lo, hi, idx, entries):
    """One chunk -> scores [B, t, H, band + E or K] fp32 (-inf where hidden), band keys [B t/n, band, D], entries gathered."""
    B, t, H, D = q.shape
    qf = q.float()
    bands = keys.float().unfold(1, band, n).reshape(-1, D, band)  # [B t/n, D, band]
    window = (qf.reshape(-1, n * H, D) @ bands).view(B, t, H, band)
    j = torch.arange(band, device=q.device)
    last = torch.arange(t, device=q.device) % n + band - n  # a token's own key in its band
    hidden = (j > last[:, None]) | (j <= last[:, None] - seen[..., None])  # [B, t, band]
    if entries is None:
        scores, ents = window, None
    elif idx is None:
        ents = entries.float()
        e = torch.arange(ents.shape[1], device=q.device)
        scores = torch.cat(
            (window, (qf.flatten(1, 2) @ ents.transpose(1, 2)).view(B, t, H, -1)), -1
        )
        hidden = torch.cat((hidden, (e < lo[..., None]) | (e >= hi[..., None])), -1)
    else:
        row = torch.arange(B, device=q.device)[:, None, None]
        ents = entries[row, idx.clamp(min=0)].float()  # [B, t, K, D]
        scores = torch.cat((window, qf @ ents.transpose(2, 3)), -1)
        hidden = torch.cat((hidden, idx < 0), -1)
    return (scores * D**-0.5).masked_fill(hidden[:, :, None], float("-inf")), bands, ents


def _attend(q, keys, n, band, cos, sin, seen, lo, hi, idx, entries, sink, eps):
    B, t, H, D = q.shape
    q = rotate(_normalized(q, eps)[0].to(q.dtype), cos, sin, False)
    scores, bands, ents = _scores(q, keys, n, band, seen, lo, hi, idx, entries)
    m = torch.maximum(scores.amax(-1), sink.float())  # [B, t, H]
    p = (scores - m[..., None]).exp()
    den = p.sum(-1) + (sink.float() - m).exp()
    p = p.to(q.dtype).float()
    o = (p[..., :band].reshape(-1, n * H, band) @ bands.transpose(1, 2)).view(B, t, H, D)
    if idx is not None:
        o = o + p[..., band:] @ ents
    elif entries is not None:
        o = o + (p[..., band:].flatten(1, 2) @ ents).view(B, t, H, D)
    return rotate((o / den[..., None]).to(q.dtype), cos, sin, True), m + den.log()


def forward_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    seen: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entries: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    idx: torch.Tensor | None,
    eps: float,
):
    """-> o, lse"""
    if entries is not None and entries.requires_grad:
        entries = entries.float()  # the gradients of an entry chosen by many tokens add up in fp32
    out, lse = [], []
    for now, operands in _chunks(q, kv, seen, cos, sin, entries, lo, hi, idx):
        o, l = _attend(*operands, entries, sink, eps)
        out.append(o[:, : now.stop - now.start])
        lse.append(l[:, : now.stop - now.start])
    return torch.cat(out, 1), torch.cat(lse, 1)


def backward_reference(
    g: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    seen: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entries: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    idx: torch.Tensor | None,
    eps: float,
):
    """Gradients of q, kv, sink and entries (empty where there are none), recomputing probabilities from lse."""
    B, T, H, D = q.shape
    g_q, delta = (
        q.new_empty(q.shape),
        torch.empty_like(lse),
    )  # delta = sum_j p_j (g' . k_j), exact where g . o would be rounded
    g_kv = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    g_entries = torch.zeros(
        q.new_empty(0).shape if entries is None else entries.shape,
        dtype=torch.float32,
        device=q.device,
    )
    for now, (qc, keys, n, band, c, s, *rows) in _chunks(
        q, kv, seen, cos, sin, entries, lo, hi, idx
    ):
        size, pad = now.stop - now.start, qc.shape[1] - (now.stop - now.start)
        unit, r = _normalized(qc, eps)
        qc = rotate(unit.to(q.dtype), c, s, False)
        scores, bands, ents = _scores(qc, keys, n, band, *rows, entries)
        gc = rotate(F.pad(g[:, now].float(), (0, 0, 0, 0, 0, pad)), c, s, False)
        p = (
            scores - F.pad(lse[:, now], (0, 0, 0, pad), value=float("inf"))[..., None]
        ).exp()  # padded tokens: 0
        blocks = lambda x: x.reshape(-1, n * H, x.shape[-1])  # [B, t, H, x] -> [B t/n, n H, x]
        flat = lambda x: x.flatten(1, 2)  # -> [B, t H, x]
        g_p = (blocks(gc) @ bands).view(*gc.shape[:3], band)
        if rows[3] is not None:
            g_p = torch.cat((g_p, gc @ ents.transpose(2, 3)), -1)
        elif entries is not None:
            g_p = torch.cat((g_p, (flat(gc) @ ents.transpose(1, 2)).view(*gc.shape[:3], -1)), -1)
        dc = (p * g_p).sum(-1, keepdim=True)
        g_s, delta[:, now] = p * (g_p - dc) * D**-0.5, dc[:, :size, :, 0]  # [B, t, H, keys]
        qf, g_w, p_w = qc.float(), g_s[..., :band], p[..., :band]
        g_qc = (blocks(g_w) @ bands.transpose(1, 2)).view_as(qf)
        g_band = blocks(g_w).transpose(1, 2) @ blocks(qf) + blocks(p_w).transpose(1, 2) @ blocks(
            gc
        )  # [B t/n, band, D]
        g_keys = torch.zeros_like(keys, dtype=torch.float32)
        where = (
            torch.arange(0, qc.shape[1], n, device=q.device)[:, None]
            + torch.arange(band, device=q.device)
        ).flatten()
        g_keys.index_add_(1, where, g_band.view(B, -1, D))
        g_kv[:, now.start : now.stop + band - n] += g_keys[:, : size + band - n]
        if entries is not None:
            g_w, p_w = g_s[..., band:], p[..., band:]
            if rows[3] is None:
                g_qc += (flat(g_w) @ ents).view_as(qf)
                g_entries += flat(g_w).transpose(1, 2) @ flat(qf) + flat(p_w).transpose(
                    1, 2
                ) @ flat(gc)
            else:
                g_qc += g_w @ ents
                g_e = (
                    g_w.transpose(2, 3) @ qf + p_w.transpose(2, 3) @ gc
                )  # [B, t, K, D]; zero where idx is -1
                target = (
                    rows[3].clamp(min=0)
                    + torch.arange(B, device=q.device)[:, None, None] * entries.shape[1]
                )
                g_entries.view(-1, D).index_add_(0, target.flatten(), g_e.reshape(-1, D))
        g_qc = rotate(g_qc, c, s, True)
        g_q[:, now] = (r * (g_qc - unit * (g_qc * unit).mean(-1, keepdim=True)))[:, :size].to(
            q.dtype
        )
    return g_q, g_kv.to(kv.dtype), _sink_gradient(delta, lse, sink), g_entries.to(q.dtype)


def _sink_gradient(delta, lse, sink):
    return -((sink.float() - lse).exp() * delta).sum((0, 1)).to(sink.dtype)


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
# In fp32, which is there to check against, NVIDIA has no matrix instructions of full precision and rows take twice the room: it spills.
FORWARD_FP32 = [
    dict(BH=16, BN=16, num_warps=16, num_stages=1),
    dict(BH=16, BN=16, num_warps=8, num_stages=1),
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


def backward_kernel(g, lse, q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps):
    (B, T, H, D), N, E = q.shape, kv.shape[1], 0 if entries is None else entries.shape[1]
    if not B * T:
        return (
            torch.empty_like(q),
            torch.zeros_like(kv),
            torch.zeros_like(sink),
            q.new_zeros(0 if entries is None else entries.shape),
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
    return g_q, g_kv.to(kv.dtype), _sink_gradient(delta, lse, sink), g_entries.to(q.dtype)


def _flops(
    q,
    kv,
    sink,
    seen,
    cos,
    sin,
    entries=None,
    lo=None,
    hi=None,
    idx=None,
    *args,
    out_shape=None,
    **kw,
):
    """Scores and values over every key that a token may see: the window, and all entries or the chosen ones."""
    B, T, H, D = q
    keys = kv[1] - T + 1 + (0 if entries is None else entries[1] if idx is None else idx[2])
    return 4 * B * T * H * D * keys


_backward_op = register(
    "sparse_attn_backward(Tensor g, Tensor lse, Tensor q, Tensor kv, Tensor sink, Tensor seen, Tensor cos, "
    "Tensor sin, Tensor? entries, Tensor? lo, Tensor? hi, Tensor? idx, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    kernel=backward_kernel,
    cpp=SOURCE,
    takes=plain,
    fake=lambda g, lse, q, kv, sink, seen, cos, sin, entries, *rest: (
        q.new_empty(q.shape),
        kv.new_empty(kv.shape),
        sink.new_empty(sink.shape),
        q.new_empty(0 if entries is None else entries.shape),
    ),
    flops=lambda g, lse, *args, out_shape=None, **kw: 5 * _flops(*args) // 2,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, g, _):
    lse, *tensors = ctx.saved_tensors
    g_q, g_kv, g_sink, g_entries = _backward_op(g.contiguous(), lse, *tensors, ctx.eps)
    return (
        g_q,
        g_kv,
        g_sink,
        None,
        None,
        None,
        g_entries if tensors[6] is not None else None,
        *[None] * 4,
    )


_opaque = register(
    "sparse_attn(Tensor q, Tensor kv, Tensor sink, Tensor seen, Tensor cos, Tensor sin, Tensor? entries, "
    "Tensor? lo, Tensor? hi, Tensor? idx, float eps) -> (Tensor, Tensor)",
    impl=forward_reference,
    kernel=forward_kernel,
    cpp=SOURCE,
    takes=plain,
    fake=lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
)


def _on_cpu(q, *rest):
    """Compiled for more tokens than are decoded, in fp32: a node, in C++."""
    compiled = torch.compiler.is_compiling() and q.shape[1] > 8 and plain(q, *rest)
    return (_opaque if compiled else forward_reference)(q, *rest)


def _form(form):
    def call(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps, with_lse=False):
        o, lse = form(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps)
        return (o, lse.detach()) if with_lse else o

    return call


sparse_attn = Op(
    "sparse_attn", _form(forward_reference), _form(_opaque), check, on_cpu=_form(_on_cpu)
)
