"""The Triton kernel of the backward of sparse_attn for keys (see sparse_attn_backward.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..launch import cdiv, jit, launch, processors, tl
from .sparse_attn_common import sparse_attn_dot

KV_CONFIGS = [
    dict(BH=32, BK=32, num_warps=8, num_stages=1),
    dict(BH=16, BK=32, num_warps=8, num_stages=1),
    dict(BH=16, BK=16, num_warps=4, num_stages=1),
]
KV_CONFIGS_FP32 = [
    dict(BH=16, BK=8, num_warps=16, num_stages=1),
    dict(BH=16, BK=8, num_warps=8, num_stages=1),
]


@jit
def sparse_attn_backward_kv(
    # keys [B, N, D], rows of kv or entries; which of them tokens see: chosen [B, T, N + 1], or lo,
    # hi [B, T]
    keys_ptr,
    chosen_ptr,
    lo_ptr,
    hi_ptr,
    # of each block of keys: the tokens that may see it [B, blocks]
    begin_ptr,
    end_ptr,
    # g, q [B, T, H, D], and results of sparse_attn_backward_q
    g_ptr,
    q_ptr,
    q_r_ptr,
    g_r_ptr,
    lse_ptr,
    delta_ptr,
    norm_ptr,
    # gradient of the keys, of each part of the tokens [parts, B, N, D] fp32
    g_keys_ptr,
    # shapes
    T,
    N,
    keys_stride_b,
    H,
    D,
    W: tl.constexpr,
    R: tl.constexpr,
    # block sizes: heads, keys, dims, rotated dims
    BH: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    """Gradient of BK keys from one part of the tokens begin <= t < end that may see them.

    With W, keys are rows of windows, of which tokens see the last lo; else entries lo <= n < hi, or
    chosen ones.
    """
    block = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    offs_n = block * BK + tl.arange(0, BK)
    offs_d = tl.arange(0, BD)
    offs_r = tl.arange(0, BR)
    offs_bh = tl.arange(0, BH)
    mask_n = (offs_n < N)[:, None]
    row_ptrs = keys_ptr + b * keys_stride_b + offs_n[:, None].to(tl.int64) * D
    k = tl.load(row_ptrs + offs_d[None], mask=mask_n & (offs_d < D)[None], other=0.0)
    k_r = tl.load(row_ptrs + (D - R + offs_r)[None], mask=mask_n & (offs_r < R)[None], other=0.0)

    # The tokens of this part
    offs_block = b * tl.num_programs(0) + block
    begin = tl.load(begin_ptr + offs_block)
    end = tl.load(end_ptr + offs_block)
    head_blocks = tl.cdiv(H, BH)
    span = tl.cdiv(end - begin, tl.num_programs(1))
    begin += tl.program_id(1) * span

    acc = tl.zeros([BK, BD], tl.float32)
    acc_r = tl.zeros([BK, BR], tl.float32)
    for step in range(begin * head_blocks, tl.minimum(end, begin + span) * head_blocks):
        # A block of heads of one token, and the keys that it sees [BK]
        t = b * T + step // head_blocks
        offs_h = step % head_blocks * BH + offs_bh
        if chosen_ptr is not None:
            seen = tl.load(chosen_ptr + t * (N + 1) + offs_n, mask=offs_n < N, other=0) != 0
        elif W:
            end_window = step // head_blocks + W
            seen = (offs_n >= end_window - tl.load(lo_ptr + t)) & (offs_n < end_window)
        else:
            seen = (offs_n >= tl.load(lo_ptr + t)) & (offs_n < tl.load(hi_ptr + t))

        # Its rows of q' and g', [BH, BD] and [BH, BR], and statistics, [1, BH]
        row = t * H + offs_h
        mask_h = (offs_h < H)[:, None]
        mask_d = mask_h & (offs_d < D - R)[None]
        mask_r = mask_h & (offs_r < R)[None]
        q = tl.load(q_ptr + (row * D)[:, None] + offs_d[None], mask=mask_d, other=0.0)
        g = tl.load(g_ptr + (row * D)[:, None] + offs_d[None], mask=mask_d, other=0.0)
        q_r = tl.load(q_r_ptr + (row * R)[:, None] + offs_r[None], mask=mask_r, other=0.0)
        g_r = tl.load(g_r_ptr + (row * R)[:, None] + offs_r[None], mask=mask_r, other=0.0)
        norm = tl.load(norm_ptr + row, mask=offs_h < H, other=0.0)[None]
        lse = tl.load(lse_ptr + row, mask=offs_h < H, other=float("inf"))[None] * 1.4426950408889634
        delta = tl.load(delta_ptr + row, mask=offs_h < H, other=0.0)[None]

        # p = exp(s - lse); g_s = p (g' k^T - delta) / sqrt(D), transposed: [BK, BH]
        kq = sparse_attn_dot(k, k_r, q, q_r) * norm
        p = tl.where(seen[:, None], tl.exp2(kq - lse), 0.0)
        g_s = p * (sparse_attn_dot(k, k_r, g, g_r) - delta) * (norm * 0.6931471805599453)
        g_s = g_s.to(k.dtype)
        p = p.to(k.dtype)
        # g_k += g_s q' + p g', [BK, BD] and [BK, BR]
        acc = tl.dot(g_s, q, acc, input_precision="ieee")
        acc = tl.dot(p, g, acc, input_precision="ieee")
        acc_r = tl.dot(g_s, q_r, acc_r, input_precision="ieee")
        acc_r = tl.dot(p, g_r, acc_r, input_precision="ieee")

    offs_part = tl.program_id(1) * tl.num_programs(2) + b
    g_ptrs = g_keys_ptr + (offs_part * N + offs_n)[:, None] * D
    tl.store(g_ptrs + offs_d[None], acc, mask=mask_n & (offs_d < D - R)[None])
    tl.store(g_ptrs + (D - R + offs_r)[None], acc_r, mask=mask_n & (offs_r < R)[None])


class TokenRows:
    """Per-token inputs of sparse_attn_backward_kv, and its launcher for one source of keys (window,
    range, chosen).
    """

    def __init__(
        self,
        # of the kernel
        sizes: dict,
        config: dict,
        # tensors of the kernel, in its order
        g,
        q,
        q_r,
        g_r,
        lse,
        delta,
        norm,
    ):
        self.tensors = g, q, q_r, g_r, lse, delta, norm
        self.shapes = {name: sizes[name] for name in ("R", "BD", "BR")}
        self.config = config

    def block_starts(self, n: int) -> torch.Tensor:
        """First keys of the blocks that n keys are cut into."""
        return torch.arange(0, n, self.config["BK"], device=self.tensors[0].device)

    def gradient(
        self,
        keys: torch.Tensor,
        sees: torch.Tensor,
        chosen: torch.Tensor | None,
        lo: torch.Tensor | None,
        hi: torch.Tensor | None,
        W: int,
    ) -> torch.Tensor:
        """Gradient of keys [B, N, D] fp32. sees [B, T, blocks]: which tokens may see which blocks
        of keys.
        """
        q = self.tensors[1]
        B, T, H, D = q.shape
        blocks = sees.shape[2]
        t = torch.arange(T, device=q.device, dtype=torch.int32)[:, None]
        begin = torch.where(sees, t, T).amin(1)
        end = torch.where(sees, t + 1, 0).amax(1)
        splits = max(1, min(T, cdiv(2 * processors(q), max(1, B * blocks))))
        g_keys = q.new_empty(splits, *keys.shape, dtype=torch.float32)
        launch(
            sparse_attn_backward_kv,
            (blocks, splits, B),
            *(keys, chosen, lo, hi, begin, end),
            *self.tensors,
            g_keys,
            *(T, keys.shape[1], keys.stride(0), H, D),
            W=W,
            **self.shapes,
            **self.config,
        )
        return g_keys.sum(0)


def window_gradient(rows: TokenRows, kv: torch.Tensor, window_len: torch.Tensor, W: int, T: int):
    start = rows.block_starts(kv.shape[1])
    t = torch.arange(T, device=kv.device)[:, None]
    sees = (t < start + rows.config["BK"]) & (t + W > start)
    return rows.gradient(kv, sees.expand(len(kv), -1, -1), None, window_len, None, W)


def range_gradient(rows: TokenRows, entries: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor):
    start = rows.block_starts(entries.shape[1])
    sees = (lo[..., None] < start + rows.config["BK"]) & (hi[..., None] > start)
    return rows.gradient(entries, sees, None, lo, hi, 0)


def chosen_gradient(rows: TokenRows, entries: torch.Tensor, idx: torch.Tensor):
    """Collected by entry, without atomics."""
    B, T, _ = idx.shape
    N = entries.shape[1]
    BK = rows.config["BK"]
    chosen = torch.zeros(B, T, N + 1, dtype=torch.uint8, device=idx.device)
    chosen.scatter_(2, torch.where(idx < 0, N, idx), 1)  # the last column is for -1
    sees = F.pad(chosen[..., :N], (0, -N % BK)).unflatten(2, (-1, BK)).amax(-1) > 0
    return rows.gradient(entries, sees, chosen, None, None, 0)
