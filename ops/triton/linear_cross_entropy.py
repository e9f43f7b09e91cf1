"""The Triton kernels of linear_cross_entropy (see linear_cross_entropy.py) and the products around them."""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, tl

HELD, PARTS = 1 << 27, 16  # by the kernels, but at most in so many parts
CANDIDATES = [
    dict(ROWS=1, BLOCK=8192, num_warps=8),
    dict(ROWS=1, BLOCK=4096, num_warps=4),
    dict(ROWS=4, BLOCK=1024, num_warps=4),
    dict(ROWS=16, BLOCK=256, num_warps=4),
]


@jit
def linear_cross_entropy_forward_kernel(
    logits,
    target,
    loss,
    lse,
    total,
    N,
    first,
    width,
    START: tl.constexpr,
    END: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of a chunk. Until the last, loss holds the target's logit, lse the maximum and total the sum of exponentials."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    t = tl.load(target + row, mask=inside, other=-1)
    logits += row.to(tl.int64) * width
    if START:
        sum, hit = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        high = sum - float("inf")
    else:
        sum, hit = (
            tl.load(total + row, mask=inside, other=0.0),
            tl.load(loss + row, mask=inside, other=0.0),
        )
        high = tl.load(lse + row, mask=inside, other=0.0)
    for c in range(0, width, BLOCK):
        j = c + tl.arange(0, BLOCK)
        z = tl.load(
            logits[:, None] + j[None, :],
            mask=inside[:, None] & (j < width)[None, :],
            other=-float("inf"),
        )
        higher = tl.maximum(
            tl.maximum(high, tl.max(z, 1)), -3e38
        )  # finite, for the rows that are not there
        sum = sum * tl.exp(high - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        high = higher
    here = (t >= first) & (t < first + width)
    hit = tl.where(here, tl.load(logits + (t - first), mask=here, other=0.0), hit)
    if END:
        high += tl.log(tl.where(inside, sum, 1.0))
        hit = tl.where(t < 0, 0.0, high - hit)
    else:
        tl.store(total + row, sum, mask=inside)
    tl.store(lse + row, high, mask=inside)
    tl.store(loss + row, hit, mask=inside)


@jit
def linear_cross_entropy_backward_kernel(
    logits, target, g, lse, p, N, first, width, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, j = (
        tl.program_id(0) * ROWS + tl.arange(0, ROWS),
        tl.program_id(1) * BLOCK + tl.arange(0, BLOCK),
    )
    t = tl.load(target + row, mask=row < N, other=-1)
    counted = (t >= 0)[:, None]
    at, inside = (
        row.to(tl.int64)[:, None] * width + j[None, :],
        (row < N)[:, None] & (j < width)[None, :],
    )
    z = tl.load(logits + at, mask=inside & counted, other=0.0)
    v = tl.exp(z - tl.load(lse + row, mask=row < N, other=0.0)[:, None])
    v = (
        tl.where((j + first)[None, :] == t[:, None], v - 1.0, v)
        * tl.load(g + row, mask=row < N, other=0.0)[:, None]
    )
    tl.store(p + at, tl.where(counted, v, 0.0).to(p.dtype.element_ty), mask=inside)


def _product(a, b, out):
    """out = a b with fp32 sums. out= also keeps autocast away."""
    if (
        a.device.type == "cpu" or out.dtype.itemsize < a.dtype.itemsize
    ):  # the library has nothing for these
        out.copy_(torch.mm(a.float(), b.float(), out=out.new_empty(out.shape, dtype=torch.float32)))
    elif out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out


def _prepared(x, weight, target):
    """x and weight in one dtype, a multiple of 128 columns, and room for that many logits of every row."""
    N, V = x.shape[0], weight.shape[0]
    if x.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        x, weight = x.float(), weight.float()
    columns = min(cdiv(max(HELD // max(N, 1), cdiv(V, PARTS)), 128) * 128, V)
    return x, weight, target.contiguous(), columns, x.new_empty(N * columns, dtype=torch.float32)


def _logits(x, weight, room, first, columns):
    w = weight[first : first + columns]
    return w, _product(x, w.T, room[: len(x) * len(w)].view(len(x), len(w)))


def forward(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    N, V = x.shape[0], weight.shape[0]
    cfg = get_config("linear_cross_entropy_forward", f"V{V}", CANDIDATES, x)
    loss, lse, total = (x.new_empty(N, dtype=torch.float32) for _ in range(3))
    x, weight, target, columns, room = _prepared(x, weight, target)
    for first in range(0, V, columns):
        w, logits = _logits(x, weight, room, first, columns)
        launch(
            linear_cross_entropy_forward_kernel,
            (cdiv(N, cfg["ROWS"]),),
            logits,
            target,
            loss,
            lse,
            total,
            N,
            first,
            len(w),
            START=first == 0,
            END=first + columns >= V,
            **cfg,
        )
    return loss, lse


def backward(
    g: torch.Tensor, lse: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
):
    (N, V), g_x, g_w = (
        (x.shape[0], weight.shape[0]),
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
    )
    cfg = get_config("linear_cross_entropy_backward", f"V{V}", CANDIDATES, x)
    g, lse = g.contiguous(), lse.contiguous()
    x, weight, target, columns, room = _prepared(x, weight, target)
    ps, total = x.new_empty(room.shape), x.new_empty(x.shape, dtype=torch.float32)
    part = torch.empty_like(total) if columns < V else None
    for first in range(0, V, columns):
        w, logits = _logits(x, weight, room, first, columns)
        p = ps[: logits.numel()].view(logits.shape)
        grid = cdiv(N, cfg["ROWS"]), cdiv(len(w), cfg["BLOCK"])
        launch(
            linear_cross_entropy_backward_kernel,
            grid,
            logits,
            target,
            g,
            lse,
            p,
            N,
            first,
            len(w),
            **cfg,
        )
        _product(p.T, x, g_w[first : first + columns])
        total = _product(p, w, total) if first == 0 else total.add_(_product(p, w, part))
    return g_x.copy_(total), g_w
