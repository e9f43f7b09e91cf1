"""Backward of moe (see moe.py): the forward's pre-activations again, then the gradients.

g_h = g W2;  g_gate, g_up by the SwiGLU;  g_x = g_gate W1 + g_up W3, added over pairs
g_W1 = g_gate^T x, g_W3 = g_up^T x, g_W2 = g^T h of each expert's pairs; none if packed
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, tl
from .moe_down import down, sum_pairs
from .moe_route import Route, begin
from .moe_tiles import down_tile, load_of, up_tile
from .moe_up import up
from .moe_values import Weights, as_weights, moe_fp8


@jit
def moe_act_backward(
    # gate and up [n, 2I], in place to their gradients; g_h [n, I], in place to h
    sums,
    g_h,
    # of pairs [n]
    weight,
    g_weight,
    limit,
    n,
    I,
    # act_quant, whether h is wanted; sizes
    QUANT: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """g_gate = g_h w up silu'(gate), g_up = g_h w silu(gate), g_w = sum g_h silu(gate) up."""
    pair = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    w = tl.load(weight + pair, mask=pair < n, other=0.0)
    g_w = tl.zeros([BM, BN], tl.float32)
    for i in range(0, I, BN):
        col = i + tl.arange(0, BN)[None, :]
        mask = (pair < n) & (col < I)
        gate_ptrs = sums + pair * 2 * I + col
        h_ptrs = g_h + pair * I + col
        a = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(gate_ptrs + I, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        gate = tl.minimum(a, limit)
        up = tl.minimum(tl.maximum(b, -limit), limit)
        sig = 1 / (1 + tl.exp(-gate))
        silu = gate * sig
        g_w += g * silu * up
        # silu' = sigmoid (1 + gate - silu); no gradient passes where a value was clamped
        g_gate = tl.where(a <= limit, g * w * up * sig * (1 + gate - silu), 0.0)
        tl.store(gate_ptrs, g_gate.to(g_h.dtype.element_ty), mask=mask)
        g_up = tl.where(tl.abs(b) <= limit, g * w * silu, 0.0)
        tl.store(gate_ptrs + I, g_up.to(g_h.dtype.element_ty), mask=mask)
        if H:
            h = (silu * up * w).to(g_h.dtype.element_ty)
            if QUANT:
                h = moe_fp8(h, BM, BN, False)
            tl.store(h_ptrs, h, mask=mask)
    tl.store(g_weight + pair, tl.sum(g_w, 1)[:, None], mask=pair < n)


@jit
def moe_outer(
    # a [n / KA, A], b [n / KB, B]
    a,
    b,
    # the route
    order,
    starts,
    # [E, A, B]
    out,
    # shapes
    A,
    B,
    KA,
    KB,
    BA: tl.constexpr,
    BB: tl.constexpr,
    BK: tl.constexpr,
):
    """out: of each expert, the sum over its pairs of a's row (pair / KA) times b's (pair / KB)."""
    tiles_b = (B + BB - 1) // BB
    tiles = (A + BA - 1) // BA * tiles_b  # of an expert
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    i = tile // tiles_b * BA + tl.arange(0, BA)
    j = tile % tiles_b * BB + tl.arange(0, BB)
    acc = tl.zeros([BA, BB], tl.float32)
    end = tl.load(starts + expert + 1)
    for r in range(tl.load(starts + expert), end, BK):
        row = r + tl.arange(0, BK)
        pair = tl.load(order + row, mask=row < end, other=0)
        a_ptrs = a + (pair // KA).to(tl.int64)[:, None] * A + i[None, :]
        a_tile = tl.load(a_ptrs, mask=(row < end)[:, None] & (i < A)[None, :], other=0.0)
        b_ptrs = b + (pair // KB).to(tl.int64)[:, None] * B + j[None, :]
        b_tile = tl.load(b_ptrs, mask=(row < end)[:, None] & (j < B)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a_tile), b_tile, acc, input_precision="ieee")
    out_ptrs = out + (expert.to(tl.int64) * A + i.to(tl.int64)[:, None]) * B + j[None, :]
    tl.store(out_ptrs, acc.to(out.dtype.element_ty), mask=(i < A)[:, None] & (j < B)[None, :])


OUTER = [dict(BA=64, BB=64, BK=32, num_warps=4, num_stages=2)]
OUTER_BF16 = [
    dict(BA=128, BB=256, BK=64, num_warps=8, num_stages=3),
    dict(BA=128, BB=128, BK=64, num_warps=8, num_stages=3),
    dict(BA=128, BB=128, BK=32, num_warps=8, num_stages=3),
]


def _outer(a, b, route: Route, E: int, n: int, key: str) -> torch.Tensor:
    """[n / KA, A], [n / KB, B] -> [E, A, B]"""
    A, B = a.shape[1], b.shape[1]
    fp32 = a.dtype == torch.float32
    name = f"{A}x{B} {key} {'fp32' if fp32 else 'bf16'}"
    cfg = get_config("moe_outer", name, OUTER if fp32 else OUTER_BF16, a)
    out = a.new_empty(E, A, B)
    launch(
        moe_outer,
        (E * cdiv(A, cfg["BA"]) * cdiv(B, cfg["BB"]),),
        a,
        b,
        *route[:2],
        out,
        A,
        B,
        n // len(a),
        n // len(b),
        **cfg,
    )
    return out


def backward(
    g,
    x,
    # experts
    w13,
    w2,
    # routing
    idx,
    weight,
    # scales of packed experts
    s13,
    s2,
    # constants
    limit,
    act_quant,
):
    """-> gradients of x, w13, w2 (empty if packed), weight."""
    (N, d), (n, K) = x.shape, (idx.numel(), idx.shape[1])
    E, I = len(w2), w13.shape[1] // 2
    dtype = x.dtype
    frozen = s13 is not None
    if not n * d * I:
        g_w13, g_w2 = (x.new_zeros(0 if frozen else w.shape) for w in (w13, w2))
        return x.new_zeros(N, d), g_w13, g_w2, torch.zeros_like(weight)
    w13_rows, w13_columns = as_weights(w13, s13, dtype), as_weights(w13, s13, dtype, words=False)
    w2_columns = as_weights(w2, s2, dtype, words=False)
    g, x = g.to(dtype).contiguous(), x.contiguous()
    idx, weight = idx.contiguous(), weight.contiguous()
    key, rows = load_of(n, E)
    tile = dict(up_tile(w13_rows, d, I, key, rows, x), SPLIT=1)

    def through(h: torch.Tensor, w: Weights, K: int, O: int, rows: int) -> torch.Tensor:
        down_cfg = down_tile(w, h.shape[1], O, tile["BM"], key, h, transposed=True)
        return down(h, w, route, n, K, O, rows, down_cfg, transposed=True)

    route, x = begin(idx, E, tile["BM"], x, act_quant, w13_rows.J)
    # The pre-activations become their gradients, the gradient of h becomes h
    g_13, g_weight = x.new_empty(n, 2 * I), torch.empty_like(weight)
    up(x, w13_rows, route, weight, K, I, limit, tile, None, g_13)
    h = through(g, w2_columns, K, I, d)
    launch(
        moe_act_backward,
        (cdiv(n, 4),),
        g_13,
        h,
        weight,
        g_weight,
        limit,
        n,
        I,
        QUANT=act_quant,
        H=not frozen,
        BM=4,
        BN=512,
        num_warps=4,
    )
    g_x = sum_pairs(through(g_13, w13_columns, 1, d, I), idx, E, dtype)
    if frozen:
        return g_x, x.new_empty(0), x.new_empty(0), g_weight
    return g_x, _outer(g_13, x, route, E, n, key), _outer(g, h, route, E, n, key), g_weight
