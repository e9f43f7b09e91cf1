"""The Triton kernels of hc_post_pre: hc_post_pre_mix, then hc_pre_finish (hc_pre.py). Formulas:
ops/hc_post_pre.py.

`hc_post_pre_mix` makes x' for a block of tokens and some columns of all n streams, writes it, and
multiplies it by fn while it is still in registers. So the mix reads no stream a second time.
`hc_pre_finish` has to: y needs the mix of whole rows. It begins with the tokens that were written
last and may still be cached; up to about a thousand all are.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .hc_mix import FEW_TOKENS, VEC, add_mix, config_key, row_sums, split_work, store_mix
from .hc_post import weighted_sum
from .hc_pre import launch_finish

CONFIGS = [
    {"BT": 64, "BD": 64, "STAGES": 3, "num_warps": 8},
    {"BT": 64, "BD": 64, "STAGES": 2, "num_warps": 8},
    {"BT": 64, "BD": 32, "STAGES": 2, "num_warps": 8},
    {"BT": 32, "BD": 32, "STAGES": 2, "num_warps": 4},
]
CONFIGS_FEW = [
    {"BT": 16, "BD": 64, "STAGES": 2, "num_warps": 4},
    {"BT": 16, "BD": 32, "STAGES": 2, "num_warps": 4},
]


@jit
def hc_post_pre_mix(
    # of hc_post: y [tokens, d], x [tokens, n, d], post [tokens, n], comb [tokens, n, n]
    y,
    x,
    post,
    comb,
    # [MIX, n, d]
    fn,
    # x' [tokens, n, d]; sums of the mix [MIX + 1, tokens, splits] fp32
    out,
    partial,
    # sizes; columns of a split, and how many splits
    tokens,
    d,
    width,
    splits,
    # streams; mixing values, and a power of two >= that
    n: tl.constexpr,
    MIX: tl.constexpr,
    COLS: tl.constexpr,
    # tokens and columns of a tile; columns of a thread
    BT: tl.constexpr,
    BD: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0) % splits
    t = tl.program_id(0) // splits * BT + tl.arange(0, BT)
    row = tl.arange(0, COLS)
    token = t.to(tl.int64)[:, None]
    token_mask = (t < tokens)[:, None]
    p = ()  # post_k and comb[j, k] of the tokens, [BT, 1] each
    c = ()
    for k in tl.static_range(n):
        p += (tl.load(post + token * n + k, mask=token_mask, other=0.0).to(tl.float32),)
    for k in tl.static_range(n * n):
        c += (tl.load(comb + token * (n * n) + k, mask=token_mask, other=0.0).to(tl.float32),)
    squares = tl.zeros([BT, BD // VEC], tl.float32)
    end = tl.minimum((split + 1) * width, d)
    acc = tl.zeros([2 * COLS if x.dtype.element_ty == tl.bfloat16 else COLS, BT], tl.float32)
    for start in tl.range(split * width, end, BD, num_stages=STAGES):
        cols = (start + tl.arange(0, BD))[None, :]
        mask = token_mask & (cols < end)
        yt = tl.load(y + token * d + cols, mask=mask, other=0.0).to(tl.float32)
        xs = ()  # the n streams, [BT, BD] each
        for j in tl.static_range(n):
            x_ptrs = x + (token * n + j) * d + cols
            xs += (tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32),)
        for k in tl.static_range(n):
            # x'_k = post_k y + sum_j comb[j, k] x_j, rounded
            new = (p[k] * yt + weighted_sum(c, xs, k, n, n)).to(out.dtype.element_ty)
            tl.store(out + (token * n + k) * d + cols, new, mask=mask)
            # u [COLS, BT] += fn[:, k] x'_k^T
            f_ptrs = fn + (row[:, None] * n + k) * d + cols
            f_mask = (row < MIX)[:, None] & (cols < end)
            f = tl.load(f_ptrs, mask=f_mask, other=0.0).to(tl.float32)
            acc = add_mix(acc, f, new)
            # sum of x'_k^2
            new = new.to(tl.float32)
            squares += row_sums(new * new, VEC)
    ptrs = partial + t.to(tl.int64) * splits + split
    store_mix(ptrs, acc, squares, tokens, splits, t, MIX, COLS)


def forward(
    # of hc_post
    y: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    # of hc_pre
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    # constants
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> tuple[torch.Tensor, ...]:
    B, T, n, d = x.shape
    y, x, post, comb, fn = (t.contiguous() for t in (y, x, post, comb, fn))
    base, scale = (t.float().contiguous() for t in (base, scale))
    tokens = B * T
    mix = n * (2 + n)
    out = torch.empty_like(x)
    candidates = CONFIGS_FEW if tokens <= FEW_TOKENS else CONFIGS
    cfg = get_config("hc_post_pre_mix", config_key(x), candidates, x)
    blocks = cdiv(tokens, cfg["BT"])
    width, splits = split_work(x, blocks, d, cfg["BD"])
    partial = x.new_empty(mix + 1, tokens, splits, dtype=torch.float32)
    tensors = (y, x, post, comb, fn, out, partial)
    sizes = (tokens, d, width, splits)
    constants = {"n": n, "MIX": mix, "COLS": power_of_two(mix, 16), "VEC": VEC, **cfg}
    launch(hc_post_pre_mix, (blocks * splits,), *tensors, *sizes, **constants)
    return out, *launch_finish(out, partial, base, scale, norm_eps, hc_eps, iters)
