"""The kernels of hyper-connections against their formulas in fp64: sinkhorn, hc_post, hc_pre and both at once."""
from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ops
from ops.launch import choose, record
from test_ops import spec_hc_post, spec_hc_post_pre, spec_hc_pre, spec_sinkhorn

sinkhorn, hc_pre, hc_post, hc_post_pre = (importlib.import_module(f"ops.{name}") for name in ("sinkhorn", "hc_pre", "hc_post", "hc_post_pre"))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def error(a, b) -> float:
    """Relative, in the norm of all values."""
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def streams(B, T, n, d, dtype=torch.float32):
    """y, x, post, comb"""
    return torch.randn(B, T, d).to(dtype), torch.randn(B, T, n, d).to(dtype), torch.randn(B, T, n), torch.randn(B, T, n, n)


def mixer(n, d):
    """fn, base, scale"""
    rows = n * (2 + n)
    return torch.randn(rows, n * d) * (n * d) ** -0.5, torch.randn(rows) / 2, torch.rand(3) + 0.5


def agree(op, spec, args, constants=(), rounding=1.1, exact=()):
    """Outputs, and gradients of a random combination of them. Outputs in `exact` are fp32 of other inputs than the spec's."""
    dtype = args[1].dtype if op in (ops.hc_post, ops.hc_post_pre) else args[0].dtype
    given, double = ([a.to(t).requires_grad_() for a in args] for t in (None, torch.float64))
    out, expected = op.opaque(*given, *constants), spec(*double, *constants)
    out, expected = ((t,) if isinstance(t, torch.Tensor) else t for t in (out, expected))
    for i, (a, b) in enumerate(zip(out, expected, strict=True)):
        assert a.isfinite().all() and a.is_contiguous() and a.shape == b.shape
        if i not in exact:
            assert error(a, b) <= (5e-6 if a.dtype == torch.float32 else rounding * error(b.to(a.dtype), b) + 1e-6)
    weights = [torch.randn(o.shape).bfloat16() for o in out]
    grads = [torch.autograd.grad([o * w for o, w in zip(outs, weights)], leaves, [torch.ones_like(o * w) for o, w in zip(outs, weights)])
             for outs, leaves in ((out, given), (expected, double))]
    for a, b, t in zip(*grads, given, strict=True):
        assert a.dtype == t.dtype and error(a, b) <= (1e-5 if dtype == torch.float32 else 2e-2) or b.norm() <= 1e-12 and a.norm() <= 1e-5
    return out, grads[0]


# ---------------------------------------------------------------------------------------------------------------------
# sinkhorn


@pytest.mark.parametrize("n, iters, count, BT", [(4, 20, 33, 32), (4, 3, 65, 64), (4, 2, 32, 32), (1, 2, 5, 32), (2, 1, 3, 32), (3, 4, 31, 32),
                                                 (8, 2, 2, 32), (9, 2, 3, 32)])
def test_sinkhorn_and_its_gradient(n, iters, count, BT):
    logits, g = 3 * torch.randn(count, n, n), torch.randn(count, n, n)
    exact = logits.double().requires_grad_()
    expected = spec_sinkhorn(exact, 1e-4, iters)
    with choose({name: {"BT": BT, "num_warps": 1} for name in ("sinkhorn_forward", "sinkhorn_backward")}):
        assert error(ops.sinkhorn.opaque(logits, 1e-4, iters), expected) <= 2e-6
        gradient = sinkhorn.backward_kernel(g, logits, 1e-4, iters)
    assert n == 1 or error(gradient, torch.autograd.grad(expected, exact, g.double())[0]) <= 5e-6


def test_sinkhorn_of_extreme_logits():
    logits = torch.tensor([[80.0, -80, 0, 1], [-90, 90, -90, 3], [0, 0, 0, 0], [1e-8, 500, -500, 2]])[None]
    c = ops.sinkhorn.opaque(logits, 1e-6, 20)
    torch.testing.assert_close(c, ops.sinkhorn.reference(logits, 1e-6, 20), rtol=1e-4, atol=1e-6)
    assert sinkhorn.backward_kernel(torch.ones_like(c), logits, 1e-6, 20).isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# hc_post

POST = {"one chunk": {"hc_post_forward": {"BD": 64, "num_warps": 4}, "hc_post_backward": {"BD": 64, "V": 8, "num_warps": 4}},
        "chunks": {"hc_post_forward": {"BD": 16, "num_warps": 4}, "hc_post_backward": {"BD": 16, "V": 4, "num_warps": 4}}}


@dtypes
@pytest.mark.parametrize("tiles", POST.values(), ids=POST)
@pytest.mark.parametrize("B, T, n, d", [(2, 3, 4, 64), (1, 2, 4, 63), (1, 1, 4, 65), (1, 2, 1, 17), (2, 1, 3, 40), (1, 1, 8, 33), (1, 2, 9, 5)])
def test_hc_post(B, T, n, d, tiles, dtype):
    with choose(tiles):
        agree(ops.hc_post, spec_hc_post, streams(B, T, n, d, dtype))


@pytest.mark.parametrize("call", ["post", "pre", "both", "sinkhorn"])
def test_no_tokens(call):
    y, x, post, comb = streams(2, 0, 4, 6)
    fn, base, scale = mixer(4, 6)
    op, args, constants = {"post": (ops.hc_post, (y, x, post, comb), ()), "pre": (ops.hc_pre, (x, fn, base, scale), (1e-3, 1e-3, 2)),
                           "both": (ops.hc_post_pre, (y, x, post, comb, fn, base, scale), (1e-3, 1e-3, 2)),
                           "sinkhorn": (ops.sinkhorn, (comb,), (1e-3, 2))}[call]
    out = op.opaque(*(a.requires_grad_(call != "sinkhorn") for a in args), *constants)
    if call != "sinkhorn":
        out = (out,) if call == "post" else out
        for g, a in zip(torch.autograd.grad([o.sum() for o in out], args), args):
            assert g.shape == a.shape and not g.any()


# ---------------------------------------------------------------------------------------------------------------------
# hc_pre

SMALL = {"hc_pre_mix": {"BT": 16, "BD": 16, "STAGES": 2, "num_warps": 4}, "hc_pre_finish": {"BT": 4, "BD": 16, "num_warps": 4},
         "hc_post_pre_mix": {"BT": 16, "BD": 16, "STAGES": 1, "num_warps": 4}, "hc_pre_backward_tokens": {"BT": 8, "num_warps": 1},
         "hc_pre_backward_streams": {"BT": 16, "BD": 16, "J": 2, "STAGES": 1, "num_warps": 4}, **POST["chunks"]}
LARGE = {"hc_pre_mix": {"BT": 64, "BD": 64, "STAGES": 3, "num_warps": 4}, "hc_pre_finish": {"BT": 64, "BD": 64, "num_warps": 4},
         "hc_post_pre_mix": {"BT": 32, "BD": 64, "STAGES": 2, "num_warps": 4}, "hc_pre_backward_tokens": {"BT": 64, "num_warps": 1},
         "hc_pre_backward_streams": {"BT": 64, "BD": 64, "J": 4, "STAGES": 2, "num_warps": 4}, **POST["one chunk"]}
tiled = pytest.mark.parametrize("tiles", [SMALL, LARGE], ids=["small", "large"])
shaped = pytest.mark.parametrize("B, T, n, d, iters", [(1, 19, 4, 40, 2), (2, 8, 4, 16, 1), (1, 2, 3, 37, 3), (1, 1, 1, 5, 2), (1, 3, 8, 9, 1),
                                                       (1, 2, 9, 4, 1)])


def processors(monkeypatch, count):
    """As if the GPU had so many: what a launch is split into."""
    monkeypatch.setattr(hc_pre, "processors", lambda x: count)


@dtypes
@tiled
@shaped
@pytest.mark.parametrize("count", [1, 5, 100])
def test_hc_pre(B, T, n, d, iters, tiles, count, dtype, monkeypatch):
    """Whole rows in a program, rows in pieces, a piece for every step."""
    processors(monkeypatch, count)
    with choose(tiles):
        agree(ops.hc_pre, spec_hc_pre, (streams(B, T, n, d, dtype)[1], *mixer(n, d)), (1e-3, 1e-3, iters))


def test_many_tokens_are_as_few(monkeypatch):
    """Either side of the boundary between the tiles of decode and of prefill, and in ranges of tokens when going back."""
    processors(monkeypatch, 3)
    x, mix = streams(1, hc_pre.FEW + 2, 2, 16)[1], mixer(2, 16)
    (many, *_), _ = agree(ops.hc_pre, spec_hc_pre, (x, *mix), (1e-3, 1e-3, 1))
    few, *_ = ops.hc_pre.opaque(x[:, : hc_pre.FEW], *mix, 1e-3, 1e-3, 1)
    torch.testing.assert_close(many[:, : hc_pre.FEW], few)


def test_the_mix_of_bf16_streams_is_that_of_fp32_weights():
    """Weights over many binades, sums that nearly cancel: errors stay near 2^-18 of the terms."""
    d = 600
    x, (fn, base, scale) = streams(1, 3, 4, d, torch.bfloat16)[1], mixer(4, d)
    fn *= torch.exp2(torch.randint(-12, 1, fn.shape).float())
    v = x.double().flatten(2)
    fn -= ((v @ fn.double().T)[0].T @ torch.linalg.pinv(v[0]).T * 0.999).float()  # orthogonal to all rows but for a thousandth
    out, expected = (form(t, fn, base, 1e3 * scale, 1e-6, 1e-6, 1)[1] for form, t in ((ops.hc_pre.opaque, x), (ops.hc_pre.reference, x.float())))
    exact = spec_hc_pre(x.double(), fn.double(), base.double(), 1e3 * scale.double(), 1e-6, 1e-6, 1)[1]
    assert error(out, exact) <= 1e-4 and error(expected, exact) <= 1e-4


def test_gradients_from_elsewhere_join_before_rounding():
    x, mix, g = streams(1, 5, 4, 24, torch.bfloat16)[1], mixer(4, 24), torch.randn(1, 5, 4, 24).bfloat16()
    grads = torch.randn(1, 5, 24).bfloat16(), torch.randn(1, 5, 4), torch.randn(1, 5, 4, 4)
    args = *grads, x, *mix, 1e-3, 1e-3, 2
    alone, joined = hc_pre.backward_kernel(*args), hc_pre.backward_kernel(*args, g)
    exact = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    leaves = [a.requires_grad_() for a in exact[3:7]]
    expected = torch.autograd.grad(spec_hc_pre(*leaves, *args[7:]), leaves, exact[:3])[0] + g.double()
    assert error(joined[0], expected) <= 1.1 * error(expected.bfloat16(), expected)
    assert all(torch.equal(a, b) for a, b in zip(alone[1:], joined[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# hc_post, then hc_pre


@dtypes
@tiled
@shaped
@pytest.mark.parametrize("count", [1, 100])
def test_hc_post_pre(B, T, n, d, iters, tiles, count, dtype, monkeypatch):
    """In bf16 the mix is exact for the streams that were written, which are rounded."""
    processors(monkeypatch, count)
    args, constants = (*streams(B, T, n, d, dtype), *mixer(n, d)), (1e-3, 1e-3, iters)
    with choose(tiles):
        rounded = dtype == torch.bfloat16
        (x, *out), _ = agree(ops.hc_post_pre, spec_hc_post_pre, args, constants, 2, (2, 3) if rounded else ())
        assert torch.equal(x, ops.hc_post.opaque(*args[:4]))
    expected = spec_hc_pre(x.double(), *(a.double() for a in args[4:]), *constants)
    for a, b in zip(out, expected, strict=True):
        assert error(a, b) <= (1.1 * error(b.bfloat16(), b) + 1e-6 if a.dtype == torch.bfloat16 else 5e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def test_results_do_not_vary(monkeypatch):
    processors(monkeypatch, 100)
    args = *streams(1, 9, 4, 40, torch.bfloat16), *mixer(4, 40)

    def run():
        leaves = [a.clone().requires_grad_() for a in args]
        out = ops.hc_post_pre.opaque(*leaves, 1e-3, 1e-3, 2)
        return *out, *torch.autograd.grad([o.float().sum() for o in out], leaves)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.parametrize("N, d", [(1, 4096), (8, 4096), (8192, 4096), (1, 7168), (16384, 7168)])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_launches(N, d, arch):
    """How many, and that they fill the GPU whatever the number of tokens."""
    with FakeTensorMode(), record(arch) as launches:
        args = *streams(1, N, 4, d, torch.bfloat16), *mixer(4, d)
        y, x, post, comb = args[:4]
        hc_post.kernel(*args[:4])
        hc_pre.kernel(x, *args[4:], 1e-6, 1e-6, 20)
        hc_post_pre.kernel(*args, 1e-6, 1e-6, 20)
        forward = len(launches)
        hc_pre.backward_kernel(y, post, comb, x, *args[4:], 1e-6, 1e-6, 20)
        hc_post.backward_kernel(x, *args[:4])
    assert forward == 5 and [launch.name for launch in launches[forward:]] == [
        "hc_pre_mix", "hc_pre_backward_tokens", "hc_pre_backward_streams", "hc_pre_backward_reduce", "hc_post_backward"]
    for launch in launches:
        if launch.name in ("hc_pre_mix", "hc_post_pre_mix", "hc_pre_backward_streams"):
            assert launch.grid[0] >= 64
