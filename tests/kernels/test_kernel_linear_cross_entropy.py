"""Contracts of the kernels of linear_cross_entropy: chunks of the vocabulary, tiles, and what
tests/ops does not reach.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ops
from ops.launch import override_config, record
from testing import relative_error

module = importlib.import_module("ops.triton.linear_cross_entropy")
op = ops.linear_cross_entropy.opaque
TINY = dict(ROWS=2, BLOCK=16, num_warps=1)  # many tiles for few columns


def inputs(N, V, d, dtype=torch.float32, sharp=1.0):
    torch.manual_seed(0)
    x, weight = sharp * torch.randn(N, d), torch.randn(V, d)
    target = torch.randint(0, V, (N,))
    target[::4] = torch.tensor([0, V - 1, -100, -1]).repeat(N)[: len(target[::4])]
    return x.to(dtype), weight.to(dtype), target


def exact(x, weight, target, g=None):
    """-> loss, lse, and the gradients of x and weight; fp64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    logits = x @ weight.T
    lse = logits.logsumexp(1)
    loss = torch.where(target < 0, 0.0, lse - logits.gather(1, target.clamp(min=0)[:, None])[:, 0])
    g = torch.ones_like(loss) if g is None else g.double()
    return loss.detach(), lse.detach(), *torch.autograd.grad((loss * g).sum(), (x, weight))


def compare(x, weight, target, g=None, tolerance=2e-6, low=8e-3):
    """Forward and backward of the kernels against fp64."""
    g = torch.ones(len(x)) if g is None else g
    loss, lse, g_x, g_w = exact(x, weight, target, g)
    got, got_lse = module.forward_kernels(x, weight, target)
    assert relative_error(got, loss) < tolerance and relative_error(got_lse, lse) < tolerance
    for a, b in zip(
        module.backward_kernels(g, got_lse, x, weight, target), (g_x, g_w), strict=True
    ):
        assert relative_error(a, b) < (low if a.dtype.itemsize == 2 else 10 * tolerance)
        assert bool((a[b == 0] == 0).all())  # rows without a target, exactly


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Chunks of 128 columns, whatever the rows."""
    monkeypatch.setattr(module, "MAX_LOGITS", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "N, V, d", [(9, 300, 12), (17, 128, 5), (1, 257, 8), (20, 129, 3), (3, 1, 4), (2, 640, 7)]
)
def test_chunks_of_the_vocabulary_add_up(tiny_chunks, N, V, d, dtype):
    """Targets at both ends of chunks, the last of which is of any width."""
    x, weight, target = inputs(N, V, d, dtype)
    for i, t in enumerate((127, 128, 255, 256, V - 2)):
        if i < N and 0 <= t < V:
            target[N - 1 - i] = t
    compare(x, weight, target, torch.randn(N))


@pytest.mark.parametrize(
    "tile", [*module.CONFIGS[::2], TINY], ids=lambda c: f"{c['ROWS']}x{c['BLOCK']}"
)
def test_every_tile_gives_the_same(tiny_chunks, tile):
    with override_config(
        {"linear_cross_entropy_forward": tile, "linear_cross_entropy_backward": tile}
    ):
        compare(*inputs(5, 210, 6), torch.randn(5))


def test_chunking_changes_only_the_order_of_sums(monkeypatch):
    args, results = inputs(6, 700, 9), []
    for held in (1 << 27, 6 * 300, 1):
        monkeypatch.setattr(module, "MAX_LOGITS", held)
        loss, lse = module.forward_kernels(*args)
        results.append((loss, lse, *module.backward_kernels(torch.ones(6), lse, *args)))
    for other in results[1:]:
        assert all(relative_error(a, b) < 1e-6 for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharp", [1e4, 1e30])
def test_huge_logits_do_not_overflow(tiny_chunks, sharp, dtype):
    """The softmax is 0 or 1 almost everywhere; a row whose target has all of it costs nothing."""
    x, weight, target = inputs(8, 300, 6, dtype, sharp)
    target[5] = (x[5].double() @ weight.double().T).argmax()
    with override_config({"linear_cross_entropy_forward": TINY}):
        compare(x, weight, target)
        assert module.forward_kernels(x, weight, target)[0][5] == 0


def test_tiny_and_equal_logits(tiny_chunks):
    """ln V when all logits are the same, however large that one value is."""
    weight = torch.ones(300, 4)
    for value in (0.0, -1e4, 2.0**14):
        loss, lse = module.forward_kernels(
            torch.full((3, 4), value), weight, torch.tensor([0, 150, 299])
        )
        expected = torch.tensor(300.0).log()
        assert torch.allclose(lse, 4 * value + expected, rtol=1e-6)
        assert ((loss - expected).abs() < 1e-5 + 2e-7 * abs(4 * value)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(dtype):
    x, weight, target = inputs(0, 200, 6, dtype)
    for form in (op, ops.linear_cross_entropy.reference):
        w = weight.clone().requires_grad_()
        loss = form(x, w, target)
        loss.sum().backward()
        assert loss.shape == (0,) and not w.grad.any()


def test_ignored_rows_read_no_gradient(tiny_chunks):
    """Not even an infinite one; and their logits count nowhere."""
    x, weight, target = inputs(6, 150, 5)
    target[:] = torch.tensor([-1, 3, -100, 149, -1, 0])
    x[0], g = float("inf"), torch.tensor([float("inf"), 1.0, float("nan"), 2.0, 0.0, -1.0])
    x[0, 1] = float("nan")
    _, lse = module.forward_kernels(x, weight, target)
    g_x, g_w = module.backward_kernels(g, lse, x, weight, target)
    assert not g_x[target < 0].any()
    kept = target >= 0
    assert relative_error(g_x[kept], exact(x[kept], weight, target[kept], g[kept])[2]) < 2e-5
    x[0] = 0  # what is not finite here would make any product with it so, the reference's too
    for a, b in zip(
        module.backward_kernels(g, lse, x, weight, target),
        exact(x[kept], weight, target[kept], g[kept])[2:],
        strict=True,
    ):
        assert relative_error(a[kept] if len(a) == 6 else a, b) < 2e-5


@pytest.mark.parametrize(
    "types", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float16")]
)
def test_other_dtypes_meet_in_fp32(tiny_chunks, types):
    x, weight, target = inputs(7, 150, 5)
    types = tuple(getattr(torch, name) for name in types)
    compare(x.to(types[0]), weight.to(types[1]), target, low=2e-3)
    _, lse = module.forward_kernels(x.to(types[0]), weight.to(types[1]), target)
    grads = module.backward_kernels(torch.ones(7), lse, x.to(types[0]), weight.to(types[1]), target)
    assert tuple(g.dtype for g in grads) == types


def test_the_same_call_gives_the_same_bits(tiny_chunks):
    x, weight, target = inputs(9, 300, 8, torch.bfloat16)
    results = []
    for _ in range(2):
        loss, lse = module.forward_kernels(x, weight, target)
        results.append((loss, lse, *module.backward_kernels(loss, lse, x, weight, target)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class Largest(TorchDispatchMode):
    """Elements of the largest storage made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [
            t.untyped_storage().nbytes() // t.itemsize
            for t in tree_leaves(out)
            if isinstance(t, torch.Tensor)
        ]
        self.numel = max([self.numel, *made])
        return out


def test_no_more_logits_are_held_than_allowed(monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 8 * 256)
    x, weight, target = inputs(8, 2100, 1, torch.bfloat16)
    with Largest() as largest, record("sm_90") as launches:
        _, lse = module.forward_kernels(x, weight, target)
        module.backward_kernels(torch.ones(8), lse, x, weight, target)
    assert largest.numel == max(2100, 8 * 256) and len(launches) == 2 * 9
