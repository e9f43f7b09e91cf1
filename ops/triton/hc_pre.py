"""The Triton kernels of hc_pre, forward (formula: ops/hc_pre.py).

After hc_pre_mix (hc_mix.py), `hc_pre_finish` adds up the splits of the mix. Some of its programs do
Sinkhorn, a matrix a thread; the others compute some columns of y of one token each, the tokens in
reverse: those read last are still in the cache. Results do not vary from run to run.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .columns import pack_columns, unpack_columns
from .hc_mix import config_key, launch_mix, load_mix
from .sinkhorn import doubly_stochastic

CONFIGS_FINISH = [{"BT": 64, "BD": 2048, "num_warps": 8}, {"BT": 64, "BD": 1024, "num_warps": 4}]


@jit
def write_coefficients(
    # sums of the mix [BT, COLS]
    m,
    base,
    scale,
    # outputs [tokens, n] and [tokens, n, n]
    post,
    comb,
    # tokens of the block
    t,
    tokens,
    d,
    norm_eps,
    hc_eps,
    iters,
    n: tl.constexpr,
    MIX: tl.constexpr,
    COLS: tl.constexpr,
):
    """post and comb of tokens t."""
    u = unpack_columns(m, COLS)
    token = t.to(tl.int64)[:, None]
    k = tl.arange(0, COLS)[None, :]
    # The mixing values are u r with r = rsqrt(mean(v^2) + norm_eps); u[MIX] is the sum of squares.
    r = tl.rsqrt(u[MIX] / (n * d) + norm_eps)
    p = ()  # post_j = 2 sigmoid(u_j r scale1 + base_j)
    for j in tl.static_range(n, 2 * n):
        p += (2 * tl.sigmoid(u[j] * r * tl.load(scale + 1) + tl.load(base + j)),)
    c = ()  # logits of comb: u_j r scale2 + base_j
    for j in tl.static_range(2 * n, MIX):
        c += (u[j] * r * tl.load(scale + 2) + tl.load(base + j),)
    mask = (t < tokens)[:, None]
    tl.store(post + token * n + k, pack_columns(p, n, COLS), mask=mask & (k < n))
    c = doubly_stochastic(c, hc_eps, iters, n)
    tl.store(comb + token * (n * n) + k, pack_columns(c, n * n, COLS), mask=mask & (k < n * n))


@jit
def write_y(
    x,
    # sums of the mix of this token: pointers to all splits of its first row, and a mask
    ptrs,
    split_mask,
    base,
    scale,
    y,
    # one token, some columns of it
    token,
    cols,
    # tokens, columns, splits
    tokens,
    d,
    splits,
    norm_eps,
    hc_eps,
    n: tl.constexpr,
    MIX: tl.constexpr,
):
    """Some columns of y of one token: y = sum_j pre_j x_j."""
    out = tl.zeros(cols.shape, tl.float32)
    xs = ()
    for j in tl.static_range(n):
        xs += (tl.load(x + (token * n + j) * d + cols, mask=cols < d, other=0.0).to(tl.float32),)
    square = tl.sum(tl.load(ptrs + MIX * tokens * splits, mask=split_mask, other=0.0), 0)
    r = tl.rsqrt(square / (n * d) + norm_eps)
    for j in tl.static_range(n):
        # pre_j = sigmoid(u_j r scale0 + base_j) + hc_eps
        u = tl.sum(tl.load(ptrs + j * tokens * splits, mask=split_mask, other=0.0), 0)
        out += (tl.sigmoid(u * r * tl.load(scale) + tl.load(base + j)) + hc_eps) * xs[j]
    tl.store(y + token * d + cols, out.to(y.dtype.element_ty), mask=cols < d)


@jit
def hc_pre_finish(
    # inputs
    x,
    partial,
    base,
    scale,
    # outputs
    y,
    post,
    comb,
    # sizes and constants of the op
    tokens,
    d,
    splits,
    norm_eps,
    hc_eps,
    iters,
    # streams; mixing values, and a power of two >= the rows of partial
    n: tl.constexpr,
    MIX: tl.constexpr,
    COLS: tl.constexpr,
    # splits that are loaded at once for post and comb; a power of two >= splits, all at once for y
    SPLITS: tl.constexpr,
    ALL_SPLITS: tl.constexpr,
    # tokens of a program that makes post and comb, columns of one that makes y
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    i = tl.program_id(0) - tl.cdiv(tokens, BT)
    blocks = tl.cdiv(d, BD)
    if i < 0:
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        m = load_mix(partial, t, tokens, splits, MIX + 1, COLS, SPLITS)
        write_coefficients(
            m, base, scale, post, comb, t, tokens, d, norm_eps, hc_eps, iters, n, MIX, COLS
        )
    else:
        # The tokens in reverse.
        token = (tokens - 1 - i // blocks).to(tl.int64)
        cols = i % blocks * BD + tl.arange(0, BD)
        s = tl.arange(0, ALL_SPLITS)
        ptrs = partial + token * splits + s
        mask = s < splits
        write_y(
            x, ptrs, mask, base, scale, y, token, cols, tokens, d, splits, norm_eps, hc_eps, n, MIX
        )


def padded_rows(n: int) -> int:
    """A power of two >= the rows of partial: mixing values, squares and n products."""
    return power_of_two(n * (2 + n) + 1 + n, 16)


def launch_finish(
    x: torch.Tensor,
    partial: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y, post and comb, from the sums of the mix."""
    B, T, n, d = x.shape
    tokens = B * T
    splits = partial.shape[2]
    y = x.new_empty(B, T, d)
    post = x.new_empty(B, T, n, dtype=torch.float32)
    comb = x.new_empty(B, T, n, n, dtype=torch.float32)
    cfg = get_config("hc_pre_finish", config_key(x), CONFIGS_FINISH, x)
    cols = padded_rows(n)
    BT = min(cfg["BT"], power_of_two(tokens))
    constants = {
        "n": n,
        "MIX": n * (2 + n),
        "COLS": cols,
        "SPLITS": min(power_of_two(splits), max(1, 2048 // (cols * BT))),
        "ALL_SPLITS": power_of_two(splits),
        **cfg,
        "BT": BT,
    }
    grid = (cdiv(tokens, BT) + tokens * cdiv(d, cfg["BD"]),)
    tensors = (x, partial, base, scale, y, post, comb)
    sizes = (tokens, d, splits)
    launch(hc_pre_finish, grid, *tensors, *sizes, norm_eps, hc_eps, iters, **constants)
    return y, post, comb


def forward(
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, fn, base, scale = (t.contiguous() for t in (x, fn, base.float(), scale.float()))
    partial = launch_mix(x, fn, None)
    return launch_finish(x, partial, base, scale, norm_eps, hc_eps, iters)
