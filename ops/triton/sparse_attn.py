"""The Triton kernels of the forward of sparse_attn (see ops/sparse_attn.py): one program for BH
heads of a token and all its keys, or for a split of its keys, which a second kernel merges.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, jit, launch, power_of_two, processors, tl
from .sparse_attn_common import (
    block_config,
    constants,
    contiguous,
    sparse_attn_dot,
    sparse_attn_key_range,
    sparse_attn_load_keys,
    sparse_attn_load_rows,
    sparse_attn_store,
    with_packed_rows,
)

FORWARD_CONFIGS = [
    dict(BH=64, BN=32, num_warps=8, num_stages=2),
    dict(BH=64, BN=32, num_warps=8, num_stages=1),
    dict(BH=16, BN=32, num_warps=4, num_stages=2),
    dict(BH=16, BN=16, num_warps=4, num_stages=1),
]
# fp32 is there to check against: NVIDIA has no matrix instructions of full precision, and rows take
# twice the space, so that it spills.
FORWARD_CONFIGS_FP32 = [
    dict(BH=16, BN=16, num_warps=16, num_stages=1),
    dict(BH=16, BN=16, num_warps=8, num_stages=1),
]
DECODE_TOKENS = 64  # up to this many tokens, keys are split among programs


@jit
def sparse_attn_forward(
    # inputs: q [B, T, H, D], kv [B, W - 1 + T, D], entries [B, N, D], idx [B, T, topk],
    # window_len, lo, hi [B, T]
    q_ptr,
    kv_ptr,
    entries_ptr,
    idx_ptr,
    window_len_ptr,
    lo_ptr,
    hi_ptr,
    # cos, sin [B, T, r/2], sink [H]
    cos_ptr,
    sin_ptr,
    sink_ptr,
    # outputs: o, lse; with splits maxima in m, else lse; sums l and acc of each split
    o_ptr,
    m_ptr,
    acc_ptr,
    l_ptr,
    # shapes; N: rows of kv, K: chosen entries, E: entries
    T,
    N,
    entries_stride_b,
    K,
    E,
    H,
    D,
    # 1 / sqrt(D), epsilon of the norm, keys of a split
    scale,
    eps,
    span,
    SPLITS: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    # block sizes: heads, keys, dims, rotated dims, chosen entries
    BH: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """o and lse. With SPLITS > 1 one span of keys, for sparse_attn_merge: its maxima, its sums l
    and acc.
    """
    head_blocks = tl.cdiv(H, BH)
    split = tl.program_id(1)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)  # token, counted over all rows
    b = t // T
    offs_h = tl.program_id(0) % head_blocks * BH + tl.arange(0, BH)
    mask_h = (offs_h < H)[:, None]
    offs_row = ((t * H + offs_h) * D)[:, None]
    cos_ptr += t * (R // 2)
    sin_ptr += t * (R // 2)

    # q', but for its norm: s = q . k rsqrt(mean(q^2) + eps) / sqrt(D), in units of log 2
    q, q_r, square = sparse_attn_load_rows(q_ptr, offs_row, mask_h, cos_ptr, sin_ptr, D, R, BD, BR)
    qk_scale = tl.rsqrt(square / D + eps) * (scale * 1.4426950408889634)

    # Keys of this token, or of this split of them
    start_n, end_n, first_entry = sparse_attn_key_range(
        t, window_len_ptr, lo_ptr, hi_ptr, idx_ptr, K, E, W, BK
    )
    if entries_ptr is not None:
        entries_ptr += b * entries_stride_b + first_entry * D
    if idx_ptr is not None:
        idx_ptr += t * K
    begin = start_n // BN * BN
    end = end_n
    if SPLITS > 1:
        begin = tl.maximum(begin, split * span)
        end = tl.minimum(end_n, (split + 1) * span)

    # Online softmax, which the sink begins
    sink = (
        tl.load(sink_ptr + offs_h, mask=offs_h < H, other=0.0).to(tl.float32) * 1.4426950408889634
    )
    m_i = tl.maximum(sink, -1e30)
    l_i = tl.where(split == 0, tl.exp2(sink - m_i), 0.0)
    acc = tl.zeros([BH, BD], tl.float32)
    for n in range(begin, end, BN):
        k, k_r, mask_n, entry = sparse_attn_load_keys(
            n + tl.arange(0, BN),
            start_n,
            end,
            kv_ptr + (b * N + t % T) * D,
            entries_ptr,
            idx_ptr,
            D,
            W,
            R,
            BD,
            BR,
        )
        # s = q' k^T, [BH, BN]; m' = max(m, s)
        qk = sparse_attn_dot(q, q_r, k, k_r) * qk_scale[:, None]
        qk = tl.where(mask_n[None], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        # p = 2^(s - m'); l' = l 2^(m - m') + sum p; acc' = acc 2^(m - m') + p k, [BH, BD]
        p = tl.exp2(qk - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(k.dtype), k, acc * alpha[:, None], input_precision="ieee")
        m_i = m_new

    if SPLITS > 1:
        offs_d = tl.arange(0, BD)
        offs_part = split * (tl.num_programs(0) // head_blocks) * H + t * H + offs_h
        acc_ptrs = acc_ptr + (offs_part * D)[:, None] + offs_d[None]
        tl.store(m_ptr + offs_part, m_i, mask=offs_h < H)
        tl.store(l_ptr + offs_part, l_i, mask=offs_h < H)
        tl.store(acc_ptrs, acc, mask=mask_h & (offs_d < D)[None])
    else:
        lse = (m_i + tl.log2(l_i)) * 0.6931471805599453
        tl.store(m_ptr + t * H + offs_h, lse, mask=offs_h < H)
        o = acc / l_i[:, None]
        sparse_attn_store(o_ptr, offs_row, mask_h, o, cos_ptr, sin_ptr, D, R, BD, BR)


@jit
def sparse_attn_merge(
    # of each split: acc [SPLITS, B, T, H, D], m, l [SPLITS, B, T, H]
    acc_ptr,
    m_ptr,
    l_ptr,
    cos_ptr,
    sin_ptr,
    # outputs
    o_ptr,
    lse_ptr,
    # B T H, shapes
    rows,
    H,
    D,
    SPLITS: tl.constexpr,
    R: tl.constexpr,
    # block sizes: splits, dims, rotated dims
    BS: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """o and lse of one head of one token from those of its splits."""
    row = tl.program_id(0).to(tl.int64)
    t = row // H
    offs_d = tl.arange(0, BD)
    m_i = -1e30
    l_i = 0.0
    acc = tl.zeros([BD], tl.float32)
    for start in range(0, SPLITS, BS):
        offs_s = (start + tl.arange(0, BS)) * rows + row
        mask_s = start + tl.arange(0, BS) < SPLITS
        m = tl.load(m_ptr + offs_s, mask=mask_s, other=-1e30)
        m_new = tl.maximum(m_i, tl.max(m, 0))
        beta = tl.exp2(m - m_new)
        alpha = tl.exp2(m_i - m_new)
        acc_ptrs = acc_ptr + (offs_s * D)[:, None] + offs_d[None]
        acc_s = tl.load(acc_ptrs, mask=mask_s[:, None] & (offs_d < D)[None], other=0.0)
        l_s = tl.load(l_ptr + offs_s, mask=mask_s, other=0.0)
        # l' = l 2^(m - m') + sum_s l_s 2^(m_s - m'), acc likewise
        l_i = l_i * alpha + tl.sum(l_s * beta, 0)
        acc = acc * alpha + tl.sum(acc_s * beta[:, None], 0)
        m_i = m_new
    tl.store(lse_ptr + row, (m_i + tl.log2(l_i)) * 0.6931471805599453)
    offs_row = row * D + tl.zeros([1, 1], tl.int64)
    mask = tl.full([1, 1], 1, tl.int1)
    cos_ptr += t * (R // 2)
    sin_ptr += t * (R // 2)
    sparse_attn_store(o_ptr, offs_row, mask, (acc / l_i)[None], cos_ptr, sin_ptr, D, R, BD, BR)


def _splits(steps: int, programs: int, x: torch.Tensor) -> tuple[int, int]:
    """How to cut the `steps` of every program so that all processors are busy -> number of splits,
    steps of each.
    """
    span = cdiv(steps, max(1, min(steps, processors(x) // max(programs, 1))))
    return cdiv(steps, span), span


def forward_kernel(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    window_len: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    # entries and which of them a token sees
    entries: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    idx: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> o, lse"""
    B, T, H, D = q.shape
    o = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if B * T == 0:
        return o, lse
    q, kv, sink, window_len, cos, sin = contiguous(q, kv, sink, window_len, cos, sin)
    lo, hi, idx = contiguous(lo, hi, idx)
    entries = with_packed_rows(entries)
    E = 0 if entries is None else entries.shape[1]
    K = 0 if idx is None else idx.shape[2]

    sizes = constants(q, kv, cos, idx)
    decode = B * T <= DECODE_TOKENS
    note = " decode" if decode else ""
    config = block_config("sparse_attn_forward", FORWARD_CONFIGS, FORWARD_CONFIGS_FP32, q, note)
    keys = sizes["W"] + (E if idx is None else K)
    programs = B * T * cdiv(H, config["BH"])
    splits, span = 1, keys
    if decode:
        step = 2 * config["BN"]
        splits, span = _splits(cdiv(keys, step), programs, q)
        span *= step
    m = lse
    acc = None
    l = None
    if splits > 1:
        acc, m, l = (q.new_empty(splits, B, T, H, n, dtype=torch.float32) for n in (D, 1, 1))
    entries_stride_b = 0 if entries is None else entries.stride(0)
    launch(
        sparse_attn_forward,
        (programs, splits),
        *(q, kv, entries, idx, window_len, lo, hi, cos, sin, sink),
        *(o, m, acc, l),
        *(T, kv.shape[1], entries_stride_b, K, E, H, D),
        *(D**-0.5, eps, span),
        SPLITS=splits,
        **sizes,
        **config,
    )
    if splits > 1:
        rows = B * T * H
        launch(
            sparse_attn_merge,
            (rows,),
            *(acc, m, l, cos, sin, o, lse),
            *(rows, H, D),
            SPLITS=splits,
            R=sizes["R"],
            BS=min(8, power_of_two(splits)),
            BD=sizes["BD"],
            BR=sizes["BR"],
            num_warps=4,
        )
    return o, lse
