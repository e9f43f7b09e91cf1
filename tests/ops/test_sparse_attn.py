"""What is special to sparse_attn: hidden keys, the sink, its roundings, its second output."""

from __future__ import annotations

import itertools

import pytest
import torch

import ops
from cases import FEW, case_of, cases, sparse_attn
from contracts import attention, spec_rope, spec_sparse_attn, unit_queries, visible
from harness import (
    build_cpp,
    close,
    differentiable,
    low,
    record,
    run,
    same,
    tensors,
    with_gradients,
)
from ops.launch import INTERPRETING


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
    # Keys that no token sees, among kv and entries
    hidden = {
        i: torch.ones(args[i].shape[:2], dtype=torch.bool) for i in (1, 6) if args[i] is not None
    }
    for b, t in itertools.product(range(2), range(5)):
        for mask, rows in zip(hidden.values(), visible(args, b, t), strict=False):
            mask[b, rows] = False
    for i, mask in hidden.items():
        gradient = grads[differentiable(case, tuple(args)).index(i)]
        assert mask.any() and (gradient[mask] == 0).all()
        args[i] = args[i].masked_fill(mask[..., None], 1e4)
    assert torch.equal(op(*args), out[0])


@pytest.mark.kernels
@pytest.mark.parametrize("form", [ops.sparse_attn.reference, ops.sparse_attn.opaque])
def test_a_sink_takes_its_share(form):
    """With one visible key o = k e^s / (e^s + e^sink): k for a low sink, 0 for a high one."""
    args = case_of(sparse_attn, 1, 2, 4, "window", 3).args()
    q, kv, _, window_len, cos, sin, *rest = args
    window_len = torch.ones_like(window_len)
    own = kv[:, -2:, None].expand_as(q)
    s = (unit_queries(q, cos, sin, rest[-1]) * own).sum(-1, keepdim=True) * 6**-0.5
    for sink in (torch.full((3,), -1e4), torch.tensor([-1.0, 0, 3]), torch.full((3,), 1e4)):
        expected = spec_rope(own * torch.sigmoid(s - sink[:, None]), cos, sin, True)
        torch.testing.assert_close(form(q, kv, sink, window_len, cos, sin, *rest), expected)


def test_probabilities_are_rounded_before_the_values_but_not_in_the_denominator():
    """By the reference: the kernel rounds probabilities against the maximum so far."""
    args = low(case_of(sparse_attn, 2, 65, 1, "dense", 3, 6, 20))
    q, kv, sink, window_len, cos, sin, entries, *_, eps = args
    cos, sin = torch.ones_like(cos), torch.zeros_like(sin)  # rotation is another rounding
    everything = torch.full((2, 65), 0), torch.full((2, 65), 20)
    args = (q, kv, sink, window_len, cos, sin, entries, *everything, None, eps)
    q = (q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + eps)).bfloat16()
    q, kv, sink, entries = tensors(torch.Tensor.double, (q, kv, sink, entries))
    keys = torch.cat((kv[:, :, None], entries[:, None].expand(-1, 65, -1, -1)), 2)  # [B, T, 21, D]
    s = 6**-0.5 * q @ keys.transpose(2, 3)
    m = torch.maximum(s.amax(-1), sink)[..., None]
    p = (s - m).exp()
    denominator = p.sum(-1, keepdim=True) + (sink[:, None] - m).exp()
    o = p.bfloat16().double() @ keys / denominator
    assert (ops.sparse_attn.reference(*args) == o.bfloat16()).double().mean() > 0.99


@pytest.mark.kernels
def test_bf16_gradients_of_popular_entries_add_up_in_fp32():
    T = 200 if INTERPRETING else 1500
    case = case_of(sparse_attn, 1, T, 8, "idx", 2, 4, 3, 2)
    args = low(case)
    expected = run(spec_sparse_attn, case, tensors(torch.Tensor.double, args))[1][-1]
    for form in (ops.sparse_attn.reference, ops.sparse_attn.opaque):
        close(run(form, case, args)[1][-1], expected, 6e-3)


@pytest.mark.kernels
@pytest.mark.parametrize("case", [case for case in FEW if case.op == "sparse_attn"], ids=str)
def test_the_second_output_is_the_log_of_the_denominator(case):
    args = case.args()
    _, expected = attention(*tensors(torch.Tensor.double, args))
    op, _ = record(case).calls[0]
    lse = op(*with_gradients(case, args))[1]
    assert lse.dtype == torch.float32 and not lse.requires_grad
    close(lse, expected, 1e-6)


@pytest.mark.kernels
@pytest.mark.parametrize("form", ["reference", "opaque", "called"])
def test_attention_hands_over_its_lse_when_asked(form):
    case = case_of(sparse_attn, 2, 5, 8, "idx")
    args, op = case.args(), ops.sparse_attn if form == "called" else getattr(ops.sparse_attn, form)
    o, lse = op(*args, True)
    assert torch.equal(o, op(*args)) and torch.equal(o, op(*args, False))
    close(lse, attention(*tensors(torch.Tensor.double, args))[1], 1e-6)
    o, lse = op(*with_gradients(case, args), True)
    assert o.requires_grad and not lse.requires_grad


@pytest.mark.parametrize("kind", ["dense", "idx"])
def test_ranges_that_reach_beyond_the_entries_end_with_them(kind):
    case = case_of(sparse_attn, 2, 5, 8, kind)
    args = list(case.args())
    build_cpp("sparse_attn", "sparse_attn_backward")
    expected, E = run(ops.sparse_attn.opaque, case, args), args[6].shape[1]
    args[7], args[8] = args[7] - 3 * (args[7] == 0), args[8] + 4 * (args[8] == E)
    same(run(ops.sparse_attn.opaque, case, args), expected, 1e-7)
