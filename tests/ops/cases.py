"""Arguments that ops are tested with: a builder of each op's name, and the rows of CASES.

A row has the options of a builder. The first three rows of each op use every optional argument;
long ones are for references that work in blocks and chunks.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import ops
from contracts import CONTRACTS
from ops.formats import quantize_fp4, quantize_fp8, scale_to_float
from ops.launch import INTERPRETING

normal, integers = torch.randn, torch.randint

# --------------------------------------------------------------------------------------------------
# Parts of arguments


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
    idx = torch.rand(B, T, E).argsort(-1)[..., :K]
    idx = idx.masked_fill(torch.rand(B, T, min(K, E)) < 0.4, -1)
    return idx.masked_fill(torch.rand(B, T, 1) < 0.2, -1)


def spread(*shape):
    """Values over many binades: what a quantised value becomes depends on its block."""
    return normal(shape) * torch.exp2(integers(-9, 1, shape).float())


def pack(w, fmt):
    """-> stored weights, scales; "fp8f" has fp32 scales that are no powers of two."""
    if fmt == "float":
        return w, None
    q, scale = (quantize_fp4 if fmt == "fp4" else quantize_fp8)(w)
    if fmt == "fp8f":
        scale = scale_to_float(scale) * (1 + torch.rand(scale.shape))
    return q, scale


# --------------------------------------------------------------------------------------------------
# Arguments of each op


def act_quant(block, fmt, *shape):
    return spread(*shape), block, fmt


def rope(B, T, H, D, r, inverse):
    return normal(B, T, H, D) if H else normal(B, T, D), *angles(B, T, r), inverse


def hc_pre(B, T, n, d, iters):
    rows = n * (2 + n)
    x, fn = normal(B, T, n, d), normal(rows, n * d) * (n * d) ** -0.5
    return x, fn, normal(rows) / 2, torch.rand(3) + 0.5, 1e-3, 1e-3, iters


def sinkhorn(*options):
    *shape, iters = options
    return 2 * normal(*shape), 1e-3, iters


def hc_post(B, T, n, d):
    return normal(B, T, d), normal(B, T, n, d), normal(B, T, n), normal(B, T, n, n)


def hc_post_pre(B, T, n, d, iters):
    return *hc_post(B, T, n, d), *hc_pre(B, T, n, d, iters)[1:]


def compress(B, T, ratio, D, r):
    lanes = 2 if ratio == 4 else 1
    N, E = lanes * ratio - 1 + T, (T - 1) // ratio + 1
    end, index = integers(lanes * ratio - 1, N, (B, E)), integers(0, 3, (B, E))
    rows, weight = normal(B, N, 2 * lanes * D), normal(D)
    return rows, end, index, weight, *angles(B, E, r), ratio, 1e-3, torch.float32


def sparse_attn(B, T, W, kind, H=3, D=6, E=9, K=7):
    q = 2 * normal(B, T, H, D)
    kv = normal(B, W - 1 + T, D)
    sink = 2 * normal(H)
    entries = normal(B, E, D)
    window_len = integers(1, W + 1, (B, T))
    lo, hi = ranges(B, T, E)
    idx = choices(B, T, E, K)
    given = {
        "window": (None,) * 4,
        "dense": (entries, lo, hi, None),
        "idx": (entries, lo, hi, idx),
    }[kind]
    return q, kv, sink, window_len, *angles(B, T, max(2, D // 4 * 2)), *given, 1e-3


def indexer_topk(B, T, E, topk, H=17, D=4):
    return normal(B, T, H, D), normal(B, E, D), normal(B, T, H), *ranges(B, T, E), topk


def indexer_loss(B, T, E, kind, H=3, D=6, Hi=5, Di=4, K=7):
    q = 2 * normal(B, T, H, D)
    entries = normal(B, E, D)
    lse = 2 * normal(B, T, H)
    index = normal(B, T, Hi, Di), normal(B, E, Di), normal(B, T, Hi)
    (lo, hi), idx = ranges(B, T, E), choices(B, T, E, K)
    main = q, *angles(B, T, max(2, D // 4 * 2)), entries, lse
    return *main, *index, lo, hi, idx if kind == "idx" else None, 1e-3


def linear_cross_entropy(N, V, d=6):
    x, weight = 2 * normal(N, d), normal(V, d)
    return x, weight, integers(0, V, (N,)).masked_fill(torch.rand(N) < 0.3, -100)


def linear(lead, i, o, *groups):
    return spread(*lead, *groups, i), normal(*groups, o, i) * i**-0.5


def linear_fp32(lead, i, o):
    return spread(*lead, i), normal(o, i) * i**-0.5


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
    w13 = torch.cat((w1, w3), 1)
    s13 = None if s1 is None else torch.cat((s1, s3), 1)
    x = 4 * spread(N, d) if quantized else normal(N, d)
    return x, w13, w2, idx, torch.rand(N, K) + 0.1, s13, s2, 0.8, quantized


def moe_decode(N, E, K, d, I, quantized, routing="random"):
    x, w13, w2, idx, weight, _, _, *constants = moe(N, E, K, d, I, "float", quantized, routing)
    return x, w13, w2, idx, weight, *constants


# --------------------------------------------------------------------------------------------------
# Cases


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
        name = f"ops.{self.op}_reference"
        if importlib.util.find_spec(name) is None:
            name = f"ops.{self.op}"
        return importlib.import_module(name)


def case_of(build: Callable, *options) -> Case:
    return Case(build.__name__, build, options)


def cases(build: Callable, *rows: tuple) -> list[Case]:
    return [case_of(build, *row) for row in rows]


LENGTHS = [(3, 5), (1, 1), (3, 1), (2, 2), (2, 63), (1, 64), (2, 65), (1, 130)]  # B, T
LENGTHS = LENGTHS[:4] if INTERPRETING else LENGTHS
CASES = [
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
    *cases(linear, ((2, 5), 33, 7), ((3,), 8, 5, 2), ((1, 1), 130, 260), ((2, 65), 7, 4, 3)),
    *cases(linear_fp32, ((2, 5), 33, 7), ((3,), 8, 1), ((1, 1), 130, 260), ((65,), 70, 9)),
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
        (9, 7, 2, 33, 13, "float", False, "one"),
        (23, 2, 1, 256, 128, "float", False),
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
]
FEW = [case for op in CONTRACTS for case in [case for case in CASES if case.op == op][:3]]
NODES = [case for case in FEW if case.op in ops.INTERNAL or not ops.OPS[case.op].traced]
PUBLIC = [case for case in NODES[::3] if case.op in ops.OPS]
by_case = pytest.mark.parametrize("case", CASES, ids=str)
by_node = pytest.mark.parametrize("case", NODES, ids=str)
by_few = pytest.mark.parametrize("case", FEW, ids=str)
by_public_op = pytest.mark.parametrize("case", PUBLIC, ids=lambda case: case.op)
