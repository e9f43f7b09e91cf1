"""The reference of sparse_attn (see sparse_attn.py), forward and backward, in chunks of tokens.

Tokens are cut into blocks of n, which share one band of window keys, and into chunks of blocks,
which bound the scores held at a time: a query x key x dim tensor is never built for a long prefill.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .rope import reference as rotate

CHUNK = 1 << 24  # elements (scores and gathered entries) held at a time
BLOCK = 64  # tokens that share one band of W - 1 + BLOCK window keys


class Chunk(NamedTuple):
    """Operands of t tokens, padded to whole blocks of n."""

    tokens: slice  # without padding
    q: torch.Tensor  # [B, t, H, D]
    keys: torch.Tensor  # window keys [B, t + band - n, D]; block i has the band from i n on
    n: int
    band: int
    cos: torch.Tensor  # [B, t, r/2]
    sin: torch.Tensor
    window_len: torch.Tensor  # [B, t]
    lo: torch.Tensor | None
    hi: torch.Tensor | None
    idx: torch.Tensor | None  # [B, t, topk]

    @property
    def size(self) -> int:
        """Tokens without padding."""
        return self.tokens.stop - self.tokens.start

    @property
    def padding(self) -> int:
        return self.q.shape[1] - self.size


def _chunks(
    q,
    kv,
    window_len,
    cos,
    sin,
    # entries and which of them a token sees
    entries,
    lo,
    hi,
    idx,
) -> Iterator[Chunk]:
    B, T, H, D = q.shape
    n = min(T, BLOCK)
    band = kv.shape[1] - T + n
    if entries is None:
        entry_elements = 0
    elif idx is None:
        entry_elements = entries.shape[1] * H
    else:
        entry_elements = idx.shape[2] * (H + D)
    elements = max(H, D // n) * band + entry_elements  # held per token
    step = max(1, CHUNK // (B * elements * n)) * n

    def cut(x, start, stop, pad):
        """Tokens start .. stop of x [B, T, ...] and zeros."""
        if x is None:
            return None
        trailing = (0, 0) * (x.dim() - 2)
        return F.pad(x[:, start:stop], (*trailing, 0, pad))

    for start in range(0, T, step):
        stop = min(start + step, T)
        pad = (start - stop) % n
        keys = F.pad(kv[:, start : stop + band - n], (0, 0, 0, pad))
        rows = [cut(x, start, stop, pad) for x in (cos, sin, window_len, lo, hi, idx)]
        yield Chunk(slice(start, stop), cut(q, start, stop, pad), keys, n, band, *rows)


def normalize(q, eps):
    """-> q / rms [.., D] fp32, 1 / rms [.., 1]"""
    q = q.float()
    rstd = torch.rsqrt(q.square().mean(-1, keepdim=True) + eps)
    return q * rstd, rstd


def _scores(q, chunk: Chunk, entries):
    """q' [B, t, H, D] -> scores [B, t, H, band + N or topk] fp32, -inf where hidden; the keys of
    each block's band [B t/n, band, D]; all entries [B, N, D], or the chosen [B, t, topk, D], fp32.
    """
    B, t, H, D = q.shape
    n = chunk.n
    band = chunk.band
    idx = chunk.idx
    q = q.float()

    # Window: the blocks' queries against their bands
    bands = chunk.keys.float().unfold(1, band, n).reshape(-1, D, band)  # [B t/n, D, band]
    scores = (q.reshape(-1, n * H, D) @ bands).view(B, t, H, band)
    j = torch.arange(band, device=q.device)
    own = torch.arange(t, device=q.device) % n + band - n  # a token's own key in its band
    hidden = (j > own[:, None]) | (j <= own[:, None] - chunk.window_len[..., None])  # [B, t, band]

    # Entries: all of them, or gathered
    if entries is not None and idx is None:
        entries = entries.float()
        e = torch.arange(entries.shape[1], device=q.device)
        entry_hidden = (e < chunk.lo[..., None]) | (e >= chunk.hi[..., None])
    elif entries is not None:
        row = torch.arange(B, device=q.device)[:, None, None]
        entries = entries[row, idx.clamp(min=0)].float()
        entry_hidden = idx < 0
    if entries is not None:
        scores = torch.cat((scores, _product(q, entries.transpose(-1, -2))), -1)
        hidden = torch.cat((hidden, entry_hidden), -1)
    scores = (scores * D**-0.5).masked_fill(hidden[:, :, None], float("-inf"))
    return scores, bands, entries


def _blocks(x, n):
    """[B, t, H, x] -> [B t/n, n H, x]"""
    return x.reshape(-1, n * x.shape[2], x.shape[-1])


def _flat(x):
    """[B, t, H, x] -> [B, t H, x]"""
    return x.flatten(1, 2)


def _product(x, y):
    """x [B, t, H, m] times y, which all tokens share [B, m, n], or of each [B, t, m, n]"""
    if y.dim() == 4:
        return x @ y
    return (_flat(x) @ y).view(*x.shape[:3], -1)


def _attend(chunk: Chunk, entries, sink, eps):
    """-> o [B, t, H, D], lse [B, t, H]"""
    n, band = chunk.n, chunk.band
    q = rotate(normalize(chunk.q, eps)[0].to(chunk.q.dtype), chunk.cos, chunk.sin, False)
    scores, bands, entries = _scores(q, chunk, entries)

    # p = exp(s - m), den = sum p + exp(sink - m)
    m = torch.maximum(scores.amax(-1), sink.float())  # [B, t, H]
    p = (scores - m[..., None]).exp()
    den = p.sum(-1) + (sink.float() - m).exp()
    p = p.to(q.dtype).float()

    # o' = sum p k / den
    p_window, p_entries = p[..., :band], p[..., band:]
    o = (_blocks(p_window, n) @ bands.transpose(1, 2)).view(q.shape)
    if entries is not None:
        o = o + _product(p_entries, entries)
    o = rotate((o / den[..., None]).to(q.dtype), chunk.cos, chunk.sin, True)
    return o, m + den.log()


def forward_reference(
    # queries, keys of the window, angles
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
):
    """-> o, lse"""
    if entries is not None and entries.requires_grad:
        entries = entries.float()  # gradients of an entry that many tokens chose add up in fp32
    out, lse = [], []
    for chunk in _chunks(q, kv, window_len, cos, sin, entries, lo, hi, idx):
        o, l = _attend(chunk, entries, sink, eps)
        out.append(o[:, : chunk.size])
        lse.append(l[:, : chunk.size])
    return torch.cat(out, 1), torch.cat(lse, 1)


def backward_reference(
    g: torch.Tensor,
    lse: torch.Tensor,
    # the inputs of the forward
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    window_len: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entries: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    idx: torch.Tensor | None,
    eps: float,
):
    """Gradients of q, kv, sink and entries (empty where there are none), recomputing probabilities
    from lse.
    """
    g_q = q.new_empty(q.shape)
    g_kv = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    entries_shape = (0,) if entries is None else entries.shape
    g_entries = torch.zeros(entries_shape, dtype=torch.float32, device=q.device)
    delta = torch.empty_like(lse)
    for chunk in _chunks(q, kv, window_len, cos, sin, entries, lo, hi, idx):
        tokens, size = chunk.tokens, chunk.size
        chunk_g_q, chunk_delta, g_keys = _chunk_backward(
            chunk, g[:, tokens], lse[:, tokens], entries, g_entries, eps
        )
        g_q[:, tokens] = chunk_g_q[:, :size].to(q.dtype)
        delta[:, tokens] = chunk_delta[:, :size, :, 0]
        lookback = chunk.band - chunk.n
        g_kv[:, tokens.start : tokens.stop + lookback] += g_keys[:, : size + lookback]
    return g_q, g_kv.to(kv.dtype), sink_gradient(delta, lse, sink), g_entries.to(q.dtype)


def _chunk_backward(chunk: Chunk, g, lse, entries, g_entries, eps):
    """-> gradients of q [B, t, H, D] fp32, delta [B, t, H, 1], gradients of the keys of the window
    [B, .., D] fp32; adds to g_entries.
    """
    n = chunk.n
    band = chunk.band
    idx = chunk.idx
    B, t, H, D = chunk.q.shape

    # Forward again: q' and p = exp(s - lse), 0 for padded tokens, [B, t, H, band + N or topk]
    unit, rstd = normalize(chunk.q, eps)
    q = rotate(unit.to(chunk.q.dtype), chunk.cos, chunk.sin, False)
    scores, bands, chunk_entries = _scores(q, chunk, entries)
    p = (scores - F.pad(lse, (0, 0, 0, chunk.padding), value=float("inf"))[..., None]).exp()
    q = q.float()

    # g' = g rotated; g_p = g' . k
    g = rotate(F.pad(g.float(), (0, 0, 0, 0, 0, chunk.padding)), chunk.cos, chunk.sin, False)
    g_p = (_blocks(g, n) @ bands).view(B, t, H, band)
    if entries is not None:
        g_p = torch.cat((g_p, _product(g, chunk_entries.transpose(-1, -2))), -1)

    # delta = sum_j p_j g_p_j, exact where g . o would be rounded; g_s = p (g_p - delta) / sqrt(D)
    delta = (p * g_p).sum(-1, keepdim=True)
    g_s = p * (g_p - delta) * D**-0.5

    # Window: g_q' = g_s k; g_k = g_s^T q' + p^T g', [B t/n, band, D], added up where bands overlap
    g_w, p_w = _blocks(g_s[..., :band], n), _blocks(p[..., :band], n)
    g_q = (g_w @ bands.transpose(1, 2)).view_as(q)
    g_band = g_w.transpose(1, 2) @ _blocks(q, n) + p_w.transpose(1, 2) @ _blocks(g, n)
    g_keys = torch.zeros_like(chunk.keys, dtype=torch.float32)
    block_start = torch.arange(0, t, n, device=q.device)
    target = (block_start[:, None] + torch.arange(band, device=q.device)).flatten()
    g_keys.index_add_(1, target, g_band.view(B, -1, D))

    # Entries, likewise
    g_e, p_e = g_s[..., band:], p[..., band:]
    if entries is not None:
        g_q += _product(g_e, chunk_entries)
    if idx is not None:
        g_chosen = g_e.transpose(2, 3) @ q + p_e.transpose(2, 3) @ g  # [B, t, topk, D]; 0 for -1
        first = torch.arange(B, device=q.device)[:, None, None] * entries.shape[1]
        target = (idx.clamp(min=0) + first).flatten()
        g_entries.view(-1, D).index_add_(0, target, g_chosen.reshape(-1, D))
    elif entries is not None:
        g_e, p_e = _flat(g_e).transpose(1, 2), _flat(p_e).transpose(1, 2)
        g_entries += g_e @ _flat(q) + p_e @ _flat(g)

    # Through rotation and norm: g_q = rstd (g_q' - q^ mean(g_q' q^)), q^ = q rstd
    g_q = rotate(g_q, chunk.cos, chunk.sin, True)
    g_q = rstd * (g_q - unit * (g_q * unit).mean(-1, keepdim=True))
    return g_q, delta, g_keys


def sink_gradient(delta, lse, sink):
    """- sum_t exp(sink - lse) delta"""
    return -((sink.float() - lse).exp() * delta).sum((0, 1)).to(sink.dtype)
