"""The training objectives: every gradient against fp64 (test_model_parity.py: against Transformers), router balance, the indexer's own loss, recomputation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_step as S
from compile_config import (
    KEPT,
    PRESETS,
    CompileConfig,
    CompileCount,
    compile_train_step,
    recomputed,
)
from model import Aux, ModelArgs, Transformer
from ops.router_balance import router_balance
from testing import randomize, rms, small
from tools.report import MODEL_OPS
from training.losses import LossWeights, make_targets, training_loss
from training.optim import Optimizer

ROUTERS, CHOSEN, DENSE = Aux(), Aux(index_loss=True), Aux(index_loss=True, dense=True)

T = 150


def batch(rows: int = 2, length: int = T, seed: int = 0, padding: int = 5):
    """Tokens, targets (some masked), packed documents with padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 256, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].masked_fill(torch.rand(rows, length, generator=generator) < 0.1, -1)
    docs = torch.zeros(rows, length, dtype=torch.int64)
    docs[0] = (torch.arange(length) >= 37).long() + (torch.arange(length) >= 120)
    docs[:, length - padding :] = -1
    return tokens[:, :-1].contiguous(), targets.masked_fill(docs < 0, -1), docs


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


class Double(TorchFunctionMode):
    """Within it nothing is fp32: what asks for it gets fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if function is torch.Tensor.float:
            return function.__self__.double() if not args else torch.Tensor.double(*args, **kwargs)
        return function(*args, **kwargs)


@pytest.mark.parametrize("aux", (ROUTERS, CHOSEN, DENSE), ids=("routers", "chosen", "dense"))
def test_every_gradient_equals_that_of_an_fp64_run(aux):
    """All losses, every parameter, packed documents; the references throughout, so that fp64 reaches everywhere."""
    reference = {name: "reference" for name in (*MODEL_OPS, "indexer_loss")}
    model = randomize(Transformer(ModelArgs.debug(), ops=reference), seed=1)
    exact = copy.deepcopy(model).double()
    for p in exact.parameters():
        assert p.dtype == torch.float64
    weights = LossWeights(balance=0.5, index=2.0)
    total, parts = training_loss(model, *batch(), weights, aux)
    got = gradients(model, total)
    with Double():
        exact_total, exact_parts = training_loss(exact, *batch(), weights, aux)
        assert exact_total.dtype == torch.float64
        expected = gradients(exact, exact_total)
    assert all(
        abs(float(parts[key] / exact_parts[key]) - 1) < 1e-5 for key in parts if key != "load"
    )
    assert torch.equal(parts["load"].double(), exact_parts["load"])
    wrong = {
        name: float((got[name] - g).norm() / g.norm())
        for name, g in expected.items()
        if not (got[name] - g).norm() <= 1e-4 * g.norm()
    }
    assert got.keys() == expected.keys() and not wrong, wrong
    reached = {name for name, g in expected.items() if g.norm() > 0}
    assert {name for name, p in model.named_parameters() if p.requires_grad} - reached == (
        {name for name in got.keys() ^ dict(model.named_parameters()).keys() if "indexer" in name}
        if aux == ROUTERS
        else set()
    )


def test_balance_is_one_where_all_is_even_and_counts_valid_tokens():
    """K E-fold at worst; of each row alone; padding has no part in it."""
    T, E, K = 12, 4, 2
    even = torch.stack([torch.arange(T) % E, (torch.arange(T) + 1) % E], -1)[None]
    flat = torch.ones(1, T, E)
    load, loss = router_balance(even, flat, None)
    assert torch.allclose(loss, torch.tensor(1.0)) and load.tolist() == [6] * E
    one = torch.zeros(1, T, K, dtype=torch.int64) + torch.arange(K)
    peaked = torch.zeros(1, T, E).index_fill(2, torch.arange(K), 1.0)
    assert torch.allclose(router_balance(one, peaked, None)[1], torch.tensor(E / K))
    both = router_balance(torch.cat([even, one]), torch.cat([flat, peaked]), None)[1]
    assert torch.allclose(both, torch.tensor(1 + E / K))
    chosen, score, valid = (
        torch.cat([even, one], 1),
        torch.cat([flat, peaked], 1),
        torch.arange(2 * T)[None] < T,
    )
    load, loss = router_balance(chosen, score, valid)
    assert torch.allclose(loss, torch.tensor(1.0)) and load.sum() == T * K


def test_loads_are_those_of_the_routers():
    model = randomize(Transformer(ModelArgs.debug()), seed=1)
    found = []
    for block in (*model.layers[2:], *model.mtp):
        block.ffn.gate.register_forward_hook(lambda module, inputs, output: found.append(output[0]))
    tokens, targets, _ = batch()
    load = training_loss(model, tokens, targets)[1]["load"]
    assert load.shape == (3, 8)
    for row, chosen in zip(load, found):
        assert torch.equal(row, torch.bincount(chosen.flatten(), minlength=8).float())


def test_the_indexers_objective_moves_the_indexers_alone():
    """Without the other losses only indexers get gradients, all of their parameters; and from the others they get none."""
    model = randomize(Transformer(ModelArgs.debug()), seed=1)
    nothing = dict(mtp=0.0, balance=0.0)
    for aux in (DENSE, CHOSEN):
        with_it, without = (
            gradients(
                model, training_loss(model, *batch(), LossWeights(index=index, **nothing), aux)[0]
            )
            for index in (1.0, 0.0)
        )
        differ = {name for name, g in with_it.items() if not torch.equal(g, without[name])}
        assert differ == {name for name, _ in model.named_parameters() if ".indexer." in name}
        assert all(without[name].norm() == 0 for name in differ)


def test_dense_warm_up_sees_every_entry_and_chosen_does_not():
    """index_topk = 16 of up to 37 entries: with "dense" the logits are those of a model that chooses them all."""
    model = randomize(Transformer(ModelArgs.debug()), seed=1).eval()
    wide = randomize(Transformer(small(index_topk=64)), seed=1).eval()
    tokens = batch()[0]
    with torch.no_grad():
        dense, chosen, expected = (
            model(tokens, aux=DENSE)[0],
            model(tokens, aux=CHOSEN)[0],
            wide(tokens),
        )
    assert (
        rms(dense, expected) <= 1e-5
        and rms(chosen, model(tokens)) <= 1e-6
        and rms(chosen, expected) > 1e-3
    )


def test_the_index_loss_leaves_padding_out():
    """A row cut where its padding begins costs as much, times the share of its length."""
    model = randomize(Transformer(ModelArgs.debug()), seed=1)
    tokens, targets, docs = batch(1, padding=50)
    with torch.no_grad():
        whole = training_loss(model, tokens, targets, docs, aux=DENSE)[1]["index_loss"]
        cut = training_loss(model, tokens[:, :100], targets[:, :100], docs[:, :100], aux=DENSE)[1][
            "index_loss"
        ]
    assert abs(float(whole / cut) - 100 / 150) < 1e-4 and cut > 0


def test_recall_rises_when_the_indexers_are_trained():
    """Dense warm-up of an untrained model on text: nothing but the indexers moves."""
    torch.manual_seed(0)
    model = Transformer(small(n_layers=2, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(4, 4)))
    ids = np.frombuffer((S.ROOT / "data" / "shakespeare.txt").read_bytes()[:200_000], np.uint8)
    before, frozen = (
        S.index_recall(model, ids, 256, 0),
        {n: p.detach().clone() for n, p in model.named_parameters() if "indexer" not in n},
    )
    for name, p in model.named_parameters():
        p.requires_grad_("indexer" in name)
    step = compile_train_step(model, Optimizer(model), CompileConfig(backend=None), aux=DENSE)
    rows = S.dataset.Rows(ids, 256, 0)
    for i in range(40):
        step(*rows(range(4 * i, 4 * i + 4)), torch.tensor(2e-3))
    after = S.index_recall(model, ids, 256, 0)
    assert 0.2 < before < 0.6 and after > before + 0.1, (before, after)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize(
    "region, how", ((None, "selective"), (None, "full"), ("layer", "selective"), ("model", "full"))
)
def test_recomputation_changes_memory_not_gradients(how, region):
    """Eager, whole and layer by layer: the same update, one graph per kind and no break, less kept for the backward."""
    torch._dynamo.reset()
    args = small(n_layers=1, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(4,))
    cfg, models, kept = CompileConfig(backend=region and "aot_eager", region=region), [], []
    for recompute in ("none", how):
        model = randomize(Transformer(args, ops={name: "opaque" for name in MODEL_OPS}), seed=1)
        step = compile_train_step(
            model, Optimizer(model, "adamw", eps=1e-3), cfg, recompute=recompute, aux=CHOSEN
        )
        count, saved = CompileCount(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (saved.append(t), t)[1], lambda t: t
        ):
            step(*batch(), torch.tensor(1e-2))
        assert count.breaks == 0 and (
            region is None or count.graphs == {"model": 3, "layer": 5}[region]
        )
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(
            sum(
                {
                    t.untyped_storage().data_ptr(): t.nbytes
                    for t in saved
                    if t.untyped_storage().data_ptr() not in own
                }.values()
            )
        )
        models.append(model)
    assert all(
        torch.allclose(p, q, atol=1e-6)
        for p, q in zip(models[0].parameters(), models[1].parameters())
    )
    assert kept[1] < {"selective": 0.6, "full": 0.3}[how] * kept[0], kept


@pytest.mark.parametrize(
    "forms", ({}, {name: "opaque" for name in MODEL_OPS}), ids=("CPU's own", "opaque")
)
@pytest.mark.parametrize("how, times", (("none", 1), ("selective", 1), ("full", 2)))
def test_selective_recomputation_runs_the_heavy_ops_once(how, times, forms):
    counts = dict.fromkeys(KEPT, 0)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.name().removeprefix("dsv4::")
            if name in counts:
                counts[name] += 1
            return op(*args, **(kwargs or {}))

    model = randomize(
        Transformer(
            small(n_layers=1, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(4,)), ops=forms
        ),
        seed=1,
    )
    step = compile_train_step(model, Optimizer(model, "adamw"), PRESETS["eager"], recompute=how)
    with Count():
        step(*batch(), torch.tensor(1e-2))
    assert counts["moe" if forms else "moe_train"] == times and all(
        n in (0, times) for n in counts.values()
    ), counts


def test_unknown_ways_are_refused():
    with pytest.raises(ValueError, match="recompute 'some'"):
        recomputed(lambda: None, "some")
    model = Transformer(ModelArgs.debug())
    with pytest.raises(ValueError, match="dense and recall need index_loss"):
        model(batch()[0], aux=Aux(dense=True))


def test_targets_are_counted():
    tokens, targets, docs = batch()
    goal = make_targets(tokens, targets, docs)
    assert goal.counts.tolist() == [int((targets >= 0).sum()), int((goal.mtp_labels >= 0).sum()), 2]
