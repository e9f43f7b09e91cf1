"""The Triton kernels of quant_linear (see ops/quant_linear.py)."""

from __future__ import annotations

import torch

from ..launch import arch, cdiv, get_config, jit, launch, power_of_two, processors, tl
from .act_quant import flattened, inverse, quantize, quantized
from .act_quant import forward as act_quant_forward
from .formats import decode_e4m3, decode_scale, scale_e4m3

FEW, SOME = 16, 128


FP8 = {
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_120",
    "sm_121",
    "gfx950",
    "cpu",
}  # with e4m3 matrix instructions


DECODE = [
    dict(BN=64, S=4, num_warps=4, num_stages=3),
    dict(BN=32, S=8, num_warps=8, num_stages=3),
    dict(BN=32, S=4, num_warps=4, num_stages=3),
    dict(BN=32, S=4, num_warps=4, num_stages=2),
    dict(BN=16, S=8, num_warps=8, num_stages=3),
    dict(BN=16, S=4, num_warps=4, num_stages=2),
]


PRODUCT = [
    dict(BM=128, BN=128, num_warps=8, num_stages=3),
    dict(BM=64, BN=128, num_warps=4, num_stages=4),
    dict(BM=128, BN=64, num_warps=4, num_stages=3),
    dict(BM=64, BN=32, num_warps=4, num_stages=4),
    dict(BM=64, BN=32, num_warps=4, num_stages=2),
]


@jit
def decoded(w, TYPE: tl.constexpr):
    """e4m3 weights, or their bits, as TYPE. Bits as fp16 give 2^-8 of them, which is cheap: `unit` undoes it."""
    if w.dtype == tl.uint8:
        if TYPE == tl.float16:
            return ((w.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385).to(
                tl.float16, bitcast=True
            )
        else:
            return decode_e4m3(w).to(TYPE)
    elif TYPE == tl.bfloat16:
        return w.to(tl.float16).to(tl.float32).to(TYPE)  # cheaper than the direct way
    else:
        return w.to(TYPE)


@jit
def unit(w, TYPE: tl.constexpr):
    """What a product with `decoded` weights is to be multiplied by."""
    return 256.0 if w.dtype == tl.uint8 and TYPE == tl.float16 else 1.0


@jit
def output_tile(tile, og, tiles_per_group, BN: tl.constexpr):
    """-> its group, its first channel, and a mask. Tiles keep to multiples of BN, so that each has one row of scales."""
    group = tile // tiles_per_group
    first = (group * og // BN + tile % tiles_per_group) * BN
    n = first + tl.arange(0, BN)
    return group, first, (n >= group * og) & (n < group * og + og)


@jit
def quant_linear_decode_kernel(
    x,
    w,
    scale,
    y,
    rows,
    i,
    og,
    tiles_per_group,
    x_row,
    x_group,
    y_row,
    span,
    QUANT: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    S: tl.constexpr,
):
    TYPE: tl.constexpr = (
        tl.float16 if QUANT or x.dtype.element_ty == tl.float16 else tl.bfloat16
    )  # exact for e4m3 values
    COLS: tl.constexpr = max(ROWS, 16)  # what a matrix instruction takes: fewer rows are repeated
    group, first, mine = output_tile(tl.program_id(0), og, tiles_per_group, BN)
    m, s, k = tl.arange(0, ROWS), tl.arange(0, S), tl.arange(0, 128)
    blocks = tl.cdiv(i, 128)
    x += group * x_group + m[None, :, None] * x_row + k[None, None, :]
    w += first.to(tl.int64) * i + tl.arange(0, BN)[None, :, None] * i + k[None, None, :]
    scale += (
        tl.minimum(first, group * og + og - 1) // 128 * blocks
    )  # a group's last tile may be empty
    acc = tl.zeros((S, BN, COLS), tl.float32)  # S batches: one per warp
    start = tl.program_id(1) * span
    for b in range(start, min(start + span, blocks), S):
        at = ((b + s) * 128)[:, None, None]
        inside = at + k[None, None, :] < i
        v = tl.load(x + at, mask=(m < rows)[None, :, None] & inside, other=0.0)  # [S, ROWS, 128]
        q = tl.load(w + at, mask=mine[None, :, None] & inside, other=0.0)  # [S, BN, 128]
        f = decode_scale(tl.load(scale + b + s, mask=b + s < blocks, other=0.0))[:, None] * unit(
            q, TYPE
        )
        if QUANT:
            v = v.to(tl.float32)
            if q.dtype == tl.uint8:
                v, sx = quantized(v, False)
            else:  # the conversion rounds as `quantized` does
                sx = scale_e4m3(tl.max(tl.abs(v), 2))
                v = (v * inverse(sx)[:, :, None]).to(tl.float8e4nv)
            f = f * sx
        v, f = v.to(TYPE), tl.broadcast_to(f, (S, ROWS))
        if ROWS < COLS:
            v = tl.broadcast_to(v[:, None], (S, COLS // ROWS, ROWS, 128)).reshape(S, COLS, 128)
            f = tl.broadcast_to(f[:, None], (S, COLS // ROWS, ROWS)).reshape(S, COLS)
        acc += tl.dot(decoded(q, TYPE), tl.trans(v, (0, 2, 1))) * f[:, None, :]
    c = tl.arange(0, COLS)
    y += (
        tl.program_id(1).to(tl.int64) * rows * y_row
        + c[None, :] * y_row
        + first
        + tl.arange(0, BN)[:, None]
    )
    tl.store(
        y,
        tl.sum(acc, 0).to(y.dtype.element_ty),
        mask=mine[:, None] & (c < min(rows, ROWS))[None, :],
    )


@jit
def quant_linear_merge_kernel(parts, y, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(parts + s * n + j, mask=j < n, other=0.0)
    tl.store(y + j, total.to(y.dtype.element_ty), mask=j < n)


@jit
def quant_linear_product_kernel(
    x,
    sx,
    w,
    scale,
    y,
    rows,
    i,
    og,
    groups,
    tiles_per_group,
    x_row,
    x_group,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    wide, high = (
        tl.num_programs(0),
        tl.num_programs(1),
    )  # in tiles; neighbours in time are 8 high, to share rows and weights
    pid = tl.program_id(1) * wide + tl.program_id(0)
    above = pid // (8 * wide) * 8
    rest, beside = pid - above * wide, min(high - above, 8)
    group, first, mine = output_tile(rest // beside, og, tiles_per_group, BN)
    m, k = (above + rest % beside) * BM + tl.arange(0, BM), tl.arange(0, 128)
    blocks = tl.cdiv(i, 128)
    x += group * x_group + m.to(tl.int64)[:, None] * x_row + k[None, :]
    w += first.to(tl.int64) * i + tl.arange(0, BN)[:, None] * i + k[None, :]
    scale += (
        tl.minimum(first, group * og + og - 1) // 128 * blocks
    )  # a group's last tile may be empty
    acc = tl.zeros((BM, BN), tl.float32)
    for b in range(blocks):
        inside = (b * 128 + k < i)[None, :]
        v = tl.load(
            x + b * 128, mask=(m < rows)[:, None] & inside, other=0.0
        )  # [BM, 128] e4m3, or the dtype of y
        q = tl.load(w + b * 128, mask=mine[:, None] & inside, other=0.0)  # [BN, 128]
        f = decode_scale(tl.load(scale + b))
        if sx is None:
            acc += tl.dot(v, tl.trans(decoded(q, v.dtype))) * (f * unit(q, v.dtype))
        else:
            f *= tl.load(sx + (b * rows + m) * groups + group, mask=m < rows, other=0.0)
            acc += tl.dot(v, tl.trans(q)) * f[:, None]
    y += m.to(tl.int64)[:, None] * groups * og + first + tl.arange(0, BN)[None, :]
    tl.store(y, acc.to(y.dtype.element_ty), mask=(m < rows)[:, None] & mine[None, :])


@jit
def quant_linear_decoded_kernel(w, scale, y, o, i, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, col = (
        tl.program_id(0) * ROWS + tl.arange(0, ROWS),
        tl.program_id(1) * BLOCK + tl.arange(0, BLOCK),
    )
    at, inside = (
        row.to(tl.int64)[:, None] * i + col[None, :],
        (row < o)[:, None] & (col < i)[None, :],
    )
    f = decode_scale(
        tl.load(
            scale + tl.program_id(0) * ROWS // 128 * tl.cdiv(i, 128) + col // 128,
            mask=col < i,
            other=0.0,
        )
    )
    v = decode_e4m3(tl.load(w + at, mask=inside, other=0)) * f[None, :]
    tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


def _stored(weight, x):
    """The weights as kernels take them: bits, where there are no instructions for their type."""
    return (weight if arch(x) in FP8 else weight.view(torch.uint8)).contiguous()


def _decoded(weight, scale, x):
    """The weights [o, i] in the dtype of x, as dequantize_fp8."""
    (o, i), y = weight.shape, x.new_empty(weight.shape)
    bits = weight.view(torch.uint8).contiguous()
    launch(
        quant_linear_decoded_kernel,
        (cdiv(o, 16), cdiv(i, 256)),
        bits,
        scale.contiguous(),
        y,
        o,
        i,
        ROWS=16,
        BLOCK=256,
        num_warps=4,
    )
    return y


def _matmul(x, w, y):
    """y [M, g, n] = x [M, g, k] times w [g, k, n]; out= also keeps autocast away."""
    if len(w) == 1:
        torch.mm(x[:, 0], w[0], out=y[:, 0])
    else:
        torch.bmm(x.transpose(0, 1), w, out=y.transpose(0, 1))


def _tiles_per_group(o, groups, BN):
    return (
        cdiv(o, BN) if groups == 1 else o // groups // BN + (2 if o // groups % BN else 0)
    )  # its ends may lie within tiles


def _key(rows, weight, groups, act_quant):
    return f"~{rows} rows {weight.shape[0]}x{weight.shape[1]} g{groups}{' quant' * act_quant}"


def _few(x, weight, scale, y, M, groups, act_quant):
    (o, i), rows = weight.shape, power_of_two(M)
    cfg = get_config(
        "quant_linear_decode", _key(max(rows, 8), weight, groups, act_quant), DECODE, x
    )
    each, S = _tiles_per_group(o, groups, cfg["BN"]), cfg["S"]
    splits = max(
        1, min(cdiv(i, 128) // (4 * S), processors(x) // (4 * each * groups))
    )  # merging costs another launch
    span = cdiv(cdiv(i, 128), splits * S) * S
    splits = cdiv(i, 128 * span)
    parts = y if splits == 1 else y.new_empty(splits, M, o, dtype=torch.float32)
    launch(
        quant_linear_decode_kernel,
        (each * groups * (M > 0), splits),
        x,
        _stored(weight, x),
        scale.contiguous(),
        parts,
        M,
        i,
        o // groups,
        each,
        x.stride(0) * groups,
        x.stride(0),
        o,
        span,
        QUANT=act_quant,
        ROWS=rows,
        **cfg,
    )
    if splits > 1:
        launch(
            quant_linear_merge_kernel,
            (cdiv(M * o, 1024),),
            parts,
            y,
            M * o,
            SPLITS=splits,
            BLOCK=1024,
            num_warps=4,
        )


def _some(x, sx, weight, scale, y, M, groups):
    (o, i), rows = weight.shape, SOME if M <= SOME else 8192
    cfg = get_config("quant_linear_product", _key(rows, weight, groups, sx is not None), PRODUCT, x)
    each = _tiles_per_group(o, groups, cfg["BN"])
    launch(
        quant_linear_product_kernel,
        (each * groups, cdiv(M, cfg["BM"])),
        x,
        sx,
        _stored(weight, x),
        scale.contiguous(),
        y,
        M,
        i,
        o // groups,
        groups,
        each,
        x.stride(0) * groups,
        x.stride(0),
        **cfg,
    )


def out_shape(x, weight, groups):
    return (*x.shape[:-1], weight.shape[0] // groups)


def forward(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, groups: int, act_quant: bool
) -> torch.Tensor:
    (o, i), y = weight.shape, x.new_empty(out_shape(x, weight, groups))
    x, low, has_fp8 = (
        flattened(x),
        x.dtype in (torch.bfloat16, torch.float16),
        arch(x) in FP8,
    )  # x [M * g, i]
    M = len(x) // groups
    if M <= FEW and (low or act_quant):
        _few(x, weight, scale, y, M, groups, act_quant)
    elif act_quant and has_fp8:
        _some(*quantize(x), weight, scale, y, M, groups)
    else:
        x = act_quant_forward(x, 128, "fp8") if act_quant else x
        if low and M <= SOME:
            _some(x, None, weight, scale, y, M, groups)
        else:
            w = _decoded(weight, scale, x).view(groups, o // groups, i)
            _matmul(x.view(M, groups, i), w.transpose(1, 2), y.view(M, groups, o // groups))
    return y


def backward(
    g: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, groups: int
) -> torch.Tensor:
    (o, i), g_x = weight.shape, g.new_empty(*g.shape[:-1], weight.shape[1])
    w = _decoded(weight, scale, g).view(groups, o // groups, i)
    _matmul(flattened(g).view(-1, groups, o // groups), w, g_x.view(-1, groups, i))
    return g_x
