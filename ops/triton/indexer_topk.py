"""The Triton kernels of indexer_topk (see ops/indexer_topk.py).

A program takes a few neighbouring tokens with all their heads and walks the entries that any of
them sees, once: one product per block of index keys, summed over heads while still in registers.
The scores of CAP entries gather in a buffer of the program's own, which stays in the L2 cache; when
it is full, the K best move to its front and the others are forgotten. The K-th best is found by
bisection: some 15 counts over values in registers, no sort. Tokens that see no more than K entries
get them all, unscored. With few tokens and a long cache the visible entries are split among many
programs, and a second kernel merges the candidates of all splits. Deterministic: the lowest of
equal entries are chosen, and listed in ascending order.

A score is kept as an int32 "key" that orders as the fp32 does; HIDDEN, the least, stands for an
entry that is not seen. In the kernels E counts entries and K chosen ones.
"""

from __future__ import annotations

import torch

from ..launch import TYPES, cdiv, get_config, jit, launch, power_of_two, processors, tl
from .indexer_topk_merge import indexer_topk_store_state, make_lists, merge
from .indexer_topk_score import indexer_topk_score
from .indexer_topk_select import indexer_topk_choose_all, indexer_topk_select

DENSE = 2048  # up to this many entries in a split, all their keys go to the merge

# N: columns (tokens x heads) and BC: rows (entries) of a product; CAP: keys of the buffer (more for
# large K); C: keys of a step of moving them; PER: programs per processor.
CONFIGS = [
    dict(N=256, BC=64, CAP=2048, C=2048, PER=2, num_warps=4, num_stages=3),
    dict(N=128, BC=64, CAP=2048, C=2048, PER=2, num_warps=4, num_stages=3),
    dict(N=64, BC=128, CAP=4096, C=2048, PER=2, num_warps=4, num_stages=3),
    dict(N=128, BC=32, CAP=2048, C=1024, PER=2, num_warps=4, num_stages=2),
    dict(N=64, BC=64, CAP=4096, C=1024, PER=2, num_warps=4, num_stages=3),
    dict(N=128, BC=64, CAP=2048, C=1024, PER=2, num_warps=4, num_stages=2),
]


@jit
def indexer_topk_flush(
    # lists of keys and their entries: `held` from before, then entries begin .. stop of those
    # before `end`
    buffer_ptr,
    buffer_entry_ptr,
    held,
    begin,
    stop,
    end,
    # result, lists for the merge
    idx_ptr,
    best_ptr,
    best_entry_ptr,
    # first token, number of tokens, and the split and its length
    row,
    rows,
    split,
    width,
    part,
    dense,
    # see indexer_topk_forward
    SPLIT: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    CAP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Keep the K best of the lists: at their front or, at last, in the result or in lists for the
    merge.
    """
    last = stop == end
    base = begin - held
    count = held + stop - begin
    # Barriers: all keys are written before they are read, and read before the next
    if SPLIT == 0:
        tl.debug_barrier()
        indexer_topk_select(
            buffer_ptr,
            buffer_entry_ptr,
            rows,
            held,
            base,
            count,
            last,
            None,
            idx_ptr + row * K,
            K,
            K,
            KP,
            CAP,
            R,
            C,
        )
        tl.debug_barrier()
    elif SPLIT == 1:
        if part > dense:
            tl.debug_barrier()
            offs_out = row * width + split * KP
            indexer_topk_select(
                buffer_ptr,
                buffer_entry_ptr,
                rows,
                held,
                base,
                count,
                last,
                best_ptr + offs_out,
                best_entry_ptr + offs_out,
                width,
                K,
                KP,
                CAP,
                R,
                C,
            )
            tl.debug_barrier()


@jit
def indexer_topk_forward(
    # inputs: q [B, T, H, D], k [B, E, D], u [B, T, H], lo, hi [B, T]
    q_ptr,
    k_ptr,
    u_ptr,
    lo_ptr,
    hi_ptr,
    # a program's own lists: keys [BQ, CAP], entries [BQ, KP]
    buffer_ptr,
    buffer_entry_ptr,
    # result [B, T, K]; with splits, lists for the merge [B T, width], and their state [B T, 2]
    idx_ptr,
    best_ptr,
    best_entry_ptr,
    state_ptr,
    # shapes
    B,
    T,
    E,
    splits,
    width,
    dense,
    k_stride_b,
    k_stride_e,
    H: tl.constexpr,
    D: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    # 0: one split; 1: splits that are longer than `dense`; 2: splits that are not
    SPLIT: tl.constexpr,
    # block sizes: tokens, lists at a time, entries, keys of the buffer, keys at a time
    BQ: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    CAP: tl.constexpr,
    C: tl.constexpr,
):
    """Scores of BQ tokens and of the entries of a split. One split: the choice. More: lists of
    candidates for the merge.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    token_blocks = (T + BQ - 1) // BQ
    buffer_ptr += pid.to(tl.int64) * (BQ * CAP)
    buffer_entry_ptr += pid.to(tl.int64) * (BQ * KP)
    offs_q = tl.arange(0, BQ)
    offs_qh = tl.arange(0, BQ * HP)
    offs_d = tl.arange(0, DP)
    for round in range(0, (B * token_blocks * splits + programs - 1) // programs):
        # Later tokens see more: they come first, and every other round is dealt out backwards.
        item = round * programs + (pid if round % 2 == 0 else programs - 1 - pid)
        if item < B * token_blocks * splits:
            split = item % splits
            block = item // splits
            b = block % B
            t = (token_blocks - 1 - block // B) * BQ
            row = (b * T + t).to(tl.int64)
            mask_q = t + offs_q < T

            # Visible entries of each token [BQ]; begin .. end: those of any token that needs scores
            first = tl.maximum(tl.load(lo_ptr + row + offs_q, mask=mask_q, other=0), 0).to(tl.int32)
            stop_entry = tl.minimum(tl.load(hi_ptr + row + offs_q, mask=mask_q, other=0), E)
            visible = stop_entry.to(tl.int32) - first
            scored = visible > K
            begin = tl.min(tl.where(scored, first, E), 0)
            end = tl.max(tl.where(scored, first + visible, 0), 0)
            part = ((tl.maximum(end - begin, 0) + splits - 1) // splits + BC - 1) // BC * BC

            if split == 0:
                indexer_topk_choose_all(idx_ptr, row, first, visible, scored, mask_q, BQ, K, KP)
                if SPLIT:
                    indexer_topk_store_state(
                        state_ptr, row, begin, end, part, dense, scored, mask_q, BQ, KP
                    )

            begin += split * part
            end = tl.minimum(end, begin + part)
            if begin < end:
                # Queries of all tokens and heads, [DP, BQ HP]
                mask_qh = (t + offs_qh // HP < T) & (offs_qh % HP < H)
                offs_head = (row + offs_qh // HP) * H + offs_qh % HP
                q = tl.load(
                    q_ptr + offs_head[:, None] * D + offs_d[None, :],
                    mask=mask_qh[:, None] & (offs_d < D)[None, :],
                    other=0.0,
                )
                q_t = tl.trans(q)
                batch_ptr = k_ptr + b.to(tl.int64) * k_stride_b

                # Where keys gather: the buffer, or at once the lists for the merge
                keys_ptr = buffer_ptr
                offs_list = (offs_q * CAP).to(tl.int64)
                capacity = CAP
                if SPLIT:
                    if part <= dense:
                        keys_ptr = best_ptr
                        offs_list = (row + offs_q) * width + split * part
                    capacity = tl.where(part <= dense, part, CAP)
                held = 0  # keys at the front, from before
                while begin < end:
                    u = tl.load(u_ptr + offs_head, mask=mask_qh, other=0.0).to(tl.float32)
                    stop = tl.minimum(end, begin + (capacity - held) // BC * BC)
                    indexer_topk_score(
                        batch_ptr,
                        k_stride_e,
                        begin,
                        stop,
                        q_t,
                        u,
                        first,
                        visible,
                        scored,
                        mask_q,
                        keys_ptr,
                        offs_list,
                        held,
                        D,
                        HP,
                        DP,
                        BQ,
                        BC,
                    )
                    indexer_topk_flush(
                        buffer_ptr,
                        buffer_entry_ptr,
                        held,
                        begin,
                        stop,
                        end,
                        idx_ptr,
                        best_ptr,
                        best_entry_ptr,
                        row,
                        tl.minimum(BQ, T - t),
                        split,
                        width,
                        part,
                        dense,
                        SPLIT,
                        K,
                        KP,
                        CAP,
                        R,
                        C,
                    )
                    begin = stop
                    held = K


def indexer_topk_kernels(
    q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, topk: int
) -> torch.Tensor:
    """-> idx. min(topk, E) is at most LARGEST_K."""
    B, T, H, D = q.shape
    E = k.shape[1]
    K = min(topk, E)
    dtype = torch.promote_types(q.dtype, k.dtype)
    idx = lo.new_empty(B, T, K)
    if 0 in idx.shape:
        return idx
    q = q.to(dtype).contiguous()
    u = u.contiguous()
    lo = lo.contiguous()
    hi = hi.contiguous()
    if k.stride(2) != 1:  # else a cache is read where it lies
        k = k.contiguous()
    key = f"H{H} D{D} T{min(power_of_two(T), 8)} {TYPES[dtype]}"
    config = dict(get_config("indexer_topk_forward", key, CONFIGS, q))

    # Block sizes. The configs are made for rows of up to 256 bytes, bf16 with D = 128
    HP = power_of_two(H)
    DP = power_of_two(D, 16)
    KP = power_of_two(K)
    scale = cdiv(DP * dtype.itemsize, 256)
    BQ = max(1, min(config.pop("N") // scale // HP, 16, power_of_two(T)))
    BC = max(16, config.pop("BC") // scale**2)
    HP = max(HP, 16 // BQ)

    # Programs, and splits of the entries if there are too few blocks of tokens
    programs = config.pop("PER") * processors(q)
    blocks = B * cdiv(T, BQ)
    splits = max(1, min(programs // blocks, cdiv(E, BC)))
    programs = min(programs, blocks * splits)
    part = cdiv(cdiv(E, splits), BC) * BC  # entries of a split, at most
    dense = max(DENSE, KP)
    CAP = power_of_two(min(part, max(config.pop("CAP"), min(4 * KP, 8192), K + BC)))
    C = config.pop("C")

    # Scratch memory: buffers, and lists for the merge
    buffer = lo.new_empty(programs, BQ, CAP, dtype=torch.int32)
    buffer_entry = lo.new_empty(programs, BQ, KP, dtype=torch.int32)
    width = cdiv(E, 16) * 16
    if part <= dense:
        split_form = 2
        width = min(splits * part, width)
    else:
        split_form = 1
        width = min(splits * dense, max(splits * KP, width))
    if splits == 1:
        split_form = 0
    best = make_lists(lo, B * T, width) if splits > 1 else (None,) * 3
    launch(
        indexer_topk_forward,
        (programs,),
        *(q, k, u, lo, hi, buffer, buffer_entry, idx),
        *best,
        *(B, T, E, splits, width, dense, k.stride(0), k.stride(1)),
        H=H,
        D=D,
        HP=HP,
        DP=DP,
        K=K,
        KP=KP,
        SPLIT=split_form,
        BQ=BQ,
        R=min(BQ, max(1, 4 * C // CAP)),
        BC=BC,
        CAP=CAP,
        C=min(C, CAP),
        **config,
    )
    if splits > 1:
        merge(best, idx, width, K, KP)
    return idx
