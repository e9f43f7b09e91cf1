"""up of moe (see moe.py): tokens through W1 and W3 of their experts, then the SwiGLU."""

from __future__ import annotations

import torch

from ..launch import cdiv, jit, launch, tl
from .moe_route import Route, moe_block, moe_last, moe_zero
from .moe_values import Weights, moe_dot, moe_fp8, moe_order, moe_weights


@jit
def moe_hidden(
    # pre-activations of a tile
    gate,
    up,
    # weights of pairs [n], h [n, I]
    weight,
    h,
    limit,
    I,
    # of the tile: pairs, columns, mask
    pair,
    col,
    mask,
    # act_quant, order of columns; sizes
    QUANT: tl.constexpr,
    ORDER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SWAP: tl.constexpr,
):
    """h = silu(gate) up weight of a tile, stored."""
    gate = tl.minimum(gate, limit)
    up = tl.minimum(tl.maximum(up, -limit), limit)
    v = (gate / (1 + tl.exp(-gate)) * up * tl.load(weight + pair)).to(h.dtype.element_ty)
    if QUANT:
        v = moe_fp8(tl.where(col < I, v, 0.0), BM, BN, SWAP)
    tl.store(h + pair * I + col, moe_order(v, ORDER, BM, BN, SWAP), mask=mask)


@jit
def moe_finish(
    # gate and up [SPLIT, n, 2I], in parts
    sums,
    # as in moe_hidden
    weight,
    h,
    limit,
    n,
    I,
    # pairs, first column, mask of the pairs
    pair,
    begin,
    mask,
    # act_quant, order of columns; sizes
    QUANT: tl.constexpr,
    ORDER: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
):
    """128 columns of h from those of sums [SPLIT, n, 2I], past the L1 cache."""
    col = begin + tl.arange(0, 128)[None, :]
    mask = mask & (col < I)
    gate = tl.zeros([BM, 128], tl.float32)
    up = tl.zeros([BM, 128], tl.float32)
    for part in tl.static_range(SPLIT):
        ptrs = sums + (part * n + pair) * (2 * I) + col
        gate += tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        up += tl.load(ptrs + I, mask=mask, other=0.0, cache_modifier=".cg")
    moe_hidden(gate, up, weight, h, limit, I, pair, col, mask, QUANT, ORDER, BM, 128, False)


@jit
def moe_up(
    # x [N, d]; W1, W3 and their scales
    x,
    w,
    s,
    # the route
    order,
    starts,
    blocks,
    # weights of pairs [n]; results: h [n, I], sums [SPLIT, n, 2I] or None
    weight,
    h,
    sums,
    # counters: of programs by block and 128 columns, or None; to be zeroed, or None
    seen,
    zero,
    limit,
    # shapes
    n,
    K,
    E,
    I,
    d,
    # strides of weights and scales
    w_expert,
    w_row,
    s_expert,
    s_row,
    # tiles of a block, counters to be zeroed
    NT,
    zeros,
    # format of the weights, values in half a word, whether BK divides d
    FORMAT: tl.constexpr,
    J: tl.constexpr,
    EVEN: tl.constexpr,
    ROUTED: tl.constexpr,
    # of h: act_quant, order of columns
    QUANT: tl.constexpr,
    ORDER: tl.constexpr,
    # parts of d; whether tiles are transposed; sizes
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """h [n, I]. With `sums`, each program stores partial gate and up for its part of d; with
    counters, the last program of a 128-column group computes h from them.
    """
    if zero is not None:
        if tl.program_id(0) + tl.program_id(1) == 0:
            moe_zero(zero, zeros)
    if ROUTED:
        if tl.program_id(0) // NT >= tl.load(starts + E + 1):
            return
    block, expert, tile, pair, mask = moe_block(order, blocks, NT, ROUTED, BM)
    col = tile * BN + tl.arange(0, BN)
    row = tl.minimum(col, I - 1)
    dtype: tl.constexpr = x.dtype.element_ty
    w += expert * w_expert
    if FORMAT != "plain":
        s += expert * s_expert
    pair = pair.to(tl.int64)
    x += (pair // K)[:, None] * d
    # gate = x W1^T, up = x W3^T over this program's part of d
    gate = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    up = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    part = (d + SPLIT * BK - 1) // (SPLIT * BK) * BK
    begin = tl.program_id(1) * part
    for k in range(begin, tl.minimum(begin + part, d), BK):
        i = (k + tl.arange(0, BK))[None, :]
        xs = tl.load(x + i, mask=mask[:, None] if EVEN else mask[:, None] & (i < d), other=0.0)
        w1 = moe_weights(w, s, row, k, d, w_row, s_row, FORMAT, J, EVEN, BN, BK, dtype)
        gate = moe_dot(xs, w1, gate, SWAP)
        w3_ptr = w + I * w_row
        s3_ptr = s if FORMAT == "plain" else s + s_expert // 2
        w3 = moe_weights(w3_ptr, s3_ptr, row, k, d, w_row, s_row, FORMAT, J, EVEN, BN, BK, dtype)
        up = moe_dot(xs, w3, up, SWAP)
    if J:
        gate *= 18446744073709551616.0  # 2^64
        up *= 18446744073709551616.0
    columns = col[:, None] if SWAP else col[None, :]
    pairs = pair[None, :] if SWAP else pair[:, None]
    inside = (mask[None, :] if SWAP else mask[:, None]) & (columns < I)
    if sums is None:
        moe_hidden(
            gate, up, weight, h, limit, I, pairs, columns, inside, QUANT, ORDER, BM, BN, SWAP
        )
    else:
        ptrs = sums + (tl.program_id(1).to(tl.int64) * n + pairs) * (2 * I) + columns
        tl.store(ptrs, gate.to(sums.dtype.element_ty), mask=inside)
        tl.store(ptrs + I, up.to(sums.dtype.element_ty), mask=inside)
        if seen is not None:
            G: tl.constexpr = 128 // BN  # tiles of 128 columns
            group = tile // G
            counter = seen + block * ((I + 127) // 128) + group
            if moe_last(counter, SPLIT * tl.minimum(G, NT - group * G)):
                p, m = pair[:, None], mask[:, None]
                begin = group * 128
                moe_finish(sums, weight, h, limit, n, I, p, begin, m, QUANT, ORDER, SPLIT, BM)


@jit
def moe_act(
    # as in moe_finish
    sums,
    weight,
    h,
    limit,
    n,
    I,
    QUANT: tl.constexpr,
    ORDER: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """128 columns of one pair's h from sums."""
    pair = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * 128
    moe_finish(sums, weight, h, limit, n, I, pair, begin, True, QUANT, ORDER, SPLIT, 1)


def up(
    x: torch.Tensor,
    w: Weights,
    route: Route,
    weight: torch.Tensor,
    # sizes, limit and tile
    K: int,
    I: int,
    limit: float,
    cfg: dict,
    # results, see moe_up
    h: torch.Tensor | None,
    sums: torch.Tensor | None,
    # of h: act_quant, order of columns
    quant: bool = False,
    order: int = 0,
    # counters of programs, counters to be zeroed: see moe_up
    counters: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> None:
    """Fill h or sums or both."""
    E, d = len(w.w), x.shape[1]
    n = weight.numel()
    NT = cdiv(I, cfg["BN"])
    launch(
        moe_up,
        (route.number * NT, cfg["SPLIT"]),
        x,
        w.w,
        w.s,
        *route[:3],
        weight,
        h,
        sums,
        counters,
        zero,
        limit,
        n,
        K,
        E,
        I,
        d,
        *w.strides,
        NT,
        0 if zero is None else zero.numel(),
        FORMAT=w.format,
        J=w.J,
        EVEN=d % cfg["BK"] == 0,
        ROUTED=route.routed,
        QUANT=quant,
        ORDER=order,
        **cfg,
    )


def act(sums, weight, h, limit: float, quant: bool, order: int) -> None:
    """Fills h from sums, where `up` does not: programs see each other's stores after a launch."""
    SPLIT, n, I = sums.shape[0], *h.shape
    launch(
        moe_act,
        (n, cdiv(I, 128)),
        sums,
        weight,
        h,
        limit,
        n,
        I,
        QUANT=quant,
        ORDER=order,
        SPLIT=SPLIT,
        num_warps=1,
    )
