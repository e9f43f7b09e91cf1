"""The Triton kernels of sinkhorn (see ops/sinkhorn.py)."""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl

MAX_STREAMS = 8  # streams that kernels can take


CANDIDATES = [
    {"BT": 64, "num_warps": 1},
    {"BT": 32, "num_warps": 1},
]  # a matrix a thread: a warp has 64 or 32


# A block of BT matrices is a tuple c of n n vectors: c[i n + j][t] is element (i, j) of matrix t.


@jit
def join_all(values, P: tl.constexpr):
    """P tensors, a power of two -> one with more dims of 2 at the end, which count the tensors."""
    if P == 1:
        return values[0]
    else:
        pairs = ()
        for k in tl.static_range(P // 2):
            pairs += (tl.join(values[k], values[k + P // 2]),)
        return join_all(pairs, P // 2)


@jit
def columns(tile, P: tl.constexpr):
    """[BT, P], P a power of two -> P vectors [BT]."""
    if P == 1:
        return (tl.reshape(tile, [tile.shape[0]]),)
    else:
        left, right = tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, P // 2]), (0, 2, 1)))
        return columns(left, P // 2) + columns(right, P // 2)


@jit
def as_columns(values, count: tl.constexpr, P: tl.constexpr):
    """`count` vectors [BT] -> [BT, P], with zeros."""
    padded = ()
    for k in tl.static_range(P):
        padded += (values[k] if k < count else tl.zeros_like(values[0]),)
    return tl.reshape(join_all(padded, P), [values[0].shape[0], P])


@jit
def softmax_rows(c, n: tl.constexpr):
    out = ()
    for i in tl.static_range(n):
        top = c[i * n]
        for j in tl.static_range(1, n):
            top = tl.maximum(top, c[i * n + j])
        row = ()
        for j in tl.static_range(n):
            row += (tl.exp(c[i * n + j] - top),)
        total = row[0]
        for j in tl.static_range(1, n):
            total += row[j]
        for j in tl.static_range(n):
            out += (row[j] / total,)
    return out


@jit
def plus(c, eps, n: tl.constexpr):
    out = ()
    for k in tl.static_range(n * n):
        out += (c[k] + eps,)
    return out


@jit
def divide(c, eps, ROWS: tl.constexpr, n: tl.constexpr):
    """-> c / (sums + eps) over rows or columns, and the n divisors."""
    totals, inverses, out = (), (), ()
    for i in tl.static_range(n):
        total = c[i * n if ROWS else i]
        for j in tl.static_range(1, n):
            total += c[i * n + j if ROWS else j * n + i]
        total += eps
        totals += (total,)
        inverses += (1.0 / total,)
    for k in tl.static_range(n * n):
        out += (c[k] * inverses[k // n if ROWS else k % n],)
    return out, totals


@jit
def undivide(g, c, totals, ROWS: tl.constexpr, n: tl.constexpr):
    """The gradient and the matrices before a division from those after it."""
    dots, inverses, before, out = (), (), (), ()
    for i in tl.static_range(n):
        dot = g[i * n if ROWS else i] * c[i * n if ROWS else i]
        for j in tl.static_range(1, n):
            dot += g[i * n + j if ROWS else j * n + i] * c[i * n + j if ROWS else j * n + i]
        dots += (dot,)
        inverses += (1.0 / totals[i],)
    for k in tl.static_range(n * n):
        out += ((g[k] - dots[k // n if ROWS else k % n]) * inverses[k // n if ROWS else k % n],)
        before += (c[k] * totals[k // n if ROWS else k % n],)
    return out, before


@jit
def doubly_stochastic(c, eps, iters, n: tl.constexpr):
    """Logits -> what sinkhorn makes of them."""
    c, _ = divide(plus(softmax_rows(c, n), eps, n), eps, False, n)
    for _ in range(iters - 1):
        c, _ = divide(c, eps, True, n)
        c, _ = divide(c, eps, False, n)
    return c


@jit
def put_aside(at, totals, N, t, n: tl.constexpr, P: tl.constexpr):
    k = tl.arange(0, P)[:, None]
    tl.store(
        at + k * N + t[None, :], tl.trans(as_columns(totals, n, P)), mask=(k < n) & (t < N)[None, :]
    )


@jit
def fetch(at, N, t, n: tl.constexpr, P: tl.constexpr):
    k = tl.arange(0, P)[:, None]
    return columns(
        tl.trans(tl.load(at + k * N + t[None, :], mask=(k < n) & (t < N)[None, :], other=1.0)), P
    )


@jit
def doubly_stochastic_backward(g, c, eps, iters, aside, N, t, n: tl.constexpr, P: tl.constexpr):
    """Gradient of logits c of matrices t. aside: room for the divisors [2 iters - 1, n, N]; P: a power of two >= n."""
    soft, g = softmax_rows(c, n), g[: n * n]
    c, totals = divide(plus(soft, eps, n), eps, False, n)
    put_aside(aside, totals, N, t, n, P)
    at = aside
    for _ in range(iters - 1):
        c, totals = divide(c, eps, True, n)
        put_aside(at + n * N, totals, N, t, n, P)
        c, totals = divide(c, eps, False, n)
        at += 2 * n * N
        put_aside(at, totals, N, t, n, P)
    tl.debug_barrier()
    for _ in range(iters - 1):
        g, c = undivide(g, c, fetch(at, N, t, n, P), False, n)
        g, c = undivide(g, c, fetch(at - n * N, N, t, n, P), True, n)
        at -= 2 * n * N
    g, c = undivide(g, c, fetch(at, N, t, n, P), False, n)
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
    logits, out, N, eps, iters, n: tl.constexpr, P: tl.constexpr, BT: tl.constexpr
):
    t, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, P)
    at, mask = (
        t.to(tl.int64)[:, None] * (n * n) + k[None, :],
        (t < N)[:, None] & (k < n * n)[None, :],
    )
    c = doubly_stochastic(columns(tl.load(logits + at, mask=mask, other=0.0), P), eps, iters, n)
    tl.store(out + at, as_columns(c, n * n, P), mask=mask)


@jit
def sinkhorn_backward(
    g,
    logits,
    aside,
    out,
    N,
    eps,
    iters,
    n: tl.constexpr,
    P: tl.constexpr,
    BT: tl.constexpr,
    PN: tl.constexpr,
):
    t, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, P)
    at, mask = (
        t.to(tl.int64)[:, None] * (n * n) + k[None, :],
        (t < N)[:, None] & (k < n * n)[None, :],
    )
    c, g = (
        columns(tl.load(logits + at, mask=mask, other=0.0), P),
        columns(tl.load(g + at, mask=mask, other=0.0), P),
    )
    g = doubly_stochastic_backward(g, c, eps, iters, aside, N, t, n, PN)
    tl.store(out + at, as_columns(g, n * n, P), mask=mask)


def forward(logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    n = logits.shape[-1]
    logits, N = logits.contiguous(), logits.numel() // (n * n)
    out, cfg = torch.empty_like(logits), get_config("sinkhorn_forward", f"n{n}", CANDIDATES, logits)
    launch(
        sinkhorn_forward,
        (cdiv(N, cfg["BT"]),),
        logits,
        out,
        N,
        eps,
        iters,
        n=n,
        P=power_of_two(n * n),
        **cfg,
    )
    return out


def backward(g: torch.Tensor, logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    """backward_reference, for benchmarks; in a model it happens inside hc_pre_backward."""
    n = logits.shape[-1]
    g, logits, N = g.contiguous(), logits.contiguous(), logits.numel() // (n * n)
    out, aside = (
        torch.empty_like(logits),
        logits.new_empty(2 * iters - 1, n, N, dtype=torch.float32),
    )
    cfg = get_config("sinkhorn_backward", f"n{n}", CANDIDATES, logits)
    launch(
        sinkhorn_backward,
        (cdiv(N, cfg["BT"]),),
        g,
        logits,
        aside,
        out,
        N,
        eps,
        iters,
        n=n,
        P=power_of_two(n * n),
        PN=power_of_two(n),
        **cfg,
    )
    return out
