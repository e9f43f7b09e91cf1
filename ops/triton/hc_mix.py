"""The mix: the Triton kernel that hc_pre and its backward begin with (formula: ops/hc_pre.py).

`hc_pre_mix` multiplies a block of tokens by fn on the matrix units, and adds up squares on the
side. The columns are split so far that every processor has work: many splits in decode, few in
prefill, each with sums of its own (no atomics): partial [rows, tokens, splits] fp32. Its rows are
the MIX = n (2 + n) mixing values before the norm, the sum of squares, and, in the backward, the n
products of g_y and x_j.

bf16 streams are exact in bf16 products, so fn alone is split, into a bf16 part and a bf16
remainder: errors of 2^-18.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, processors, tl

FEW_TOKENS = 64  # up to here tiles are chosen to keep every processor busy
VEC = 8  # neighbouring columns of a tile that one thread adds up
CONFIGS_MIX = [
    {"BT": 128, "BD": 128, "STAGES": 3, "num_warps": 8},
    {"BT": 128, "BD": 64, "STAGES": 4, "num_warps": 8},
    {"BT": 64, "BD": 64, "STAGES": 3, "num_warps": 4},
    {"BT": 64, "BD": 32, "STAGES": 2, "num_warps": 4},
]
CONFIGS_MIX_FEW = [
    {"BT": 16, "BD": 256, "STAGES": 2, "num_warps": 4},
    {"BT": 16, "BD": 128, "STAGES": 3, "num_warps": 4},
    {"BT": 16, "BD": 128, "STAGES": 2, "num_warps": 4},
]
CONFIGS_MIX_BACKWARD = [
    {"BT": 128, "BD": 32, "STAGES": 3, "num_warps": 8},
    {"BT": 128, "BD": 32, "STAGES": 2, "num_warps": 8},
    {"BT": 64, "BD": 32, "STAGES": 2, "num_warps": 4},
]


@jit
def split_bf16(f):
    """fp32 -> its leading bits and the remainder, both bf16: together exact to 2^-18.

    Rounding of the bits as an integer: half the conversions.
    """
    high_bits = (f.to(tl.int32, bitcast=True) + 0x8000) & -0x10000
    high = high_bits.to(tl.float32, bitcast=True)
    return high.to(tl.bfloat16), (f - high).to(tl.bfloat16)


@jit
def add_mix(acc, f, xt):
    """acc + f [COLS, BD] times xt [BT, BD] transposed.

    With bf16 streams acc has 2 COLS rows: the products of the leading bits of f, then those of its
    remainders.
    """
    if xt.dtype == tl.bfloat16:
        high, low = split_bf16(f)
        both = tl.permute(tl.join(high, low), (2, 0, 1))
        f = tl.reshape(both, [2 * f.shape[0], f.shape[1]])
        return tl.dot(f, tl.trans(xt), acc)
    else:
        return tl.dot(f, tl.trans(xt.to(tl.float32)), acc, input_precision="ieee")


@jit
def row_sums(tile, VEC: tl.constexpr):
    """[BT, BD] -> [BT, BD / VEC]: adds up the columns that lie in one thread."""
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1] // VEC, VEC]), 2)


@jit
def store_mix(
    # of this split and of each token of the block, in partial [.., tokens, splits]: pointers [BT]
    ptrs,
    # mixing values [COLS or 2 COLS, BT] and squares [BT, BD / VEC]
    acc,
    squares,
    tokens,
    splits,
    # tokens of the block
    t,
    MIX: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.arange(0, COLS)[:, None]
    if acc.shape[0] > COLS:  # leading bits plus remainders
        acc = tl.sum(tl.reshape(acc, [2, COLS, acc.shape[1]]), 0)
    tl.store(ptrs[None, :] + row * tokens * splits, acc, mask=(row < MIX) & (t < tokens)[None, :])
    tl.store(ptrs + MIX * tokens * splits, tl.sum(squares, 1), mask=t < tokens)


@jit
def hc_pre_mix(
    # streams [tokens, n, d], fn [MIX, n, d], gradient of y [tokens, d] or None
    x,
    fn,
    g,
    # [MIX + 1 (+ n), tokens, splits] fp32
    partial,
    # sizes; columns of a split, and how many splits
    tokens,
    d,
    width,
    splits,
    # streams (1 without g: x is then one row of n d columns)
    n: tl.constexpr,
    # mixing values, and a power of two >= that
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
    squares = tl.zeros([BT, BD // VEC], tl.float32)
    acc = tl.zeros([2 * COLS if x.dtype.element_ty == tl.bfloat16 else COLS, BT], tl.float32)
    dots = ()  # of g_y and each stream
    for j in tl.static_range(n):
        dots += (tl.zeros([BT, BD // VEC], tl.float32),)
    end = tl.minimum((split + 1) * width, d)
    # num_stages of this loop: so that the loads that feed no matrix product are pipelined too.
    for start in tl.range(split * width, end, BD, num_stages=STAGES):
        cols = (start + tl.arange(0, BD))[None, :]
        new_dots = ()
        mask = (t < tokens)[:, None] & (cols < end)
        if g is not None:
            gt = tl.load(g + token * d + cols, mask=mask, other=0.0).to(tl.float32)
        for j in tl.static_range(n):
            # u [COLS, BT] += fn[:, j] x_j^T
            xt = tl.load(x + (token * n + j) * d + cols, mask=mask, other=0.0)
            f_ptrs = fn + (row[:, None] * n + j) * d + cols
            f_mask = (row < MIX)[:, None] & (cols < end)
            f = tl.load(f_ptrs, mask=f_mask, other=0.0).to(tl.float32)
            acc = add_mix(acc, f, xt)
            # sum of x_j^2, and of x_j g_y
            xt = xt.to(tl.float32)
            squares += row_sums(xt * xt, VEC)
            if g is not None:
                new_dots += (dots[j] + row_sums(xt * gt, VEC),)
        if g is not None:
            dots = new_dots
    ptrs = partial + t.to(tl.int64) * splits + split
    store_mix(ptrs, acc, squares, tokens, splits, t, MIX, COLS)
    if g is not None:
        for j in tl.static_range(n):
            dot_ptrs = ptrs + (MIX + 1 + j) * tokens * splits
            tl.store(dot_ptrs, tl.sum(dots[j], 1), mask=t < tokens)


@jit
def load_mix(
    partial,
    t,
    tokens,
    splits,
    # rows of partial, and a power of two >= that; splits that are loaded at once
    rows: tl.constexpr,
    COLS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The sums over all splits for tokens t: [BT, COLS], 0 from column `rows` on."""
    k = tl.arange(0, COLS)[:, None, None]
    s = tl.arange(0, SPLITS)[None, None, :]
    ptrs = partial + (k * tokens + t[None, :, None]).to(tl.int64) * splits
    mask = (k < rows) & (t < tokens)[None, :, None]
    total = tl.zeros([COLS, t.shape[0]], tl.float32)
    for start in range(0, splits, SPLITS):
        tile = tl.load(ptrs + start + s, mask=mask & (start + s < splits), other=0.0)
        total += tl.sum(tile, 2)
    return tl.trans(total)


def config_key(x: torch.Tensor) -> str:
    """The shapes and dtypes of the streams [B, T, n, d] that matter to the choice of tiles."""
    B, T, n, d = x.shape
    return f"n{n} d{d} {x.dtype} {'few' if B * T <= FEW_TOKENS else 'many'}"


def split_work(x: torch.Tensor, blocks: int, size: int, tile: int) -> tuple[int, int]:
    """-> size of a split, and how many: two programs per processor, or as many as blocks."""
    steps = cdiv(size, tile)
    wanted = max(1, 2 * processors(x) // max(blocks, 1))
    steps_of_split = cdiv(steps, min(steps, 128, wanted))
    return steps_of_split * tile, cdiv(steps, steps_of_split)


def launch_mix(x: torch.Tensor, fn: torch.Tensor, g_y: torch.Tensor | None) -> torch.Tensor:
    """-> sums of the mix, of squares, and with g_y of g_y x_j: [MIX + 1 (+ n), B T, splits]."""
    B, T, n, d = x.shape
    tokens = B * T
    mix = n * (2 + n)
    if g_y is not None:
        rows = mix + 1 + n
        key = config_key(x) + " grad"
        cfg = get_config("hc_pre_mix", key, CONFIGS_MIX_BACKWARD, x)
    else:
        rows = mix + 1
        candidates = CONFIGS_MIX_FEW if tokens <= FEW_TOKENS else CONFIGS_MIX
        cfg = get_config("hc_pre_mix", config_key(x), candidates, x)
        n, d = 1, n * d  # the mix alone sees one long row
    blocks = cdiv(tokens, cfg["BT"])
    width, splits = split_work(x, blocks, d, cfg["BD"])
    partial = x.new_empty(rows, tokens, splits, dtype=torch.float32)
    tensors = (x, fn, g_y, partial)
    sizes = (tokens, d, width, splits)
    constants = {"n": n, "MIX": mix, "COLS": power_of_two(mix, 16), "VEC": VEC, **cfg}
    launch(hc_pre_mix, (blocks * splits,), *tensors, *sizes, **constants)
    return partial
