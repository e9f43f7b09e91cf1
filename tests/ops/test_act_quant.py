"""What is special to act_quant."""

from __future__ import annotations

import pytest
import torch

import ops
from cases import act_quant, case_of
from ops.formats import fake_quant


@pytest.mark.kernels
def test_act_quant_gradient_passes_straight_through():
    x, block, fmt = case_of(act_quant, 64, "fp8", 2, 5, 70).args()
    for form in (ops.act_quant.reference, ops.act_quant.opaque):
        x.requires_grad_()
        y = form(x, block, fmt)
        assert torch.equal(y, fake_quant(x.detach(), block, fmt)) and not torch.equal(y, x)
        g = torch.randn(y.shape)
        assert torch.equal(torch.autograd.grad(y, x, g)[0], g)
