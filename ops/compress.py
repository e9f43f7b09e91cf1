"""compress: pool windows of R tokens into entries, normalise and rotate them (docs/v4.md#compressor).

A row holds a token's values and its pooling logits, [K | Z], each with one lane of D channels, or two (overlapping windows):
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

from .registry import Op, register, require
from .rope import reference as rotate
from .triton.compress import backward_kernel, kernel


def check(rows, end, index, weight, cos, sin, ratio, eps, dtype):
    lanes, D = _lanes(rows, weight), weight.shape[0]
    require(
        rows.dim() == 3
        and lanes in (1, 2)
        and rows.shape[2] == 2 * lanes * D
        and len(rows) == len(end)
        and end.shape == index.shape == cos.shape[:2] == sin.shape[:2],
        f"compress: rows {tuple(rows.shape)}, end {tuple(end.shape)}, weight {tuple(weight.shape)}, cos {tuple(cos.shape)} "
        "do not fit",
    )


def _lanes(rows, weight):
    """1 lane of D channels, or 2: overlapping windows."""
    return rows.shape[-1] // (2 * weight.shape[0])


def _slots(rows, end, index, lanes, ratio):
    """-> values and logits of the slots [B, E, lanes R, D], and where they lie: (row [B, E, lanes R], absent)."""
    N = rows.shape[1]
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
    values, logits, _ = _slots(rows, end, index, _lanes(rows, weight), ratio)
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
    values, logits, where = _slots(rows, end, index, _lanes(rows, weight), ratio)
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
