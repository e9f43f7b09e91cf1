"""The compress kernels against the formula in fp64, forward and backward: windows of every kind,
every tile.
"""

from __future__ import annotations

import pytest
import torch

import ops
from model import ModelArgs, layer_frequencies, make_plan
from ops.launch import override_config
from testing import rms

EPS = 1e-3
PACKED = {
    "many": (5, 130, 1, 3, 9, 4, 133, 2),
    "aligned": (128, 4, 8, 132),
    "padded": (3, 7, 140, -6),
}


def spec(rows, end, index, weight, cos, sin, ratio):
    """fp64: slots gathered by mask, softmax, norm, rotation. Windows may overlap, and begin before
    the first row.
    """
    D, r = weight.shape[0], 2 * cos.shape[-1]
    lanes, batch = (
        rows.shape[2] // (2 * D),
        torch.arange(len(rows), device=rows.device)[:, None, None],
    )
    k, z = rows.unflatten(2, (2, lanes, D)).unbind(2)  # [B, N, lanes, D]
    back = torch.arange(lanes * ratio, device=rows.device).flip(0)
    lane = lanes - 1 - back // ratio
    where = (end[..., None] - back).clamp(0, rows.shape[1] - 1)
    absent = (index == 0)[..., None] & (back >= ratio)
    p = z[batch, where, lane].masked_fill(absent[..., None], float("-inf")).softmax(2)
    e = (p * k[batch, where, lane]).sum(2)
    e = e / (e.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    a, b = e[..., D - r :: 2], e[..., D - r + 1 :: 2]
    return torch.cat(
        (e[..., : D - r], torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)), -1
    )


def slots(ratio):
    return 8 if ratio == 4 else ratio


def arguments(B, T, ratio, D, r):
    """Windows anywhere, sharing rows."""
    N, E = slots(ratio) - 1 + T, (T - 1) // ratio + 1
    end = torch.randint(slots(ratio) - 1, N, (B, E))
    index = torch.randint(0, 3, (B, E))
    angle = torch.rand(B, E, r // 2) * 7
    return (
        torch.randn(B, N, 2 * slots(ratio) // ratio * D),
        end,
        index,
        torch.randn(D),
        angle.cos(),
        angle.sin(),
    )


def agree(args, ratio, dtype=torch.float32, inside=None):
    """Outputs and gradients; entries that are not inside mean nothing, and have no gradient."""
    inside = torch.ones(args[1].shape, dtype=torch.bool) if inside is None else inside
    g = torch.randn(*args[1].shape, len(args[3])) * inside[..., None]
    exact = [a.double() if a.is_floating_point() else a for a in args]
    for a in (args[0], args[3], exact[0], exact[3]):
        a.requires_grad_()
    out, expected = ops.compress.opaque(*args, ratio, EPS, dtype), spec(*exact, ratio)
    assert out.dtype == dtype and out.isfinite().all()
    limit = 5e-6 if dtype == torch.float32 else 2.5 * rms(expected.to(dtype), expected)
    assert rms(out[inside], expected[inside]) <= limit
    grads = torch.autograd.grad(out, (args[0], args[3]), g.to(dtype))
    for a, b in zip(
        grads,
        torch.autograd.grad(expected, (exact[0], exact[3]), g.to(dtype).double()),
        strict=True,
    ):
        assert a.dtype == torch.float32 and rms(a, b) <= (5e-6 if dtype == torch.float32 else 2e-2)
    return out, *grads


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize(
    "B,T,ratio,D,r",
    (
        (2, 13, 4, 24, 8),
        (1, 33, 4, 128, 64),
        (2, 7, 2, 24, 24),
        (2, 61, 8, 9, 4),
        (1, 130, 128, 24, 2),
        (2, 5, 17, 128, 64),
        (3, 31, 3, 5, 2),
        (2, 257, 128, 9, 8),
    ),
)
def test_kernels_agree_with_the_formula(B, T, ratio, D, r, dtype):
    agree(arguments(B, T, ratio, D, r), ratio, dtype)


@pytest.mark.parametrize(
    "ratio,BE,G,U",
    (
        (4, 1, 1, 4),
        (4, 2, 1, 1),
        (4, 8, 1, 2),
        (4, 1, 2, 1),
        (4, 1, 8, 1),
        (5, 4, 1, 4),
        (5, 1, 4, 2),
        (70, 1, 32, 1),
        (70, 1, 16, 2),
        (128, 1, 64, 2),
        (20, 1, 1, 8),
    ),
)
def test_tiles_change_nothing(ratio, BE, G, U):
    tile = {"BE": BE, "G": G, "U": U, "num_warps": 4}
    with override_config({"compress_forward": tile, "compress_backward": tile}):
        agree(arguments(2, 2 * ratio + 1, ratio, 10, 4), ratio)


def plan_of(B, T, ratio, r, **positions):
    args = ModelArgs.debug()
    args.rope_head_dim = r
    freqs = layer_frequencies(args).to(torch.get_default_device())
    given = {"input_pos": None, "lengths": None, "doc_ids": None, **positions}
    return make_plan(
        args, freqs, torch.zeros(B, T, dtype=torch.int64), {ratio}, 1000, **given
    ).windows[ratio]


@pytest.mark.parametrize("ratio", (4, 8, 128))
@pytest.mark.parametrize("docs", PACKED)
def test_packed_documents(docs, ratio):
    """Each row packed in another order, windows as the model plans them; entries that no token sees
    have no gradient.
    """
    ids = torch.stack(
        [
            torch.cat([torch.full((abs(n),), i if n > 0 else -1) for i, n in enumerate(order)])
            for order in (PACKED[docs], PACKED[docs][::-1])
        ]
    )
    T = ids.shape[1]
    back = slots(ratio) - 1
    D = 10
    win = plan_of(2, T, ratio, 4, doc_ids=ids)
    entry = torch.arange(win.end.shape[1])
    seen = ((win.lo[..., None] <= entry) & (entry < win.hi[..., None])).any(1)
    rows = torch.randn(2, back + T, 2 * slots(ratio) // ratio * D)
    _, g_rows, _ = agree(
        (rows, win.end, win.index, torch.rand(D), win.cos, win.sin), ratio, inside=seen
    )
    lone = torch.cat(
        (torch.zeros(2, back, dtype=torch.bool), ~seen.any(1, keepdim=True).expand(2, T)), 1
    )
    assert not g_rows[lone].any() and seen.any()


@pytest.mark.parametrize("T", (1, 3, 9))
@pytest.mark.parametrize("ratio", (2, 4, 128))
def test_generation_pools_only_windows_that_end_in_the_call(ratio, T):
    """Rows at various positions, two about to close a window. The other windows are 0, and nothing
    is read or added there.
    """
    position = torch.tensor([0, ratio - T, ratio - T - 1, 5 * ratio - 1, 2 * ratio]).clamp(0)
    back = slots(ratio) - 1
    D = 24
    win = plan_of(5, T, ratio, 8, input_pos=position)
    end = win.end
    inside = (end >= 0) & (end < back + T)
    args = [
        torch.randn(5, back + T, 2 * slots(ratio) // ratio * D),
        end,
        win.index,
        torch.rand(D),
        win.cos,
        win.sin,
    ]
    out, *_ = agree(args, ratio, inside=inside)
    assert inside.any() and not inside.all() and not out[~inside].any()
    unread, rows = ~inside.any(1), args[0].detach()
    rows[unread] = float("nan")
    again = ops.compress.opaque(rows.requires_grad_(), *args[1:], ratio, EPS, torch.float32)
    g_rows, g_weight = torch.autograd.grad(again, (rows, args[3]), torch.ones_like(again))
    assert (
        torch.equal(again, out)
        and not g_rows[unread].any()
        and g_rows.isfinite().all()
        and g_weight.isfinite().all()
    )


@pytest.mark.parametrize("ratio", (3, 4, 20))
def test_windows_may_begin_before_the_first_row(ratio):
    args = list(arguments(2, 30, ratio, 10, 4))
    args[1] = torch.randint(0, ratio, args[1].shape)
    agree(args, ratio)


@pytest.mark.parametrize("ratio", (4, 70))
def test_logits_of_any_size(ratio):
    """A few slots outweigh the rest, by more than exp can hold; some have no weight at all."""
    args = arguments(2, 80, ratio, 10, 4)
    half = args[0].shape[2] // 2
    args[0][..., half:] *= 1e3
    args[0][:, ::5, half:] = float("-inf")
    agree(args, ratio)


@pytest.mark.parametrize("B,E,N", ((0, 2, 9), (2, 0, 9)))
def test_no_entries(B, E, N):
    rows = torch.randn(B, N, 40, requires_grad=True)
    weight = torch.randn(10, requires_grad=True)
    angle = torch.rand(B, E, 2)
    none = torch.zeros(B, E, dtype=torch.int64)
    out = ops.compress.opaque(rows, none, none, weight, angle, angle, 4, EPS, torch.bfloat16)
    g_rows, g_weight = torch.autograd.grad(out, (rows, weight), out)
    assert (
        out.shape == (B, E, 10)
        and g_rows.shape == rows.shape
        and not g_rows.any()
        and not g_weight.any()
    )
