"""moe_train: variant of moe for many tokens on CPU with gradients, in fp32, in C++ (cpu/moe.cpp).

The mathematics and shapes of moe (see moe.py), for fp32 weights that are not packed, without
act_quant; moe has checked the arguments. The forward saves the pre-activations W1 x and W3 x of all
pairs, which moe's backward would compute again: a quarter of its work, for 8 I bytes a pair.
Without a C++ compiler they are computed again.
"""

from __future__ import annotations

import torch

from .cpp import supports_cpp
from .moe_grouped import backward_fake, backward_reference, flops, grouped
from .registry import Op, register
from .swiglu import HAS_KERNELS

LANES = 8  # of a vector: pre-activations are saved in whole ones


def reference(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    idx: torch.Tensor,
    weight: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    return grouped(x, w13, w2, idx, weight, None, None, limit, False)


def _fake(x, w13, w2, idx, *rest):
    """-> y, and h13 [N K, 2 padded]: W1 x and W3 x of all pairs, in the order of experts."""
    I = w13.shape[1] // 2
    padded = -(-I // LANES) * LANES
    return x.new_empty(x.shape), x.new_empty(idx.numel(), 2 * padded)


def _without_cpp(x, w13, w2, idx, weight, limit):
    """h13 is zeros, and not used."""
    h13 = _fake(x, w13, w2, idx)[1]
    return reference(x, w13, w2, idx, weight, limit), torch.zeros_like(h13)


def _backward_without_cpp(g, h13, x, w13, w2, idx, weight, limit):
    return backward_reference(g, x, w13, w2, idx, weight, None, None, limit, False)


def _backward_flops(g, h13, x, w13, w2, idx, *args, out_shape=None, **kw):
    """Two gradients for each product of the forward."""
    return 2 * flops(x, w13, w2, idx)


_backward_op = register(
    "moe_train_backward(Tensor g, Tensor h13, Tensor x, Tensor w13, Tensor w2, Tensor idx, "
    "Tensor weight, float limit) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=_backward_without_cpp,
    fake=lambda g, h13, *tensors: backward_fake(g, *tensors[:5], None),
    flops=_backward_flops,
    cpp="moe",
    supports_cpp=supports_cpp,
    native=HAS_KERNELS,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.limit = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, g, _):
    g_x, g_w13, g_w2, g_weight = _backward_op(g, *ctx.saved_tensors, ctx.limit)
    return g_x, g_w13, g_w2, None, g_weight, None


_opaque = register(
    "moe_train(Tensor x, Tensor w13, Tensor w2, Tensor idx, Tensor weight, float limit) "
    "-> (Tensor, Tensor)",
    impl=_without_cpp,
    fake=_fake,
    flops=flops,
    setup_context=_setup,
    backward=_backward,
    cpp="moe",
    supports_cpp=supports_cpp,
    native=HAS_KERNELS,
)

moe_train = Op("moe_train", reference, lambda *args: _opaque(*args)[0], check=None, internal=True)
