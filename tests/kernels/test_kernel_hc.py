"""The kernels of hyper-connections against their formulas in fp64: sinkhorn, hc_post, hc_pre."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ops
from contracts import spec_hc_post, spec_hc_post_pre, spec_hc_pre, spec_sinkhorn
from ops.launch import override_config, record
from ops.sinkhorn import backward as sinkhorn_backward
from ops.triton import hc_mix, hc_post, hc_post_pre, hc_pre, hc_pre_backward

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def processors(monkeypatch, count):
    """As if the GPU had so many: launches are split for them."""
    monkeypatch.setattr(hc_mix, "processors", lambda x: count)


def error(a, b) -> float:
    """Relative, in the norm of all values."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def rounding(b) -> float:
    """The error of bf16 values that are rounded once, and a margin for ties."""
    return 1.1 * error(b.bfloat16(), b) + 1e-6


def streams(B, T, n, d, dtype=torch.float32):
    """y, x, post, comb"""
    return (
        torch.randn(B, T, d).to(dtype),
        torch.randn(B, T, n, d).to(dtype),
        torch.randn(B, T, n),
        torch.randn(B, T, n, n),
    )


def mixer(n, d):
    """fn, base, scale"""
    rows = n * (2 + n)
    return torch.randn(rows, n * d) * (n * d) ** -0.5, torch.randn(rows) / 2, torch.rand(3) + 0.5


def run(form, args, constants, weights=()):
    """-> outputs, gradients of their sum with weights (random if not given), weights"""
    leaves = [a.detach().requires_grad_() for a in args]
    out = form(*leaves, *constants)
    out = (out,) if isinstance(out, torch.Tensor) else out
    weights = weights or [torch.randn(o.shape).bfloat16() for o in out]
    grad_outputs = [w.to(o.dtype) for w, o in zip(weights, out, strict=True)]
    grads = torch.autograd.grad(out, leaves, grad_outputs)
    return [o.detach() for o in out], grads, weights


def agree(op, spec, args, constants=(), rounded_between=False):
    """Outputs and gradients of the kernels, and of the formula in fp64. -> outputs"""
    out, grads, weights = run(op.opaque, args, constants)
    expected, expected_grads, _ = run(spec, [a.double() for a in args], constants, weights)
    low = any(a.dtype == torch.bfloat16 for a in args)
    for a, b in zip(out, expected, strict=True):
        assert a.isfinite().all() and a.is_contiguous() and a.shape == b.shape
        if rounded_between and low:
            assert error(a, b) <= 1e-2
        else:
            assert error(a, b) <= (rounding(b) if a.dtype == torch.bfloat16 else 5e-6)
    for a, b, t in zip(grads, expected_grads, args, strict=True):
        assert a.dtype == t.dtype
        assert (a - b).norm() <= (2e-2 if low else 1e-5) * b.norm().clamp(min=1)
    return out


# --------------------------------------------------------------------------------------------------
# sinkhorn


@pytest.mark.parametrize(
    "n, iters, count, BT",
    [(4, 20, 5, 8), (4, 2, 33, 32), (4, 1, 8, 8), (1, 2, 5, 8), (2, 3, 9, 8)]
    + [(3, 2, 7, 8), (8, 2, 2, 8), (9, 2, 3, 8)],
)
def test_sinkhorn_and_its_gradient(n, iters, count, BT):
    logits, g = 3 * torch.randn(count, n, n), torch.randn(count, n, n)
    exact = logits.double().requires_grad_()
    expected = spec_sinkhorn(exact, 1e-4, iters)
    with override_config(
        {name: {"BT": BT, "num_warps": 1} for name in ("sinkhorn_forward", "sinkhorn_backward")}
    ):
        assert error(ops.sinkhorn.opaque(logits, 1e-4, iters), expected) <= 2e-6
        gradient = sinkhorn_backward(g, logits, 1e-4, iters)
    assert n == 1 or error(gradient, torch.autograd.grad(expected, exact, g.double())[0]) <= 5e-6


def test_sinkhorn_of_extreme_logits():
    logits = torch.tensor(
        [[80.0, -80, 0, 1], [-90, 90, -90, 3], [0, 0, 0, 0], [1e-8, 500, -500, 2]]
    )[None]
    c = ops.sinkhorn.opaque(logits, 1e-6, 3)
    torch.testing.assert_close(c, ops.sinkhorn.reference(logits, 1e-6, 3), rtol=1e-4, atol=1e-6)
    assert sinkhorn_backward(torch.ones_like(c), logits, 1e-6, 3).isfinite().all()


# --------------------------------------------------------------------------------------------------
# hc_post

SMALL = {
    "hc_post_forward": {"BD": 16, "num_warps": 4},
    "hc_post_backward": {"BD": 16, "VEC": 4, "num_warps": 4},
    "hc_pre_mix": {"BT": 16, "BD": 16, "STAGES": 2, "num_warps": 4},
    "hc_pre_finish": {"BT": 8, "BD": 32, "num_warps": 4},
    "hc_pre_backward_tokens": {"BT": 8, "num_warps": 1},
    "hc_post_pre_mix": {"BT": 16, "BD": 16, "STAGES": 1, "num_warps": 4},
    "hc_pre_backward_streams": {"BT": 16, "BD": 16, "J": 2, "STAGES": 1, "num_warps": 4},
}
LARGE = {
    "hc_post_forward": {"BD": 64, "num_warps": 4},
    "hc_post_backward": {"BD": 64, "VEC": 8, "num_warps": 4},
    "hc_pre_mix": {"BT": 64, "BD": 64, "STAGES": 3, "num_warps": 4},
    "hc_pre_finish": {"BT": 64, "BD": 64, "num_warps": 4},
    "hc_pre_backward_tokens": {"BT": 64, "num_warps": 1},
    "hc_post_pre_mix": {"BT": 32, "BD": 64, "STAGES": 2, "num_warps": 4},
    "hc_pre_backward_streams": {"BT": 64, "BD": 64, "J": 4, "STAGES": 2, "num_warps": 4},
}
tiled = pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=["small", "large"])


@dtypes
@tiled
@pytest.mark.parametrize(
    "B, T, n, d",
    [(1, 2, 4, 64), (2, 1, 4, 63), (1, 1, 4, 65), (1, 1, 1, 17), (1, 1, 3, 40)]
    + [(1, 1, 8, 33), (1, 2, 9, 5)],
)
def test_hc_post(B, T, n, d, tiles, dtype):
    with override_config(tiles):
        agree(ops.hc_post, spec_hc_post, streams(B, T, n, d, dtype))


# --------------------------------------------------------------------------------------------------
# hc_pre

# tiles, processors and shapes: whole rows in a program, rows in pieces, a piece for every step
GRID = [
    (SMALL, 5, 1, 19, 4, 40, 2),
    (SMALL, 100, 2, 2, 4, 37, 1),
    (LARGE, 1, 1, 19, 4, 40, 1),
    (LARGE, 100, 1, 2, 3, 70, 3),
    (SMALL, 1, 1, 1, 1, 5, 2),
    (LARGE, 3, 1, 3, 8, 9, 1),
    (SMALL, 1, 1, 2, 9, 4, 1),
]
by_grid = pytest.mark.parametrize(
    "tiles, count, B, T, n, d, iters", GRID, ids=["-".join(map(str, row[1:])) for row in GRID]
)


@dtypes
@by_grid
def test_hc_pre(tiles, count, B, T, n, d, iters, dtype, monkeypatch):
    processors(monkeypatch, count)
    with override_config(tiles):
        agree(
            ops.hc_pre,
            spec_hc_pre,
            (streams(B, T, n, d, dtype)[1], *mixer(n, d)),
            (1e-3, 1e-3, iters),
        )


def test_many_tokens_are_as_few(monkeypatch):
    """Either side of the boundary between the tiles of decode and those of prefill."""
    processors(monkeypatch, 3)
    x, mix = streams(1, hc_mix.FEW_TOKENS + 2, 2, 16)[1], (*mixer(2, 16), 1e-3, 1e-3, 1)
    all_tokens = ops.hc_pre.opaque(x, *mix)
    all_but_two = ops.hc_pre.opaque(x[:, 2:], *mix)
    for many, few in zip(all_tokens, all_but_two, strict=True):
        torch.testing.assert_close(many[:, 2:], few)


@pytest.mark.parametrize("count", [1, 40])
def test_the_mix_of_bf16_streams_is_that_of_fp32_weights(count, monkeypatch):
    """Weights over many binades: each value to 2^-16 of the norm of what it adds up."""
    processors(monkeypatch, count)
    x, fn = streams(1, 3, 4, 600, torch.bfloat16)[1], mixer(4, 600)[0]
    fn *= torch.exp2(torch.randint(-12, 1, fn.shape).float())
    terms = fn.double()[:, None] * x.double().flatten(2)[0]  # [24, 3, 2400]
    mix = hc_mix.launch_mix(x, fn, None).sum(2)
    assert ((mix[:24] - terms.sum(2)).abs() <= 2**-16 * terms.norm(dim=2)).all()
    torch.testing.assert_close(
        mix[24].double(), x.double().square().sum((2, 3))[0], rtol=1e-6, atol=0
    )


def test_gradients_from_elsewhere_join_before_rounding():
    x = streams(1, 5, 4, 24, torch.bfloat16)[1]
    mix = mixer(4, 24)
    g_in = torch.randn(1, 5, 4, 24).bfloat16()
    grads = torch.randn(1, 5, 24).bfloat16(), torch.randn(1, 5, 4), torch.randn(1, 5, 4, 4)
    constants = (1e-3, 1e-3, 2)
    alone = hc_pre_backward.backward(*grads, x, *mix, *constants)
    joined = hc_pre_backward.backward(*grads, x, *mix, *constants, g_in)

    exact = [a.double().requires_grad_() for a in (x, *mix)]
    out = spec_hc_pre(*exact, *constants)
    expected = torch.autograd.grad(out, exact, [a.double() for a in grads])[0] + g_in.double()
    assert error(joined[0], expected) <= rounding(expected)
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], joined[1:], strict=True))


# --------------------------------------------------------------------------------------------------
# hc_post, then hc_pre


@dtypes
@by_grid
def test_hc_post_pre(tiles, count, B, T, n, d, iters, dtype, monkeypatch):
    """The streams are those of hc_post, to the bit; all else is exact for these rounded streams."""
    processors(monkeypatch, count)
    args, constants = (*streams(B, T, n, d, dtype), *mixer(n, d)), (1e-3, 1e-3, iters)
    with override_config(tiles):
        x, *out = agree(ops.hc_post_pre, spec_hc_post_pre, args, constants, rounded_between=True)
        assert torch.equal(x, ops.hc_post.opaque(*args[:4]))
    expected = spec_hc_pre(x.double(), *(a.double() for a in args[4:]), *constants)
    for a, b in zip(out, expected, strict=True):
        assert error(a, b) <= (rounding(b) if a.dtype == torch.bfloat16 else 5e-6)


# --------------------------------------------------------------------------------------------------
# All of them


@pytest.mark.parametrize("op", ["hc_post", "hc_pre", "hc_post_pre"])
def test_no_tokens(op):
    y, x, post, comb = streams(2, 0, 4, 6)
    args = {
        "hc_post": (y, x, post, comb),
        "hc_pre": (x, *mixer(4, 6)),
        "hc_post_pre": (y, x, post, comb, *mixer(4, 6)),
    }[op]
    constants = () if op == "hc_post" else (1e-3, 1e-3, 2)
    _, grads, _ = run(getattr(ops, op).opaque, args, constants)
    for g, a in zip(grads, args, strict=True):
        assert g.shape == a.shape and not g.any()
    assert ops.sinkhorn.opaque(comb, 1e-3, 2).shape == comb.shape


def test_results_do_not_vary(monkeypatch):
    processors(monkeypatch, 100)
    args = *streams(1, 2, 4, 40, torch.bfloat16), *mixer(4, 40)
    out, grads, weights = run(ops.hc_post_pre.opaque, args, (1e-3, 1e-3, 2))
    again, grads_again, _ = run(ops.hc_post_pre.opaque, args, (1e-3, 1e-3, 2), weights)
    for a, b in zip((*out, *grads), (*again, *grads_again), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("N, d", [(1, 4096), (8, 4096), (8192, 4096), (1, 7168), (16384, 7168)])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_launches(N, d, arch):
    """How many there are, and that every processor has work whatever the number of tokens."""
    with FakeTensorMode(), record(arch) as launches:
        y, x, post, comb, *mix = *streams(1, N, 4, d, torch.bfloat16), *mixer(4, d), 1e-6, 1e-6, 20
        hc_post.forward(y, x, post, comb)
        hc_pre.forward(x, *mix)
        hc_post_pre.forward(y, x, post, comb, *mix)
        hc_pre_backward.backward(y, post, comb, x, *mix)
        hc_post.backward(x, y, x, post, comb)
    assert [launch.name for launch in launches] == [
        "hc_post_forward",
        "hc_pre_mix",
        "hc_pre_finish",
        "hc_post_pre_mix",
        "hc_pre_finish",
        "hc_pre_mix",
        "hc_pre_backward_tokens",
        "hc_pre_backward_streams",
        "hc_pre_backward_reduce",
        "hc_post_backward",
    ]
    assert all(
        launch.grid[0] >= 64 for launch in launches if launch.name.endswith(("mix", "streams"))
    )
