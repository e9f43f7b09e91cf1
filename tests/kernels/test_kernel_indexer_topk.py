"""Contracts of the indexer_topk kernel: the choice is exact, whatever the tiles, the splits and the
order of the scores.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ops
from ops.launch import override_config, record

op_module = importlib.import_module("ops.indexer_topk")
module = importlib.import_module("ops.triton.indexer_topk")
merge_module = importlib.import_module("ops.triton.indexer_topk_merge")
SMALL = dict(N=32, BC=16, CAP=16, C=16, PER=1, num_warps=4, num_stages=2)


@pytest.fixture
def tight(monkeypatch):
    """Splits list their best from 16 entries on, and a merge takes 64: long caches in small."""
    monkeypatch.setattr(module, "DENSE", 16)
    monkeypatch.setattr(merge_module, "WIDEST", 64)


def run(*args, **tiles) -> torch.Tensor:
    with override_config({"indexer_topk_forward": {**SMALL, **tiles}}):
        return ops.indexer_topk.opaque(*args)


def whole(*shape):
    """Integers from -2 to 2: their scores are exact, and many are equal."""
    return torch.randint(-2, 3, shape).float()


def causal(B, T, E):
    """Ratio 4, the last token sees all."""
    hi = E - T // 4 + torch.arange(T) // 4
    return torch.zeros(B, T, dtype=torch.int64), hi.expand(B, T).contiguous()


def scores(q, k, u, lo, hi):
    """[B, T, E] fp64; -inf where hidden."""
    s = torch.einsum(
        "bth,bthe->bte", u.double(), (q.double() @ k.double()[:, None].transpose(2, 3)).relu()
    )
    e = torch.arange(k.shape[1])
    return s.masked_fill((e < lo[..., None]) | (e >= hi[..., None]), -torch.inf)


def check(idx, q, k, u, lo, hi, topk, exact=True):
    """The K best, the lowest of equal ones, in ascending order, then -1; inexact scores may change
    places if they are close.
    """
    s, K = scores(q, k, u, lo, hi), min(topk, k.shape[1])
    best = torch.sort(s, stable=True, dim=-1, descending=True)
    expected = (
        best.indices[..., :K]
        .masked_fill(best.values[..., :K] == -torch.inf, 1 << 40)
        .sort(-1)
        .values
    )
    expected = expected.masked_fill(expected == 1 << 40, -1)
    assert idx.shape == expected.shape and idx.dtype == torch.int64 and idx.is_contiguous()
    if exact:
        assert torch.equal(idx, expected)
    else:
        assert (
            torch.equal(idx < 0, expected < 0)
            and ((idx.diff(dim=-1) > 0) | (idx[..., 1:] < 0)).all()
        )
        chosen = (
            s.gather(-1, idx.clamp(min=0))
            .masked_fill(idx < 0, -torch.inf)
            .sort(-1, descending=True)
            .values
        )
        torch.testing.assert_close(chosen, best.values[..., :K], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "tiles",
    [dict(), dict(N=16, BC=32, C=32), dict(N=2, PER=2), dict(CAP=128, C=32, PER=3)],
    ids=str,
)
@pytest.mark.parametrize("B, T, E, K", [(1, 9, 75, 5), (2, 3, 64, 8), (2, 5, 33, 1)])
def test_tiles_change_nothing(B, T, E, K, tiles):
    args = (whole(B, T, 2, 8), whole(B, E, 8), whole(B, T, 2), *causal(B, T, E), K)
    check(run(*args, **tiles), *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "B, T, H, D, E, K", [(2, 3, 17, 20, 75, 9), (1, 1, 64, 16, 150, 40), (2, 4, 1, 1, 40, 3)]
)
def test_random_scores(B, T, H, D, E, K, dtype):
    args = (
        *(torch.randn(shape).to(dtype) for shape in ((B, T, H, D), (B, E, D), (B, T, H))),
        *causal(B, T, E),
        K,
    )
    check(run(*args), *args, exact=False)
    check(ops.indexer_topk.opaque(*args), *args, exact=False)  # with the tiles of the table


@pytest.mark.parametrize(
    "order", ["ascending", "descending", "zero", "last but one", "alternating"]
)
@pytest.mark.parametrize("T", [5, 1], ids=["whole", "split"])
def test_a_buffer_that_overflows_keeps_the_best(order, T, tight):
    """Many times over; the worst order is ascending, where all that is kept is soon forgotten."""
    E, K = (140, 17) if T > 1 else (500, 3)
    e = torch.arange(E)
    k = (
        {
            "ascending": e,
            "descending": E - e,
            "zero": -1 - e,
            "last but one": 1 + (e == E - 2),
            "alternating": e * (-1) ** e,
        }[order]
        .float()
        .view(1, E, 1)
    )
    u = torch.tensor([1.0, -1.0]).repeat(3)[:T].view(1, T, 1)  # the second token wants the least
    args = torch.ones(1, T, 1, 1), k, u, *causal(1, T, E), K
    check(run(*args), *args)


@pytest.mark.parametrize("widest", [1 << 14, 64], ids=["one round", "more rounds"])
@pytest.mark.parametrize("dense", [1 << 11, 16], ids=["dense", "listed"])
@pytest.mark.parametrize("T, E, K", [(1, 300, 9), (2, 333, 17), (3, 40, 3)])
def test_splits_change_nothing(T, E, K, dense, widest, monkeypatch):
    """All, some or nothing is visible of the caches that a few programs share."""
    monkeypatch.setattr(module, "DENSE", dense)
    monkeypatch.setattr(merge_module, "WIDEST", widest)
    lo, hi = torch.tensor([[0, 7, 0, 0], [E, E // 2, K, 0]])[..., None].repeat(1, 1, T)
    hi[2] += torch.arange(T)
    args = (whole(4, T, 2, 3), whole(4, E, 3), whole(4, T, 2), lo, hi, K)
    check(run(*args, PER=5), *args)


def test_tokens_of_a_program_may_see_different_entries(tight):
    """Packed documents, nothing visible, all visible, limits outside of the cache: side by side."""
    lo = torch.tensor([[0, 0, 0, 40, 40, 70, 7, 30, 0, -5], [9, 60, 60, 0, 0, 33, 33, 33, 33, 78]])
    hi = torch.tensor(
        [[0, 3, 40, 41, 70, 70, 7, 29, 99, 20], [79, 79, 60, 5, 6, 38, 39, 40, 99, 99]]
    )
    q = whole(2, 10, 2, 3)
    k = whole(2, 79, 3)
    u = whole(2, 10, 2)
    check(run(q, k, u, lo, hi, 5), q, k, u, lo, hi, 5)
    for t in (slice(1, 3), slice(7, 10)):  # few tokens: split
        args = q[:, t], k, u[:, t], lo[:, t], hi[:, t], 5
        check(run(*args, PER=2), *args)


@pytest.mark.parametrize("B, T", [(1, 1), (2, 3)])
def test_a_cache_is_read_where_it_lies(B, T):
    """entries[:B, :-1]: rows of a larger buffer, at any stride between entries; copied only if
    channels lie apart.
    """
    q = whole(B, T, 2, 8)
    u = whole(B, T, 2)
    cache = whole(4, 41, 3, 8)
    for k in (
        cache[:B, :-1, 1],
        cache[0, :40, 0].expand(B, 40, 8),
        cache[:B, :40, 1].mT.contiguous().mT,
    ):
        args = (q, k, u, *causal(B, T, 40), 4)
        check(run(*args), *args)
        with record("sm_90") as launches:
            run(*args)
        assert (launches[0].args[1].data_ptr() == k.data_ptr()) == (k.stride(2) == 1)


@pytest.mark.parametrize(
    "q_dtype, k_dtype", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_dtypes_may_differ(q_dtype, k_dtype):
    q, k = (
        whole(1, 3, 2, 8).to(getattr(torch, q_dtype)),
        whole(1, 40, 8).to(getattr(torch, k_dtype)),
    )
    args = (q, k, whole(1, 3, 2).bfloat16(), *causal(1, 3, 40), 6)
    check(run(*args), *args)


def test_nothing_to_do():
    for B, T, E in ((0, 2, 5), (2, 0, 5), (2, 3, 0)):
        assert run(
            whole(B, T, 2, 8), whole(B, E, 8), whole(B, T, 2), *causal(B, T, E), 4
        ).shape == (B, T, min(4, E))


def test_very_many_are_chosen_by_the_reference(monkeypatch):
    args = (whole(1, 3, 2, 8), whole(1, 50, 8), whole(1, 3, 2), *causal(1, 3, 50), 9)
    monkeypatch.setattr(op_module, "LARGEST_K", 8)
    with record("sm_90") as launches:
        idx = run(*args)
    s = scores(*args[:-1])
    assert not launches and torch.equal(
        s.gather(-1, idx).sort(-1).values, s.topk(9).values.sort(-1).values
    )


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("T", [3, 1], ids=["whole", "split"])
def test_entries_that_are_no_numbers_are_still_entries(value, T, tight):
    """Which are chosen means nothing; that they are visible, and different, does."""
    q = torch.randn(2, T, 2, 8)
    k = torch.randn(2, 90, 8)
    u = torch.randn(2, T, 2)
    (lo, hi) = causal(2, T, 90)
    k[0, 30:60], u[1] = value, value
    idx = run(q, k, u, lo, hi, 7)
    assert (idx >= 0).all() and (idx < hi[..., None]).all() and (idx.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_scratch_is_small(arch):
    """Whatever the length; the scores of 8192 x 2048 alone would be 67 MB."""
    for B, T, E, K, limit in (
        (1, 8192, 2048, 512, 30),
        (1, 16384, 4096, 1024, 65),
        (1, 2048, 250000, 1024, 65),
        (1, 1, 262144, 512, 5),
        (8, 4, 262144, 1024, 95),
        (1, 300, 262144, 512, 65),
    ):
        with FakeTensorMode(), record(arch) as launches:
            q, k, u = (
                torch.empty(shape, dtype=torch.bfloat16)
                for shape in ((B, T, 64, 128), (B, E, 128), (B, T, 64))
            )
            module.indexer_topk_kernels(q, k, u, *torch.empty(2, B, T, dtype=torch.int64), K)
        tensors = {
            id(a): a
            for launch in launches
            for a in launch.args
            if isinstance(a, torch.Tensor) and a.dtype == torch.int32
        }
        assert 0 < sum(a.nbytes for a in tensors.values()) <= limit * 1e6 and len(launches) <= 3
