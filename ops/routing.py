"""Choosing by a router: reductions over the experts alone, which a compiler fuses into one kernel.

A call of topk is a launch or two of its own, and what is gathered by its result another. Both
functions work on columns [M, 1], one for each chosen expert; K is small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def largest(x: torch.Tensor, k: int) -> list[torch.Tensor]:
    """x [M, E] -> the indices of the k largest values of each row, in order, k x [M, 1] int64.

    Of equal values the first counts as larger.
    """
    e = torch.arange(x.shape[1], device=x.device)
    columns: list[torch.Tensor] = []
    for _ in range(k):
        columns.append(x.argmax(1, keepdim=True))
        x = torch.where(e == columns[-1], float("-inf"), x)
    return columns


def pick(x: torch.Tensor, columns: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """x [M, E], indices k x [M, 1] -> the values there, k x [M, 1]; differentiable."""
    e = torch.arange(x.shape[1], device=x.device)
    return [torch.where(e == column, x, 0.0).sum(1, keepdim=True) for column in columns]
