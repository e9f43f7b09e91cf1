"""moe_kept: the routed experts for many tokens in training on CPU; what moe is there in fp32 when gradients are enabled.

The mathematics and shapes of moe (see moe.py), for fp32 weights that are not packed, without act_quant. The forward keeps
W1 x and W3 x of all pairs, which moe's backward would compute again: a quarter of its work, for 8 I bytes a pair. Errors:
as moe. Without a C++ compiler nothing is kept.
"""

from __future__ import annotations

import torch

from .cpp import plain
from .moe import _fake_backward, _flops, backward_reference, grouped
from .moe import check as check_moe
from .moe import reference as moe_reference
from .moe_cpp import SOURCE
from .registry import Op, register, require


def check(x, w13, w2, idx, weight, limit):
    check_moe(x, w13, w2, idx, weight, None, None, limit, False, "moe_kept")
    require(
        plain(x, w13, w2, idx, weight),
        f"moe_kept: takes float32 and int64 idx, not {x.dtype}, {w13.dtype}, {weight.dtype}, {idx.dtype}",
    )


def reference(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    idx: torch.Tensor,
    weight: torch.Tensor,
    limit: float,
) -> torch.Tensor:
    return moe_reference(x, w13, w2, idx, weight, None, None, limit, False)


def _fake(x, w13, w2, idx, *rest):
    """h13: W1 x and W3 x of all pairs, in the order of experts, each in whole vectors of 8."""
    return x.new_empty(x.shape), x.new_empty(idx.numel(), 2 * -(-(w13.shape[1] // 2) // 8) * 8)


def _with_zeros(x, w13, w2, idx, weight, limit):
    """Where there is no compiler: h13 is zeros, and not used."""
    return grouped(x, w13, w2, idx, weight, None, None, limit, False), torch.zeros_like(
        _fake(x, w13, w2, idx)[1]
    )


_backward_op = register(
    "moe_kept_backward(Tensor g, Tensor h13, Tensor x, Tensor w13, Tensor w2, Tensor idx, Tensor weight, float limit) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    impl=lambda g, h13, *tensors: backward_reference(
        g, *tensors[:5], None, None, tensors[5], False
    ),
    fake=lambda g, h13, *tensors: _fake_backward(g, *tensors[:5], None),
    cpp=SOURCE,
    takes=plain,
    flops=lambda g, h13, x, w13, w2, idx, *args, out_shape=None, **kw: 2 * _flops(x, w13, w2, idx),
)


def _setup(ctx, inputs, output):
    *tensors, ctx.limit = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx, g, _):
    g_x, g_w13, g_w2, g_weight = _backward_op(g, *ctx.saved_tensors, ctx.limit)
    return g_x, g_w13, g_w2, None, g_weight, None


_opaque = register(
    "moe_kept(Tensor x, Tensor w13, Tensor w2, Tensor idx, Tensor weight, float limit) -> (Tensor, Tensor)",
    impl=_with_zeros,
    cpp=SOURCE,
    takes=plain,
    fake=_fake,
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
)

moe_kept = Op("moe_kept", reference, lambda *args: _opaque(*args)[0], check)
