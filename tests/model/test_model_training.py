"""The training objectives: gradients in fp64, router balance, the indexer's loss, recomputation.

Gradients against Transformers' are in test_model_parity.py.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_step as S
from compile_config import PRESETS, CompileConfig, compile_train_step
from model import Aux, ModelArgs, Transformer
from ops.router_balance import router_balance
from ops.swiglu import HAS_KERNELS
from testing import gradients, random_model, rms, small
from tools.capture import MODEL_OPS
from tools.compile_count import CompileCount
from training.flags import ROOT
from training.losses import LossWeights, make_targets, training_loss
from training.optim import Optimizer
from training.recompute import SAVED_OPS, checkpointed

ROUTERS = Aux()
CHOSEN = Aux(index_loss=True)
DENSE = Aux(index_loss=True, dense=True)
OPAQUE = {name: "opaque" for name in MODEL_OPS}
ONE_LAYER = small(n_layers=1, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(4,))
LENGTH = 150


def batch(rows: int = 2, length: int = LENGTH, seed: int = 0, padding: int = 5):
    """Tokens, targets (some masked), packed documents with padding at the end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 256, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].masked_fill(torch.rand(rows, length, generator=generator) < 0.1, -1)
    docs = torch.zeros(rows, length, dtype=torch.int64)
    docs[0] = (torch.arange(length) >= 37).long() + (torch.arange(length) >= 120)
    docs[:, length - padding :] = -1
    return tokens[:, :-1].contiguous(), targets.masked_fill(docs < 0, -1), docs


class Double(TorchFunctionMode):
    """Within it nothing is fp32: calls that ask for it get fp64."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args = tuple(self.widen(value) for value in args)
        kwargs = {key: self.widen(value) for key, value in (kwargs or {}).items()}
        if function is torch.Tensor.float:
            return function.__self__.double() if not args else torch.Tensor.double(*args, **kwargs)
        return function(*args, **kwargs)

    @staticmethod
    def widen(value):
        return torch.float64 if value is torch.float32 else value


@pytest.mark.parametrize("aux", (ROUTERS, CHOSEN, DENSE), ids=("routers", "chosen", "dense"))
def test_every_gradient_equals_that_of_an_fp64_run(aux):
    """All losses, every parameter, packed documents; references, so that all is fp64."""
    model = random_model(ops={name: "reference" for name in (*MODEL_OPS, "indexer_loss")})
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
    for key, part in parts.items():
        if key == "load":
            assert torch.equal(part.double(), exact_parts[key])
        else:
            assert abs(float(part / exact_parts[key]) - 1) < 1e-5, key

    assert got.keys() == expected.keys()
    for name, g in expected.items():
        assert (got[name] - g).norm() <= 1e-4 * g.norm(), name

    # Every parameter is reached, except indexers by losses that are not theirs.
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    unreached = trained - {name for name, g in expected.items() if g.norm() > 0}
    if aux == ROUTERS:
        assert unreached == {name for name in trained - got.keys() if "indexer" in name}
    else:
        assert not unreached


def test_balance_is_one_where_all_is_even_and_counts_valid_tokens():
    """K E-fold at worst; of each row alone; padding has no part in it."""
    T, E = 12, 4
    K = 2
    even = torch.stack([torch.arange(T) % E, (torch.arange(T) + 1) % E], -1)[None]
    flat = torch.ones(1, T, E)
    load, loss = router_balance(even, flat, None)
    assert torch.allclose(loss, torch.tensor(1.0)) and load.tolist() == [6] * E
    one = torch.zeros(1, T, K, dtype=torch.int64) + torch.arange(K)
    peaked = torch.zeros(1, T, E).index_fill(2, torch.arange(K), 1.0)
    assert torch.allclose(router_balance(one, peaked, None)[1], torch.tensor(E / K))
    both = router_balance(torch.cat([even, one]), torch.cat([flat, peaked]), None)[1]
    assert torch.allclose(both, torch.tensor(1 + E / K))
    chosen = torch.cat([even, one], 1)
    score = torch.cat([flat, peaked], 1)
    valid = torch.arange(2 * T)[None] < T
    load, loss = router_balance(chosen, score, valid)
    assert torch.allclose(loss, torch.tensor(1.0)) and load.sum() == T * K


def test_loads_are_those_of_the_routers():
    model = random_model()
    choices = []
    for block in (*model.layers[2:], *model.mtp):
        block.ffn.gate.register_forward_hook(lambda gate, inputs, output: choices.append(output[0]))
    tokens, targets, _ = batch()
    load = training_loss(model, tokens, targets)[1]["load"]
    assert load.shape == (3, 8)
    for row, chosen in zip(load, choices, strict=True):
        assert torch.equal(row, torch.bincount(chosen.flatten(), minlength=8).float())


def test_the_indexers_objective_moves_the_indexers_alone():
    """It reaches all parameters of indexers and no others; other losses reach no indexer."""
    model = random_model()

    def gradients_with(index: float, aux: Aux):
        weights = LossWeights(mtp=0.0, balance=0.0, index=index)
        return gradients(model, training_loss(model, *batch(), weights, aux)[0])

    for aux in (DENSE, CHOSEN):
        without = gradients_with(0.0, aux)
        differ = set()
        for name, g in gradients_with(1.0, aux).items():
            if not torch.equal(g, without[name]):
                differ.add(name)
        assert differ == {name for name, _ in model.named_parameters() if ".indexer." in name}
        assert all(without[name].norm() == 0 for name in differ)


def test_dense_warm_up_sees_every_entry_and_chosen_does_not():
    """index_topk = 16 of up to 37 entries: dense logits are those of a model that takes all."""
    model = random_model().eval()
    wide = random_model(small(index_topk=64)).eval()
    tokens = batch()[0]
    with torch.no_grad():
        dense = model(tokens, aux=DENSE)[0]
        chosen = model(tokens, aux=CHOSEN)[0]
        expected = wide(tokens)
        assert rms(dense, expected) <= 1e-5
        assert rms(chosen, model(tokens)) <= 1e-6
        assert rms(chosen, expected) > 1e-3


def test_the_index_loss_leaves_padding_out():
    """A row cut where its padding begins costs as much, times the share of its length."""
    model = random_model()
    padded = batch(1, padding=50)
    with torch.no_grad():
        whole = training_loss(model, *padded, aux=DENSE)[1]["index_loss"]
        cut = training_loss(model, *(t[:, :100] for t in padded), aux=DENSE)[1]["index_loss"]
    assert abs(float(whole / cut) - 100 / 150) < 1e-4 and cut > 0


def test_recall_rises_when_the_indexers_are_trained():
    """Dense warm-up of an untrained model on text: nothing but the indexers moves."""
    torch.manual_seed(0)
    model = Transformer(small(n_layers=2, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(4, 4)))
    ids = np.frombuffer((ROOT / "data" / "shakespeare.txt").read_bytes()[:200_000], np.uint8)
    before = S.index_recall(model, ids, 256, 0)
    frozen = {}
    for name, p in model.named_parameters():
        p.requires_grad_("indexer" in name)
        if not p.requires_grad:
            frozen[name] = p.detach().clone()
    step = compile_train_step(model, Optimizer(model), CompileConfig(backend=None), aux=DENSE)
    rows = S.dataset.Rows(ids, 256, 0)
    for i in range(40):
        step(*rows(range(4 * i, 4 * i + 4)), torch.tensor(2e-3))
    after = S.index_recall(model, ids, 256, 0)
    assert 0.2 < before < 0.6 and after > before + 0.1, (before, after)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in frozen.items())


def saved_bytes(model, run) -> int:
    """Bytes that run() keeps for the backward, without parameters."""
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {t.untyped_storage().data_ptr(): t.nbytes for t in saved}
    return sum(size for storage, size in sizes.items() if storage not in parameters)


@pytest.mark.parametrize(
    "region, recompute",
    ((None, "selective"), (None, "full"), ("layer", "selective"), ("model", "full")),
)
def test_recomputation_changes_memory_not_gradients(recompute, region):
    """Eager, whole and layer by layer: the same update, no break, less kept for the backward."""
    torch._dynamo.reset()
    cfg = CompileConfig(backend=region and "aot_eager", region=region)

    def update(recompute: str):
        model = random_model(ONE_LAYER, ops=OPAQUE)
        optimizer = Optimizer(model, "adamw", eps=1e-3)
        step = compile_train_step(model, optimizer, cfg, recompute=recompute, aux=CHOSEN)
        count = CompileCount()
        kept = saved_bytes(model, lambda: step(*batch(), torch.tensor(1e-2)))
        assert count.breaks == 0
        assert region is None or count.graphs == {"model": 3, "layer": 5}[region]
        return model, kept

    plain, plain_bytes = update("none")
    model, kept_bytes = update(recompute)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)
    assert kept_bytes < {"selective": 0.6, "full": 0.3}[recompute] * plain_bytes


@pytest.mark.parametrize("forms", ({}, OPAQUE), ids=("CPU's own", "opaque"))
@pytest.mark.parametrize("recompute, times", (("none", 1), ("selective", 1), ("full", 2)))
def test_selective_recomputation_runs_the_heavy_ops_once(recompute, times, forms):
    counts = dict.fromkeys(SAVED_OPS, 0)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.name().removeprefix("dsv4::")
            if name in counts:
                counts[name] += 1
            return op(*args, **(kwargs or {}))

    model = random_model(ONE_LAYER, ops=forms)
    optimizer = Optimizer(model, "adamw")
    step = compile_train_step(model, optimizer, PRESETS["eager"], recompute=recompute)
    with Count():
        step(*batch(), torch.tensor(1e-2))
    if forms or HAS_KERNELS:  # else the reference of moe runs, which is many operators
        assert counts["moe"] == times
    assert all(n in (0, times) for n in counts.values()), counts


def test_unknown_recomputation_and_outputs_are_refused():
    with pytest.raises(ValueError, match="recompute 'some'"):
        checkpointed(lambda: None, "some")
    model = Transformer(ModelArgs.debug())
    with pytest.raises(ValueError, match="dense and recall need index_loss"):
        model(batch()[0], aux=Aux(dense=True))


def test_targets_are_shifted_and_counted():
    """The MTP block's stay within their document and row, and skip ignored labels."""
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8]])
    labels = torch.tensor([[4, -1, 6, -1, 8, 9]])
    docs = torch.tensor([[0, 0, 1, 1, 1, 1]])
    targets = make_targets(tokens, labels, docs)
    assert targets.mtp_labels.tolist() == [[-1, -1, -1, 8, 9, -1]]
    assert targets.mtp_inputs.tolist() == [[4, 5, 6, 7, 8, 9]]
    assert targets.counts.tolist() == [4, 2, 1]


@torch.no_grad()
def test_losses_are_means_over_their_own_labels():
    """By the whole logits: of the model on each label, of the MTP block on each of its own."""
    model = random_model()
    tokens, labels, docs = batch()
    targets = make_targets(tokens, labels, docs)
    parts = training_loss(model, tokens, targets, docs)[1]
    logits, hidden = model(tokens, doc_ids=docs, return_hidden=True)
    mtp_logits, _ = model.mtp(hidden, targets.mtp_inputs, doc_ids=docs)
    expected = {"loss": (logits, labels), "mtp_loss": (mtp_logits, targets.mtp_labels)}
    for name, (y, wanted) in expected.items():
        mean = F.cross_entropy(y.flatten(0, 1), wanted.flatten(), ignore_index=-1)
        assert abs(float(parts[name] / mean) - 1) < 1e-5, name


@torch.no_grad()
def test_the_loss_is_the_weighted_sum_of_its_parts():
    inputs = batch()[:2]
    total, parts = training_loss(
        random_model(), *inputs, weights=LossWeights(mtp=0.5, balance=0.01)
    )
    expected = parts["loss"] + 0.5 * parts["mtp_loss"] + 0.01 * parts["balance"]
    assert abs(float(total / expected) - 1) < 1e-6
    alone = random_model(small(n_mtp_layers=0, compress_ratios=(0, 4, 128, 4)))
    total, parts = training_loss(alone, *inputs, weights=LossWeights(balance=0.0))
    assert "mtp_loss" not in parts and total == parts["loss"]
