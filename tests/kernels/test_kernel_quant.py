"""Contracts of the kernels of act_quant and quant_linear: paths, tiles, splits, and what test_ops.py does not reach."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ops.triton.act_quant as act
import ops.triton.quant_linear as module
from ops.formats import dequantize_fp8, fake_quant, quantize_fp8, scale_to_float
from ops.launch import override_config, record

SUMS, FP8_SUMS = (
    (2e-6, 3e-4) if torch.cuda.is_available() else (5e-7, 5e-7)
)  # on a GPU e4m3 products are added with fewer bits
SMALL = dict(BN=16, S=2, num_warps=2, num_stages=2)  # of the decode kernel
PATHS = {  # which path forward takes: decode, products of e4m3, products with decoded weights, the library
    "decode": dict(FEW=99),
    "decode bits": dict(FEW=99, FP8=set()),
    "fp8": dict(FEW=0),
    "decoded": dict(FEW=0, FP8=set()),
    "decoded fp8": dict(FEW=0),
    "library": dict(FEW=0, SOME=0, FP8=set()),
}


def rms(a, b):
    """Relative RMS of the difference."""
    return float((a.double() - b).norm() / b.double().norm().clamp(min=1e-30))


def spread(*shape):
    return torch.randn(shape) * torch.exp2(torch.randint(-9, 3, shape).float())


def linear(M, i, o, groups=1, scales="e8m0", dtype=torch.float32):
    """-> x, weight, scale: blocks of different sizes in all three."""
    torch.manual_seed(0)
    weight, scale = quantize_fp8(
        torch.randn(o, i) * torch.exp2(torch.randint(-3, 4, (o, 1)).float())
    )
    if scales == "fp32":
        scale = scale_to_float(scale) * (1 + torch.rand(scale.shape))
    else:
        scale = scale + torch.randint(0, 4, scale.shape, dtype=torch.uint8)
    return spread(M, *[groups] * (groups > 1), i).to(dtype), weight, scale


def exact(x, weight, scale, groups, act_quant):
    x, W = (
        (fake_quant(x, 128, "fp8") if act_quant else x).double(),
        dequantize_fp8(weight, scale, torch.float64),
    )
    return (
        x @ W.T
        if groups == 1
        else torch.stack([x[..., j, :] @ rows.T for j, rows in enumerate(W.chunk(groups))], -2)
    )


@pytest.fixture
def take(monkeypatch):
    def path(name):
        for constant, value in PATHS[name].items():
            monkeypatch.setattr(module, constant, value)

    return path


# ---------------------------------------------------------------------------------------------------------------------
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
    assert torch.equal(act.forward(x, block, fmt), fake_quant(x, block, fmt))


@pytest.mark.parametrize("size", [1, 64, 4096, 8192])
@pytest.mark.parametrize("block, fmt", [(128, "fp8"), (32, "fp4")])
def test_act_quant_is_the_same_by_any_tile(size, block, fmt):
    x = spread(5, 300)
    with override_config({"act_quant": dict(SIZE=size, num_warps=4)}):
        assert torch.equal(act.forward(x, block, fmt), fake_quant(x, block, fmt))


def test_act_quant_of_every_bf16_value():
    """Each in a block of its own, and with a neighbour that sets the scale."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.isfinite()]
    for fmt, largest in (("fp8", 448), ("fp4", 6)):
        for block, rows in (
            (1, x[::5]),
            (2, torch.stack((x, torch.full_like(x, 0.75 * largest)), 1)),
        ):
            rows = rows.reshape(4, -1)
            assert torch.equal(act.forward(rows, block, fmt), fake_quant(rows, block, fmt))


def test_act_quant_reads_views_in_place_and_writes_fresh_rows():
    wide = spread(2, 3, 100)
    x = wide[..., 5:75]
    with record("sm_90") as launches:
        act.forward(x, 64, "fp8")
    assert len(launches) == 1 and launches[0].args[0].data_ptr() == x.data_ptr()
    assert torch.equal(act.forward(x, 64, "fp8"), fake_quant(x, 64, "fp8"))
    assert act.forward(wide[:0], 64, "fp8").shape == (0, 3, 100) and act.forward(
        wide[..., :0], 64, "fp8"
    ).shape == (2, 3, 0)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_act_quant_hides_nothing_that_is_not_finite(fmt):
    x = torch.randn(3, 64)
    x[0, 3], x[1, 40] = float("nan"), float("inf")
    y = act.forward(x, 32, fmt)
    assert y[0, 3].isnan() and not y[1, 40].isfinite()
    good = torch.ones(3, 64, dtype=torch.bool)
    good[0, :32] = good[1, 32:] = False
    assert torch.equal(y[good], fake_quant(x, 32, fmt)[good])


@pytest.mark.parametrize("rows, n", [(5, 300), (1, 128), (40, 7)])
def test_quantize_keeps_values_and_scales_apart(rows, n):
    x = spread(rows, n)
    q, scales = act.quantize(x)
    assert q.dtype == torch.float8_e4m3fn and scales.shape == (-(-n // 128), rows)
    assert torch.equal(
        q.float() * scales.T.repeat_interleave(128, 1)[:, :n], fake_quant(x, 128, "fp8")
    )


# ---------------------------------------------------------------------------------------------------------------------
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
    """As precise as the sums of fp32 allow, and the rounding of the output; the library also rounds weights to bf16."""
    take(path)
    x, weight, scale = linear(M, i, o, groups, scales, dtype)
    expected = exact(x, weight, scale, groups, act_quant)
    got = module.forward(x, weight, scale, groups, act_quant)
    assert got.dtype == dtype and got.shape == expected.shape
    rounding = rms(expected.to(dtype), expected) if dtype != torch.float32 else 0
    roundings = 3 if path == "library" and scales == "fp32" else 1.02
    assert rms(got, expected) < roundings * rounding + (FP8_SUMS if "fp8" in path else SUMS)


@pytest.mark.parametrize("tile", module.DECODE + [SMALL], ids=lambda c: f"{c['BN']}x{c['S']}")
@pytest.mark.parametrize("rows", [1, 16])
def test_decode_is_the_same_by_any_tile(tile, rows):
    x, weight, scale = linear(rows, 1300 if rows == 1 else 300, 18, 1)
    with override_config({"quant_linear_decode": tile}):
        assert (
            rms(module.forward(x, weight, scale, 1, True), exact(x, weight, scale, 1, True)) < SUMS
        )


@pytest.mark.parametrize("tile", module.PRODUCT, ids=lambda c: f"{c['BM']}x{c['BN']}")
@pytest.mark.parametrize("rows, o, groups", [(17, 130, 1), (130, 40, 2)])
def test_products_are_the_same_by_any_tile(tile, rows, o, groups):
    x, weight, scale = linear(rows, 140, o, groups)
    with override_config({"quant_linear_product": tile}):
        for dtype, act_quant in ((torch.float32, True), (torch.bfloat16, False)):
            expected = exact(x.to(dtype), weight, scale, groups, act_quant)
            got = module.forward(x.to(dtype), weight, scale, groups, act_quant)
            assert rms(got, expected) < (
                FP8_SUMS if act_quant else SUMS + 1.02 * rms(expected.bfloat16(), expected)
            )


@pytest.mark.parametrize("path", ["decode", "fp8"])
def test_the_last_tile_of_a_group_may_be_empty(take, path):
    """It begins past the last row of scales: the interpreter stops what reads there, though nothing would be made of it."""
    take(path)
    x, weight, scale = linear(3, 20, 384, 4)
    with override_config(
        {"quant_linear_decode": module.DECODE[0], "quant_linear_product": module.PRODUCT[0]}
    ):
        assert (
            rms(module.forward(x, weight, scale, 4, True), exact(x, weight, scale, 4, True))
            < FP8_SUMS
        )


def test_many_tiles_are_each_computed_once():
    """More than eight tiles high, and a last few that are fewer."""
    x, weight, scale = linear(147, 20, 70)
    with override_config({"quant_linear_product": dict(BM=16, BN=32, num_warps=1, num_stages=1)}):
        assert (
            rms(module.forward(x, weight, scale, 1, True), exact(x, weight, scale, 1, True))
            < FP8_SUMS
        )


@pytest.mark.parametrize(
    "rows, i, o, groups, splits", [(1, 4300, 20, 1, 4), (3, 2100, 10, 2, 2), (2, 8200, 5, 1, 7)]
)
def test_splits_merge_in_a_fixed_order(monkeypatch, rows, i, o, groups, splits):
    x, weight, scale = linear(rows, i, o, groups)
    monkeypatch.setattr(module, "processors", lambda x: 1000)
    with override_config({"quant_linear_decode": SMALL}):
        with record("sm_90") as launches:
            module.forward(x, weight, scale, groups, True)
        assert [launch.name for launch in launches] == [
            "quant_linear_decode_kernel",
            "quant_linear_merge_kernel",
        ]
        assert launches[0].grid[1] == splits  # each of four steps or more
        got = module.forward(x, weight, scale, groups, True)
        assert torch.equal(got, module.forward(x, weight, scale, groups, True))
    assert rms(got, exact(x, weight, scale, groups, True)) < SUMS


def test_few_outputs_only_are_split(monkeypatch):
    """A quarter of the processors at most: more bring less than the second launch takes."""
    x, weight, scale = linear(1, 4300, 48)
    for processors, splits in ((8, 1), (23, 1), (24, 2), (47, 3), (1000, 4)):
        monkeypatch.setattr(module, "processors", lambda x: processors)
        with override_config({"quant_linear_decode": SMALL}), record("sm_90") as launches:
            module.forward(x, weight, scale, 1, True)
        assert launches[0].grid == (3, splits if processors > 23 else 1)


@pytest.mark.parametrize("path", ["decode", "fp8", "decoded", "library"])
def test_a_row_that_is_not_finite_spoils_no_other(take, path):
    take(path)
    x, weight, scale = linear(3, 140, 20, dtype=torch.bfloat16)
    expected = module.forward(x, weight, scale, 1, True)
    x[1, 130] = float("nan")
    got = module.forward(x, weight, scale, 1, True)
    assert got[1].isnan().all() and torch.equal(got[::2], expected[::2])


def test_weights_of_every_value_are_decoded():
    """All finite e4m3 values; identity inputs show them, with the largest and smallest scales."""
    values = torch.arange(256, dtype=torch.uint8)
    values = (
        values[(values & 127) != 127].view(torch.float8_e4m3fn)[:, None].expand(-1, 3).contiguous()
    )
    eye, scale = torch.eye(3, dtype=torch.bfloat16), torch.tensor([[1], [240]], dtype=torch.uint8)
    expected = (
        values.float().T.double()
        * scale_to_float(scale)[:, 0].double().repeat_interleave(128)[:254]
    ).bfloat16()
    for fp8, few, act_quant in itertools.product((module.FP8, set()), (16, 0), (False, True)):
        with (
            pytest.MonkeyPatch.context() as patch,
            override_config({"quant_linear_decode": module.DECODE[0]}),
        ):
            patch.setattr(module, "FP8", fp8), patch.setattr(module, "FEW", few)
            assert torch.equal(module.forward(eye, values, scale, 1, act_quant), expected)


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
    got = module.backward(g, weight, scale, groups)
    assert got.dtype == dtype and rms(got, expected) < (SUMS if dtype == torch.float32 else 5e-3)
    assert torch.equal(module.backward(g.mT.contiguous().mT, weight, scale, groups), got)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("act_quant", [False, True])
def test_no_rows(groups, act_quant):
    x, weight, scale = linear(0, 130, 34, groups)
    for few in (16, -1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "FEW", few)
            assert module.forward(x, weight, scale, groups, act_quant).shape == (
                0,
                *[2] * (groups > 1),
                34 // groups,
            )


def test_rows_may_be_a_view():
    x, weight, scale = linear(4, 300, 20)
    for few in (16, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "FEW", few)
            for view in (x[::2, 30:170], x[:, 30:170].T.contiguous().T):
                w, s = weight[:, :140], scale[:, :2]
                assert (
                    rms(module.forward(view, w, s, 1, True), exact(view, w, s, 1, True)) < FP8_SUMS
                )


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
        weight, scale = (
            torch.empty(8192, 4096).to(torch.float8_e4m3fn),
            torch.empty(64, 32, dtype=torch.uint8),
        )
        module.forward(x, weight, scale, groups, act_quant)
    assert [launch.name.removeprefix("quant_linear_") for launch in launches] == [
        f"{name}_kernel" for name in names
    ]
    dtypes = {a.dtype for launch in launches for a in launch.args if isinstance(a, torch.Tensor)}
    assert (torch.float8_e4m3fn in dtypes) == (arch in module.FP8 and names != ["decoded"])
