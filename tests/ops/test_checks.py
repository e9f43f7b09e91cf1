"""Argument checks of every op: each form refuses a misfit, in one line that names the op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cases import FEW
from harness import OPS


def shorter(dim: int) -> Callable:
    return lambda t: t.narrow(dim, 0, t.shape[dim] - 1)


def becomes(value) -> Callable:
    return lambda _: value


def first(t: torch.Tensor) -> torch.Tensor:
    return t[0]


flat = torch.Tensor.flatten
# Which of the op's cases in FEW, which argument, and the change that makes it a misfit
MISFITS = {
    "act_quant": [(0, 1, becomes(0)), (0, 1, becomes(-64)), (0, 2, becomes("int8"))],
    "rope": [
        (0, 0, shorter(1)),
        (0, 0, flat),
        (0, 0, lambda x: x[..., :3]),
        (0, 0, lambda x: x[:, :, None]),
        (0, 1, shorter(0)),
        (0, 2, shorter(1)),
    ],
    "hc_pre": [
        (0, 0, shorter(2)),
        (0, 0, shorter(3)),
        (0, 0, first),
        *((0, i, shorter(0)) for i in (1, 2, 3)),
    ],
    "sinkhorn": [
        (0, 0, shorter(2)),
        (0, 0, flat),
        (0, 0, lambda t: t[..., :0, :0]),
        (0, 2, becomes(0)),
        (0, 0, lambda t: torch.zeros(17, 17)),
    ],
    "hc_post": [
        (0, 0, shorter(1)),
        (0, 1, shorter(2)),
        (0, 1, first),
        (0, 2, shorter(2)),
        (0, 3, shorter(3)),
    ],
    "hc_post_pre": [
        (0, 1, shorter(2)),
        (0, 1, shorter(3)),
        (0, 1, first),
        *((0, i, shorter(0)) for i in (0, 2, 3, 4, 5, 6)),
    ],
    "compress": [
        (0, 0, shorter(2)),
        (0, 0, shorter(0)),
        (0, 0, lambda rows: rows[..., None]),
        (0, 0, first),
        (0, 1, shorter(1)),
        (0, 2, shorter(0)),
        (0, 3, shorter(0)),
        (0, 4, shorter(1)),
        (0, 5, shorter(1)),
    ],
    "sparse_attn": [
        (0, 0, shorter(0)),
        (0, 0, shorter(2)),
        (0, 0, first),
        (0, 1, shorter(2)),
        (0, 1, shorter(0)),
        (0, 1, lambda kv: kv[:, :4]),
        (0, 2, shorter(0)),
        (0, 3, shorter(1)),
        (0, 4, shorter(1)),
        (0, 5, shorter(0)),
        (0, 4, lambda cos: cos.repeat(1, 1, 4)),
        (0, 9, becomes(torch.zeros(3, 5, 1))),
        (1, 6, shorter(0)),
        (1, 6, shorter(2)),
        (1, 7, shorter(1)),
        (1, 7, becomes(None)),
        (1, 8, shorter(0)),
        (2, 9, shorter(1)),
    ],
    "linear": [
        (0, 0, shorter(-1)),
        (0, 1, shorter(1)),
        (0, 1, lambda weight: weight[0]),
        (1, 0, shorter(1)),
    ],
    "linear_fp32": [(0, 0, shorter(-1)), (0, 1, shorter(1)), (0, 1, lambda weight: weight[None])],
    "indexer_topk": [
        (0, 0, shorter(3)),
        (0, 0, first),
        (0, 1, shorter(0)),
        (0, 2, shorter(2)),
        (0, 3, shorter(1)),
        (0, 4, shorter(1)),
        (0, 5, becomes(0)),
    ],
    "indexer_loss": [
        (0, 0, shorter(0)),
        (0, 0, shorter(3)),
        (0, 0, first),
        (0, 1, shorter(1)),
        (0, 1, lambda cos: cos.repeat(1, 1, 4)),
        (0, 2, shorter(0)),
        (0, 3, shorter(1)),
        (0, 3, shorter(2)),
        (0, 3, first),
        (0, 4, shorter(2)),
        (0, 5, shorter(1)),
        (0, 5, first),
        (0, 6, shorter(2)),
        (0, 7, shorter(2)),
        (0, 8, shorter(1)),
        (0, 9, shorter(0)),
        (0, 10, shorter(1)),
        (0, 10, first),
    ],
    "linear_cross_entropy": [(0, 0, shorter(1)), (0, 0, first), (0, 1, flat), (0, 2, shorter(0))],
    "quant_linear": [
        (0, 0, shorter(2)),
        (0, 1, torch.Tensor.float),
        (0, 1, flat),
        (0, 2, shorter(0)),
        (0, 2, shorter(1)),
        (0, 2, torch.Tensor.long),
        (0, 3, becomes(7)),
        (2, 3, becomes(4)),
        (2, 1, shorter(0)),
        (2, 0, lambda x: x[0, 0, 0]),
    ],
    "moe": [
        (0, 0, shorter(1)),
        (0, 0, first),
        (0, 1, shorter(0)),
        (0, 1, shorter(1)),
        (0, 1, first),
        (0, 2, shorter(2)),
        (0, 3, shorter(0)),
        (0, 3, flat),
        (0, 4, shorter(1)),
        (0, 5, becomes(torch.ones(4, 2, 1))),
        (1, 5, becomes(None)),
        (1, 6, becomes(None)),
        (1, 5, shorter(1)),
        (1, 6, shorter(2)),
        (2, 5, shorter(2)),
        (2, 6, shorter(1)),
        (2, 0, shorter(1)),
    ],
}


@pytest.mark.parametrize("case", [c for c in FEW[::3] if c.op in MISFITS], ids=lambda c: c.op)
def test_misfits_are_refused_in_one_line(case):
    op, three = OPS[case.op], [each for each in FEW if each.op == case.op]
    for which, position, change in MISFITS[case.op]:
        args = list(three[which].args())
        args[position] = change(args[position])
        for form in (op.reference, op.opaque, op.cpu, op):
            with pytest.raises(ValueError, match=rf"\A{case.op}: [^\n]*\Z"):
                form(*args)
