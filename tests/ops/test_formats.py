"""The number formats of ops/formats.py against brute force over their representable values.

Sources: docs/v4.md#quantised-points, docs/v4.md#checkpoint.
"""

from __future__ import annotations

import math

import pytest
import torch

from ops.formats import (
    dequantize_fp4,
    dequantize_fp8,
    fake_quant,
    pow2_ceil,
    quantize_fp4,
    quantize_fp8,
    round_e2m1,
    round_e4m3,
    scale_to_e8m0,
    scale_to_float,
)

INF = float("inf")
# The value of every non-negative code, in order of the codes: 8 subnormals and 119 normal numbers
# of e4m3 (the last code is NaN), 8 of e2m1.
E4M3 = [m / 8 * 2.0**-6 for m in range(8)]
E4M3 += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
GRID = {
    "fp8": torch.tensor(E4M3, dtype=torch.float64),
    "fp4": torch.tensor(E2M1, dtype=torch.float64),
}
FLOOR = {"fp8": 1e-4, "fp4": 6 * 2.0**-126}  # least amax of a block


def nearest(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """The representable value next to x (fp64); on a tie that of the even code."""
    distance = (x.abs()[..., None] - GRID[fmt]).abs()
    tied = distance == distance.amin(-1, keepdim=True)
    even = torch.arange(len(GRID[fmt])) % 2 == 0
    code = torch.where(tied.sum(-1) == 1, tied.int().argmax(-1), (tied & even).int().argmax(-1))
    return torch.copysign(GRID[fmt][code], x)


def power_above(amax: float) -> float:
    mantissa, exponent = math.frexp(amax)  # amax = mantissa 2^exponent, 0.5 <= mantissa < 1
    return 2.0 ** (exponent - (mantissa == 0.5))


def quantize_block(block: torch.Tensor, fmt: str) -> tuple[torch.Tensor, float]:
    """The rounded block and its scale, in fp64."""
    scale = power_above(max(float(block.abs().max()), FLOOR[fmt]) / float(GRID[fmt][-1]))
    return nearest(block.double() / scale, fmt) * scale, scale


def blockwise(x: torch.Tensor, rows: int, cols: int, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, block by block -> values, scales."""
    out = torch.empty(x.shape, dtype=torch.float64)
    scales = []
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], cols):
            part = slice(r, r + rows), slice(c, c + cols)
            out[part], scale = quantize_block(x[part], fmt)
            scales.append(scale)
    return out, torch.tensor(scales).view(-(-x.shape[0] // rows), -1)


def spread(*shape: int) -> torch.Tensor:
    """Over many binades: blocks have different scales, subnormals occur, the last row is tiny."""
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.exp2(torch.randint(-12, 8, shape).float())
    x[-1] *= 1e-7
    return x


def around(values: list[float]) -> torch.Tensor:
    """The values, the points midway between them, the fp32 neighbours of all these; both signs."""
    v = torch.tensor(values)
    v = torch.cat((v, (v[1:] + v[:-1]) / 2))
    v = torch.cat((v, v.nextafter(torch.tensor(INF)), v.nextafter(torch.tensor(0.0))))
    return torch.cat((v, -v))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, the sign of zero included."""
    return torch.equal(a.double(), b.double()) and torch.equal(a.signbit(), b.signbit())


both = pytest.mark.parametrize(
    "quantize,dequantize",
    [(quantize_fp8, dequantize_fp8), (quantize_fp4, dequantize_fp4)],
    ids=["fp8", "fp4"],
)


# --------------------------------------------------------------------------------------------------
# Scales


def test_pow2_ceil_is_the_least_power_not_below():
    powers = torch.exp2(torch.arange(-126, 127).float())
    assert torch.equal(pow2_ceil(powers), powers)
    assert torch.equal(pow2_ceil(powers.nextafter(torch.tensor(INF))), 2 * powers)
    assert torch.equal(pow2_ceil(powers[1:].nextafter(torch.tensor(0.0))), powers[1:])
    x = spread(1000).abs()
    assert torch.equal(pow2_ceil(x), torch.tensor([power_above(v) for v in x.tolist()]))


def test_e8m0_bits_are_powers_of_two():
    bits = torch.arange(255, dtype=torch.uint8)
    value = scale_to_float(bits)
    assert value.dtype == torch.float32 and value.tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert torch.equal(scale_to_e8m0(value), bits)
    assert torch.equal(scale_to_float(bits.view(torch.float8_e8m0fnu)), value)
    # torch's own reading of the dtype.
    assert torch.equal(value, bits.view(torch.float8_e8m0fnu).float())


def test_stored_fp32_scales_pass_through():
    scale = spread(3, 5).abs()
    assert torch.equal(scale_to_float(scale), scale)
    assert scale_to_float(scale.bfloat16()).dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Rounding


def test_e4m3_grid_is_the_dtype():
    codes = torch.arange(127, dtype=torch.uint8)
    assert torch.equal(codes.view(torch.float8_e4m3fn).double(), GRID["fp8"])


@pytest.mark.parametrize("shift", [0, -9, 11])
@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_fake_quant_rounds_to_the_nearest_ties_to_even(fmt, shift):
    x = around(GRID[fmt].tolist())
    largest = float(GRID[fmt][-1])
    x = x[x.abs() <= largest]
    pairs = torch.stack((x, torch.full_like(x, largest)), -1)  # the maximum sets the scale
    y = fake_quant(pairs * 2.0**shift, 2, fmt) * 2.0**-shift
    assert same_bits(y[:, 0], nearest(x.double(), fmt)) and (y[:, 1] == largest).all()


def test_round_e2m1_clamps_to_six():
    x = torch.tensor([5.0, 5.1, 7.0, 100.0, INF, -7.0, -INF, -0.0])
    assert same_bits(round_e2m1(x), torch.tensor([4.0, 6, 6, 6, 6, -6, -6, -0.0]))


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_fake_quant_scale_steps_just_above_the_maximum(fmt):
    """An amax of the maximum times a power of two is kept; one ulp more doubles the scale."""
    powers = torch.exp2(torch.arange(-6, 7).float())
    top = float(GRID[fmt][-1]) * powers
    small = float(GRID[fmt][1]) * powers  # representable under the lower scale only
    kept = torch.stack((top, small), -1)
    above = torch.stack((top.nextafter(torch.tensor(INF)), small), -1)
    assert torch.equal(fake_quant(kept, 2, fmt), kept)
    assert torch.equal(fake_quant(above, 2, fmt)[:, 0], top)
    # A tie, to the even code.
    assert torch.equal(fake_quant(above, 2, fmt)[:, 1], torch.zeros(len(top)))


def test_fake_quant_gives_the_vectors_of_the_spec():
    x = torch.tensor([(-1) ** i * 0.1 * i for i in range(64)], dtype=torch.bfloat16)
    y = fake_quant(x, 64, "fp8")
    assert y.dtype == torch.bfloat16 and y[-6:].tolist() == [6, -6, 6, -6, 6, -6.5]
    # Multiples of the least subnormal, 2^-9, times the scale, 2^-6.
    assert (y.float() * 2**15 % 1 == 0).all()
    magnitudes = [0] * 3 + [0.5] * 5 + [1] * 5 + [1.5] * 5 + [2] * 8 + [3] * 6
    expected = [(-1) ** i * float(m) for i, m in enumerate(magnitudes)]
    assert same_bits(fake_quant(x[:32], 32, "fp4"), torch.tensor(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt,block", [("fp8", 64), ("fp8", 128), ("fp4", 32), ("fp8", 7)])
@pytest.mark.parametrize("shape", [(130, 200), (3, 70), (1, 1), (4, 64), (2, 128)])
def test_fake_quant_matches_brute_force(shape, fmt, block, dtype):
    x = spread(*shape).to(dtype)
    x[0, :block] = 0
    y = fake_quant(x, block, fmt)
    assert y.dtype == dtype and y.is_contiguous() and same_bits(y, blockwise(x, 1, block, fmt)[0])
    assert torch.equal(fake_quant(y, block, fmt), y)
    assert torch.equal(fake_quant(x.expand(2, 3, *shape), block, fmt), y.expand(2, 3, *shape))


# --------------------------------------------------------------------------------------------------
# Packed weights


@pytest.mark.parametrize("shape", [(130, 200), (3, 70), (128, 256), (1, 2), (257, 128)])
def test_quantize_fp8_matches_brute_force(shape):
    w = spread(*shape)
    w[:128, 128:] = 0
    values, scales = blockwise(w, 128, 128, "fp8")
    q, bits = quantize_fp8(w)
    assert q.dtype == torch.float8_e4m3fn and bits.dtype == torch.uint8
    assert torch.equal(scale_to_float(bits), scales)
    assert same_bits(dequantize_fp8(q, bits, torch.float32), values)
    again = dequantize_fp8(q, bits.view(torch.float8_e8m0fnu), torch.float32)
    assert torch.equal(again.double(), values)


@pytest.mark.parametrize("shape", [(130, 200), (3, 70), (16, 32), (1, 2), (5, 34)])
def test_quantize_fp4_matches_brute_force(shape):
    w = spread(*shape)
    w[0, 32:] = 0
    values, scales = blockwise(w, 1, 32, "fp4")
    q, bits = quantize_fp4(w)
    assert q.dtype == torch.int8 and q.shape == (shape[0], shape[1] // 2)
    assert torch.equal(scale_to_float(bits), scales)
    assert same_bits(dequantize_fp4(q, bits, torch.float32), values)


def test_fp4_bytes_hold_the_low_nibble_first():
    byte = torch.arange(256).to(torch.uint8)
    one = torch.full((256, 1), 127, dtype=torch.uint8)
    value = dequantize_fp4(byte[:, None].view(torch.int8), one, torch.float32)
    signed = torch.tensor(E2M1 + [-v for v in E2M1])
    low, high = byte.long() % 16, byte.long() // 16
    assert same_bits(value, torch.stack((signed[low], signed[high]), -1))


def test_fp4_bytes_survive_a_round_trip():
    # 6 in both nibbles of the second byte sets the scale.
    bytes_ = torch.stack((torch.arange(256), torch.full((256,), 0x77)), -1)
    byte = bytes_.to(torch.uint8).view(torch.int8)
    scale = torch.full((256, 1), 120, dtype=torch.uint8)
    q, bits = quantize_fp4(dequantize_fp4(byte, scale, torch.float32))
    assert torch.equal(q, byte) and torch.equal(bits, scale)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_twice_changes_nothing(quantize, dequantize, dtype):
    once = dequantize(*quantize(spread(130, 200)), dtype)
    assert once.dtype == dtype and torch.equal(dequantize(*quantize(once), dtype), once)


@both
def test_leading_dims_are_separate_matrices(quantize, dequantize):
    w = spread(2, 3, 130, 70)
    q, scale = quantize(w)
    y = dequantize(q, scale, torch.float32)
    for i in range(2):
        for j in range(3):
            one, scale_of_one = quantize(w[i, j])
            assert torch.equal(q[i, j].view(torch.uint8), one.view(torch.uint8))
            assert torch.equal(scale[i, j], scale_of_one)
            assert torch.equal(y[i, j], dequantize(one, scale_of_one, torch.float32))


@both
def test_zero_blocks_stay_zero_and_finite(quantize, dequantize):
    w = spread(256, 256)
    w[:128, :128] = 0
    q, scale = quantize(w)
    y = dequantize(q, scale, torch.float32)
    assert (y[:128, :128] == 0).all() and (y[128:] != 0).any()
    assert (scale < 255).all() and (scale_to_float(scale) > 0).all()


def test_fp32_scales_multiply_their_own_block():
    # Clamped, as torch 2.11 casts values that overflow to NaN.
    q = spread(130, 200).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.tensor([[0.3, 0.7], [1.1, 1.9]])
    y = dequantize_fp8(q, scale, torch.float32)
    for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
        part = slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128)
        assert torch.equal(y[part], q[part].float() * scale[r, c])
    codes = torch.full((2, 35), 0x21, dtype=torch.int8)
    scale = torch.tensor([[0.3, 0.7, 1.1], [1.3, 1.7, 1.9]])
    y = dequantize_fp4(codes, scale, torch.float32)
    values = torch.tensor([0.5, 1.0]).repeat(2, 35)
    assert torch.equal(y, values * scale.repeat_interleave(32, 1)[:, :70])


def test_round_e4m3_is_the_cast_to_fp8_and_back():
    """Around every e4m3 value and midpoint; subnormals, zeros, and values beyond the range."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values.unique()
    middle = (codes[1:] + codes[:-1]) / 2
    near = [v * (1 + s * 2.0**-22) for v in (codes, middle) for s in (-1, 0, 1)]
    x = torch.cat([*near, torch.tensor([0.0, -0.0, 1e9, -1e9, 2.0**-11])])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(round_e4m3(x), expected)
    assert torch.equal(torch.signbit(round_e4m3(x)), torch.signbit(expected))
    assert round_e4m3(torch.tensor([float("nan")])).isnan().all()
