"""The reference of indexer_loss (see indexer_loss.py), forward and backward, in chunks of tokens.

Scores per head, of all entries or of the chosen ones, exist for one chunk at a time; the backward
computes them again. M of the N entries take part: all, or the topk chosen ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .rope import reference as rotate
from .sparse_attn_reference import normalize

CHUNK = 1 << 24  # scores per head, or values of gathered entries, held at a time
# Log of a share of 0; finite, so that a token without entries has equal p and softmax(I)
HIDDEN = -1e30


class Chunk(NamedTuple):
    """Of t tokens and the M entries that take part, all or the chosen ones."""

    tokens: slice
    hidden: torch.Tensor  # [B, t, M] bool
    log_p: torch.Tensor  # [B, t, M]
    log_i: torch.Tensor  # log softmax(I) [B, t, M]
    s: torch.Tensor  # relu(qi . ki) [B, t, Hi, M]
    index_keys: torch.Tensor  # ki [B, M, Di], which all tokens share, or [B, t, M, Di]


def _rows(x, keys):
    """Heads of x [B, t, H, d] as rows of a product with keys: shared [B, M, d], or [B, t, M, d]."""
    return x.reshape(*keys.shape[:-2], -1, x.shape[-1])


def _products(x, keys):
    """x . k, [B, t, H, M]"""
    return (_rows(x, keys) @ keys.mT).view(*x.shape[:3], -1)


def chunks(
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
) -> Iterator[Chunk]:
    B, T, H, D = q.shape
    Hi, Di = qi.shape[2:]
    N = entries.shape[1]
    entries, ki = entries.float(), ki.float()
    keys, index_keys = entries, ki
    e = torch.arange(N, device=q.device)
    row = torch.arange(B, device=q.device)[:, None, None]
    elements = N * max(H, Hi) if idx is None else idx.shape[2] * max(H, Hi, D, Di)  # per token
    step = max(1, CHUNK // max(1, B * elements))
    for start in range(0, T, step):
        tokens = slice(start, start + step)
        if idx is None:
            hidden = (e < lo[:, tokens, None]) | (e >= hi[:, tokens, None])
        else:
            hidden = idx[:, tokens] < 0
            chosen = idx[:, tokens].clamp(min=0)
            keys, index_keys = entries[row, chosen], ki[row, chosen]
        # log P = logsumexp over heads of q' . k / sqrt(D) - lse, [B, t, M]
        q_tokens = normalize(q[:, tokens], eps)[0]
        q_tokens = rotate(q_tokens, cos[:, tokens], sin[:, tokens], False)
        attention = _products(q_tokens, keys)
        log_p = attention.mul_(D**-0.5).sub_(lse[:, tokens, :, None]).logsumexp(2)
        # I = u relu(qi . ki), [B, t, M]
        s = _products(qi[:, tokens].float(), index_keys).relu_()
        index_scores = (u[:, tokens, None].float() @ s)[:, :, 0]
        log_p = log_p.masked_fill(hidden, HIDDEN).log_softmax(-1)
        log_i = index_scores.masked_fill(hidden, HIDDEN).log_softmax(-1)
        yield Chunk(tokens, hidden, log_p, log_i, s, index_keys)


def forward_reference(*args) -> torch.Tensor:
    return torch.cat([(c.log_p.exp() * (c.log_p - c.log_i)).sum(-1) for c in chunks(*args)], 1)


def backward_reference(
    g: torch.Tensor,
    # the inputs of the forward: as of sparse_attn
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
    """Gradients of qi, ki and u: that of I is g (softmax(I) - p)."""
    g_qi = qi.new_empty(qi.shape)
    g_u = u.new_empty(u.shape)
    g_ki = torch.zeros(ki.shape, dtype=torch.float32, device=ki.device)
    # First entry of each row where those of all rows lie one behind the other
    first = torch.arange(len(ki), device=ki.device)[:, None, None] * ki.shape[1]
    for c in chunks(q, cos, sin, entries, lse, qi, ki, u, lo, hi, idx, eps):
        tokens, keys = c.tokens, c.index_keys
        g_i = (c.log_i.exp() - c.log_p.exp()) * g[:, tokens, None]
        # I = sum_h u s: g_u = s g_I, g_s = u g_I where s > 0
        g_u[:, tokens] = (c.s @ g_i[..., None])[..., 0]
        g_s = _rows((c.s > 0) * u[:, tokens, :, None] * g_i[:, :, None], keys)
        # s = relu(qi . ki): g_qi = g_s ki, g_ki = g_s^T qi
        g_qi[:, tokens] = (g_s @ keys).view(qi[:, tokens].shape)
        g_keys = g_s.mT @ _rows(qi[:, tokens].float(), keys)
        if idx is None:
            g_ki += g_keys
        else:
            target = (first + idx[:, tokens].clamp(min=0)).flatten()
            g_ki.view(-1, ki.shape[2]).index_add_(0, target, g_keys.flatten(0, 2))
    return g_qi, g_ki.to(ki.dtype), g_u
