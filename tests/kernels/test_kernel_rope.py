"""The rope kernel against complex multiplication in fp64: out of place, in place, backward, any
strides.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import ops
from bench.tune import by_time
from cases import angles
from ops.launch import INTERPRETING, TUNED, override_config
from ops.rope import rotate_
from testing import rms

in_place = torch.ops.dsv4.rope_.default
DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))


def spec(x, cos, sin, inverse):
    D, r = x.shape[-1], 2 * cos.shape[-1]
    turn = torch.complex(cos.double(), sin.double() * (-1 if inverse else 1))
    turn = turn if x.dim() == 3 else turn[:, :, None]
    z = torch.complex(*x[..., D - r :].double().unflatten(-1, (-1, 2)).unbind(-1)) * turn
    return torch.cat((x[..., : D - r].double(), torch.view_as_real(z).flatten(-2)), -1)


def agree(y, x, cos, sin, inverse):
    """The other dims are the same bits, the rotated ones off by one rounding."""
    expected, r = spec(x, cos, sin, inverse), 2 * cos.shape[-1]
    assert y.shape == x.shape and y.dtype == x.dtype and torch.equal(y[..., :-r], x[..., :-r])
    assert rms(y, expected) <= (
        3e-7 if x.dtype == torch.float32 else 1.05 * rms(expected.to(x.dtype), expected)
    )


SHAPES = (
    (2, 5, 24, 8),
    (1, 1, 64, 128, 64),
    (2, 3, 3, 9, 4),
    (1, 70, 128, 128),
    (2, 33, 4, 40, 12),
    (1, 3, 5, 1100, 6),
    (3, 1, 7, 2),
)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inverse", (False, True), ids=("forward", "inverse"))
def test_kernel_agrees_with_complex_multiplication(shape, inverse, dtype):
    *shape, r = shape
    x, (cos, sin) = torch.randn(shape).to(dtype).requires_grad_(), angles(*shape[:2], r)
    y = ops.rope.opaque(x, cos, sin, inverse)
    agree(y.detach(), x.detach(), cos, sin, inverse)
    g = torch.randn(shape).to(dtype)
    agree(torch.autograd.grad(y, x, g)[0], g, cos, sin, not inverse)


LAYOUTS = {
    "slice of rows": lambda x: torch.cat((x, x.new_ones(x.shape)), 1)[:, : x.shape[1]],
    "slice of channels": lambda x: torch.cat((x.new_ones(x.shape), x), -1)[..., x.shape[-1] :],
    "every other channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ((2, 5, 3, 24), (3, 7, 24)), ids=str)
def test_any_strides(shape, layout):
    """Out of place, and in place without touching anything else in memory."""
    cos, sin = angles(*shape[:2], 8)
    x = LAYOUTS[layout](torch.randn(shape))
    y = ops.rope.opaque(
        x, cos.transpose(0, 1).contiguous().transpose(0, 1), sin[:, :, :1].expand_as(sin), False
    )
    agree(y, x, cos, sin[:, :, :1].expand_as(sin), False)
    assert y.is_contiguous()
    memory = torch.as_strided(x, (x.untyped_storage().nbytes() // 4,), (1,), 0)
    before, old = memory.clone(), x.clone()
    assert in_place(x, cos, sin, True) is None
    agree(x, old, cos, sin, True)
    x.copy_(old)
    assert torch.equal(memory, before)


def test_expanded_inputs():
    x, (cos, sin) = torch.randn(2, 1, 3, 1).expand(2, 5, 3, 24), angles(2, 5, 8)
    agree(ops.rope.opaque(x, cos, sin, False), x, cos, sin, False)


@pytest.mark.parametrize("BN", (1, 2, 16, 64))
def test_tiles_change_nothing(BN):
    x, (cos, sin) = torch.randn(2, 5, 3, 24), angles(2, 5, 12)
    with override_config({"rope_rotate": {"BN": BN, "num_warps": 4}}):
        y = ops.rope.opaque(x, cos, sin, False)
        agree(y, x, cos, sin, False)
        in_place(x, cos, sin, False)
    assert torch.equal(x, y)


@DTYPES
def test_inverse_in_place_undoes_rope(dtype):
    x, (cos, sin) = torch.randn(2, 9, 4, 32).to(dtype), angles(2, 9, 16)
    y = ops.rope.opaque(x, cos, sin, False)
    in_place(y, cos, sin, True)
    assert torch.equal(y[..., :16], x[..., :16]) and rms(y, x) <= (
        3e-7 if dtype == torch.float32 else 5e-3
    )


@pytest.mark.parametrize("shape", ((0, 5, 3, 8), (2, 0, 8), (2, 5, 0, 8)), ids=str)
def test_nothing_to_rotate(shape):
    x, (cos, sin) = torch.randn(shape), angles(*shape[:2], 4)
    assert ops.rope.opaque(x, cos, sin, False).shape == shape
    in_place(x, cos, sin, False)


def test_tiles_can_be_chosen_by_time():
    before = TUNED.read_text()
    table = by_time(["G1.7"], toy=INTERPRETING)
    assert {name for name, _ in table} == {"rope_rotate"} and len(table) >= 2
    assert (
        all(set(tile) == {"BN", "num_warps"} for tile in table.values())
        and TUNED.read_text() == before
    )


def test_rotate_overwrites_only_where_no_gradient_can_need_the_old_values():
    x, (cos, sin) = torch.randn(2, 5, 3, 24), angles(2, 5, 8)
    old, expected = x.clone(), ops.rope.opaque(x, cos, sin, False)
    for y in (
        rotate_(x, cos, sin, False, "opaque"),
        torch.no_grad()(rotate_)(x, cos, sin, False, "reference"),
    ):
        assert rms(y, expected) <= 1e-6 and torch.equal(x, old)
    with torch.no_grad():
        with pytest.raises(ValueError, match="rope: "):
            rotate_(x, cos[:1], sin, False, "opaque")
        assert rotate_(x, cos, sin, False, "opaque") is x and torch.equal(x, expected)


def test_in_place_op_passes_opcheck():
    torch.library.opcheck(in_place, (torch.randn(2, 5, 3, 24), *angles(2, 5, 8), True))


@torch.no_grad()
def test_compiled_code_rotates_in_place_without_a_copy():
    """Two products and the rotation between them: no kernel of Inductor's own, which a copy would
    need.
    """
    x = torch.randn(2, 5, 16)
    w = torch.randn(16, 72)
    v = torch.randn(24, 4)
    (cos, sin) = angles(2, 5, 8)

    def f(x, w, v, cos, sin):
        return rotate_((x @ w).unflatten(-1, (3, 24)), cos, sin, False, "opaque") @ v

    torch._dynamo.reset()
    got, (code,) = run_and_get_code(torch.compile(f, fullgraph=True), x, w, v, cos, sin)
    torch.testing.assert_close(got, f(x, w, v, cos, sin))
    body = code[code.index("def call(") :]
    assert (
        len(re.findall(r"dsv4\.rope_\.default\(", body)) == 1
        and len(re.findall(r"kernels\.\w*mm\(", body)) == 2
    )
    assert not re.search(r"_fused_|copy_|clone|async_compile", body)
