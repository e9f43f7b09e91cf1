"""The Triton kernels of compress (see ops/compress.py): pool, normalise and rotate; and the
backward.

The rows are read once (in the backward a second time, from cache), and an entry stays in registers
from its slots to the store. A program pools BE entries with one online softmax per channel, or a
single entry of a long window with G online softmaxes, each over every G-th slot, merged at the end.
An entry whose window ends outside of the rows is 0 and costs nothing: a decoded token that closes
no window reads no rows.

Windows of a document share no (row, lane), and entries that no token sees have no gradient: the
backward adds to zeros, in parallel, and the result does not depend on the order. It would if three
windows with gradients shared rows. In the kernels N counts rows and E entries.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .rope import rotate_pairs


@jit
def compress_pool(
    # rows [B N, 2 LANES D]; first row of each entry's batch [BE]
    rows_ptr,
    first_row,
    # of each entry: row of its window's last token, number of its window, whether the row exists
    end,
    index,
    inside,
    # channels [BD]
    offs_d,
    # shapes
    D: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    # block sizes: entries, slots at a time, unrolled steps, channels
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    """Online softmax over the slots -> highest logit, sum of weights, weighted sum of values: [BE,
    BD] each.
    """
    mask_d = ((offs_d >= 0) & (offs_d < D))[None, :]
    # Finite, since -inf - -inf is NaN, and lower than any logit
    m_i = tl.full([BE * G, BD], -1e30, tl.float32)
    l_i = tl.zeros([BE * G, BD], tl.float32)
    acc = l_i
    for lane in tl.static_range(LANES):
        for start in tl.range(0, R, G, loop_unroll_factor=U):
            # Values k and logits z of the next slots, [BE or G, BD]; the first window has no
            # lookback
            slot = start + tl.arange(0, G)
            row = first_row + tl.maximum(end + 1 - (LANES - lane) * R + slot, 0)
            ptrs = rows_ptr + row[:, None] * (2 * LANES * D) + lane * D + offs_d[None, :]
            mask = (inside & (slot < R) & (index >= LANES - 1 - lane))[:, None] & mask_d
            k = tl.load(ptrs, mask=mask, other=0.0)
            z = tl.load(ptrs + LANES * D, mask=mask, other=float("-inf"))
            # m' = max(m, z); l' = l exp(m - m') + exp(z - m')
            # acc' = acc exp(m - m') + k exp(z - m')
            decay = tl.exp(-tl.abs(z - m_i))  # of whichever is lower
            alpha = tl.where(z > m_i, decay, 1.0)
            p = tl.where(z > m_i, 1.0, decay)
            l_i = l_i * alpha + p
            acc = acc * alpha + k * p
            m_i = tl.maximum(m_i, z)
    if G > 1:
        # Merge the G partial softmaxes
        m = tl.max(m_i, 0)[None, :]
        alpha = tl.exp(m_i - m)
        l_i = tl.sum(l_i * alpha, 0)[None, :]
        acc = tl.sum(acc * alpha, 0)[None, :]
        m_i = m
    return m_i, tl.maximum(l_i, 1.0), acc  # a sum below 1 has no slots


@jit
def compress_angles(
    cos_ptr, sin_ptr, offs_e, mask_e, D: tl.constexpr, r: tl.constexpr, BD: tl.constexpr
):
    """cos and sin for every pair of channels of entries offs_e, [.., BD/2]; 1 and 0 for those that
    are not rotated.
    """
    pair = tl.arange(0, BD // 2) - (D - r + 1) // 2
    offs = offs_e[:, None] * (r // 2) + pair[None, :]
    mask = mask_e[:, None] & ((pair >= 0) & (pair < r // 2))[None, :]
    cos = tl.load(cos_ptr + offs, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + offs, mask=mask, other=0.0)
    return cos, sin


@jit
def compress_forward(
    # rows [B, N, 2 LANES D], end, index [B, E], weight [D], cos, sin [B, E, r/2]
    rows_ptr,
    end_ptr,
    index_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    # out [B, E, D]
    out_ptr,
    # rows and entries of a batch, entries of all
    N,
    E,
    n_entries,
    eps,
    # shapes
    D: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    # block sizes: entries, slots at a time, unrolled steps, channels
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    offs_e = tl.program_id(0) * BE + tl.arange(0, BE)
    end = tl.load(end_ptr + offs_e, mask=offs_e < n_entries, other=-1)
    index = tl.load(index_ptr + offs_e, mask=offs_e < n_entries, other=0)
    inside = (end >= 0) & (end < N)
    offs_e = offs_e.to(tl.int64)
    mask_e = offs_e < n_entries
    offs_d = tl.arange(0, BD) - (D - r) % 2  # rotated pairs begin at even places of the block
    mask_d = (offs_d >= 0) & (offs_d < D)
    mask = mask_e[:, None] & mask_d[None, :]
    out_ptrs = out_ptr + (offs_e[:, None] * D + offs_d[None, :])
    if tl.sum(inside.to(tl.int32), 0) == 0:
        tl.store(out_ptrs, tl.zeros([BE, BD], out_ptr.dtype.element_ty), mask=mask)
        return

    # e = sum_slots softmax(z) k, rounded to the dtype of the result, [BE, BD]
    m_i, l_i, acc = compress_pool(
        rows_ptr, offs_e // E * N, end, index, inside, offs_d, D, R, LANES, BE, G, U, BD
    )
    e = (acc / l_i).to(out_ptr.dtype.element_ty).to(tl.float32)

    # e = RMSNorm(e) weight
    rstd = tl.rsqrt(tl.sum(e * e, 1) / D + eps)
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    e = e * rstd[:, None] * weight[None, :]

    # Rotate the last r dims to the position of the window
    cos, sin = compress_angles(cos_ptr, sin_ptr, offs_e, mask_e, D, r, BD)
    e = rotate_pairs(e.to(out_ptr.dtype.element_ty).to(tl.float32), cos, sin, BE, BD)
    tl.store(out_ptrs, e.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def compress_backward(
    # g [B, E, D], and the inputs of the forward
    g_ptr,
    rows_ptr,
    end_ptr,
    index_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    # gradients: of rows (zeros), of weight as one row per program
    g_rows_ptr,
    g_weight_ptr,
    # rows and entries of a batch, entries of all
    N,
    E,
    n_entries,
    eps,
    # shapes
    D: tl.constexpr,
    r: tl.constexpr,
    R: tl.constexpr,
    LANES: tl.constexpr,
    # block sizes: entries, slots at a time, unrolled steps, channels
    BE: tl.constexpr,
    G: tl.constexpr,
    U: tl.constexpr,
    BD: tl.constexpr,
):
    offs_e = tl.program_id(0) * BE + tl.arange(0, BE)
    end = tl.load(end_ptr + offs_e, mask=offs_e < n_entries, other=-1)
    index = tl.load(index_ptr + offs_e, mask=offs_e < n_entries, other=0)
    inside = (end >= 0) & (end < N)
    offs_e = offs_e.to(tl.int64)
    mask_e = offs_e < n_entries
    offs_d = tl.arange(0, BD) - (D - r) % 2  # rotated pairs begin at even places of the block
    mask_d = (offs_d >= 0) & (offs_d < D)

    # Forward again: e, and e_hat = e rstd with e as it was rounded
    m_i, l_i, acc = compress_pool(
        rows_ptr, offs_e // E * N, end, index, inside, offs_d, D, R, LANES, BE, G, U, BD
    )
    e = acc / l_i
    rounded = e.to(g_ptr.dtype.element_ty).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(rounded * rounded, 1) / D + eps)[:, None]

    # Through the rotation: g rotated back
    mask = mask_e[:, None] & mask_d[None, :]
    g = tl.load(g_ptr + offs_e[:, None] * D + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    cos, sin = compress_angles(cos_ptr, sin_ptr, offs_e, mask_e, D, r, BD)
    g = rotate_pairs(g, cos, -sin, BE, BD).to(g_ptr.dtype.element_ty).to(tl.float32)

    # Through the norm: g_weight = sum_entries g e_hat; g_e = rstd (g w - e_hat mean(g w e_hat))
    tl.store(
        g_weight_ptr + tl.program_id(0).to(tl.int64) * D + offs_d,
        tl.sum(g * rounded * rstd, 0),
        mask=mask_d,
    )
    g *= tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    g_e = rstd * (g - rounded * rstd * rstd * (tl.sum(g * rounded, 1) / D)[:, None])

    # Through the softmax, per slot: g_k = p g_e, g_z = p g_e (k - e), p = exp(z - m) / l
    scale = g_e / l_i
    for lane in tl.static_range(LANES):
        for start in tl.range(0, R, G, loop_unroll_factor=U):
            slot = start + tl.arange(0, G)
            row = offs_e // E * N + tl.maximum(end + 1 - (LANES - lane) * R + slot, 0)
            offs = row[:, None] * (2 * LANES * D) + lane * D + offs_d[None, :]
            mask_slots = (inside & (slot < R) & (index >= LANES - 1 - lane))[:, None] & mask_d[
                None, :
            ]
            k = tl.load(rows_ptr + offs, mask=mask_slots, other=0.0)
            z = tl.load(rows_ptr + offs + LANES * D, mask=mask_slots, other=float("-inf"))
            g_k = tl.exp(z - m_i) * scale
            g_z = g_k * (k - e)
            tl.atomic_add(g_rows_ptr + offs, g_k, mask=mask_slots, sem="relaxed")
            tl.atomic_add(g_rows_ptr + offs + LANES * D, g_z, mask=mask_slots, sem="relaxed")


def _constants(name, rows, D, r, ratio, dtype):
    """Constants and options of a launch."""
    BD = power_of_two(D + (D - r) % 2, 2)
    if ratio <= 16:
        sizes = ((2048, 4), (1024, 4), (512, 16), (512, 8), (512, 4))
        candidates = [
            {"BE": max(1, size // BD), "G": 1, "U": 4, "num_warps": warps} for size, warps in sizes
        ]
    else:
        sizes = ((2, 16), (2, 8), (1, 16), (1, 8))
        candidates = [{"BE": 1, "G": 16, "U": U, "num_warps": warps} for U, warps in sizes]
    config = get_config(name, f"R{ratio} D{D} {str(dtype)[6:]}", candidates, rows)
    lanes = rows.shape[2] // (2 * D)
    return {"D": D, "r": r, "R": ratio, "LANES": lanes, "BD": BD, **config}


def compress_kernel(
    # the rows and their windows
    rows: torch.Tensor,
    end: torch.Tensor,
    index: torch.Tensor,
    # norm and RoPE of the entries
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    # constants
    ratio: int,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    B, N, _ = rows.shape
    E = end.shape[1]
    D = weight.shape[0]
    out = rows.new_empty(B, E, D, dtype=dtype)
    constants = _constants("compress_forward", rows, D, 2 * cos.shape[-1], ratio, dtype)
    launch(
        compress_forward,
        (cdiv(B * E, constants["BE"]),),
        *(t.contiguous() for t in (rows, end, index, weight, cos, sin)),
        out,
        *(N, E, B * E, eps),
        **constants,
    )
    return out


def compress_backward_kernel(
    g: torch.Tensor,
    # the inputs of the forward: the rows and their windows
    rows: torch.Tensor,
    end: torch.Tensor,
    index: torch.Tensor,
    # norm and RoPE of the entries
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    # constants
    ratio: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of rows and weight."""
    B, N, _ = rows.shape
    E = end.shape[1]
    D = weight.shape[0]
    constants = _constants("compress_backward", rows, D, 2 * cos.shape[-1], ratio, dtype)
    programs = cdiv(B * E, constants["BE"])
    g_rows = rows.new_zeros(rows.shape)
    g_weight = rows.new_empty(programs, D)
    launch(
        compress_backward,
        (programs,),
        *(t.contiguous() for t in (g, rows, end, index, weight, cos, sin)),
        *(g_rows, g_weight),
        *(N, E, B * E, eps),
        **constants,
    )
    return g_rows, g_weight.sum(0).to(weight.dtype)
