"""indexer_loss: the loss of the lightning indexer, which learns the main attention's distribution
over entries (docs/v4.md#indexer, #training).

    p[t]    = the attention of token t to entries, summed over heads and normalised:
              p[t, w] = P[t, w] / sum_w P[t, w]
              P[t, w] = sum_h exp(q'[t, h] . k[w] / sqrt(D) - lse[t, h])
    I[t, w] = sum_h u[t, h] relu(qi[t, h] . ki[w])
    loss[t] = KL(p[t] || softmax(I[t])) = sum_w p[t, w] (log p[t, w] - log softmax(I[t])[w])

over the entries lo[t] <= w < hi[t] if idx is None (dense warm-up: all that a token sees), else over
idx[t, i] >= 0 (sparse training: those chosen, distinct). A token without entries costs 0 and has no
gradient; one with a single entry likewise.

    q         [B, T, H, D]            as of sparse_attn
    cos, sin  [B, T, r/2] fp32        as of sparse_attn
    entries   [B, N, D]               as of sparse_attn
    lse       [B, T, H] fp32          of sparse_attn, with_lse
    qi        [B, T, Hi, Di]          as of indexer_topk
    ki        [B, N, Di]              as of indexer_topk
    u         [B, T, Hi]              as of indexer_topk
    lo, hi    [B, T] int64
    idx       [B, T, topk] int64 or None
    loss      [B, T] fp32

The V4 paper does not give this loss. The recipe is that of V3.2 (DeepSeek-V3.2-Exp report, section
2.1): main scores summed over heads and L1-normalised, KL to the softmax of the index scores, the
indexer's input detached, over all tokens first and then over the chosen ones. V3.2 has no window
and no compressed entries. Our choice: only entries enter the loss, and lse is that of the joint
softmax, so each head is weighted by the attention it gives to entries.

q' is q, normalised and rotated as in sparse_attn. fp32 arithmetic; P is summed as a log, so that it
vanishes for no token. The main side (q, entries, lse) is constant: gradients go to qi, ki and u.
Tokens are processed in chunks, so that scores per head exist for a few of them at a time; the
backward recomputes them. Nothing is read back to the host. Deterministic but for the gradient of
chosen ki on a GPU, which atomics add up unless torch.use_deterministic_algorithms(True). By default
the op is opaque on CPU too: the chunks are a Python loop, which the reference form unrolls into the
graph. Errors: shapes that do not fit together.
"""

from __future__ import annotations

import torch

from .indexer_loss_reference import backward_reference, chunks, forward_reference
from .registry import Op, register, require


def check(
    # as of sparse_attn
    q,
    cos,
    sin,
    entries,
    lse,
    # as of indexer_topk
    qi,
    ki,
    u,
    lo,
    hi,
    idx,
    eps,
):
    require(
        q.dim() == qi.dim() == 4,
        f"indexer_loss: q {tuple(q.shape)} is not [B, T, H, D], or qi {tuple(qi.shape)} likewise",
    )
    B, T, H, D = q.shape
    require(
        lse.shape == (B, T, H)
        and cos.shape[:2] == sin.shape[:2] == (B, T)
        and 2 * cos.shape[2] <= D,
        f"indexer_loss: q {tuple(q.shape)}, lse {tuple(lse.shape)}, "
        f"cos {tuple(cos.shape)} do not fit",
    )
    require(
        entries.dim() == 3
        and entries.shape[::2] == (B, D)
        and ki.shape == (*entries.shape[:2], qi.shape[3])
        and qi.shape[:2] == lo.shape == hi.shape == (B, T)
        and u.shape == qi.shape[:3],
        f"indexer_loss: q {tuple(q.shape)}, entries {tuple(entries.shape)}, "
        f"qi {tuple(qi.shape)}, ki {tuple(ki.shape)}, u {tuple(u.shape)}, lo {tuple(lo.shape)} "
        "do not fit",
    )
    require(
        idx is None or idx.dim() == 3 and idx.shape[:2] == (B, T),
        "indexer_loss: idx is not [B, T, topk]",
    )


@torch.no_grad()
def indexer_recall(
    # as of sparse_attn
    q,
    cos,
    sin,
    entries,
    lse,
    # as of indexer_topk
    qi,
    ki,
    u,
    lo,
    hi,
    topk: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How well the indexer chooses, for evaluation -> recall, mass [B, T] fp32.

    recall  share of the topk entries with the largest p that are among the topk with the largest I
    mass    share of the attention to entries, the sum of p, of the topk with the largest I

    Both are 1 for tokens that see no more than topk entries: average over hi - lo > topk.
    """
    check(q, cos, sin, entries, lse, qi, ki, u, lo, hi, None, eps)

    def largest(log_share, hidden):
        """Mask of the topk entries that are visible."""
        top = log_share.topk(min(topk, log_share.shape[-1])).indices
        return torch.zeros_like(hidden).scatter_(-1, top, True) & ~hidden

    recall, mass = [], []
    for c in chunks(q, cos, sin, entries, lse, qi, ki, u, lo, hi, None, eps):
        best = largest(c.log_p, c.hidden)
        missed = ~c.hidden & ~largest(c.log_i, c.hidden)
        recall.append(1 - (best & missed).sum(-1) / best.sum(-1).clamp(min=1))
        mass.append(1 - (c.log_p.exp() * missed).sum(-1))
    return torch.cat(recall, 1), torch.cat(mass, 1)


def _flops(
    q,
    cos,
    sin,
    entries,
    lse,
    qi,
    ki,
    u,
    lo,
    hi,
    idx=None,
    *args,
    out_shape=None,
    # products and sums over the index heads
    products=1,
    sums=1,
    **kw,
):
    """Scores of the main heads, `products` of the index heads, and `sums` over those."""
    B, T, H, D = q
    Hi, Di = qi[2:]
    N = entries[1] if idx is None else idx[2]
    return 2 * B * T * N * (H * D + Hi * (products * Di + sums))


_backward_op = register(
    "indexer_loss_backward(Tensor g, Tensor q, Tensor cos, Tensor sin, Tensor entries, Tensor lse, "
    "Tensor qi, Tensor ki, Tensor u, Tensor lo, Tensor hi, Tensor? idx, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    impl=backward_reference,
    fake=lambda g, q, cos, sin, entries, lse, qi, ki, u, *rest: tuple(
        x.new_empty(x.shape) for x in (qi, ki, u)
    ),
    flops=lambda g, *args, out_shape=None, **kw: _flops(*args, products=3, sums=2),
)


def _setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, g):
    return *[None] * 5, *_backward_op(g, *ctx.saved_tensors, ctx.eps), *[None] * 4


_opaque = register(
    "indexer_loss(Tensor q, Tensor cos, Tensor sin, Tensor entries, Tensor lse, Tensor qi, "
    "Tensor ki, Tensor u, Tensor lo, Tensor hi, Tensor? idx, float eps) -> Tensor",
    impl=forward_reference,
    fake=lambda q, *rest: q.new_empty(q.shape[:2], dtype=torch.float32),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
)


def _main_side_detached(form):
    def call(q, cos, sin, entries, lse, *rest):
        return form(q.detach(), cos, sin, entries.detach(), lse.detach(), *rest)

    return call


indexer_loss = Op(
    "indexer_loss",
    _main_side_detached(forward_reference),
    _main_side_detached(_opaque),
    check,
    cpu=_main_side_detached(_opaque),
)
