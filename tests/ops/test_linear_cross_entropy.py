"""What is special to linear_cross_entropy."""

from __future__ import annotations

import pytest
import torch

import ops
from cases import FEW, case_of, linear_cross_entropy
from harness import close, record, run, tensors, with_gradients


@pytest.mark.kernels
@pytest.mark.parametrize(
    "form", [ops.linear_cross_entropy.reference, ops.linear_cross_entropy.opaque]
)
def test_ignored_targets_cost_nothing(form):
    case = case_of(linear_cross_entropy, 65, 9)
    args = case.args()
    ignored = args[2] < 0
    (loss,), (g_x, _) = run(form, case, args)
    assert ignored.any() and (loss[ignored] == 0).all() and (g_x[ignored] == 0).all()
    assert (loss[~ignored] > 0).all() and (g_x[~ignored] != 0).any(1).all()
    (loss,), grads = run(form, case, (*args[:2], torch.full_like(args[2], -1)))
    assert not loss.any() and not any(g.any() for g in grads)


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case", [case for case in FEW if case.op == "linear_cross_entropy"], ids=str
)
def test_the_second_output_is_the_log_of_the_denominator(case):
    args = case.args()
    x, weight, _ = tensors(torch.Tensor.double, args)
    op, _ = record(case).calls[0]
    lse = op(*with_gradients(case, args))[1]
    assert lse.dtype == torch.float32 and not lse.requires_grad
    close(lse, (x @ weight.T).logsumexp(1), 1e-6)
