"""quant_linear: y = x W^T with FP8 weights and 128 x 128 block scales (spec 8, 11).

    W = e4m3 * scale of its block;   x is rounded to fp8 in blocks of 128 first if act_quant

    x       [..., i]                [..., g, i] with groups g > 1 (block-diagonal W)
    weight  [o, i] float8_e4m3fn
    scale   [ceil(o / 128), ceil(i / 128)] uint8 (e8m0 bits) or fp32
    y       [..., o]                [..., g, o / g]

The weights are frozen: the gradient is that of x alone, straight through the rounding. Errors: dtypes, shapes.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .act_quant import reference as fake_quant
from .formats import dequantize_fp8
from .registry import Op, register, require


def check(x, weight, scale, groups, act_quant):
    require(weight.dtype == torch.float8_e4m3fn and weight.dim() == 2,
            f"quant_linear: weight is {weight.dtype} {tuple(weight.shape)}, not float8_e4m3fn [o, i]")
    o, i = weight.shape
    require(scale.shape == (-(-o // 128), -(-i // 128)) and scale.dtype in (torch.uint8, torch.float32),
            f"quant_linear: scale {tuple(scale.shape)} {scale.dtype} does not fit weight {tuple(weight.shape)}")
    require(x.shape[-1] == i and o % groups == 0 and (groups == 1 or x.shape[-2:-1] == (groups,)),
            f"quant_linear: x {tuple(x.shape)} does not fit weight {tuple(weight.shape)} in {groups} groups")


def reference(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, groups: int, act_quant: bool) -> torch.Tensor:
    if act_quant:
        x = fake_quant(x, 128, "fp8")
    w = dequantize_fp8(weight, scale, x.dtype)
    return F.linear(x, w) if groups == 1 else torch.einsum("...gi,goi->...go", x, w.unflatten(0, (groups, -1))).contiguous()


def backward_reference(g: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, groups: int) -> torch.Tensor:
    """Gradient of x."""
    w = dequantize_fp8(weight, scale, g.dtype)
    return g @ w if groups == 1 else torch.einsum("...go,goi->...gi", g, w.unflatten(0, (groups, -1))).contiguous()


def _out_shape(x, weight, groups):
    return (*x[:-1], weight[0] // groups)


def _flops(x, weight, *args, out_shape=None, **kw):
    n = 2 * weight[1]
    for size in out_shape:
        n *= size
    return n


_backward_op = register(
    "quant_linear_backward(Tensor g, Tensor weight, Tensor scale, int groups) -> Tensor", impl=backward_reference,
    fake=lambda g, weight, scale, groups: g.new_empty(*g.shape[:-1], weight.shape[1]),
    flops=lambda g, weight, *args, out_shape=None, **kw: 2 * weight[1] * torch.Size(g).numel())


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])
    ctx.groups = inputs[3]


def _backward(ctx, g):
    return _backward_op(g, *ctx.saved_tensors, ctx.groups), None, None, None, None


_opaque = register("quant_linear(Tensor x, Tensor weight, Tensor scale, int groups, bool act_quant) -> Tensor", impl=reference,
                   fake=lambda x, weight, scale, groups, act_quant: x.new_empty(_out_shape(x.shape, weight.shape, groups)),
                   flops=_flops, setup_context=_setup, backward=_backward)

quant_linear = Op("quant_linear", reference, _opaque, check)
