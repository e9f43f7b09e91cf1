"""The number formats of ops/formats.py inside Triton kernels: decoding of packed weights, scales of
activations.

Packed weights arrive as uint8 on every GPU: not all GPUs have the types, and the bits are quickly
decoded.
"""

from __future__ import annotations

from ..launch import jit, tl


@jit
def decode_e4m3(byte):
    """uint8 bits -> fp32, exact; NaN (0x7f, 0xff) becomes +-480."""
    bits = byte.to(tl.int32)
    # Sign to bit 31, exponent and mantissa to bits 20-26: the value, its exponent too small by 120.
    shifted = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return shifted.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@jit
def decode_e2m1(code):
    """The low four bits of an integer -> fp32, exact."""
    bits = code.to(tl.int32)
    # Sign to bit 31, exponent and mantissa to bits 22-24: the value, its exponent too small by 126.
    shifted = ((bits & 8) << 28) | ((bits & 7) << 22)
    return shifted.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@jit
def decode_scale(scale):
    """A stored scale, e8m0 bits in uint8 or fp32 -> fp32."""
    if scale.dtype == tl.uint8:
        bits = scale.to(tl.int32)
        # Byte 0 is the subnormal 2^-127.
        scale = tl.where(bits == 0, 0x00400000, bits << 23).to(tl.float32, bitcast=True)
    return scale


@jit
def pow2_ceil(x):
    """The least power of two >= x; x > 0 normal fp32."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    return (exponent << 23).to(tl.float32, bitcast=True)


@jit
def scale_e4m3(amax):
    """The scale of a block of activations whose largest magnitude is amax: maximum 448."""
    return pow2_ceil(tl.maximum(amax, 1e-4) * (1 / 448))


@jit
def scale_e2m1(amax):
    """The scale of a block of activations whose largest magnitude is amax: maximum 6."""
    return pow2_ceil(tl.maximum(amax, 7.052966104933725e-38) * (1 / 6))  # 6 * 2^-126
