"""What is special to linear: for few tokens, compiled for CPU, no library is called."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import ops
from ops.linear import FEW
from testing import relative_error


def calls(x: torch.Tensor, weight: torch.Tensor, grad: bool = False) -> tuple[int, int]:
    """How often generated code calls a library, and kernels of its own; the result is right."""

    def normed(x, weight):
        return ops.linear(x * x.square().mean(-1, keepdim=True).rsqrt(), weight).relu()

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        y, (code, *_) = run_and_get_code(torch.compile(normed, fullgraph=True), x, weight)
    exact = x.detach().double()
    exact = exact * exact.square().mean(-1, keepdim=True).rsqrt()
    exact = ops.linear.reference(exact, weight.detach().double())
    assert relative_error(y.detach(), exact.detach().relu()) <= 1e-6
    return code.count("extern_kernels."), code.count("cpp_fused")


@pytest.mark.parametrize("shapes", (((24,), (7, 24)), ((2, 24), (2, 7, 24))), ids=("one", "groups"))
@pytest.mark.parametrize("tokens", (1, FEW, FEW + 1))
def test_few_tokens_are_summed_by_generated_code(tokens, shapes):
    row, matrix = shapes
    x, weight = torch.randn(tokens, *row), torch.randn(matrix)
    assert (calls(x, weight)[0] == 0) == (tokens <= FEW)


def test_training_calls_the_library():
    x, weight = torch.randn(1, 24), torch.randn(7, 24, requires_grad=True)
    assert calls(x, weight, grad=True)[0] == 1
