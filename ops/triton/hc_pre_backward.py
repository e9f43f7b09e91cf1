"""The Triton kernels of hc_pre, backward (formula: ops/hc_pre.py). Four launches:

    hc_pre_mix                  the mix again (hc_mix.py), with the products of g_y and x_j
    hc_pre_backward_tokens      for each token everything that is not d long, with Sinkhorn in
                                registers
    hc_pre_backward_streams     g_x and g_fn in one pass over the streams: a program owns some
                                columns of all n streams for a range of tokens; fn stays in
                                registers and g_fn accumulates there
    hc_pre_backward_reduce      the sums over the ranges of tokens

Results do not vary from run to run.
"""

from __future__ import annotations

import math

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .columns import pack_columns, unpack_columns
from .hc_mix import config_key, launch_mix, load_mix, split_bf16, split_work
from .hc_pre import padded_rows
from .sinkhorn import doubly_stochastic_backward

CONFIGS_TOKENS = [  # a token a thread: a warp has 64 or 32
    {"BT": 64, "num_warps": 1},
    {"BT": 32, "num_warps": 1},
]
CONFIGS_STREAMS = [
    {"BT": 64, "BD": 64, "J": 2, "STAGES": 3, "num_warps": 4},
    {"BT": 64, "BD": 64, "J": 2, "STAGES": 2, "num_warps": 4},
    {"BT": 64, "BD": 64, "J": 1, "STAGES": 2, "num_warps": 4},
    {"BT": 32, "BD": 32, "J": 1, "STAGES": 1, "num_warps": 4},
]


@jit
def hc_pre_backward_tokens(
    # sums of the mix [MIX + 1 + n, tokens, splits]; parameters; gradients [tokens, n] and [tokens,
    # n, n]
    partial,
    base,
    scale,
    g_post,
    g_comb,
    # room for the divisors of Sinkhorn, [2 iters - 1, n, tokens]
    saved,
    # gradient of the mixing values before the norm, [tokens, COLS]
    g_u,
    # factors of g_y in g_x, [tokens, n], and of -x
    factors,
    # sums over the tokens of a program, [programs, 2, COLS]: gradients of the logits, and those
    # times m
    sums,
    # sizes and constants of the op
    tokens,
    d,
    splits,
    norm_eps,
    hc_eps,
    iters,
    # streams; mixing values, and a power of two >= the rows of partial; a power of two >= n
    n: tl.constexpr,
    MIX: tl.constexpr,
    COLS: tl.constexpr,
    DIVISORS: tl.constexpr,
    # splits that are loaded at once; tokens of a program
    SPLITS: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, COLS)[None, :]
    token = t.to(tl.int64)[:, None]
    mask = (t < tokens)[:, None]

    # m = u r with r = rsqrt(mean(v^2) + norm_eps), and the logits m scale + base: [BT, COLS].
    m = load_mix(partial, t, tokens, splits, MIX + 1 + n, COLS, SPLITS)
    mix_sums = unpack_columns(m, COLS)
    r = tl.rsqrt(mix_sums[MIX] / (n * d) + norm_eps)
    m *= r[:, None]
    scale_of_row = tl.load(scale + tl.where(k < n, 0, tl.where(k < 2 * n, 1, 2)))
    logits = m * scale_of_row + tl.load(base + k, mask=k < MIX, other=0.0)

    # Gradients by pre (the products of g_y and x_j), 2 sigmoid of post's logits, and comb's logits.
    g_p = tl.load(g_post + token * n + k, mask=mask & (k < n), other=0.0)
    g_p = unpack_columns(g_p, COLS)
    g_c = tl.load(g_comb + token * (n * n) + k, mask=mask & (k < n * n), other=0.0)
    g_c = unpack_columns(g_c, COLS)
    c = unpack_columns(logits, COLS)[2 * n : MIX]
    g_c = doubly_stochastic_backward(g_c, c, hc_eps, iters, saved, tokens, t, n, DIVISORS)
    g = ()
    for j in tl.static_range(n):
        g += (mix_sums[MIX + 1 + j],)
    for j in tl.static_range(n):
        g += (2 * g_p[j],)
    for j in tl.static_range(n * n):
        g += (g_c[j],)

    # Of all logits: sigmoid' = sigmoid (1 - sigmoid) for pre and post.
    sigmoid = tl.sigmoid(logits)
    g = pack_columns(g, MIX, COLS) * tl.where(k < 2 * n, sigmoid * (1 - sigmoid), 1.0)
    g = tl.where(mask & (k < MIX), g, 0.0)

    # g_base = sum over tokens of g;  g_scale = sum over tokens and rows of g m
    sums += tl.program_id(0) * (2 * COLS) + tl.arange(0, COLS)
    tl.store(sums, tl.sum(g, 0))
    tl.store(sums + COLS, tl.sum(g * m, 0))

    # g_m = g scale;  g_u = g_m r;  g_v = fn^T g_u - (sum g_m m) r^2 / (n d) v
    g *= scale_of_row
    product = tl.sum(g * m, 1)[:, None]
    tl.store(g_u + token * COLS + k, g * r[:, None], mask=mask)
    factors += token * (n + 1) + k
    factor = tl.where(k < n, sigmoid + hc_eps, product * (r * r)[:, None] / (n * d))
    tl.store(factors, factor, mask=mask & (k <= n))


@jit
def hc_pre_backward_streams(
    # streams [tokens, n, d]; fn [MIX, n, d]; gradient of y [tokens, d]; one of x from elsewhere, or
    # None
    x,
    fn,
    g_y,
    g_in,
    # of hc_pre_backward_tokens: [tokens, COLS], [tokens, n + 1]
    g_u,
    factors,
    # gradient of x; of fn by each range of tokens, [ranges, MIX, n, d]
    g_x,
    g_fn_parts,
    # tokens, and how many a range has
    tokens,
    width,
    # streams, columns; mixing values, and a power of two >= the rows of partial
    n: tl.constexpr,
    d: tl.constexpr,
    MIX: tl.constexpr,
    COLS: tl.constexpr,
    # tokens, columns and streams of a tile
    BT: tl.constexpr,
    BD: tl.constexpr,
    J: tl.constexpr,
    STAGES: tl.constexpr,
):
    k = tl.arange(0, COLS)
    i = tl.arange(0, BT)
    stream = tl.program_id(0) % (n // J) * J  # J streams from here on
    block = tl.program_id(0) // (n // J)
    blocks = tl.cdiv(d, BD)
    split = block // blocks
    cols = block % blocks * BD + tl.arange(0, BD)

    # fn [COLS, BD] of each stream, and its gradient, transposed.
    fn_offsets = k[:, None] * (n * d) + stream * d + cols[None, :]
    fn_mask = (k < MIX)[:, None] & (cols < d)[None, :]
    fs = ()
    accs = ()
    first = (split * width).to(tl.int64)
    for j in tl.static_range(J):
        fs += (tl.load(fn + fn_offsets + j * d, mask=fn_mask, other=0.0).to(tl.float32),)
        accs += (tl.zeros([BD, COLS], tl.float32),)

    # All pointers move along the range of tokens.
    skip = first * (n * d) + stream * d
    step = BT * (n * d)
    x += skip
    g_x += skip
    g_y += first * d
    g_u += first * COLS
    factors += first * (n + 1)
    if g_in is not None:
        g_in += skip
    remaining = tl.minimum(width, tokens - split * width)
    for left in tl.range(remaining, 0, -BT, num_stages=STAGES):
        token_mask = (i < left)[:, None]
        new_accs = ()
        offsets = i[:, None] * (n * d) + cols[None, :]
        mask = token_mask & (cols < d)[None, :]
        ut = tl.load(g_u + i[:, None] * COLS + k[None, :], mask=token_mask, other=0.0)
        c = tl.load(factors + i[:, None] * (n + 1) + n, mask=token_mask, other=0.0)
        gt = tl.load(g_y + i[:, None] * d + cols[None, :], mask=mask, other=0.0)
        for j in tl.static_range(J):
            # g_x_j [BT, BD] = pre_j g_y + g_u fn_j - c x_j (+ g_in);  g_fn_j^T [BD, COLS] += x_j^T
            # g_u
            xt = tl.load(x + offsets + j * d, mask=mask, other=0.0)
            pre_ptrs = factors + i[:, None] * (n + 1) + stream + j
            pre = tl.load(pre_ptrs, mask=token_mask, other=0.0)
            if xt.dtype == tl.bfloat16:
                # g_u fn_j by three products of bf16 parts. The other terms are added one by one
                # between them: each is brought into the layout of the products as bf16.
                high, low = split_bf16(ut)
                f_high, f_low = split_bf16(fs[j])
                out = tl.dot(high, f_high, -c * xt.to(tl.float32))
                out = tl.dot(low, f_high, out + pre * gt.to(tl.float32))
                if g_in is not None:
                    out += tl.load(g_in + offsets + j * d, mask=mask, other=0.0).to(tl.float32)
                out = tl.dot(high, f_low, out)
                acc = tl.dot(tl.trans(xt), high, accs[j])
                new_accs += (tl.dot(tl.trans(xt), low, acc),)
            else:
                xt = xt.to(tl.float32)
                out = tl.dot(ut, fs[j], pre * gt.to(tl.float32) - c * xt, input_precision="ieee")
                if g_in is not None:
                    out += tl.load(g_in + offsets + j * d, mask=mask, other=0.0).to(tl.float32)
                new_accs += (tl.dot(tl.trans(xt), ut, accs[j], input_precision="ieee"),)
            tl.store(g_x + offsets + j * d, out.to(g_x.dtype.element_ty), mask=mask)
        accs = new_accs
        x += step
        g_x += step
        g_y += BT * d
        g_u += BT * COLS
        factors += BT * (n + 1)
        if g_in is not None:
            g_in += step
    for j in tl.static_range(J):
        part_ptrs = g_fn_parts + split * (MIX * n * d) + fn_offsets + j * d
        tl.store(part_ptrs, tl.trans(accs[j]), mask=fn_mask)


@jit
def hc_pre_backward_reduce(
    # [splits, size] and [programs, 2, COLS], see the kernels above
    g_fn_parts,
    sums,
    # gradients of the parameters
    g_fn,
    g_base,
    g_scale,
    # elements of fn, how many parts they have, and how many rows sums has
    size,
    splits,
    programs,
    # streams; mixing values, and a power of two >= the rows of partial
    n: tl.constexpr,
    MIX: tl.constexpr,
    COLS: tl.constexpr,
    # rows of sums that are loaded at once; elements of fn
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.program_id(0) < tl.cdiv(size, BLOCK):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for s in range(splits):
            total += tl.load(g_fn_parts + s * size + i, mask=i < size, other=0.0)
        tl.store(g_fn + i, total.to(g_fn.dtype.element_ty), mask=i < size)
    else:  # the last program
        k = tl.arange(0, COLS)
        g = tl.zeros([ROWS, COLS], tl.float32)
        g_times_m = tl.zeros([ROWS, COLS], tl.float32)
        for start in range(0, programs, ROWS):
            p = start + tl.arange(0, ROWS)[:, None]
            ptrs = sums + p * (2 * COLS) + k[None, :]
            g += tl.load(ptrs, mask=p < programs, other=0.0)
            ptrs = sums + p * (2 * COLS) + COLS + k[None, :]
            g_times_m += tl.load(ptrs, mask=p < programs, other=0.0)
        tl.store(g_base + k, tl.sum(g, 0).to(g_base.dtype.element_ty), mask=k < MIX)
        g_times_m = tl.sum(g_times_m, 0)
        for part in tl.static_range(3):  # pre, post, comb
            mask = (k >= part * n) & (k < (MIX if part == 2 else part * n + n))
            g_scale_part = tl.sum(tl.where(mask, g_times_m, 0.0), 0)
            tl.store(g_scale + part, g_scale_part.to(g_scale.dtype.element_ty))


def launch_tokens(partial, base, scale, g_post, g_comb, d, constants):
    """-> g_u, factors and sums: see hc_pre_backward_tokens. constants: norm_eps, hc_eps, iters."""
    norm_eps, hc_eps, iters = constants
    tokens, splits = partial.shape[1:]
    n = g_post.shape[-1]
    cols = padded_rows(n)
    cfg = get_config("hc_pre_backward_tokens", f"n{n}", CONFIGS_TOKENS, partial)
    programs = cdiv(tokens, cfg["BT"])
    g_u = partial.new_empty(tokens, cols)
    factors = partial.new_empty(tokens, n + 1)
    saved = partial.new_empty(2 * iters - 1, n, tokens)
    sums = partial.new_empty(programs, 2, cols)
    tensors = (partial, base, scale, g_post, g_comb, saved, g_u, factors, sums)
    sizes = (tokens, d, splits)
    meta = {
        "n": n,
        "MIX": n * (2 + n),
        "COLS": cols,
        "DIVISORS": power_of_two(n),
        "SPLITS": min(power_of_two(splits), 2),
        **cfg,
    }
    grid = (programs,)
    launch(hc_pre_backward_tokens, grid, *tensors, *sizes, norm_eps, hc_eps, iters, **meta)
    return g_u, factors, sums


def launch_streams(x, fn, g_y, g_in, g_u, factors, g_x):
    """Writes g_x; -> the parts of g_fn [ranges of tokens, MIX, n d]."""
    B, T, n, d = x.shape
    tokens = B * T
    key = config_key(x) + " in" * (g_in is not None)
    cfg = get_config("hc_pre_backward_streams", key, CONFIGS_STREAMS, x)
    cfg = {**cfg, "J": math.gcd(cfg["J"], n)}
    blocks = cdiv(d, cfg["BD"]) * n // cfg["J"]
    width, splits = split_work(x, blocks, max(tokens, 1), cfg["BT"])
    parts = g_u.new_empty(splits, *fn.shape)
    g_in = None if g_in is None else g_in.contiguous()
    tensors = (x, fn, g_y, g_in, g_u, factors, g_x, parts)
    constants = {"n": n, "d": d, "MIX": n * (2 + n), "COLS": g_u.shape[1], **cfg}
    launch(hc_pre_backward_streams, (blocks * splits,), *tensors, tokens, width, **constants)
    return parts


def backward(
    # gradients of the outputs
    g_y: torch.Tensor,
    g_post: torch.Tensor,
    g_comb: torch.Tensor,
    # the inputs of the forward
    x: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    # constants
    norm_eps: float,
    hc_eps: float,
    iters: int,
    g_in: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, fn, base and scale; g_in is a gradient of x from elsewhere, to be added."""
    n, d = x.shape[2:]
    g_y, x, fn = (t.contiguous() for t in (g_y, x, fn))
    grads = [t.new_empty(t.shape) for t in (x, fn, base, scale)]
    g_x, g_fn, g_base, g_scale = grads
    g_post, g_comb, base, scale = (t.float().contiguous() for t in (g_post, g_comb, base, scale))

    partial = launch_mix(x, fn, g_y)
    constants = (norm_eps, hc_eps, iters)
    g_u, factors, sums = launch_tokens(partial, base, scale, g_post, g_comb, d, constants)
    parts = launch_streams(x, fn, g_y, g_in, g_u, factors, g_x)
    tensors = (parts, sums, g_fn, g_base, g_scale)
    sizes = (fn.numel(), len(parts), len(sums))
    tile = {"n": n, "MIX": len(fn), "COLS": g_u.shape[1], "ROWS": 64, "BLOCK": 1024, "num_warps": 4}
    launch(hc_pre_backward_reduce, (cdiv(fn.numel(), 1024) + 1,), *tensors, *sizes, **tile)
    return tuple(grads)
