"""Contracts of the kernels of ops/sparse_attn.py that the cases of tests/ops are too small for:
tiles, splits, gathers.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from ops.launch import launch, override_config
from testing import rms

op = importlib.import_module("ops.sparse_attn")  # the package's attribute of this name is the op
forward_module = importlib.import_module("ops.triton.sparse_attn")
backward_module = importlib.import_module("ops.triton.sparse_attn_backward")
backward_kv_module = importlib.import_module("ops.triton.sparse_attn_backward_kv")
forward_reference = op.forward_reference
backward_reference = op.backward_reference
forward_kernel = op.forward_kernel
backward_kernel = op.backward_kernel
SMALL = dict(BH=16, BN=16, num_warps=4, num_stages=1)


def arguments(B=1, T=9, H=5, D=24, r=8, W=20, kind="window", E=40, K=21, dtype=torch.float32):
    """Random operands; tokens see between none and all entries, the chosen ones in any order among
    -1.
    """
    q = torch.randn(B, T, H, D)
    kv = torch.randn(B, W - 1 + T, D)
    entries = torch.randn(B, E + 3, D)[:, :E]
    angle = torch.rand(B, T, r // 2) * 6
    window_len = torch.randint(1, W + 1, (B, T))
    lo = torch.randint(-2, E // 2, (B, T))  # padding may lie outside of what there is
    hi = lo + torch.randint(0, E // 2 + 4, (B, T))
    hi[:, ::4] = lo[:, ::4]  # nothing visible
    idx = torch.rand(B, T, E).argsort(-1)[..., :K]
    idx = torch.where(torch.rand(B, T, K) < 0.4, -1, idx)
    idx[:, 1::4] = -1
    rest = {
        "window": (None, None, None, None),
        "range": (entries, lo, hi, None),
        "chosen": (entries, lo, hi, idx),
    }[kind]
    args = (q, kv, torch.randn(2 * H)[::2], window_len, angle.cos(), angle.sin(), *rest, 1e-6)
    return tuple(
        a.to(dtype)
        if isinstance(a, torch.Tensor) and a.is_floating_point() and i in (0, 1, 6)
        else a
        for i, a in enumerate(args)
    )


def noted(monkeypatch, constant):
    """A list that receives the constant's value of every launch from now on."""
    values = []

    def noting(*args, **meta):
        values.append(meta.get(constant))
        launch(*args, **meta)

    for module in (forward_module, backward_module, backward_kv_module):
        monkeypatch.setattr(module, "launch", noting)
    return values


def widened(args):
    """The same values where the reference computes in fp32: its own error is then 1e-7."""
    return tuple(
        a.float() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args
    )


def compare(args, tolerance):
    """Kernels against the reference in fp32, forward and backward."""
    dtype, exact = args[0].dtype, widened(args)
    o, lse = forward_kernel(*args)
    expected, expected_lse = forward_reference(*exact)
    assert o.dtype == dtype and o.is_contiguous()
    assert rms(o, expected) <= tolerance and (lse - expected_lse).abs().max() <= 4 * tolerance
    g = torch.randn(o.shape).to(dtype)
    for name, x, y in zip(
        ("q", "kv", "sink", "entries"),
        backward_kernel(g, lse, *args),
        backward_reference(g.float(), expected_lse, *exact),
        strict=True,
    ):
        assert x.shape == y.shape and (not len(y) or rms(x, y) <= 2 * tolerance), name


@pytest.mark.parametrize("kind", ["window", "range", "chosen"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 5e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
def test_forward_and_backward_over_several_tiles(kind, dtype, tolerance):
    compare(arguments(B=2, T=5, kind=kind, dtype=dtype), tolerance)


@pytest.mark.parametrize(
    "shape",
    [
        dict(T=1),
        dict(H=17),
        dict(D=16, r=16),
        dict(W=1),
        dict(W=16, E=32, K=16),
        dict(D=40, r=2, K=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["window", "range", "chosen"])
def test_odd_shapes(kind, shape):
    compare(arguments(**{"T": 3, **shape}, kind=kind), 5e-6)


@pytest.mark.parametrize("kind", ["window", "range", "chosen"])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits_change_nothing(kind, splits, monkeypatch):
    args = arguments(T=2, B=2, W=33, E=100, K=50, kind=kind)
    monkeypatch.setattr(
        forward_module, "processors", lambda x: splits * 4
    )  # one block of heads, four tokens
    launched = noted(monkeypatch, "SPLITS")
    with override_config({"sparse_attn_forward": SMALL}):
        o, lse = forward_kernel(*args)
    expected, expected_lse = forward_reference(*args)
    assert rms(o, expected) <= 2e-6 and (lse - expected_lse).abs().max() <= 2e-5
    assert launched[0] == 1 if splits == 1 else launched[0] > 1 and len(launched) == 2


def test_more_splits_than_are_merged_at_once(monkeypatch):
    args = list(arguments(T=1, E=400, kind="range"))
    args[6] = args[6] * torch.linspace(0.1, 3, 400)[:, None]  # maxima grow
    args[7], args[8] = args[7] * 0, args[8] * 0 + 400
    monkeypatch.setattr(forward_module, "processors", lambda x: 14)
    launched = noted(monkeypatch, "SPLITS")
    with override_config({"sparse_attn_forward": SMALL}):
        o, lse = forward_kernel(*args)
    expected, expected_lse = forward_reference(*args)
    assert launched[0] > 8 and rms(o, expected) <= 2e-6 and (lse - expected_lse).abs().max() <= 2e-5


@pytest.mark.parametrize("kind", ["window", "range"])
def test_gradients_at_the_edges_of_blocks(kind):
    """Every key is the last, and every one the first, that some token sees."""
    T, W = 34, 5
    args = list(arguments(T=T, H=2, D=16, r=4, W=W, E=T, kind=kind))
    args[3] = torch.full((1, T), W)
    if kind == "range":
        t = torch.arange(T)[None]
        args[7], args[8] = torch.where(t % 2 == 0, t, 0), t + 1
    with override_config(
        {"sparse_attn_backward_kv": dict(BH=16, BK=16, num_warps=4, num_stages=1)}
    ):
        compare(tuple(args), 5e-6)


@pytest.mark.parametrize("masked", [0, 100], ids=["by atomics", "by entry"])
def test_gradients_of_chosen_entries_are_complete_either_way(masked, monkeypatch):
    monkeypatch.setattr(backward_module, "MASKED", masked)
    compare(arguments(B=2, T=6, kind="chosen"), 5e-6)


def test_deterministic_algorithms_avoid_atomics(monkeypatch):
    monkeypatch.setattr(backward_module, "MASKED", 0)
    scattered = noted(monkeypatch, "SCATTER")
    args = arguments(T=3, kind="chosen")
    o, lse = forward_kernel(*args)
    for wanted in (True, False):
        scattered.clear()
        torch.use_deterministic_algorithms(not wanted)
        try:
            backward_kernel(torch.randn_like(o), lse, *args)
        finally:
            torch.use_deterministic_algorithms(False)
        assert (True in scattered) == wanted


def test_a_batch_of_a_cache_is_read_in_place():
    """Entries whose batches are further apart than they are long must not be copied: a cache may be
    gigabytes.
    """
    args = list(arguments(B=2, T=2, kind="range"))
    cache = torch.full((2, 64, 24), float("nan"))
    cache[:, :40] = args[6]
    expected = forward_reference(*args)[0]
    args[6] = cache[:, :40]
    args[6].contiguous = None  # would be called
    assert rms(forward_kernel(*args)[0], expected) <= 2e-6


@pytest.mark.parametrize("kind", ["range", "chosen"])
def test_entries_may_have_more_values_than_an_int32_counts(kind):
    """Only the last rows' memory is ever touched."""
    *args, entries, lo, hi, idx, eps = arguments(
        T=5, H=2, D=512, W=4, kind=kind, dtype=torch.bfloat16
    )
    E, lo = entries.shape[1], lo.clamp(min=0)
    many, skipped = torch.empty(1, (1 << 22) + E, 512, dtype=torch.bfloat16), 1 << 22
    many[:, skipped:] = entries
    moved = None if idx is None else torch.where(idx < 0, -1, idx + skipped)
    for got, expected in zip(
        forward_kernel(*args, many, lo + skipped, hi + skipped, moved, eps),
        forward_kernel(*args, entries, lo, hi, idx, eps),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("empty", [dict(B=0), dict(T=0), dict(E=0)], ids=str)
def test_nothing_to_do(empty):
    args = arguments(B=empty.get("B", 1), T=empty.get("T", 3))
    entries = torch.randn(args[0].shape[0], empty.get("E", 4), 24)
    args = (
        *args[:6],
        entries,
        torch.zeros(args[3].shape, dtype=torch.int64),
        torch.full(args[3].shape, 4),
        None,
        1e-6,
    )
    o, lse = forward_kernel(*args)
    gradients = backward_kernel(torch.randn_like(o), lse, *args)
    assert [g.shape for g in gradients] == [args[i].shape for i in (0, 1, 2, 6)]
    assert all(torch.isfinite(g).all() for g in gradients) and (
        o.numel() == 0 or rms(o, forward_reference(*args)[0]) <= 2e-6
    )


@pytest.mark.parametrize("sink", [-float("inf"), -80.0, 80.0])
def test_extreme_sinks(sink):
    args = list(arguments(T=3, kind="range"))
    args[2] = torch.full_like(args[2], sink)
    o, lse = forward_kernel(*args)
    expected, expected_lse = forward_reference(*args)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)
