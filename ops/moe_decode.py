"""moe_decode: variant of moe for few tokens on CPU, compiled without gradients.

The mathematics, shapes and act_quant of moe (see moe.py), for fp32 weights that are not packed; moe
has checked the arguments. Each chosen expert is read once, row by row, for up to four of its
tokens: decoding is bound by memory (cpu/moe_decode.cpp). The node has no gradient: looking for one
would cost as much as a small expert.
"""

from __future__ import annotations

import torch

from .linear import materialized
from .moe_grouped import activate, quantized
from .registry import Op, register
from .swiglu import HAS_KERNELS


def gathered(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    weight: torch.Tensor,
    limit: float,
    act_quant: bool,
) -> torch.Tensor:
    """moe with the weights of each pair's expert, [N, K, 2I, d] and [N, K, d, I].

    Products and sums instead of matrix products, so that Inductor reads gathered weights in place.
    """
    x, dtype = quantized(x, act_quant), x.dtype
    h13 = (w13.float() * materialized(x).float()[:, None, None]).sum(-1).to(dtype)
    h = activate(h13, weight[..., None], limit).to(dtype)
    h = materialized(quantized(h, act_quant))
    y = (w2.float() * h.float()[:, :, None]).sum(-1).to(dtype)
    return y.float().sum(1)


def reference(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    idx: torch.Tensor,
    weight: torch.Tensor,
    limit: float,
    act_quant: bool,
) -> torch.Tensor:
    return gathered(x, w13[idx], w2[idx], weight, limit, act_quant)


def _flops(x, w13, w2, idx, *args, out_shape=None, **kw):
    return 3 * idx[0] * idx[1] * x[1] * w13[1]


_opaque = register(
    "moe_decode(Tensor x, Tensor w13, Tensor w2, Tensor idx, Tensor weight, float limit, "
    "bool act_quant) -> Tensor",
    impl=lambda *args: reference(*args).contiguous(),
    fake=lambda x, *rest: x.new_empty(x.shape),
    flops=_flops,
    cpp="moe_decode",
    native=HAS_KERNELS,
)

moe_decode = Op("moe_decode", reference, _opaque, check=None, internal=True)
