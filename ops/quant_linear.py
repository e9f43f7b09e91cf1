"""quant_linear: y = x W^T with FP8 weights and a scale per 128 x 128 block.

    W = e4m3 * scale of its block;   x is rounded to fp8 in blocks of 128 first if act_quant

    x       [..., i]                [..., g, i] with groups g > 1 (block-diagonal W)
    weight  [o, i] float8_e4m3fn
    scale   [ceil(o / 128), ceil(i / 128)] uint8 (e8m0 bits) or fp32
    y       [..., o]                [..., g, o / g]

Formula: DeepSeek's code (`fp8_gemm` in inference/kernel.py, `linear` in inference/model.py):
docs/v4.md#quantised-points, docs/v4.md#checkpoint. The weights are frozen: the gradient is that of
x alone, straight through the rounding. Errors: dtypes and shapes that do not fit. The kernels are
in triton/quant_linear.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .act_quant import reference as fake_quant
from .formats import dequantize_fp8
from .registry import Op, register, require
from .triton import quant_linear as kernels


def check(x, weight, scale, groups, act_quant):
    weight_shape = tuple(weight.shape)
    require(
        weight.dtype == torch.float8_e4m3fn and weight.dim() == 2,
        f"quant_linear: weight is {weight.dtype} {weight_shape}, not float8_e4m3fn [o, i]",
    )
    o, i = weight_shape
    require(
        scale.shape == (-(-o // 128), -(-i // 128)) and scale.dtype in (torch.uint8, torch.float32),
        f"quant_linear: scale {tuple(scale.shape)} {scale.dtype} does not fit weight "
        f"{weight_shape}",
    )
    require(
        x.shape[-1] == i and o % groups == 0 and (groups == 1 or x.shape[-2:-1] == (groups,)),
        f"quant_linear: x {tuple(x.shape)} does not fit weight {weight_shape} in {groups} groups",
    )


def reference(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, groups: int, act_quant: bool
) -> torch.Tensor:
    if act_quant:
        x = fake_quant(x, 128, "fp8")
    w = dequantize_fp8(weight, scale, x.dtype)
    if groups == 1:
        return F.linear(x, w)
    return torch.einsum("...gi,goi->...go", x, w.unflatten(0, (groups, -1))).contiguous()


def backward_reference(
    g: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, groups: int
) -> torch.Tensor:
    """Gradient of x."""
    w = dequantize_fp8(weight, scale, g.dtype)
    if groups == 1:
        return g @ w
    return torch.einsum("...go,goi->...gi", g, w.unflatten(0, (groups, -1))).contiguous()


def _fake(x, weight, scale, groups, act_quant):
    return x.new_empty(kernels.out_shape(x, weight, groups))


def _flops(x, weight, *args, out_shape=None, **kw):
    return 2 * weight[1] * torch.Size(out_shape).numel()


def _backward_flops(g, weight, *args, out_shape=None, **kw):
    return 2 * weight[1] * torch.Size(g).numel()


_backward_op = register(
    "quant_linear_backward(Tensor g, Tensor weight, Tensor scale, int groups) -> Tensor",
    impl=backward_reference,
    kernel=kernels.backward,
    fake=lambda g, weight, scale, groups: g.new_empty(*g.shape[:-1], weight.shape[1]),
    flops=_backward_flops,
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:3])
    ctx.groups = inputs[3]


def _backward(ctx, g):
    return _backward_op(g, *ctx.saved_tensors, ctx.groups), None, None, None, None


_opaque = register(
    "quant_linear(Tensor x, Tensor weight, Tensor scale, int groups, bool act_quant) -> Tensor",
    impl=reference,
    fake=_fake,
    kernel=kernels.forward,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
)

quant_linear = Op("quant_linear", reference, _opaque, check)
