"""What is special to compress."""

from __future__ import annotations

import pytest
import torch

import ops
from cases import case_of, compress
from contracts import pooled
from harness import low, run, same

by_form = pytest.mark.parametrize("form", [ops.compress.reference, ops.compress.opaque])


@pytest.mark.kernels
@by_form
def test_entries_are_rounded_before_and_after_the_norm(form):
    rows, end, index, weight, cos, sin, *constants = low(case_of(compress, 3, 65, 4, 6, 4))
    e = pooled(rows.double(), end, index, 4, 6).bfloat16().double()
    e = e / (e.square().mean(-1, keepdim=True) + constants[1]).sqrt() * weight.double()
    out = form(rows, end, index, weight, torch.ones_like(cos), torch.zeros_like(sin), *constants)
    assert (out == e.bfloat16()).double().mean() > 0.99


@pytest.mark.kernels
@by_form
@pytest.mark.parametrize("ratio", [4, 3])
def test_a_window_that_ends_outside_is_finite_and_disturbs_nothing(form, ratio):
    case = case_of(compress, 2, 9, ratio, 6, 4)
    args = case.args()
    end = args[1].clone()
    end[0, 1] = -5
    end[1, 0] = args[0].shape[1]
    end[1, 2] = 10**9
    outside = (end < 0) | (end >= args[0].shape[1])
    inside, weights = ~outside[..., None], torch.randn(2, 3, 6)

    def masked(end):
        def inside_only(rows, _, *rest):
            return (form(rows, end, *rest) * weights).where(inside, 0.0)

        return run(inside_only, case, args)

    assert form(args[0], end, *args[2:]).isfinite().all()
    same(masked(end), masked(args[1]), 1e-6)
