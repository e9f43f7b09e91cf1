"""indexer_topk: which compressed entries each token attends to (lightning indexer, docs/v4.md#indexer).

    I[t, e] = sum_h u[t, h] relu(q[t, h] . k[e])     for lo[t] <= e < hi[t]
    idx[t]  = the entries with the K largest I; -1 where fewer than K are visible. Their order means nothing.

    q [B, T, Hi, Di]   k [B, E, Di]   u [B, T, Hi]   lo, hi [B, T] int64
    idx [B, T, K] int64, K = min(topk, E)

fp32 arithmetic. No gradient: the choice is discrete. The reference walks tokens and entries in chunks, so that neither the
scores per head of a long prefill nor an fp32 copy of a long cache exist at once. Errors: shapes that do not fit together, topk < 1.

The kernel. A program takes a few neighbouring tokens with all their heads and walks the entries that any of them sees, once:
one product per tile of keys, summed over heads while still in registers. The scores of CAP entries gather in a buffer of the
program's own, which stays in the L2 cache; when it is full, the K best move to its front and the others are forgotten. The
K-th best is found by bisection: some 15 counts over values in registers, no sort. Tokens that see no more than K entries
get them all, unscored. Few tokens and a long cache: the visible entries are shared out among many programs, and a second
kernel merges what they choose. Deterministic: the lowest of equal entries are chosen, and listed in ascending order.
"""

from __future__ import annotations

import torch

from .registry import Op, register, require
from .triton.indexer_topk import LARGEST_K, kernels

CHUNK = 1 << 24  # scores per head, or values of k, held at a time


def check(q, k, u, lo, hi, topk):
    require(q.dim() == 4, f"indexer_topk: q {tuple(q.shape)} is not [B, T, Hi, Di]")
    B, T, H, D = q.shape
    require(
        k.dim() == 3
        and k.shape[::2] == (B, D)
        and u.shape == (B, T, H)
        and lo.shape == hi.shape == (B, T),
        f"indexer_topk: q {tuple(q.shape)}, k {tuple(k.shape)}, u {tuple(u.shape)}, lo {tuple(lo.shape)} do not fit",
    )
    require(topk > 0, f"indexer_topk: topk must be positive, not {topk}")


def scores(q: torch.Tensor, k: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """I [B, T, E] fp32, without visibility."""
    (B, T, H, D), out, qf = q.shape, [], q.float().flatten(1, 2)
    for part in k.split(max(1, CHUNK // (B * max(T * H, D))), 1):
        s = (qf @ part.float().transpose(1, 2)).relu_().view(B, T, H, -1)
        out.append(torch.einsum("bth,bthe->bte", u.float(), s))
    return torch.cat(out, 2)


def reference(
    q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, topk: int
) -> torch.Tensor:
    (B, T, H, _), E = q.shape, k.shape[1]
    e, step, out = (
        torch.arange(E, device=q.device),
        max(1, CHUNK // (B * H * E)),
        [],
    )  # tokens at a time
    for c in range(0, T, step):
        now = slice(c, c + step)
        hidden = (e < lo[:, now, None]) | (e >= hi[:, now, None])
        top = (
            scores(q[:, now], k, u[:, now])
            .masked_fill(hidden, float("-inf"))
            .topk(min(topk, E), -1, sorted=False)
        )
        out.append(torch.where(top.values > float("-inf"), top.indices, -1))
    return torch.cat(out, 1)


def kernel(
    q: torch.Tensor, k: torch.Tensor, u: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, topk: int
) -> torch.Tensor:
    form = reference if min(topk, k.shape[1]) > LARGEST_K else kernels
    return form(q, k, u, lo, hi, topk)


def _flops(q, k, *args, out_shape=None, **kw):
    """Products q . k and the weighted sum over heads, all entries."""
    B, T, H, D = q
    return 2 * B * T * k[1] * H * (D + 1)


_opaque = register(
    "indexer_topk(Tensor q, Tensor k, Tensor u, Tensor lo, Tensor hi, int topk) -> Tensor",
    impl=reference,
    fake=lambda q, k, u, lo, hi, topk: lo.new_empty(*lo.shape, min(topk, k.shape[1])),
    flops=_flops,
    kernel=kernel,
)

indexer_topk = Op(
    "indexer_topk",
    lambda q, k, u, *rest: reference(q.detach(), k.detach(), u.detach(), *rest),
    lambda q, k, u, *rest: _opaque(q.detach(), k.detach(), u.detach(), *rest),
    check,
)
