"""compress: pool windows of R tokens into entries, normalise and rotate them
(docs/v4.md#compressor).

A row holds a token's values and its pooling logits, [k | z], each with one lane of D channels, or
two (overlapping windows): the first is then read by the next window ("lookback"), the second by the
token's own.

    slots of entry w   one lane:   the R rows of window w
                       two lanes:  R rows of window w - 1 (none for w = 0), R of window w
    e = sum_slots softmax_slots(z) k, per channel    fp32
    e = RMSNorm(e in dtype) weight, last r dims rotated to position w R    (cos, sin)

    rows      [B, L, 2 lanes D] fp32, L the rows before the call and its T
    end       [B, N] int64, row of the window's last token
    index     [B, N] int64, w in its document
    weight    [D]
    cos, sin  [B, N, r/2] fp32
    out       [B, N, D] of the given dtype

Equations 9 to 12 (two lanes) and 20 to 23 (one) of arXiv 2606.19348; `Compressor` of DeepSeek's
inference code. An entry whose `end` lies outside the rows is finite and meaningless. Errors: shapes
that do not fit together.
"""

from __future__ import annotations

import torch

from .registry import Op, register, require
from .rope import reference as rotate
from .triton.compress import compress_backward_kernel, compress_kernel


def check(
    # the rows and their windows
    rows,
    end,
    index,
    # norm and RoPE of the entries
    weight,
    cos,
    sin,
    # constants
    ratio,
    eps,
    dtype,
):
    lanes = _lanes(rows, weight)
    D = weight.shape[0]
    require(
        rows.dim() == 3
        and lanes in (1, 2)
        and rows.shape[2] == 2 * lanes * D
        and len(rows) == len(end)
        and end.shape == index.shape == cos.shape[:2] == sin.shape[:2],
        f"compress: rows {tuple(rows.shape)}, end {tuple(end.shape)}, "
        f"weight {tuple(weight.shape)}, cos {tuple(cos.shape)} do not fit",
    )


def _lanes(rows, weight):
    """1 lane of D channels, or 2: overlapping windows."""
    return rows.shape[-1] // (2 * weight.shape[0])


def _slots(rows, end, index, lanes, ratio):
    """-> values and logits of the slots [B, N, lanes R, D], and their rows [B, N, lanes R]."""
    B, L, _ = rows.shape
    age = torch.arange(lanes * ratio - 1, -1, -1, device=rows.device)  # tokens before the last one
    slot_rows = (end[..., None] - age).clamp(0, L - 1)
    batch = torch.arange(B, device=rows.device)[:, None, None]
    if lanes == 1:
        values, logits = rows[batch, slot_rows].chunk(2, -1)
    else:  # the older R slots read the first lane, the newer R the second
        k1, k2, z1, z2 = rows.chunk(4, -1)
        older, newer = slot_rows.split(ratio, -1)
        values = torch.cat((k1[batch, older], k2[batch, newer]), 2)
        logits = torch.cat((z1[batch, older], z2[batch, newer]), 2)
    absent = (index == 0)[..., None] & (age >= ratio)  # the first window has no lookback
    return values, logits.masked_fill(absent[..., None], float("-inf")), slot_rows


def reference(
    # the rows and their windows
    rows: torch.Tensor,
    end: torch.Tensor,
    index: torch.Tensor,
    # norm and RoPE of the entries
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    # constants
    ratio: int,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    values, logits, _ = _slots(rows, end, index, _lanes(rows, weight), ratio)
    e = (values * logits.softmax(2)).sum(2).to(dtype).float()
    rstd = torch.rsqrt(e.square().mean(-1, keepdim=True) + eps)
    e = (e * rstd * weight.float()).to(dtype)
    return rotate(e, cos, sin, False)


def backward_reference(
    g: torch.Tensor,
    # the inputs of the forward: the rows and their windows
    rows: torch.Tensor,
    end: torch.Tensor,
    index: torch.Tensor,
    # norm and RoPE of the entries
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    # constants
    ratio: int,
    eps: float,
    dtype: torch.dtype,
):
    """Gradients of rows and weight."""
    # Forward again: p [B, N, lanes R, D], e [B, N, D]
    values, logits, slot_rows = _slots(rows, end, index, _lanes(rows, weight), ratio)
    p = logits.softmax(2)
    e = (values * p).sum(2).to(dtype).float()

    # Through rotation and norm: g_e = rstd (g w - e rstd^2 mean(g w e))
    g = rotate(g, cos, sin, True).float()
    rstd = torch.rsqrt(e.square().mean(-1, keepdim=True) + eps)
    g_weight = (g * e * rstd).sum((0, 1))
    g = g * weight.float()
    g_e = rstd * (g - e * rstd * rstd * (g * e).mean(-1, keepdim=True))

    # Through the softmax: g_k = p g_e, g_z = p (g_e k - sum_slots g_e k p)
    g_e = g_e[:, :, None]  # [B, N, 1, D]
    g_values = g_e * p
    g_logits = p * (g_e * values - (g_e * values * p).sum(2, keepdim=True))

    # Add to the rows that the slots came from
    B, L, _ = rows.shape
    D = weight.shape[0]
    g_rows = rows.new_zeros(rows.shape)
    flat = g_rows.view(B * L, 2, -1, D)  # [.., values or logits, lane, D]
    target = slot_rows + torch.arange(B, device=rows.device)[:, None, None] * L
    for lane, lane_target in enumerate(target.split(ratio, -1)):
        for half, g_slots in enumerate((g_values, g_logits)):
            g_lane = g_slots.split(ratio, 2)[lane].reshape(-1, D)
            flat[:, half, lane].index_add_(0, lane_target.flatten(), g_lane)
    return g_rows, g_weight.to(weight.dtype)


def _flops(*args, out_shape=None, **kw):
    """Elementwise: no matrix products are counted."""
    return 0


_backward_op = register(
    "compress_backward(Tensor g, Tensor rows, Tensor end, Tensor index, Tensor weight, "
    "Tensor cos, Tensor sin, int ratio, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    impl=backward_reference,
    fake=lambda g, rows, end, index, weight, *args: (
        rows.new_empty(rows.shape),
        weight.new_empty(weight.shape),
    ),
    flops=_flops,
    kernel=compress_backward_kernel,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.constants = inputs[6:]


def _backward(ctx, g):
    g_rows, g_weight = _backward_op(g, *ctx.saved_tensors, *ctx.constants)
    return g_rows, None, None, g_weight, *[None] * 5


_opaque = register(
    "compress(Tensor rows, Tensor end, Tensor index, Tensor weight, Tensor cos, Tensor sin, "
    "int ratio, float eps, ScalarType dtype) -> Tensor",
    impl=reference,
    fake=lambda rows, end, index, weight, cos, sin, ratio, eps, dtype: rows.new_empty(
        *end.shape, weight.shape[0], dtype=dtype
    ),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
    kernel=compress_kernel,
)

compress = Op("compress", reference, _opaque, check)
