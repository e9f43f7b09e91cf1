"""Values of moe (see moe.py): packed weights as words or bytes, act_quant, the order of columns.

Packed weights are read in words of 4 fp8 or 8 fp4 values where d and I are multiples of 128, else
byte by byte. The low and the high half of a word hold J values each: shifts and masks move the j-th
of both into the place of a bf16, its exponent too small by a power of two that the factor of the
scale makes up for. That is about 4 instructions a value, none of them through shared memory. It
gives the values of a row in another order, 128 at a time, so x and h are stored in that order. The
products are 2^-64 of the true ones, as the factor must fit a bf16: for scales of 2^-60 to 2^60.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import jit, tl
from .formats import decode_e2m1, decode_e4m3, decode_scale, scale_e4m3


@jit
def moe_pair(q, f, j: tl.constexpr, J: tl.constexpr, dtype: tl.constexpr):
    """The j-th value of both halves of words [..] times f: [.., 2]"""
    if J == 4:
        # fp4, seem: the sign, the lowest two bits of a bf16's exponent, the highest of its mantissa
        if j == 0:
            shifted = q << 6
        elif j == 1:
            shifted = q << 2
        elif j == 2:
            shifted = q >> 2
        else:
            shifted = q >> 6
        magnitude = shifted & 0x01C001C0
        sign = (q << 12 - 4 * j) & -0x7FFF8000
    else:
        # fp8, seeeemmm: the lowest four bits of the exponent, the highest three of the mantissa
        magnitude = (q << 4 if j == 0 else q >> 4) & 0x07F007F0
        sign = (q << 8 - 8 * j) & -0x7FFF8000
    both = sign | magnitude
    if f.dtype == tl.bfloat16:  # this order of products spares a swap
        high = (both >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True) * f
        low = both.to(tl.int16).to(tl.bfloat16, bitcast=True) * f
    else:
        high = (both & -0x10000).to(tl.float32, bitcast=True) * f
        low = (both << 16).to(tl.float32, bitcast=True) * f
    return tl.join(low.to(dtype), high.to(dtype))


@jit
def moe_words(
    # words and scales of an expert
    w,
    s,
    # rows [BN] and the first column
    row,
    k,
    # row strides
    stride,
    s_stride,
    # values in half a word, sizes
    J: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Rows of W from column k on, in the order that moe_order gives to x, times 2^-64: [BN, BK]"""
    B: tl.constexpr = BK // 128
    W: tl.constexpr = 64 // J  # words of 128 values
    words = k // (2 * J) + tl.arange(0, B * W)
    q = tl.load(w + row[:, None] * stride + words[None, :]).reshape(BN, B, W)
    # f [BN, B, W]: the scale of each word
    if J == 4:
        if s.dtype.element_ty == tl.int32:  # four scales a word
            f = tl.load(s + row[:, None] * s_stride + (k // 128 + tl.arange(0, B))[None, :])
            even = tl.join(f & 255, (f >> 16) & 255)
            odd = tl.join((f >> 8) & 255, (f >> 24) & 255)
            f = tl.join(even, odd).reshape(BN, 4 * B)
        else:
            f = tl.load(s + row[:, None] * s_stride + (k // 32 + tl.arange(0, 4 * B))[None, :])
        f = tl.broadcast_to(f[:, :, None], [BN, 4 * B, W // 4]).reshape(BN, B, W)
    else:
        f = tl.load(s + (row // 128)[:, None] * s_stride + (k // 128 + tl.arange(0, B))[None, :])
        f = tl.broadcast_to(f[:, :, None], [BN, B, W])
    # Times 2^62 or 2^56: 2^-64 of the power that the exponents of the values lack
    if f.dtype == tl.float32:
        f *= 4.611686018427388e18 if J == 4 else 7.205759403792794e16
    else:
        exponent = tl.minimum(f.to(tl.int32), 192) + (62 if J == 4 else 56)
        f = (exponent << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    if J == 4:
        even = tl.join(moe_pair(q, f, 0, J, dtype), moe_pair(q, f, 2, J, dtype))
        odd = tl.join(moe_pair(q, f, 1, J, dtype), moe_pair(q, f, 3, J, dtype))
        v = tl.join(even, odd)  # [BN, B, W, half, j / 2, j % 2]
        return tl.permute(v, (0, 1, 4, 5, 2, 3)).reshape(BN, BK)
    else:
        v = tl.join(moe_pair(q, f, 0, J, dtype), moe_pair(q, f, 1, J, dtype))
        return tl.permute(v, (0, 1, 4, 2, 3)).reshape(BN, BK)


@jit
def moe_values(
    # weights and scales of an expert
    w,
    s,
    # rows, columns and their mask
    o,
    i,
    mask,
    # row strides; blocks of 128 rows begin anew at every multiple of `rows`
    stride,
    s_stride,
    rows,
    FORMAT: tl.constexpr,
    dtype: tl.constexpr,
):
    """Elements (o, i) of W in dtype, byte by byte if packed."""
    if FORMAT == "plain":
        return tl.load(w + o * stride + i, mask=mask, other=0.0)
    else:
        if FORMAT == "fp4":
            byte = tl.load(w + o * stride + i // 2, mask=mask, other=0)
            v = decode_e2m1(byte.to(tl.int32) >> i % 2 * 4)
            scale = o * s_stride + i // 32
        else:
            v = decode_e4m3(tl.load(w + o * stride + i, mask=mask, other=0))
            scale = (o // rows * ((rows + 127) // 128) + o % rows // 128) * s_stride + i // 128
        return (v * decode_scale(tl.load(s + scale, mask=mask, other=0))).to(dtype)


@jit
def moe_weights(
    # weights and scales of an expert
    w,
    s,
    # rows [BN], first column, number of columns
    row,
    k,
    K,
    # row strides
    stride,
    s_stride,
    # format, values in half a word (0: no words), whether BK divides K; sizes
    FORMAT: tl.constexpr,
    J: tl.constexpr,
    EVEN: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Rows of W from column k of K on: [BN, BK]"""
    if J:
        return moe_words(w, s, row, k, stride, s_stride, J, BN, BK, dtype)
    else:
        i = (k + tl.arange(0, BK))[None, :]
        if FORMAT == "plain" and EVEN:
            return tl.load(w + row[:, None] * stride + i)
        else:
            return moe_values(
                w, s, row[:, None], i, i < K, stride, s_stride, 1 << 30, FORMAT, dtype
            )


@jit
def moe_dot(x, w, acc, SWAP: tl.constexpr):
    """acc + x w^T; SWAP: its transpose: w comes from registers, few tokens are the narrow side."""
    if SWAP:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@jit
def moe_fp8(v, BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr):
    """[BM, BN], or [BN, BM], through e4m3 and back in blocks of 128 columns: act_quant"""
    if SWAP:
        b = v.to(tl.float32).reshape(BN // 128, 128, BM)
        scale = scale_e4m3(tl.max(tl.abs(b), 1))[:, None, :]
    else:
        b = v.to(tl.float32).reshape(BM, BN // 128, 128)
        scale = scale_e4m3(tl.max(tl.abs(b), 2))[:, :, None]
    power = (b.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Adding 1.5 * 2^23 times the worth of the last bit, and subtracting it again, rounds
    magic = tl.maximum(power, 0.015625 * scale) * 1572864.0
    return ((b + magic) - magic).reshape(v.shape).to(v.dtype)


@jit
def moe_order(v, J: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SWAP: tl.constexpr):
    """[BM, BN], or [BN, BM], with columns in the order that words of 2 J values want"""
    if J == 0:
        return v
    else:
        if SWAP:
            b = tl.permute(v.reshape(BN // 128, 64 // J, 2, J, BM), (0, 3, 1, 2, 4))
        else:
            b = tl.permute(v.reshape(BM, BN // 128, 64 // J, 2, J), (0, 1, 4, 2, 3))
        return b.reshape(v.shape)


class Weights(NamedTuple):
    """How kernels read weights [E, o, i] and their scales."""

    w: torch.Tensor  # as they are; uint8, or int32 words, if packed
    s: torch.Tensor | None
    format: str  # "plain", "fp4", "fp8"
    J: int  # values in half a word; 0: there are no words
    name: str

    @property
    def kind(self) -> str:
        if self.J:
            return "words"
        return "plain" if self.w.dtype == torch.bfloat16 else "bytes"

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Of w and s: an expert's, a row's."""
        of_scales = (0, 0) if self.s is None else self.s.stride()[:2]
        return *self.w.stride()[:2], *of_scales


def as_weights(w, s, dtype: torch.dtype, words: bool = True) -> Weights:
    """For activations of dtype. words: whether they may be read in words."""
    w = w.contiguous()
    if s is None:
        return Weights(w, None, "plain", 0, {2: "bf16", 4: "fp32"}[w.dtype.itemsize])
    s = s.contiguous()
    form = "fp4" if w.dtype == torch.int8 else "fp8"
    w = w.view(torch.uint8)
    J = 4 if form == "fp4" else 2
    fits = words and dtype == torch.bfloat16 and w.shape[-1] * J // 2 % 128 == 0
    if not fits or not _as_int32(w) or (form == "fp4" and not _as_int32(s)):
        return Weights(w, s, form, 0, form)
    if form == "fp4" and s.dtype == torch.uint8:
        s = s.view(torch.int32)
    return Weights(w.view(torch.int32), s, form, J, form)


def _as_int32(t: torch.Tensor) -> bool:
    """Whether bytes can be read four at a time; other dtypes are left as they are."""
    if t.dtype != torch.uint8:
        return True
    return t.storage_offset() % 4 == 0 and t.shape[-1] % 4 == 0
