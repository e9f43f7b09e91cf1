"""Parts of the Triton kernels of sparse_attn, forward and backward (see ops/sparse_attn.py).

A program serves one token and BH heads, the rows of its matrix products. Keys n < W are those of
the window, in order; the others are entries: n - W is their place in idx, or counts from lo. The r
rotated dims go through products of their own (q_r . k_r), so that the wide blocks [.., BD] are used
as they lie in memory. The norm of q is a factor of its scores.

In the kernels N counts rows of kv or of other keys, E entries and K chosen ones, and R is r.
"""

from __future__ import annotations

import torch

from ..launch import arch, get_config, jit, power_of_two, tl


@jit
def sparse_attn_rotate(
    x_ptr, offs_row, mask, cos_ptr, sin_ptr, sign, R: tl.constexpr, BR: tl.constexpr
):
    """Load the pairs that begin at x_ptr + offs_row [n, 1] and rotate them -> both halves [n, BR/2]
    fp32.

    cos_ptr, sin_ptr: the angles of the token; sign: 1, or -1 to rotate back.
    """
    offs_pair = tl.arange(0, BR // 2)
    mask_pair = 2 * offs_pair < R
    a_ptrs = x_ptr + offs_row + 2 * offs_pair[None]
    a = tl.load(a_ptrs, mask=mask & mask_pair[None], other=0.0).to(tl.float32)
    b = tl.load(a_ptrs + 1, mask=mask & mask_pair[None], other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + offs_pair, mask=mask_pair, other=0.0)[None]
    sin = tl.load(sin_ptr + offs_pair, mask=mask_pair, other=0.0)[None] * sign
    return a * cos - b * sin, a * sin + b * cos


@jit
def sparse_attn_load_rows(
    # rows [n, 1] of the input, which of them exist
    x_ptr,
    offs_row,
    mask,
    # angles of the token
    cos_ptr,
    sin_ptr,
    # shapes and block sizes
    D,
    R: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """Load rows of q or g at x_ptr + offs_row [n, 1] -> dims that are not rotated [n, BD] (then
    zeros), the others rotated [n, BR], and the sum of squares of all [n] fp32.
    """
    offs_d = tl.arange(0, BD)
    x = tl.load(x_ptr + offs_row + offs_d[None], mask=mask & (offs_d < D - R)[None], other=0.0)
    a, b = sparse_attn_rotate(x_ptr, offs_row + D - R, mask, cos_ptr, sin_ptr, 1.0, R, BR)
    square = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1) + tl.sum(a * a + b * b, 1)
    return x, tl.interleave(a, b).to(x.dtype), square


@jit
def sparse_attn_store(
    # rows [n, 1] of the output, which of them exist; o' [n, BD] fp32
    o_ptr,
    offs_row,
    mask,
    o,
    # angles of the token
    cos_ptr,
    sin_ptr,
    # shapes and block sizes
    D,
    R: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """Store o' and rotate its last R dims back: they are read again as pairs.

    The program itself reads what it stored, here as in indexer_topk and sinkhorn. Behind a barrier
    that is ordered on CDNA too, whose waves of a program share one L1 in which accesses keep their
    order. Between programs it would not be (see moe_last).
    """
    offs_d = tl.arange(0, BD)
    offs_pair = tl.arange(0, BR // 2)
    dtype = o_ptr.dtype.element_ty
    tl.store(o_ptr + offs_row + offs_d[None], o.to(dtype), mask=mask & (offs_d < D)[None])
    tl.debug_barrier()
    a, b = sparse_attn_rotate(o_ptr, offs_row + D - R, mask, cos_ptr, sin_ptr, -1.0, R, BR)
    pair_ptrs = o_ptr + offs_row + D - R + 2 * offs_pair[None]
    pair_mask = mask & (2 * offs_pair < R)[None]
    tl.store(pair_ptrs, a.to(dtype), mask=pair_mask)
    tl.store(pair_ptrs + 1, b.to(dtype), mask=pair_mask)


@jit
def sparse_attn_key_range(
    t,
    # which keys a token sees
    window_len_ptr,
    lo_ptr,
    hi_ptr,
    idx_ptr,
    # chosen entries, entries, window; block size of chosen entries
    K,
    E,
    W: tl.constexpr,
    BK: tl.constexpr,
):
    """Keys of token t -> start_n <= n < end_n, and the entry that key W is (without idx)."""
    start_n = W - tl.load(window_len_ptr + t).to(tl.int32)
    end_n = W
    first_entry = tl.zeros([], tl.int64)
    if lo_ptr is not None:
        if idx_ptr is None:
            first_entry = tl.maximum(tl.load(lo_ptr + t), 0)
            end_entry = tl.minimum(tl.load(hi_ptr + t), E)
            end_n = W + tl.maximum(end_entry - first_entry, 0).to(tl.int32)
        else:  # up to the last chosen one
            offs_k = tl.arange(0, BK)
            chosen = tl.load(idx_ptr + t * K + offs_k, mask=offs_k < K, other=-1)
            end_n = W + tl.max(tl.where(chosen >= 0, offs_k + 1, 0), 0)
    return start_n, end_n, first_entry


@jit
def sparse_attn_load_keys(
    # keys [n] and the range that is seen
    offs_n,
    start_n,
    end_n,
    # first key of the token's window, first entry of its batch (or from lo on), its row of idx
    window_ptr,
    entries_ptr,
    idx_ptr,
    # shapes and block sizes
    D,
    W: tl.constexpr,
    R: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """-> all dims of the keys [n, BD], those that are rotated [n, BR], which keys are seen [n],
    their entries [n].
    """
    mask_n = (offs_n >= start_n) & (offs_n < end_n)
    row_ptrs = window_ptr + offs_n * D
    entry = offs_n - W
    if entries_ptr is not None:
        if idx_ptr is not None:
            entry = tl.load(idx_ptr + entry, mask=mask_n & (offs_n >= W), other=0)
            mask_n = mask_n & (entry >= 0)
        row_ptrs = tl.where(offs_n < W, row_ptrs, entries_ptr + entry.to(tl.int64) * D)
    offs_d = tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    k_ptrs = row_ptrs[:, None] + offs_d[None]
    k = tl.load(k_ptrs, mask=mask_n[:, None] & (offs_d < D)[None], other=0.0)
    k_r_ptrs = row_ptrs[:, None] + (D - R + offs_r)[None]
    k_r = tl.load(k_r_ptrs, mask=mask_n[:, None] & (offs_r < R)[None], other=0.0)
    return k, k_r, mask_n, entry


@jit
def sparse_attn_dot(a, a_r, b, b_r):
    """a b^T over all dims, [n, m]: the rotated ones are 0 in a or b, and come from a_r, b_r."""
    wide = tl.dot(a, tl.trans(b), input_precision="ieee")
    return tl.dot(a_r, tl.trans(b_r), wide, input_precision="ieee")


def constants(q: torch.Tensor, kv: torch.Tensor, cos: torch.Tensor, idx) -> dict:
    """Compile-time constants of all kernels that depend on the shapes alone."""
    T, _, D = q.shape[1:]
    R = 2 * cos.shape[-1]
    return dict(
        W=kv.shape[1] - T + 1,
        R=R,
        BD=power_of_two(D, 16),
        BR=power_of_two(R, 16),
        BK=16 if idx is None else power_of_two(idx.shape[2], 16),
    )


def block_config(name: str, candidates, candidates_fp32, q: torch.Tensor, note: str = "") -> dict:
    """get_config for heads and dims of q, with no more heads in a block than there are."""
    H, D = q.shape[2:]
    if q.dtype.itemsize == 4 and not arch(q).startswith("gfx"):
        candidates = candidates_fp32
    config = get_config(name, f"H{H} D{D} {str(q.dtype)[6:]}{note}", candidates, q)
    return {**config, "BH": min(config["BH"], power_of_two(H, 16))}


def with_packed_rows(entries: torch.Tensor | None) -> torch.Tensor | None:
    """entries with rows one behind the other; batches may lie apart, as in a cache, which is not
    copied.
    """
    if entries is None or entries.stride()[1:] == (entries.shape[2], 1):
        return entries
    return entries.contiguous()


def contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)
