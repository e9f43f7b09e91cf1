"""The kernels of act_quant and quant_linear: paths, tiles, splits, values not in tests/ops."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ops.formats import dequantize_fp8, fake_quant, quantize_fp8, scale_to_float
from ops.launch import override_config, record
from ops.triton import act_quant as act_quant_kernels
from ops.triton import quant_linear as kernels
from testing import relative_error

# Errors of fp32 sums; on a GPU e4m3 products are added with fewer bits.
SUMS = 2e-6 if torch.cuda.is_available() else 5e-7
FP8_SUMS = 3e-4 if torch.cuda.is_available() else 5e-7
SMALL = dict(BN=16, BLOCKS=2, num_warps=2, num_stages=2)  # of the decode kernel
# Constants with which forward takes each path.
PATHS = {
    "decode": dict(MAX_DECODE_ROWS=99),
    "decode bits": dict(MAX_DECODE_ROWS=99, FP8_ARCHS=set()),
    "fp8": dict(MAX_DECODE_ROWS=0),
    "decoded": dict(MAX_DECODE_ROWS=0, FP8_ARCHS=set()),
    "decoded fp8": dict(MAX_DECODE_ROWS=0),
    "library": dict(MAX_DECODE_ROWS=0, MAX_PRODUCT_ROWS=0, FP8_ARCHS=set()),
}


def spread(*shape):
    return torch.randn(shape) * torch.exp2(torch.randint(-9, 3, shape).float())


def linear(M, i, o, groups=1, scales="e8m0", dtype=torch.float32):
    """-> x, weight, scale: blocks of different sizes in all three."""
    torch.manual_seed(0)
    size_of_row = torch.exp2(torch.randint(-3, 4, (o, 1)).float())
    weight, scale = quantize_fp8(torch.randn(o, i) * size_of_row)
    if scales == "fp32":
        scale = scale_to_float(scale) * (1 + torch.rand(scale.shape))
    else:
        scale = scale + torch.randint(0, 4, scale.shape, dtype=torch.uint8)
    return spread(M, *[groups] * (groups > 1), i).to(dtype), weight, scale


def exact(x, weight, scale, groups, act_quant):
    """In fp64."""
    x = (fake_quant(x, 128, "fp8") if act_quant else x).double()
    W = dequantize_fp8(weight, scale, torch.float64)
    if groups == 1:
        return x @ W.T
    return torch.stack([x[..., j, :] @ rows.T for j, rows in enumerate(W.chunk(groups))], -2)


def error(*args) -> float:
    """Of kernels.forward(*args)."""
    return relative_error(kernels.forward(*args), exact(*args))


@pytest.fixture
def take(monkeypatch):
    """take(name) makes forward take this path."""

    def path(name):
        for constant, value in PATHS[name].items():
            monkeypatch.setattr(kernels, constant, value)

    return path


# --------------------------------------------------------------------------------------------------
# act_quant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "block, fmt", [(64, "fp8"), (128, "fp8"), (32, "fp4"), (7, "fp8"), (48, "fp4")]
)
@pytest.mark.parametrize("shape", [(3, 448), (70, 33), (1, 1), (2, 3, 129)], ids=str)
def test_act_quant_is_exact(shape, block, fmt, dtype):
    torch.manual_seed(0)
    x = spread(*shape)
    x.view(-1)[::7] = 0
    x = x.to(dtype)
    assert torch.equal(act_quant_kernels.forward(x, block, fmt), fake_quant(x, block, fmt))


@pytest.mark.parametrize("size", [1, 64, 4096, 8192])
@pytest.mark.parametrize("block, fmt", [(128, "fp8"), (32, "fp4")])
def test_act_quant_is_the_same_by_any_tile(size, block, fmt):
    x = spread(5, 300)
    with override_config({"act_quant": dict(SIZE=size, num_warps=4)}):
        assert torch.equal(act_quant_kernels.forward(x, block, fmt), fake_quant(x, block, fmt))


def test_act_quant_of_every_bf16_value():
    """Each in a block of its own, and with a neighbour that sets the scale."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    for fmt, largest in (("fp8", 448), ("fp4", 6)):
        pairs = torch.stack((x, torch.full_like(x, 0.75 * largest)), 1)
        for block, rows in ((1, x[::5]), (2, pairs)):
            rows = rows.reshape(4, -1)
            assert torch.equal(
                act_quant_kernels.forward(rows, block, fmt), fake_quant(rows, block, fmt)
            )


def test_act_quant_reads_views_in_place_and_writes_fresh_rows():
    wide = spread(2, 3, 100)
    x = wide[..., 5:75]
    with record("sm_90") as launches:
        act_quant_kernels.forward(x, 64, "fp8")
    assert len(launches) == 1 and launches[0].args[0].data_ptr() == x.data_ptr()
    assert torch.equal(act_quant_kernels.forward(x, 64, "fp8"), fake_quant(x, 64, "fp8"))
    for empty in (wide[:0], wide[..., :0]):
        assert act_quant_kernels.forward(empty, 64, "fp8").shape == empty.shape


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_act_quant_hides_nothing_that_is_not_finite(fmt):
    x = torch.randn(3, 64)
    x[0, 3], x[1, 40] = float("nan"), float("inf")
    y = act_quant_kernels.forward(x, 32, fmt)
    assert y[0, 3].isnan() and not y[1, 40].isfinite()
    good = torch.ones(3, 64, dtype=torch.bool)
    good[0, :32] = good[1, 32:] = False
    assert torch.equal(y[good], fake_quant(x, 32, fmt)[good])


@pytest.mark.parametrize("rows, n", [(5, 300), (1, 128), (40, 7)])
def test_quantize_keeps_values_and_scales_apart(rows, n):
    x = spread(rows, n)
    q, scales = act_quant_kernels.quantize(x)
    assert q.dtype == torch.float8_e4m3fn and scales.shape == (-(-n // 128), rows)
    assert torch.equal(
        q.float() * scales.T.repeat_interleave(128, 1)[:, :n], fake_quant(x, 128, "fp8")
    )


# --------------------------------------------------------------------------------------------------
# quant_linear


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "dtype, scales, M, i, o, groups, act_quant",
    [
        (torch.float32, "e8m0", 3, 270, 40, 1, True),
        (torch.float32, "fp32", 1, 130, 33, 1, True),
        (torch.bfloat16, "e8m0", 5, 270, 40, 1, False),
        (torch.bfloat16, "fp32", 2, 140, 39, 3, False),
        (torch.bfloat16, "e8m0", 17, 128, 150, 1, True),
        (torch.float16, "e8m0", 4, 100, 34, 2, False),
        (torch.float32, "e8m0", 2, 140, 270, 2, True),
        (torch.bfloat16, "fp32", 1, 20, 7, 7, True),
    ],
    ids=str,
)
def test_all_paths_agree(take, path, dtype, scales, M, i, o, groups, act_quant):
    """To the errors of fp32 sums and the rounded output; the library also rounds weights."""
    take(path)
    x, weight, scale = linear(M, i, o, groups, scales, dtype)
    expected = exact(x, weight, scale, groups, act_quant)
    got = kernels.forward(x, weight, scale, groups, act_quant)
    assert got.dtype == dtype and got.shape == expected.shape
    rounding = relative_error(expected.to(dtype), expected) if dtype != torch.float32 else 0
    roundings = 3 if path == "library" and scales == "fp32" else 1.02
    assert relative_error(got, expected) < roundings * rounding + (
        FP8_SUMS if "fp8" in path else SUMS
    )


@pytest.mark.parametrize(
    "tile", kernels.CONFIGS_DECODE + [SMALL], ids=lambda c: f"{c['BN']}x{c['BLOCKS']}"
)
@pytest.mark.parametrize("rows", [1, 16])
def test_decode_is_the_same_by_any_tile(tile, rows):
    x, weight, scale = linear(rows, 1300 if rows == 1 else 300, 18, 1)
    with override_config({"quant_linear_decode": tile}):
        assert error(x, weight, scale, 1, True) < SUMS


@pytest.mark.parametrize("tile", kernels.CONFIGS_PRODUCT, ids=lambda c: f"{c['BM']}x{c['BN']}")
@pytest.mark.parametrize("rows, o, groups", [(17, 130, 1), (130, 40, 2)])
def test_products_are_the_same_by_any_tile(tile, rows, o, groups):
    x, weight, scale = linear(rows, 140, o, groups)
    with override_config({"quant_linear_product": tile}):
        for dtype, act_quant in ((torch.float32, True), (torch.bfloat16, False)):
            expected = exact(x.to(dtype), weight, scale, groups, act_quant)
            got = kernels.forward(x.to(dtype), weight, scale, groups, act_quant)
            rounding = 1.02 * relative_error(expected.bfloat16(), expected)
            assert relative_error(got, expected) < (FP8_SUMS if act_quant else SUMS + rounding)


@pytest.mark.parametrize("path", ["decode", "fp8"])
def test_the_last_tile_of_a_group_may_be_empty(take, path):
    """It begins past the last row of scales: the interpreter stops a kernel that reads there."""
    take(path)
    x, weight, scale = linear(3, 20, 384, 4)
    largest = {
        "quant_linear_decode": kernels.CONFIGS_DECODE[0],
        "quant_linear_product": kernels.CONFIGS_PRODUCT[0],
    }
    with override_config(largest):
        assert error(x, weight, scale, 4, True) < FP8_SUMS


def test_many_tiles_are_each_computed_once():
    """More than eight tiles high, and a last few that are fewer."""
    x, weight, scale = linear(147, 20, 70)
    with override_config({"quant_linear_product": dict(BM=16, BN=32, num_warps=1, num_stages=1)}):
        assert error(x, weight, scale, 1, True) < FP8_SUMS


@pytest.mark.parametrize(
    "rows, i, o, groups, splits", [(1, 4300, 20, 1, 4), (3, 2100, 10, 2, 2), (2, 8200, 5, 1, 7)]
)
def test_splits_merge_in_a_fixed_order(monkeypatch, rows, i, o, groups, splits):
    x, weight, scale = linear(rows, i, o, groups)
    monkeypatch.setattr(kernels, "processors", lambda x: 1000)
    with override_config({"quant_linear_decode": SMALL}):
        with record("sm_90") as launches:
            kernels.forward(x, weight, scale, groups, True)
        assert [launch.name for launch in launches] == [
            "quant_linear_decode_kernel",
            "quant_linear_merge_kernel",
        ]
        assert launches[0].grid[1] == splits  # each of four steps or more
        got = kernels.forward(x, weight, scale, groups, True)
        assert torch.equal(got, kernels.forward(x, weight, scale, groups, True))
    assert relative_error(got, exact(x, weight, scale, groups, True)) < SUMS


def test_few_outputs_only_are_split(monkeypatch):
    """A quarter of the processors at most: more bring less than the second launch takes."""
    x, weight, scale = linear(1, 4300, 48)
    for processors, splits in ((8, 1), (23, 1), (24, 2), (47, 3), (1000, 4)):
        monkeypatch.setattr(kernels, "processors", lambda x: processors)
        with override_config({"quant_linear_decode": SMALL}), record("sm_90") as launches:
            kernels.forward(x, weight, scale, 1, True)
        assert launches[0].grid == (3, splits if processors > 23 else 1)


@pytest.mark.parametrize("path", ["decode", "fp8", "decoded", "library"])
def test_a_row_that_is_not_finite_spoils_no_other(take, path):
    take(path)
    x, weight, scale = linear(3, 140, 20, dtype=torch.bfloat16)
    expected = kernels.forward(x, weight, scale, 1, True)
    x[1, 130] = float("nan")
    got = kernels.forward(x, weight, scale, 1, True)
    assert got[1].isnan().all() and torch.equal(got[::2], expected[::2])


def test_weights_of_every_value_are_decoded():
    """All finite e4m3 values; identity inputs show them, with the largest and smallest scales."""
    bits = torch.arange(256, dtype=torch.uint8)
    finite = bits[(bits & 127) != 127].view(torch.float8_e4m3fn)
    weight = finite[:, None].expand(-1, 3).contiguous()
    eye = torch.eye(3, dtype=torch.bfloat16)
    scale = torch.tensor([[1], [240]], dtype=torch.uint8)
    scale_of_row = scale_to_float(scale)[:, 0].double().repeat_interleave(128)[:254]
    expected = (weight.float().T.double() * scale_of_row).bfloat16()
    tile = override_config({"quant_linear_decode": kernels.CONFIGS_DECODE[0]})
    archs = (kernels.FP8_ARCHS, set())
    with pytest.MonkeyPatch.context() as patch, tile:
        for fp8, few, act_quant in itertools.product(archs, (16, 0), (False, True)):
            patch.setattr(kernels, "FP8_ARCHS", fp8)
            patch.setattr(kernels, "MAX_DECODE_ROWS", few)
            assert torch.equal(kernels.forward(eye, weight, scale, 1, act_quant), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "M, i, o, groups, scales",
    [(3, 270, 150, 1, "fp32"), (2, 130, 66, 3, "e8m0"), (0, 5, 8, 2, "e8m0"), (1, 1, 1, 1, "fp32")],
)
def test_backward_is_the_transposed_product(M, i, o, groups, scales, dtype):
    x, weight, scale = linear(M, i, o, groups, scales, dtype)
    x = x.double().requires_grad_()
    g = spread(*x.shape[:-1], o // groups).to(dtype)
    (expected,) = torch.autograd.grad(exact(x, weight, scale, groups, False), x, g.double())
    got = kernels.backward(g, weight, scale, groups)
    assert got.dtype == dtype and relative_error(got, expected) < (
        SUMS if dtype == torch.float32 else 5e-3
    )
    assert torch.equal(kernels.backward(g.mT.contiguous().mT, weight, scale, groups), got)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("act_quant", [False, True])
def test_no_rows(groups, act_quant):
    x, weight, scale = linear(0, 130, 34, groups)
    expected = (0, 34) if groups == 1 else (0, 2, 17)
    for few in (16, -1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "MAX_DECODE_ROWS", few)
            assert kernels.forward(x, weight, scale, groups, act_quant).shape == expected


def test_rows_may_be_a_view():
    x, weight, scale = linear(4, 300, 20)
    for few in (16, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "MAX_DECODE_ROWS", few)
            for view in (x[::2, 30:170], x[:, 30:170].T.contiguous().T):
                assert error(view, weight[:, :140], scale[:, :2], 1, True) < FP8_SUMS


@pytest.mark.parametrize(
    "arch, rows, groups, act_quant, names",
    [
        ("sm_90", 8, 1, True, ["decode"]),
        ("sm_80", 16, 8, False, ["decode"]),
        ("gfx942", 1, 1, True, ["decode"]),
        ("sm_90", 8192, 1, True, ["act_quant", "product"]),
        ("gfx950", 17, 1, True, ["act_quant", "product"]),
        ("sm_80", 128, 1, True, ["act_quant", "product"]),
        ("sm_90", 128, 8, False, ["product"]),
        ("sm_80", 8192, 1, True, ["act_quant", "decoded"]),
        ("sm_100", 8192, 8, False, ["decoded"]),
    ],
)
def test_launches(arch, rows, groups, act_quant, names):
    """Which kernels run, at the sizes of Flash; and fp8 pointers only where there is the type."""
    with FakeTensorMode(), record(arch) as launches:
        x = torch.empty(rows, *[groups] * (groups > 1), 4096, dtype=torch.bfloat16)
        weight = torch.empty(8192, 4096).to(torch.float8_e4m3fn)
        scale = torch.empty(64, 32, dtype=torch.uint8)
        kernels.forward(x, weight, scale, groups, act_quant)
    assert [launch.name.removeprefix("quant_linear_") for launch in launches] == [
        f"{name}_kernel" for name in names
    ]
    dtypes = {a.dtype for launch in launches for a in launch.args if isinstance(a, torch.Tensor)}
    assert (torch.float8_e4m3fn in dtypes) == (arch in kernels.FP8_ARCHS and names != ["decoded"])
