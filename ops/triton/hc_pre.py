"""The Triton kernels of hc_pre, forward (see ops/hc_pre.py)."""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, processors, tl
from .sinkhorn import as_columns, columns, doubly_stochastic

FEW = 64  # tokens: up to here a launch is all about keeping every processor busy


MIX = [
    {"BT": 128, "BD": 128, "STAGES": 3, "num_warps": 8},
    {"BT": 128, "BD": 64, "STAGES": 4, "num_warps": 8},
    {"BT": 64, "BD": 64, "STAGES": 3, "num_warps": 4},
    {"BT": 64, "BD": 32, "STAGES": 2, "num_warps": 4},
]


MIX_FEW = [
    {"BT": 16, "BD": 256, "STAGES": 2, "num_warps": 4},
    {"BT": 16, "BD": 128, "STAGES": 3, "num_warps": 4},
    {"BT": 16, "BD": 128, "STAGES": 2, "num_warps": 4},
]


MIX_GRAD = [
    {"BT": 128, "BD": 32, "STAGES": 3, "num_warps": 8},
    {"BT": 128, "BD": 32, "STAGES": 2, "num_warps": 8},
    {"BT": 64, "BD": 32, "STAGES": 2, "num_warps": 4},
]


FINISH = [{"BT": 64, "BD": 2048, "num_warps": 8}, {"BT": 64, "BD": 1024, "num_warps": 4}]


@jit
def halves(f):
    """fp32 -> its leading bits, bf16, and the rest, bf16: together exact to 2^-18. Integer rounding: half the conversions."""
    hi = ((f.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    return hi.to(tl.bfloat16), (f - hi).to(tl.bfloat16)


@jit
def add_mix(acc, f, xt):
    """acc + f [C, BD] times xt [M, BD] transposed. In bf16 acc has 2 C rows: what f's leading halves give, then its rests."""
    if xt.dtype == tl.bfloat16:
        hi, lo = halves(f)
        f = tl.reshape(tl.permute(tl.join(hi, lo), (2, 0, 1)), [2 * f.shape[0], f.shape[1]])
        return tl.dot(f, tl.trans(xt), acc)
    else:
        return tl.dot(f, tl.trans(xt.to(tl.float32)), acc, input_precision="ieee")


@jit
def row_sums(t, V: tl.constexpr):
    """[M, BD] -> [M, BD / V]: adds up what lies in one thread."""
    return tl.sum(tl.reshape(t, [t.shape[0], t.shape[1] // V, V]), 2)


@jit
def hc_pre_mix(
    x,
    fn,
    g,
    partial,
    N,
    d,
    width,
    splits,
    n: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    V: tl.constexpr,
    STAGES: tl.constexpr,
):
    s = tl.program_id(0) % splits
    t, row = tl.program_id(0) // splits * BT + tl.arange(0, BT), tl.arange(0, C)
    token, squares, dots = t.to(tl.int64)[:, None], tl.zeros([BT, BD // V], tl.float32), ()
    acc = tl.zeros([2 * C if x.dtype.element_ty == tl.bfloat16 else C, BT], tl.float32)
    for j in tl.static_range(n):
        dots += (tl.zeros([BT, BD // V], tl.float32),)
    end = tl.minimum((s + 1) * width, d)
    for start in tl.range(
        s * width, end, BD, num_stages=STAGES
    ):  # so that loads for no product are pipelined too
        cols, new = (start + tl.arange(0, BD))[None, :], ()
        mask = (t < N)[:, None] & (cols < end)
        if g is not None:
            gt = tl.load(g + token * d + cols, mask=mask, other=0.0).to(tl.float32)
        for j in tl.static_range(n):
            xt = tl.load(x + (token * n + j) * d + cols, mask=mask, other=0.0)
            f = tl.load(
                fn + (row[:, None] * n + j) * d + cols,
                mask=(row < R)[:, None] & (cols < end),
                other=0.0,
            ).to(tl.float32)
            acc = add_mix(acc, f, xt)
            xt = xt.to(tl.float32)
            squares += row_sums(xt * xt, V)
            if g is not None:
                new += (dots[j] + row_sums(xt * gt, V),)
        if g is not None:
            dots = new
    at = partial + t.to(tl.int64) * splits + s
    store_mix(at, acc, squares, N, splits, t, R, C)
    if g is not None:
        for j in tl.static_range(n):
            tl.store(at + (R + 1 + j) * N * splits, tl.sum(dots[j], 1), mask=t < N)


@jit
def store_mix(at, acc, squares, N, splits, t, R: tl.constexpr, C: tl.constexpr):
    row = tl.arange(0, C)[:, None]
    if acc.shape[0] > C:
        acc = tl.sum(tl.reshape(acc, [2, C, acc.shape[1]]), 0)
    tl.store(at[None, :] + row * N * splits, acc, mask=(row < R) & (t < N)[None, :])
    tl.store(at + R * N * splits, tl.sum(squares, 1), mask=t < N)


@jit
def load_mix(partial, t, N, splits, columns: tl.constexpr, C: tl.constexpr, SP: tl.constexpr):
    """What the mix gave for tokens t, all splits added up: [BT, C], 0 from `columns` on."""
    k, s = tl.arange(0, C)[:, None, None], tl.arange(0, SP)[None, None, :]
    at, mask = (
        partial + (k * N + t[None, :, None]).to(tl.int64) * splits,
        (k < columns) & (t < N)[None, :, None],
    )
    total = tl.zeros([C, t.shape[0]], tl.float32)
    for start in range(0, splits, SP):
        total += tl.sum(tl.load(at + start + s, mask=mask & (start + s < splits), other=0.0), 2)
    return tl.trans(total)


@jit
def mixing(
    partial,
    base,
    scale,
    post,
    comb,
    t,
    N,
    d,
    splits,
    norm_eps,
    hc_eps,
    iters,
    n: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SP: tl.constexpr,
):
    """post and comb of tokens t."""
    m, i, k = (
        columns(load_mix(partial, t, N, splits, R + 1, C, SP), C),
        t.to(tl.int64)[:, None],
        tl.arange(0, C)[None, :],
    )
    r, p, c = tl.rsqrt(m[R] / (n * d) + norm_eps), (), ()
    for j in tl.static_range(n, 2 * n):
        p += (2 * tl.sigmoid(m[j] * r * tl.load(scale + 1) + tl.load(base + j)),)
    for j in tl.static_range(2 * n, R):
        c += (m[j] * r * tl.load(scale + 2) + tl.load(base + j),)
    tl.store(post + i * n + k, as_columns(p, n, C), mask=(t < N)[:, None] & (k < n))
    c = doubly_stochastic(c, hc_eps, iters, n)
    tl.store(comb + i * (n * n) + k, as_columns(c, n * n, C), mask=(t < N)[:, None] & (k < n * n))


@jit
def collapse(
    x,
    partial,
    base,
    scale,
    y,
    token,
    cols,
    N,
    d,
    splits,
    norm_eps,
    hc_eps,
    n: tl.constexpr,
    R: tl.constexpr,
    SP: tl.constexpr,
):
    """Some columns of y of one token."""
    s, xs, out = tl.arange(0, SP), (), tl.zeros(cols.shape, tl.float32)
    for j in tl.static_range(n):
        xs += (tl.load(x + (token * n + j) * d + cols, mask=cols < d, other=0.0).to(tl.float32),)
    at, there = partial + token * splits + s, s < splits
    r = tl.rsqrt(
        tl.sum(tl.load(at + R * N * splits, mask=there, other=0.0), 0) / (n * d) + norm_eps
    )
    for j in tl.static_range(n):
        u = tl.sum(tl.load(at + j * N * splits, mask=there, other=0.0), 0)
        out += (tl.sigmoid(u * r * tl.load(scale) + tl.load(base + j)) + hc_eps) * xs[j]
    tl.store(y + token * d + cols, out.to(y.dtype.element_ty), mask=cols < d)


@jit
def hc_pre_finish(
    x,
    partial,
    base,
    scale,
    y,
    post,
    comb,
    N,
    d,
    splits,
    norm_eps,
    hc_eps,
    iters,
    n: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    SP: tl.constexpr,
    SC: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i, blocks = tl.program_id(0) - tl.cdiv(N, BT), tl.cdiv(d, BD)
    if i < 0:
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        mixing(
            partial, base, scale, post, comb, t, N, d, splits, norm_eps, hc_eps, iters, n, R, C, SP
        )
    else:
        token, cols = (N - 1 - i // blocks).to(tl.int64), i % blocks * BD + tl.arange(0, BD)
        collapse(x, partial, base, scale, y, token, cols, N, d, splits, norm_eps, hc_eps, n, R, SC)


def key(x) -> str:
    """What of the streams [B, T, n, d] matters to the choice of tiles."""
    B, T, n, d = x.shape
    return f"n{n} d{d} {x.dtype} {'few' if B * T <= FEW else 'many'}"


def split(x, blocks, columns, BD) -> tuple[int, int]:
    """-> columns of a split, and how many splits: two programs per processor, if the blocks alone are not as many."""
    steps = cdiv(columns, BD)
    width = cdiv(steps, min(steps, 128, max(1, 2 * processors(x) // max(blocks, 1))))
    return width * BD, cdiv(steps, width)


def width_of(n: int) -> int:
    """Columns of a tile that holds the mix, the squares and n products."""
    return power_of_two(n * (2 + n) + 1 + n, 16)


def launch_mix(x, fn, g_y):
    """-> sums of the mix, of squares, and with g_y of g_y x_j: [R + 1 (+ n), B T, splits]."""
    B, T, n, d = x.shape
    N, R, candidates = (
        B * T,
        n * (2 + n),
        MIX_GRAD if g_y is not None else MIX_FEW if B * T <= FEW else MIX,
    )
    cfg = get_config("hc_pre_mix", key(x) + " grad" * (g_y is not None), candidates, x)
    streams, d = (1, n * d) if g_y is None else (n, d)  # the mix alone sees one long row
    width, splits = split(x, cdiv(N, cfg["BT"]), d, cfg["BD"])
    partial = x.new_empty(R + 1 + n * (g_y is not None), N, splits, dtype=torch.float32)
    launch(
        hc_pre_mix,
        (cdiv(N, cfg["BT"]) * splits,),
        x,
        fn,
        g_y,
        partial,
        N,
        d,
        width,
        splits,
        n=streams,
        R=R,
        C=power_of_two(R, 16),
        V=8,
        **cfg,
    )
    return partial


def launch_finish(x, partial, base, scale, norm_eps, hc_eps, iters):
    B, T, n, d = x.shape
    N, splits, cfg = B * T, partial.shape[2], get_config("hc_pre_finish", key(x), FINISH, x)
    y = x.new_empty(B, T, d)
    post = x.new_empty(B, T, n, dtype=torch.float32)
    comb = x.new_empty(B, T, n, n, dtype=torch.float32)
    C, BT = width_of(n), min(cfg["BT"], power_of_two(N))
    launch(
        hc_pre_finish,
        (cdiv(N, BT) + N * cdiv(d, cfg["BD"]),),
        x,
        partial,
        base,
        scale,
        y,
        post,
        comb,
        N,
        d,
        splits,
        norm_eps,
        hc_eps,
        iters,
        n=n,
        R=n * (2 + n),
        C=C,
        SP=min(power_of_two(splits), max(1, 2048 // (C * BT))),
        SC=power_of_two(splits),
        **{**cfg, "BT": BT},
    )
    return y, post, comb


def forward(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
):
    x, fn, base, scale = (t.contiguous() for t in (x, fn, base.float(), scale.float()))
    return launch_finish(x, launch_mix(x, fn, None), base, scale, norm_eps, hc_eps, iters)
