"""What is special to quant_linear, and to moe with rounded inputs."""

from __future__ import annotations

import pytest
import torch

import ops
from ops.formats import fake_quant, quantize_fp8


@pytest.mark.kernels
@pytest.mark.parametrize("form", ["reference", "opaque"])
def test_linears_round_their_inputs_in_blocks_of_128(form):
    """Identity weights show the rounded values; a scale of its own would keep the small half."""
    torch.manual_seed(0)
    n, eye = 200, torch.eye(200)
    x = torch.randn(3, n) * torch.where(torch.arange(n) % 128 < 64, 1.0, 2.0**-16)
    x[:, 0] = 20.0
    rounded = fake_quant(x, 128, "fp8")
    for block in (64, 256):
        assert not torch.equal(rounded, fake_quant(x, block, "fp8"))
    weight, scale = quantize_fp8(eye)
    assert torch.equal(getattr(ops.quant_linear, form)(x, weight, scale, 1, True), rounded)

    # Every gate is the first channel, clamped to 10
    gate = torch.zeros(n, n).index_fill(1, torch.tensor([0]), 1.0)
    w13, idx = torch.cat((gate, eye))[None], torch.zeros(3, 1, dtype=torch.int64)
    y = getattr(ops.moe, form)(x, w13, eye[None], idx, torch.ones(3, 1), None, None, 10.0, True)
    h = torch.nn.functional.silu(torch.tensor(10.0)) * rounded.clamp(-10, 10)
    assert torch.equal(y, fake_quant(h, 128, "fp8"))
    assert not torch.equal(y, fake_quant(h, 64, "fp8"))
