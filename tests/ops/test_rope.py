"""What is special to rope."""

from __future__ import annotations

import pytest
import torch

import ops
from cases import case_of, rope
from harness import close


@pytest.mark.kernels
def test_rope_inverse_undoes_rope():
    x, cos, sin, _ = case_of(rope, 2, 5, 3, 10, 4, False).args()
    y = ops.rope(x, cos, sin, False)
    close(ops.rope(y, cos, sin, True), x, 1e-6)
    assert torch.equal(y[..., :6], x[..., :6]) and not torch.equal(y[..., 6:], x[..., 6:])
