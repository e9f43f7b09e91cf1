"""Choosing experts by reductions: the same as topk and gather, and one kernel on a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from ops.routing import largest, pick
from tools.fake_cuda import lower, on_cuda, trace


@pytest.mark.parametrize("rows, n, k", ((5, 16, 4), (1, 256, 6), (3, 4, 4), (2, 1, 1)))
@pytest.mark.parametrize("shift", (0.0, -9.0), ids=("mixed", "negative"))
def test_the_k_largest_and_their_values(rows, n, k, shift):
    x = (torch.randn(rows, n) + shift).requires_grad_()
    columns = largest(x.detach(), k)
    values = torch.cat(pick(x, columns), 1)
    expected = x.topk(k)
    assert torch.equal(torch.cat(columns, 1), expected.indices)
    assert torch.equal(values, expected.values)
    weight = torch.randn(rows, k)
    (got,) = torch.autograd.grad((values * weight).sum(), x)
    (wanted,) = torch.autograd.grad((expected.values * weight).sum(), x)
    assert torch.equal(got, wanted)


def test_of_equal_values_the_first_is_chosen_and_none_twice():
    assert torch.cat(largest(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 4), 1).tolist() == [[1, 2, 3, 0]]


def test_a_gpu_needs_one_kernel():
    def route(x):
        columns = largest(x, 6)
        values = pick(x.exp(), columns)
        return torch.cat(columns, 1), torch.cat([value / sum(values) for value in values], 1)

    (traced,) = trace(route, torch.randn(1, 256))
    assert len(re.findall(r"\.run\(", lower(*on_cuda(*traced)))) == 1
