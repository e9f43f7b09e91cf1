"""Routing of moe (see moe.py): the pairs sorted by expert, in blocks of one expert each.

A stable counting sort in one launch, or two where pairs are many. Each chunk of pairs is placed by
a program of its own, which reads how many pairs of each expert the chunks before it have.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import cdiv, jit, launch, power_of_two, tl
from .moe_values import moe_fp8, moe_order

CHUNK = 256  # pairs that one program places


@jit
def moe_count(idx, counts, n, C: tl.constexpr, EP: tl.constexpr):
    """counts [chunks, EP]: pairs of every expert, in each chunk of C."""
    i = tl.program_id(0) * C + tl.arange(0, C)
    e = tl.load(idx + i, mask=i < n, other=EP - 1).to(tl.int32)
    tl.store(counts + tl.program_id(0) * EP + tl.arange(0, EP), tl.histogram(e, EP))


@jit
def moe_route(
    # the chunk of this program
    c,
    # experts of pairs [n]; pairs of experts in chunks [chunks, EP], or None: there is one chunk
    idx,
    counts,
    # results
    order,
    starts,
    blocks,
    # shapes: pairs, experts, chunks
    n,
    E,
    chunks,
    # sizes: of a block, of a chunk, of a row of counts
    BM: tl.constexpr,
    C: tl.constexpr,
    EP: tl.constexpr,
):
    """order [n]: pairs by expert
    starts [E + 2]: where experts begin in it, then n and the number of blocks
    blocks [.., 4]: expert, first block of the expert, where the expert begins and ends in order
    """
    J: tl.constexpr = C if C < 64 else 64
    i = c * C + tl.arange(0, C)
    expert = tl.load(idx + i, mask=i < n, other=1 << 30).to(tl.int32)
    # rank [C]: of each pair among those of its expert; first within the chunk
    rank = tl.zeros([C], tl.int32)
    for j0 in range(0, C, J):
        j = c * C + j0 + tl.arange(0, J)
        other = tl.load(idx + j, mask=j < n, other=-1).to(tl.int32)
        earlier = (other[:, None] == expert[None, :]) & (j[:, None] < i[None, :])
        rank += tl.sum(earlier.to(tl.int32), 0)
    # Of each pair's expert: where it begins, its first block, its number of pairs
    start = tl.zeros([C], tl.int32)
    first = tl.zeros([C], tl.int32)
    count = tl.zeros([C], tl.int32)
    pairs_before, blocks_before = 0, 0
    for e0 in range(0, E, 64):
        e = e0 + tl.arange(0, 64)
        less = e[:, None] < expert[None, :]
        same = (e[:, None] == expert[None, :]) & (e < E)[:, None]
        # total [64]: pairs of these experts; those in earlier chunks come first in their rank
        if counts is None:
            total = tl.sum(same.to(tl.int32), 1)
        else:
            total = tl.zeros([64], tl.int32)
            before = tl.zeros([64], tl.int32)
            for c0 in range(0, chunks, 64):
                row = c0 + tl.arange(0, 64)[:, None]
                mask = (row < chunks) & (e < E)[None, :]
                chunk_counts = tl.load(counts + row * EP + e[None, :], mask=mask, other=0)
                total += tl.sum(chunk_counts, 0)
                before += tl.sum(tl.where(row < c, chunk_counts, 0), 0)
            rank += tl.sum(tl.where(same, before[:, None], 0), 0)
        block_count = (total + BM - 1) // BM
        start += tl.sum(tl.where(less, total[:, None], 0), 0)
        first += tl.sum(tl.where(less, block_count[:, None], 0), 0)
        count += tl.sum(tl.where(same, total[:, None], 0), 0)
        begin = pairs_before + tl.cumsum(total, 0) - total
        tl.store(starts + e, begin, mask=(e < E) & (c == 0))
        pairs_before += tl.sum(total, 0)
        blocks_before += tl.sum(block_count, 0)
    tl.store(starts + E, pairs_before, mask=c == 0)
    tl.store(starts + E + 1, blocks_before, mask=c == 0)
    tl.store(order + start + rank, i, mask=i < n)
    # The first pair of a block writes the block
    leads = (i < n) & (expert < E) & (rank % BM == 0)
    block = blocks + 4 * (first + rank // BM)
    tl.store(block, expert, mask=leads)
    tl.store(block + 1, first, mask=leads)
    tl.store(block + 2, start, mask=leads)
    tl.store(block + 3, start + count, mask=leads)


@jit
def moe_block(order, blocks, NT, ROUTED: tl.constexpr, BM: tl.constexpr):
    """Of this program: block, the block's expert, tile of NT, pairs [BM] and their mask."""
    block = tl.program_id(0) // NT
    slot = tl.arange(0, BM)
    if ROUTED:
        ptr = blocks + 4 * block
        expert = tl.load(ptr)
        first = tl.load(ptr + 1)
        begin = tl.load(ptr + 2)
        end = tl.load(ptr + 3)
        # The programs of an expert, tile by tile: those of a tile share its weights
        local = tl.program_id(0) - first * NT
        height = (end - begin + BM - 1) // BM
        block = first + local % height
        tile = local // height
        row = begin + local % height * BM + slot
        mask = row < end
        pair = tl.load(order + row, mask=mask, other=0)
    else:
        expert = tl.load(order + block)
        tile = tl.program_id(0) % NT
        mask = slot == 0
        pair = block + tl.zeros([BM], tl.int32)
    return block, expert.to(tl.int64), tile, pair, mask


@jit
def moe_last(counter, n):
    """Whether this program is the last of n to come by: it then sees the stores of the others.

    Not on CDNA, where stores may still be on their way to L2, which programs share, when a barrier
    is passed.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == n - 1


@jit
def moe_zero(counters, n):
    for i in range(0, n, 1024):
        offs = i + tl.arange(0, 1024)
        tl.store(counters + offs, 0, mask=offs < n)


@jit
def moe_begin(
    # routing, see moe_route; no order: there is none
    idx,
    counts,
    order,
    starts,
    blocks,
    # x [N, d] to out, in fp8 values and the order of the weights; or None
    x,
    out,
    # counters to be zeroed, or None
    zero,
    # shapes: pairs, experts, chunks, tokens, columns, counters
    n,
    E,
    chunks,
    N,
    d,
    zeros,
    # of x: act_quant, values in half a word of the weights
    QUANT: tl.constexpr,
    J: tl.constexpr,
    # sizes: of a chunk, of a row of counts, of a block; tile of x
    C: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The first programs route (chunks of them), the others prepare x."""
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
        mask = (program >= 0) & (row < N) & (col < d)
        v = tl.load(x + row * d + col, mask=mask, other=0.0)
        if QUANT:
            v = moe_fp8(v, BM, BN, False)
        tl.store(out + row * d + col, moe_order(v, J, BM, BN, False), mask=mask)


def max_blocks(n: int, E: int, BM: int) -> int:
    """How many blocks there can be: each expert's last may hold a single pair."""
    return (n + min(n, E) * (BM - 1)) // BM


class Route(NamedTuple):
    """See moe_route; without one, order is idx, and every pair a block."""

    order: torch.Tensor
    starts: torch.Tensor | None
    blocks: torch.Tensor | None
    height: int  # pairs of a block, at most
    number: int  # of blocks, at most

    @property
    def routed(self) -> bool:
        return self.blocks is not None


def begin(
    idx: torch.Tensor,
    E: int,
    BM: int,
    x: torch.Tensor,
    quant: bool,
    J: int,
    zero: torch.Tensor | None = None,
    routed: bool = True,
) -> tuple[Route, torch.Tensor]:
    """-> the route, and x as `up` wants it. Few pairs take one launch."""
    n, (N, d) = idx.numel(), x.shape
    prepared = quant or J > 0
    out = torch.empty_like(x) if prepared else x
    chunks = cdiv(n, CHUNK) * routed
    sizes = dict(C=min(CHUNK, power_of_two(n, 16)), EP=power_of_two(E + 1))
    route, counts = Route(idx, None, None, BM, n), None
    if routed:
        number = max_blocks(n, E, BM)
        order, starts, blocks = (_int32(x, *size) for size in ((n,), (E + 2,), (number, 4)))
        route = Route(order, starts, blocks, BM, number)
    if chunks > 1:
        counts = _int32(x, chunks, sizes["EP"])
        launch(moe_count, (chunks,), idx, counts, n, **sizes, num_warps=4)
    rows, cols, warps = (8, 512, 4) if chunks > 1 else (1, 512, 8)
    programs = cdiv(N, rows) * cdiv(d, cols) * prepared

    def run(chunks: int, programs: int, zero: torch.Tensor | None) -> None:
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
            **sizes,
            BLOCK=BM,
            BM=rows,
            BN=cols,
            num_warps=8 if chunks else warps,
        )

    if chunks > 1:
        run(chunks, 0, zero)
        run(0, programs, None)
    else:
        run(chunks, programs, zero)
    return route, out


def _int32(like: torch.Tensor, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int32, device=like.device)
