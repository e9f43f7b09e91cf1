"""linear_fp32: y = x W^T with exact products, fp32 sums and result: router, compressors, head
(docs/v4.md#whole-model).

    x [B, ..., i]   weight [o, i]   y [B, ..., o] fp32

A weight of 16 bits is never written in fp32. A GPU multiplies bf16 as it is: products of two bf16
are exact in fp32, and tensor cores sum in fp32. The gradient of y is fp32; there it is split into
two bf16 halves, of 16 bits together. On CPU, where products of bf16 are rounded to bf16, blocks of
rows are widened one at a time; for few tokens, compiled, products and sums are traced, so that
Inductor reads the weight in place. Errors: shapes that do not fit together.

`linear(x.float(), weight.float())` of DeepSeek's code (`Compressor`, `Gate` and `ParallelHead` in
inference/model.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .launch import arch
from .linear import FEW, is_few, sums_of_products
from .registry import Op, register, require

CHUNK = 1 << 20  # weights widened at a time
FEW_WIDENED = 16  # tokens whose products with a weight of 16 bits are traced


def check(x, weight):
    require(
        weight.dim() == 2 and x.dim() > 1 and x.shape[-1] == weight.shape[1],
        f"linear_fp32: x {tuple(x.shape)}, weight {tuple(weight.shape)} do not fit",
    )


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), weight.float())


def _blocks(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Its rows in blocks; in one if it is fp32."""
    rows = len(weight) if weight.dtype == torch.float32 else max(1, CHUNK // weight.shape[1])
    return weight.split(max(rows, 1))


def in_blocks(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `reference`, without a copy of the weight."""
    x = x.float()
    return torch.cat([F.linear(x, rows.float()) for rows in _blocks(weight)], -1)


def backward_in_blocks(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and weight, in their dtypes."""
    g, xf = g.flatten(0, -2), x.float().flatten(0, -2)
    g_x = xf.new_zeros(xf.shape)
    g_w = weight.new_empty(weight.shape)
    begin = 0
    for rows in _blocks(weight):
        part = g[:, begin : begin + len(rows)]
        g_x.addmm_(part, rows.float())
        g_w[begin : begin + len(rows)] = part.T @ xf
        begin += len(rows)
    return g_x.to(x.dtype).view(x.shape), g_w


def _in_16_bits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GPU multiplies them as they are."""
    return arch(x) != "cpu" and x.dtype == weight.dtype == torch.bfloat16


def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if not _in_16_bits(x, weight):
        return in_blocks(x, weight)
    y = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
    return y.view(*x.shape[:-1], -1)


def backward(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _in_16_bits(x, weight):
        return backward_in_blocks(g, x, weight)
    g, x_rows = g.flatten(0, -2), x.flatten(0, -2)
    high = g.to(x.dtype)
    low = (g - high.float()).to(x.dtype)

    def summed(right: torch.Tensor, transposed: bool) -> torch.Tensor:
        halves = (half.T if transposed else half for half in (high, low))
        a, b = (torch.mm(half, right, out_dtype=torch.float32) for half in halves)
        return (a + b).to(x.dtype)

    return summed(weight, False).view(x.shape), summed(x_rows, True)


def _flops(x, weight, *args, out_shape=None, **kw):
    return 2 * torch.Size(x).numel() * weight[0]


_backward_op = register(
    "linear_fp32_backward(Tensor g, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    impl=backward_in_blocks,
    fake=lambda g, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    flops=lambda g, *args, out_shape=None, **kw: 2 * _flops(*args),
    kernel=backward,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, g):
    return _backward_op(g.contiguous(), *ctx.saved_tensors)


_opaque = register(
    "linear_fp32(Tensor x, Tensor weight) -> Tensor",
    impl=in_blocks,
    fake=lambda x, weight: x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
    kernel=forward,
)


def _cpu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    widened = weight.dtype != torch.float32
    if is_few(x, weight, FEW_WIDENED if widened else FEW):
        return sums_of_products(x.float(), weight.float())
    return (_opaque if widened else reference)(x, weight)


linear_fp32 = Op("linear_fp32", reference, _opaque, check, cpu=_cpu)
