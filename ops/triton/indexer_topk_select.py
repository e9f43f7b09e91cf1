"""Choosing the K best of lists of keys, for the Triton kernels of indexer_topk (see
indexer_topk.py).

A score is kept as an int32 "key" that orders as the fp32 does; HIDDEN, the least, stands for an
entry that is not seen. The K-th best is found by bisection: some 15 counts over values in
registers, no sort.
"""

from __future__ import annotations

from ..launch import jit, tl

HIDDEN = tl.constexpr(-(1 << 31)) if tl else None


@jit
def indexer_topk_threshold(key, K: tl.constexpr):
    """Bounds of the K largest of each row of keys [R, N], or of all where fewer are seen -> above,
    n, least, found [R]:

    the n keys >= above belong to them, and the first found - n of those in least <= key < above,
    which are all equal.
    """
    seen = key > HIDDEN
    found = tl.sum(seen.to(tl.int32), 1)
    least = tl.min(tl.where(seen, key, 2147483646), 1)
    above = tl.where(found > K, tl.max(key, 1) + 1, least)
    n = tl.where(found > K, 0, found)
    # Bisection: count(key >= least) >= K > n = count(key >= above), until above = least + 1
    while tl.max((above > least + 1).to(tl.int32), 0) > 0:
        middle = (least >> 1) + (above >> 1) + (least & above & 1)
        count = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        above = tl.where(count > K, above, middle)
        n = tl.where(count > K, n, count)
        least = tl.where(count < K, least, middle)
    return above, n, least, tl.minimum(found, K)


@jit
def indexer_topk_compact(
    # a list of `count` keys, and entries of its first `listed` keys; key i >= listed is of entry
    # base + i
    keys_ptr,
    entries_ptr,
    listed,
    base,
    count,
    # of indexer_topk_threshold
    above,
    n,
    least,
    found,
    # destination, which may be the list itself; keys are optional
    out_keys_ptr,
    out_entries_ptr,
    KP: tl.constexpr,
    C: tl.constexpr,
):
    """Copy the chosen keys and their entries, in their order, to the front of the destination; a
    list of keys is padded to KP.
    """
    copied = 0  # in 16 bits each: keys from `above`, keys from `least`
    for start in range(0, count, C):
        # One key a thread, as the stores want it: no change of layout
        offs = tl.max_contiguous(start + tl.arange(0, C), 1)
        key = tl.load(keys_ptr + offs, mask=offs < count, other=HIDDEN)
        is_above = (key >= above).to(tl.int32)
        is_equal = ((key >= least) & (key < above)).to(tl.int32)
        # Place of a chosen key = number of chosen ones before it <= offs
        both = is_above + (is_equal << 16)
        order = copied + tl.cumsum(both, 0)
        copied += tl.sum(both, 0)
        chosen = (is_above > 0) | (is_equal > 0) & ((order >> 16) <= found - n)
        place = (order & 0xFFFF) + tl.minimum(order >> 16, found - n) - 1
        entry = tl.load(entries_ptr + offs, mask=chosen & (offs < listed), other=0)
        entry = tl.where(offs < listed, entry, base + offs)
        tl.debug_barrier()  # all is read that will now be overwritten
        if out_keys_ptr is not None:
            tl.store(out_keys_ptr + place, key, mask=chosen)
        tl.store(out_entries_ptr + place, entry.to(out_entries_ptr.dtype.element_ty), mask=chosen)
    if out_keys_ptr is not None:
        offs_k = tl.arange(0, KP)
        tl.store(out_keys_ptr + offs_k, tl.full((KP,), HIDDEN, tl.int32), mask=offs_k >= found)


@jit
def indexer_topk_select(
    # lists of keys [rows, CAP] and their entries [rows, KP], see indexer_topk_compact
    keys_ptr,
    entries_ptr,
    rows,
    listed,
    base,
    count,
    # whether it is the last time; then to lists elsewhere, with or without keys
    last,
    out_keys_ptr,
    out_entries_ptr,
    out_stride,
    K: tl.constexpr,
    KP: tl.constexpr,
    CAP: tl.constexpr,
    # rows and keys at a time
    R: tl.constexpr,
    C: tl.constexpr,
):
    """The K best of each list: to its own front or, at last, to the destination."""
    offs_r = tl.arange(0, R)
    offs_c = tl.arange(0, CAP)
    for r in range(0, rows, R):
        mask = (r + offs_r < rows)[:, None] & (offs_c < count)[None, :]
        key = tl.load(
            keys_ptr + (r + offs_r)[:, None] * CAP + offs_c[None, :], mask=mask, other=HIDDEN
        )
        row_above, row_n, row_least, row_found = indexer_topk_threshold(key, K)
        for i in range(0, tl.minimum(R, rows - r)):
            above = tl.sum(tl.where(offs_r == i, row_above, 0), 0)
            n = tl.sum(tl.where(offs_r == i, row_n, 0), 0)
            least = tl.sum(tl.where(offs_r == i, row_least, 0), 0)
            found = tl.sum(tl.where(offs_r == i, row_found, 0), 0)
            row_keys_ptr = keys_ptr + (r + i) * CAP
            row_entries_ptr = entries_ptr + (r + i) * KP
            offs_out = (r + i) * out_stride
            if out_keys_ptr is None and last:
                indexer_topk_compact(
                    row_keys_ptr,
                    row_entries_ptr,
                    listed,
                    base,
                    count,
                    above,
                    n,
                    least,
                    found,
                    None,
                    out_entries_ptr + offs_out,
                    KP,
                    C,
                )
            else:
                dest_keys_ptr = row_keys_ptr
                dest_entries_ptr = row_entries_ptr
                if out_keys_ptr is not None:
                    if last:
                        dest_keys_ptr = out_keys_ptr + offs_out
                        dest_entries_ptr = out_entries_ptr + offs_out
                indexer_topk_compact(
                    row_keys_ptr,
                    row_entries_ptr,
                    listed,
                    base,
                    count,
                    above,
                    n,
                    least,
                    found,
                    dest_keys_ptr,
                    dest_entries_ptr,
                    KP,
                    C,
                )


@jit
def indexer_topk_choose_all(
    idx_ptr,
    row,
    # of each token [BQ]: visible entries, whether it needs scores, whether it exists
    first,
    visible,
    scored,
    mask_q,
    BQ: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
):
    """Tokens that see no more than K entries choose all."""
    offs_q = tl.arange(0, BQ)
    offs_k = tl.arange(0, KP)
    entry = first[:, None] + offs_k[None, :]
    entry = tl.where(offs_k[None, :] < visible[:, None], entry, -1).to(tl.int64)
    tl.store(
        idx_ptr + (row + offs_q)[:, None] * K + offs_k[None, :],
        entry,
        mask=(mask_q & ~scored)[:, None] & (offs_k < K)[None, :],
    )
