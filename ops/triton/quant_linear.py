"""The Triton kernels of quant_linear (formula: ops/quant_linear.py).

Up to MAX_DECODE_ROWS rows one kernel reads the weights once, 128 columns per warp, decodes them in
the registers that the matrix instruction takes them from, rounds x on the way and applies the
scales to the fp32 sum of each 128 columns. Where a few output channels would leave most of the GPU
idle, the columns are split among programs, whose sums are merged in a fixed order.

More rows are first rounded by a small kernel, then multiplied e4m3 by e4m3, with the scales again
on the sum of each 128 columns (within them Hopper adds with some 14 bits). Where there are no such
instructions, or x is not to be rounded, weights are decoded in registers for up to MAX_PRODUCT_ROWS
rows; for more, and for the gradient, they are written out once in the dtype of x, a few percent of
the time of the library's product that follows.

Rounded values and e4m3 weights are exact in every form. So forms differ by fp32 sums alone, except
for the library's weights where a scale is no power of two.
"""

from __future__ import annotations

import torch

from ..launch import arch, cdiv, get_config, jit, launch, power_of_two, processors, tl
from .act_quant import flatten_rows, inverse, quantize, round_to_format
from .act_quant import forward as round_activations
from .formats import decode_e4m3, decode_scale, scale_e4m3

MAX_DECODE_ROWS = 16
MAX_PRODUCT_ROWS = 128  # with decoded weights
# With e4m3 matrix instructions.
FP8_ARCHS = {"sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121", "gfx950", "cpu"}
CONFIGS_DECODE = [
    {"BN": 64, "BLOCKS": 4, "num_warps": 4, "num_stages": 3},
    {"BN": 32, "BLOCKS": 8, "num_warps": 8, "num_stages": 3},
    {"BN": 32, "BLOCKS": 4, "num_warps": 4, "num_stages": 3},
    {"BN": 32, "BLOCKS": 4, "num_warps": 4, "num_stages": 2},
    {"BN": 16, "BLOCKS": 8, "num_warps": 8, "num_stages": 3},
    {"BN": 16, "BLOCKS": 4, "num_warps": 4, "num_stages": 2},
]
CONFIGS_PRODUCT = [
    {"BM": 128, "BN": 128, "num_warps": 8, "num_stages": 3},
    {"BM": 64, "BN": 128, "num_warps": 4, "num_stages": 4},
    {"BM": 128, "BN": 64, "num_warps": 4, "num_stages": 3},
    {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 4},
    {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2},
]


@jit
def decode_weights(w, TYPE: tl.constexpr):
    """e4m3 weights, or their bits, as TYPE; bits as fp16 cheaply, times 2^-8: `decode_factor`."""
    if w.dtype == tl.uint8:
        if TYPE == tl.float16:
            # Sign to bit 15, exponent and mantissa to bits 7-13.
            bits = (w.to(tl.int8, bitcast=True).to(tl.int16) << 7) & -16385
            return bits.to(tl.float16, bitcast=True)
        else:
            return decode_e4m3(w).to(TYPE)
    elif TYPE == tl.bfloat16:
        return w.to(tl.float16).to(tl.float32).to(TYPE)  # cheaper than the direct way
    else:
        return w.to(TYPE)


@jit
def decode_factor(w, TYPE: tl.constexpr):
    """The factor that a product with `decode_weights` lacks."""
    return 256.0 if w.dtype == tl.uint8 and TYPE == tl.float16 else 1.0


@jit
def output_tile(tile, channels, tiles_per_group, BN: tl.constexpr):
    """-> group and first channel of a tile of output channels, and a mask [BN].

    channels is the size of a group. Tiles start at multiples of BN, so that each has one row of
    scales.
    """
    group = tile // tiles_per_group
    first = (group * channels // BN + tile % tiles_per_group) * BN
    n = first + tl.arange(0, BN)
    return group, first, (n >= group * channels) & (n < group * channels + channels)


@jit
def quant_linear_decode_kernel(
    # x [rows, groups, i] with strides; weights [o, i] as e4m3 or their bits; scales [ceil(o / 128),
    # ceil(i / 128)]
    x,
    w,
    scale,
    # [rows, o], or [splits, rows, o] fp32
    y,
    # sizes: channels of a group; tiles of output channels per group
    rows,
    i,
    channels,
    tiles_per_group,
    # strides of x and y, and how many blocks of 128 columns a split has
    x_row_stride,
    x_group_stride,
    y_row_stride,
    span,
    # whether x is rounded; a power of two >= rows
    QUANT: tl.constexpr,
    ROWS: tl.constexpr,
    # channels of a tile, and blocks of 128 columns in it: one per warp
    BN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # The type of the products, exact for e4m3 values.
    TYPE: tl.constexpr = tl.float16 if QUANT or x.dtype.element_ty == tl.float16 else tl.bfloat16
    COLS: tl.constexpr = max(ROWS, 16)  # a matrix instruction takes 16: fewer rows are repeated
    group, first, n_mask = output_tile(tl.program_id(0), channels, tiles_per_group, BN)
    m = tl.arange(0, ROWS)
    s = tl.arange(0, BLOCKS)
    k = tl.arange(0, 128)
    blocks = tl.cdiv(i, 128)
    x += group * x_group_stride + m[None, :, None] * x_row_stride + k[None, None, :]
    w += first.to(tl.int64) * i + tl.arange(0, BN)[None, :, None] * i + k[None, None, :]
    # The row of scales of this tile; a group's last tile may be empty.
    scale += tl.minimum(first, group * channels + channels - 1) // 128 * blocks
    acc = tl.zeros((BLOCKS, BN, COLS), tl.float32)
    start = tl.program_id(1) * span
    for b in range(start, min(start + span, blocks), BLOCKS):
        col = ((b + s) * 128)[:, None, None]
        k_mask = col + k[None, None, :] < i
        # v [BLOCKS, ROWS, 128], q [BLOCKS, BN, 128]
        v = tl.load(x + col, mask=(m < rows)[None, :, None] & k_mask, other=0.0)
        q = tl.load(w + col, mask=n_mask[None, :, None] & k_mask, other=0.0)

        # factor [BLOCKS, ROWS]: the scale of the weights, times those of x
        w_scale = decode_scale(tl.load(scale + b + s, mask=b + s < blocks, other=0.0))
        factor = w_scale[:, None] * decode_factor(q, TYPE)
        if QUANT:
            v = v.to(tl.float32)
            if q.dtype == tl.uint8:
                v, x_scale = round_to_format(v, False)
            else:  # the conversion rounds as `round_to_format` does
                x_scale = scale_e4m3(tl.max(tl.abs(v), 2))
                v = (v * inverse(x_scale)[:, :, None]).to(tl.float8e4nv)
            factor = factor * x_scale
        v = v.to(TYPE)
        factor = tl.broadcast_to(factor, (BLOCKS, ROWS))
        if ROWS < COLS:
            v = tl.broadcast_to(v[:, None], (BLOCKS, COLS // ROWS, ROWS, 128))
            v = v.reshape(BLOCKS, COLS, 128)
            factor = tl.broadcast_to(factor[:, None], (BLOCKS, COLS // ROWS, ROWS))
            factor = factor.reshape(BLOCKS, COLS)

        # acc [BLOCKS, BN, COLS] += W x^T * factor, over 128 columns: one product per warp
        acc += tl.dot(decode_weights(q, TYPE), tl.trans(v, (0, 2, 1))) * factor[:, None, :]
    c = tl.arange(0, COLS)
    row_offsets = tl.program_id(1).to(tl.int64) * rows * y_row_stride + c[None, :] * y_row_stride
    y += row_offsets + first + tl.arange(0, BN)[:, None]
    mask = n_mask[:, None] & (c < min(rows, ROWS))[None, :]
    tl.store(y, tl.sum(acc, 0).to(y.dtype.element_ty), mask=mask)


@jit
def quant_linear_merge_kernel(parts, y, n, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y [n] = sum of parts [SPLITS, n]"""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(SPLITS):
        total += tl.load(parts + s * n + j, mask=j < n, other=0.0)
    tl.store(y + j, total.to(y.dtype.element_ty), mask=j < n)


@jit
def quant_linear_product_kernel(
    # x [rows, groups, i] with strides: e4m3, and its scales [ceil(i / 128), rows, groups]; or of
    # the dtype of y, and None
    x,
    x_scale,
    # weights [o, i] as e4m3 or their bits; scales [ceil(o / 128), ceil(i / 128)]
    w,
    scale,
    # [rows, o]
    y,
    # sizes: channels of a group; tiles of output channels per group
    rows,
    i,
    channels,
    groups,
    tiles_per_group,
    # strides of x
    x_row_stride,
    x_group_stride,
    # rows and channels of a tile
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    # In tiles; neighbours in time are 8 high, to share rows and weights in the cache.
    wide = tl.num_programs(0)
    high = tl.num_programs(1)
    pid = tl.program_id(1) * wide + tl.program_id(0)
    above = pid // (8 * wide) * 8
    rest = pid - above * wide
    beside = min(high - above, 8)
    group, first, n_mask = output_tile(rest // beside, channels, tiles_per_group, BN)
    m = (above + rest % beside) * BM + tl.arange(0, BM)
    k = tl.arange(0, 128)
    blocks = tl.cdiv(i, 128)
    x += group * x_group_stride + m.to(tl.int64)[:, None] * x_row_stride + k[None, :]
    w += first.to(tl.int64) * i + tl.arange(0, BN)[:, None] * i + k[None, :]
    # The row of scales of this tile; a group's last tile may be empty.
    scale += tl.minimum(first, group * channels + channels - 1) // 128 * blocks
    acc = tl.zeros((BM, BN), tl.float32)
    for b in range(blocks):
        k_mask = (b * 128 + k < i)[None, :]
        v = tl.load(x + b * 128, mask=(m < rows)[:, None] & k_mask, other=0.0)  # [BM, 128]
        q = tl.load(w + b * 128, mask=n_mask[:, None] & k_mask, other=0.0)  # [BN, 128]
        factor = decode_scale(tl.load(scale + b))
        # acc [BM, BN] += x W^T * factor, over 128 columns
        if x_scale is None:
            product = tl.dot(v, tl.trans(decode_weights(q, v.dtype)))
            acc += product * (factor * decode_factor(q, v.dtype))
        else:
            x_scale_ptrs = x_scale + (b * rows + m) * groups + group
            factor *= tl.load(x_scale_ptrs, mask=m < rows, other=0.0)
            acc += tl.dot(v, tl.trans(q)) * factor[:, None]
    y += m.to(tl.int64)[:, None] * groups * channels + first + tl.arange(0, BN)[None, :]
    tl.store(y, acc.to(y.dtype.element_ty), mask=(m < rows)[:, None] & n_mask[None, :])


@jit
def quant_linear_decoded_kernel(w, scale, y, o, i, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y [o, i] = the weights, e4m3 bits [o, i] times their scales. ROWS divides 128."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = row.to(tl.int64)[:, None] * i + col[None, :]
    mask = (row < o)[:, None] & (col < i)[None, :]
    scale_ptrs = scale + tl.program_id(0) * ROWS // 128 * tl.cdiv(i, 128) + col // 128
    factor = decode_scale(tl.load(scale_ptrs, mask=col < i, other=0.0))
    v = decode_e4m3(tl.load(w + offsets, mask=mask, other=0)) * factor[None, :]
    tl.store(y + offsets, v.to(y.dtype.element_ty), mask=mask)


def kernel_weights(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weights as kernels take them: bits on a GPU without instructions for their type."""
    return (weight if arch(x) in FP8_ARCHS else weight.view(torch.uint8)).contiguous()


def write_decoded(weight: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The weights [o, i] in the dtype of x, as dequantize_fp8."""
    o, i = weight.shape
    y = x.new_empty(weight.shape)
    bits = weight.view(torch.uint8).contiguous()
    tensors = (bits, scale.contiguous(), y)
    constants = {"ROWS": 16, "BLOCK": 256, "num_warps": 4}
    launch(quant_linear_decoded_kernel, (cdiv(o, 16), cdiv(i, 256)), *tensors, o, i, **constants)
    return y


def grouped_matmul(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> None:
    """y [rows, g, n] = x [rows, g, k] times w [g, k, n]; out= also keeps autocast away."""
    if len(w) == 1:
        torch.mm(x[:, 0], w[0], out=y[:, 0])
    else:
        torch.bmm(x.transpose(0, 1), w, out=y.transpose(0, 1))


def count_tiles(o: int, groups: int, BN: int) -> int:
    """Tiles of output channels per group."""
    channels = o // groups
    if groups == 1:
        return cdiv(channels, BN)
    return channels // BN + (2 if channels % BN else 0)  # a group's ends may lie within tiles


def config_key(rows: int, weight: torch.Tensor, groups: int, quantized: bool) -> str:
    o, i = weight.shape
    return f"~{rows} rows {o}x{i} g{groups}{' quant' if quantized else ''}"


def launch_decode(x, weight, scale, y, rows, groups, act_quant):
    """Writes y [rows, o]; x [rows * groups, i], at most MAX_DECODE_ROWS rows."""
    o, i = weight.shape
    padded = power_of_two(rows)
    key = config_key(max(padded, 8), weight, groups, act_quant)
    cfg = get_config("quant_linear_decode", key, CONFIGS_DECODE, x)
    tiles = count_tiles(o, groups, cfg["BN"])

    # Splits of the columns: up to four programs a processor, of at least four steps, as merging
    # costs a launch.
    blocks = cdiv(i, 128)
    step = cfg["BLOCKS"]
    wanted = max(1, min(blocks // (4 * step), processors(x) // (4 * tiles * groups)))
    span = cdiv(blocks, wanted * step) * step
    splits = cdiv(i, 128 * span)
    parts = y if splits == 1 else y.new_empty(splits, rows, o, dtype=torch.float32)

    grid = (tiles * groups * (rows > 0), splits)
    tensors = (x, kernel_weights(weight, x), scale.contiguous(), parts)
    sizes = (rows, i, o // groups, tiles)
    strides = (x.stride(0) * groups, x.stride(0), o)
    constants = {"QUANT": act_quant, "ROWS": padded, **cfg}
    launch(quant_linear_decode_kernel, grid, *tensors, *sizes, *strides, span, **constants)
    if splits > 1:
        constants = {"SPLITS": splits, "BLOCK": 1024, "num_warps": 4}
        grid = (cdiv(rows * o, 1024),)
        launch(quant_linear_merge_kernel, grid, parts, y, rows * o, **constants)


def launch_product(x, x_scale, weight, scale, y, rows, groups):
    """Writes y [rows, o]; x [rows * groups, i]: e4m3 with scales, or any with None."""
    o, i = weight.shape
    load = MAX_PRODUCT_ROWS if rows <= MAX_PRODUCT_ROWS else 8192
    key = config_key(load, weight, groups, x_scale is not None)
    cfg = get_config("quant_linear_product", key, CONFIGS_PRODUCT, x)
    tiles = count_tiles(o, groups, cfg["BN"])
    grid = (tiles * groups, cdiv(rows, cfg["BM"]))
    tensors = (x, x_scale, kernel_weights(weight, x), scale.contiguous(), y)
    sizes = (rows, i, o // groups, groups, tiles)
    strides = (x.stride(0) * groups, x.stride(0))
    launch(quant_linear_product_kernel, grid, *tensors, *sizes, *strides, **cfg)


def out_shape(x: torch.Tensor, weight: torch.Tensor, groups: int) -> tuple[int, ...]:
    return (*x.shape[:-1], weight.shape[0] // groups)


def forward(x, weight, scale, groups: int, act_quant: bool) -> torch.Tensor:
    o, i = weight.shape
    y = x.new_empty(out_shape(x, weight, groups))
    x = flatten_rows(x)  # [rows * groups, i]
    rows = len(x) // groups
    half = x.dtype in (torch.bfloat16, torch.float16)
    if rows <= MAX_DECODE_ROWS and (half or act_quant):
        launch_decode(x, weight, scale, y, rows, groups, act_quant)
        return y
    if act_quant and arch(x) in FP8_ARCHS:
        launch_product(*quantize(x), weight, scale, y, rows, groups)
        return y
    if act_quant:
        x = round_activations(x, 128, "fp8")
    if half and rows <= MAX_PRODUCT_ROWS:
        launch_product(x, None, weight, scale, y, rows, groups)
        return y
    w = write_decoded(weight, scale, x).view(groups, o // groups, i)
    grouped_matmul(x.view(rows, groups, i), w.transpose(1, 2), y.view(rows, groups, o // groups))
    return y


def backward(g, weight, scale, groups: int) -> torch.Tensor:
    """Gradient of x."""
    o, i = weight.shape
    g_x = g.new_empty(*g.shape[:-1], i)
    w = write_decoded(weight, scale, g).view(groups, o // groups, i)
    grouped_matmul(flatten_rows(g).view(-1, groups, o // groups), w, g_x.view(-1, groups, i))
    return g_x
