"""act_quant: round activations to a low-precision format and back, as served models compute.

    s = 2^ceil(log2(amax / max)) per block of the last dim;  y = round(x / s) * s

    x      [..., n] any float dtype
    block  values per scale: 64 or 128 for "fp8" (e4m3), 32 for "fp4" (e2m1);
           a shorter last block has a scale of its own
    y      [..., n] the dtype of x

Formula: DeepSeek's code (`act_quant` in inference/kernel.py), docs/v4.md#quantised-points; the
formats are in formats.py. The gradient passes straight through.
Errors: unknown format, block not positive. The kernel is in triton/act_quant.py.
"""

from __future__ import annotations

import torch

from .formats import fake_quant
from .registry import Op, register, require
from .triton import act_quant as kernels


def check(x, block, fmt):
    require(fmt in ("fp8", "fp4"), f"act_quant: format {fmt!r} is neither 'fp8' nor 'fp4'")
    require(block > 0, f"act_quant: block must be positive, not {block}")


def reference(x: torch.Tensor, block: int, fmt: str) -> torch.Tensor:
    y = fake_quant(x.detach(), block, fmt)
    # x - x.detach() is 0: exactly y, with the gradient of x.
    return y + (x - x.detach()) if x.requires_grad else y


_opaque = register(
    "act_quant(Tensor x, int block, str fmt) -> Tensor",
    impl=fake_quant,
    kernel=kernels.forward,
    fake=lambda x, block, fmt: x.new_empty(x.shape),
    flops=lambda *shapes, out_shape=None, **kw: 0,
    setup_context=lambda ctx, inputs, output: None,
    backward=lambda ctx, grad: (grad, None, None),
)

act_quant = Op("act_quant", reference, _opaque, check)
