"""indexer_topk: which compressed entries each token attends to (lightning indexer,
docs/v4.md#indexer).

    I[t, w] = sum_h u[t, h] relu(q[t, h] . k[w])     for lo[t] <= w < hi[t]
    idx[t]  = the entries with the topk largest I; -1 where fewer are visible; in any order

    q [B, T, Hi, Di]   k [B, N, Di]   u [B, T, Hi]   lo, hi [B, T] int64
    idx [B, T, min(topk, N)] int64

Equations 13 to 17 of arXiv 2606.19348; `Indexer` of DeepSeek's inference code. fp32 arithmetic. No
gradient: the choice is discrete. The reference walks tokens and entries in chunks, so that neither
the scores per head of a long prefill nor an fp32 copy of a long cache exist at once. Errors: shapes
that do not fit together, topk < 1.
"""

from __future__ import annotations

import torch

from .registry import Op, register, require
from .triton.indexer_topk import indexer_topk_kernels
from .triton.indexer_topk_merge import LARGEST_K

CHUNK = 1 << 24  # scores per head, or values of k, held at a time


def check(q, k, u, lo, hi, topk):
    require(q.dim() == 4, f"indexer_topk: q {tuple(q.shape)} is not [B, T, Hi, Di]")
    B, T, Hi, Di = q.shape
    require(
        k.dim() == 3
        and k.shape[::2] == (B, Di)
        and u.shape == (B, T, Hi)
        and lo.shape == hi.shape == (B, T),
        f"indexer_topk: q {tuple(q.shape)}, k {tuple(k.shape)}, u {tuple(u.shape)}, "
        f"lo {tuple(lo.shape)} do not fit",
    )
    require(topk > 0, f"indexer_topk: topk must be positive, not {topk}")


def scores(q: torch.Tensor, k: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """I [B, T, N] fp32, without visibility."""
    B, T, Hi, Di = q.shape
    q = q.float().flatten(1, 2)
    step = max(1, CHUNK // (B * max(T * Hi, Di)))  # entries at a time
    out = []
    for part in k.split(step, 1):
        s = (q @ part.float().transpose(1, 2)).relu_().view(B, T, Hi, -1)
        out.append(torch.einsum("bth,bthn->btn", u.float(), s))
    return torch.cat(out, 2)


def reference(
    q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, topk: int
) -> torch.Tensor:
    B, T, Hi, _ = q.shape
    N = k.shape[1]
    e = torch.arange(N, device=q.device)
    step = max(1, CHUNK // (B * Hi * N))  # tokens at a time
    out = []
    for start in range(0, T, step):
        tokens = slice(start, start + step)
        hidden = (e < lo[:, tokens, None]) | (e >= hi[:, tokens, None])
        s = scores(q[:, tokens], k, u[:, tokens]).masked_fill(hidden, float("-inf"))
        top = s.topk(min(topk, N), -1, sorted=False)
        out.append(torch.where(top.values > float("-inf"), top.indices, -1))
    return torch.cat(out, 1)


def kernel(
    q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, topk: int
) -> torch.Tensor:
    if min(topk, k.shape[1]) > LARGEST_K:
        return reference(q, k, u, lo, hi, topk)
    return indexer_topk_kernels(q, k, u, lo, hi, topk)


def _flops(q, k, *args, out_shape=None, **kw):
    """Products q . k and the weighted sum over heads, all entries."""
    B, T, Hi, Di = q
    return 2 * B * T * k[1] * Hi * (Di + 1)


_opaque = register(
    "indexer_topk(Tensor q, Tensor k, Tensor u, Tensor lo, Tensor hi, int topk) -> Tensor",
    impl=reference,
    fake=lambda q, k, u, lo, hi, topk: lo.new_empty(*lo.shape, min(topk, k.shape[1])),
    flops=_flops,
    kernel=kernel,
)


def _detached(form):
    def call(q, k, u, lo, hi, topk):
        return form(q.detach(), k.detach(), u.detach(), lo, hi, topk)

    return call


indexer_topk = Op("indexer_topk", _detached(reference), _detached(_opaque), check)
