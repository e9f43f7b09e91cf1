"""The Triton kernels of sinkhorn (formula: ops/sinkhorn.py), and the helpers that hc_pre's kernels
share.

A thread owns a whole matrix, n n registers: no step leaves them, nothing is exchanged between
threads, one launch does it all. Backward: the divisors of each step are stored (2 iters - 1 times n
per matrix; they stay in the cache), the matrices themselves are recovered by multiplying back.

A block of BT matrices is a tuple c of n n vectors [BT]: c[i n + j][t] is element (i, j) of matrix
t.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .columns import pack_columns, unpack_columns

MAX_STREAMS = 8  # more streams than these outgrow the registers of a thread
CANDIDATES = [  # a matrix a thread: a warp has 64 or 32
    {"BT": 64, "num_warps": 1},
    {"BT": 32, "num_warps": 1},
]


@jit
def softmax_rows(c, n: tl.constexpr):
    """exp(c_ij - max_j c_ij) / sum_j exp(c_ij - max_j c_ij)"""
    out = ()
    for i in tl.static_range(n):
        largest = c[i * n]
        for j in tl.static_range(1, n):
            largest = tl.maximum(largest, c[i * n + j])
        row = ()
        for j in tl.static_range(n):
            row += (tl.exp(c[i * n + j] - largest),)
        total = row[0]
        for j in tl.static_range(1, n):
            total += row[j]
        for j in tl.static_range(n):
            out += (row[j] / total,)
    return out


@jit
def add_eps(c, eps, n: tl.constexpr):
    out = ()
    for k in tl.static_range(n * n):
        out += (c[k] + eps,)
    return out


@jit
def divide(c, eps, ROWS: tl.constexpr, n: tl.constexpr):
    """-> c / (sums + eps) over rows or columns, and the n divisors."""
    divisors = ()
    inverses = ()
    for i in tl.static_range(n):
        total = c[i * n if ROWS else i]
        for j in tl.static_range(1, n):
            total += c[i * n + j if ROWS else j * n + i]
        total += eps
        divisors += (total,)
        inverses += (1.0 / total,)
    out = ()
    for k in tl.static_range(n * n):
        out += (c[k] * inverses[k // n if ROWS else k % n],)
    return out, divisors


@jit
def divide_backward(g, c, divisors, ROWS: tl.constexpr, n: tl.constexpr):
    """Gradient g and matrices c after a division -> those before it.

    With c = before / divisor and divisor = sum(before) + eps along an axis:
    g_before = (g - sum(g c)) / divisor,  before = c divisor.
    """
    dots = ()
    inverses = ()
    for i in tl.static_range(n):
        dot = g[i * n if ROWS else i] * c[i * n if ROWS else i]
        for j in tl.static_range(1, n):
            dot += g[i * n + j if ROWS else j * n + i] * c[i * n + j if ROWS else j * n + i]
        dots += (dot,)
        inverses += (1.0 / divisors[i],)
    g_before = ()
    before = ()
    for k in tl.static_range(n * n):
        difference = g[k] - dots[k // n if ROWS else k % n]
        g_before += (difference * inverses[k // n if ROWS else k % n],)
        before += (c[k] * divisors[k // n if ROWS else k % n],)
    return g_before, before


@jit
def doubly_stochastic(c, eps, iters, n: tl.constexpr):
    """Logits -> nearly doubly stochastic matrices."""
    c, _ = divide(add_eps(softmax_rows(c, n), eps, n), eps, False, n)
    for _ in range(iters - 1):
        c, _ = divide(c, eps, True, n)
        c, _ = divide(c, eps, False, n)
    return c


@jit
def store_divisors(ptr, divisors, count, t, n: tl.constexpr, COLS: tl.constexpr):
    """The n divisors of one step for matrices t of `count`: [n, count] at ptr."""
    k = tl.arange(0, COLS)[:, None]
    ptrs = ptr + k * count + t[None, :]
    tile = tl.trans(pack_columns(divisors, n, COLS))
    tl.store(ptrs, tile, mask=(k < n) & (t < count)[None, :])


@jit
def load_divisors(ptr, count, t, n: tl.constexpr, COLS: tl.constexpr):
    k = tl.arange(0, COLS)[:, None]
    ptrs = ptr + k * count + t[None, :]
    tile = tl.load(ptrs, mask=(k < n) & (t < count)[None, :], other=1.0)
    return unpack_columns(tl.trans(tile), COLS)


@jit
def doubly_stochastic_backward(
    # gradient, logits
    g,
    c,
    eps,
    iters,
    # room for the divisors of `count` matrices; the matrices of this program
    saved,
    count,
    t,
    # sizes
    n: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradient of logits c of matrices t, from that of the result.

    saved   room for the divisors, [2 iters - 1, n, count]
    COLS    a power of two >= n
    """
    soft = softmax_rows(c, n)
    g = g[: n * n]

    # The forward again; the divisors of step s at saved + s n count: columns, then rows and
    # columns.
    c, divisors = divide(add_eps(soft, eps, n), eps, False, n)
    store_divisors(saved, divisors, count, t, n, COLS)
    ptr = saved
    for _ in range(iters - 1):
        c, divisors = divide(c, eps, True, n)
        store_divisors(ptr + n * count, divisors, count, t, n, COLS)
        c, divisors = divide(c, eps, False, n)
        ptr += 2 * n * count
        store_divisors(ptr, divisors, count, t, n, COLS)
    tl.debug_barrier()

    # Its steps in reverse.
    for _ in range(iters - 1):
        g, c = divide_backward(g, c, load_divisors(ptr, count, t, n, COLS), False, n)
        g, c = divide_backward(g, c, load_divisors(ptr - n * count, count, t, n, COLS), True, n)
        ptr -= 2 * n * count
    g, c = divide_backward(g, c, load_divisors(ptr, count, t, n, COLS), False, n)

    # Of the softmax: g_logits = soft (g - sum_j g soft).
    out = ()
    for i in tl.static_range(n):
        dot = g[i * n] * soft[i * n]
        for j in tl.static_range(1, n):
            dot += g[i * n + j] * soft[i * n + j]
        for j in tl.static_range(n):
            out += (soft[i * n + j] * (g[i * n + j] - dot),)
    return out


@jit
def sinkhorn_forward(
    # logits and out [count, n, n]
    logits,
    out,
    count,
    eps,
    iters,
    # streams; a power of two >= n n; matrices of a program
    n: tl.constexpr,
    COLS: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, COLS)
    offsets = t.to(tl.int64)[:, None] * (n * n) + k[None, :]
    mask = (t < count)[:, None] & (k < n * n)[None, :]
    c = unpack_columns(tl.load(logits + offsets, mask=mask, other=0.0), COLS)
    c = doubly_stochastic(c, eps, iters, n)
    tl.store(out + offsets, pack_columns(c, n * n, COLS), mask=mask)


@jit
def sinkhorn_backward(
    # g, logits and out [count, n, n]; saved [2 iters - 1, n, count]
    g,
    logits,
    saved,
    out,
    count,
    eps,
    iters,
    # streams; a power of two >= n n; matrices of a program; a power of two >= n
    n: tl.constexpr,
    COLS: tl.constexpr,
    BT: tl.constexpr,
    DIVISORS: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, COLS)
    offsets = t.to(tl.int64)[:, None] * (n * n) + k[None, :]
    mask = (t < count)[:, None] & (k < n * n)[None, :]
    c = unpack_columns(tl.load(logits + offsets, mask=mask, other=0.0), COLS)
    g = unpack_columns(tl.load(g + offsets, mask=mask, other=0.0), COLS)
    g = doubly_stochastic_backward(g, c, eps, iters, saved, count, t, n, DIVISORS)
    tl.store(out + offsets, pack_columns(g, n * n, COLS), mask=mask)


def forward(logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    n = logits.shape[-1]
    count = logits.numel() // (n * n)
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    cfg = get_config("sinkhorn_forward", f"n{n}", CANDIDATES, logits)
    tensors = (logits, out)
    constants = {"n": n, "COLS": power_of_two(n * n), **cfg}
    launch(sinkhorn_forward, (cdiv(count, cfg["BT"]),), *tensors, count, eps, iters, **constants)
    return out


def backward(g: torch.Tensor, logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    n = logits.shape[-1]
    count = logits.numel() // (n * n)
    g = g.contiguous()
    logits = logits.contiguous()
    out = torch.empty_like(logits)
    saved = logits.new_empty(2 * iters - 1, n, count, dtype=torch.float32)
    cfg = get_config("sinkhorn_backward", f"n{n}", CANDIDATES, logits)
    tensors = (g, logits, saved, out)
    constants = {"n": n, "COLS": power_of_two(n * n), "DIVISORS": power_of_two(n), **cfg}
    launch(sinkhorn_backward, (cdiv(count, cfg["BT"]),), *tensors, count, eps, iters, **constants)
    return out
