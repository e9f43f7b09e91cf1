"""The Triton kernels of hc_pre, backward (see ops/hc_pre.py)."""

from __future__ import annotations

import math

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .hc_pre import halves, key, launch_mix, load_mix, split, width_of
from .sinkhorn import as_columns, columns, doubly_stochastic_backward

TOKENS = [
    {"BT": 64, "num_warps": 1},
    {"BT": 32, "num_warps": 1},
]  # a token a thread: a warp has 64 or 32


STREAMS = [
    {"BT": 64, "BD": 64, "J": 2, "STAGES": 3, "num_warps": 4},
    {"BT": 64, "BD": 64, "J": 2, "STAGES": 2, "num_warps": 4},
    {"BT": 64, "BD": 64, "J": 1, "STAGES": 2, "num_warps": 4},
    {"BT": 32, "BD": 32, "J": 1, "STAGES": 1, "num_warps": 4},
]


@jit
def hc_pre_backward_tokens(
    partial,
    base,
    scale,
    g_post,
    g_comb,
    aside,
    u,
    factors,
    sums,
    N,
    d,
    splits,
    norm_eps,
    hc_eps,
    iters,
    n: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    SP: tl.constexpr,
    BT: tl.constexpr,
):
    t, k = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, C)[None, :]
    i, mask = t.to(tl.int64)[:, None], (t < N)[:, None]
    m = load_mix(partial, t, N, splits, R + 1 + n, C, SP)
    dots = columns(m, C)
    r = tl.rsqrt(dots[R] / (n * d) + norm_eps)
    m *= r[:, None]
    by = tl.load(scale + tl.where(k < n, 0, tl.where(k < 2 * n, 1, 2)))
    logits = m * by + tl.load(base + k, mask=k < R, other=0.0)
    g_p = columns(tl.load(g_post + i * n + k, mask=mask & (k < n), other=0.0), C)
    g_c = columns(tl.load(g_comb + i * (n * n) + k, mask=mask & (k < n * n), other=0.0), C)
    c, g = columns(logits, C), ()
    g_c = doubly_stochastic_backward(g_c, c[2 * n : R], hc_eps, iters, aside, N, t, n, P)
    for j in tl.static_range(R):
        g += (dots[R + 1 + j] if j < n else 2 * g_p[j - n] if j < 2 * n else g_c[j - 2 * n],)
    sigmoid = tl.sigmoid(logits)
    g = as_columns(g, R, C) * tl.where(k < 2 * n, sigmoid * (1 - sigmoid), 1.0)  # of the logits
    g = tl.where(mask & (k < R), g, 0.0)
    sums += tl.program_id(0) * (2 * C) + tl.arange(0, C)
    tl.store(sums, tl.sum(g, 0))
    tl.store(sums + C, tl.sum(g * m, 0))
    g *= by
    along = tl.sum(g * m, 1)[:, None]
    tl.store(u + i * C + k, g * r[:, None], mask=mask)  # of the un-normalised mix
    factors += i * (n + 1) + k  # of g_y in g_x, [n], and of -x
    tl.store(
        factors,
        tl.where(k < n, sigmoid + hc_eps, along * (r * r)[:, None] / (n * d)),
        mask=mask & (k <= n),
    )


@jit
def hc_pre_backward_streams(
    x,
    fn,
    g_y,
    g_in,
    u,
    factors,
    g_x,
    parts,
    N,
    width,
    n: tl.constexpr,
    d: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    J: tl.constexpr,
    STAGES: tl.constexpr,
):
    k, i, stream = (
        tl.arange(0, C),
        tl.arange(0, BT),
        tl.program_id(0) % (n // J) * J,
    )  # J streams from here on
    block, blocks = tl.program_id(0) // (n // J), tl.cdiv(d, BD)
    s, cols = block // blocks, block % blocks * BD + tl.arange(0, BD)
    at, mask = (
        k[:, None] * (n * d) + stream * d + cols[None, :],
        (k < R)[:, None] & (cols < d)[None, :],
    )
    fs, accs, first = (), (), (s * width).to(tl.int64)
    for j in tl.static_range(J):
        fs += (tl.load(fn + at + j * d, mask=mask, other=0.0).to(tl.float32),)
        accs += (tl.zeros([BD, C], tl.float32),)
    skip, step = first * (n * d) + stream * d, BT * (n * d)
    x, g_x, g_y, u, factors = (
        x + skip,
        g_x + skip,
        g_y + first * d,
        u + first * C,
        factors + first * (n + 1),
    )
    if g_in is not None:
        g_in += skip
    for left in tl.range(tl.minimum(width, N - s * width), 0, -BT, num_stages=STAGES):
        here, new = (i < left)[:, None], ()
        tile, there = i[:, None] * (n * d) + cols[None, :], here & (cols < d)[None, :]
        ut = tl.load(u + i[:, None] * C + k[None, :], mask=here, other=0.0)
        c = tl.load(factors + i[:, None] * (n + 1) + n, mask=here, other=0.0)
        gt = tl.load(g_y + i[:, None] * d + cols[None, :], mask=there, other=0.0)
        for j in tl.static_range(J):
            xt = tl.load(x + tile + j * d, mask=there, other=0.0)
            pre = tl.load(factors + i[:, None] * (n + 1) + stream + j, mask=here, other=0.0)
            if (
                xt.dtype == tl.bfloat16
            ):  # every term on its own between products: it is brought into their layout as bf16
                hi, lo = halves(ut)
                f_hi, f_lo = halves(fs[j])
                out = tl.dot(hi, f_hi, -c * xt.to(tl.float32))
                out = tl.dot(lo, f_hi, out + pre * gt.to(tl.float32))
                if g_in is not None:
                    out += tl.load(g_in + tile + j * d, mask=there, other=0.0).to(tl.float32)
                out = tl.dot(hi, f_lo, out)
                new += (tl.dot(tl.trans(xt), lo, tl.dot(tl.trans(xt), hi, accs[j])),)
            else:
                xt = xt.to(tl.float32)
                out = tl.dot(ut, fs[j], pre * gt.to(tl.float32) - c * xt, input_precision="ieee")
                if g_in is not None:
                    out += tl.load(g_in + tile + j * d, mask=there, other=0.0).to(tl.float32)
                new += (tl.dot(tl.trans(xt), ut, accs[j], input_precision="ieee"),)
            tl.store(g_x + tile + j * d, out.to(g_x.dtype.element_ty), mask=there)
        accs = new
        x, g_x, g_y, u, factors = (
            x + step,
            g_x + step,
            g_y + BT * d,
            u + BT * C,
            factors + BT * (n + 1),
        )
        if g_in is not None:
            g_in += step
    for j in tl.static_range(J):
        tl.store(parts + s * (R * n * d) + at + j * d, tl.trans(accs[j]), mask=mask)


@jit
def hc_pre_backward_reduce(
    parts,
    sums,
    g_fn,
    g_base,
    g_scale,
    size,
    splits,
    count,
    n: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
):
    if tl.program_id(0) < tl.cdiv(size, BD):
        i = tl.program_id(0) * BD + tl.arange(0, BD)
        total = tl.zeros([BD], tl.float32)
        for s in range(splits):
            total += tl.load(parts + s * size + i, mask=i < size, other=0.0)
        tl.store(g_fn + i, total.to(g_fn.dtype.element_ty), mask=i < size)
    else:
        k, base, along = (
            tl.arange(0, C),
            tl.zeros([BP, C], tl.float32),
            tl.zeros([BP, C], tl.float32),
        )
        for start in range(0, count, BP):
            p = start + tl.arange(0, BP)[:, None]
            base += tl.load(sums + p * (2 * C) + k[None, :], mask=p < count, other=0.0)
            along += tl.load(sums + p * (2 * C) + C + k[None, :], mask=p < count, other=0.0)
        tl.store(g_base + k, tl.sum(base, 0).to(g_base.dtype.element_ty), mask=k < R)
        along = tl.sum(along, 0)
        for i in tl.static_range(3):
            part = tl.where((k >= i * n) & (k < (R if i == 2 else i * n + n)), along, 0.0)
            tl.store(g_scale + i, tl.sum(part, 0).to(g_scale.dtype.element_ty))


def backward(
    g_y: torch.Tensor,
    g_post: torch.Tensor,
    g_comb: torch.Tensor,
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
    g_in=None,
):
    B, T, n, d = x.shape
    N, R, C = B * T, n * (2 + n), width_of(n)
    g_y, x, fn = g_y.contiguous(), x.contiguous(), fn.contiguous()
    new = lambda *shape: x.new_empty(shape, dtype=torch.float32)
    out = [t.new_empty(t.shape) for t in (x, fn, base, scale)]
    g_x, g_fn, g_base, g_scale = out
    g_post, g_comb, base, scale = (t.float().contiguous() for t in (g_post, g_comb, base, scale))
    partial = launch_mix(x, fn, g_y)

    cfg, splits = get_config("hc_pre_backward_tokens", f"n{n}", TOKENS, x), partial.shape[2]
    count, u, factors, aside = (
        cdiv(N, cfg["BT"]),
        new(N, C),
        new(N, n + 1),
        new(2 * iters - 1, n, N),
    )
    sums = new(count, 2, C)
    launch(
        hc_pre_backward_tokens,
        (count,),
        partial,
        base,
        scale,
        g_post,
        g_comb,
        aside,
        u,
        factors,
        sums,
        N,
        d,
        splits,
        norm_eps,
        hc_eps,
        iters,
        n=n,
        R=R,
        C=C,
        P=power_of_two(n),
        SP=min(power_of_two(splits), 2),
        **cfg,
    )

    cfg = get_config("hc_pre_backward_streams", key(x) + " in" * (g_in is not None), STREAMS, x)
    cfg = {**cfg, "J": math.gcd(cfg["J"], n)}
    blocks = cdiv(d, cfg["BD"]) * n // cfg["J"]
    width, splits = split(x, blocks, max(N, 1), cfg["BT"])
    parts = new(splits, R, n * d)
    launch(
        hc_pre_backward_streams,
        (blocks * splits,),
        x,
        fn,
        g_y,
        g_in if g_in is None else g_in.contiguous(),
        u,
        factors,
        g_x,
        parts,
        N,
        width,
        n=n,
        d=d,
        R=R,
        C=C,
        **cfg,
    )
    launch(
        hc_pre_backward_reduce,
        (cdiv(fn.numel(), 1024) + 1,),
        parts,
        sums,
        g_fn,
        g_base,
        g_scale,
        fn.numel(),
        splits,
        count,
        n=n,
        R=R,
        C=C,
        BP=64,
        BD=1024,
        num_warps=4,
    )
    return tuple(out)
