"""Recipes for changing the model: each is a patch of under 30 lines that applies to this tree and keeps its contracts.

A patch is applied to a copy of the repository. A process there imports this file again, with the patched model, for `check`.
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model as M
from model import ModelArgs, Transformer
from testing import randomize, rms
from tools.report import MODEL_OPS, capture, faults, name_of
from training.losses import training_loss

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = ROOT / "tests" / "model" / "recipes"
LEFT_OUT = ("assets", "bench")
OPAQUE = {name: "opaque" for name in MODEL_OPS}
LENGTH, PREFILLED = (
    150,
    118,
)  # decode passes ends of windows of 4, 8 and 128, and past entry 16 (index_topk) of ratio 8
pytestmark = pytest.mark.compile


# ---------------------------------------------------------------------------------------------------------------------
# In the patched copy


def tokens_of(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(length))


def loss_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    return training_loss(model, tokens, tokens.roll(-1, 1))[0]


def calls(captured) -> collections.Counter:
    """How often each of our ops is a node."""
    names = (name_of(node.target) for node in captured.calls())
    return collections.Counter(
        name.removeprefix("dsv4.") for name in names if name.startswith("dsv4.")
    )


def outputs(modules, run) -> tuple:
    """What run() returns, and the outputs of the modules meanwhile."""
    kept = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output: kept.append(output))
        for module in modules
    ]
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
    model, tokens = randomize(Transformer(ModelArgs.debug(), ops=OPAQUE), seed=1), tokens_of()
    model.setup_caches(2, 256)

    decode = capture(lambda tokens, pos: model(tokens, pos), tokens[:, :1], torch.tensor([3, 130]))
    assert (decode.count, len(decode.graphs), decode.breaks) == (1, 1, 0) and faults(decode) == []
    train = capture(loss_of, model, tokens, grad=True)
    assert (train.count, len(train.graphs), train.breaks) == (1, 2, 0) and faults(train) == []
    for name, p in model.named_parameters():
        none = (
            ".indexer." in name or not p.requires_grad
        )  # a choice is discrete; any other parameter without a gradient is dead
        assert (p.grad is None) == none and (none or p.grad.isfinite().all() and p.grad.any()), name

    with torch.no_grad():
        expected = model(tokens)
        got = [model(tokens[:, :PREFILLED], torch.zeros(2, dtype=torch.int64))]
        got += [model(tokens[:, p : p + 1], torch.full((2,), p)) for p in range(PREFILLED, LENGTH)]
    assert rms(torch.cat(got, 1), expected) <= 1e-5
    EFFECTS[recipe](model, decode, train)


def new_compression_ratio(model, decode, train):
    """A layer of ratio 8 has an indexer, and an entry pools its own window of 8 and the one before."""
    assert model.args.compress_ratios == (0, 8, 128, 4, 0) and calls(decode)["indexer_topk"] == 2
    attn = model.layers[1].attn
    assert attn.indexer.compressor.ratio == attn.compressor.ratio == 8
    x = torch.randn(2, LENGTH, model.args.dim).requires_grad_()
    entries = attn.compressor(x, model.prepare(tokens_of(), {8}, None, None, None)[1])
    assert reach(entries[0, 0], x) == list(range(8)) and reach(entries[0, 3], x) == list(
        range(16, 32)
    )


def another_router(model, decode, train):
    """Experts weigh by their softmax scores, normalised over the chosen ones; the bias only selects."""
    x, tokens = torch.randn(50, model.args.dim), tokens_of()[0, :50]
    for block in (*model.layers, *model.mtp):
        gate, K = block.ffn.gate, model.args.n_activated_experts
        score = (x @ gate.weight.T).softmax(-1)
        best = (
            gate.tid2eid[tokens]
            if gate.tid2eid is not None
            else (score + gate.bias).topk(K).indices
        )
        chosen, weight, _ = gate(x, tokens)
        assert torch.equal(chosen.sort().values, best.sort().values)
        expected = score.gather(1, chosen)
        assert torch.allclose(
            weight, expected / expected.sum(1, keepdim=True) * model.args.route_scale
        )


def plain_residuals(model, decode, train):
    """What leaves the layers is the sum of what entered them and of every sublayer's output."""
    assert not [name for name, _ in model.named_parameters() if "hc_" in name]
    assert not [name for name in calls(decode) + calls(train) if name.startswith("hc_")]
    tokens, sublayers = (
        tokens_of(),
        [part for layer in model.layers for part in (layer.attn, layer.ffn)],
    )
    (_, hidden), parts = outputs(
        [model.embed, *sublayers], lambda: model(tokens, return_hidden=True)
    )
    assert (
        len(parts) == 9
        and hidden.shape == (2, LENGTH, model.args.dim)
        and rms(hidden, sum(parts)) <= 1e-6
    )
    block = model.mtp[0]
    (_, ahead), parts = outputs(
        [block.e_proj, block.h_proj, block.attn, block.ffn], lambda: model.mtp(hidden, tokens)
    )
    assert len(parts) == 4 and rms(ahead, sum(parts)) <= 1e-6


def new_op(model, decode, train):
    """Every shared expert calls the op as one node; its backward op computes the gradients of the traced reference."""
    assert (
        calls(decode)["swiglu"] == 4
        and calls(train)["swiglu"] == calls(train)["swiglu_backward"] == 5
    )  # with MTP
    traced = randomize(Transformer(model.args, ops=OPAQUE | {"swiglu": "reference"}), seed=1)
    loss_of(traced, tokens_of()).backward()
    for (name, p), q in zip(model.named_parameters(), traced.parameters()):
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name


def sliding_window_only(model, decode, train):
    """No compressor and no indexer is left; attention reaches W tokens back, whatever the configuration asks for."""
    assert not [
        name
        for name, module in model.named_modules()
        if isinstance(module, (M.Compressor, M.Indexer))
    ]
    assert not (calls(decode) + calls(train)).keys() & {
        "compress",
        "compress_backward",
        "indexer_topk",
    }
    assert not any(ModelArgs.flash().compress_ratios + ModelArgs.pro().compress_ratios)
    W, x = model.args.window_size, torch.randn(2, LENGTH, model.args.dim).requires_grad_()
    plan = model.prepare(tokens_of(), set(), None, None, None)[1]
    for layer in model.layers:
        assert reach(layer.attn(x, plan, {})[0, -1], x) == list(range(LENGTH - W, LENGTH))


EFFECTS = {
    effect.__name__: effect
    for effect in (
        new_compression_ratio,
        another_router,
        plain_residuals,
        new_op,
        sliding_window_only,
    )
}


# ---------------------------------------------------------------------------------------------------------------------
# Here


def copy_repository(target: Path) -> None:
    """What git knows or would add, else everything; without weights and measurements."""
    listed = shutil.which("git") and subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if not listed or listed.returncode:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "__pycache__", *LEFT_OUT))
        return
    for name in listed.stdout.splitlines():
        if (
            not name.startswith(tuple(f"{folder}/" for folder in LEFT_OUT))
            and (ROOT / name).is_file()
        ):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def changed_lines(patch: str) -> int:
    lines = patch[patch.index("diff --git") :].splitlines()
    return sum(line[:1] in ("+", "-") and not line.startswith(("+++ ", "--- ")) for line in lines)


@pytest.mark.parametrize("recipe", sorted({*EFFECTS, *(path.stem for path in RECIPES.glob("*"))}))
def test_recipe_applies_in_under_30_lines_and_keeps_the_contracts(recipe, tmp_path):
    """Full graphs, decode that equals the training forward, finite gradients, and the effect that the recipe is for."""
    patch, copy = RECIPES / f"{recipe}.patch", tmp_path / "copy"
    assert changed_lines(patch.read_text()) < 30
    copy_repository(copy)
    tool = ["git", "apply"] if shutil.which("git") else ["patch", "-p1", "-i"]
    env = os.environ | {
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, (copy, copy / "tests", copy / "tests" / "model"))),
    }
    applied = subprocess.run([*tool, str(patch)], cwd=copy, env=env, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr + applied.stdout
    script = f"import test_recipes; test_recipes.check({recipe!r})"
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
