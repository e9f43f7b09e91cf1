"""Contracts of train_step.py: data, optimizer, a loop that learns and resumes, and the command line."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import train_step as S
from compile_config import PRESETS, CompileConfig, CompileCount, compile_train_step
from model import ModelArgs, Transformer
from oracle import randomize
from tokenizer import load_tokenizer

TEXT = (S.ROOT / "data" / "shakespeare.txt").read_text()


def test_the_held_out_tail_is_never_trained_on():
    trained, held_out = S.split(TEXT)
    assert trained + held_out == TEXT and 0.049 < len(held_out) / len(TEXT) < 0.051 and trained.endswith("\n")


def test_the_vocabulary_round_trips_and_documents_begin_with_bos(tmp_path):
    text = TEXT[:60_000] + "\n\n\n\n\nA second document, with \ttabs  and  spaces.\n"
    S.train_tokenizer(text, tmp_path, 512)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 512 and tokenizer.bos_id == 0 and tokenizer.eos_id == 1
    ids = S.tokenize(text, tokenizer.encode)
    assert (ids == 0).sum() == 2 and ids[0] == 0
    last = ids[np.flatnonzero(ids == 0)[-1] + 1 :]
    assert tokenizer.decode(last.tolist()) == "A second document, with \ttabs  and  spaces.\n"


def test_rows_depend_on_seed_and_step_alone_and_targets_follow():
    ids = np.arange(5, 505, dtype=np.uint32)
    ids[::50] = 0
    tokens, targets, docs = S.rows(ids, 3, 4, 120, seed=1, bos=0)
    again, other, seeded = (S.rows(ids, *key, bos=0)[0] for key in ((3, 4, 120, 1), (4, 4, 120, 1), (3, 4, 120, 2)))
    assert torch.equal(tokens, again) and not torch.equal(tokens, other) and not torch.equal(tokens, seeded)
    assert torch.equal(tokens[:, 1:], targets[:, :-1]) and tokens.shape == targets.shape == docs.shape == (4, 120)
    starts = tokens == 0
    assert torch.equal(docs.diff(dim=1) == 1, starts[:, 1:]) and (docs.diff(dim=1) >= 0).all() and starts.any()


@pytest.mark.parametrize("shape", ((3, 20, 50), (2, 64, 17), (1, 8, 8)))
def test_orthogonalize_brings_singular_values_to_one(shape):
    torch.manual_seed(0)
    m = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None, None]
    u = S.orthogonalize(m, torch.float32)
    values = torch.linalg.svdvals(u)
    assert u.shape == m.shape and (values - 1).abs().max() < 0.05
    left, _, right = torch.linalg.svd(m, full_matrices=False)
    assert (u - left @ right).norm() / u.norm() < 0.05


def grads(model):
    torch.manual_seed(5)
    for p in model.parameters():
        p.grad = torch.randn_like(p) if p.requires_grad else None


def test_muon_moves_matrices_and_adam_the_rest():
    """One step from zero moments: Muon moves by 0.18 lr sqrt(max(n, m)) times an orthogonal matrix, AdamW by lr sign(g)."""
    model = Transformer(ModelArgs.debug())
    S.count_load(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = S.Optimizer(model, decay=0.0)
    grads(model)
    grad = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step(torch.tensor(0.01))
    move = {name: (before[name] - p.detach()) / 0.01 for name, p in model.named_parameters()}
    for name in ("embed.weight", "head.weight", "norm.weight", "layers.1.attn.attn_sink", "layers.1.hc_attn_scale",
                 "layers.1.attn.compressor.ape"):
        assert torch.allclose(move[name], grad[name].sign(), atol=1e-3), name
    w13, wo_a = move["layers.0.ffn.experts.w13"], move["layers.0.attn.wo_a.weight"]
    E, I, d, g = 8, 32, 64, 2
    for blocks, size in ((w13.view(E, 2, I, d), d), (wo_a.view(g, -1, wo_a.shape[1]), max(wo_a.shape[0] // g, wo_a.shape[1])),
                         (move["layers.1.hc_ffn_fn"], 256), (move["layers.2.ffn.gate.weight"], 64)):
        values = torch.linalg.svdvals(blocks) / (0.18 * size**0.5)
        assert (values - 1).abs().max() < 0.2  # bf16 Newton-Schulz
    assert all(p.grad is None for p in model.parameters())


def test_router_biases_follow_the_load():
    """Experts that got more than their share are made less likely; counts include every token and are then cleared."""
    model = randomize(Transformer(ModelArgs.debug()), seed=1).train()
    S.count_load(model)
    optimizer = S.Optimizer(model)
    tokens = torch.randint(0, 256, (2, 60))
    model(tokens).sum().backward()
    gate = model.layers[2].ffn.gate
    load, before = gate.load.clone(), gate.bias.clone()
    assert load.sum() == 2 * 60 * 2 and not hasattr(model.layers[0].ffn.gate, "load")
    optimizer.step(torch.tensor(0.0))
    assert torch.allclose(gate.bias - before, 1e-3 * (load.mean() - load).sign()) and gate.load.sum() == 0
    model.eval()(tokens)
    assert gate.load.sum() == 0
    assert not any(name.endswith("load") for name in model.state_dict())


def test_low_precision_weights_have_fp32_masters():
    """Updates too small for bf16 add up."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Transformer(ModelArgs.debug())
    finally:
        torch.set_default_dtype(torch.float32)
    torch.nn.init.ones_(model.embed.weight)
    optimizer = S.Optimizer(model, decay=0.0)
    for _ in range(40):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(torch.tensor(1e-4))
    assert torch.allclose(model.embed.weight.float(), torch.tensor(1 - 40e-4), atol=4e-3) and model.embed.weight[0, 0] < 1
    assert torch.allclose(optimizer.state["embed.weight"]["master"], torch.tensor(1 - 40e-4), atol=1e-5)


def test_the_rate_warms_up_and_decays():
    rates = [S.learning_rate(i, 200, 1.0) for i in range(200)]
    assert rates[0] == 0.1 and rates[9] == 1 == rates[100] and abs(rates[150] - 0.55) < 0.02 and 0.1 <= rates[-1] < 0.101
    assert all(a >= b for a, b in zip(rates[10:], rates[11:]))


def learn(steps: int, state=None, stop=None):
    """Train the debug model on bytes; -> (model, losses). With `state`, go on from it; `stop` ends early."""
    torch.manual_seed(0)
    model = Transformer(ModelArgs.debug())
    S.count_load(model)
    optimizer, losses, first = S.Optimizer(model), [], 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    ids = S.tokenize(TEXT[:200_000], S.encode_bytes)
    saved = {}

    def after(i):
        if i == stop:
            saved.update(model={k: v.clone() for k, v in model.state_dict().items()}, step=i, optimizer={
                "count": optimizer.count.clone(),
                "state": {n: {k: v.clone() for k, v in s.items()} for n, s in optimizer.state.items()}})

    S.train(model, compile_train_step(model, optimizer, PRESETS["eager"]), ids, steps=steps, batch=2, length=96, lr=6e-3, seed=0, bos=0,
            first=first, every=1, after=after, log=lambda metrics: losses.append(metrics["loss"]))
    return model, losses, saved


def test_a_short_run_learns_and_resumes_to_the_bit():
    model, losses, saved = learn(24, stop=12)
    assert losses[0] > 5.4 and np.mean(losses[-4:]) < 3.3 and all(np.isfinite(losses))
    resumed, tail, _ = learn(24, state=saved)
    assert tail == losses[12:]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters()))


def test_held_out_loss_scores_every_token_of_whole_rows():
    model = randomize(Transformer(ModelArgs.debug()), seed=1)
    ids = np.random.default_rng(0).integers(2, 256, 5 * 33 + 9).astype(np.uint32)
    got = S.held_out_loss(model, ids, length=32, batch=2, bos=0)
    rows = torch.from_numpy(ids[: 5 * 33].astype(np.int64)).view(5, 33)
    expected = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert abs(got - expected.item()) < 1e-5 and model.training


def test_layers_compiled_for_training_do_not_meet_the_evaluation(capsys, monkeypatch, tmp_path):
    """With layers compiled, the run ends with an evaluation whose last batch is smaller: nothing is recompiled for it."""
    monkeypatch.setitem(S.PRESETS, "regional", CompileConfig(backend="eager", region="layer"))
    torch._dynamo.reset()
    count = CompileCount()
    assert S.main(["--steps", "3", "--batch", "4", "--seq-len", "32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held_out_loss"] > 0
    assert count.graphs == 5  # four kinds of layers and the MTP block


def test_the_command_line_trains_saves_and_reports(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:60_000])
    argv = ["--data", str(text), "--steps", "3", "--batch", "2", "--seq-len", "64", "--compile", "eager", "--out", str(tmp_path / "out"),
            "--experts", "fp4", "--linears", "fp8", "--state", str(tmp_path / "state.pt"), "--json"]
    assert S.main(argv) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["steps"] == 3 and report["tokens"] == 3 * 2 * 64 and 3 < report["held_out_nats_per_char"] < 7 and report["memory_bytes"] > 0
    from checkpoint import load
    assert load(tmp_path / "out", dtype=torch.float32).args.act_quant
    assert S.main([*argv[:3], "5", *argv[4:]]) == 0
    assert "going on from step 3" in capsys.readouterr().err


@pytest.mark.parametrize("argv, says", [
    (["--data", "/nowhere.txt"], "/nowhere.txt"),
    (["--data", "EMPTY"], "no text"),
    (["--data", "SHORT"], "--seq-len"),
    (["--steps", "0"], "--steps"),
    (["--lr", "-1"], "--lr"),
    (["--config", "/nowhere.json"], "/nowhere.json"),
    (["--compile", "cudagraphs"], "cudagraphs"),
    (["--steps", "many"], "--steps"),
    (["--seed", "-1"], "--seed"),
    (["--out", "/nowhere/at/all"], "--out"),
    (["--state", "SHORT", "--steps", "1"], "not the state"),
    (["--config", "tiny", "--data", "SMALL"], "vocabulary"),
])
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, argv, says):
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "SHORT").write_text("Too short.\n")
    (tmp_path / "SMALL").write_text("So few words. " * 300)
    argv = [str(tmp_path / a) if a in ("EMPTY", "SHORT", "SMALL") else a for a in argv]
    assert S.main(argv) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1 and says in captured.err and not captured.out
