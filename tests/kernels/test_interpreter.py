"""Contracts of tests/interpreter.py: within Triton's interpreter, bfloat16 and float8 behave as
torch's do.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import ops.formats as formats
import ops.triton.formats as kernel_formats
from ops.launch import jit, launch

TYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
}


@jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


@jit
def arithmetic(x, y, out, n, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n), tl.load(y + i, mask=i < n)
    if OPERATION == "+":
        r = a + b
    elif OPERATION == "*":
        r = a * b
    elif OPERATION == "<":
        r = a < b
    elif OPERATION == "where":
        r = tl.where(a < b, a, b)
    elif OPERATION == "scalar":
        r = a * 1.7
    else:
        r = tl.exp(a.to(tl.float32)).to(a.dtype)
    tl.store(out + i, r, mask=i < n)


@jit
def product(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at), input_precision="ieee"))


@jit
def decode(byte, out, FORMAT: tl.constexpr):
    i = tl.arange(0, 256)
    value = tl.load(byte + i)
    if FORMAT == "e4m3":
        value = kernel_formats.decode_e4m3(value)
    elif FORMAT == "e2m1":
        value = kernel_formats.decode_e2m1(value)
    else:
        value = kernel_formats.decode_scale(value)
    tl.store(out + i, value)


@jit
def rounding(x, out, n, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=1.0)
    if FORMAT == "scale_e4m3":
        v = kernel_formats.scale_e4m3(tl.abs(v))
    elif FORMAT == "scale_e2m1":
        v = kernel_formats.scale_e2m1(tl.abs(v))
    else:
        v = kernel_formats.pow2_ceil(tl.abs(v))
    tl.store(out + i, v, mask=i < n)


def everything() -> torch.Tensor:
    """fp32: all values of bf16, e4m3 and the points midway between them, and values over all
    binades; no NaN.
    """
    torch.manual_seed(0)
    bf16 = (
        torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
        .to(torch.int16)
        .view(torch.bfloat16)
        .float()
    )
    e4m3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().sort().values
    random = torch.randn(4096) * torch.exp2(torch.randint(-120, 120, (4096,)).float())
    values = torch.cat((bf16, bf16 * (1 + 2.0**-8), e4m3, (e4m3[1:] + e4m3[:-1]) / 2, random))
    return values[values.isfinite()]


@pytest.mark.parametrize("source", TYPES)
@pytest.mark.parametrize("target", TYPES)
def test_casts_round_as_torch_does(source, target):
    x = everything()
    x = (x.clamp(-448, 448) if source == "e4m3" else x).to(TYPES[source])
    y = torch.empty(len(x), dtype=TYPES[target])
    launch(copy, (triton.cdiv(len(x), 8192),), x, y, len(x), BLOCK=8192)
    expected = (
        x.float().clamp(-448, 448).to(TYPES[target]) if target == "e4m3" else x.to(TYPES[target])
    )
    assert torch.equal(y.float(), expected.float())


@pytest.mark.parametrize(
    "operation, expected",
    [
        ("+", lambda a, b: a + b),
        ("*", lambda a, b: a * b),
        ("<", lambda a, b: a < b),
        ("where", torch.minimum),
        ("scalar", lambda a, b: a * torch.tensor(1.7).bfloat16()),
        ("exp", lambda a, b: a.float().exp().to(a.dtype)),
    ],
)
def test_bf16_arithmetic_is_that_of_fp32_rounded_once(operation, expected):
    torch.manual_seed(0)
    a, b = torch.randn(2, 300).bfloat16()
    out = torch.empty(300, dtype=torch.bool if operation == "<" else torch.bfloat16)
    launch(arithmetic, (1,), a, b, out, 300, OPERATION=operation, BLOCK=512)
    torch.testing.assert_close(out, expected(a, b), rtol=0, atol=0 if operation != "exp" else 2**-7)


@jit
def shifted(x, y, n, by_x, by_y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + by_y + i, tl.load(x + by_x + i, mask=i < n), mask=i < n)


@pytest.mark.parametrize(
    "by_x, by_y, n, stopped",
    [
        (0, 0, 300, False),
        (1, 1, 299, False),
        (1, 0, 300, True),
        (0, 1, 300, True),
        (-1, 0, 1, True),
        (0, -1, 1, True),
        (-1, 0, 300, True),
        (0, -1, 300, True),
        (1 << 20, 0, 0, False),
    ],
)
def test_a_kernel_that_leaves_its_arguments_is_stopped(by_x, by_y, n, stopped):
    """Reading or writing one element before or after them; what is masked is not touched."""
    x, y = torch.randn(300), torch.empty(300)
    with (
        pytest.raises(interpreter.InterpreterError, match="outside")
        if stopped
        else contextlib.nullcontext()
    ):
        launch(shifted, (1,), x, y, n, by_x, by_y, BLOCK=512)


@jit
def counted(y, by):
    tl.atomic_add(y + by, 1)


@pytest.mark.parametrize("by, stopped", [(2, False), (3, True), (-1, True)])
def test_an_atomic_that_leaves_its_argument_is_stopped(by, stopped):
    y = torch.zeros(3, dtype=torch.int32)
    with (
        pytest.raises(interpreter.InterpreterError, match="outside")
        if stopped
        else contextlib.nullcontext()
    ):
        launch(counted, (1,), y, by)
    assert y.tolist() == [0, 0, 0 if stopped else 1]


@pytest.mark.parametrize("dtype", TYPES)
def test_dot_adds_in_fp32(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 32).to(TYPES[dtype])
    out = torch.empty(32, 32)
    launch(product, (1,), a, b, out, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fmt", ["e4m3", "e2m1", "e8m0"])
def test_packed_bits_are_decoded_exactly(fmt):
    byte, out = torch.arange(256).to(torch.uint8), torch.empty(256)
    launch(decode, (1,), byte, out, FORMAT=fmt)
    if fmt == "e4m3":
        expected = byte.view(torch.float8_e4m3fn).float().nan_to_num(nan=480.0)
        expected[255] = -480
    elif fmt == "e2m1":
        expected = formats.dequantize_fp4(
            byte[:, None].view(torch.int8),
            torch.full((256, 1), 127, dtype=torch.uint8),
            torch.float32,
        )[:, 0]
    else:
        expected = formats.scale_to_float(byte)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "fmt, expected",
    [
        ("scale_e4m3", lambda x: formats.pow2_ceil(x.abs().clamp(min=1e-4) * (1 / 448))),
        ("scale_e2m1", lambda x: formats.pow2_ceil(x.abs().clamp(min=6 * 2.0**-126) * (1 / 6))),
        ("power", lambda x: formats.pow2_ceil(x.abs())),
    ],
)
def test_rounding_equals_that_of_formats(fmt, expected):
    x = everything()
    x = x[(x.abs() > 1e-37) & (x.abs() < 1e37)]
    out = torch.empty_like(x)
    launch(rounding, (triton.cdiv(len(x), 8192),), x, out, len(x), FORMAT=fmt, BLOCK=8192)
    assert torch.equal(out, expected(x))
