"""Merging the candidates of all splits: the second Triton kernel of indexer_topk (see there)."""

from __future__ import annotations

import torch

from ..launch import cdiv, jit, launch, power_of_two, tl
from .indexer_topk_select import indexer_topk_select

LARGEST_K = 4096  # more are left to the reference
WIDEST = 16384  # keys that one program merges
assert WIDEST >= 2 * LARGEST_K  # so that every round of merging leaves fewer lists


@jit
def indexer_topk_store_state(
    state_ptr,
    row,
    # entries that are scored, those of a split, and how many of a split are not listed
    begin,
    end,
    part,
    dense,
    # of each token [BQ]: whether it needs scores, whether it exists
    scored,
    mask_q,
    BQ: tl.constexpr,
    KP: tl.constexpr,
):
    """For the merge: the number of keys, and the entry of the first, -1 if entries are listed."""
    offs_q = tl.arange(0, BQ)
    listed_size = (end - begin + part - 1) // tl.maximum(part, 1) * KP
    size = tl.where(part <= dense, end - begin, listed_size)
    state_ptrs = state_ptr + 2 * (row + offs_q)
    tl.store(state_ptrs, tl.where(scored, size, 0), mask=mask_q)
    base = tl.where(offs_q >= 0, tl.where(part <= dense, begin, -1), 0)
    tl.store(state_ptrs + 1, base, mask=mask_q)


@jit
def indexer_topk_merge(
    # lists of keys [B T, width] and their entries; state: their numbers of keys, and the first
    # entry or -1
    best_ptr,
    best_entry_ptr,
    state_ptr,
    # result [B, T, K]; unless it is the last round, lists for the next one
    idx_ptr,
    next_ptr,
    next_entry_ptr,
    next_state_ptr,
    width,
    next_width,
    K: tl.constexpr,
    KP: tl.constexpr,
    # keys of a program, keys at a time
    N: tl.constexpr,
    C: tl.constexpr,
):
    """The K best of each N keys of a row: the choice if there are no more, else, listed, to be
    merged again.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    count = tl.load(state_ptr + 2 * row)
    base = tl.load(state_ptr + 2 * row + 1)
    if next_ptr is not None:
        if group == 0:
            next_count = tl.where(count > N, (count + N - 1) // N * KP, 0)
            tl.store(next_state_ptr + 2 * row, next_count)
            tl.store(next_state_ptr + 2 * row + 1, -1)
    if group * N < count:
        offs = row * width + group * N
        size = tl.minimum(count - group * N, N)
        listed = tl.where(base < 0, size, 0)
        base = base + group * N
        if next_ptr is None or count <= N:
            indexer_topk_select(
                best_ptr + offs,
                best_entry_ptr + offs,
                1,
                listed,
                base,
                size,
                True,
                None,
                idx_ptr + row * K,
                0,
                K,
                KP,
                N,
                1,
                C,
            )
        else:
            offs_next = row * next_width + group * KP
            indexer_topk_select(
                best_ptr + offs,
                best_entry_ptr + offs,
                1,
                listed,
                base,
                size,
                True,
                next_ptr + offs_next,
                next_entry_ptr + offs_next,
                0,
                K,
                KP,
                N,
                1,
                C,
            )


def make_lists(like: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, ...]:
    """Keys, entries and state of `rows` lists."""
    return tuple(like.new_empty(rows, n, dtype=torch.int32) for n in (width, width, 2))


def merge(best: tuple, idx: torch.Tensor, width: int, K: int, KP: int) -> None:
    """Choose the K best of each row's lists, in as many rounds as it takes."""
    B, T, _ = idx.shape
    while True:
        N = power_of_two(width)
        if N > WIDEST:  # more rounds, of about the same width
            N = min(WIDEST, max(2 * KP, power_of_two(int((width * KP) ** 0.5))))
        groups = cdiv(width, N)
        following = make_lists(idx, B * T, groups * KP) if groups > 1 else (None,) * 3
        launch(
            indexer_topk_merge,
            (B * T, groups),
            *best,
            idx,
            *following,
            *(width, groups * KP),
            K=K,
            KP=KP,
            N=N,
            C=min(N, 4096),
            num_warps=max(4, min(16, N // 512)),
        )
        if groups == 1:
            return
        best, width = following, groups * KP
