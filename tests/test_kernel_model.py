"""Contracts of the whole model on kernels: every op opaque, it equals the model of references, in one graph."""
from __future__ import annotations

import dataclasses

import pytest
import torch

import report
from model import ModelArgs, Transformer, training_loss
from oracle import randomize, rms

# Every layer kind within a few tokens: window 8, entries of 4 and 8 tokens, 4 of the entries chosen.
ARGS = dataclasses.replace(ModelArgs.debug(), window_size=8, compress_ratios=(0, 4, 8, 4, 0), index_topk=4, max_seq_len=64)
T = 21


def models(args=ARGS, dtype=torch.float32):
    """The same weights behind references and behind kernels."""
    torch.manual_seed(1)
    reference = randomize(Transformer(args, ops={name: "reference" for name in report.MODEL_OPS}), seed=1)
    opaque = Transformer(args, ops={name: "opaque" for name in report.MODEL_OPS})
    opaque.load_state_dict(reference.state_dict())
    return reference.to(dtype), opaque.to(dtype)


def tokens(B=1, n=T):
    return torch.randint(2, ARGS.vocab_size, (B, n), generator=torch.Generator().manual_seed(0))


def run_in_pieces(model, x):
    """Logits of a prefill, a verify of three tokens and single tokens, rows at different positions."""
    model.setup_caches(len(x), 64)
    pos, out = torch.zeros(len(x), dtype=torch.int64), []
    for n in (13, 3, 1, 1):
        lengths = torch.tensor([n] + [max(1, n - 1)] * (len(x) - 1))
        rows = torch.stack([row[p : p + n] for row, p in zip(x, pos.tolist())])
        logits = model(rows, pos, lengths)
        out += [row[:n] for row, n in zip(logits, lengths.tolist())]
        pos = pos + lengths
    return torch.cat(out)


@torch.no_grad()
def test_inference_equals_that_of_references():
    reference, opaque = models()
    x = tokens(2)
    assert rms(run_in_pieces(opaque, x), run_in_pieces(reference, x)) <= 1e-5


def test_training_equals_that_of_references():
    reference, opaque = models()
    x, y = tokens(1, 15), tokens(1, 16)[:, 1:]
    docs = (torch.arange(15) >= 6).long()[None]
    losses = [training_loss(model, x, y, docs)[0] for model in (reference, opaque)]
    assert abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0])
    for loss in losses:
        loss.backward()
    compared = 0
    for (name, a), b in zip(reference.named_parameters(), opaque.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and a.grad.abs().max() > 1e-9:
            compared += 1
            assert (b.grad - a.grad).norm() <= 1e-4 * a.grad.norm() + 1e-7, name
    assert compared > 50


@torch.no_grad()
def test_bf16_is_no_worse_than_that_of_references():
    args = dataclasses.replace(ARGS, n_hash_layers=4, index_topk=64)  # nothing to choose: rounding flips no choice
    exact = models(args)[0](tokens(2))
    errors = [rms(model(tokens(2)).float(), exact) for model in models(args, torch.bfloat16)]
    assert errors[1] <= 1.25 * errors[0] + 1e-4, errors


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@torch.no_grad()
def test_one_graph_runs_the_kernels(phase):
    model = models()[1]
    n = 9 if phase == "prefill" else 1
    model.setup_caches(1, 64)
    args = tokens(1, n), torch.tensor([0]), torch.tensor([n])
    expected = model(*args)
    model.reset_caches()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: model(*a), backend="aot_eager", fullgraph=True, dynamic=False)
    assert rms(compiled(*args), expected) <= 1e-5
