"""The Triton kernels of hc_post (see ops/hc_post.py)."""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .sinkhorn import as_columns

FORWARD = [
    {"BD": 2048, "num_warps": 8},
    {"BD": 2048, "num_warps": 4},
    {"BD": 1024, "num_warps": 4},
    {"BD": 512, "num_warps": 2},
]


BACKWARD = [
    {"BD": 2048, "V": 8, "num_warps": 8},
    {"BD": 1024, "V": 8, "num_warps": 4},
    {"BD": 512, "V": 4, "num_warps": 4},
]


@jit
def load_scalars(at, count: tl.constexpr):
    out = ()
    for k in tl.static_range(count):
        out += (tl.load(at + k).to(tl.float32),)
    return out


@jit
def dot_all(weights, values, first: tl.constexpr, step: tl.constexpr, n: tl.constexpr):
    """sum_k weights[first + k step] values[k]"""
    out = weights[first] * values[0]
    for k in tl.static_range(1, n):
        out += weights[first + k * step] * values[k]
    return out


@jit
def hc_post_forward(y, x, post, comb, out, d, n: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(d, BD)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    at, mask = token * n * d + cols, cols < d
    yt, xs = tl.load(y + token * d + cols, mask=mask, other=0.0).to(tl.float32), ()
    for j in tl.static_range(n):
        xs += (tl.load(x + at + j * d, mask=mask, other=0.0).to(tl.float32),)
    p, c = load_scalars(post + token * n, n), load_scalars(comb + token * n * n, n * n)
    for k in tl.static_range(n):
        tl.store(
            out + at + k * d,
            (p[k] * yt + dot_all(c, xs, k, n, n)).to(out.dtype.element_ty),
            mask=mask,
        )


@jit
def hc_post_backward(
    g,
    y,
    x,
    post,
    comb,
    g_y,
    g_x,
    g_post,
    g_comb,
    d,
    n: tl.constexpr,
    P: tl.constexpr,
    BD: tl.constexpr,
    V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    p, c, sums = load_scalars(post + token * n, n), load_scalars(comb + token * n * n, n * n), ()
    for _ in tl.static_range(n + n * n):
        sums += (tl.zeros([BD // V], tl.float32),)
    for start in range(0, d, BD):
        cols = (
            start + tl.arange(0, BD // V)[:, None] * V + tl.arange(0, V)[None, :]
        )  # a row of V is one thread's
        mask, at, gs, xs, new = cols < d, token * n * d + cols, (), (), ()
        for k in tl.static_range(n):
            gs += (tl.load(g + at + k * d, mask=mask, other=0.0).to(tl.float32),)
        yt = tl.load(y + token * d + cols, mask=mask, other=0.0).to(tl.float32)
        for j in tl.static_range(n):
            xs += (tl.load(x + at + j * d, mask=mask, other=0.0).to(tl.float32),)
        tl.store(
            g_y + token * d + cols, dot_all(p, gs, 0, 1, n).to(g_y.dtype.element_ty), mask=mask
        )
        for j in tl.static_range(n):
            tl.store(
                g_x + at + j * d, dot_all(c, gs, j * n, 1, n).to(g_x.dtype.element_ty), mask=mask
            )
        for k in tl.static_range(n):
            new += (sums[k] + tl.sum(gs[k] * yt, 1),)
        for k in tl.static_range(n * n):
            new += (sums[n + k] + tl.sum(xs[k // n] * gs[k % n], 1),)
        sums = new
    total = tl.sum(as_columns(sums, n + n * n, P), 0)  # all at once: threads meet one time
    k = tl.arange(0, P)
    tl.store(g_post + token * n + k, total, mask=k < n)
    tl.store(g_comb + token * n * n + k - n, total, mask=(k >= n) & (k < n + n * n))


def forward(
    y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    B, T, n, d = x.shape
    y, x, post, comb = (t.contiguous() for t in (y, x, post, comb))
    out, cfg = (
        torch.empty_like(x),
        get_config("hc_post_forward", f"n{n} d{d} {x.dtype}", FORWARD, x),
    )
    launch(hc_post_forward, (B * T * cdiv(d, cfg["BD"]),), y, x, post, comb, out, d, n=n, **cfg)
    return out


def backward(
    g: torch.Tensor, y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
):
    B, T, n, d = x.shape
    g, *inputs = (t.contiguous() for t in (g, y, x, post, comb))
    out, cfg = (
        [torch.empty_like(t) for t in inputs],
        get_config("hc_post_backward", f"n{n} d{d} {x.dtype}", BACKWARD, x),
    )
    launch(hc_post_backward, (B * T,), g, *inputs, *out, d, n=n, P=power_of_two(n + n * n), **cfg)
    return tuple(out)
