"""The Triton kernels of moe (see moe.py): route, up, down, sum; and the backward.

A pair is a token with one of its K experts, n = N K of them. All kernels leave pairs in their own order: h and what w2
makes of it have one row per pair, so that nothing is added atomically and every sum has a fixed order. Pairs of expert E
have none: they are in no block, `sum` leaves them out, and the gradient of their weight is not defined.

    route    a stable counting sort of the pairs by expert, in blocks of at most BM pairs of one expert. How many blocks
             there are is known only on the GPU: programs are started for as many as there can be, and those left over
             exit. One token needs no route: each of its pairs is a block. The programs of an expert are neighbours:
             they share its weights in L2, and DRAM sends them once
    up       the rows of a block through tiles of W1 and W3 at once, then the SwiGLU, rounded to h. Where h is to be made
             in blocks wider than the tile, and where d is split, fp32 sums are stored, and the last of a block's programs
             makes h of them (`act` does where a barrier does not order stores)
    down     the rows of h through w2, each result rounded; `sum` adds the K of a token; the last program, if there is one

Packed weights are read in words of 4 fp8 or 8 fp4 values where d and I are multiples of 128, else byte by byte. The low
and the high half of a word hold J values each: shifts and masks move the j-th of both into the place of a bf16, its
exponent too small by a power of two that the factor of the scale makes up for. That is about 4 instructions a value,
none of them through shared memory. It gives the values of a row in another order, 128 at a time, so x and h are stored
in that order. The products are 2^-64 of the true ones, as the factor must fit a bf16: for scales of 2^-60 to 2^60.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import arch, cdiv, get_config, jit, launch, power_of_two, tl
from .formats import decode_e2m1, decode_e4m3, decode_scale, scale_e4m3

PLACED = 256  # pairs that one program of the route places


# ---------------------------------------------------------------------------------------------------------------------
# Route


@jit
def moe_count(idx, counts, n, C: tl.constexpr, EP: tl.constexpr):
    """counts [chunks, EP]: pairs of every expert, in each chunk of C."""
    i = tl.program_id(0) * C + tl.arange(0, C)
    e = tl.load(idx + i, mask=i < n, other=EP - 1).to(tl.int32)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), tl.histogram(e, EP))


@jit
def moe_route(
    c,
    idx,
    counts,
    order,
    starts,
    blocks,
    n,
    E,
    chunks,
    BM: tl.constexpr,
    C: tl.constexpr,
    EP: tl.constexpr,
):
    """order [n]: pairs by expert; starts [E + 2]: where experts begin in it, then n and the number of blocks;
    blocks [.., 4]: expert, first block of the expert, where it begins and ends in order. No counts: there is one chunk."""
    J: tl.constexpr = C if C < 64 else 64
    i = c * C + tl.arange(0, C)
    mine = tl.load(idx + i, mask=i < n, other=1 << 30).to(tl.int32)
    rank = tl.zeros([C], tl.int32)  # of the pair among those of its expert
    for j0 in range(0, C, J):
        j = c * C + j0 + tl.arange(0, J)
        other = tl.load(idx + j, mask=j < n, other=-1).to(tl.int32)
        rank += tl.sum(
            ((other[:, None] == mine[None, :]) & (j[:, None] < i[None, :])).to(tl.int32), 0
        )
    start, first, count = tl.zeros([C], tl.int32), tl.zeros([C], tl.int32), tl.zeros([C], tl.int32)
    seen, numbered = 0, 0  # pairs and blocks of the experts so far
    for e0 in range(0, E, 64):
        e = e0 + tl.arange(0, 64)
        less, same = e[:, None] < mine[None, :], (e[:, None] == mine[None, :]) & (e < E)[:, None]
        if counts is None:
            total = tl.sum(same.to(tl.int32), 1)
        else:
            total, before = tl.zeros([64], tl.int32), tl.zeros([64], tl.int32)
            for c0 in range(0, chunks, 64):
                row = c0 + tl.arange(0, 64)[:, None]
                here = tl.load(
                    counts + row * EP + e[None, :], mask=(row < chunks) & (e < E)[None, :], other=0
                )
                total += tl.sum(here, 0)
                before += tl.sum(tl.where(row < c, here, 0), 0)
            rank += tl.sum(tl.where(same, before[:, None], 0), 0)
        number = (total + BM - 1) // BM
        start += tl.sum(tl.where(less, total[:, None], 0), 0)
        first += tl.sum(tl.where(less, number[:, None], 0), 0)
        count += tl.sum(tl.where(same, total[:, None], 0), 0)
        tl.store(starts + e, seen + tl.cumsum(total, 0) - total, mask=(e < E) & (c == 0))
        seen += tl.sum(total, 0)
        numbered += tl.sum(number, 0)
    tl.store(starts + E, seen, mask=c == 0)
    tl.store(starts + E + 1, numbered, mask=c == 0)
    tl.store(order + start + rank, i, mask=i < n)
    leads, block = (i < n) & (mine < E) & (rank % BM == 0), blocks + 4 * (first + rank // BM)
    tl.store(block, mine, mask=leads)
    tl.store(block + 1, first, mask=leads)
    tl.store(block + 2, start, mask=leads)
    tl.store(block + 3, start + count, mask=leads)


@jit
def moe_block(order, blocks, NT, ROUTED: tl.constexpr, BM: tl.constexpr):
    """Of this program: its block, the block's expert, its tile of NT, its pairs [BM], and which of them are."""
    block, slot = tl.program_id(0) // NT, tl.arange(0, BM)
    if ROUTED:
        at = blocks + 4 * block
        expert, first, begin, end = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        local, height = tl.program_id(0) - first * NT, (end - begin + BM - 1) // BM
        block, tile = first + local % height, local // height
        row = begin + local % height * BM + slot
        ok = row < end
        pair = tl.load(order + row, mask=ok, other=0)
    else:
        expert, tile, ok, pair = (
            tl.load(order + block),
            tl.program_id(0) % NT,
            slot == 0,
            block + tl.zeros([BM], tl.int32),
        )
    return block, expert.to(tl.int64), tile, pair, ok


@jit
def moe_last(counter, n):
    """Whether this program is the last of n to come by: it then sees what the others have stored. Not on CDNA, where
    stores may still be on their way to L2, which programs share, when a barrier is passed."""
    tl.debug_barrier()
    seen = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return seen == n - 1


@jit
def moe_pair(q, f, j: tl.constexpr, J: tl.constexpr, dtype: tl.constexpr):
    """The j-th value of both halves of words [..] times f: [.., 2]"""
    if (
        J == 4
    ):  # seeemm.. -> sign, and the lowest two bits of a bf16's exponent, the highest of its mantissa
        magnitude = (
            q << 6 if j == 0 else q << 2 if j == 1 else q >> 2 if j == 2 else q >> 6
        ) & 0x01C001C0
        sign = (q << 12 - 4 * j) & -0x7FFF8000
    else:
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
    w,
    s,
    row,
    k,
    stride,
    s_stride,
    J: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    dtype: tl.constexpr,
):
    """Rows of W from column k on, in the order that moe_order gives to x, times 2^-64: [BN, BK]"""
    B: tl.constexpr = BK // 128
    W: tl.constexpr = 64 // J  # words of 128 values
    q = tl.load(w + row[:, None] * stride + (k // (2 * J) + tl.arange(0, B * W))[None, :]).reshape(
        BN, B, W
    )
    if J == 4:
        if s.dtype.element_ty == tl.int32:  # four scales a word
            f = tl.load(s + row[:, None] * s_stride + (k // 128 + tl.arange(0, B))[None, :])
            f = tl.join(
                tl.join(f & 255, (f >> 16) & 255), tl.join((f >> 8) & 255, (f >> 24) & 255)
            ).reshape(BN, 4 * B)
        else:
            f = tl.load(s + row[:, None] * s_stride + (k // 32 + tl.arange(0, 4 * B))[None, :])
        f = tl.broadcast_to(f[:, :, None], [BN, 4 * B, W // 4]).reshape(BN, B, W)
    else:
        f = tl.load(s + (row // 128)[:, None] * s_stride + (k // 128 + tl.arange(0, B))[None, :])
        f = tl.broadcast_to(f[:, :, None], [BN, B, W])
    if f.dtype == tl.float32:
        f *= (
            4.611686018427388e18 if J == 4 else 7.205759403792794e16
        )  # 2^62, 2^56: 2^-64 of what the exponents lack
    else:
        f = (
            ((tl.minimum(f.to(tl.int32), 192) + (62 if J == 4 else 56)) << 7)
            .to(tl.int16)
            .to(tl.bfloat16, bitcast=True)
        )
    if J == 4:
        v = tl.join(
            tl.join(moe_pair(q, f, 0, J, dtype), moe_pair(q, f, 2, J, dtype)),
            tl.join(moe_pair(q, f, 1, J, dtype), moe_pair(q, f, 3, J, dtype)),
        )  # [BN, B, W, half, j / 2, j % 2]
        return tl.permute(v, (0, 1, 4, 5, 2, 3)).reshape(BN, BK)
    else:
        v = tl.join(moe_pair(q, f, 0, J, dtype), moe_pair(q, f, 1, J, dtype))
        return tl.permute(v, (0, 1, 4, 2, 3)).reshape(BN, BK)


@jit
def moe_values(w, s, o, i, ok, stride, s_stride, rows, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Elements (o, i) of W in dtype, byte by byte if packed. Blocks of 128 rows begin anew at every multiple of `rows`."""
    if FORMAT == "plain":
        return tl.load(w + o * stride + i, mask=ok, other=0.0)
    else:
        if FORMAT == "fp4":
            v = decode_e2m1(
                tl.load(w + o * stride + i // 2, mask=ok, other=0).to(tl.int32) >> i % 2 * 4
            )
            at = o * s_stride + i // 32
        else:
            v = decode_e4m3(tl.load(w + o * stride + i, mask=ok, other=0))
            at = (o // rows * ((rows + 127) // 128) + o % rows // 128) * s_stride + i // 128
        return (v * decode_scale(tl.load(s + at, mask=ok, other=0))).to(dtype)


@jit
def moe_weights(
    w,
    s,
    row,
    k,
    K,
    stride,
    s_stride,
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


class _Weights(NamedTuple):
    """How kernels read weights [E, o, i] and their scales."""

    w: torch.Tensor  # as they are; uint8, or int32 words, if packed
    s: torch.Tensor | None
    format: str  # "plain", "fp4", "fp8"
    J: int  # values in half a word; 0: there are none
    name: str

    @property
    def kind(self) -> str:
        return "words" if self.J else "plain" if self.w.dtype == torch.bfloat16 else "bytes"

    @property
    def strides(self):
        """Of w and s: an expert's, a row's."""
        return *self.w.stride()[:2], *((0, 0) if self.s is None else self.s.stride()[:2])


def _weights(w, s, dtype, words: bool = True) -> _Weights:
    w = w.contiguous()
    if s is None:
        return _Weights(w, None, "plain", 0, {2: "bf16", 4: "fp32"}[w.dtype.itemsize])
    s, form, w = s.contiguous(), "fp4" if w.dtype == torch.int8 else "fp8", w.view(torch.uint8)
    J = 4 if form == "fp4" else 2
    wide = lambda t: t.dtype != torch.uint8 or t.storage_offset() % 4 == 0 and t.shape[-1] % 4 == 0
    if (
        not words
        or dtype != torch.bfloat16
        or w.shape[-1] * J // 2 % 128
        or not wide(w)
        or form == "fp4"
        and not wide(s)
    ):
        return _Weights(w, s, form, 0, form)
    if form == "fp4" and s.dtype == torch.uint8:
        s = s.view(torch.int32)
    return _Weights(w.view(torch.int32), s, form, J, form)


# ---------------------------------------------------------------------------------------------------------------------
# Forward


@jit
def moe_dot(x, w, acc, SWAP: tl.constexpr):
    """acc + x w^T; SWAP: its transpose, so that w comes from registers and few tokens are the narrow side"""
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
    magic = (
        tl.maximum(power, 0.015625 * scale) * 1572864.0
    )  # 1.5 * 2^23 times the worth of the last bit: adding it rounds
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


@jit
def moe_zero(counters, n):
    for i in range(0, n, 1024):
        at = i + tl.arange(0, 1024)
        tl.store(counters + at, 0, mask=at < n)


@jit
def moe_begin(
    idx,
    counts,
    order,
    starts,
    blocks,
    x,
    out,
    zero,
    n,
    E,
    chunks,
    N,
    d,
    zeros,
    QUANT: tl.constexpr,
    J: tl.constexpr,
    C: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The first programs route (chunks of them), the others bring x [N, d] through fp8 and into the order of the weights."""
    program = tl.program_id(0)
    if zero is not None:
        if program == 0:
            moe_zero(zero, zeros)
    if order is not None:
        if program < chunks:
            moe_route(program, idx, counts, order, starts, blocks, n, E, chunks, BLOCK, C, EP)
        program -= chunks
    if x is not None:
        across = (d + BN - 1) // BN
        row = (program // across * BM + tl.arange(0, BM).to(tl.int64))[:, None]
        col = (program % across * BN + tl.arange(0, BN))[None, :]
        ok = (program >= 0) & (row < N) & (col < d)
        v = tl.load(x + row * d + col, mask=ok, other=0.0)
        if QUANT:
            v = moe_fp8(v, BM, BN, False)
        tl.store(out + row * d + col, moe_order(v, J, BM, BN, False), mask=ok)


@jit
def moe_hidden(
    gate,
    up,
    weight,
    h,
    limit,
    I,
    pair,
    col,
    ok,
    QUANT: tl.constexpr,
    ORDER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SWAP: tl.constexpr,
):
    """The SwiGLU of a tile, stored in h."""
    gate, up = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
    v = (gate / (1 + tl.exp(-gate)) * up * tl.load(weight + pair)).to(h.dtype.element_ty)
    if QUANT:
        v = moe_fp8(tl.where(col < I, v, 0.0), BM, BN, SWAP)
    tl.store(h + pair * I + col, moe_order(v, ORDER, BM, BN, SWAP), mask=ok)


@jit
def moe_finish(
    sums,
    weight,
    h,
    limit,
    n,
    I,
    pair,
    begin,
    ok,
    QUANT: tl.constexpr,
    ORDER: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
):
    """128 columns of h from those of sums [SPLIT, n, 2I], past the L1 cache."""
    col = begin + tl.arange(0, 128)[None, :]
    ok = ok & (col < I)
    gate, up = tl.zeros([BM, 128], tl.float32), tl.zeros([BM, 128], tl.float32)
    for part in tl.static_range(SPLIT):
        at = sums + (part * n + pair) * (2 * I) + col
        gate += tl.load(at, mask=ok, other=0.0, cache_modifier=".cg")
        up += tl.load(at + I, mask=ok, other=0.0, cache_modifier=".cg")
    moe_hidden(gate, up, weight, h, limit, I, pair, col, ok, QUANT, ORDER, BM, 128, False)


@jit
def moe_up(
    x,
    w,
    s,
    order,
    starts,
    blocks,
    weight,
    h,
    sums,
    seen,
    zero,
    limit,
    n,
    K,
    E,
    I,
    d,
    w_expert,
    w_row,
    s_expert,
    s_row,
    NT,
    zeros,
    FORMAT: tl.constexpr,
    J: tl.constexpr,
    EVEN: tl.constexpr,
    ROUTED: tl.constexpr,
    QUANT: tl.constexpr,
    ORDER: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """h [n, I]. If there are sums [SPLIT, n, 2I] they get those of gate and up, over parts of d; the program that completes
    128 columns of both makes h of them, if it is counted in `seen`."""
    if zero is not None:
        if tl.program_id(0) + tl.program_id(1) == 0:
            moe_zero(zero, zeros)
    if ROUTED:
        if tl.program_id(0) // NT >= tl.load(starts + E + 1):
            return
    block, expert, tile, pair, ok = moe_block(order, blocks, NT, ROUTED, BM)
    col = tile * BN + tl.arange(0, BN)
    row = tl.minimum(col, I - 1)
    dtype: tl.constexpr = x.dtype.element_ty
    w += expert * w_expert
    if FORMAT != "plain":
        s += expert * s_expert
    pair = pair.to(tl.int64)
    x += (pair // K)[:, None] * d
    gate = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    up = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    part = (d + SPLIT * BK - 1) // (SPLIT * BK) * BK
    begin = tl.program_id(1) * part
    for k in range(begin, tl.minimum(begin + part, d), BK):
        i = (k + tl.arange(0, BK))[None, :]
        xs = tl.load(x + i, mask=ok[:, None] if EVEN else ok[:, None] & (i < d), other=0.0)
        gate = moe_dot(
            xs,
            moe_weights(w, s, row, k, d, w_row, s_row, FORMAT, J, EVEN, BN, BK, dtype),
            gate,
            SWAP,
        )
        s3 = s if FORMAT == "plain" else s + s_expert // 2
        up = moe_dot(
            xs,
            moe_weights(w + I * w_row, s3, row, k, d, w_row, s_row, FORMAT, J, EVEN, BN, BK, dtype),
            up,
            SWAP,
        )
    if J:
        gate, up = gate * 18446744073709551616.0, up * 18446744073709551616.0  # 2^64
    columns, pairs = (
        col[:, None] if SWAP else col[None, :],
        pair[None, :] if SWAP else pair[:, None],
    )
    inside = (ok[None, :] if SWAP else ok[:, None]) & (columns < I)
    if sums is None:
        moe_hidden(
            gate, up, weight, h, limit, I, pairs, columns, inside, QUANT, ORDER, BM, BN, SWAP
        )
    else:
        at = sums + (tl.program_id(1).to(tl.int64) * n + pairs) * (2 * I) + columns
        tl.store(at, gate.to(sums.dtype.element_ty), mask=inside)
        tl.store(at + I, up.to(sums.dtype.element_ty), mask=inside)
        if seen is not None:
            G: tl.constexpr = 128 // BN  # tiles of 128 columns
            group = tile // G
            if moe_last(
                seen + block * ((I + 127) // 128) + group, SPLIT * tl.minimum(G, NT - group * G)
            ):
                moe_finish(
                    sums,
                    weight,
                    h,
                    limit,
                    n,
                    I,
                    pair[:, None],
                    group * 128,
                    ok[:, None],
                    QUANT,
                    ORDER,
                    SPLIT,
                    BM,
                )


@jit
def moe_act(
    sums, weight, h, limit, n, I, QUANT: tl.constexpr, ORDER: tl.constexpr, SPLIT: tl.constexpr
):
    moe_finish(
        sums,
        weight,
        h,
        limit,
        n,
        I,
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * 128,
        True,
        QUANT,
        ORDER,
        SPLIT,
        1,
    )


@jit
def moe_add(pairs, y, idx, row, col, N, d, E, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows [BM, 1] and columns [1, BN] of y [N, d]: the sum of pairs [N, K, d] that have an expert, in fp32 and in order."""
    ok, total = (row < N) & (col < d), tl.zeros([BM, BN], tl.float32)
    for k in tl.static_range(K):
        has = ok if idx is None else ok & (tl.load(idx + row * K + k, mask=row < N, other=E) < E)
        total += tl.load(
            pairs + (row * K + k) * d + col, mask=has, other=0.0, cache_modifier=".cg"
        ).to(tl.float32)
    tl.store(y + row * d + col, total.to(y.dtype.element_ty), mask=ok)


@jit
def moe_down(
    h,
    w,
    s,
    order,
    starts,
    blocks,
    out,
    y,
    seen,
    K,
    E,
    O,
    I,
    rows,
    w_expert,
    w_row,
    s_expert,
    s_row,
    NT,
    FORMAT: tl.constexpr,
    J: tl.constexpr,
    EVEN: tl.constexpr,
    ROUTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr,
    TERMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """out [n, O] = h [n / K, I] W^T; TRANSPOSED: h W, of W [I, O]. Each pair has a row of out, and h one for every K.
    If there is y [1, O], of one token: the program that completes a tile, as `seen` counts, adds the TERMS rows of out."""
    if ROUTED:
        if tl.program_id(0) // NT >= tl.load(starts + E + 1):
            return
    block, expert, tile, pair, ok = moe_block(order, blocks, NT, ROUTED, BM)
    col = tile * BN + tl.arange(0, BN)
    row = tl.minimum(col, O - 1)
    dtype: tl.constexpr = h.dtype.element_ty
    w += expert * w_expert
    if FORMAT != "plain":
        s += expert * s_expert
    pair = pair.to(tl.int64)
    h += (pair // K)[:, None] * I
    acc = tl.zeros([BN, BM] if SWAP else [BM, BN], tl.float32)
    for k in range(0, I, BK):
        i = (k + tl.arange(0, BK))[None, :]
        hs = tl.load(h + i, mask=ok[:, None] if EVEN else ok[:, None] & (i < I), other=0.0)
        if TRANSPOSED:
            i, inside = (k + tl.arange(0, BK))[:, None], (col < O)[None, :]
            ws = moe_values(
                w,
                s,
                i,
                col[None, :],
                inside if EVEN else inside & (i < I),
                w_row,
                s_row,
                rows,
                FORMAT,
                dtype,
            )
            ws = tl.trans(ws)
        else:
            ws = moe_weights(w, s, row, k, I, w_row, s_row, FORMAT, J, EVEN, BN, BK, dtype)
        acc = moe_dot(hs, ws, acc, SWAP)
    if J:
        acc *= 18446744073709551616.0
    at, inside = pair[:, None] * O + col[None, :], ok[:, None] & (col < O)[None, :]
    if SWAP:
        at, inside = tl.trans(at), tl.trans(inside)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
    if y is not None:
        if moe_last(seen + tile, TERMS):
            moe_add(out, y, None, 0, col[None, :], 1, O, E, TERMS, 1, BN)


@jit
def moe_sum(pairs, y, idx, N, d, E, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    moe_add(
        pairs, y, idx, row, (tl.program_id(1) * BN + tl.arange(0, BN))[None, :], N, d, E, K, BM, BN
    )


# ---------------------------------------------------------------------------------------------------------------------
# Backward


@jit
def moe_act_backward(
    sums,
    g_h,
    weight,
    g_weight,
    limit,
    n,
    I,
    QUANT: tl.constexpr,
    H: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """From gate and up, sums [n, 2I], and the gradient g_h [n, I] of h those of gate, up and weight [n]; and h.
    In place: the first two become sums, h becomes g_h."""
    pair = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    w, g_w = tl.load(weight + pair, mask=pair < n, other=0.0), tl.zeros([BM, BN], tl.float32)
    for i in range(0, I, BN):
        col = i + tl.arange(0, BN)[None, :]
        ok, at, to = (pair < n) & (col < I), sums + pair * 2 * I + col, g_h + pair * I + col
        a, b = (
            tl.load(at, mask=ok, other=0.0).to(tl.float32),
            tl.load(at + I, mask=ok, other=0.0).to(tl.float32),
        )
        g = tl.load(to, mask=ok, other=0.0).to(tl.float32)
        gate, up = tl.minimum(a, limit), tl.minimum(tl.maximum(b, -limit), limit)
        sig = 1 / (1 + tl.exp(-gate))
        silu = gate * sig
        g_w += g * silu * up
        tl.store(
            at,
            tl.where(a <= limit, g * w * up * sig * (1 + gate - silu), 0.0).to(
                g_h.dtype.element_ty
            ),
            mask=ok,
        )
        tl.store(
            at + I,
            tl.where(tl.abs(b) <= limit, g * w * silu, 0.0).to(g_h.dtype.element_ty),
            mask=ok,
        )
        if H:
            h = (silu * up * w).to(g_h.dtype.element_ty)
            if QUANT:
                h = moe_fp8(h, BM, BN, False)
            tl.store(to, h, mask=ok)
    tl.store(g_weight + pair, tl.sum(g_w, 1)[:, None], mask=pair < n)


@jit
def moe_outer(
    a, b, order, starts, out, A, B, KA, KB, BA: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr
):
    """out [E, A, B]: of each expert, the sum over its pairs of a's row times b's; row pair / KA of a, pair / KB of b."""
    tiles_b = (B + BB - 1) // BB
    per = (A + BA - 1) // BA * tiles_b
    expert, tile = tl.program_id(0) // per, tl.program_id(0) % per
    i, j = tile // tiles_b * BA + tl.arange(0, BA), tile % tiles_b * BB + tl.arange(0, BB)
    acc = tl.zeros([BA, BB], tl.float32)
    end = tl.load(starts + expert + 1)
    for r in range(tl.load(starts + expert), end, BK):
        row = r + tl.arange(0, BK)
        pair = tl.load(order + row, mask=row < end, other=0)
        as_ = tl.load(
            a + (pair // KA).to(tl.int64)[:, None] * A + i[None, :],
            mask=(row < end)[:, None] & (i < A)[None, :],
            other=0.0,
        )
        bs = tl.load(
            b + (pair // KB).to(tl.int64)[:, None] * B + j[None, :],
            mask=(row < end)[:, None] & (j < B)[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(as_), bs, acc, input_precision="ieee")
    at = out + (expert.to(tl.int64) * A + i.to(tl.int64)[:, None]) * B + j[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(i < A)[:, None] & (j < B)[None, :])


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def _blocks(n: int, E: int, BM: int) -> int:
    """How many blocks there can be."""
    return (n + min(n, E) * (BM - 1)) // BM


class _Route(NamedTuple):
    """See moe_route; without one, order is idx, and every pair a block."""

    order: torch.Tensor
    starts: torch.Tensor | None
    blocks: torch.Tensor | None
    height: int  # BM
    number: int  # of blocks, at most

    @property
    def routed(self):
        return self.blocks is not None


def _begin(
    idx, E: int, BM: int, x, quant: bool, J: int, zero=None, routed: bool = True
) -> tuple[_Route, torch.Tensor]:
    """-> the route, and x as `up` wants it. Few pairs take one launch."""
    n, (N, d), enters = idx.numel(), x.shape, quant or J > 0
    empty = lambda *size: torch.empty(size, dtype=torch.int32, device=x.device)
    route, counts, out = _Route(idx, None, None, BM, n), None, torch.empty_like(x) if enters else x
    chunks, C, EP = cdiv(n, PLACED) * routed, min(PLACED, power_of_two(n, 16)), power_of_two(E + 1)
    if routed:
        number = _blocks(n, E, BM)
        route = _Route(empty(n), empty(E + 2), empty(number, 4), BM, number)
    if chunks > 1:
        counts = empty(chunks, EP)
        launch(moe_count, (chunks,), idx, counts, n, C=C, EP=EP, num_warps=4)
    rows, cols, warps = (8, 512, 4) if chunks > 1 else (1, 512, 8)
    programs = cdiv(N, rows) * cdiv(d, cols) * enters

    def begin(chunks: int, programs: int, zero):
        launch(
            moe_begin,
            (max(chunks + programs, zero is not None),),
            idx,
            counts,
            *(route[:3] if chunks else (None,) * 3),
            *((x, out) if programs else (None, None)),
            zero,
            n,
            E,
            chunks,
            N,
            d,
            0 if zero is None else zero.numel(),
            QUANT=quant,
            J=J,
            C=C,
            EP=EP,
            BLOCK=BM,
            BM=rows,
            BN=cols,
            num_warps=8 if chunks else warps,
        )

    if chunks > 1:
        begin(chunks, 0, zero)
        begin(0, programs, None)
    else:
        begin(chunks, programs, zero)
    return route, out


# Tiles of up and down by kind of weights and rows of an expert: (BM,) BN, BK, warps, stages, SWAP(, SPLIT).
UP = {
    ("plain", 16): [
        (16, 64, 128, 4, 4, 1, 1),
        (16, 64, 64, 4, 4, 1, 1),
        (16, 32, 128, 2, 4, 1, 1),
        (16, 32, 64, 2, 4, 1, 1),
    ],
    ("plain", 32): [(32, 128, 64, 4, 4, 1, 1), (32, 64, 64, 4, 4, 1, 1), (32, 64, 64, 4, 3, 1, 1)],
    ("plain", 128): [
        (128, 128, 64, 8, 4, 0, 1),
        (128, 128, 64, 8, 3, 0, 1),
        (64, 128, 64, 4, 3, 0, 1),
        (64, 128, 64, 4, 2, 0, 1),
        (128, 64, 64, 8, 3, 0, 1),
        (64, 64, 32, 4, 3, 0, 1),
    ],
    ("words", 16): [
        (16, 128, 128, 8, 3, 1, 1),
        (16, 64, 256, 4, 3, 1, 1),
        (16, 64, 128, 4, 4, 1, 1),
        (16, 64, 128, 4, 3, 1, 2),
        (16, 32, 128, 2, 3, 1, 1),
    ],
    ("words", 32): [
        (32, 128, 128, 8, 3, 1, 1),
        (32, 128, 128, 4, 3, 1, 1),
        (32, 128, 128, 8, 2, 1, 1),
    ],
    ("words", 128): [
        (128, 128, 128, 8, 3, 1, 1),
        (64, 128, 128, 8, 3, 1, 1),
        (64, 128, 128, 8, 2, 1, 1),
        (32, 128, 128, 8, 2, 1, 1),
    ],
    ("bytes", 16): [(16, 64, 32, 4, 2, 0, 1)],
    ("bytes", 32): [(32, 64, 32, 4, 2, 0, 1)],
    ("bytes", 128): [(64, 64, 32, 4, 2, 0, 1)],
}
DOWN = {
    ("plain", 16): [(64, 128, 4, 4, 1), (64, 64, 4, 4, 1), (32, 128, 2, 4, 1), (64, 64, 4, 3, 1)],
    ("plain", 32): [(128, 64, 4, 4, 1), (64, 64, 4, 4, 1), (64, 64, 4, 3, 1)],
    ("plain", 128): [
        (256, 64, 8, 4, 0),
        (256, 64, 8, 3, 0),
        (128, 64, 8, 3, 0),
        (128, 32, 8, 3, 0),
    ],
    ("words", 16): [
        (128, 128, 4, 3, 1),
        (64, 256, 4, 4, 1),
        (64, 128, 4, 4, 1),
        (32, 128, 2, 4, 1),
    ],
    ("words", 32): [(128, 128, 8, 3, 1), (128, 128, 4, 3, 1), (64, 128, 4, 2, 1)],
    ("words", 128): [(128, 128, 8, 3, 1), (128, 128, 8, 2, 1), (64, 128, 4, 2, 1)],
    ("bytes", 16): [(64, 32, 4, 2, 0)],
    ("bytes", 32): [(64, 32, 4, 2, 0)],
    ("bytes", 128): [(64, 32, 4, 2, 0)],
}


def _tiles(table: dict, w: _Weights, rows: int, inner: int) -> list[dict]:
    names = ["BM"] * (table is UP) + ["BN", "BK", "num_warps", "num_stages", "SWAP", "SPLIT"]
    found = [
        dict(zip(names, tile))
        for tile in table[w.kind, 16 if rows <= 16 else 32 if rows <= 32 else 128]
    ]
    return [tile for tile in found if not w.J or inner % tile["BK"] == 0]


def _load(n: int, E: int) -> tuple[str, int]:
    """What of the number of pairs matters to the tiles: their number if there are few, else how many an expert has."""
    rows = 1 if n <= E else power_of_two(cdiv(n, E))
    return f"rows~{rows}" if n > E else f"pairs~{power_of_two(n)}", rows


def _up_tile(w: _Weights, d: int, I: int, key: str, rows: int, x, quant: bool = False) -> dict:
    found = _tiles(UP, w, rows, d)
    whole = [
        tile for tile in found if tile["BN"] % 128 == 0
    ]  # others round h by way of fp32 sums, gigabytes for long prompts
    return get_config(
        "moe_up",
        f"{w.name} d{d} I{I} {key}" + " quant" * quant,
        quant and rows > 16 and whole or found,
        x,
    )


def _down_tile(w: _Weights, I: int, O: int, BM: int, key: str, x, transposed: bool = False) -> dict:
    return get_config(
        "moe_down",
        f"{w.name} {I}x{O} BM{BM} {key}" + " transposed" * transposed,
        _tiles(DOWN, w, BM, I),
        x,
    )


def _up(
    x,
    w: _Weights,
    route: _Route,
    weight,
    K: int,
    I: int,
    limit: float,
    cfg: dict,
    h,
    sums,
    quant=False,
    order=0,
    seen=None,
    zero=None,
):
    """Fills h or sums or both, see moe_up."""
    E, d, n, NT = len(w.w), x.shape[1], weight.numel(), cdiv(I, cfg["BN"])
    launch(
        moe_up,
        (route.number * NT, cfg["SPLIT"]),
        x,
        w.w,
        w.s,
        *route[:3],
        weight,
        h,
        sums,
        seen,
        zero,
        limit,
        n,
        K,
        E,
        I,
        d,
        *w.strides,
        NT,
        0 if zero is None else zero.numel(),
        FORMAT=w.format,
        J=w.J,
        EVEN=d % cfg["BK"] == 0,
        ROUTED=route.routed,
        QUANT=quant,
        ORDER=order,
        **cfg,
    )


def _down(
    h,
    w: _Weights,
    route: _Route,
    n: int,
    K: int,
    O: int,
    rows: int,
    cfg: dict,
    transposed=False,
    y=None,
    seen=None,
):
    """h [n / K, i] through w of every pair's expert: [n, O]. Blocks of scales begin anew every so many rows of w."""
    I, E, NT, out = h.shape[1], len(w.w), cdiv(O, cfg["BN"]), h.new_empty(n, O)
    launch(
        moe_down,
        (route.number * NT,),
        h,
        w.w,
        w.s,
        *route[:3],
        out,
        y,
        seen,
        K,
        E,
        O,
        I,
        rows,
        *w.strides,
        NT,
        FORMAT=w.format,
        J=w.J,
        EVEN=I % cfg["BK"] == 0,
        ROUTED=route.routed,
        TRANSPOSED=transposed,
        TERMS=1 if y is None else n,
        BM=route.height,
        **cfg,
    )
    return out


def _sum(pairs, idx, E: int, dtype):
    """[N K, d] -> [N, d]"""
    N = len(idx)
    (n, d), BM = pairs.shape, 8 if N > 64 else 1
    y = pairs.new_empty(N, d, dtype=dtype)
    launch(
        moe_sum,
        (cdiv(N, BM), cdiv(d, 512)),
        pairs,
        y,
        idx,
        N,
        d,
        E,
        K=n // N,
        BM=BM,
        BN=512,
        num_warps=8 if N > 64 else 2,
    )
    return y


def forward(x, w13, w2, idx, weight, s13, s2, limit, act_quant):
    (N, d), E, I, (n, K) = x.shape, len(w2), w13.shape[1] // 2, (idx.numel(), idx.shape[1])
    if not n * d * I:
        return x.new_zeros(N, d, dtype=torch.float32)
    w13, w2, one = _weights(w13, s13, x.dtype), _weights(w2, s2, x.dtype), N == 1
    counted = not arch(x).startswith("gfx")  # there a barrier does not wait for stores
    x, idx, weight, (key, rows) = x.contiguous(), idx.contiguous(), weight.contiguous(), _load(n, E)
    up = _up_tile(w13, d, I, key, rows, x, act_quant)
    down = _down_tile(w2, I, d, up["BM"], key, x)
    counters = lambda size: torch.empty(size, dtype=torch.int32, device=x.device)
    h, sums, seen, y, seen_y = x.new_empty(n, I), None, None, None, None
    if up["SPLIT"] > 1 or (act_quant or w2.J) and up["BN"] % 128:
        sums = x.new_empty(up["SPLIT"], n, 2 * I, dtype=torch.float32)
        seen = counters((n if one else _blocks(n, E, up["BM"])) * cdiv(I, 128)) if counted else None
    if one and counted:
        y, seen_y = x.new_empty(1, d, dtype=torch.float32), counters(cdiv(d, down["BN"]))
    route, x = _begin(idx, E, up["BM"], x, act_quant, w13.J, seen, routed=not one)
    _up(x, w13, route, weight, K, I, limit, up, h, sums, act_quant, w2.J, seen, seen_y)
    if sums is not None and seen is None:
        launch(
            moe_act,
            (n, cdiv(I, 128)),
            sums,
            weight,
            h,
            limit,
            n,
            I,
            QUANT=act_quant,
            ORDER=w2.J,
            SPLIT=up["SPLIT"],
            num_warps=1,
        )
    out = _down(h, w2, route, n, 1, d, d, down, y=y, seen=seen_y)
    return _sum(out, idx, E, torch.float32) if y is None else y


def _outer(a, b, route: _Route, E: int, n: int, key: str):
    """[n / KA, A], [n / KB, B] -> [E, A, B]"""
    A, B, dtype = a.shape[1], b.shape[1], a.dtype
    candidates = (
        [dict(BA=64, BB=64, BK=32, num_warps=4, num_stages=2)]
        if dtype == torch.float32
        else [
            dict(BA=128, BB=256, BK=64, num_warps=8, num_stages=3),
            dict(BA=128, BB=128, BK=64, num_warps=8, num_stages=3),
            dict(BA=128, BB=128, BK=32, num_warps=8, num_stages=3),
        ]
    )
    cfg = get_config(
        "moe_outer", f"{A}x{B} {key} {'fp32' if dtype == torch.float32 else 'bf16'}", candidates, a
    )
    out = a.new_empty(E, A, B)
    launch(
        moe_outer,
        (E * cdiv(A, cfg["BA"]) * cdiv(B, cfg["BB"]),),
        a,
        b,
        *route[:2],
        out,
        A,
        B,
        n // len(a),
        n // len(b),
        **cfg,
    )
    return out


def backward(g, x, w13, w2, idx, weight, s13, s2, limit, act_quant):
    (N, d), E, I, (n, K) = x.shape, len(w2), w13.shape[1] // 2, (idx.numel(), idx.shape[1])
    frozen, shapes, dtype = s13 is not None, (w13.shape, w2.shape), x.dtype
    if not n * d * I:
        return (
            x.new_zeros(N, d),
            *(x.new_zeros(0 if frozen else shape) for shape in shapes),
            torch.zeros_like(weight),
        )
    rows13, rows2, columns13 = (
        _weights(w13, s13, dtype),
        _weights(w2, s2, dtype, False),
        _weights(w13, s13, dtype, False),
    )
    g, x, idx, weight, (key, rows) = (
        g.to(dtype).contiguous(),
        x.contiguous(),
        idx.contiguous(),
        weight.contiguous(),
        _load(n, E),
    )
    up = dict(_up_tile(rows13, d, I, key, rows, x), SPLIT=1)
    through = lambda h, w, K, O, rows: _down(
        h, w, route, n, K, O, rows, _down_tile(w, h.shape[1], O, up["BM"], key, h, True), True
    )
    route, x = _begin(idx, E, up["BM"], x, act_quant, rows13.J)
    g_13, g_weight = x.new_empty(n, 2 * I), torch.empty_like(weight)
    _up(x, rows13, route, weight, K, I, limit, up, None, g_13)
    h = through(g, rows2, K, I, d)
    launch(
        moe_act_backward,
        (cdiv(n, 4),),
        g_13,
        h,
        weight,
        g_weight,
        limit,
        n,
        I,
        QUANT=act_quant,
        H=not frozen,
        BM=4,
        BN=512,
        num_warps=4,
    )
    g_x = _sum(through(g_13, columns13, 1, d, I), idx, E, dtype)
    if frozen:
        return g_x, x.new_empty(0), x.new_empty(0), g_weight
    return g_x, _outer(g_13, x, route, E, n, key), _outer(g, h, route, E, n, key), g_weight
