"""The Triton kernels of the backward of sparse_attn (see ops/sparse_attn.py).

    p_j = exp(s_j - lse)          g_p_j = g' . k_j
    delta = sum_j p_j g_p_j       g_s_j = p_j (g_p_j - delta)
    g_q' = sum_j g_s_j k_j / sqrt(D)
    g_k_j = sum over tokens and heads of g_s_j q' / sqrt(D) + p_j g'

with g' the gradient of o', g rotated. sparse_attn_backward_q walks the keys of each token, as the
forward does, and leaves delta, the norms and the rotated dims for sparse_attn_backward_kv, which
walks the tokens of each block of keys. Chosen entries get their gradient from the first, by
atomics, or from the second, which reads more: see below.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, jit, launch, tl
from .sparse_attn_backward_kv import (
    KV_CONFIGS,
    KV_CONFIGS_FP32,
    TokenRows,
    chosen_gradient,
    range_gradient,
    window_gradient,
)
from .sparse_attn_common import (
    block_config,
    constants,
    contiguous,
    sparse_attn_dot,
    sparse_attn_key_range,
    sparse_attn_load_keys,
    sparse_attn_load_rows,
    with_packed_rows,
)

# With up to this many entries per chosen one, their gradient is collected by entry, from all tokens
# that may see it.
MASKED = 2
Q_CONFIGS = [
    dict(BH=64, BN=32, num_warps=8, num_stages=1),
    dict(BH=16, BN=32, num_warps=4, num_stages=1),
    dict(BH=16, BN=16, num_warps=4, num_stages=1),
]
Q_CONFIGS_FP32 = [
    dict(BH=8, BN=16, num_warps=16, num_stages=1),
    dict(BH=8, BN=16, num_warps=8, num_stages=1),
]


@jit
def sparse_attn_backward_q(
    # gradient of o, and inputs of the forward
    g_ptr,
    q_ptr,
    kv_ptr,
    entries_ptr,
    idx_ptr,
    window_len_ptr,
    lo_ptr,
    hi_ptr,
    cos_ptr,
    sin_ptr,
    lse_ptr,
    # gradients: of q; of entries, fp32, with SCATTER
    g_q_ptr,
    g_entries_ptr,
    # for sparse_attn_backward_kv: delta, norm [B, T, H] fp32, rotated dims of q and g [B, T, H, r]
    delta_ptr,
    norm_ptr,
    q_r_ptr,
    g_r_ptr,
    # shapes; N: rows of kv, K: chosen entries, E: entries
    T,
    N,
    entries_stride_b,
    K,
    E,
    H,
    D,
    # 1 / sqrt(D), epsilon of the norm
    scale,
    eps,
    SCATTER: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    # block sizes: heads, keys, dims, rotated dims, chosen entries
    BH: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    """Gradient of q, and per-token inputs of sparse_attn_backward_kv; with SCATTER the gradient of
    chosen entries, by atomics.
    """
    head_blocks = tl.cdiv(H, BH)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)  # token, counted over all rows
    b = t // T
    offs_h = tl.program_id(0) % head_blocks * BH + tl.arange(0, BH)
    mask_h = (offs_h < H)[:, None]
    offs_row = ((t * H + offs_h) * D)[:, None]
    cos_ptr += t * (R // 2)
    sin_ptr += t * (R // 2)

    # q' but for its norm, and g'; scores in units of log 2
    q, q_r, square = sparse_attn_load_rows(q_ptr, offs_row, mask_h, cos_ptr, sin_ptr, D, R, BD, BR)
    g, g_r, _ = sparse_attn_load_rows(g_ptr, offs_row, mask_h, cos_ptr, sin_ptr, D, R, BD, BR)
    rstd = tl.rsqrt(square / D + eps)
    norm = rstd * (scale * 1.4426950408889634)

    # Keys of this token
    start_n, end_n, first_entry = sparse_attn_key_range(
        t, window_len_ptr, lo_ptr, hi_ptr, idx_ptr, K, E, W, BK
    )
    if entries_ptr is not None:
        entries_ptr += b * entries_stride_b + first_entry * D
    if idx_ptr is not None:
        idx_ptr += t * K
    window_ptr = kv_ptr + (b * N + t % T) * D
    lse = (
        tl.load(lse_ptr + t * H + offs_h, mask=offs_h < H, other=float("inf")) * 1.4426950408889634
    )

    # delta = sum_j p_j (g' . k_j) in a pass of its own: g . o would be rounded
    delta = tl.zeros([BH], tl.float32)
    for n in range(start_n // BN * BN, end_n, BN):
        offs_n = n + tl.arange(0, BN)
        k, k_r, mask_n, entry = sparse_attn_load_keys(
            offs_n, start_n, end_n, window_ptr, entries_ptr, idx_ptr, D, W, R, BD, BR
        )
        qk = sparse_attn_dot(q, q_r, k, k_r) * norm[:, None]  # [BH, BN]
        p = tl.where(mask_n[None], tl.exp2(qk - lse[:, None]), 0.0)
        delta += tl.sum(p * sparse_attn_dot(g, g_r, k, k_r), 1)

    acc = tl.zeros([BH, BD], tl.float32)
    acc_r = tl.zeros([BH, BR], tl.float32)
    mean = tl.zeros([BH], tl.float32)
    offs_d = tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    for n in range(start_n // BN * BN, end_n, BN):
        offs_n = n + tl.arange(0, BN)
        k, k_r, mask_n, entry = sparse_attn_load_keys(
            offs_n, start_n, end_n, window_ptr, entries_ptr, idx_ptr, D, W, R, BD, BR
        )
        # p = exp(s - lse); g_s = p (g' k^T - delta), [BH, BN]
        qk = sparse_attn_dot(q, q_r, k, k_r) * norm[:, None]
        p = tl.where(mask_n[None], tl.exp2(qk - lse[:, None]), 0.0)
        g_s = p * (sparse_attn_dot(g, g_r, k, k_r) - delta[:, None])
        # sum_j g_s_j k_j, [BH, BD] and [BH, BR]
        mean += tl.sum(g_s * qk, 1)
        acc = tl.dot(g_s.to(k.dtype), k, acc, input_precision="ieee")
        acc_r = tl.dot(g_s.to(k.dtype), k_r, acc_r, input_precision="ieee")
        if SCATTER:
            # g_k = sum_h g_s q' / sqrt(D) + p g', [BN, BR] and [BN, BD]
            g_s = tl.trans((g_s * (rstd * scale)[:, None]).to(k.dtype))
            p = tl.trans(p.to(k.dtype))
            g_k_ptrs = g_entries_ptr + ((b * E + entry) * D)[:, None]
            mask_k = (mask_n & (offs_n >= W))[:, None]
            g_k = tl.dot(g_s, q_r, input_precision="ieee")
            g_k = tl.dot(p, g_r, g_k, input_precision="ieee")
            mask_r = mask_k & (offs_r < R)[None]
            tl.atomic_add(g_k_ptrs + (D - R + offs_r)[None], g_k, mask=mask_r, sem="relaxed")
            g_k = tl.dot(g_s, q, input_precision="ieee")
            g_k = tl.dot(p, g, g_k, input_precision="ieee")
            mask_d = mask_k & (offs_d < D - R)[None]
            tl.atomic_add(g_k_ptrs + offs_d[None], g_k, mask=mask_d, sem="relaxed")

    # Through the norm, q' = q rstd: g_q = rstd (g_q' - q' mean(g_q' q')), where the mean is sum_j
    # g_s_j s_j / D, rotated or not
    mean = (mean * 0.6931471805599453 / D * rstd)[:, None]
    dtype = g_q_ptr.dtype.element_ty
    g_q = rstd[:, None] * (acc * scale - q.to(tl.float32) * mean)
    tl.store(g_q_ptr + offs_row + offs_d[None], g_q.to(dtype), mask=mask_h & (offs_d < D - R)[None])

    # The rotated dims, rotated back
    g_q = rstd[:, None] * (acc_r * scale - q_r.to(tl.float32) * mean)
    x, y = tl.split(tl.reshape(g_q, (BH, BR // 2, 2)))
    offs_pair = tl.arange(0, BR // 2)
    cos = tl.load(cos_ptr + offs_pair, mask=2 * offs_pair < R, other=0.0)[None]
    sin = tl.load(sin_ptr + offs_pair, mask=2 * offs_pair < R, other=0.0)[None]
    pair_ptrs = g_q_ptr + offs_row + D - R + 2 * offs_pair[None]
    pair_mask = mask_h & (2 * offs_pair < R)[None]
    tl.store(pair_ptrs, (x * cos + y * sin).to(dtype), mask=pair_mask)
    tl.store(pair_ptrs + 1, (y * cos - x * sin).to(dtype), mask=pair_mask)

    offs = ((t * H + offs_h) * R)[:, None] + offs_r[None]
    mask = mask_h & (offs_r < R)[None]
    tl.store(q_r_ptr + offs, q_r, mask=mask)
    tl.store(g_r_ptr + offs, g_r, mask=mask)
    tl.store(delta_ptr + t * H + offs_h, delta, mask=offs_h < H)
    tl.store(norm_ptr + t * H + offs_h, norm, mask=offs_h < H)


def backward_kernels(
    g: torch.Tensor,
    lse: torch.Tensor,
    # the inputs of the forward but sink
    q: torch.Tensor,
    kv: torch.Tensor,
    window_len: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entries: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    idx: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> gradients of q, kv and entries (empty without), and delta [B, T, H] fp32."""
    B, T, H, D = q.shape
    if B * T == 0:
        g_entries = q.new_zeros(0 if entries is None else entries.shape)
        return torch.empty_like(q), torch.zeros_like(kv), g_entries, torch.empty_like(lse)
    g, lse, q, kv, window_len, cos, sin = contiguous(
        g.to(q.dtype), lse, q, kv, window_len, cos, sin
    )
    entries = with_packed_rows(entries)
    lo, hi, idx = contiguous(lo, hi, idx)
    E = 0 if entries is None else entries.shape[1]
    K = 0 if idx is None else idx.shape[2]
    sizes = constants(q, kv, cos, idx)
    scatter = (
        idx is not None and E > MASKED * K and not torch.are_deterministic_algorithms_enabled()
    )

    g_q = torch.empty_like(q)
    g_entries = q.new_zeros(B, E, D, dtype=torch.float32) if scatter else None
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse)
    q_r = q.new_empty(B, T, H, sizes["R"])
    g_r = q.new_empty(B, T, H, sizes["R"])
    note = " scatter" if scatter else ""
    config = block_config("sparse_attn_backward_q", Q_CONFIGS, Q_CONFIGS_FP32, q, note)
    launch(
        sparse_attn_backward_q,
        (B * T * cdiv(H, config["BH"]),),
        *(g, q, kv, entries, idx, window_len, lo, hi, cos, sin, lse),
        *(g_q, g_entries, delta, norm, q_r, g_r),
        *(T, kv.shape[1], 0 if entries is None else entries.stride(0), K, E, H, D),
        *(D**-0.5, eps),
        SCATTER=scatter,
        **sizes,
        **config,
    )

    config = block_config("sparse_attn_backward_kv", KV_CONFIGS, KV_CONFIGS_FP32, q)
    rows = TokenRows(sizes, config, g, q, q_r, g_r, lse, delta, norm)
    g_kv = window_gradient(rows, kv, window_len, sizes["W"], T)
    if entries is None:
        g_entries = q.new_empty(0)
    elif idx is None:
        g_entries = range_gradient(rows, entries, lo, hi)
    elif not scatter:
        g_entries = chosen_gradient(rows, entries, idx)
    return g_q, g_kv.to(kv.dtype), g_entries.to(q.dtype), delta
