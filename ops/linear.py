"""linear: y = x W^T without bias, of one matrix or of one for each group.

    x [..., i]      weight [o, i]      y [..., o]
    x [..., g, i]   weight [g, o, i]   y [..., g, o]

Everywhere the library's product, traced. But for FEW tokens, compiled for CPU without gradients,
its products and sums: Inductor fuses them with their neighbours, and a call of the library costs
as much as a small product. Errors: shapes that do not fit together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .registry import Op, require

FEW = 8  # tokens; with more the library is faster


def check(x, weight):
    groups = weight.shape[:-2]
    require(
        weight.dim() in (2, 3)
        and x.dim() >= weight.dim() - 1
        and x.shape[-1] == weight.shape[-1]
        and x.shape[-1 - len(groups) : -1] == groups,
        f"linear: x {tuple(x.shape)}, weight {tuple(weight.shape)} do not fit",
    )


def reference(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.dim() == 3:
        return torch.einsum("...gi,goi->...go", x, weight)
    return F.linear(x, weight)


def materialized(x: torch.Tensor) -> torch.Tensor:
    """x itself, as a strided view: Inductor computes one into a buffer, once, instead of anew for
    every row that uses it.
    """
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


def sums_of_products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `reference`, by elementwise products and sums: of a row of the weight with every token, so
    that it is read from memory once.
    """
    x = materialized(x)
    lead = x.shape[: x.dim() - weight.dim() + 1]
    tokens = x.reshape(-1, *weight.shape[:-2], x.shape[-1]).movedim(0, -2)  # [.., M, i]
    y = (weight[..., None, :] * tokens[..., None, :, :]).sum(-1)  # [.., o, M]
    return y.movedim(-1, 0).reshape(*lead, *weight.shape[:-1])


def is_few(x: torch.Tensor, weight: torch.Tensor, few: int = FEW) -> bool:
    """Whether `sums_of_products` is the faster form on CPU."""
    tokens = x.shape[: x.dim() - weight.dim() + 1].numel()
    fuses = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    return fuses and tokens <= few


def _cpu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (sums_of_products if is_few(x, weight) else reference)(x, weight)


linear = Op("linear", reference, reference, check, cpu=_cpu)
