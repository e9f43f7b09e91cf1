"""The scores of indexer_topk as keys, for its Triton kernels (see indexer_topk.py)."""

from __future__ import annotations

from ..launch import jit, tl
from .indexer_topk_select import HIDDEN


@jit
def indexer_topk_keys(k, q_t, u, BC: tl.constexpr, BQ: tl.constexpr, HP: tl.constexpr):
    """k [BC, DP], q_t [DP, BQ HP], u [BQ HP] -> keys of the scores sum_h u relu(q . k), [BC, BQ]"""
    s = tl.dot(k.to(q_t.dtype), q_t, input_precision="ieee")  # [BC, BQ HP]
    s = tl.maximum(s, 0.0) * u[None, :]
    s = tl.sum(tl.reshape(s, (BC, BQ, HP)), 2)
    bits = s.to(tl.int32, bitcast=True)
    return tl.minimum(tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits), 2147483646)


@jit
def indexer_topk_score(
    # index keys of a batch [E, D], and which of them: begin <= e < stop
    k_ptr,
    k_stride_e,
    begin,
    stop,
    # queries [DP, BQ HP] and weights [BQ HP]
    q_t,
    u,
    # of each token [BQ]: visible entries, whether it needs scores, whether it exists
    first,
    visible,
    scored,
    mask_q,
    # destination: a list for each token, from `held` on
    keys_ptr,
    offs_list,
    held,
    D: tl.constexpr,
    HP: tl.constexpr,
    DP: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """Store the keys of entries begin .. stop."""
    offs_c = tl.arange(0, BC)
    offs_d = tl.arange(0, DP)
    offs_k = offs_c[:, None] * k_stride_e + offs_d[None, :]
    for e in range(begin, stop, BC):
        offs_e = e + offs_c
        mask_e = (offs_e < stop)[:, None]
        k_ptrs = k_ptr + tl.cast(e, tl.int64) * k_stride_e + offs_k
        k = tl.load(k_ptrs, mask=mask_e & (offs_d < D)[None, :], other=0.0)
        key = indexer_topk_keys(k, q_t, u, BC, BQ, HP)
        inside = (offs_e[:, None] >= first[None, :]) & (
            offs_e[:, None] < (first + visible)[None, :]
        )
        key = tl.where(inside & scored[None, :], key, HIDDEN)
        out_ptrs = keys_ptr + offs_list[None, :] + (held + offs_e - begin)[:, None]
        tl.store(out_ptrs, key, mask=mask_e & mask_q[None, :])
