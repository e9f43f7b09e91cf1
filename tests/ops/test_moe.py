"""What is special to moe: its variants, pairs without an expert, which form runs when."""

from __future__ import annotations

import pytest
import torch

import ops
from cases import CASES, Case, case_of, moe
from harness import (
    build_cpp,
    called,
    close,
    compiled,
    differentiable,
    low,
    run,
    same,
    with_kernels_of_moe,
)
from ops.launch import INTERPRETING
from ops.swiglu import HAS_KERNELS


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "moe"], ids=str)
def test_moe_paths_agree(case, monkeypatch):
    """Gathered weights, all experts with zero weights, and tokens grouped by expert agree."""
    args = case.args()
    if args[-1] and case.options[-1] == "twice":
        # Rounding once or twice differs for an expert that a token chose twice
        args = (*args[:-1], False)
    expected = run(ops.moe.opaque, case, args)
    for few in (True, False):
        monkeypatch.setattr(case.module, "_few", lambda *args: few)
        same(run(ops.moe.reference, case, args), expected, 5e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("form", [ops.moe.reference, ops.moe.opaque])
def test_experts_that_nobody_chose_have_zero_gradient(form):
    case = case_of(moe, 9, 7, 2, 6, 4, "float", False, "one")
    _, (_, g_w13, g_w2, _) = run(form, case, case.args())
    for g in (g_w13, g_w2):
        assert [bool(e.any()) for e in g] == [e == 5 for e in range(7)]


# --------------------------------------------------------------------------------------------------
# Pairs without an expert


def leave_out(form, case: Case, x, w13, w2, idx, weight, *rest):
    """Pairs of expert E count as pairs of weight 0; token 0 has no others."""
    E, none = len(w13), torch.rand(idx.shape) < 0.6
    none[0] = True
    (y,), grads = run(form, case, (x, w13, w2, idx.masked_fill(none, E), weight, *rest))
    (expected,), wanted = run(form, case, (x, w13, w2, idx, weight.masked_fill(none, 0), *rest))
    assert (y - expected).norm() <= 2e-6 * expected.norm() and not y[0].any()
    leaves = differentiable(case, (x, w13, w2, idx, weight, *rest))
    for leaf, g, e in zip(leaves, grads, wanted, strict=True):
        if leaf == 4:  # the gradient of a weight without an expert is not defined
            g, e = g.masked_fill(none, 0), e.masked_fill(none, 0)
        assert (g - e).float().norm() <= 2e-6 * e.float().norm()


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
    case = case_of(moe, *options)
    if HAS_KERNELS and not INTERPRETING:
        build_cpp("moe", "moe_backward")
    leave_out(ops.moe.opaque, case, *(low(case) if options[5] == "fp4" else case.args()))


@pytest.mark.kernels
def test_pairs_without_an_expert_take_no_block():
    """More of them than blocks have room for."""
    x, w13, w2, idx, weight, *rest = case_of(moe, 19, 2, 1, 6, 4, "float", False).args()
    idx[:, 0] = torch.tensor([0, 1] + [2] * 17)
    y = ops.moe.opaque(x, w13, w2, idx, weight, *rest)
    close(y[:2], ops.moe.reference(x[:2], w13, w2, idx[:2], weight[:2], *rest), 5e-6)
    assert not y[2:].any()


# --------------------------------------------------------------------------------------------------
# Which form runs


@with_kernels_of_moe
@pytest.mark.parametrize(
    "options, grad, expected",
    [
        ((2, 4, 2, 10, 6, "float", False), True, []),  # the weights are gathered
        ((32, 5, 2, 10, 6, "float", False), True, []),  # all experts, for few tokens
        ((33, 5, 2, 10, 6, "float", False), False, ["moe"]),
        ((17, 33, 2, 10, 6, "float", False), False, ["moe"]),  # too many experts for that
        ((33, 5, 2, 10, 6, "float", False), True, ["moe"]),
        ((33, 5, 2, 10, 6, "float", True), True, ["moe"]),
        ((33, 3, 2, 72, 130, "fp8", False), True, ["moe"]),
    ],
    ids=str,
)
def test_moe_is_opaque_on_cpu_by_default_for_many_tokens_only(options, grad, expected):
    with torch.set_grad_enabled(grad):
        assert called(ops.moe, *moe(*options)) == expected


MANY = (65, 8, 4, 10, 6, "float", False)  # tokens: matrix products


@with_kernels_of_moe
@pytest.mark.parametrize(
    "options, dtype, grad, node",
    [
        ((5, 4, 2, 10, 6, "float", True), torch.float32, False, "moe_decode"),
        ((64, 8, 4, 10, 6, "float", False), torch.float32, False, "moe_decode"),
        ((1, 4, 2, 10, 6, "float", True), torch.float32, False, None),  # one token: traced
        (MANY, torch.float32, False, "moe"),
        ((5, 4, 2, 10, 6, "float", True), torch.float32, True, None),
        ((5, 4, 2, 10, 6, "float", True), torch.bfloat16, False, None),
        ((3, 2, 2, 72, 130, "fp8", False), torch.float32, False, None),
    ],
    ids=str,
)
def test_moe_runs_moe_decode_when_compiled_for_cpu_without_gradients(options, dtype, grad, node):
    x, w13, w2, *rest = case_of(moe, *options).args()
    w13, w2 = (w.to(dtype) if w.dtype == torch.float32 else w for w in (w13, w2))
    args = (x.to(dtype), w13, w2, *rest)
    names, got = compiled(ops.moe, args, grad)
    assert names == [node] * (node is not None)
    close(got, ops.moe.reference(*args), 5e-6)
