"""What is special to indexer_loss and indexer_recall."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ops
from cases import Case, case_of, indexer_loss, sparse_attn
from contracts import entries_of, unit_queries, visible
from harness import Recorder, run, same, tensors

reference = case_of(indexer_loss).module
by_form = pytest.mark.parametrize(
    "form", [ops.indexer_loss.reference, ops.indexer_loss.opaque], ids=["reference", "opaque"]
)
by_kind = pytest.mark.parametrize("kind", ["dense", "idx"])


def losses(kind, *options) -> tuple[Case, list]:
    case = case_of(indexer_loss, 2, 7, 9, kind, *options)
    return case, list(case.args())


# --------------------------------------------------------------------------------------------------
# The loss


@by_form
@by_kind
def test_an_index_that_tells_the_attention_s_choice_costs_nothing(form, kind):
    """The target is the share of entries in the softmax of sparse_attn, averaged over heads."""
    torch.manual_seed(0)
    B, T = 2, 7
    E = 9
    args = sparse_attn(B, T, 5, kind)
    q, kv, sink, window_len, cos, sin, entries, lo, hi, idx, eps = args
    hi[:, 3] = lo[:, 3]  # these see no entry
    lse, share = ops.sparse_attn(*args, True)[1], torch.zeros(B, T, E)
    unit = unit_queries(q, cos, sin, eps)
    for b, t in itertools.product(range(B), range(T)):
        window, chosen = visible(args, b, t)
        keys = torch.cat((kv[b, window], entries[b, chosen]))
        score = unit[b, t] @ keys.T * q.shape[3] ** -0.5
        p = torch.cat((score, sink[:, None]), 1).softmax(1)
        share[b, t, chosen] = p[:, len(window) : -1].mean(0)
    some = share.sum(-1) > 0
    assert some.any() and not some.all() and (share.sum(-1) < 0.99).all()

    # Index scores that tell: positive, as relu wants them; softmax does not mind
    told = (share.clamp(min=1e-9).log() + 30).requires_grad_()
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
        assert g.isfinite().all()
        assert not g[:, 1::2].any() and not g[:, 0].any() and g[:, 2::2].any()
    args[9], args[10] = args[8], args[10] if kind == "dense" else torch.full_like(args[10], -1)
    (loss,), grads = run(form, case, tuple(args))
    assert not loss.any() and not any(g.any() for g in grads)


@by_form
@by_kind
def test_entries_that_are_hidden_teach_nothing(form, kind):
    """Nobody sees 0, 1, 7 and 8: their values do not matter."""
    case, args = losses(kind)
    hidden = [0, 1, 7, 8]
    args[8], args[9] = args[8].clamp(min=2), args[9].clamp(max=7)
    if kind == "idx":
        args[10] = torch.where((args[10] < 2) | (args[10] > 6), -1, args[10])
    results = []
    for value in (0.0, 1e4):
        for i in (3, 6):
            args[i][:, hidden] = value
        results.append(run(form, case, tuple(args)))
    same(results[1], results[0], 0.0)
    _, (_, g_ki, _) = results[1]
    assert not g_ki[:, hidden].any() and g_ki[:, 2:7].any()


@by_form
def test_all_entries_chosen_is_the_dense_loss(form):
    case, args = losses("dense")
    e = torch.arange(9).expand(2, 7, 9)
    chosen = torch.where((e >= args[8][..., None]) & (e < args[9][..., None]), e, -1)
    sparse = run(form, case, (*args[:10], chosen.flip(-1), args[11]))
    same(sparse, run(form, case, tuple(args)), 1e-6)


@by_form
@by_kind
def test_only_the_indexer_learns(form, kind):
    _, args = losses(kind)
    floating = {i: args[i].requires_grad_() for i in (0, 3, 4, 5, 6, 7)}
    form(*args).sum().backward()
    assert [i for i, leaf in floating.items() if leaf.grad is not None] == [5, 6, 7]


@by_form
def test_heads_that_all_but_ignore_the_entries_still_teach(form):
    """Their probabilities underflow; how they compare does not."""
    case, args = losses("dense")
    expected = run(form, case, tuple(args))
    args[4] = args[4] + 512
    same(run(form, case, tuple(args)), expected, 1e-4)
    args[4][:, :, 0] += 512  # one that ignores them more has no say
    got = run(form, case, tuple(args))
    args[0], args[4] = args[0][:, :, 1:], args[4][:, :, 1:]
    same(got, run(form, case, tuple(args)), 1e-4)


@by_kind
def test_the_loss_at_production_size_reads_nothing_back_and_holds_a_chunk(kind):
    """Flash, 1024 tokens of 8192, on fake tensors: a host read raises; scores are bounded."""
    T, H = 1024, 64
    D, E = 512, 2048
    Hi, Di = 64, 128
    K = 512
    with FakeTensorMode(), Recorder() as recorder:

        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(1, *shape, dtype=dtype, device="cpu")

        angle, span = empty(T, 32, dtype=torch.float32), empty(T, dtype=torch.int64)
        main = empty(T, H, D), angle, angle, empty(E, D), empty(T, H, dtype=torch.float32)
        index = empty(T, Hi, Di), empty(E, Di), empty(T, Hi), span, span
        idx = empty(T, K, dtype=torch.int64) if kind == "idx" else None
        loss = reference.forward_reference(*main, *index, idx, 1e-6)
        reference.backward_reference(loss, *main, *index, idx, 1e-6)
        if kind == "dense":
            ops.indexer_recall(*main, *index, K, 1e-6)
    assert loss.shape == (1, T)
    assert recorder.largest == T * H * D < T * H * E  # the queries, an argument


# --------------------------------------------------------------------------------------------------
# Recall


def test_recall_counts_what_the_indexer_finds():
    args, topk = losses("dense")[1], 3
    found, mass = ops.indexer_recall(*args[:10], topk, args[11])
    q, cos, sin, entries, lse, qi, ki, u, lo, hi, _, eps = tensors(torch.Tensor.double, args)
    q = unit_queries(q, cos, sin, eps)
    for b, t in itertools.product(range(2), range(7)):
        seen = entries_of(lo, hi, None, b, t)
        P = (q.shape[3] ** -0.5 * q[b, t] @ entries[b, seen].T - lse[b, t, :, None]).exp().sum(0)
        index_scores = u[b, t] @ (qi[b, t] @ ki[b, seen].T).relu()
        best = set(P.topk(min(topk, len(seen))).indices.tolist())
        chosen = set(index_scores.topk(min(topk, len(seen))).indices.tolist())
        expected_recall = len(best & chosen) / len(best) if best else 1
        expected_mass = float(P[list(chosen)].sum() / P.sum()) if chosen else 1
        assert found[b, t] == pytest.approx(expected_recall)
        assert mass[b, t] == pytest.approx(expected_mass, abs=1e-5)
    few = args[9] - args[8] <= topk
    assert few.any() and (found[few] == 1).all() and (mass[few] > 0.9999).all()
    assert 0 < found[~few].mean() < 1
    for everything in (9, 100):
        assert all((x > 0.9999).all() for x in ops.indexer_recall(*args[:10], everything, args[11]))


def test_recall_is_worked_off_in_chunks(monkeypatch):
    args = losses("dense")[1]
    expected = ops.indexer_recall(*args[:10], 3, args[11])
    monkeypatch.setattr(reference, "CHUNK", 100)
    same((expected, ()), (ops.indexer_recall(*args[:10], 3, args[11]), ()), 1e-6)


@by_kind
def test_an_indexer_learns_what_the_attention_looks_at(kind):
    """Linear maps of the factors of queries and entries: recall rises from chance, 8 of 64.

    "idx" is the recipe: half of the steps dense, then only the 16 entries that the indexer chooses.
    """
    torch.manual_seed(0)
    B, T = 2, 32
    E, H = 64, 2
    D, Hi = 16, 16
    Di, d = 8, 8
    normal = torch.randn
    w_q, w_k = normal(d, H * D), normal(d, D) * 2 * d**-0.5
    maps = [(0.3 * normal(d, width)).requires_grad_() for width in (Hi * Di, Di, Hi)]
    optimizer = torch.optim.AdamW(maps, lr=3e-2)
    nothing, everything = torch.zeros(B, T, dtype=torch.int64), torch.full((B, T), E)
    straight = torch.ones(B, T, 2), torch.zeros(B, T, 2)  # no rotation

    def batch():
        x, c = torch.cat((normal(B, T, d - 1), torch.ones(B, T, 1)), -1), normal(B, E, d)
        q, entries = (x @ w_q).unflatten(-1, (H, D)), c @ w_k
        window = normal(B, 3 + T, D), torch.zeros(H), nothing + 4
        given = entries, nothing, everything, None
        _, lse = ops.sparse_attn(q, *window, *straight, *given, 1e-6, True)
        qi = x @ maps[0]
        ki = c @ maps[1]
        u = x @ maps[2]
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
    assert 0.05 < found < 0.25 and found_then > 0.55
    assert mass_then > mass + 0.25 and costs[-1] < costs[0] / 5
