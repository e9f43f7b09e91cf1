"""Contracts of moe's kernels that the cases of tests/ops do not reach: tiles, formats, routes."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ops
from cases import Case, moe
from contracts import CONTRACTS
from harness import close, low, run, tensors
from ops.formats import scale_to_float
from ops.launch import override_config, record
from ops.triton import moe as moe_kernels
from ops.triton import moe_backward
from ops.triton.moe_route import begin, max_blocks
from ops.triton.moe_tiles import DOWN, UP
from ops.triton.moe_values import as_weights
from testing import rms


def tile(BM, BN, BK, SWAP, SPLIT=1):
    return dict(BM=BM, BN=BN, BK=BK, SWAP=SWAP, SPLIT=SPLIT, num_warps=4, num_stages=2)


def results(form, case, args, backward):
    """Outputs, with backward also gradients."""
    if not backward:
        return [form(*args)]
    outputs, gradients = run(form, case, args)
    return outputs + gradients


def check(options, dtype, up=None, down=None, change=None, backward=True):
    """Outputs and gradients of the kernels against the formula in fp64.

    In bf16 the reference's own error is allowed, too: a value may cross the limit, or become its
    neighbour in fp8.
    """
    case = Case("moe", moe, options)
    args = low(case) if dtype == torch.bfloat16 else case.args()
    if change:
        args = change(*args)
    tiles = {}
    if up:
        names = "BN", "BK", "SWAP", "num_warps", "num_stages"
        tiles = {"moe_up": up, "moe_down": {name: (down or up)[name] for name in names}}
    with override_config(tiles):
        got = results(ops.moe.opaque, case, args, backward)
    exact = tensors(torch.Tensor.double, args)
    expected = results(CONTRACTS["moe"].spec, case, exact, backward)
    allowed = [5e-6] * len(expected)
    if dtype == torch.bfloat16:
        reference = results(ops.moe.reference, case, args, backward)
        assert [a.dtype for a in got] == [c.dtype for c in reference]
        allowed = [1e-2 + 1.2 * rms(c, b) for b, c in zip(expected, reference, strict=True)]
    for a, b, tolerance in zip(got, expected, allowed, strict=True):
        close(a, b, tolerance)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


# --------------------------------------------------------------------------------------------------
# Routing


@pytest.mark.parametrize("BM", [16, 32])
@pytest.mark.parametrize(
    "n, E", [(1, 1), (2, 300), (16, 1), (17, 5), (100, 64), (256, 3), (257, 65), (700, 130)]
)
@pytest.mark.parametrize("experts", ["any", "few", "one"])
def test_pairs_are_sorted_by_expert_and_every_block_is_of_one(n, E, BM, experts):
    idx = (
        torch.randint(0, E, (n, 1))
        if experts == "any"
        else torch.randint(0, min(E, 2), (n, 1)) * (E - 1)
    )
    idx = torch.full((n, 1), E // 2) if experts == "one" else idx
    route, _ = begin(idx, E, BM, torch.ones(n, 4), False, 0)
    assert torch.equal(route.order.long(), idx[:, 0].argsort(stable=True))
    counts = torch.bincount(idx[:, 0], minlength=E)
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    number = (counts + BM - 1) // BM
    assert route.starts.tolist() == starts.tolist() + [
        number.sum()
    ] and number.sum() <= route.number == len(route.blocks)
    first = number.cumsum(0) - number
    expected = [[e, first[e], starts[e], starts[e + 1]] for e in range(E) for _ in range(number[e])]
    for block, wanted in enumerate(expected):  # only the first of an expert's blocks is read
        if block == wanted[1]:
            assert route.blocks[block].tolist() == wanted


@pytest.mark.parametrize(
    "n, E, BM", [(1, 5, 16), (96, 6, 16), (97, 6, 32), (3, 256, 16), (4096, 256, 128)]
)
def test_there_is_a_program_for_every_block_that_there_can_be(n, E, BM):
    """The worst case: as many experts as can be have one pair more than whole blocks hold."""
    spread = min(n, E)
    counts = torch.ones(spread, dtype=torch.int64)
    counts[: (n - spread) // BM] += BM
    counts[0] += n - counts.sum()
    assert max_blocks(n, E, BM) == ((counts + BM - 1) // BM).sum() or (n - spread) // BM > spread


# --------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    "up, down",
    [
        (tile(16, 32, 32, 1), None),
        (tile(64, 16, 16, 0), tile(64, 64, 32, 1)),
        (tile(16, 128, 64, 0), None),
        (tile(16, 16, 32, 1, 2), tile(16, 128, 16, 0)),
        (tile(16, 64, 16, 1, 3), None),
    ],
)
@pytest.mark.parametrize(
    "size, dtype",
    [
        ((20, 3, 2, 70, 34), torch.float32),
        ((1, 3, 2, 64, 128), torch.bfloat16),
        ((33, 2, 1, 33, 65), torch.bfloat16),
    ],
)
def test_any_tile_gives_the_same(size, dtype, up, down):
    check((*size, "float", False), dtype, up, down)


WORDS = [
    (tile(16, 128, 128, 1), None),
    (tile(16, 64, 128, 1), tile(16, 32, 128, 1)),
    (tile(32, 128, 128, 0), tile(32, 128, 128, 1)),
    (tile(16, 128, 128, 1, 2), tile(16, 128, 128, 0)),
]


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "quantized"])
@pytest.mark.parametrize("fmt", ["fp8", "fp8f", "fp4"])
@pytest.mark.parametrize("tiles", range(4))
def test_words_of_packed_weights_hold_what_their_bytes_do(tiles, fmt, quantized):
    sizes = (1, 2, 2, 256, 128), (3, 2, 2, 128, 256), (20, 2, 1, 128, 128), (1, 3, 2, 256, 256)
    size = sizes[tiles]
    assert as_weights(*_packed(128, 128, fmt), torch.bfloat16).J
    check((*size, fmt, quantized), torch.bfloat16, *WORDS[tiles], backward=False)


def _packed(o, i, fmt):
    _, w13, _, _, _, s13, *_ = moe(1, 1, 1, i, o // 2, fmt, False)
    return w13, s13


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
@pytest.mark.parametrize("exponent", [-55, 55])
def test_scales_far_from_one_are_exact(fmt, exponent):
    def change(x, w13, w2, idx, weight, s13, s2, limit, quantized):
        return x, w13, w2, idx, weight, s13, s2 + exponent, limit, quantized

    check(
        (2, 2, 1, 128, 128, fmt, False),
        torch.bfloat16,
        tile(16, 128, 128, 1),
        change=change,
        backward=False,
    )


def test_weights_may_have_more_values_than_an_int32_counts():
    """Only the last expert's memory is ever touched."""
    E, d = 32769, 500
    I = 66
    x, w13, w2, idx, weight, s13, s2, *rest = low(Case("moe", moe, (2, 1, 1, d, I, "fp8", False)))
    many = [torch.empty(E, *t.shape[1:], dtype=t.dtype) for t in (w13, w2, s13, s2)]
    for t, last in zip(many, (w13, w2, s13, s2), strict=True):
        t[-1] = last[0]
    assert many[0].numel() > 1 << 31
    got = moe_kernels.forward(x, *many[:2], idx + E - 1, weight, *many[2:], *rest)
    assert torch.equal(got, moe_kernels.forward(x, w13, w2, idx, weight, s13, s2, *rest))


def test_scales_of_fp4_may_be_fp32():
    def change(x, w13, w2, idx, weight, s13, s2, limit, quantized):
        s13, s2 = (scale_to_float(s) * (1 + torch.rand(s.shape)) for s in (s13, s2))
        return x, w13, w2, idx, weight, s13, s2, limit, quantized

    check(
        (2, 2, 1, 128, 128, "fp4", False),
        torch.bfloat16,
        tile(16, 128, 128, 1),
        change=change,
        backward=False,
    )
    check((2, 2, 1, 34, 70, "fp4", False), torch.bfloat16, change=change, backward=False)


def test_weights_that_do_not_begin_at_a_word_are_read_by_bytes():
    def change(x, w13, w2, idx, weight, s13, s2, limit, quantized):
        shifted = torch.empty(w13.numel() + 1, dtype=torch.int8)[1:].view(w13.shape).copy_(w13)
        assert as_weights(w13, s13, x.dtype).J == 4 and as_weights(shifted, s13, x.dtype).J == 0
        return x, shifted, w2, idx, weight, s13, s2, limit, quantized

    check((2, 2, 1, 128, 128, "fp4", True), torch.bfloat16, change=change, backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "size, fmt, quantized",
    [
        ((3, 2, 2, 72, 130), "fp8", True),
        ((2, 3, 1, 130, 70), "fp8f", False),
        ((3, 2, 1, 34, 70), "fp4", True),
        ((1, 2, 2, 128, 128), "fp4", False),
    ],
)
def test_packed_weights_pass_gradients_on(size, fmt, quantized, dtype):
    check((*size, fmt, quantized), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        (1, 2, 2, 15, 9, "float", False),
        (9, 7, 2, 6, 4, "float", False, "one"),
        (40, 2, 3, 6, 4, "float", False, "twice"),
        (1, 3, 4, 6, 4, "float", True, "twice"),
        (128, 3, 2, 6, 4, "float", False),
        (86, 4, 3, 6, 4, "float", True),
        (270, 4, 1, 6, 4, "float", False),
        (3, 130, 2, 6, 4, "float", False),
        (17, 2, 1, 100, 150, "float", True),
    ],
    ids=str,
)
def test_whatever_the_experts(options, dtype):
    """One token; all to one expert; one twice; experts without tokens; as many pairs as one program
    routes, and more.
    """
    check(options, dtype)


@pytest.mark.parametrize(
    "fmt, up",
    [
        ("fp4", tile(16, 64, 128, 1)),
        ("fp8", tile(16, 64, 128, 1, 2)),
        ("float", tile(16, 64, 64, 1, 2)),
    ],
)
@pytest.mark.parametrize("N", [1, 3])
def test_where_barriers_do_not_order_stores_other_kernels_finish(N, fmt, up, monkeypatch):
    options = (N, 2, 2, 128, 128, fmt, True)
    args = low(Case("moe", moe, options))
    with override_config({"moe_up": up}):
        counted = ops.moe.opaque(*args)
        monkeypatch.setattr(moe_kernels, "arch", lambda x: "gfx942")
        assert torch.equal(ops.moe.opaque(*args), counted)
    check(options, torch.bfloat16, up, backward=False)


@pytest.mark.parametrize("N, K", [(0, 2), (3, 0)])
def test_no_pairs_give_zeros(N, K):
    x, w13, w2, idx, weight, *rest = Case("moe", moe, (5, 3, 2, 6, 4, "float", False)).args()
    args = [
        x[:N].requires_grad_(),
        w13.requires_grad_(),
        w2,
        idx[:N, :K],
        weight[:N, :K].requires_grad_(),
        *rest,
    ]
    y = ops.moe.opaque(*args)
    grads = torch.autograd.grad(y.sum(), (args[0], w13, args[4]))
    assert y.shape == (N, 6) and y.dtype == torch.float32 and not y.any()
    assert [g.shape for g in grads] == [args[0].shape, w13.shape, args[4].shape]
    assert not any(g.any() for g in grads)


def test_every_call_gives_the_same_bits():
    case = Case("moe", moe, (20, 3, 2, 16, 10, "float", True))
    first, second = (results(ops.moe.opaque, case, low(case), True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --------------------------------------------------------------------------------------------------
# Launches: few, and their number of programs is known without asking the GPU


def launches(N, fmt, quantized, backward=False, arch="sm_90", E=8, K=2):
    def weights(o, i):
        if fmt == "bf16":
            return torch.empty(E, o, i, dtype=torch.bfloat16), None
        scales = torch.empty(E, o, i // 32, dtype=torch.uint8)
        return torch.empty(E, o, i // 2, dtype=torch.int8), scales

    with FakeTensorMode(), record(arch) as recorded:
        (w13, s13), (w2, s2) = weights(512, 128), weights(128, 256)
        x = torch.empty(N, 128, dtype=torch.bfloat16)
        idx, weight = torch.empty(N, K, dtype=torch.int64), torch.empty(N, K)
        args = x, w13, w2, idx, weight, s13, s2, 10.0, quantized
        if backward:
            moe_backward.backward(torch.empty(N, 128), *args)
        else:
            moe_kernels.forward(*args)
    return [launch.name.removeprefix("moe_") for launch in recorded]


@pytest.mark.parametrize(
    "N, fmt, quantized, expected",
    [
        (1, "bf16", False, "up down"),
        (1, "fp4", True, "begin up down"),
        (8, "bf16", False, "begin up down sum"),
        (8, "fp4", True, "begin up down sum"),
        (128, "fp4", True, "begin up down sum"),
        (129, "bf16", False, "count begin up down sum"),
        (129, "fp4", True, "count begin begin up down sum"),
    ],
)
def test_few_kernels_are_launched(N, fmt, quantized, expected):
    assert launches(N, fmt, quantized) == expected.split()


def test_the_backward_is_few_kernels_too():
    frozen = ["begin", "up", "down", "act_backward", "down", "sum"]
    assert launches(64, "fp4", True, True) == frozen
    assert launches(64, "bf16", False, True) == [*frozen, "outer", "outer"]


def test_on_amd_nothing_is_counted():
    assert launches(1, "fp4", True, arch="gfx942") == ["begin", "up", "act", "down", "sum"]


@pytest.mark.parametrize("kind, rows", UP)
def test_tiles_are_allowed(kind, rows):
    """Blocks no higher than asked for, powers of two; down has tiles for every height."""
    assert UP[kind, rows] and DOWN[kind, rows]
    for BM, BN, BK, *_ in UP[kind, rows]:
        assert rows >= BM and BN <= 128
        assert all(size & (size - 1) == 0 and size >= 16 for size in (BM, BN, BK))
        assert kind != "words" or BK % 128 == 0


def test_token_counts_of_a_load_share_their_kernels():
    def compiled(N):
        shapes = (N, 256), (8, 512, 256), (8, 256, 256)
        with FakeTensorMode(), record("sm_90") as launches:
            x, w13, w2 = (torch.empty(shape, dtype=torch.bfloat16) for shape in shapes)
            idx, weight = torch.empty(N, 2, dtype=torch.int64), torch.empty(N, 2)
            moe_kernels.forward(x, w13, w2, idx, weight, None, None, 1.0, False)
        return {f"{launch.kernel} {launch.meta}" for launch in launches}

    assert compiled(1008) == compiled(1024)
