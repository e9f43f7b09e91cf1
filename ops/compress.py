"""compress: pool windows of R tokens into entries, normalise and rotate them (docs/v4.md#compressor).

A row holds a token's values and its pooling logits, [K | Z], each with one lane of D channels (R != 4) or two (R = 4):
with two lanes, the first is read by the next window ("lookback"), the second by the token's own.

    slots of entry w   plain: its window's R rows;   overlap: R rows of window w - 1 (absent for w = 0), R of window w
    e = sum_slots softmax_slots(Z) K, per channel    fp32
    e = RMSNorm(e in dtype) weight, last r dims rotated to position w R    (cos, sin)

    rows [B, N, 2 lanes D] fp32   end [B, E] int64, row of the window's last token   index [B, E] int64, w in its document
    weight [D]   cos, sin [B, E, r/2] fp32   dtype of the result
    out [B, E, D]

An entry whose `end` lies outside the rows is finite and meaningless. Errors: shapes that do not fit together.

The kernels read the rows once (the backward a second time, from cache) and keep an entry in registers from its slots to
the store. A program pools BE entries, one running softmax per channel, or a single entry of a long window with G running
softmaxes over every G-th slot, merged at the end. An entry that lies outside is 0 and costs nothing: a decoded token
that closes no window reads no rows.

Windows of a document share no (row, lane), and entries that no token sees have no gradient: the backward adds to zeros,
in parallel, and the result does not depend on the order. It would where three windows with gradients share rows.
"""

from __future__ import annotations

import torch

from .launch import cdiv, get_config, jit, launch, power_of_two, tl
from .registry import Op, register, require
from .rope import reference as rotate
from .rope import turn_pairs


def check(rows, end, index, weight, cos, sin, ratio, eps, dtype):
    lanes, D = _lanes(ratio), weight.shape[0]
    require(
        rows.dim() == 3
        and rows.shape[2] == 2 * lanes * D
        and len(rows) == len(end)
        and end.shape == index.shape == cos.shape[:2] == sin.shape[:2],
        f"compress: rows {tuple(rows.shape)}, end {tuple(end.shape)}, weight {tuple(weight.shape)}, cos {tuple(cos.shape)} "
        "do not fit",
    )


def _lanes(ratio):
    return 2 if ratio == 4 else 1


def _slots(rows, end, index, ratio):
    """-> values and logits of the slots [B, E, lanes R, D], and where they lie: (row [B, E, lanes R], absent)."""
    lanes, N = _lanes(ratio), rows.shape[1]
    back = torch.arange(lanes * ratio - 1, -1, -1, device=rows.device)
    where = (end[..., None] - back).clamp(0, N - 1)
    absent = ((index == 0)[..., None] & (back >= ratio))[
        ..., None
    ]  # the first window has nothing to look back to
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    if lanes == 1:
        values, logits = rows[batch, where].chunk(2, -1)
    else:  # the older R slots read the first lane, the newer R the second
        k1, k2, z1, z2 = rows.chunk(4, -1)
        old, new = where.split(ratio, -1)
        values = torch.cat((k1[batch, old], k2[batch, new]), 2)
        logits = torch.cat((z1[batch, old], z2[batch, new]), 2)
    return values, logits.masked_fill(absent, float("-inf")), where


def reference(
    rows: torch.Tensor,
    end: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    ratio: int,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    values, logits, _ = _slots(rows, end, index, ratio)
    e = (values * logits.softmax(2)).sum(2).to(dtype).float()
    e = (e * torch.rsqrt(e.square().mean(-1, keepdim=True) + eps) * weight.float()).to(dtype)
    return rotate(e, cos, sin, False)


def backward_reference(
    g: torch.Tensor,
    rows: torch.Tensor,
    end: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    ratio: int,
    eps: float,
    dtype: torch.dtype,
):
    """Gradients of rows and weight."""
    values, logits, where = _slots(rows, end, index, ratio)
    p = logits.softmax(2)
    e = (values * p).sum(2).to(dtype).float()
    g = rotate(g, cos, sin, True).float()
    r = torch.rsqrt(e.square().mean(-1, keepdim=True) + eps)
    g_weight = (g * e * r).sum((0, 1))
    g = g * weight.float()
    g = (r * (g - e * r * r * (g * e).mean(-1, keepdim=True)))[
        :, :, None
    ]  # gradient of e, [B, E, 1, D]
    g_values = g * p
    g_logits = p * (g * values - (g * values * p).sum(2, keepdim=True))
    (B, N, C), D, out = rows.shape, weight.shape[0], rows.new_zeros(rows.shape)
    target = where + torch.arange(B, device=rows.device)[:, None, None] * N
    flat = out.view(B * N, 2, -1, D)  # [.., values or logits, lane, D]
    for lane, old_or_new in enumerate(target.split(ratio, -1)):
        for half, part in enumerate((g_values, g_logits)):
            flat[:, half, lane].index_add_(
                0, old_or_new.flatten(), part.split(ratio, 2)[lane].reshape(-1, D)
            )
    return out, g_weight.to(weight.dtype)


@jit
def compress_pool(
    rows,
    first,
    end,
    index,
    inside,
    c,
    D: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    """-> highest logit, sum of weights, weighted sum of values: [BE, BD] each."""
    channel = ((c >= 0) & (c < D))[None, :]
    # Finite, as -inf - -inf is none, and lower than any logit.
    top, total = tl.full([BE * G, BD], -1e30, tl.float32), tl.zeros([BE * G, BD], tl.float32)
    e = total
    for lane in tl.static_range(LANES):
        for start in tl.range(0, R, G, loop_unroll_factor=U):
            slot = start + tl.arange(0, G)
            row = first + tl.maximum(end + 1 - (LANES - lane) * R + slot, 0)
            at = rows + row[:, None] * (2 * LANES * D) + lane * D + c[None, :]
            there = (inside & (slot < R) & (index >= LANES - 1 - lane))[:, None] & channel
            k = tl.load(at, mask=there, other=0.0)
            z = tl.load(at + LANES * D, mask=there, other=float("-inf"))
            shrink = tl.exp(-tl.abs(z - top))  # of what is lower
            old, new = tl.where(z > top, shrink, 1.0), tl.where(z > top, 1.0, shrink)
            total, e, top = total * old + new, e * old + k * new, tl.maximum(top, z)
    if G > 1:
        highest = tl.max(top, 0)[None, :]
        share = tl.exp(top - highest)
        total, e, top = tl.sum(total * share, 0)[None, :], tl.sum(e * share, 0)[None, :], highest
    return top, tl.maximum(total, 1.0), e  # a sum below 1 has no slots


@jit
def compress_angles(cos, sin, n, there, D: tl.constexpr, r: tl.constexpr, BD: tl.constexpr):
    """cos and sin for every pair of channels of entries n, [.., BD/2]: those that are not rotated turn by 0."""
    pair = tl.arange(0, BD // 2) - (D - r + 1) // 2
    at, there = (
        n[:, None] * (r // 2) + pair[None, :],
        there[:, None] & ((pair >= 0) & (pair < r // 2))[None, :],
    )
    return tl.load(cos + at, mask=there, other=1.0), tl.load(sin + at, mask=there, other=0.0)


@jit
def compress_forward(
    rows,
    end,
    index,
    weight,
    cos,
    sin,
    out,
    N,
    E,
    entries,
    eps,
    D: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    n = tl.program_id(0) * BE + tl.arange(0, BE)
    last, w = (
        tl.load(end + n, mask=n < entries, other=-1),
        tl.load(index + n, mask=n < entries, other=0),
    )
    inside, n = (last >= 0) & (last < N), n.to(tl.int64)
    c = tl.arange(0, BD) - (D - r) % 2  # pairs begin at even places of a tile
    there = (n < entries)[:, None] & ((c >= 0) & (c < D))[None, :]
    out += n[:, None] * D + c[None, :]
    if tl.sum(inside.to(tl.int32), 0) == 0:
        tl.store(out, tl.zeros([BE, BD], out.dtype.element_ty), mask=there)
        return
    top, total, e = compress_pool(rows, n // E * N, last, w, inside, c, D, R, LANES, BE, G, U, BD)
    e = (e / total).to(out.dtype.element_ty).to(tl.float32)
    unit = tl.rsqrt(tl.sum(e * e, 1) / D + eps)
    e = (
        e
        * unit[:, None]
        * tl.load(weight + c, mask=(c >= 0) & (c < D), other=0.0).to(tl.float32)[None, :]
    )
    cosines, sines = compress_angles(cos, sin, n, n < entries, D, r, BD)
    e = turn_pairs(e.to(out.dtype.element_ty).to(tl.float32), cosines, sines, BE, BD)
    tl.store(out, e.to(out.dtype.element_ty), mask=there)


@jit
def compress_backward(
    g,
    rows,
    end,
    index,
    weight,
    cos,
    sin,
    g_rows,
    g_weight,
    N,
    E,
    entries,
    eps,
    D: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    n = tl.program_id(0) * BE + tl.arange(0, BE)
    last, w = (
        tl.load(end + n, mask=n < entries, other=-1),
        tl.load(index + n, mask=n < entries, other=0),
    )
    inside, n = (last >= 0) & (last < N), n.to(tl.int64)
    c = tl.arange(0, BD) - (D - r) % 2
    channel = (c >= 0) & (c < D)
    top, total, e = compress_pool(rows, n // E * N, last, w, inside, c, D, R, LANES, BE, G, U, BD)
    e /= total
    rounded = e.to(g.dtype.element_ty).to(tl.float32)
    unit = tl.rsqrt(tl.sum(rounded * rounded, 1) / D + eps)[:, None]
    v = tl.load(
        g + n[:, None] * D + c[None, :], mask=(n < entries)[:, None] & channel[None, :], other=0.0
    ).to(tl.float32)
    cosines, sines = compress_angles(cos, sin, n, n < entries, D, r, BD)
    v = turn_pairs(v, cosines, -sines, BE, BD).to(g.dtype.element_ty).to(tl.float32)
    tl.store(
        g_weight + tl.program_id(0).to(tl.int64) * D + c,
        tl.sum(v * rounded * unit, 0),
        mask=channel,
    )
    v *= tl.load(weight + c, mask=channel, other=0.0).to(tl.float32)[None, :]
    v = unit * (v - rounded * unit * unit * (tl.sum(v * rounded, 1) / D)[:, None])  # gradient of e
    scale = v / total
    for lane in tl.static_range(LANES):
        for start in tl.range(0, R, G, loop_unroll_factor=U):
            slot = start + tl.arange(0, G)
            row = n // E * N + tl.maximum(last + 1 - (LANES - lane) * R + slot, 0)
            at = row[:, None] * (2 * LANES * D) + lane * D + c[None, :]
            there = (inside & (slot < R) & (w >= LANES - 1 - lane))[:, None] & channel[None, :]
            k = tl.load(rows + at, mask=there, other=0.0)
            z = tl.load(rows + at + LANES * D, mask=there, other=float("-inf"))
            gp = tl.exp(z - top) * scale
            tl.atomic_add(g_rows + at, gp, mask=there, sem="relaxed")
            tl.atomic_add(g_rows + at + LANES * D, gp * (k - e), mask=there, sem="relaxed")


def _tiles(name, rows, D, r, ratio, dtype):
    """Constants and options of a launch."""
    BD = power_of_two(D + (D - r) % 2, 2)
    if ratio <= 16:
        candidates = [
            {"BE": max(1, size // BD), "G": 1, "U": 4, "num_warps": warps}
            for size, warps in ((2048, 4), (1024, 4), (512, 16), (512, 8), (512, 4))
        ]
    else:
        candidates = [
            {"BE": 1, "G": 16, "U": U, "num_warps": warps}
            for U, warps in ((2, 16), (2, 8), (1, 16), (1, 8))
        ]
    cfg = get_config(name, f"R{ratio} D{D} {str(dtype)[6:]}", candidates, rows)
    return {"D": D, "r": r, "R": ratio, "LANES": _lanes(ratio), "BD": BD, **cfg}


def kernel(rows, end, index, weight, cos, sin, ratio, eps, dtype):
    (B, N, _), E, D = rows.shape, end.shape[1], weight.shape[0]
    out = rows.new_empty(B, E, D, dtype=dtype)
    cfg = _tiles("compress_forward", rows, D, 2 * cos.shape[-1], ratio, dtype)
    launch(
        compress_forward,
        (cdiv(B * E, cfg["BE"]),),
        *(t.contiguous() for t in (rows, end, index, weight, cos, sin)),
        out,
        N,
        E,
        B * E,
        eps,
        **cfg,
    )
    return out


def backward_kernel(g, rows, end, index, weight, cos, sin, ratio, eps, dtype):
    (B, N, _), E, D = rows.shape, end.shape[1], weight.shape[0]
    cfg = _tiles("compress_backward", rows, D, 2 * cos.shape[-1], ratio, dtype)
    programs = cdiv(B * E, cfg["BE"])
    g_rows, g_weight = rows.new_zeros(rows.shape), rows.new_empty(programs, D)
    launch(
        compress_backward,
        (programs,),
        *(t.contiguous() for t in (g, rows, end, index, weight, cos, sin)),
        g_rows,
        g_weight,
        N,
        E,
        B * E,
        eps,
        **cfg,
    )
    return g_rows, g_weight.sum(0).to(weight.dtype)


def _flops(*args, out_shape=None, **kw):
    """Elementwise: no matrix products are counted."""
    return 0


_backward_op = register(
    "compress_backward(Tensor g, Tensor rows, Tensor end, Tensor index, Tensor weight, Tensor cos, Tensor sin, int ratio, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor)",
    impl=backward_reference,
    fake=lambda g, rows, end, index, weight, *args: (
        rows.new_empty(rows.shape),
        weight.new_empty(weight.shape),
    ),
    flops=_flops,
    kernel=backward_kernel,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.constants = inputs[6:]


def _backward(ctx, g):
    g_rows, g_weight = _backward_op(g, *ctx.saved_tensors, *ctx.constants)
    return g_rows, None, None, g_weight, *[None] * 5


_opaque = register(
    "compress(Tensor rows, Tensor end, Tensor index, Tensor weight, Tensor cos, Tensor sin, int ratio, float eps, "
    "ScalarType dtype) -> Tensor",
    impl=reference,
    fake=lambda rows, end, index, weight, cos, sin, ratio, eps, dtype: rows.new_empty(
        *end.shape, weight.shape[0], dtype=dtype
    ),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
    kernel=kernel,
)

compress = Op("compress", reference, _opaque, check)
