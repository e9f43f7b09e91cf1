"""hc_pre: read one input from the n residual streams, and say how its output is written back (mHC, docs/v4.md#hyper-connections).

    v    = flatten(x)                                     fp32, n d long
    m    = (fn v) * rsqrt(mean(v^2) + norm_eps)           n + n + n n mixing values
    pre  = sigmoid(m * scale0 + base) + hc_eps            first n
    post = 2 sigmoid(m * scale1 + base)                   next n
    comb = softmax rows(m * scale2 + base) + hc_eps       the rest, [n, n]; then Sinkhorn: columns, and iters - 1 times
                                                          rows and columns, each divided by (sum + hc_eps)
    y    = sum_j pre_j x_j

    x [B, T, n, d]   fn [n (2 + n), n d]   base [n (2 + n)]   scale [3]
    y [B, T, d] in the dtype of x   post [B, T, n] fp32   comb [B, T, n, n] fp32

All arithmetic is fp32. The backward recomputes the mix from x and walks the Sinkhorn steps in reverse.
Errors: shapes that do not fit together.

On a GPU, two launches. `hc_pre_mix` multiplies a block of tokens by fn on the matrix units, and adds up squares on the
side. It is split over columns so far that every processor has work: many splits in decode, few in prefill, each with sums
of its own (no atomics; `partial` [columns, tokens, splits]). bf16 streams are exact in bf16 products, so fn alone is split,
into a bf16 part and a bf16 rest: errors of 2^-18. `hc_pre_finish` adds up the splits; some of its programs do Sinkhorn, a
matrix a thread, the others collapse a piece of a token each, the tokens in reverse: what was read last is still in the cache.

Backward, four launches: the mix again, with the products of g_y and x_j; per token, all that is not d long, with Sinkhorn
in registers; g_x and g_fn in one pass over the streams, a program owning the same columns of all n for a range of tokens,
where fn stays put and g_fn accumulates; and the sum of what the ranges gave. Results do not vary from run to run. Above
n = 8 the references run.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .cpp import plain
from .hc_cpp import SOURCE
from .launch import cdiv, get_config, jit, launch, power_of_two, processors, tl
from .registry import Op, register, require
from .sinkhorn import (
    IN_REGISTERS,
    as_columns,
    columns,
    doubly_stochastic,
    doubly_stochastic_backward,
    sinkhorn,
)
from .sinkhorn import backward_reference as sinkhorn_backward

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


def check(x, fn, base, scale, norm_eps, hc_eps, iters):
    require(x.dim() == 4, f"hc_pre: x {tuple(x.shape)} is not [B, T, n, d]")
    n, d = x.shape[2:]
    rows = n * (2 + n)
    require(
        fn.shape == (rows, n * d) and base.shape == (rows,) and scale.shape == (3,),
        f"hc_pre: x {tuple(x.shape)}, fn {tuple(fn.shape)}, base {tuple(base.shape)}, scale {tuple(scale.shape)} do not fit",
    )


def _mix(x, fn, norm_eps):
    """-> v [B, T, n d], un-normalised mix u [B, T, n (2 + n)], r [B, T, 1]; m = u r."""
    v = x.float().flatten(2)
    return v, F.linear(v, fn.float()), torch.rsqrt(v.square().mean(-1, keepdim=True) + norm_eps)


def _split(m, base, scale, n):
    """Mixing values -> logits of pre [B, T, n], post [B, T, n], comb [B, T, n, n]."""
    pre, post, comb = m.split([n, n, n * n], -1)
    b0, b1, b2 = base.float().split([n, n, n * n])
    s0, s1, s2 = scale.float().unbind()
    return pre * s0 + b0, post * s1 + b1, (comb * s2 + b2).unflatten(-1, (n, n))


def _forward(x, fn, base, scale, norm_eps, hc_eps, iters, sinkhorn):
    n = x.shape[2]
    _, u, r = _mix(x, fn, norm_eps)
    pre, post, comb = _split(u * r, base, scale, n)
    y = ((torch.sigmoid(pre) + hc_eps)[..., None] * x.float()).sum(2).to(x.dtype)
    return y, 2 * torch.sigmoid(post), sinkhorn(comb, hc_eps, iters)


def reference(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(x, fn, base, scale, norm_eps, hc_eps, iters, sinkhorn.reference)


def backward_reference(
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
    """Gradients of x, fn, base and scale; g_in is a gradient of x from elsewhere, to be added."""
    n, xf, g_y = x.shape[2], x.float(), g_y.float()
    v, u, r = _mix(x, fn, norm_eps)
    m = u * r
    pre, post, comb = _split(m, base, scale, n)
    pre, post, g = (
        torch.sigmoid(pre),
        torch.sigmoid(post),
        sinkhorn_backward(g_comb.float(), comb, hc_eps, iters),
    )
    g_pre = torch.einsum("btd,btjd->btj", g_y, xf) * pre * (1 - pre)
    g_logit = torch.cat(
        (g_pre, g_post.float() * 2 * post * (1 - post), g.flatten(-2)), -1
    )  # [B, T, n (2 + n)]
    g_base = g_logit.sum((0, 1))
    g_scale = torch.stack([part.sum() for part in (g_logit * m).split([n, n, n * n], -1)])
    g_m = g_logit * torch.cat([s.expand(k) for s, k in zip(scale.float(), (n, n, n * n))])
    g_u = g_m * r
    g_v = g_u @ fn.float() - (g_m * u).sum(-1, keepdim=True) * r**3 * v / v.shape[-1]
    g_x = (pre + hc_eps)[..., None] * g_y[:, :, None] + g_v.view_as(xf)
    if g_in is not None:
        g_x = g_x + g_in
    g_fn = g_u.flatten(0, 1).T @ v.flatten(0, 1)
    return g_x.to(x.dtype), g_fn.to(fn.dtype), g_base.to(base.dtype), g_scale.to(scale.dtype)


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
    y, post, comb = _fake(x, None, None, None, norm_eps, hc_eps, iters)
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


def kernel(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
):
    if x.shape[2] > IN_REGISTERS:
        return reference(x, fn, base, scale, norm_eps, hc_eps, iters)
    x, fn, base, scale = (t.contiguous() for t in (x, fn, base.float(), scale.float()))
    return launch_finish(x, launch_mix(x, fn, None), base, scale, norm_eps, hc_eps, iters)


def backward_kernel(
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
    if n > IN_REGISTERS:
        return backward_reference(
            g_y, g_post, g_comb, x, fn, base, scale, norm_eps, hc_eps, iters, g_in
        )
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


def _fake(x, fn, base, scale, norm_eps, hc_eps, iters):
    B, T, n, d = x.shape
    return (
        x.new_empty(B, T, d),
        x.new_empty(B, T, n, dtype=torch.float32),
        x.new_empty(B, T, n, n, dtype=torch.float32),
    )


def _flops(x, fn, *args, out_shape=None, **kw):
    """The mix is the only matrix product; pre, post and the collapse are elementwise."""
    return 2 * x[0] * x[1] * fn[0] * fn[1]


_backward_op = register(
    "hc_pre_backward(Tensor g_y, Tensor g_post, Tensor g_comb, Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, "
    "float hc_eps, int iters) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    fake=lambda g_y, g_post, g_comb, x, fn, base, scale, *args: tuple(
        t.new_empty(t.shape) for t in (x, fn, base, scale)
    ),
    flops=lambda g_y, g_post, g_comb, x, fn, *args, out_shape=None, **kw: 3 * _flops(x, fn),
    kernel=backward_kernel,
    cpp=SOURCE,
    takes=plain,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.constants = inputs[4:]


def _backward(ctx, g_y, g_post, g_comb):
    return *_backward_op(g_y, g_post, g_comb, *ctx.saved_tensors, *ctx.constants), None, None, None


_opaque = register(
    "hc_pre(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps, int iters) "
    "-> (Tensor, Tensor, Tensor)",
    impl=reference,
    fake=_fake,
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
    kernel=kernel,
    cpp=SOURCE,
    takes=plain,
)


def _on_cpu(*args):
    """Compiled, a traced Sinkhorn would take half of the compile time: it is one node, or with gradients all of hc_pre is."""
    if not torch.compiler.is_compiling():
        return reference(*args)
    return _opaque(*args) if torch.is_grad_enabled() else _forward(*args, sinkhorn.opaque)


hc_pre = Op("hc_pre", reference, _opaque, check, on_cpu=_on_cpu)
