"""Contracts of ops/: each op against its formula in fp64, its opaque form against its reference.

Each op has one row in CONTRACTS and several in CASES; the generic tests run over all of them.
The number formats, which the specifications here build on, have their own tests in test_formats.py.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import ops
from ops import cpp
from ops.cpp import KERNELS
from ops.formats import (
    dequantize_fp4,
    dequantize_fp8,
    fake_quant,
    quantize_fp4,
    quantize_fp8,
    scale_to_float,
)
from ops.launch import INTERPRETING
from testing import rms

normal, integers = torch.randn, torch.randint
OPS = ops.OPS | ops.INTERNAL


# --------------------------------------------------------------------------------------------------
# What each op computes, straight from the formulas: fp64 in, fp64 out


def spec_act_quant(x, block, fmt):
    return fake_quant(x.detach(), block, fmt).double() + (x - x.detach())


def spec_rope(x, cos, sin, inverse):
    r = 2 * cos.shape[-1]
    cos, sin = (
        t.view(*t.shape[:2], *[1] * (x.dim() - 3), -1) for t in (cos, -sin if inverse else sin)
    )
    real, imaginary = x[..., -r::2], x[..., 1 - r :: 2]
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    return torch.cat((x[..., :-r], turned.flatten(-2)), -1)


def spec_hc_pre(x, fn, base, scale, norm_eps, hc_eps, iters):
    (B, T, n, _), v = x.shape, x.flatten(2)
    m = (v @ fn.T) / (v.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    pre = torch.sigmoid(m[..., :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    C = spec_sinkhorn((m[..., 2 * n :] * scale[2] + base[2 * n :]).view(B, T, n, n), hc_eps, iters)
    return sum(pre[..., j, None] * x[:, :, j] for j in range(n)), post, C


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


def pooled(rows, end, index, ratio, D):
    """Softmax per channel over the slots of each entry, before the norm."""
    lanes, out = rows.shape[2] // (2 * D), []
    for b, e in itertools.product(range(end.shape[0]), range(end.shape[1])):
        last = int(end[b, e]) + 1
        window = rows[
            b, last - ratio : last
        ]  # the channels: values of each lane, then logits of each lane
        values, logits = window[:, (lanes - 1) * D : lanes * D], window[:, -D:]
        if lanes == 2 and index[b, e] > 0:
            before = rows[b, last - 2 * ratio : last - ratio]
            values, logits = (
                torch.cat((before[:, :D], values)),
                torch.cat((before[:, 2 * D : 3 * D], logits)),
            )
        out.append((values * logits.softmax(0)).sum(0))
    return torch.stack(out).view(*end.shape, D)


def spec_compress(rows, end, index, weight, cos, sin, ratio, eps, dtype):
    e = pooled(rows, end, index, ratio, len(weight))
    return spec_rope(e / (e.square().mean(-1, keepdim=True) + eps).sqrt() * weight, cos, sin, False)


def visible(args, b, t):
    """-> the rows of kv, and of entries, that a token sees."""
    q, kv, _, window_len, _, _, entries, lo, hi, idx, _ = args
    end = t + 1 + kv.shape[1] - q.shape[1]
    return range(end - window_len[b, t], end), [] if entries is None else entries_of(
        lo, hi, idx, b, t
    )


def entries_of(lo, hi, idx, b, t):
    return (
        list(range(lo[b, t], hi[b, t]))
        if idx is None
        else [i for i in idx[b, t].tolist() if i >= 0]
    )


def attention(*args):
    """-> o, lse"""
    (q, kv, sink, _, cos, sin, entries, *_, eps), o, lse = args, [], []
    q = spec_rope(q / (q.square().mean(-1, keepdim=True) + eps).sqrt(), cos, sin, False)
    for b, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
        window, chosen = visible(args, b, t)
        keys = kv[b, window] if entries is None else torch.cat((kv[b, window], entries[b, chosen]))
        score = torch.cat((q.shape[3] ** -0.5 * q[b, t] @ keys.T, sink[:, None]), 1)
        o.append(score.softmax(1)[:, :-1] @ keys)
        lse.append(score.logsumexp(1))
    return spec_rope(torch.stack(o).view(q.shape), cos, sin, True), torch.stack(lse).view(
        q.shape[:3]
    )


def spec_sparse_attn(*args):
    return attention(*args)[0]


def spec_indexer_topk(q, k, u, lo, hi, topk):
    (B, T), E = lo.shape, k.shape[1]
    out = torch.full((B, T, min(topk, E)), -1)
    for b in range(B):
        for t in range(T):
            visible = range(int(lo[b, t]), min(int(hi[b, t]), E))
            score = [float(u[b, t] @ (q[b, t] @ k[b, e]).relu()) for e in visible]
            best = sorted(zip(score, visible, strict=True), reverse=True)[:topk]
            out[b, t, : len(best)] = torch.tensor([e for _, e in best], dtype=torch.int64)
    return out


def spec_indexer_loss(q, cos, sin, entries, lse, qi, ki, u, lo, hi, idx, eps):
    q, loss = spec_rope(q / (q.square().mean(-1, keepdim=True) + eps).sqrt(), cos, sin, False), []
    for b, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
        chosen = entries_of(lo, hi, idx, b, t)
        P = (q.shape[3] ** -0.5 * q[b, t] @ entries[b, chosen].T - lse[b, t, :, None]).exp().sum(0)
        p, index = P / P.sum(), (qi[b, t] @ ki[b, chosen].T).relu()
        loss.append((p * (p / (u[b, t] @ index).softmax(0)).log()).sum())
    return torch.stack(loss).view(q.shape[:2])


def spec_linear_cross_entropy(x, weight, target):
    p = (x @ weight.T).log_softmax(1)
    return torch.stack([-p[i, t] if t >= 0 else 0 * p[i, 0] for i, t in enumerate(target.tolist())])


def spec_quant_linear(x, weight, scale, groups, act_quant):
    x = spec_act_quant(x, 128, "fp8") if act_quant else x
    W = unpack(weight, scale)
    if groups == 1:
        return x @ W.T
    return torch.stack([x[..., g, :] @ rows.T for g, rows in enumerate(W.chunk(groups))], -2)


def unpack(w, scale):
    if scale is None:
        return w
    return (dequantize_fp4 if w.dtype == torch.int8 else dequantize_fp8)(w, scale, torch.float64)


def spec_moe(x, w13, w2, idx, weight, s13, s2, limit, act_quant):
    quant = (lambda v: spec_act_quant(v, 128, "fp8")) if act_quant else (lambda v: v)
    y = []
    for token, experts, shares in zip(x, idx.tolist(), weight, strict=True):
        terms = []
        for e, share in zip(experts, shares, strict=True):
            (W1, W3), (S1, S3) = w13[e].chunk(2), (None, None) if s13 is None else s13[e].chunk(2)
            gate = (unpack(W1, S1) @ quant(token)).clamp(max=limit)
            up = (unpack(W3, S3) @ quant(token)).clamp(-limit, limit)
            h = gate / (1 + (-gate).exp()) * up * share
            terms.append(unpack(w2[e], None if s2 is None else s2[e]) @ quant(h))
        y.append(sum(terms))
    return torch.stack(y)


def spec_moe_decode(x, w13, w2, idx, weight, limit, act_quant):
    return spec_moe(x, w13, w2, idx, weight, None, None, limit, act_quant)


def spec_moe_train(x, w13, w2, idx, weight, limit):
    return spec_moe(x, w13, w2, idx, weight, None, None, limit, False)


class Contract(NamedTuple):
    spec: Callable
    grad: tuple[int, ...]  # arguments that have a gradient
    low: tuple[int, ...]  # arguments that are bf16 in a bf16 model
    out: tuple[bool, ...] = (False,)  # which outputs are fp32 whatever the dtype of the inputs
    rounding: float = (
        1.1  # error of a bf16 output, in units of that of rounding the exact result once
    )


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
    "quant_linear": Contract(spec_quant_linear, (0,), (0,), rounding=3),
    "moe": Contract(spec_moe, (0, 1, 2, 4), (0, 1, 2), (True,)),
    "moe_decode": Contract(spec_moe_decode, (), (), (True,)),
    "moe_train": Contract(spec_moe_train, (0, 1, 2, 4), (), (True,)),
}


# --------------------------------------------------------------------------------------------------
# Arguments


def angles(B, T, r):
    angle = torch.rand(B, T, r // 2) * 7
    return angle.cos(), angle.sin()


def ranges(B, T, E):
    """lo, hi: empty for some tokens, everything for some."""
    lo, hi = integers(0, E + 1, (2, B, T)).sort(0).values
    everything = torch.rand(B, T) < 0.2
    return lo.masked_fill(everything, 0), hi.masked_fill(everything, E)


def choices(B, T, E, K):
    """idx: none for some tokens."""
    idx = (
        torch.rand(B, T, E).argsort(-1)[..., :K].masked_fill(torch.rand(B, T, min(K, E)) < 0.4, -1)
    )
    return idx.masked_fill(torch.rand(B, T, 1) < 0.2, -1)


def spread(*shape):
    """Values over many binades: what a quantised value becomes depends on its block."""
    return normal(shape) * torch.exp2(integers(-9, 1, shape).float())


def act_quant(block, fmt, *shape):
    return spread(*shape), block, fmt


def rope(B, T, H, D, r, inverse):
    return normal(B, T, H, D) if H else normal(B, T, D), *angles(B, T, r), inverse


def hc_pre(B, T, n, d, iters):
    rows = n * (2 + n)
    return (
        normal(B, T, n, d),
        normal(rows, n * d) * (n * d) ** -0.5,
        normal(rows) / 2,
        torch.rand(3) + 0.5,
        1e-3,
        1e-3,
        iters,
    )


def sinkhorn(*shape):
    *shape, iters = shape
    return 2 * normal(*shape), 1e-3, iters


def hc_post(B, T, n, d):
    return normal(B, T, d), normal(B, T, n, d), normal(B, T, n), normal(B, T, n, n)


def hc_post_pre(B, T, n, d, iters):
    return *hc_post(B, T, n, d), *hc_pre(B, T, n, d, iters)[1:]


def compress(B, T, ratio, D, r):
    lanes = 2 if ratio == 4 else 1
    N, E = lanes * ratio - 1 + T, (T - 1) // ratio + 1
    end, index = integers(lanes * ratio - 1, N, (B, E)), integers(0, 3, (B, E))
    return (
        normal(B, N, 2 * lanes * D),
        end,
        index,
        normal(D),
        *angles(B, E, r),
        ratio,
        1e-3,
        torch.float32,
    )


def sparse_attn(B, T, W, kind, H=3, D=6, E=9, K=7):
    q, kv, sink, entries = (
        2 * normal(B, T, H, D),
        normal(B, W - 1 + T, D),
        2 * normal(H),
        normal(B, E, D),
    )
    window_len, (lo, hi), idx = integers(1, W + 1, (B, T)), ranges(B, T, E), choices(B, T, E, K)
    given = {
        "window": (None,) * 4,
        "dense": (entries, lo, hi, None),
        "idx": (entries, lo, hi, idx),
    }[kind]
    return q, kv, sink, window_len, *angles(B, T, max(2, D // 4 * 2)), *given, 1e-3


def indexer_topk(B, T, E, topk, H=17, D=4):
    return normal(B, T, H, D), normal(B, E, D), normal(B, T, H), *ranges(B, T, E), topk


def indexer_loss(B, T, E, kind, H=3, D=6, Hi=5, Di=4, K=7):
    q, entries, lse = 2 * normal(B, T, H, D), normal(B, E, D), 2 * normal(B, T, H)
    index = normal(B, T, Hi, Di), normal(B, E, Di), normal(B, T, Hi)
    (lo, hi), idx = ranges(B, T, E), choices(B, T, E, K)
    return (
        q,
        *angles(B, T, max(2, D // 4 * 2)),
        entries,
        lse,
        *index,
        lo,
        hi,
        idx if kind == "idx" else None,
        1e-3,
    )


def linear_cross_entropy(N, V, d=6):
    return (
        2 * normal(N, d),
        normal(V, d),
        integers(0, V, (N,)).masked_fill(torch.rand(N) < 0.3, -100),
    )


def pack(w, fmt):
    """-> stored weights, scales; "fp8f" has fp32 scales that are no powers of two."""
    if fmt == "float":
        return w, None
    q, scale = (quantize_fp4 if fmt == "fp4" else quantize_fp8)(w)
    return q, scale_to_float(scale) * (1 + torch.rand(scale.shape)) if fmt == "fp8f" else scale


def quant_linear(lead, i, o, groups, fmt, quantized):
    w = normal(o, i) * torch.exp2(integers(-2, 3, (o, 1)).float()) * i**-0.5
    return spread(*lead, *[groups] * (groups > 1), i), *pack(w, fmt), groups, quantized


def moe(N, E, K, d, I, fmt, quantized, routing="random"):
    (w1, s1), (w3, s3), (w2, s2) = (
        pack(normal(E, o, i) * i**-0.5 * 1.5, fmt) for o, i in ((I, d), (I, d), (d, I))
    )
    idx = {
        "random": torch.rand(N, E).argsort(-1)[:, :K],
        "one": torch.full((N, K), E - 2),
        "twice": integers(0, 2, (N, 1)) * (E - 1) + torch.zeros(K, dtype=torch.int64),
    }[routing]
    s13 = None if s1 is None else torch.cat((s1, s3), 1)
    x, w13 = 4 * spread(N, d) if quantized else normal(N, d), torch.cat((w1, w3), 1)
    return x, w13, w2, idx, torch.rand(N, K) + 0.1, s13, s2, 0.8, quantized


def moe_decode(N, E, K, d, I, quantized, routing="random"):
    x, w13, w2, idx, weight, _, _, limit, quantized = moe(
        N, E, K, d, I, "float", quantized, routing
    )
    return x, w13, w2, idx, weight, limit, quantized


def moe_train(*sizes):
    x, w13, w2, idx, weight, _, _, limit, _ = moe(*sizes[:5], "float", False, *sizes[5:])
    return x, w13, w2, idx, weight, limit


class Case(NamedTuple):
    op: str
    build: Callable
    options: tuple

    def __str__(self):
        return "-".join(str(option).replace(" ", "") for option in (self.op, *self.options))

    def args(self) -> tuple:
        torch.manual_seed(0)
        return self.build(*self.options)

    @property
    def module(self):
        """Where the references are."""
        name = "sparse_attn_reference" if self.op == "sparse_attn" else self.op
        return importlib.import_module(f"ops.{name}")


def cases(build, *rows):
    return [Case(build.__name__, build, row) for row in rows]


LENGTHS = [
    (3, 5),
    (1, 1),
    (3, 1),
    (2, 2),
    (2, 63),
    (1, 64),
    (2, 65),
    (1, 130),
]  # B, T; the long ones are for blocks of references
LENGTHS = LENGTHS[:4] if INTERPRETING else LENGTHS
CASES = [  # the first three of each op use every optional argument
    *cases(
        act_quant,
        (64, "fp8", 2, 5, 70),
        (32, "fp4", 3, 33),
        (128, "fp8", 3, 1, 200),
        (32, "fp4", 1, 2, 2, 64),
    ),
    *cases(
        rope,
        (2, 5, 3, 6, 4, True),
        (2, 5, 0, 6, 2, False),
        (3, 65, 0, 4, 4, True),
        *((*L, 3, 6, 4, False) for L in LENGTHS),
    ),
    *cases(
        hc_pre,
        (2, 5, 4, 7, 20),
        (1, 2, 3, 5, 1),
        (3, 2, 2, 1, 2),
        *((*L, 4, 6, 3) for L in LENGTHS),
        (1, 3, 4, 16, 3),
        (1, 2, 4, 20, 3),
    ),
    *cases(
        sinkhorn,
        (2, 5, 4, 4, 20),
        (1, 7, 3, 3, 1),
        (3, 1, 2, 2, 5),
        (70, 5, 5, 3),
        (1, 1, 4, 4, 20),
    ),
    *cases(hc_post, *((*L, 4, 6) for L in LENGTHS), (2, 5, 3, 1), (1, 3, 4, 16), (1, 2, 4, 20)),
    *cases(
        hc_post_pre,
        (2, 5, 4, 7, 20),
        (1, 2, 3, 5, 1),
        (3, 2, 2, 1, 2),
        *((*L, 4, 6, 3) for L in LENGTHS),
        (1, 3, 4, 16, 3),
        (1, 2, 4, 20, 3),
    ),
    *cases(
        compress,
        (3, 5, 4, 6, 4),
        (2, 5, 128, 4, 4),
        (3, 1, 2, 6, 6),
        *((*L, 4, 5, 2) for L in LENGTHS),
        (2, 130, 128, 6, 2),
    ),
    *cases(
        sparse_attn,
        *((*L, W, kind) for L in LENGTHS for W, kind in ((8, "window"), (5, "dense"), (8, "idx"))),
        (2, 5, 1, "idx"),
        (2, 5, 8, "dense", 1, 4, 1),
        (2, 3, 8, "idx", 2, 4, 3),
        *(() if INTERPRETING else ((1, 130, 70, "dense"), (1, 65, 128, "idx", 1, 2))),
    ),
    *cases(
        indexer_topk,
        *((*L, 33, 7) for L in LENGTHS),
        (2, 5, 4, 9),
        (2, 5, 4, 4),
        (1, 1, 1, 1),
        (3, 2, 70, 1),
    ),
    *cases(
        indexer_loss,
        *((*L, 9, kind) for L in LENGTHS for kind in ("idx", "dense")),
        (2, 5, 1, "dense", 1, 4, 2, 2),
        (2, 5, 3, "idx", 2, 4, 7, 8),
        (1, 65, 33, "dense", 2, 2, 17),
    ),
    *cases(linear_cross_entropy, (5, 7), (1, 11), (64, 130), (65, 3), (130, 33)),
    *cases(
        quant_linear,
        ((2, 5), 200, 130, 1, "fp8", False),
        ((3,), 70, 3, 1, "fp8f", True),
        ((1, 1), 130, 260, 2, "fp8", True),
        ((2, 5), 70, 130, 2, "fp8f", False),
        ((), 128, 128, 1, "fp8", True),
        ((7,), 5, 9, 3, "fp8", False),
    ),
    *cases(
        moe,
        (5, 4, 2, 10, 6, "float", True),
        (3, 2, 2, 72, 130, "fp8", False),
        (1, 3, 2, 34, 70, "fp4", True),
        (1, 4, 2, 10, 6, "float", False),
        (2, 4, 2, 10, 6, "float", False),
        (65, 5, 3, 6, 4, "float", False),
        (9, 7, 2, 6, 4, "float", False, "one"),
        (5, 3, 3, 6, 4, "float", False, "twice"),
        (2, 6, 3, 6, 4, "float", True, "twice"),
        (3, 9, 1, 6, 4, "float", False),
        (1, 3, 2, 72, 130, "fp8f", False),
        (9, 3, 2, 140, 10, "fp8f", False),
        (5, 3, 2, 70, 34, "fp4", False),
        (3, 3, 1, 200, 150, "fp8", True),
    ),
    *cases(
        moe_decode,
        (5, 4, 2, 150, 131, True),
        (1, 16, 4, 33, 16, False),
        (9, 7, 2, 6, 5, False, "one"),
        (5, 3, 3, 6, 4, True, "twice"),
        (64, 3, 1, 16, 7, False),
        (4, 5, 2, 32, 17, False),
        (2, 3, 2, 15, 2, True),
    ),
    *cases(
        moe_train,
        (5, 4, 2, 10, 6),
        (65, 5, 3, 6, 8),
        (9, 7, 2, 33, 13, "one"),
        (5, 3, 3, 6, 4, "twice"),
        (1, 4, 2, 72, 130),
        (23, 2, 1, 256, 128),
    ),
]
FEW = [case for op in CONTRACTS for case in [case for case in CASES if case.op == op][:3]]
by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_few = pytest.mark.parametrize("case", FEW, ids=str)
by_op = pytest.mark.parametrize("case", FEW[::3], ids=lambda case: case.op)
PUBLIC = [case for case in FEW[::3] if case.op in ops.OPS]
by_public_op = pytest.mark.parametrize("case", PUBLIC, ids=lambda case: case.op)


# --------------------------------------------------------------------------------------------------
# Measures


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float):
    """Equal choices for integers, else relative RMS; a constant reference is compared by itself."""
    assert a.shape == b.shape
    if not b.is_floating_point():
        assert torch.equal(a.sort(-1).values, b.sort(-1).values)
    elif b.numel() < 2 or b.std() == 0:
        assert ((a - b).abs() <= tolerance * (1 + b.abs())).all()
    else:
        assert rms(a, b) <= tolerance


def one_rounding(b: torch.Tensor) -> float:
    """Relative RMS of rounding to bf16 once, and a margin for ties."""
    return rms(b.bfloat16(), b) + 1e-6 if b.is_floating_point() and b.numel() > 1 else 4e-3


def same(results: tuple, expected: tuple, tolerance: float):
    """Two results of `run`, outputs and gradients alike."""
    for a, b in zip(itertools.chain(*results), itertools.chain(*expected), strict=True):
        close(a, b, tolerance)


def tensors(change: Callable, args: tuple, dtypes=(torch.float32, torch.bfloat16)) -> tuple:
    return tree_map_only(torch.Tensor, lambda t: change(t) if t.dtype in dtypes else t, args)


def differentiable(case: Case, args: tuple) -> list[int]:
    """Positions of the arguments that have a gradient: packed weights have none."""
    return [
        i for i in CONTRACTS[case.op].grad if args[i] is not None and args[i].dtype.itemsize > 1
    ]


def low(case: Case) -> tuple:
    """The arguments as in a bf16 model."""
    args = case.args()
    args = (
        tensors(torch.Tensor.bfloat16, a) if i in CONTRACTS[case.op].low else a
        for i, a in enumerate(args)
    )
    return tuple(torch.bfloat16 if a is torch.float32 else a for a in args)


def run(form: Callable, case: Case, args: tuple) -> tuple[list, list]:
    """-> outputs, and the gradients of a fixed random combination of them."""
    leaves = differentiable(case, args)
    args = [a.detach().requires_grad_() if i in leaves else a for i, a in enumerate(args)]
    out = form(*args)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    torch.manual_seed(1)
    weights = [normal(o.shape).bfloat16() for o in out]
    products = (o.double() * w.double() for o, w in zip(out, weights, strict=False))
    loss = sum(p.sum() for p in products) if leaves else None
    return out, list(torch.autograd.grad(loss, [args[i] for i in leaves])) if leaves else []


class Recorder(TorchDispatchMode):
    """The calls to our ops, with their arguments, and the elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace == ops.NAMESPACE:
            self.calls.append((op, args))
        self.largest = max(
            [
                self.largest,
                *(
                    t.untyped_storage().nbytes() // t.itemsize
                    for t in tree_leaves(out)
                    if isinstance(t, torch.Tensor)
                ),
            ]
        )
        return out

    @property
    def names(self) -> list[str]:
        return [op.name().split("::")[1] for op, _ in self.calls]


def record(case: Case, args: tuple | None = None) -> Recorder:
    """Forward and backward of the opaque form."""
    with Recorder() as recorder:
        run(OPS[case.op].opaque, case, case.args() if args is None else args)
    return recorder


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same values, with the strides of a transposed tensor."""
    return (
        t.transpose(0, -1).contiguous().transpose(0, -1)
        if t.dim() > 1
        else t.repeat_interleave(2)[::2]
    )


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The first value along the last dim, repeated with stride 0, as the gradient of a sum is."""
    return t[..., :1].expand(t.shape)


# --------------------------------------------------------------------------------------------------
# Every op, every case


def test_every_op_has_a_contract_and_cases():
    """Forward and backward ops alike; rope_ and the optimizer's have tests elsewhere."""
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith(f"{ops.NAMESPACE}::")
    }
    assert set(CONTRACTS) == set(OPS) == {case.op for case in FEW}
    assert {name for case in FEW for name in record(case).names} == registered - {
        "rope_",
        "muon",
        "muon_direction",
        "grad_norm",
    }


@by_case
def test_reference_matches_the_spec(case):
    args = case.args()
    expected = run(CONTRACTS[case.op].spec, case, tensors(torch.Tensor.double, args))
    same(run(OPS[case.op].reference, case, args), expected, 5e-6)


@pytest.mark.kernels
@by_case
def test_opaque_equals_reference(case):
    args = case.args()
    opaque, reference = (
        run(OPS[case.op].opaque, case, args),
        run(OPS[case.op].reference, case, args),
    )
    same(opaque, reference, 5e-6)
    assert [t.dtype for t in itertools.chain(*opaque)] == [
        t.dtype for t in itertools.chain(*reference)
    ]


@pytest.mark.parametrize("form", ["reference", "opaque"])
@pytest.mark.parametrize("case", [case for case in CASES if hasattr(case.module, "CHUNK")], ids=str)
def test_chunks_change_nothing(case, form, monkeypatch):
    """Everything at once, or in chunks of one token or a few, the last one shorter."""
    args, op = case.args(), getattr(OPS[case.op], form)
    expected = run(op, case, args)
    for chunk in (1, 997):
        monkeypatch.setattr(case.module, "CHUNK", chunk)
        same(run(op, case, args), expected, 5e-6)


@pytest.mark.kernels
@by_case
def test_bf16_is_exact_up_to_rounding(case):
    """bf16 in, fp32 inside: fp32 outputs are exact, bf16 ones off by few roundings."""
    contract, args = CONTRACTS[case.op], low(case)
    expected, expected_grads = run(contract.spec, case, tensors(torch.Tensor.double, args))
    flips = (
        10 if case.op == "moe" and args[-1] else 1
    )  # a value rounded to bf16, then to fp8, may land on either side of a tie
    exact = (
        8e-3 * flips if case.op in ("moe", "hc_post_pre") else 2e-5 if case.op == "hc_pre" else 5e-6
    )  # hc_pre's kernel has 16 bits of fn
    for form in ("reference", "opaque"):
        out, grads = run(getattr(OPS[case.op], form), case, args)
        for a, b, is_fp32 in zip(out, expected, contract.out, strict=True):
            assert a.dtype == (
                torch.int64
                if case.op == "indexer_topk"
                else torch.float32
                if is_fp32
                else torch.bfloat16
            )
            close(a, b, contract.rounding * one_rounding(b) if not is_fp32 else exact)
        for i, a, b in zip(differentiable(case, args), grads, expected_grads, strict=True):
            assert a.dtype == args[i].dtype
            close(a, b, (2e-2 if a.dtype == torch.bfloat16 else 3e-2) * flips)


@pytest.mark.kernels
def test_bf16_gradients_of_popular_entries_add_up_in_fp32():
    case = Case(
        "sparse_attn", sparse_attn, (1, 200 if INTERPRETING else 1500, 8, "idx", 2, 4, 3, 2)
    )
    args = low(case)
    expected = run(spec_sparse_attn, case, tensors(torch.Tensor.double, args))[1][-1]
    for form in (ops.sparse_attn.reference, ops.sparse_attn.opaque):
        close(run(form, case, args)[1][-1], expected, 6e-3)


# --------------------------------------------------------------------------------------------------
# Registration: what torch relies on


def detached(args: tuple) -> tuple:
    return tree_map_only(torch.Tensor, torch.Tensor.detach, args)


@pytest.mark.kernels
@pytest.mark.parametrize("arguments", [Case.args, low], ids=["fp32", "bf16"])
@by_case
def test_ops_are_pure_and_their_fakes_are_true(case, arguments):
    """For any strides: outputs as the fake says, contiguous and fresh; inputs untouched."""
    for op, args in record(case, arguments(case)).calls:
        args = tree_map_only(torch.Tensor, transposed, detached(args))
        before = copy.deepcopy(args)
        out = tree_leaves(op(*args))
        with FakeTensorMode() as mode:
            fakes = tree_leaves(op(*tree_map_only(torch.Tensor, mode.from_tensor, args)))
        inputs = [t for t in args if isinstance(t, torch.Tensor)]
        for real, fake in zip(out, fakes, strict=True):
            assert (real.shape, real.dtype, real.stride()) == (
                fake.shape,
                fake.dtype,
                fake.stride(),
            ) and real.is_contiguous()
            assert not real.numel() or real.untyped_storage().data_ptr() not in [
                t.untyped_storage().data_ptr() for t in inputs
            ]
        for a, b in zip(inputs, [t for t in before if isinstance(t, torch.Tensor)], strict=True):
            assert a.tolist() == b.tolist()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "layout", [torch.clone, transposed, expanded], ids=["contiguous", "transposed", "expanded"]
)
@by_few
def test_ops_pass_opcheck(case, layout):
    """Schema, autograd registration, fake and AOT dispatch, of the forward and the backward op."""
    leaves = differentiable(case, case.args())
    for op, args in record(case).calls:
        args = list(tree_map_only(torch.Tensor, layout, detached(args)))
        if op.name() == f"{ops.NAMESPACE}::{case.op}":
            args = [a.requires_grad_() if i in leaves else a for i, a in enumerate(args)]
        has_fp8 = any(
            a.dtype == torch.float8_e4m3fn for a in args if isinstance(a, torch.Tensor)
        )  # the schema test cannot
        tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"] + [
            "test_schema"
        ] * (not has_fp8)
        torch.library.opcheck(op, args, test_utils=tests)


@pytest.mark.parametrize("form", ["reference", "opaque", "called"])
@by_public_op
def test_opaque_is_one_node_and_the_reference_none(case, form):
    """Forward and backward graphs under torch.compile(fullgraph=True); the numbers of eager."""
    nodes = []

    def compiler(graph, inputs):
        nodes.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    op = OPS[case.op]
    with ops.use({case.op: "opaque"}):
        call = (
            (lambda *args: getattr(ops, case.op)(*args)) if form == "called" else getattr(op, form)
        )
        compiled = torch.compile(
            call, fullgraph=True, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
        )
        same(run(compiled, case, case.args()), run(op.opaque, case, case.args()), 5e-6)
    ours = [name for graph in nodes for name in graph if name.startswith(ops.NAMESPACE)]
    assert ours == (
        []
        if form == "reference"
        else [f"{ops.NAMESPACE}.{name}.default" for name in record(case).names]
    )
    if form != "reference":  # nothing else but taking results apart
        assert {n for n in nodes[0] if not n.startswith(ops.NAMESPACE)} <= {
            "<built-in function getitem>",
            "aten.detach.default",
        }


# --------------------------------------------------------------------------------------------------
# FLOPs and memory


def flops(call: Callable, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


def expected_flops(case: Case, args: tuple) -> tuple[int, int]:
    """Matrix products, forward and backward."""
    size = [getattr(a, "shape", None) for a in args]
    if (
        case.op == "sparse_attn"
    ):  # scores and values; then five products: both again, and the gradients of q, k and v
        (B, T, H, D), W, (E, K) = (
            size[0],
            size[1][1] - size[0][1] + 1,
            (size[6] and size[6][1], size[9] and size[9][2]),
        )
        return 4 * B * T * H * D * (W + (K or E or 0)), 10 * B * T * H * D * (W + (K or E or 0))
    if case.op == "indexer_topk":
        return 2 * args[0].numel() * size[1][1] + 2 * args[2].numel() * size[1][1], 0
    if (
        case.op == "indexer_loss"
    ):  # of main heads, index heads and u; then again, and the gradients of qi and ki, and of u
        N = size[10][2] if size[10] else size[3][1]
        main, index, weights = (2 * args[i].numel() * N for i in (0, 5, 7))
        return main + index + weights, main + 3 * index + 2 * weights
    if case.op == "linear_cross_entropy":
        return 2 * args[0].numel() * size[1][0], 6 * args[0].numel() * size[1][0]
    if case.op == "hc_post_pre":
        return 2 * args[1].numel() * size[4][0], 6 * args[1].numel() * size[4][0]
    if case.op == "hc_pre":
        return 2 * args[0].numel() * size[1][0], 6 * args[0].numel() * size[1][0]
    if case.op == "quant_linear":
        return (2 * args[0].numel() * size[1][0] // args[3],) * 2
    if case.op in ("moe", "moe_decode", "moe_train"):
        product = 2 * args[3].numel() * size[0][1] * (size[1][1] // 2)
        return 3 * product, {"moe_decode": 0, "moe_train": 6}.get(
            case.op, 5 if case.op == "moe" and size[5] else 8
        ) * product
    return 0, 0


@by_few
def test_flops_are_those_of_the_matrix_products(case):
    args = case.args()
    forward, *backward = record(case).calls
    counts = expected_flops(case, args)
    assert flops(*forward[:1], *forward[1]) == counts[0]
    assert sum(flops(op, *args) for op, args in backward) == counts[1]


@pytest.mark.parametrize(
    "case",
    [
        case
        for case in CASES
        if case.op
        in (
            "indexer_topk",
            "indexer_loss",
            "linear_cross_entropy",
            "quant_linear",
            "moe",
            "sparse_attn",
        )
        and (case.op != "sparse_attn" or case.options[1] == 1)
    ],
    ids=str,
)
def test_flops_are_those_of_the_implementation(case):
    """Where no product is wasted: attention of one token a row, all its keys counted; experts."""
    module = case.module
    impls = {
        case.op: getattr(module, "grouped", getattr(module, "forward_reference", None))
        or module.reference,
        f"{case.op}_backward": getattr(module, "backward_reference", None),
    }
    for (op, args), name in zip(record(case).calls, impls, strict=False):
        assert flops(op, *args) == flops(impls[name], *args) > 0


def largest(call: Callable, *args) -> int:
    with Recorder() as recorder:
        call(*args)
    return recorder.largest


LONG = [
    *cases(
        sparse_attn,
        *((1, 2048, 128, kind, 2, 16, 512, 64) for kind in ("window", "dense", "idx")),
        (1, 256, 128, "window", 1, 256),
        (1, 1024, 8, "idx", 1, 64, 16, 16),
    ),
    *cases(indexer_topk, (1, 2048, 512, 64, 4, 8)),
    *cases(indexer_loss, *((1, 2048, 512, kind, 2, 16, 4, 8, 64) for kind in ("idx", "dense"))),
    *cases(linear_cross_entropy, (2048, 500, 8)),
    *cases(moe, (2048, 8, 1, 8, 16, "float", False)),
]


@pytest.mark.parametrize("case", LONG, ids=str)
def test_a_long_sequence_is_worked_off_in_chunks(case, monkeypatch):
    """No query x key x dim, head x query x key, or token x vocabulary: all stays within a chunk."""
    calls = record(case).calls
    monkeypatch.setattr(case.module, "CHUNK", 1 << 17)
    for (op, args), name in zip(calls, ("forward_reference", "backward_reference"), strict=False):
        allowed = max(
            1 << 17,
            *(t.numel() for t in tree_leaves((args, op(*args))) if isinstance(t, torch.Tensor)),
        )
        assert (
            largest(getattr(case.module, name, None) or case.module.reference, *detached(args))
            <= allowed
        )


# --------------------------------------------------------------------------------------------------
# Each op on its own


@pytest.mark.kernels
def test_act_quant_gradient_passes_straight_through():
    x, block, fmt = FEW[0].args()
    for form in (ops.act_quant.reference, ops.act_quant.opaque):
        x.requires_grad_()
        y = form(x, block, fmt)
        assert torch.equal(y, fake_quant(x.detach(), block, fmt)) and not torch.equal(y, x)
        g = normal(y.shape)
        assert torch.equal(torch.autograd.grad(y, x, g)[0], g)


@pytest.mark.kernels
@pytest.mark.parametrize("form", ["reference", "opaque"])
def test_linears_round_their_inputs_in_blocks_of_128(form):
    """Identity weights show the rounded values; a scale of its own would keep the small half."""
    torch.manual_seed(0)
    n, eye = 200, torch.eye(200)
    x = normal(3, n) * torch.where(torch.arange(n) % 128 < 64, 1.0, 2.0**-16)
    x[:, 0] = 20.0
    rounded = fake_quant(x, 128, "fp8")
    assert not torch.equal(rounded, fake_quant(x, 64, "fp8")) and not torch.equal(
        rounded, fake_quant(x, 256, "fp8")
    )
    weight, scale = quantize_fp8(eye)
    assert torch.equal(getattr(ops.quant_linear, form)(x, weight, scale, 1, True), rounded)
    gate = torch.zeros(n, n).index_fill(
        1, torch.tensor([0]), 1.0
    )  # every gate is the first channel, clamped to 10
    w13, idx = torch.cat((gate, eye))[None], torch.zeros(3, 1, dtype=torch.int64)
    y = getattr(ops.moe, form)(x, w13, eye[None], idx, torch.ones(3, 1), None, None, 10.0, True)
    h = torch.nn.functional.silu(torch.tensor(10.0)) * rounded.clamp(-10, 10)
    assert torch.equal(y, fake_quant(h, 128, "fp8")) and not torch.equal(
        y, fake_quant(h, 64, "fp8")
    )


@pytest.mark.kernels
def test_rope_inverse_undoes_rope():
    x, cos, sin, _ = Case("rope", rope, (2, 5, 3, 10, 4, False)).args()
    y = ops.rope(x, cos, sin, False)
    close(ops.rope(y, cos, sin, True), x, 1e-6)
    assert torch.equal(y[..., :6], x[..., :6]) and not torch.equal(y[..., 6:], x[..., 6:])


@pytest.mark.kernels
@pytest.mark.parametrize("form", [ops.hc_pre.reference, ops.hc_pre.opaque])
def test_hc_pre_gives_the_vector_of_the_spec(form):
    fn = (
        torch.linspace(-1, 1, 24)[:, None].expand(24, 8) / 8
    )  # streams of ones: the mix is the row's sum
    base, scale = 0.3 * torch.arange(24.0).sin(), torch.tensor([0.5, 1, 2])
    y, post, comb = form(torch.ones(1, 1, 4, 2), fn, base, scale, 0.0, 1e-6, 20)
    torch.testing.assert_close(
        y, torch.full((1, 1, 2), 0.3775417 + 0.4491572 + 0.4649948 + 0.4189160), atol=3e-7, rtol=0
    )
    torch.testing.assert_close(
        post[0, 0], torch.tensor([0.5866811, 0.5976520, 0.7261301, 0.9031999]), atol=2e-7, rtol=0
    )
    torch.testing.assert_close(
        comb[0, 0],
        torch.tensor(
            [
                [0.3090397, 0.2714342, 0.2200407, 0.1994844],
                [0.1709750, 0.2379257, 0.3049122, 0.2861861],
                [0.2396997, 0.2045394, 0.2352896, 0.3204703],
                [0.2802847, 0.2860997, 0.2397564, 0.1938582],
            ]
        ),
        atol=1e-7,
        rtol=0,
    )
    for axis in (-1, -2):
        torch.testing.assert_close(
            comb.sum(axis), torch.full((1, 1, 4), 0.9999990), atol=2e-7, rtol=0
        )


@pytest.mark.kernels
@pytest.mark.parametrize("form", [ops.compress.reference, ops.compress.opaque])
def test_entries_are_rounded_before_and_after_the_norm(form):
    rows, end, index, weight, cos, sin, *constants = low(
        Case("compress", compress, (3, 65, 4, 6, 4))
    )
    e = pooled(rows.double(), end, index, 4, 6).bfloat16().double()
    e = e / (e.square().mean(-1, keepdim=True) + constants[1]).sqrt() * weight.double()
    out = form(rows, end, index, weight, torch.ones_like(cos), torch.zeros_like(sin), *constants)
    assert (out == e.bfloat16()).double().mean() > 0.99


@pytest.mark.kernels
@pytest.mark.parametrize("form", [ops.compress.reference, ops.compress.opaque])
@pytest.mark.parametrize("ratio", [4, 3])
def test_a_window_that_ends_outside_is_finite_and_disturbs_nothing(form, ratio):
    case = Case("compress", compress, (2, 9, ratio, 6, 4))
    args = case.args()
    end = args[1].clone()
    end[0, 1], end[1, 0], end[1, 2] = -5, args[0].shape[1], 10**9
    outside = (end < 0) | (end >= args[0].shape[1])
    inside, weights = ~outside[..., None], normal(2, 3, 6)

    def masked(end, *rest):
        return run(
            lambda rows, _, *rest: (form(rows, end, *rest) * weights).where(inside, 0.0), case, args
        )

    assert form(args[0], end, *args[2:]).isfinite().all()
    same(masked(end), masked(args[1]), 1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("form", ["reference", "opaque"])
@pytest.mark.parametrize(
    "case",
    cases(sparse_attn, *((2, 5, 16, kind, 2, 6, 70) for kind in ("window", "dense", "idx"))),
    ids=str,
)
def test_hidden_keys_have_no_influence_and_zero_gradient(case, form):
    args, op = list(case.args()), getattr(ops.sparse_attn, form)
    out, grads = run(op, case, tuple(args))
    # keys that no token sees, among kv and entries
    hidden = {
        i: torch.ones(args[i].shape[:2], dtype=torch.bool) for i in (1, 6) if args[i] is not None
    }
    for b, t in itertools.product(range(2), range(5)):
        for mask, rows in zip(hidden.values(), visible(args, b, t), strict=False):
            mask[b, rows] = False
    for i, mask in hidden.items():
        assert mask.any() and (grads[differentiable(case, tuple(args)).index(i)][mask] == 0).all()
        args[i] = args[i].masked_fill(mask[..., None], 1e4)
    assert torch.equal(op(*args), out[0])


@pytest.mark.kernels
@pytest.mark.parametrize("form", [ops.sparse_attn.reference, ops.sparse_attn.opaque])
def test_a_sink_takes_its_share(form):
    """With one visible key o = k e^s / (e^s + e^sink): k for a low sink, 0 for a high one."""
    q, kv, _, window_len, cos, sin, *rest = Case(
        "sparse_attn", sparse_attn, (1, 2, 4, "window", 3)
    ).args()
    window_len = torch.ones_like(window_len)
    own = kv[:, -2:, None].expand_as(q)
    unit = spec_rope(q / (q.square().mean(-1, keepdim=True) + rest[-1]).sqrt(), cos, sin, False)
    s = (unit * own).sum(-1, keepdim=True) * 6**-0.5
    for sink in (torch.full((3,), -1e4), torch.tensor([-1.0, 0, 3]), torch.full((3,), 1e4)):
        expected = spec_rope(own * torch.sigmoid(s - sink[:, None]), cos, sin, True)
        torch.testing.assert_close(form(q, kv, sink, window_len, cos, sin, *rest), expected)


def test_probabilities_are_rounded_before_the_values_but_not_in_the_denominator():
    """By the reference: the kernel rounds probabilities against the maximum so far."""
    case = Case("sparse_attn", sparse_attn, (2, 65, 1, "dense", 3, 6, 20))
    q, kv, sink, window_len, cos, sin, entries, *_, eps = low(case)
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # rotation is another rounding
    everything = torch.full((2, 65), 0), torch.full((2, 65), 20)
    args = (q, kv, sink, window_len, cos, sin, entries, *everything, None, eps)
    q = (q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + eps)).bfloat16()
    q, kv, sink, entries = tensors(torch.Tensor.double, (q, kv, sink, entries))
    keys = torch.cat((kv[:, :, None], entries[:, None].expand(-1, 65, -1, -1)), 2)  # [B, T, 21, D]
    s = 6**-0.5 * q @ keys.transpose(2, 3)
    m = torch.maximum(s.amax(-1), sink)[..., None]
    o = (
        (s - m).exp().bfloat16().double()
        @ keys
        / ((s - m).exp().sum(-1, keepdim=True) + (sink[:, None] - m).exp())
    )
    assert (ops.sparse_attn.reference(*args) == o.bfloat16()).double().mean() > 0.99


@pytest.mark.kernels
@pytest.mark.parametrize(
    "case", [case for case in FEW if case.op in ("sparse_attn", "linear_cross_entropy")], ids=str
)
def test_the_second_output_is_the_log_of_the_denominator(case):
    args = case.args()
    exact = tensors(torch.Tensor.double, args)
    lse = record(case).calls[0][0](
        *(a.requires_grad_() if i in differentiable(case, args) else a for i, a in enumerate(args))
    )[1]
    assert lse.dtype == torch.float32 and not lse.requires_grad
    close(
        lse,
        attention(*exact)[1] if case.op == "sparse_attn" else (exact[0] @ exact[1].T).logsumexp(1),
        1e-6,
    )


@pytest.mark.kernels
@pytest.mark.parametrize("form", ["reference", "opaque", "called"])
def test_attention_hands_over_its_lse_when_asked(form):
    case = Case("sparse_attn", sparse_attn, (2, 5, 8, "idx"))
    args, op = case.args(), ops.sparse_attn if form == "called" else getattr(ops.sparse_attn, form)
    o, lse = op(*args, True)
    assert torch.equal(o, op(*args)) and torch.equal(o, op(*args, False))
    close(lse, attention(*tensors(torch.Tensor.double, args))[1], 1e-6)
    o, lse = op(
        *(a.requires_grad_() if i in differentiable(case, args) else a for i, a in enumerate(args)),
        True,
    )
    assert o.requires_grad and not lse.requires_grad


# The loss of the indexer


by_form = pytest.mark.parametrize(
    "form", [ops.indexer_loss.reference, ops.indexer_loss.opaque], ids=["reference", "opaque"]
)
by_kind = pytest.mark.parametrize("kind", ["dense", "idx"])


def losses(kind, *options) -> tuple[Case, list]:
    case = Case("indexer_loss", indexer_loss, (2, 7, 9, kind, *options))
    return case, list(case.args())


@by_form
@by_kind
def test_an_index_that_tells_the_attention_s_choice_costs_nothing(form, kind):
    """The target is the share of entries in the softmax of sparse_attn, averaged over heads."""
    torch.manual_seed(0)
    B, T, E = 2, 7, 9
    q, kv, sink, window_len, cos, sin, entries, lo, hi, idx, eps = args = sparse_attn(B, T, 5, kind)
    hi[:, 3] = lo[:, 3]  # these see no entry
    lse, share = ops.sparse_attn(*args, True)[1], torch.zeros(B, T, E)
    turned = spec_rope(q / (q.square().mean(-1, keepdim=True) + eps).sqrt(), cos, sin, False)
    for b, t in itertools.product(range(B), range(T)):
        window, chosen = visible(args, b, t)
        score = turned[b, t] @ torch.cat((kv[b, window], entries[b, chosen])).T * q.shape[3] ** -0.5
        share[b, t, chosen] = (
            torch.cat((score, sink[:, None]), 1).softmax(1)[:, len(window) : -1].mean(0)
        )
    some = share.sum(-1) > 0
    assert some.any() and not some.all() and (share.sum(-1) < 0.99).all()
    told = (
        share.clamp(min=1e-9).log() + 30
    ).requires_grad_()  # positive, as relu wants it; softmax does not mind
    index = told[:, :, None], torch.eye(E).expand(B, -1, -1), torch.ones(B, T, 1)
    loss = form(q, cos, sin, entries, lse, *index, lo, hi, idx, eps)
    assert loss.abs().max() < 1e-5 and torch.autograd.grad(loss.sum(), told)[0].abs().max() < 1e-5
    wrong = form(q, cos, sin, entries, lse, 2 * index[0], *index[1:], lo, hi, idx, eps)
    assert (wrong[share.gt(0).sum(-1) > 1] > 1e-4).all() and wrong[~some].abs().max() == 0


@by_form
@by_kind
def test_tokens_without_entries_cost_nothing(form, kind):
    case, args = losses(kind)
    if kind == "dense":
        args[9][:, 1::2] = args[8][:, 1::2] - 1
        args[8][:, 0], args[9][:, 0] = 3, 4  # a single entry
    else:
        args[10][:, 1::2], args[10][:, 0] = -1, torch.tensor([4, *[-1] * 6])
    (loss,), grads = run(form, case, tuple(args))
    assert not loss[:, 1::2].any() and not loss[:, 0].any() and (loss[:, 2::2] > 0).any()
    for g in (grads[0], grads[2]):
        assert (
            g.isfinite().all() and not g[:, 1::2].any() and not g[:, 0].any() and g[:, 2::2].any()
        )
    args[9], args[10] = args[8], args[10] if kind == "dense" else torch.full_like(args[10], -1)
    (loss,), grads = run(form, case, tuple(args))
    assert not loss.any() and not any(g.any() for g in grads)


@by_form
@by_kind
def test_entries_that_are_hidden_teach_nothing(form, kind):
    case, args = losses(kind)
    args[8], args[9], before = (
        args[8].clamp(min=2),
        args[9].clamp(max=7),
        None,
    )  # nobody sees 0, 1, 7 and 8
    if kind == "idx":
        args[10] = torch.where((args[10] < 2) | (args[10] > 6), -1, args[10])
    for value in (0.0, 1e4):
        for i in (3, 6):
            args[i][:, [0, 1, 7, 8]] = value
        result = run(form, case, tuple(args))
        same(result, before or result, 0.0)
        before = result
    assert not before[1][1][:, [0, 1, 7, 8]].any() and before[1][1][:, 2:7].any()


@by_form
def test_all_entries_chosen_is_the_dense_loss(form):
    case, args = losses("dense")
    e = torch.arange(9).expand(2, 7, 9)
    chosen = torch.where((e >= args[8][..., None]) & (e < args[9][..., None]), e, -1)
    same(
        run(form, case, (*args[:10], chosen.flip(-1), args[11])), run(form, case, tuple(args)), 1e-6
    )


@by_form
@by_kind
def test_only_the_indexer_learns(form, kind):
    case, args = losses(kind)
    leaves = [a.requires_grad_() if i in (0, 3, 4, 5, 6, 7) else a for i, a in enumerate(args)]
    form(*leaves).sum().backward()
    assert [
        a.grad is not None for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad
    ] == [False] * 3 + [True] * 3


@by_form
def test_heads_that_all_but_ignore_the_entries_still_teach(form):
    """Their probabilities underflow; how they compare does not."""
    case, args = losses("dense")
    expected = run(form, case, tuple(args))
    args[4] = args[4] + 512
    same(run(form, case, tuple(args)), expected, 1e-4)
    args[4][:, :, 0] += 512  # one that ignores them more has no say
    got = run(form, case, tuple(args))
    del args[1:1]
    same(got, run(form, case, (args[0][:, :, 1:], *args[1:4], args[4][:, :, 1:], *args[5:])), 1e-4)


@by_kind
def test_the_loss_at_production_size_reads_nothing_back_and_holds_a_chunk(kind):
    """Flash, 1024 tokens of 8192, on fake tensors: a host read raises; scores are bounded."""
    T, H, D, E, Hi, Di, K = 1024, 64, 512, 2048, 64, 128, 512
    module = importlib.import_module("ops.indexer_loss")
    with FakeTensorMode(), Recorder() as recorder:

        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(1, *shape, dtype=dtype, device="cpu")

        angle, span = empty(T, 32, dtype=torch.float32), empty(T, dtype=torch.int64)
        args = (
            empty(T, H, D),
            angle,
            angle,
            empty(E, D),
            empty(T, H, dtype=torch.float32),
            empty(T, Hi, Di),
            empty(E, Di),
            empty(T, Hi),
            span,
            span,
            empty(T, K, dtype=torch.int64) if kind == "idx" else None,
            1e-6,
        )
        loss = module.forward_reference(*args)
        module.backward_reference(loss, *args)
        if kind == "dense":
            module.indexer_recall(*args[:10], K, 1e-6)
    assert (
        loss.shape == (1, T) and recorder.largest == T * H * D < T * H * E
    )  # the queries, an argument


def test_recall_counts_what_the_indexer_finds():
    args, topk = losses("dense")[1], 3
    found, mass = ops.indexer_recall(*args[:10], topk, args[11])
    for b, t in itertools.product(range(2), range(7)):
        q, cos, sin, entries, lse, qi, ki, u, lo, hi, _, eps = tensors(torch.Tensor.double, args)
        seen = entries_of(lo, hi, None, b, t)
        q = spec_rope(q / (q.square().mean(-1, keepdim=True) + eps).sqrt(), cos, sin, False)
        P = (q.shape[3] ** -0.5 * q[b, t] @ entries[b, seen].T - lse[b, t, :, None]).exp().sum(0)
        best, chosen = (
            set(x.topk(min(topk, len(seen))).indices.tolist())
            for x in (P, u[b, t] @ (qi[b, t] @ ki[b, seen].T).relu())
        )
        assert found[b, t] == pytest.approx(len(best & chosen) / len(best) if best else 1)
        assert mass[b, t] == pytest.approx(
            float(P[list(chosen)].sum() / P.sum()) if chosen else 1, abs=1e-5
        )
    few = args[9] - args[8] <= topk
    assert (
        few.any()
        and (found[few] == 1).all()
        and (mass[few] > 0.9999).all()
        and 0 < found[~few].mean() < 1
    )
    for everything in (9, 100):
        assert all((x > 0.9999).all() for x in ops.indexer_recall(*args[:10], everything, args[11]))


def test_recall_is_worked_off_in_chunks(monkeypatch):
    args = losses("dense")[1]
    expected = ops.indexer_recall(*args[:10], 3, args[11])
    monkeypatch.setattr(importlib.import_module("ops.indexer_loss"), "CHUNK", 100)
    same((expected, ()), (ops.indexer_recall(*args[:10], 3, args[11]), ()), 1e-6)


@by_kind
def test_an_indexer_learns_what_the_attention_looks_at(kind):
    """Linear maps of the factors of queries and entries: recall rises from chance, 8 of 64.

    "idx" is the recipe: half of the steps dense, then only the 16 entries that the indexer chooses.
    """
    torch.manual_seed(0)
    B, T, E, H, D, Hi, Di, d = 2, 32, 64, 2, 16, 16, 8, 8
    w_q, w_k = normal(d, H * D), normal(d, D) * 2 * d**-0.5
    maps = [(0.3 * normal(d, width)).requires_grad_() for width in (Hi * Di, Di, Hi)]
    optimizer = torch.optim.AdamW(maps, lr=3e-2)
    nothing, everything = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), E)
    straight = torch.ones(B, T, 2), torch.zeros(B, T, 2)  # no rotation

    def batch():
        x, c = torch.cat((normal(B, T, d - 1), torch.ones(B, T, 1)), -1), normal(B, E, d)
        q, entries = (x @ w_q).unflatten(-1, (H, D)), c @ w_k
        _, lse = ops.sparse_attn(
            q,
            normal(B, 3 + T, D),
            torch.zeros(H),
            nothing + 4,
            *straight,
            entries,
            nothing,
            everything,
            None,
            1e-6,
            True,
        )
        qi, ki, u = x @ maps[0], c @ maps[1], x @ maps[2]
        return q, *straight, entries, lse, qi.unflatten(-1, (Hi, Di)), ki, u, nothing, everything

    costs, recalls = [], []
    for step in range(201):
        args = batch()
        if step in (0, 200):
            recalls.append([float(share.mean()) for share in ops.indexer_recall(*args, 8, 1e-6)])
        idx = ops.indexer_topk(*args[5:], 16) if kind == "idx" and step >= 100 else None
        loss = ops.indexer_loss(*args, idx, 1e-6).mean()
        costs.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (found, mass), (found_then, mass_then) = recalls
    assert (
        0.05 < found < 0.25
        and found_then > 0.55
        and mass_then > mass + 0.25
        and costs[-1] < costs[0] / 5
    )


@pytest.mark.kernels
@pytest.mark.parametrize(
    "form", [ops.linear_cross_entropy.reference, ops.linear_cross_entropy.opaque]
)
def test_ignored_targets_cost_nothing(form):
    case = Case("linear_cross_entropy", linear_cross_entropy, (65, 9))
    args = case.args()
    ignored = args[2] < 0
    (loss,), (g_x, _) = run(form, case, args)
    assert ignored.any() and (loss[ignored] == 0).all() and (g_x[ignored] == 0).all()
    assert (loss[~ignored] > 0).all() and (g_x[~ignored] != 0).any(1).all()
    (loss,), grads = run(form, case, (*args[:2], torch.full_like(args[2], -1)))
    assert not loss.any() and not any(g.any() for g in grads)


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "moe"], ids=str)
def test_moe_paths_agree(case, monkeypatch):
    """Gathered weights, all experts with zero weights, and tokens grouped by expert agree."""
    args = case.args()
    if args[-1] and case.options[-1] == "twice":
        args = (
            *args[:-1],
            False,
        )  # rounding once or twice differs for an expert that a token chose twice
    expected = run(ops.moe.opaque, case, args)
    for few in (True, False):
        monkeypatch.setattr(case.module, "_few", lambda *args: few)
        same(run(ops.moe.reference, case, args), expected, 5e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("form", [ops.moe.reference, ops.moe.opaque])
def test_experts_that_nobody_chose_have_zero_gradient(form):
    case = Case("moe", moe, (9, 7, 2, 6, 4, "float", False, "one"))
    _, (_, g_w13, g_w2, _) = run(form, case, case.args())
    for g in (g_w13, g_w2):
        assert [bool(e.any()) for e in g] == [e == 5 for e in range(7)]


@pytest.mark.kernels
@pytest.mark.parametrize(
    "options",
    [
        (9, 7, 2, 6, 4, "float", False),
        (3, 64, 2, 6, 4, "float", False),
        (300, 3, 2, 6, 4, "float", False),
        (5, 3, 2, 128, 128, "fp4", True),
    ],
    ids=str,
)
def test_pairs_without_an_expert_add_nothing(options):
    """The opaque form leaves out pairs of expert E; some tokens have no other."""
    case = Case("moe", moe, options)
    assert INTERPRETING or all(KERNELS[name].build() for name in ("moe", "moe_backward"))
    x, w13, w2, idx, weight, *rest = low(case) if options[5] == "fp4" else case.args()
    leave_out(ops.moe.opaque, case, x, w13, w2, idx, weight, *rest)


def test_pairs_without_an_expert_add_nothing_to_saved_pre_activations():
    case = Case("moe_train", moe_train, (9, 7, 2, 6, 4))
    assert all(KERNELS[name].build() for name in ("moe_train", "moe_train_backward"))
    leave_out(ops.INTERNAL["moe_train"].opaque, case, *case.args())


def leave_out(form, case, x, w13, w2, idx, weight, *rest):
    E, none = len(w13), torch.rand(idx.shape) < 0.6
    none[0] = True
    (y,), grads = run(form, case, (x, w13, w2, idx.masked_fill(none, E), weight, *rest))
    (expected,), wanted = run(form, case, (x, w13, w2, idx, weight.masked_fill(none, 0), *rest))
    assert (y - expected).norm() <= 2e-6 * expected.norm() and not y[0].any()
    for leaf, g, e in zip(
        differentiable(case, (x, w13, w2, idx, weight, *rest)), grads, wanted, strict=True
    ):
        g, e = (
            (g.masked_fill(none, 0), e.masked_fill(none, 0)) if leaf == 4 else (g, e)
        )  # its gradient is not defined there
        assert (g - e).float().norm() <= 2e-6 * e.float().norm()


@pytest.mark.kernels
def test_pairs_without_an_expert_take_no_block():
    """More of them than blocks have room for."""
    x, w13, w2, idx, weight, *rest = Case("moe", moe, (19, 2, 1, 6, 4, "float", False)).args()
    idx[:, 0] = torch.tensor([0, 1] + [2] * 17)
    y = ops.moe.opaque(x, w13, w2, idx, weight, *rest)
    close(y[:2], ops.moe.reference(x[:2], w13, w2, idx[:2], weight[:2], *rest), 5e-6)
    assert not y[2:].any()


@pytest.mark.kernels
@by_few
def test_each_gradient_alone_is_the_same(case):
    args, leaves = case.args(), differentiable(case, case.args())
    _, grads = run(OPS[case.op].opaque, case, args)
    for form in ("reference", "opaque"):
        for i, expected in zip(leaves, grads, strict=True):
            inputs = [
                a.detach().requires_grad_(i == j) if j in leaves else a for j, a in enumerate(args)
            ]
            torch.manual_seed(1)
            out = getattr(OPS[case.op], form)(*inputs)
            sum(
                (o * normal(o.shape).bfloat16()).sum()
                for o in ([out] if isinstance(out, torch.Tensor) else out)
            ).backward()
            close(inputs[i].grad, expected, 5e-6)


# --------------------------------------------------------------------------------------------------
# Registry: which form runs, and what is refused


def called(call: Callable, *args) -> list[str]:
    with Recorder() as recorder:
        call(*args)
    return recorder.names


@by_public_op
def test_use_chooses_the_form_within_its_block(case):
    op, args = getattr(ops, case.op), case.args()
    default = [case.op] * (case.op == "indexer_loss")
    assert called(op, *args) == default  # else the reference on CPU, for these few tokens
    with ops.use({case.op: "opaque"}):
        assert called(op, *args) == [case.op]
        with ops.use({case.op: "reference"}):
            assert called(op, *args) == []
        assert called(op, *args) == [case.op]
    with pytest.raises(KeyError), ops.use({case.op: "reference"}):
        raise KeyError
    assert called(op, *args) == default


@pytest.mark.parametrize(
    "options, grad, expected",
    [
        ((2, 4, 2, 10, 6, "float", False), True, []),  # the weights are gathered
        ((32, 5, 2, 10, 6, "float", False), True, []),  # all experts, for few tokens
        ((33, 5, 2, 10, 6, "float", False), False, ["moe"]),
        ((17, 33, 2, 10, 6, "float", False), False, ["moe"]),  # too many experts for that
        ((33, 5, 2, 10, 6, "float", False), True, ["moe_train"]),
        ((33, 5, 2, 10, 6, "float", True), True, ["moe"]),
        ((33, 3, 2, 72, 130, "fp8", False), True, ["moe"]),
    ],
    ids=str,
)
def test_moe_is_opaque_on_cpu_by_default_for_many_tokens_only(options, grad, expected):
    with torch.set_grad_enabled(grad):
        assert called(ops.moe, *moe(*options)) == expected


def compiled(form: Callable, args: tuple, grad: bool) -> tuple[list[str], object]:
    """Our nodes in the graph of form(*args), and its result."""
    torch._dynamo.reset()
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.set_grad_enabled(grad):
        got = torch.compile(lambda *args: form(*args), backend=backend, fullgraph=True)(*args)
    return [name.split(".")[1] for name in names if name.startswith("dsv4.")], got


def test_sinkhorn_is_one_node_of_hc_pre_when_compiled_for_cpu():
    """By default, without gradients; with them hc_pre is one node. Eager calls build no C++."""
    args = Case("hc_pre", hc_pre, (2, 3, 4, 5, 20)).args()
    for form, grad, expected in (
        (ops.hc_pre, False, ["sinkhorn"]),
        (ops.hc_pre, True, ["hc_pre"]),
        (ops.hc_pre.reference, False, []),
    ):
        names, got = compiled(form, args, grad)
        assert names == expected
        for a, b in zip(got, ops.hc_pre.reference(*args), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert called(ops.hc_pre, *args) == []


@pytest.mark.parametrize(
    "options, dtype, grad, node",
    [
        ((5, 4, 2, 10, 6, "float", True), torch.float32, False, "moe_decode"),
        ((64, 8, 4, 10, 6, "float", False), torch.float32, False, "moe_decode"),
        (
            (65, 8, 4, 10, 6, "float", False),
            torch.float32,
            False,
            "moe",
        ),  # many tokens: matrix products
        ((5, 4, 2, 10, 6, "float", True), torch.float32, True, None),
        ((5, 4, 2, 10, 6, "float", True), torch.bfloat16, False, None),
        ((3, 2, 2, 72, 130, "fp8", False), torch.float32, False, None),
    ],
    ids=str,
)
def test_moe_runs_moe_decode_when_compiled_for_cpu_without_gradients(options, dtype, grad, node):
    x, w13, w2, *rest = Case("moe", moe, options).args()
    args = (
        x.to(dtype),
        *((w.to(dtype) if w.dtype == torch.float32 else w) for w in (w13, w2)),
        *rest,
    )
    names, got = compiled(ops.moe, args, grad)
    assert names == [node] * (node is not None)
    close(got, ops.moe.reference(*args), 5e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case.op in KERNELS], ids=str)
def test_cpp_kernels_equal_their_references(case):
    """Outputs and gradients, on one thread and on three."""
    args, op, before = case.args(), OPS[case.op], torch.get_num_threads()
    assert all(
        kernel.build()
        for name, kernel in KERNELS.items()
        if name in (case.op, f"{case.op}_backward")
    )
    expected = run(op.reference, case, args)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            got = run(op.opaque, case, args)
            same(got, expected, 5e-6)
    finally:
        torch.set_num_threads(before)
    if args[0].numel() > 1:
        strided = tuple(
            a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in args
        )
        same(run(op.opaque, case, strided), got, 1e-6)


@pytest.mark.parametrize("kind", ["dense", "idx"])
def test_ranges_that_reach_beyond_the_entries_end_with_them(kind):
    case = Case("sparse_attn", sparse_attn, (2, 5, 8, kind))
    args = list(case.args())
    assert all(KERNELS[name].build() for name in ("sparse_attn", "sparse_attn_backward"))
    expected, E = run(ops.sparse_attn.opaque, case, args), args[6].shape[1]
    args[7], args[8] = args[7] - 3 * (args[7] == 0), args[8] + 4 * (args[8] == E)
    same(run(ops.sparse_attn.opaque, case, args), expected, 1e-7)


def test_cpp_kernels_round_small_values_to_the_scale_of_their_block():
    """Each value meets a weight that undoes its size: its own rounding shows in the result."""
    n, size = 20, torch.exp2(-torch.arange(20.0))
    x = (1.37 * size)[None]
    gate, up = torch.zeros(n, n).index_fill_(1, torch.tensor(0), 1.0), torch.diag(1 / size)
    args = (
        x,
        torch.cat((gate, up))[None],
        torch.eye(n)[None],
        torch.zeros(1, 1, dtype=torch.int64),
        torch.ones(1, 1),
        1e9,
        True,
    )
    assert KERNELS["moe_decode"].build()
    close(
        ops.INTERNAL["moe_decode"].opaque(*args), ops.INTERNAL["moe_decode"].reference(*args), 1e-6
    )


def test_cpp_kernels_refuse_other_dtypes_in_one_line():
    x, *rest = Case("moe_decode", moe_decode, (5, 4, 2, 10, 6, False)).args()
    assert KERNELS["moe_decode"].build() and KERNELS["sinkhorn"].build()
    for call in (
        lambda: torch.ops.dsv4.moe_decode(x.double(), *rest),
        lambda: torch.ops.dsv4.sinkhorn(x[:4, :4].double(), 1e-6, 2),
    ):
        with pytest.raises(RuntimeError, match="takes float32 values and int64 indices"):
            call()


def test_an_expert_that_does_not_exist_is_refused():
    x, w13, w2, idx, *rest = Case("moe_decode", moe_decode, (5, 4, 2, 10, 6, False)).args()
    assert KERNELS["moe_decode"].build()
    for wrong in (-1, 4):
        with pytest.raises(RuntimeError, match=f"no expert {wrong}"):
            ops.INTERNAL["moe_decode"].opaque(
                x, w13, w2, idx.clone().index_fill_(0, torch.tensor(3), wrong), *rest
            )


def test_cpp_kernels_use_every_thread_they_are_given():
    args, before = (
        Case("moe_decode", moe_decode, (3, 2, 2, 1030, 514, False)).args(),
        torch.get_num_threads(),
    )
    assert KERNELS["moe_decode"].build()
    one = ops.INTERNAL["moe_decode"].opaque(*args)
    torch.set_num_threads(2)
    try:
        assert torch.equal(ops.INTERNAL["moe_decode"].opaque(*args), one)
    finally:
        torch.set_num_threads(before)


def test_an_op_whose_cpp_does_not_compile_keeps_its_python(tmp_path, monkeypatch):
    (tmp_path / "common.h").write_text("")
    (tmp_path / "broken.cpp").write_text('#include "common.h"\nno such language')
    monkeypatch.setattr(cpp, "FOLDER", tmp_path)
    double = ops.register(
        "test_double(Tensor x) -> Tensor", impl=lambda x: 2 * x, fake=torch.empty_like, cpp="broken"
    )
    assert KERNELS["test_double"].built is None and double(torch.ones(1)) == 2
    assert not KERNELS["test_double"].build() and double(torch.ones(1)) == 2
    del KERNELS["test_double"]


def test_tracing_builds_no_cpp():
    double = ops.register(
        "test_pure(Tensor x) -> Tensor", impl=lambda x: 2 * x, fake=torch.empty_like, cpp="sinkhorn"
    )
    with FakeTensorMode() as mode:
        assert double(mode.from_tensor(torch.ones(3))).shape == (3,)
    assert KERNELS.pop("test_pure").built is None


@pytest.mark.parametrize(
    "modes, phase, expected",
    [
        ({}, "decode", {"sinkhorn", "moe_decode"}),
        ({}, "prefill", {"sinkhorn", "sparse_attn", "moe_decode", "moe"}),
        ({}, "train", {"hc_pre", "hc_post", "hc_post_pre", "sparse_attn", "moe_train", "moe"}),
        ({"moe": "reference", "hc_pre": "opaque"}, "decode", {"hc_pre", "sinkhorn"}),
        ({name: "opaque" for name in ops.OPS}, "decode", set(KERNELS) & set(ops.OPS)),
        ({name: "reference" for name in ops.OPS}, "train", set()),
    ],
    ids=str,
)
def test_the_cpp_that_a_table_runs_is_built(modes, phase, expected, monkeypatch):
    built = []
    monkeypatch.setattr(cpp.CppKernel, "build", lambda kernel: built.append(kernel.name))
    ops.build_cpu_kernels(ops.Table(modes), phase)
    assert set(built) == (expected if KERNELS else set())
    with cpp.disabled("moe", "moe_train", "moe_decode"):
        built.clear()
        ops.build_cpu_kernels(ops.Table(modes), phase)
    assert set(built) == {name for name in expected if not name.startswith("moe")}


@pytest.mark.parametrize(
    "op, options, grad, node",
    [
        ("hc_pre", (2, 3, 4, 5, 20), True, "hc_pre"),
        ("hc_pre", (2, 3, 4, 5, 20), False, "sinkhorn"),
        ("hc_post", (2, 3, 4, 5), True, "hc_post"),
        ("hc_post_pre", (2, 3, 4, 5, 20), True, "hc_post_pre"),
        ("sparse_attn", (2, 9, 8, "idx"), True, "sparse_attn"),
        ("moe", (5, 4, 2, 10, 6, "float", False), False, "moe_decode"),
        ("moe", (33, 5, 2, 10, 6, "float", False), True, "moe_train"),
    ],
    ids=str,
)
def test_a_disabled_kernel_leaves_the_form_that_an_op_has_without_it(op, options, grad, node):
    args = globals()[op](*options)
    assert node in compiled(ops.OPS[op].cpu, args, grad)[0]
    with cpp.disabled(node):
        without = compiled(ops.OPS[op].cpu, args, grad)[0]
    expected = {"hc_post_pre": ["hc_pre"], "moe_train": ["moe"]}
    assert without == expected.get(node, [])


def test_a_table_tells_the_mode_of_every_op_on_a_device():
    table = ops.Table({"moe": "reference", "rope": "cpu"})
    on_cpu, elsewhere = table.modes_on("cpu"), table.modes_on("cuda")
    assert set(on_cpu) == set(elsewhere) == set(ops.OPS)
    assert on_cpu["moe"] == elsewhere["moe"] == "reference" and elsewhere["rope"] == "cpu"
    assert on_cpu["sparse_attn"] == "cpu" and on_cpu["compress"] == "reference"
    assert elsewhere["sparse_attn"] == elsewhere["compress"] == "opaque"


@by_public_op
def test_a_table_keeps_its_choice(case):
    args = case.args()
    with ops.use({case.op: "opaque"}):
        default, given = ops.Table(), ops.Table({case.op: "reference"})
    with ops.use({case.op: "reference"}):
        assert called(getattr(default, case.op), *args) == [case.op]
        assert default.modes == {case.op: "opaque"}
    with ops.use({case.op: "opaque"}):
        assert called(getattr(given, case.op), *args) == []
        assert given.modes == {case.op: "reference"}


def test_a_table_is_immutable():
    table = ops.Table({"moe": "opaque"})
    with pytest.raises(AttributeError, match="immutable"):
        table.moe = None
    with pytest.raises(TypeError):
        table.modes["moe"] = "reference"
    assert copy.deepcopy(table) is table and pickle.loads(pickle.dumps(table)).modes == table.modes


@pytest.mark.parametrize(
    "choose", [ops.Table, lambda modes: ops.use(modes).__enter__()], ids=["Table", "use"]
)
def test_unknown_ops_and_modes_are_named(choose):
    with pytest.raises(ValueError, match="unknown op 'attention': choose from .*sparse_attn"):
        choose({"attention": "opaque"})
    with pytest.raises(ValueError, match="op 'moe': mode 'fast' is none of reference, opaque, cpu"):
        choose({"moe": "fast"})
    assert ops.Table().modes == {}


def test_every_op_runs_on_both_devices():
    for case in FEW[::3]:
        for name in set(record(case).names):
            assert all(
                torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.NAMESPACE}::{name}", key)
                for key in ("CPU", "CUDA")
            )


def shorter(dim: int) -> Callable:
    return lambda t: t.narrow(dim, 0, t.shape[dim] - 1)


def becomes(value) -> Callable:
    return lambda _: value


first, flat = (lambda t: t[0]), torch.Tensor.flatten
MISFITS = {  # which of the op's cases in FEW, which argument, and what is wrong with it
    "act_quant": [(0, 1, becomes(0)), (0, 1, becomes(-64)), (0, 2, becomes("int8"))],
    "rope": [
        (0, 0, shorter(1)),
        (0, 0, flat),
        (0, 0, lambda x: x[..., :3]),
        (0, 0, lambda x: x[:, :, None]),
        (0, 1, shorter(0)),
        (0, 2, shorter(1)),
    ],
    "hc_pre": [
        (0, 0, shorter(2)),
        (0, 0, shorter(3)),
        (0, 0, first),
        *((0, i, shorter(0)) for i in (1, 2, 3)),
    ],
    "sinkhorn": [
        (0, 0, shorter(2)),
        (0, 0, torch.Tensor.flatten),
        (0, 0, lambda t: t[..., :0, :0]),
        (0, 2, becomes(0)),
        (0, 0, lambda t: torch.zeros(17, 17)),
    ],
    "hc_post": [
        (0, 0, shorter(1)),
        (0, 1, shorter(2)),
        (0, 1, first),
        (0, 2, shorter(2)),
        (0, 3, shorter(3)),
    ],
    "hc_post_pre": [
        (0, 1, shorter(2)),
        (0, 1, shorter(3)),
        (0, 1, first),
        *((0, i, shorter(0)) for i in (0, 2, 3, 4, 5, 6)),
    ],
    "compress": [
        (0, 0, shorter(2)),
        (0, 0, shorter(0)),
        (0, 0, lambda rows: rows[..., None]),
        (0, 0, first),
        (0, 1, shorter(1)),
        (0, 2, shorter(0)),
        (0, 3, shorter(0)),
        (0, 4, shorter(1)),
        (0, 5, shorter(1)),
    ],
    "sparse_attn": [
        (0, 0, shorter(0)),
        (0, 0, shorter(2)),
        (0, 0, first),
        (0, 1, shorter(2)),
        (0, 1, shorter(0)),
        (0, 1, lambda kv: kv[:, :4]),
        (0, 2, shorter(0)),
        (0, 3, shorter(1)),
        (0, 4, shorter(1)),
        (0, 5, shorter(0)),
        (0, 4, lambda cos: cos.repeat(1, 1, 4)),
        (0, 9, becomes(torch.zeros(3, 5, 1))),
        (1, 6, shorter(0)),
        (1, 6, shorter(2)),
        (1, 7, shorter(1)),
        (1, 7, becomes(None)),
        (1, 8, shorter(0)),
        (2, 9, shorter(1)),
    ],
    "indexer_topk": [
        (0, 0, shorter(3)),
        (0, 0, first),
        (0, 1, shorter(0)),
        (0, 2, shorter(2)),
        (0, 3, shorter(1)),
        (0, 4, shorter(1)),
        (0, 5, becomes(0)),
    ],
    "indexer_loss": [
        (0, 0, shorter(0)),
        (0, 0, shorter(3)),
        (0, 0, first),
        (0, 1, shorter(1)),
        (0, 1, lambda cos: cos.repeat(1, 1, 4)),
        (0, 2, shorter(0)),
        (0, 3, shorter(1)),
        (0, 3, shorter(2)),
        (0, 3, first),
        (0, 4, shorter(2)),
        (0, 5, shorter(1)),
        (0, 5, first),
        (0, 6, shorter(2)),
        (0, 7, shorter(2)),
        (0, 8, shorter(1)),
        (0, 9, shorter(0)),
        (0, 10, shorter(1)),
        (0, 10, first),
    ],
    "linear_cross_entropy": [(0, 0, shorter(1)), (0, 0, first), (0, 1, flat), (0, 2, shorter(0))],
    "quant_linear": [
        (0, 0, shorter(2)),
        (0, 1, torch.Tensor.float),
        (0, 1, flat),
        (0, 2, shorter(0)),
        (0, 2, shorter(1)),
        (0, 2, torch.Tensor.long),
        (0, 3, becomes(7)),
        (2, 3, becomes(4)),
        (2, 1, shorter(0)),
        (2, 0, lambda x: x[0, 0, 0]),
    ],
    "moe": [
        (0, 0, shorter(1)),
        (0, 0, first),
        (0, 1, shorter(0)),
        (0, 1, shorter(1)),
        (0, 1, first),
        (0, 2, shorter(2)),
        (0, 3, shorter(0)),
        (0, 3, flat),
        (0, 4, shorter(1)),
        (0, 5, becomes(torch.ones(4, 2, 1))),
        (1, 5, becomes(None)),
        (1, 6, becomes(None)),
        (1, 5, shorter(1)),
        (1, 6, shorter(2)),
        (2, 5, shorter(2)),
        (2, 6, shorter(1)),
        (2, 0, shorter(1)),
    ],
}


@pytest.mark.parametrize("case", [c for c in FEW[::3] if c.op in MISFITS], ids=lambda c: c.op)
def test_misfits_are_refused_in_one_line(case):
    three = [each for each in FEW if each.op == case.op]
    for which, position, change in MISFITS[case.op]:
        args = list(three[which].args())
        args[position] = change(args[position])
        op = OPS[case.op]
        for form in (op.reference, op.opaque, op.cpu, op):
            with pytest.raises(ValueError, match=rf"\A{case.op}: [^\n]*\Z"):
                form(*args)
