"""The Triton kernel of act_quant (formula: ops/act_quant.py), and the rounding that quant_linear's
kernels share.

The kernel reads and writes every value once. A tile is a few rows by whole scale blocks; rows may
be a view into wider ones. `quantize` writes the e4m3 values and their scales instead, the input of
an FP8 matrix product.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .formats import scale_e2m1, scale_e4m3

CONFIGS = [  # SIZE: values of a tile
    {"SIZE": 8192, "num_warps": 8},
    {"SIZE": 4096, "num_warps": 4},
    {"SIZE": 2048, "num_warps": 4},
]


@jit
def inverse(power):
    """1 / x of a power of two in fp32, 2^-126 to 2^126; exact."""
    # Exponent e -> 254 - e.
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@jit
def round_to_format(v, FP4: tl.constexpr):
    """fp32 [..., block] -> the nearest values of the format, and their scales [...].

    Nothing saturates, as the scale of a block fits its largest value. Adding and subtracting a
    number whose last bit is worth one step of the format rounds to even.
    """
    amax = tl.max(tl.abs(v), -1)
    scale = scale_e2m1(amax) if FP4 else scale_e4m3(amax)
    u = v * tl.expand_dims(inverse(scale), -1)
    power = (u.to(tl.int32, bitcast=True) & 0x7F800000).to(
        tl.float32, bitcast=True
    )  # 2^floor(log2 |u|)
    # step * 1.5 * 2^23, with the step at this magnitude: power / 2 from 1 on, power / 8 from 2^-6
    # on
    large = tl.maximum(power, 1.0) * 6291456.0 if FP4 else tl.maximum(power, 0.015625) * 1572864.0
    return (u + large) - large, scale


@jit
def act_quant_kernel(
    # [rows, n] with a row stride; [rows, n]; [ceil(n / block), rows] fp32, or None: values are
    # multiplied by them
    x,
    y,
    scales,
    rows,
    n,
    row_stride,
    block,
    FP4: tl.constexpr,
    # of a tile: rows, scale blocks, a power of two >= block
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = tl.cdiv(n, block * BLOCKS)  # programs along a row
    row = (tl.program_id(0) // width).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    b = tl.program_id(0) % width * BLOCKS + tl.arange(0, BLOCKS)[None, :]  # scale blocks
    j = tl.arange(0, BLOCK)[None, None, :]
    col = b[:, :, None] * block + j
    mask = (row < rows)[:, :, None] & (col < n) & (j < block)
    x_ptrs = x + row[:, :, None] * row_stride + col
    v = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCKS, BLOCK]
    q, scale = round_to_format(v, FP4)
    if scales is None:
        q = q * scale[:, :, None]
    else:
        scale_mask = (row < rows) & (b * block < n)
        tl.store(scales + b.to(tl.int64) * rows + row, scale, mask=scale_mask)
    tl.store(y + row[:, :, None] * n + col, q.to(y.dtype.element_ty), mask=mask)


def launch_act_quant(
    x: torch.Tensor, y: torch.Tensor, scales: torch.Tensor | None, block: int, fmt: str
) -> None:
    """Writes y, and scales unless None; x [rows, n]."""
    rows, n = x.shape
    size = power_of_two(block)
    key = f"{fmt} {block} n{n} {str(x.dtype).removeprefix('torch.')}"
    cfg = dict(get_config("act_quant", key, CONFIGS, x))

    # Whole scale blocks, along a row up to 1024 columns, then as many rows as the tile has room
    # for.
    total = max(cfg.pop("SIZE"), size)
    blocks = min(power_of_two(cdiv(n, block)), max(1024, size) // size, total // size)
    tile_rows = min(total // (size * blocks), power_of_two(rows))
    grid = (cdiv(rows, tile_rows) * cdiv(n, block * blocks),)
    constants = {"FP4": fmt == "fp4", "ROWS": tile_rows, "BLOCKS": blocks, "BLOCK": size, **cfg}
    launch(act_quant_kernel, grid, x, y, scales, rows, n, x.stride(0), block, **constants)


def flatten_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [rows, n], contiguous along n; a view where possible."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def forward(x: torch.Tensor, block: int, fmt: str) -> torch.Tensor:
    y = x.new_empty(x.shape)
    launch_act_quant(flatten_rows(x), y, None, block, fmt)
    return y


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, n] -> e4m3 [rows, n], scales of blocks of 128 [ceil(n / 128), rows] fp32."""
    rows, n = x.shape
    q = x.new_empty(rows, n, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(cdiv(n, 128), rows, dtype=torch.float32)
    launch_act_quant(x, q, scales, 128, "fp8")
    return q, scales
