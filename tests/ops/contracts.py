"""Of every op: its formula (fp64 in, fp64 out), its gradients, and its dtypes in a bf16 model.

Written from docs/v4.md token by token, with loops: nothing is shared with ops/ but the number
formats, which have tests of their own (test_formats.py). A new op takes a row in CONTRACTS here and
rows in CASES (cases.py); then the tests of every op run over it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ops.formats import dequantize_fp4, dequantize_fp8, fake_quant

# --------------------------------------------------------------------------------------------------
# Quantisation, rotation, hyper-connections


def spec_act_quant(x, block, fmt):
    return fake_quant(x.detach(), block, fmt).double() + (x - x.detach())


def spec_rope(x, cos, sin, inverse):
    r = 2 * cos.shape[-1]
    heads = [1] * (x.dim() - 3)
    cos = cos.view(*cos.shape[:2], *heads, -1)
    sin = (-sin if inverse else sin).view(*sin.shape[:2], *heads, -1)
    real, imaginary = x[..., -r::2], x[..., 1 - r :: 2]
    rotated = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return torch.cat((x[..., :-r], rotated.flatten(-2)), -1)


def spec_hc_pre(x, fn, base, scale, norm_eps, hc_eps, iters):
    B, T, n, _ = x.shape
    v = x.flatten(2)
    m = (v @ fn.T) / (v.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    pre = torch.sigmoid(m[..., :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (m[..., 2 * n :] * scale[2] + base[2 * n :]).view(B, T, n, n)
    y = sum(pre[..., j, None] * x[:, :, j] for j in range(n))
    return y, post, spec_sinkhorn(logits, hc_eps, iters)


def spec_sinkhorn(logits, eps, iters):
    C = logits.exp() / logits.exp().sum(-1, keepdim=True) + eps
    for i in range(iters):
        C = C if i == 0 else C / (C.sum(-1, keepdim=True) + eps)
        C = C / (C.sum(-2, keepdim=True) + eps)
    return C


def spec_hc_post(y, x, post, comb):
    return post[..., None] * y[:, :, None] + comb.transpose(-1, -2) @ x


def spec_hc_post_pre(y, x, post, comb, *rest):
    x = spec_hc_post(y, x, post, comb)
    return x, *spec_hc_pre(x, *rest)


# --------------------------------------------------------------------------------------------------
# Entries and attention


def pooled(rows, end, index, ratio, D):
    """Softmax per channel over the slots of each entry, before the norm.

    Channels of rows: the values of each lane, then the logits of each lane.
    """
    lanes = rows.shape[2] // (2 * D)
    out = []
    for b, e in itertools.product(range(end.shape[0]), range(end.shape[1])):
        last = int(end[b, e]) + 1
        window = rows[b, last - ratio : last]
        values, logits = window[:, (lanes - 1) * D : lanes * D], window[:, -D:]
        if lanes == 2 and index[b, e] > 0:
            before = rows[b, last - 2 * ratio : last - ratio]
            values = torch.cat((before[:, :D], values))
            logits = torch.cat((before[:, 2 * D : 3 * D], logits))
        out.append((values * logits.softmax(0)).sum(0))
    return torch.stack(out).view(*end.shape, D)


def spec_compress(
    # the rows and their windows
    rows,
    end,
    index,
    # norm and RoPE of the entries
    weight,
    cos,
    sin,
    # constants
    ratio,
    eps,
    dtype,
):
    e = pooled(rows, end, index, ratio, len(weight))
    return spec_rope(e / (e.square().mean(-1, keepdim=True) + eps).sqrt() * weight, cos, sin, False)


def unit_queries(q, cos, sin, eps):
    """q', normalised per head and rotated."""
    return spec_rope(q / (q.square().mean(-1, keepdim=True) + eps).sqrt(), cos, sin, False)


def visible(args, b, t):
    """The arguments of sparse_attn -> the rows of kv, and of entries, that a token sees."""
    q, kv, _, window_len, _, _, entries, lo, hi, idx, _ = args
    end = t + 1 + kv.shape[1] - q.shape[1]
    window = range(end - window_len[b, t], end)
    return window, [] if entries is None else entries_of(lo, hi, idx, b, t)


def entries_of(lo, hi, idx, b, t):
    if idx is None:
        return list(range(lo[b, t], hi[b, t]))
    return [i for i in idx[b, t].tolist() if i >= 0]


def attention(*args):
    """-> o, lse"""
    q, kv, sink, _, cos, sin, entries, *_, eps = args
    q = unit_queries(q, cos, sin, eps)
    o, lse = [], []
    for b, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
        window, chosen = visible(args, b, t)
        keys = kv[b, window] if entries is None else torch.cat((kv[b, window], entries[b, chosen]))
        score = torch.cat((q.shape[3] ** -0.5 * q[b, t] @ keys.T, sink[:, None]), 1)
        o.append(score.softmax(1)[:, :-1] @ keys)
        lse.append(score.logsumexp(1))
    o = spec_rope(torch.stack(o).view(q.shape), cos, sin, True)
    return o, torch.stack(lse).view(q.shape[:3])


def spec_sparse_attn(*args):
    return attention(*args)[0]


def spec_indexer_topk(q, k, u, lo, hi, topk):
    (B, T), E = lo.shape, k.shape[1]
    out = torch.full((B, T, min(topk, E)), -1)
    for b, t in itertools.product(range(B), range(T)):
        seen = range(int(lo[b, t]), min(int(hi[b, t]), E))
        score = [float(u[b, t] @ (q[b, t] @ k[b, e]).relu()) for e in seen]
        best = sorted(zip(score, seen, strict=True), reverse=True)[:topk]
        out[b, t, : len(best)] = torch.tensor([e for _, e in best], dtype=torch.int64)
    return out


def spec_indexer_loss(
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
    q = unit_queries(q, cos, sin, eps)
    loss = []
    for b, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
        chosen = entries_of(lo, hi, idx, b, t)
        P = (q.shape[3] ** -0.5 * q[b, t] @ entries[b, chosen].T - lse[b, t, :, None]).exp().sum(0)
        p, index = P / P.sum(), (qi[b, t] @ ki[b, chosen].T).relu()
        loss.append((p * (p / (u[b, t] @ index).softmax(0)).log()).sum())
    return torch.stack(loss).view(q.shape[:2])


# --------------------------------------------------------------------------------------------------
# Products


def spec_linear_cross_entropy(x, weight, target):
    p = (x @ weight.T).log_softmax(1)
    return torch.stack([-p[i, t] if t >= 0 else 0 * p[i, 0] for i, t in enumerate(target.tolist())])


def spec_linear(x, weight):
    if weight.dim() == 2:
        return x @ weight.T
    return torch.stack([x[..., g, :] @ matrix.T for g, matrix in enumerate(weight)], -2)


def unpack(w, scale):
    if scale is None:
        return w
    dequantize = dequantize_fp4 if w.dtype == torch.int8 else dequantize_fp8
    return dequantize(w, scale, torch.float64)


def spec_quant_linear(x, weight, scale, groups, act_quant):
    x = spec_act_quant(x, 128, "fp8") if act_quant else x
    W = unpack(weight, scale)
    if groups == 1:
        return x @ W.T
    return torch.stack([x[..., g, :] @ rows.T for g, rows in enumerate(W.chunk(groups))], -2)


def spec_moe(
    x,
    # experts
    w13,
    w2,
    # routing
    idx,
    weight,
    # scales of packed experts
    s13,
    s2,
    # constants
    limit,
    act_quant,
):
    def quant(v):
        return spec_act_quant(v, 128, "fp8") if act_quant else v

    y = []
    for token, experts, shares in zip(x, idx.tolist(), weight, strict=True):
        terms = []
        for e, share in zip(experts, shares, strict=True):
            W1, W3 = w13[e].chunk(2)
            S1, S3 = (None, None) if s13 is None else s13[e].chunk(2)
            gate = (unpack(W1, S1) @ quant(token)).clamp(max=limit)
            up = (unpack(W3, S3) @ quant(token)).clamp(-limit, limit)
            h = gate / (1 + (-gate).exp()) * up * share
            terms.append(unpack(w2[e], None if s2 is None else s2[e]) @ quant(h))
        y.append(sum(terms))
    return torch.stack(y)


def spec_moe_decode(x, w13, w2, idx, weight, limit, act_quant):
    return spec_moe(x, w13, w2, idx, weight, None, None, limit, act_quant)


# --------------------------------------------------------------------------------------------------


class Contract(NamedTuple):
    spec: Callable
    grad: tuple[int, ...]  # arguments that have a gradient
    low: tuple[int, ...]  # arguments that are bf16 in a bf16 model
    out: tuple[bool, ...] = (False,)  # which outputs are fp32 whatever the dtype of the inputs
    rounding: float = 1.1  # error of a bf16 output, in units of rounding the exact result once


CONTRACTS = {
    "act_quant": Contract(spec_act_quant, (0,), (0,)),
    "rope": Contract(spec_rope, (0,), (0,)),
    "hc_pre": Contract(spec_hc_pre, (0, 1, 2, 3), (0,), (False, True, True)),
    "sinkhorn": Contract(spec_sinkhorn, (), (), (True,)),
    "hc_post": Contract(spec_hc_post, (0, 1, 2, 3), (0, 1)),
    "hc_post_pre": Contract(
        spec_hc_post_pre, (0, 1, 2, 3, 4, 5, 6), (0, 1), (False, False, True, True), rounding=3
    ),
    "compress": Contract(spec_compress, (0, 3), (), rounding=2.5),
    "sparse_attn": Contract(spec_sparse_attn, (0, 1, 2, 6), (0, 1, 6), rounding=4),
    "indexer_topk": Contract(spec_indexer_topk, (), (0, 1, 2)),
    "indexer_loss": Contract(spec_indexer_loss, (5, 6, 7), (0, 3, 5, 6, 7), (True,)),
    "linear_cross_entropy": Contract(spec_linear_cross_entropy, (0, 1), (0, 1), (True,)),
    "linear": Contract(spec_linear, (0, 1), (0, 1), rounding=2),
    "linear_fp32": Contract(spec_linear, (0, 1), (0, 1), (True,)),
    "quant_linear": Contract(spec_quant_linear, (0,), (0,), rounding=3),
    "moe": Contract(spec_moe, (0, 1, 2, 4), (0, 1, 2), (True,)),
    "moe_decode": Contract(spec_moe_decode, (), (), (True,)),
}
