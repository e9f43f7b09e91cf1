"""The number formats of the checkpoint and of quantised arithmetic: e4m3, e2m1, e8m0.

    e4m3   float8 with maximum 448;
           one scale per block of weights (128 x 128) or activations (1 x 64, 1 x 128)
    e2m1   4-bit float with magnitudes 0 .5 1 1.5 2 3 4 6, two per byte (low nibble first);
           one scale per 1 x 32
    e8m0   a power of two, 2^(byte - 127); kept as uint8 bits because few operators accept the dtype

Sources: docs/v4.md#quantised-points, docs/v4.md#checkpoint. Everything here is exact and runs
eagerly or traced, on any device; triton/formats.py is the same inside Triton kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

E4M3_MAX = 448.0
E2M1_MAX = 6.0


@contextlib.contextmanager
def keep_islands(model: nn.Module, cast: Callable):
    """Around model._apply(cast): parameters that a model keeps in fp32, whatever its dtype, return
    to their values: all vectors, the hyper-connections' fn, the compressors' ape.

    Casts to fp32 and fp64 are for them, too. ValueError for a cast of packed weights.
    """
    before = {name: p.data for name, p in model.named_parameters()}
    packed = any(p.dtype.itemsize == 1 for p in before.values())
    device = next(iter(before.values())).device
    half, single = (torch.empty(0, dtype=t, device=device) for t in (torch.bfloat16, torch.float32))
    casts = cast(half).dtype != half.dtype or cast(single).dtype != single.dtype
    if casts and packed:
        raise ValueError(
            "packed FP4 and FP8 weights cannot be cast: choose dtype in load(), "
            'or load with weights="dequant"'
        )
    yield
    if cast(single).dtype.itemsize < single.dtype.itemsize:
        for name, p in model.named_parameters():
            if p.dim() == 1 or name.endswith(("_fn", ".ape")):
                p.data = before[name].to(p.device)


def pow2_ceil(x: torch.Tensor) -> torch.Tensor:
    """The least power of two >= x; x > 0 normal fp32. Exact: from the exponent bits, no log2."""
    bits = x.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent << 23).view(torch.float32)


def scale_to_float(scale: torch.Tensor) -> torch.Tensor:
    """A stored scale (float8_e8m0fnu, its uint8 bits, or fp32) as fp32."""
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if scale.dtype != torch.uint8:
        return scale.float()
    bits = scale.to(torch.int32)
    # Byte 0 is the subnormal 2^-127.
    return torch.where(bits == 0, 0x00400000, bits << 23).view(torch.float32)


def scale_to_e8m0(scale: torch.Tensor) -> torch.Tensor:
    """Powers of two in fp32 -> their e8m0 bits as uint8."""
    return (scale.view(torch.int32) >> 23).to(torch.uint8)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 to the nearest e2m1 value, ties to the even code, after clamping to +-6."""
    a = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign((a / step).round() * step, x)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Round fp32 to the nearest e4m3 value, ties to even, after clamping to +-448.

    Equal to a cast to fp8 and back, but in fp32 arithmetic, which compiled CPU code vectorises;
    casts it does one by one.
    """
    v = x.clamp(-E4M3_MAX, E4M3_MAX)
    power = (v.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |v|)
    step = power.clamp(min=2.0**-6) * 2.0**-3
    return (v / step).round() * step


def fake_quant(x: torch.Tensor, block: int, fmt: str) -> torch.Tensor:
    """Round the last dim of x with a power-of-two scale per block; dtype kept.

    fmt is "fp8" (e4m3) or "fp4" (e2m1). A last block shorter than `block` is quantised on its own.
    Source: docs/v4.md#quantised-points.
    """
    n = x.shape[-1]
    v = F.pad(x.float(), (0, -n % block)).unflatten(-1, (-1, block))  # [..., n / block, block]
    amax = v.abs().amax(-1, keepdim=True)
    if fmt == "fp8":
        scale = pow2_ceil(amax.clamp(min=1e-4) * (1 / E4M3_MAX))
        v = round_e4m3(v / scale) * scale
    else:
        scale = pow2_ceil(amax.clamp(min=E2M1_MAX * 2.0**-126) * (1 / E2M1_MAX))
        v = round_e2m1(v / scale) * scale
    return v.flatten(-2)[..., :n].to(x.dtype).contiguous()


def _expand_scale(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int]) -> torch.Tensor:
    """Scales [..., ceil(o / b0), ceil(i / b1)] -> one per element [..., o, i]."""
    scale = scale_to_float(scale).repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return scale[..., : shape[-2], : shape[-1]]


def _block_amax(w: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Largest magnitude per block: [..., o, i] -> [..., ceil(o / b0), ceil(i / b1)] fp32."""
    o, i = w.shape[-2:]
    b0, b1 = block
    v = F.pad(w.float().abs(), (0, -i % b1, 0, -o % b0))
    return v.unflatten(-1, (-1, b1)).unflatten(-3, (-1, b0)).amax((-3, -1))


def quantize_fp8(
    w: torch.Tensor, block: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., o, i] -> (e4m3 [..., o, i], e8m0 bits [..., ceil(o / 128), ceil(i / 128)] uint8)."""
    scale = pow2_ceil(_block_amax(w, block).clamp(min=1e-4) * (1 / E4M3_MAX))
    q = (w.float() / _expand_scale(scale, w.shape, block)).clamp(-E4M3_MAX, E4M3_MAX)
    return q.to(torch.float8_e4m3fn), scale_to_e8m0(scale)


def dequantize_fp8(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: tuple[int, int] = (128, 128)
) -> torch.Tensor:
    """-> the weights [..., o, i] in dtype: e4m3 values times the scale of their 128 x 128 block."""
    return (q.float() * _expand_scale(scale, q.shape, block)).to(dtype)


def quantize_fp4(w: torch.Tensor, block: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """w [..., o, i], i even -> two e2m1 codes a byte [..., o, i / 2] int8, and e8m0 bits.

    The scales are [..., o, ceil(i / 32)] uint8.
    """
    scale = pow2_ceil(_block_amax(w, (1, block)).clamp(min=E2M1_MAX * 2.0**-126) * (1 / E2M1_MAX))
    v = round_e2m1(w.float() / _expand_scale(scale, w.shape, (1, block)))
    a = v.abs()
    # Magnitudes 0 .5 1 1.5 2 3 4 6 -> codes 0..7; the sign is bit 3.
    code = torch.where(a < 2, a * 2, torch.where(a < 4, a + 2, a / 2 + 4)).to(torch.uint8)
    code |= torch.signbit(v).to(torch.uint8) << 3
    return (code[..., 0::2] | code[..., 1::2] << 4).view(torch.int8), scale_to_e8m0(scale)


def dequantize_fp4(
    q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, block: int = 32
) -> torch.Tensor:
    """Codes [..., o, i / 2], scales [..., o, ceil(i / 32)] -> the weights [..., o, i] in dtype."""
    byte = q.view(torch.uint8).to(torch.int32)
    code = torch.stack((byte & 15, byte >> 4), -1).flatten(-2)
    magnitude = (code & 7).float()
    large = torch.where(magnitude < 6, magnitude - 2, magnitude * 2 - 8)
    value = torch.where(magnitude < 4, magnitude / 2, large)
    value = torch.where(code >= 8, -value, value)
    return (value * _expand_scale(scale, value.shape, (1, block))).to(dtype)


def fake_quant_ste(w: torch.Tensor, fmt: str) -> torch.Tensor:
    """Weights [..., o, i] as "fp4" or "fp8" stores them; the gradient passes straight through."""
    if fmt == "fp4":
        stored = dequantize_fp4(*quantize_fp4(w.detach()), w.dtype)
    else:
        stored = dequantize_fp8(*quantize_fp8(w.detach()), w.dtype)
    return stored + (w - w.detach())
