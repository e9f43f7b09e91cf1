"""down of moe (see moe.py): h through W2 of each pair's expert, and the sum over pairs."""

from __future__ import annotations

import torch

from ..launch import cdiv, jit, launch, tl
from .moe_route import Route, moe_block, moe_last
from .moe_values import Weights, moe_dot, moe_values, moe_weights


@jit
def moe_add(
    # pairs [N, K, d], y [N, d]; experts of pairs [N, K], or None: all have one
    pairs,
    y,
    idx,
    # of the tile: rows [BM, 1], columns [1, BN]
    row,
    col,
    # shapes
    N,
    d,
    E,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y = sum of the pairs that have an expert, in fp32 and in order."""
    mask = (row < N) & (col < d)
    total = tl.zeros([BM, BN], tl.float32)
    for k in tl.static_range(K):
        if idx is None:
            has_expert = mask
        else:
            has_expert = mask & (tl.load(idx + row * K + k, mask=row < N, other=E) < E)
        ptrs = pairs + (row * K + k) * d + col
        term = tl.load(ptrs, mask=has_expert, other=0.0, cache_modifier=".cg")
        total += term.to(tl.float32)
    tl.store(y + row * d + col, total.to(y.dtype.element_ty), mask=mask)


@jit
def moe_down(
    # h [n / K, I]; W and its scales
    h,
    w,
    s,
    # the route
    order,
    starts,
    blocks,
    # results: out [n, O]; y [1, O] of one token and counters of programs by tile, or None
    out,
    y,
    seen,
    # shapes; blocks of scales begin anew every `rows` rows of W
    K,
    E,
    O,
    I,
    rows,
    # strides of weights and scales; tiles of a block
    w_expert,
    w_row,
    s_expert,
    s_row,
    NT,
    # format of the weights, values in half a word, whether BK divides I
    FORMAT: tl.constexpr,
    J: tl.constexpr,
    EVEN: tl.constexpr,
    ROUTED: tl.constexpr,
    # whether W is [I, O]; whether tiles are transposed; terms of y; sizes
    TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr,
    TERMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out = h W^T, or h W if TRANSPOSED. Each pair has a row of out, and h one for every K pairs.

    If there is y: the program that completes a tile of it, as `seen` counts, adds the TERMS rows of
    out.
    """
    if ROUTED:
        if tl.program_id(0) // NT >= tl.load(starts + E + 1):
            return
    block, expert, tile, pair, mask = moe_block(order, blocks, NT, ROUTED, BM)
    col = tile * BN + tl.arange(0, BN)
    row = tl.minimum(col, O - 1)
    dtype: tl.constexpr = h.dtype.element_ty
    w += expert * w_expert
    if FORMAT != "plain":
        s += expert * s_expert
    pair = pair.to(tl.int64)
    h += (pair // K)[:, None] * I
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for k in range(0, I, BK):
        i = (k + tl.arange(0, BK))[None, :]
        hs = tl.load(h + i, mask=mask[:, None] if EVEN else mask[:, None] & (i < I), other=0.0)
        if TRANSPOSED:
            i = (k + tl.arange(0, BK))[:, None]
            o = col[None, :]
            inside = o < O if EVEN else (o < O) & (i < I)
            ws = moe_values(w, s, i, o, inside, w_row, s_row, rows, FORMAT, dtype)
            ws = tl.trans(ws)
        else:
            ws = moe_weights(w, s, row, k, I, w_row, s_row, FORMAT, J, EVEN, BN, BK, dtype)
        acc = moe_dot(hs, ws, acc, SWAP)
    if J:
        acc *= 18446744073709551616.0  # 2^64
    offs = pair[:, None] * O + col[None, :]
    inside = mask[:, None] & (col < O)[None, :]
    if SWAP:
        offs = tl.trans(offs)
        inside = tl.trans(inside)
    tl.store(out + offs, acc.to(out.dtype.element_ty), mask=inside)
    if y is not None:
        if moe_last(seen + tile, TERMS):
            moe_add(out, y, None, 0, col[None, :], 1, O, E, TERMS, 1, BN)


@jit
def moe_sum(
    # as in moe_add
    pairs,
    y,
    idx,
    # shapes
    N,
    d,
    E,
    K: tl.constexpr,
    # sizes
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """See moe_add."""
    row = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    col = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    moe_add(pairs, y, idx, row, col, N, d, E, K, BM, BN)


def down(
    h: torch.Tensor,
    w: Weights,
    route: Route,
    # sizes and tile, see moe_down
    n: int,
    K: int,
    O: int,
    rows: int,
    cfg: dict,
    transposed: bool = False,
    # of one token
    y: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """h [n / K, i] through W of every pair's expert: [n, O]."""
    I, E = h.shape[1], len(w.w)
    out = h.new_empty(n, O)
    NT = cdiv(O, cfg["BN"])
    launch(
        moe_down,
        (route.number * NT,),
        h,
        w.w,
        w.s,
        *route[:3],
        out,
        y,
        counters,
        K,
        E,
        O,
        I,
        rows,
        *w.strides,
        NT,
        FORMAT=w.format,
        J=w.J,
        EVEN=I % cfg["BK"] == 0,
        ROUTED=route.routed,
        TRANSPOSED=transposed,
        TERMS=1 if y is None else n,
        BM=route.height,
        **cfg,
    )
    return out


def sum_pairs(pairs: torch.Tensor, idx: torch.Tensor, E: int, dtype: torch.dtype) -> torch.Tensor:
    """[N K, d] -> [N, d]"""
    N, (n, d) = len(idx), pairs.shape
    BM = 8 if N > 64 else 1
    y = pairs.new_empty(N, d, dtype=dtype)
    launch(
        moe_sum,
        (cdiv(N, BM), cdiv(d, 512)),
        pairs,
        y,
        idx,
        N,
        d,
        E,
        K=n // N,
        BM=BM,
        BN=512,
        num_warps=8 if N > 64 else 2,
    )
    return y
