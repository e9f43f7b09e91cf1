"""What is special to linear_fp32: weights of 16 bits are multiplied without a copy in fp32."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops
from testing import relative_error

module = importlib.import_module("ops.linear_fp32")


class Widest(TorchDispatchMode):
    """The most fp32 values in a tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.values = max(self.values, x.numel())
        return out


def inputs(tokens: int = 3, rows: int = 200, columns: int = 64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, columns), torch.randn(rows, columns)
    g = torch.randn(tokens, rows)
    return x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_(), g


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_weight_is_widened_in_blocks(monkeypatch, dtype):
    """Forward and backward; the result is as exact as with a whole copy."""
    monkeypatch.setattr(module, "CHUNK", 1000)
    x, weight, g = inputs()
    x, weight = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
    with Widest() as seen:
        y = ops.linear_fp32.opaque(x, weight)
        y.backward(g)
    assert seen.values <= 1000 < weight.numel()
    exact = x.detach().double() @ weight.detach().double().T
    assert y.dtype == torch.float32 and relative_error(y.detach(), exact) <= 2e-7
    rounding = 2e-3 if dtype == torch.bfloat16 else 3e-4
    assert relative_error(weight.grad, g.double().T @ x.detach().double()) <= rounding
    assert relative_error(x.grad, g.double() @ weight.detach().double()) <= rounding


@pytest.mark.parametrize("tokens", (1, module.FEW_WIDENED))
def test_decode_reads_the_weight_in_place(tokens):
    """Compiled for CPU, without gradients: no buffer of the weight's size."""
    x, weight, _ = inputs(tokens)
    torch._dynamo.reset()
    with torch.no_grad():
        y, (code, *_) = run_and_get_code(torch.compile(ops.linear_fp32, fullgraph=True), x, weight)
    assert relative_error(y, x.double() @ weight.double().T) <= 2e-7
    buffers = re.findall(r"empty_strided_cpu\(\((.*?),?\)", code)
    assert buffers and all(math.prod(map(int, b.split(", "))) < weight.numel() for b in buffers)


def test_on_a_gpu_two_halves_hold_the_gradient(monkeypatch):
    """Products of bf16 summed in fp32, as torch.mm(..., out_dtype=torch.float32) makes them."""

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        return (a.double() @ b.double()).float()

    monkeypatch.setattr(module, "arch", lambda x: "sm_90")
    monkeypatch.setattr(torch, "mm", mm)
    x, weight, g = (t.detach() for t in inputs())
    assert relative_error(module.forward(x, weight), x.double() @ weight.double().T) <= 1e-7
    g_x, g_w = module.backward(g, x, weight)
    for got, exact in ((g_x, g.double() @ weight.double()), (g_w, g.double().T @ x.double())):
        assert got.dtype == torch.bfloat16
        assert relative_error(got, exact) <= 1.01 * relative_error(exact.bfloat16(), exact)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_multiplies_exactly():
    x, weight, g = (t.detach().cuda() for t in inputs(7, 512, 4096))
    exact = x.double() @ weight.double().T
    assert relative_error(ops.linear_fp32(x, weight), exact) <= 1e-6
