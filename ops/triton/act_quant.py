"""The Triton kernel of act_quant (see ops/act_quant.py)."""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .formats import scale_e2m1, scale_e4m3

CANDIDATES = [dict(SIZE=size, num_warps=warps) for size, warps in ((8192, 8), (4096, 4), (2048, 4))]


@jit
def inverse(power):
    """1 / x of a power of two in fp32, 2^-126 to 2^126, exact."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@jit
def quantized(v, FP4: tl.constexpr):
    """fp32 [..., block] -> the nearest values of the format, and the scales [...] to multiply them by.

    Nothing saturates, as the scale of a block fits its largest value: adding and subtracting a number whose last bit is
    worth one step of the format rounds to even.
    """
    amax = tl.max(tl.abs(v), -1)
    scale = scale_e2m1(amax) if FP4 else scale_e4m3(amax)
    u = v * tl.expand_dims(inverse(scale), -1)
    power = (u.to(tl.int32, bitcast=True) & 0x7F800000).to(
        tl.float32, bitcast=True
    )  # 2^floor(log2 |u|)
    large = (
        tl.maximum(power, 1.0) * 6291456.0 if FP4 else tl.maximum(power, 0.015625) * 1572864.0
    )  # step * 1.5 * 2^23
    return (u + large) - large, scale


@jit
def act_quant_kernel(
    x,
    y,
    scales,
    rows,
    n,
    row_stride,
    block,
    FP4: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    width = tl.cdiv(n, block * BLOCKS)  # programs along a row
    row = (tl.program_id(0) // width).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    b = tl.program_id(0) % width * BLOCKS + tl.arange(0, BLOCKS)[None, :]  # scale blocks
    j = tl.arange(0, BLOCK)[None, None, :]
    col = b[:, :, None] * block + j
    inside = (row < rows)[:, :, None] & (col < n) & (j < block)
    v = tl.load(x + row[:, :, None] * row_stride + col, mask=inside, other=0.0).to(
        tl.float32
    )  # [ROWS, BLOCKS, BLOCK]
    q, scale = quantized(v, FP4)
    if scales is None:
        q = q * scale[:, :, None]
    else:
        tl.store(scales + b.to(tl.int64) * rows + row, scale, mask=(row < rows) & (b * block < n))
    tl.store(y + row[:, :, None] * n + col, q.to(y.dtype.element_ty), mask=inside)


def _launch(x, y, scales, block, fmt):
    """x [rows, n]"""
    (rows, n), size = x.shape, power_of_two(block)
    cfg = dict(get_config("act_quant", f"{fmt} {block} n{n} {str(x.dtype)[6:]}", CANDIDATES, x))
    total = max(cfg.pop("SIZE"), size)
    blocks = min(power_of_two(cdiv(n, block)), max(1024, size) // size, total // size)
    tile = min(total // (size * blocks), power_of_two(rows))
    launch(
        act_quant_kernel,
        (cdiv(rows, tile) * cdiv(n, block * blocks),),
        x,
        y,
        scales,
        rows,
        n,
        x.stride(0),
        block,
        FP4=fmt == "fp4",
        ROWS=tile,
        BLOCKS=blocks,
        BLOCK=size,
        **cfg,
    )


def flattened(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [rows, n], contiguous along n; a view where it can be."""
    x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def forward(x: torch.Tensor, block: int, fmt: str) -> torch.Tensor:
    y = x.new_empty(x.shape)
    _launch(flattened(x), y, None, block, fmt)
    return y


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, n] -> e4m3 [rows, n], scales of blocks of 128 [ceil(n / 128), rows] fp32."""
    rows, n = x.shape
    q, scales = (
        x.new_empty(rows, n, dtype=torch.float8_e4m3fn),
        x.new_empty(cdiv(n, 128), rows, dtype=torch.float32),
    )
    _launch(x, q, scales, 128, "fp8")
    return q, scales
