"""indexer_loss: what the lightning indexer learns from, the main attention's choice of entries (docs/v4.md#indexer, #training).

    p[t]    = how the main attention of token t shares itself out among entries, summed over heads:
              p[t, w] = P[t, w] / sum_w P[t, w],     P[t, w] = sum_h exp(q'[t, h] . k[w] / sqrt(D) - lse[t, h])
    I[t, w] = sum_h u[t, h] relu(qi[t, h] . ki[w])
    loss[t] = KL(p[t] || softmax(I[t])) = sum_w p[t, w] (log p[t, w] - log softmax(I[t])[w])

over the entries lo[t] <= w < hi[t] if idx is None (dense warm-up: all that a token sees), else over idx[t, i] >= 0 (sparse
training: those chosen, distinct). A token without entries costs 0 and has no gradient; one with a single entry likewise.

    q [B, T, H, D]   cos, sin [B, T, r/2] fp32   entries [B, E, D]   lse [B, T, H] fp32     as of sparse_attn, with_lse
    qi [B, T, Hi, Di]   ki [B, E, Di]   u [B, T, Hi]     as of indexer_topk   lo, hi [B, T] int64   idx [B, T, K] int64 or None
    loss [B, T] fp32

The V4 paper does not give this loss. The recipe is that of V3.2 (DeepSeek-V3.2-Exp report, section 2.1): main scores summed over
heads and L1-normalised, KL to the softmax of the index scores, the indexer's input detached, over all tokens first and then over
the chosen ones. Ours to decide was what V3.2 has no word for: only entries take part, since only they are chosen among, and
lse is that of the joint softmax with window and sink, so that a head counts by the share that it gives to entries.

q' is q, normalised and rotated as in sparse_attn. fp32 arithmetic; P is summed as a log, so no token's vanishes. The main side
(q, entries, lse) is constant: gradients go to qi, ki and u. Tokens are worked off in chunks, so that scores per head exist
for a few of them at a time; the backward recomputes them. Nothing is read back to the host. Deterministic but for the gradient
of chosen ki on a GPU, which atomics add up unless torch.use_deterministic_algorithms(True).
By default the op is opaque on CPU too: the chunks are a Python loop, which the reference form unrolls into the graph.
Errors: shapes that do not fit together.
"""

from __future__ import annotations

import torch

from .registry import Op, register, require
from .rope import reference as rotate
from .sparse_attn import _normalized

CHUNK = 1 << 24  # scores per head, or values of gathered entries, held at a time
HIDDEN = (
    -1e30
)  # log of a share that is none; finite, so that a token without entries has equal p and softmax(I)


def check(q, cos, sin, entries, lse, qi, ki, u, lo, hi, idx, eps):
    require(
        q.dim() == qi.dim() == 4,
        f"indexer_loss: q {tuple(q.shape)} is not [B, T, H, D], or qi {tuple(qi.shape)} likewise",
    )
    B, T, H, D = q.shape
    require(
        lse.shape == (B, T, H)
        and cos.shape[:2] == sin.shape[:2] == (B, T)
        and 2 * cos.shape[2] <= D,
        f"indexer_loss: q {tuple(q.shape)}, lse {tuple(lse.shape)}, cos {tuple(cos.shape)} do not fit",
    )
    require(
        entries.dim() == 3
        and entries.shape[::2] == (B, D)
        and ki.shape == (*entries.shape[:2], qi.shape[3])
        and qi.shape[:2] == lo.shape == hi.shape == (B, T)
        and u.shape == qi.shape[:3],
        f"indexer_loss: q {tuple(q.shape)}, entries {tuple(entries.shape)}, qi {tuple(qi.shape)}, ki {tuple(ki.shape)}, "
        f"u {tuple(u.shape)}, lo {tuple(lo.shape)} do not fit",
    )
    require(
        idx is None or idx.dim() == 3 and idx.shape[:2] == (B, T),
        "indexer_loss: idx is not [B, T, K]",
    )


def _rows(x, keys):
    """Heads of x [B, t, H, d] as rows of products with keys [B, N, d], which all tokens share, or [B, t, N, d]."""
    return x.reshape(*keys.shape[:-2], -1, x.shape[-1])


def _products(x, keys):
    """x . k, [B, t, H, N]"""
    return (_rows(x, keys) @ keys.mT).view(*x.shape[:3], -1)


def _chunks(q, cos, sin, entries, lse, qi, ki, u, lo, hi, idx, eps):
    """Chunks of tokens -> slice, hidden [B, t, N], log p and log softmax(I) [B, t, N], relu(qi . ki) [B, t, Hi, N], their ki."""
    (B, T, H, D), (Hi, Di), E = q.shape, qi.shape[2:], entries.shape[1]
    entries, ki = keys, index_keys = entries.float(), ki.float()
    e, row = torch.arange(E, device=q.device), torch.arange(B, device=q.device)[:, None, None]
    held = E * max(H, Hi) if idx is None else idx.shape[2] * max(H, Hi, D, Di)
    step = max(1, CHUNK // max(1, B * held))
    for now in (slice(c, c + step) for c in range(0, T, step)):
        if idx is None:
            hidden = (e < lo[:, now, None]) | (e >= hi[:, now, None])
        else:
            hidden, chosen = idx[:, now] < 0, idx[:, now].clamp(min=0)
            keys, index_keys = entries[row, chosen], ki[row, chosen]
        main = _products(
            rotate(_normalized(q[:, now], eps)[0], cos[:, now], sin[:, now], False), keys
        )
        p = main.mul_(D**-0.5).sub_(lse[:, now, :, None]).logsumexp(2)
        s = _products(qi[:, now].float(), index_keys).relu_()
        I = (u[:, now, None].float() @ s)[:, :, 0]
        yield (
            now,
            hidden,
            *(x.masked_fill(hidden, HIDDEN).log_softmax(-1) for x in (p, I)),
            s,
            index_keys,
        )


def forward_reference(*args) -> torch.Tensor:
    return torch.cat([(p.exp() * (p - i)).sum(-1) for _, _, p, i, _, _ in _chunks(*args)], 1)


def backward_reference(g: torch.Tensor, q, cos, sin, entries, lse, qi, ki, u, lo, hi, idx, eps):
    """Gradients of qi, ki and u: that of I is g (softmax(I) - p)."""
    g_qi, g_u = qi.new_empty(qi.shape), u.new_empty(u.shape)
    g_ki = torch.zeros(ki.shape, dtype=torch.float32, device=ki.device)
    first = (
        torch.arange(len(ki), device=ki.device)[:, None, None] * ki.shape[1]
    )  # a batch's entries, all in a row
    for now, _, p, i, s, keys in _chunks(q, cos, sin, entries, lse, qi, ki, u, lo, hi, idx, eps):
        g_i = (i.exp() - p.exp()) * g[:, now, None]
        g_u[:, now] = (s @ g_i[..., None])[..., 0]
        g_s = _rows((s > 0) * u[:, now, :, None] * g_i[:, :, None], keys)
        g_qi[:, now] = (g_s @ keys).view(qi[:, now].shape)
        g_k = g_s.mT @ _rows(qi[:, now].float(), keys)  # of the keys that took part
        if idx is None:
            g_ki += g_k
        else:
            g_ki.view(-1, ki.shape[2]).index_add_(
                0, (first + idx[:, now].clamp(min=0)).flatten(), g_k.flatten(0, 2)
            )
    return g_qi, g_ki.to(ki.dtype), g_u


@torch.no_grad()
def indexer_recall(
    q, cos, sin, entries, lse, qi, ki, u, lo, hi, topk: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """How well the indexer chooses, for evaluation, each [B, T] fp32: share of the topk entries with the largest p that are
    among the topk with the largest I; share of the attention to entries, the sum of p, that those have.

    Both are 1 for tokens that see no more than topk entries: average over hi - lo > topk.
    """
    check(q, cos, sin, entries, lse, qi, ki, u, lo, hi, None, eps)
    found, mass = [], []
    for _, hidden, p, i, _, _ in _chunks(q, cos, sin, entries, lse, qi, ki, u, lo, hi, None, eps):
        best, chosen = (
            torch.zeros_like(hidden).scatter_(-1, x.topk(min(topk, x.shape[-1])).indices, True)
            & ~hidden
            for x in (p, i)
        )
        missed = ~hidden & ~chosen
        found.append(1 - (best & missed).sum(-1) / best.sum(-1).clamp(min=1))
        mass.append(1 - (p.exp() * missed).sum(-1))
    return torch.cat(found, 1), torch.cat(mass, 1)


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
    products=1,
    sums=1,
    **kw,
):
    """Scores of the main heads, `products` of the index heads, and `sums` over those."""
    (B, T, H, D), (Hi, Di), N = q, qi[2:], entries[1] if idx is None else idx[2]
    return 2 * B * T * N * (H * D + Hi * (products * Di + sums))


_backward_op = register(
    "indexer_loss_backward(Tensor g, Tensor q, Tensor cos, Tensor sin, Tensor entries, Tensor lse, Tensor qi, Tensor ki, Tensor u, "
    "Tensor lo, Tensor hi, Tensor? idx, float eps) -> (Tensor, Tensor, Tensor)",
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
    "indexer_loss(Tensor q, Tensor cos, Tensor sin, Tensor entries, Tensor lse, Tensor qi, Tensor ki, Tensor u, "
    "Tensor lo, Tensor hi, Tensor? idx, float eps) -> Tensor",
    impl=forward_reference,
    fake=lambda q, *rest: q.new_empty(q.shape[:2], dtype=torch.float32),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
)


def _form(form):
    def call(q, cos, sin, entries, lse, *rest):
        return form(q.detach(), cos, sin, entries.detach(), lse.detach(), *rest)

    return call


indexer_loss = Op(
    "indexer_loss", _form(forward_reference), _form(_opaque), check, cpu=_form(_opaque)
)
