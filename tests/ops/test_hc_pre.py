"""What is special to hc_pre."""

from __future__ import annotations

import pytest
import torch

import ops
from cases import case_of, hc_pre
from harness import called, compiled

# post and comb of streams of ones, by docs/v4.md#hyper-connections
POST = [0.5866811, 0.5976520, 0.7261301, 0.9031999]
COMB = [
    [0.3090397, 0.2714342, 0.2200407, 0.1994844],
    [0.1709750, 0.2379257, 0.3049122, 0.2861861],
    [0.2396997, 0.2045394, 0.2352896, 0.3204703],
    [0.2802847, 0.2860997, 0.2397564, 0.1938582],
]


def near(a: torch.Tensor, b: torch.Tensor, error: float):
    torch.testing.assert_close(a, b, atol=error, rtol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("form", [ops.hc_pre.reference, ops.hc_pre.opaque])
def test_hc_pre_gives_the_vector_of_the_spec(form):
    # Streams of ones: the mix is the row's sum
    fn = torch.linspace(-1, 1, 24)[:, None].expand(24, 8) / 8
    base, scale = 0.3 * torch.arange(24.0).sin(), torch.tensor([0.5, 1, 2])
    y, post, comb = form(torch.ones(1, 1, 4, 2), fn, base, scale, 0.0, 1e-6, 20)
    sum_of_pre = 0.3775417 + 0.4491572 + 0.4649948 + 0.4189160
    near(y, torch.full((1, 1, 2), sum_of_pre), 3e-7)
    near(post[0, 0], torch.tensor(POST), 2e-7)
    near(comb[0, 0], torch.tensor(COMB), 1e-7)
    for axis in (-1, -2):
        near(comb.sum(axis), torch.full((1, 1, 4), 0.9999990), 2e-7)


def test_sinkhorn_is_one_node_of_hc_pre_when_compiled_for_cpu():
    """By default, without gradients; with them hc_pre is one node. Eager calls build no C++."""
    args = case_of(hc_pre, 2, 3, 4, 5, 20).args()
    for form, grad, expected in (
        (ops.hc_pre, False, ["sinkhorn"]),
        (ops.hc_pre, True, ["hc_pre"]),
        (ops.hc_pre.reference, False, []),
    ):
        names, got = compiled(form, args, grad)
        assert names == expected
        for a, b in zip(got, ops.hc_pre.reference(*args), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert called(ops.hc_pre, *args) == []
