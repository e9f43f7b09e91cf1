"""Contract: kernels add in fp32. However long a sum of bf16 is, its result is as if only that had
been rounded.

All terms are positive, so that sums grow and would lose what is added to them if they were kept in
bf16.
"""

from __future__ import annotations

import importlib

import pytest
import torch

import ops
from contracts import spec_hc_pre, spec_moe, spec_sparse_attn
from ops.launch import override_config

hc_pre = importlib.import_module("ops.hc_pre")
sparse_attn = importlib.import_module("ops.triton.sparse_attn")
SMALL = dict(num_warps=4, num_stages=1)
TILES = {
    "sparse_attn_forward": dict(BH=16, BN=16),
    "sparse_attn_backward_q": dict(BH=16, BN=16),
    "sparse_attn_backward_kv": dict(BH=16, BK=16),
    "moe_up": dict(BM=16, BN=16, BK=16, SWAP=0, SPLIT=1),
    "moe_down": dict(BN=16, BK=16, SWAP=0),
    "moe_outer": dict(BA=16, BB=16, BK=16),
}


def error(a, b) -> float:
    """Relative, in the norm of all values: what is positive has a mean."""
    return float((a.double() - b).norm() / b.norm())


def positive(*shape):
    return (torch.rand(shape) + 0.5).bfloat16()


def compare(op, spec, args, wrt, roundings):
    """Outputs and gradients of those arguments against fp64: errors in units of one rounding to
    bf16.
    """
    args = [a.detach().requires_grad_() if i in wrt else a for i, a in enumerate(args)]
    exact = [
        a.detach().double().requires_grad_(i in wrt)
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for i, a in enumerate(args)
    ]
    with override_config({name: {**tile, **SMALL} for name, tile in TILES.items()}):
        out = op.opaque(*args)
        g = positive(*out.shape)
        got = [out.detach(), *torch.autograd.grad(out, [args[i] for i in wrt], g.to(out.dtype))]
    expected = spec(*exact)
    expected = [
        expected.detach(),
        *torch.autograd.grad(expected, [exact[i] for i in wrt], g.double()),
    ]
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert error(a, b) <= roundings * error(b.bfloat16(), b), i


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("T, W", [(1, 640), (48, 48)], ids=["many keys", "many queries of a key"])
def test_attention(monkeypatch, T, W):
    """Queries that eps makes small give all keys about the same share; they are not split."""
    monkeypatch.setattr(sparse_attn, "processors", lambda x: 1)
    D, r = 16, 4
    angle = torch.rand(1, T, r // 2) / 10
    args = (
        (torch.randn(1, T, 16, D) / 50).bfloat16(),
        positive(1, W + T - 1, D),
        torch.zeros(16),
        torch.full((1, T), W),
        angle.cos(),
        angle.sin(),
        None,
        None,
        None,
        None,
        1e-2,
    )
    compare(ops.sparse_attn, spec_sparse_attn, args, (0, 1), 1.3)


@pytest.mark.parametrize(
    "N, d, I, K",
    [(1, 16, 640, 1), (1, 640, 16, 1), (448, 16, 16, 1), (2, 16, 16, 64)],
    ids=["wide h", "wide x", "many tokens", "many experts"],
)
def test_experts(N, d, I, K):
    args = (
        positive(N, d),
        positive(K, 2 * I, d) / d,
        positive(K, d, I) / I,
        torch.arange(K).expand(N, K).contiguous(),
        torch.ones(N, K),
        None,
        None,
        1e9,
        False,
    )
    compare(ops.moe, spec_moe, args, (0, 1, 2), 2.5)


def test_hc_pre_backward_keeps_what_bf16_would_cut_off():
    """Rows of fn with a large part in common, which cancels in the gradient of the streams."""
    n = 4
    d = 40
    constants = (1e-3, 1e-3, 2)
    x, fn = torch.randn(1, 19, n, d).bfloat16(), torch.randn(n * (2 + n), n * d) * (n * d) ** -0.5
    fn[2 * n :] += 16 * fn[:n].repeat_interleave(n, 0)
    g = torch.zeros(1, 19, d).bfloat16(), torch.zeros(1, 19, n), torch.randn(1, 19, n, n)
    args = x, fn, torch.randn(len(fn)) / 2, torch.ones(3)
    got = hc_pre.backward(*g, *args, *constants)
    exact = [a.double().requires_grad_() for a in args]
    expected = torch.autograd.grad(spec_hc_pre(*exact, *constants), exact, [a.double() for a in g])
    assert error(got[0], expected[0]) <= 1.2 * error(expected[0].bfloat16(), expected[0])
    assert error(got[1], expected[1]) <= 5e-5
