"""rope: rotate consecutive pairs of the last r dims (spec 4).

    (a + ib) * e^{i angle}, or its conjugate for inverse; the other dims pass through

    x         [B, T, D] or [B, T, H, D]
    cos, sin  [B, T, r/2] fp32
    y         as x; rotated in fp32, one cast back

The backward is the inverse rotation. Errors: r > D, mismatched leading dims.
"""
from __future__ import annotations

import torch

from .registry import Op, register, require


def check(x, cos, sin, inverse):
    require(x.dim() in (3, 4) and x.shape[:2] == cos.shape[:2] == sin.shape[:2],
            f"rope: x {tuple(x.shape)} does not go with angles {tuple(cos.shape)}")
    require(2 * cos.shape[-1] <= x.shape[-1], f"rope: {2 * cos.shape[-1]} rotated dims exceed {x.shape[-1]}")


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    if x.dim() == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    sin = -sin if inverse else sin
    nope, pairs = x.tensor_split([x.shape[-1] - 2 * cos.shape[-1]], -1)
    a, b = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((nope, rotated.to(x.dtype)), -1)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.inverse = inputs[3]


def _backward(ctx, grad):
    return _opaque(grad.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None


_opaque = register("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor", impl=reference,
                   fake=lambda x, cos, sin, inverse: x.new_empty(x.shape),
                   flops=lambda x, cos, *args, out_shape=None, **kw: 0, setup_context=_setup, backward=_backward)

rope = Op("rope", reference, _opaque, check)
