"""Contracts of optim.py: Muon, AdamW as torch's, clipping, masters, router biases, compiling."""

from __future__ import annotations

import copy

import pytest
import torch

from compile_config import CompileConfig, compile_function
from model import Gate, ModelArgs, Transformer
from ops.muon import grad_norm, muon, orthogonalize
from testing import randomize, small
from tools.compile_count import CompileCount
from training.optim import Optimizer


@pytest.mark.parametrize("shape", ((3, 20, 50), (2, 64, 17), (1, 8, 8)))
def test_orthogonalize_brings_singular_values_to_one(shape):
    torch.manual_seed(0)
    m = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
    u = orthogonalize(m, torch.float32)
    values = torch.linalg.svdvals(u)
    assert u.shape == m.shape and (values - 1).abs().max() < 0.05
    left, _, right = torch.linalg.svd(m, full_matrices=False)
    assert (u - left @ right).norm() / u.norm() < 0.05


@pytest.mark.parametrize("dtype, stack", ((torch.float32, ()), (torch.bfloat16, (3,))))
def test_ops_pass_opcheck_and_mutate_what_they_say(dtype, stack):
    torch.manual_seed(0)
    p, g = torch.randn(*stack, 8, 6).to(dtype), torch.randn(*stack, 8, 6).to(dtype)
    master = None if dtype == torch.float32 else p.float()
    args = p, torch.zeros(p.shape), master, g, torch.tensor(0.5), torch.tensor(0.1), 2, 0.95, 0.1
    torch.library.opcheck(muon, args)
    before = p.clone()
    muon(*args)
    assert (
        not torch.equal(p, before)
        and torch.equal(args[1], g.float() * 0.5)
        and (master is None or torch.equal(master.to(dtype), p))
    )
    torch.library.opcheck(grad_norm, ([g, p, torch.ones(())],))
    assert torch.allclose(
        grad_norm([g, p]),
        torch.cat([g.flatten(), p.flatten()]).float().norm(),
        rtol=1e-2 if stack else 1e-6,
    )


def grads(model, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if p.requires_grad else None


def test_muon_moves_matrices_and_adam_the_rest():
    """From zero moments: Muon by 0.18 lr sqrt(max(n, m)) X, X orthogonal; AdamW by lr sign(g)."""
    model = Transformer(ModelArgs.debug())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, decay=0.0)
    grads(model)
    grad = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step(torch.tensor(0.01))
    move = {name: (before[name] - p.detach()) / 0.01 for name, p in model.named_parameters()}
    for name in (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "layers.1.attn.attn_sink",
        "layers.1.hc_attn_scale",
        "layers.1.attn.compressor.ape",
    ):
        assert torch.allclose(move[name], grad[name].sign(), atol=1e-3), name
    w13, wo_a = move["layers.0.ffn.experts.w13"], move["layers.0.attn.wo_a.weight"]
    E, I = 8, 32
    d, g = 64, 2
    for blocks, size in (
        (w13.view(E, 2, I, d), d),
        (wo_a.view(g, -1, wo_a.shape[1]), max(wo_a.shape[0] // g, wo_a.shape[1])),
        (move["layers.1.hc_ffn_fn"], 256),
        (move["layers.2.ffn.gate.weight"], 64),
    ):
        values = torch.linalg.svdvals(blocks) / (0.18 * size**0.5)
        assert (values - 1).abs().max() < 0.1
    assert all(p.grad is None for p in model.parameters())


def test_muon_follows_its_formula_over_three_steps():
    """Momentum in Nesterov's form, and decay: the formula of docs/v4.md#training written out."""
    model = Transformer(small(n_layers=1, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(0,)))
    optimizer, p = Optimizer(model), model.layers[0].attn.wkv.weight
    w, first = p.detach().double().clone(), torch.zeros_like(p, dtype=torch.float64)
    for i in range(3):
        grads(model, seed=i)
        g = p.grad.double()
        first = 0.95 * first + g
        u = orthogonalize(0.95 * first + g, torch.float64) * 0.18 * max(p.shape) ** 0.5
        w = w * (1 - 0.01 * 0.1) - 0.01 * u
        optimizer.step(torch.tensor(0.01))
    assert (p - w).norm() / w.norm() < 1e-5


def test_adam_equals_torch():
    model = randomize(Transformer(ModelArgs.debug()), seed=1)
    twin = copy.deepcopy(model)
    decayed, plain = (
        [p for p in twin.parameters() if p.requires_grad and (p.dim() > 1) == matrix]
        for matrix in (True, False)
    )
    theirs = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-20,
    )
    ours = Optimizer(model, "adamw")
    for i in range(4):
        grads(model, seed=i), grads(twin, seed=i)
        ours.step(torch.tensor(3e-3)), theirs.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6), name


def test_gradients_are_clipped_by_their_common_norm():
    """A step clips as if gradients had been scaled to the limit; smaller ones stay as they are."""
    models = [Transformer(ModelArgs.debug()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for limit, scales in ((2.0, True), (1e9, False)):
        norm = 0.0
        for model in models:
            grads(model)
            norm = torch.cat(
                [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            ).norm()
        if scales:
            for p in models[1].parameters():
                p.grad = None if p.grad is None else p.grad * 2.0 / norm
        optimizers = Optimizer(models[0], clip=limit), Optimizer(models[1])
        got = [optimizer.step(torch.tensor(1e-2)) for optimizer in optimizers]
        assert torch.allclose(got[0]["grad_norm"], norm)
        for key, moment in optimizers[0].state_dict().items():
            assert torch.allclose(moment, optimizers[1].state_dict()[key], rtol=1e-4, atol=1e-7), (
                key
            )


def test_low_precision_weights_have_fp32_masters():
    """Updates too small for bf16 add up."""
    model = Transformer(ModelArgs.debug()).bfloat16()
    torch.nn.init.ones_(model.embed.weight)
    optimizer = Optimizer(model, decay=0.0)
    for _ in range(40):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step(torch.tensor(1e-4))
    assert (
        torch.allclose(model.embed.weight.float(), torch.tensor(1 - 40e-4), atol=4e-3)
        and model.embed.weight[0, 0] < 1
    )
    assert torch.allclose(
        optimizer.state["embed.weight"]["master"], torch.tensor(1 - 40e-4), atol=1e-5
    )


def test_router_biases_follow_the_load():
    model = Transformer(ModelArgs.debug())
    optimizer = Optimizer(model)
    biases = [m.bias for m in model.modules() if isinstance(m, Gate) and m.bias is not None]
    before, load = [b.clone() for b in biases], torch.rand(len(biases), 8)
    grads(model)
    optimizer.step(torch.tensor(0.0), load)
    for bias, old, row in zip(biases, before, load, strict=True):
        assert torch.allclose(bias - old, 1e-3 * (row.mean() - row).sign())
    assert len(biases) == 3 and not any(name.endswith("gate.bias") for name in optimizer.state)


@pytest.mark.parametrize("kind", ("muon", "adamw"))
def test_router_biases_are_no_parameters_of_muon_or_adam(kind):
    """Not even if all of a model is made to require gradients: no tensor is updated twice."""
    model = Transformer(small()).requires_grad_(True)
    tensors = Optimizer(model, kind).tensors()
    assert len(set(tensors)) == len(tensors)


def test_frozen_and_unreached_parameters_stay():
    """What requires no gradient has no state; what got none keeps its value, also under decay."""
    model = randomize(Transformer(ModelArgs.debug()), seed=1)
    model.embed.weight.requires_grad_(False)
    optimizer = Optimizer(model)
    grads(model)
    p = model.layers[1].attn.indexer.wq_b.weight
    p.grad = None
    before = p.detach().clone()
    embed = model.embed.weight.clone()
    optimizer.step(torch.tensor(0.1))
    assert (
        torch.equal(p, before)
        and torch.equal(model.embed.weight, embed)
        and "embed.weight" not in optimizer.state
    )


def test_the_state_survives_a_round_trip_and_another_models_is_refused():
    model = randomize(Transformer(ModelArgs.debug()), seed=1).bfloat16()
    twin, optimizer = copy.deepcopy(model), Optimizer(model)
    grads(model)
    optimizer.step(torch.tensor(1e-2))
    other = Optimizer(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.load_state_dict(model.state_dict())
    grads(model, 7), grads(twin, 7)
    optimizer.step(torch.tensor(1e-2)), other.step(torch.tensor(1e-2))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="embed.weight.second|state differs"):
        Optimizer(model, "adamw").load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="sgd"):
        Optimizer(model, "sgd")


def test_compiled_updates_equal_eager_ones_and_compile_once():
    """All of a step is one graph; nothing compiles anew with the rate or the step."""
    torch._dynamo.reset()
    args = small(n_layers=2, n_hash_layers=1, n_mtp_layers=0, compress_ratios=(0, 4))
    models = [randomize(Transformer(args), seed=1).bfloat16() for _ in range(2)]
    optimizers, count = [Optimizer(model, clip=1.0) for model in models], CompileCount()
    optimizers[0].compile(
        lambda function, name: compile_function(function, name, CompileConfig(backend="aot_eager"))
    )
    for i in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            grads(model, seed=i)
            optimizer.step(
                torch.tensor(1e-2 / (i + 1)),
                torch.rand(1, 8, generator=torch.Generator().manual_seed(i)),
            )
        if i == 0:
            count.warm()
    assert (count.graphs, count.recompiles, count.breaks) == (1, 0, 0)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p - q).float().norm() <= 1e-3 * q.float().norm(), name
