"""Recipes for changing the model: patches of under 30 lines that apply and keep the contracts.

A patch is applied to a copy of the repository. A process there imports this file again, with the
patched model, and runs `check`.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model as M
from model import ModelArgs, Transformer
from testing import random_model, random_tokens, rms
from tools.capture import MODEL_OPS, capture, faults, name_of
from training.losses import training_loss

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "tests" / "model" / "recipes"
LEFT_OUT = ("assets", "bench")
OPAQUE = {name: "opaque" for name in MODEL_OPS}
# Decode passes ends of windows of 4, 8 and 128, and entry 16 (index_topk) of ratio 8.
LENGTH = 150
PREFILLED = 118
pytestmark = pytest.mark.compile


# --------------------------------------------------------------------------------------------------
# In the patched copy


def tokens_of(length: int = LENGTH) -> torch.Tensor:
    return random_tokens(2, length, seed=length)


def loss_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return training_loss(model, tokens, tokens.roll(-1, 1))[0]


def calls(captured) -> collections.Counter:
    """How often each of our ops is a node."""
    names = (name_of(node.target) for node in captured.calls())
    return collections.Counter(
        name.removeprefix("dsv4.") for name in names if name.startswith("dsv4.")
    )


def outputs(modules, run) -> tuple:
    """The result of run(), and the outputs of the modules meanwhile."""
    kept = []

    def keep(module, inputs, output):
        kept.append(output[0] if isinstance(output, tuple) else output)  # without AuxOutputs

    handles = [module.register_forward_hook(keep) for module in modules]
    result = run()
    for handle in handles:
        handle.remove()
    return result, kept


def reach(output: torch.Tensor, x: torch.Tensor) -> list[int]:
    """The tokens of row 0 of x [B, T, d] that a part of the output depends on."""
    (g,) = torch.autograd.grad(output.square().sum(), x, retain_graph=True)
    return g[0].abs().sum(-1).nonzero().flatten().tolist()


def check(recipe: str) -> None:
    """The contracts that every recipe keeps, then its own."""
    assert Path(M.__file__).parent == Path.cwd()
    model = random_model(ops=OPAQUE)
    tokens = tokens_of()
    model.setup_caches(2, 256)

    decode = capture(lambda tokens, pos: model(tokens, pos), tokens[:, :1], torch.tensor([3, 130]))
    assert (decode.count, len(decode.graphs), decode.breaks) == (1, 1, 0) and faults(decode) == []
    train = capture(loss_of, model, tokens, grad=True)
    assert (train.count, len(train.graphs), train.breaks) == (1, 2, 0) and faults(train) == []
    for name, p in model.named_parameters():
        # A choice is discrete; any other parameter without a gradient is dead.
        if ".indexer." in name or not p.requires_grad:
            assert p.grad is None, name
        else:
            assert p.grad.isfinite().all() and p.grad.any(), name

    with torch.no_grad():
        expected = model(tokens)
        got = [model(tokens[:, :PREFILLED], torch.zeros(2, dtype=torch.int64))]
        got += [model(tokens[:, p : p + 1], torch.full((2,), p)) for p in range(PREFILLED, LENGTH)]
    assert rms(torch.cat(got, 1), expected) <= 1e-5
    EFFECTS[recipe](model, decode, train)


def new_compression_ratio(model, decode, train):
    """A layer of ratio 8 has an indexer; an entry pools its own window of 8 and the one before."""
    assert model.args.compress_ratios == (0, 8, 128, 4, 0) and calls(decode)["indexer_topk"] == 2
    attn = model.layers[1].attn
    assert attn.indexer.compressor.ratio == attn.compressor.ratio == 8
    x = torch.randn(2, LENGTH, model.args.dim).requires_grad_()
    entries = attn.compressor(x, model.prepare(tokens_of(), {8}, None, None, None)[1])
    assert reach(entries[0, 0], x) == list(range(8))
    assert reach(entries[0, 3], x) == list(range(16, 32))


def another_router(model, decode, train):
    """Experts weigh by softmax scores, normalised over the chosen ones; the bias only selects."""
    x = torch.randn(50, model.args.dim)
    tokens = tokens_of()[0, :50]
    K = model.args.n_activated_experts
    for block in (*model.layers, *model.mtp):
        gate = block.ffn.gate
        score = (x @ gate.weight.T).softmax(-1)
        if gate.tid2eid is not None:
            best = gate.tid2eid[tokens]
        else:
            best = (score + gate.bias).topk(K).indices
        chosen, weight, _ = gate(x, tokens)
        assert torch.equal(chosen.sort().values, best.sort().values)
        expected = score.gather(1, chosen)
        expected = expected / expected.sum(1, keepdim=True) * model.args.route_scale
        assert torch.allclose(weight, expected)


def expert_activation(model, decode, train):
    """Every form of the routed experts, and the shared one, is w2(gelu(w1 x) w3 x).

    A config.json says gelu; one that says silu is refused.
    """
    written = model.args.to_hf()
    assert written["hidden_act"] == "gelu"
    with pytest.raises(ValueError, match="hidden_act is 'silu', but this model has 'gelu'"):
        dataclasses.replace(model.args, hidden_act="silu")

    limit = model.args.swiglu_limit
    shared, experts = model.layers[2].ffn.shared_experts, model.layers[2].ffn.experts
    x = 3 * torch.randn(40, model.args.dim)

    def formula(x, w1, w3, w2):
        gate = torch.nn.functional.gelu((x @ w1.T).clamp(max=limit))
        return (gate * (x @ w3.T).clamp(-limit, limit)) @ w2.T

    expected = formula(x, shared.w1.weight, shared.w3.weight, shared.w2.weight)
    assert rms(shared(x), expected) <= 1e-6
    chosen = torch.arange(40)[:, None] % len(experts.w13)  # one expert a token
    weight = torch.full((40, 1), 0.7)
    rows = [formula(x[t], *experts.w13[e].chunk(2), experts.w2[e]) for t, (e,) in enumerate(chosen)]
    expected = 0.7 * torch.stack(rows)

    gradients = {}
    for mode in ("reference", "opaque", "cpu"):
        same = random_model(model.args, ops={"moe": mode})
        assert rms(same.layers[2].ffn.experts(x, chosen, weight), expected) <= 1e-6
        loss_of(same, tokens_of()).backward()
        gradients[mode] = {n: p.grad for n, p in same.named_parameters() if p.grad is not None}
    for mode in ("opaque", "cpu"):
        for name, g in gradients["reference"].items():
            assert (gradients[mode][name] - g).norm() <= 1e-4 * g.norm(), (mode, name)


def plain_residuals(model, decode, train):
    """The output of the layers is the sum of their input and of every sublayer's output."""
    assert not [name for name, _ in model.named_parameters() if "hc_" in name]
    assert not [name for name in calls(decode) + calls(train) if name.startswith("hc_")]
    tokens = tokens_of()
    terms = [model.embed]
    for layer in model.layers:
        terms += [layer.attn, layer.ffn]
    (_, hidden), parts = outputs(terms, lambda: model(tokens, return_hidden=True))
    assert len(parts) == 9 and hidden.shape == (2, LENGTH, model.args.dim)
    assert rms(hidden, sum(parts)) <= 1e-6

    block = model.mtp[0]
    terms = [block.e_proj, block.h_proj, block.attn, block.ffn]
    (_, mtp_hidden), parts = outputs(terms, lambda: model.mtp(hidden, tokens))
    assert len(parts) == 4 and rms(mtp_hidden, sum(parts)) <= 1e-6


def new_op(model, decode, train):
    """Every shared expert calls the op as one node; its gradients are those of the reference."""
    assert calls(decode)["silu_mul"] == 4
    assert calls(train)["silu_mul"] == calls(train)["silu_mul_backward"] == 5  # with MTP
    traced = random_model(model.args, ops=OPAQUE | {"silu_mul": "reference"})
    loss_of(traced, tokens_of()).backward()
    for (name, p), q in zip(model.named_parameters(), traced.parameters(), strict=True):
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name


def sliding_window_only(model, decode, train):
    """No compressor and no indexer, whatever the configuration says; attention has a window."""
    assert not [m for m in model.modules() if isinstance(m, (M.Compressor, M.Indexer))]
    compressing = {"compress", "compress_backward", "indexer_topk"}
    assert not (calls(decode) + calls(train)).keys() & compressing
    assert not any(ModelArgs.flash().compress_ratios + ModelArgs.pro().compress_ratios)
    W = model.args.window_size
    x = torch.randn(2, LENGTH, model.args.dim).requires_grad_()
    plan = model.prepare(tokens_of(), set(), None, None, None)[1]
    for layer in model.layers:
        y, _ = layer.attn(x, plan)
        assert reach(y[0, -1], x) == list(range(LENGTH - W, LENGTH))


EFFECTS = {
    effect.__name__: effect
    for effect in (
        new_compression_ratio,
        another_router,
        plain_residuals,
        expert_activation,
        new_op,
        sliding_window_only,
    )
}


# --------------------------------------------------------------------------------------------------
# Here


def copy_repository(target: Path) -> None:
    """All files that git knows or would add, else everything; without weights and measurements."""
    listed = None
    if shutil.which("git"):
        command = ["git", "ls-files", "-co", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed is None or listed.returncode:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "__pycache__", *LEFT_OUT))
        return
    left_out = tuple(f"{folder}/" for folder in LEFT_OUT)
    for name in listed.stdout.splitlines():
        if not name.startswith(left_out) and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def changed_lines(patch: str) -> int:
    lines = patch[patch.index("diff --git") :].splitlines()
    return sum(line[:1] in ("+", "-") and not line.startswith(("+++ ", "--- ")) for line in lines)


def patched(recipe: str, folder: Path) -> tuple[Path, dict]:
    """Apply a recipe to a copy of the repository -> the copy, and an environment for it."""
    copy = folder / "copy"
    copy_repository(copy)
    tool = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-i"]
    paths = (copy, copy / "tests", copy / "tests" / "model")
    env = os.environ | {
        "GIT_CEILING_DIRECTORIES": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    command = [*tool, str(RECIPES / f"{recipe}.patch")]
    applied = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr + applied.stdout
    return copy, env


NAMES = sorted({*EFFECTS, *(path.stem for path in RECIPES.glob("*"))})


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_applies_and_changes_under_30_lines(recipe, tmp_path):
    assert changed_lines((RECIPES / f"{recipe}.patch").read_text()) < 30
    patched(recipe, tmp_path)


@pytest.mark.parametrize("recipe", NAMES)
def test_a_recipe_keeps_the_contracts(recipe, tmp_path):
    """Full graphs, decode as in training, finite gradients, and the effect of the recipe."""
    copy, env = patched(recipe, tmp_path)
    script = f"import test_recipes; test_recipes.check({recipe!r})"
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
