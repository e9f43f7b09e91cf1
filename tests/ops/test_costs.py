"""FLOPs and memory of every op: what is counted is what is computed, and long inputs are cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cases import (
    CASES,
    Case,
    by_node,
    cases,
    indexer_loss,
    indexer_topk,
    linear_cross_entropy,
    moe,
    sparse_attn,
)
from harness import Recorder, detached, record
from ops import register_flops

register_flops()


def flops(call: Callable, *args) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


def expected_flops(case: Case, args: tuple) -> tuple[int, int]:
    """Matrix products, forward and backward."""
    size = [getattr(a, "shape", None) for a in args]
    if case.op == "sparse_attn":
        # Scores and values; then five products: both again, and the gradients of q, k and v
        (B, T, H, D), W = size[0], size[1][1] - size[0][1] + 1
        E, K = size[6] and size[6][1], size[9] and size[9][2]
        product = 2 * B * T * H * D * (W + (K or E or 0))
        return 2 * product, 5 * product
    if case.op == "indexer_topk":
        return 2 * args[0].numel() * size[1][1] + 2 * args[2].numel() * size[1][1], 0
    if case.op == "indexer_loss":
        # Of main heads, index heads and u; then again, and the gradients of qi and ki, and of u
        N = size[10][2] if size[10] else size[3][1]
        main, index, weights = (2 * args[i].numel() * N for i in (0, 5, 7))
        return main + index + weights, main + 3 * index + 2 * weights
    if case.op in ("linear_cross_entropy", "hc_pre"):
        product = 2 * args[0].numel() * size[1][0]
        return product, 3 * product
    if case.op == "hc_post_pre":
        product = 2 * args[1].numel() * size[4][0]
        return product, 3 * product
    if case.op == "linear_fp32":
        product = 2 * args[0].numel() * size[1][0]
        return product, 2 * product
    if case.op == "quant_linear":
        product = 2 * args[0].numel() * size[1][0] // args[3]
        return product, product
    if case.op in ("moe", "moe_decode"):
        product = 2 * args[3].numel() * size[0][1] * (size[1][1] // 2)
        # Two gradients of each, one with packed weights; moe computes W1 x and W3 x again
        backward = {"moe": 5 if size[5] else 8, "moe_decode": 0}
        return 3 * product, backward[case.op] * product
    return 0, 0


@by_node
def test_flops_are_those_of_the_matrix_products(case):
    args = case.args()
    forward, *backward = record(case).calls
    counts = expected_flops(case, args)
    assert flops(*forward[:1], *forward[1]) == counts[0]
    assert sum(flops(op, *args) for op, args in backward) == counts[1]


# Where no product is wasted: attention of one token a row, all its keys counted; experts
EXACT = ("indexer_topk", "indexer_loss", "linear_cross_entropy", "quant_linear", "moe")
WITHOUT_WASTE = [
    case for case in CASES if case.op in EXACT or case.op == "sparse_attn" and case.options[1] == 1
]


@pytest.mark.parametrize("case", WITHOUT_WASTE, ids=str)
def test_flops_are_those_of_the_implementation(case):
    module = case.module
    forward = getattr(module, "grouped", None) or getattr(module, "forward_reference", None)
    impls = [forward or module.reference, getattr(module, "backward_reference", None)]
    for (op, args), impl in zip(record(case).calls, impls, strict=False):
        assert flops(op, *args) == flops(impl, *args) > 0


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
    calls, chunk = record(case).calls, 1 << 17
    monkeypatch.setattr(case.module, "CHUNK", chunk)
    for (op, args), name in zip(calls, ("forward_reference", "backward_reference"), strict=False):
        given = [t for t in tree_leaves((args, op(*args))) if isinstance(t, torch.Tensor)]
        impl = getattr(case.module, name, None) or case.module.reference
        assert largest(impl, *detached(args)) <= max(chunk, *(t.numel() for t in given))
