"""The Triton kernels of hc_post (formula: ops/hc_post.py).

Both directions are bounded by bandwidth, so each byte is touched once. Forward: a program takes
some columns of one token from all n streams; post and comb are scalars to it. Backward: a program
walks along a token's row; each thread holds VEC neighbouring columns of everything, adds their part
of the n + n n sums to registers of its own, and threads meet only at the end of the row. No
atomics: results do not vary from run to run.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .columns import pack_columns

FORWARD = [
    {"BD": 2048, "num_warps": 8},
    {"BD": 2048, "num_warps": 4},
    {"BD": 1024, "num_warps": 4},
    {"BD": 512, "num_warps": 2},
]
BACKWARD = [
    {"BD": 2048, "VEC": 8, "num_warps": 8},
    {"BD": 1024, "VEC": 8, "num_warps": 4},
    {"BD": 512, "VEC": 4, "num_warps": 4},
]


@jit
def load_scalars(ptr, count: tl.constexpr):
    """A tuple of `count` neighbouring values, as fp32."""
    out = ()
    for k in tl.static_range(count):
        out += (tl.load(ptr + k).to(tl.float32),)
    return out


@jit
def weighted_sum(weights, values, first: tl.constexpr, step: tl.constexpr, n: tl.constexpr):
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
    offsets = token * n * d + cols  # of stream 0
    mask = cols < d
    yt = tl.load(y + token * d + cols, mask=mask, other=0.0).to(tl.float32)
    xs = ()  # the n streams, [BD] each
    for j in tl.static_range(n):
        xs += (tl.load(x + offsets + j * d, mask=mask, other=0.0).to(tl.float32),)
    p = load_scalars(post + token * n, n)
    c = load_scalars(comb + token * n * n, n * n)
    # x'_k = post_k y + sum_j comb[j, k] x_j
    for k in tl.static_range(n):
        out_ptrs = out + offsets + k * d
        new = p[k] * yt + weighted_sum(c, xs, k, n, n)
        tl.store(out_ptrs, new.to(out.dtype.element_ty), mask=mask)


@jit
def hc_post_backward(
    # gradient of x' [tokens, n, d], then the inputs: y [tokens, d], x as g, post [tokens, n], comb
    # [tokens, n, n]
    g,
    y,
    x,
    post,
    comb,
    # gradients of the inputs
    g_y,
    g_x,
    g_post,
    g_comb,
    # columns; streams; a power of two >= n + n n
    d,
    n: tl.constexpr,
    COLS: tl.constexpr,
    # columns of a tile, and of a thread in it
    BD: tl.constexpr,
    VEC: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    p = load_scalars(post + token * n, n)
    c = load_scalars(comb + token * n * n, n * n)
    sums = ()  # of g_post, then of g_comb, [BD / VEC] each: added up by thread
    for _ in tl.static_range(n + n * n):
        sums += (tl.zeros([BD // VEC], tl.float32),)
    for start in range(0, d, BD):
        # [BD / VEC, VEC]: a row is one thread's.
        cols = start + tl.arange(0, BD // VEC)[:, None] * VEC + tl.arange(0, VEC)[None, :]
        mask = cols < d
        offsets = token * n * d + cols
        gs = ()
        for k in tl.static_range(n):
            gs += (tl.load(g + offsets + k * d, mask=mask, other=0.0).to(tl.float32),)
        yt = tl.load(y + token * d + cols, mask=mask, other=0.0).to(tl.float32)
        xs = ()
        for j in tl.static_range(n):
            xs += (tl.load(x + offsets + j * d, mask=mask, other=0.0).to(tl.float32),)

        # g_y = sum_k post_k g_k
        g_yt = weighted_sum(p, gs, 0, 1, n)
        tl.store(g_y + token * d + cols, g_yt.to(g_y.dtype.element_ty), mask=mask)

        # g_x_j = sum_k comb[j, k] g_k
        for j in tl.static_range(n):
            g_xt = weighted_sum(c, gs, j * n, 1, n)
            tl.store(g_x + offsets + j * d, g_xt.to(g_x.dtype.element_ty), mask=mask)

        # g_post_k = sum over columns of g_k y;  g_comb[j, k] = sum over columns of x_j g_k
        new = ()
        for k in tl.static_range(n):
            new += (sums[k] + tl.sum(gs[k] * yt, 1),)
        for k in tl.static_range(n * n):
            new += (sums[n + k] + tl.sum(xs[k // n] * gs[k % n], 1),)
        sums = new
    total = tl.sum(pack_columns(sums, n + n * n, COLS), 0)  # all at once: threads meet one time
    k = tl.arange(0, COLS)
    tl.store(g_post + token * n + k, total, mask=k < n)
    tl.store(g_comb + token * n * n + k - n, total, mask=(k >= n) & (k < n + n * n))


def forward(
    y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    B, T, n, d = x.shape
    y, x, post, comb = (t.contiguous() for t in (y, x, post, comb))
    out = torch.empty_like(x)
    cfg = get_config("hc_post_forward", f"n{n} d{d} {x.dtype}", FORWARD, x)
    grid = (B * T * cdiv(d, cfg["BD"]),)
    launch(hc_post_forward, grid, y, x, post, comb, out, d, n=n, **cfg)
    return out


def backward(
    g: torch.Tensor, y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    B, T, n, d = x.shape
    g, *inputs = (t.contiguous() for t in (g, y, x, post, comb))
    grads = [torch.empty_like(t) for t in inputs]
    cfg = get_config("hc_post_backward", f"n{n} d{d} {x.dtype}", BACKWARD, x)
    constants = {"n": n, "COLS": power_of_two(n + n * n), **cfg}
    launch(hc_post_backward, (B * T,), g, *inputs, *grads, d, **constants)
    return tuple(grads)
