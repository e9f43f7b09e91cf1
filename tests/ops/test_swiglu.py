"""The experts' activation, ops/swiglu.py: its backward is the gradient of its forward."""

from __future__ import annotations

import torch

from ops.swiglu import swiglu, swiglu_backward


def test_backward_is_the_gradient_of_the_forward():
    """In fp64, with values on both sides of the clamps; holds for any activation put there."""
    torch.manual_seed(0)
    gate, up = 3 * torch.randn(2, 50, 7, dtype=torch.float64)
    weight, g = torch.rand(50, 1, dtype=torch.float64), torch.randn(50, 7, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (weight, gate, up)]
    h = swiglu(gate, up, limit=2.0) * weight
    assert ((gate > 2) & (up < 2)).any() and (up.abs() > 2).any()
    expected = torch.autograd.grad(h, leaves, g)
    with torch.no_grad():
        y, g_weight, g_gate, g_up = swiglu_backward(g, weight, gate, up, 2.0)
    assert torch.allclose(y, h)
    for got, want in zip((g_weight[:, None], g_gate, g_up), expected, strict=True):
        assert torch.allclose(got, want)


def test_the_gate_is_clamped_above_and_up_on_both_sides():
    values = torch.tensor([-30.0, -3.0, 3.0, 30.0])
    one = torch.ones(4)
    silu = torch.nn.functional.silu
    assert torch.equal(swiglu(values, one, 4.0), silu(torch.tensor([-30.0, -3.0, 3.0, 4.0])))
    clamped = torch.tensor([-4.0, -3.0, 3.0, 4.0])
    assert torch.equal(swiglu(one, values, 4.0), silu(one) * clamped)
