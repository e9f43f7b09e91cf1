"""The Triton kernels of moe (see ops/moe.py): route, up, down, sum. The backward: moe_backward.py.

A pair is one of N tokens with one of its K experts, n = N K. All kernels leave pairs in their own
order: h and h W2^T have one row per pair, so that nothing is added atomically and every sum has a
fixed order. Pairs of expert E have none: they are in no block, `sum` leaves them out, and the
gradient of their weight is not defined.

    route   a stable counting sort of the pairs by expert, in blocks of at most BM pairs of one
            expert (moe_route.py). How many blocks there are is known only on the GPU: programs are
            started for as many as there can be, and those left over exit. One token needs no route:
            each of its pairs is a block. The programs of an expert are neighbours: they share its
            weights in L2, and DRAM sends them once
    up      the rows of a block through tiles of W1 and W3 at once, then the SwiGLU, rounded to h
            (moe_up.py). Where h is to be made in blocks wider than the tile, and where d is split,
            fp32 sums are stored, and the last of a block's programs makes h of them (`act` does
            where a barrier does not order stores)
    down    the rows of h through W2, each result rounded; `sum` adds the K of a token; the last
            program, if there is one token (moe_down.py)

How weights are read, packed or not: moe_values.py. Tiles: moe_tiles.py.
"""

from __future__ import annotations

import torch

from ..launch import arch, cdiv
from .moe_down import down, sum_pairs
from .moe_route import begin, max_blocks
from .moe_tiles import down_tile, load_of, up_tile
from .moe_up import act, up
from .moe_values import as_weights


def forward(
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
    """-> y [N, d] fp32"""
    (N, d), (n, K) = x.shape, (idx.numel(), idx.shape[1])
    E, I = len(w2), w13.shape[1] // 2
    if not n * d * I:
        return x.new_zeros(N, d, dtype=torch.float32)
    w13, w2 = as_weights(w13, s13, x.dtype), as_weights(w2, s2, x.dtype)
    one_token = N == 1
    counted = not arch(x).startswith("gfx")  # there a barrier does not wait for stores
    x = x.contiguous()
    idx, weight = idx.contiguous(), weight.contiguous()
    key, rows = load_of(n, E)
    tile = up_tile(w13, d, I, key, rows, x, act_quant)
    down_cfg = down_tile(w2, I, d, tile["BM"], key, x)

    def counters(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device=x.device)

    h = x.new_empty(n, I)
    sums = y = up_counters = down_counters = None
    if tile["SPLIT"] > 1 or ((act_quant or w2.J) and tile["BN"] % 128):
        sums = x.new_empty(tile["SPLIT"], n, 2 * I, dtype=torch.float32)
        if counted:
            blocks = n if one_token else max_blocks(n, E, tile["BM"])
            up_counters = counters(blocks * cdiv(I, 128))
    if one_token and counted:
        y = x.new_empty(1, d, dtype=torch.float32)
        down_counters = counters(cdiv(d, down_cfg["BN"]))
    route, x = begin(idx, E, tile["BM"], x, act_quant, w13.J, up_counters, routed=not one_token)
    of_h = act_quant, w2.J
    up(x, w13, route, weight, K, I, limit, tile, h, sums, *of_h, up_counters, down_counters)
    if sums is not None and up_counters is None:
        act(sums, weight, h, limit, act_quant, w2.J)
    out = down(h, w2, route, n, 1, d, d, down_cfg, y=y, counters=down_counters)
    return sum_pairs(out, idx, E, torch.float32) if y is None else y
