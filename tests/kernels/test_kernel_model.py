"""Contracts of the whole model on kernels: every op opaque, it equals the model of references, in
one graph.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model import ModelArgs, Transformer
from ops.registry import LAUNCHERS
from ops.triton.sparse_attn import sparse_attn_forward
from testing import randomize, rms
from tools import capture
from training.losses import training_loss

FORWARD = {
    "hc_pre_mix",
    "hc_pre_finish",
    "hc_post_pre_mix",
    "hc_post_forward",
    "rope_rotate",
    "compress_forward",
    "indexer_topk_forward",
    "sparse_attn_forward",
    "moe_up",
    "moe_down",
}
BACKWARD = {
    "hc_pre_backward_tokens",
    "hc_pre_backward_streams",
    "hc_post_backward",
    "compress_backward",
    "sparse_attn_backward_q",
    "sparse_attn_backward_kv",
    "moe_act_backward",
    "moe_outer",
    "linear_cross_entropy_forward_kernel",
    "linear_cross_entropy_backward_kernel",
}

# Every layer kind within a few tokens: window 8, entries of 4 and 8 tokens, 4 of the entries
# chosen.
ARGS = dataclasses.replace(
    ModelArgs.debug(), window_size=8, compress_ratios=(0, 4, 8, 4, 0), index_topk=4, max_seq_len=64
)
T = 21


def models(args=ARGS, dtype=torch.float32):
    """The same weights behind references and behind kernels."""
    torch.manual_seed(1)
    reference = randomize(
        Transformer(args, ops={name: "reference" for name in capture.MODEL_OPS}), seed=1
    )
    opaque = Transformer(args, ops={name: "opaque" for name in capture.MODEL_OPS})
    opaque.load_state_dict(reference.state_dict())
    return reference.to(dtype), opaque.to(dtype)


def tokens(B=1, n=T):
    return torch.randint(2, ARGS.vocab_size, (B, n), generator=torch.Generator().manual_seed(0))


def run_in_pieces(model, x):
    """Logits of a prefill, a verify of three tokens and single tokens, at different positions."""
    model.setup_caches(len(x), 64)
    pos, out = torch.zeros(len(x), dtype=torch.int64), []
    for n in (13, 3, 1, 1):
        lengths = torch.tensor([n] + [max(1, n - 1)] * (len(x) - 1))
        rows = torch.stack([row[p : p + n] for row, p in zip(x, pos.tolist(), strict=True)])
        logits = model(rows, pos, lengths)
        out += [row[:n] for row, n in zip(logits, lengths.tolist(), strict=True)]
        pos = pos + lengths
    return torch.cat(out)


@torch.no_grad()
def test_inference_equals_that_of_references():
    reference, opaque = models()
    x = tokens(2)
    assert rms(run_in_pieces(opaque, x), run_in_pieces(reference, x)) <= 1e-5


@torch.no_grad()
def test_padding_may_reach_past_the_end_of_the_caches():
    reference, opaque = models()
    x, out = tokens(2, 45), []
    for model in (reference, opaque):
        model.setup_caches(2, 64)
        model(tokens(2, 50), torch.zeros(2, dtype=torch.int64), torch.tensor([50, 50]))
        out.append(model(x, torch.tensor([50, 1 << 20]), torch.tensor([10, 0]))[0, :10])
    assert rms(out[1], out[0]) <= 1e-5


def launched(monkeypatch) -> set[str]:
    """The names of all kernels that run from now on."""
    names, kind = set(), type(sparse_attn_forward)
    run = kind.run
    monkeypatch.setattr(
        kind, "run", lambda self, *args, **kw: names.add(self.fn.__name__) or run(self, *args, **kw)
    )
    return names


def test_every_op_that_a_gpu_may_run_has_kernels():
    assert set(LAUNCHERS) == {
        "act_quant",
        "compress",
        "compress_backward",
        "hc_post",
        "hc_post_backward",
        "hc_post_pre",
        "hc_post_pre_backward",
        "hc_pre",
        "hc_pre_backward",
        "indexer_topk",
        "linear_cross_entropy",
        "linear_cross_entropy_backward",
        "linear_fp32",
        "linear_fp32_backward",
        "moe",
        "moe_backward",
        "quant_linear",
        "quant_linear_backward",
        "rope",
        "rope_",
        "sinkhorn",
        "sinkhorn_backward",
        "sparse_attn",
        "sparse_attn_backward",
    }


def test_training_equals_that_of_references(monkeypatch):
    (reference, opaque), ran = models(), launched(monkeypatch)
    x, y = tokens(1, 20), tokens(1, 21)[:, 1:]
    docs = (torch.arange(20) >= 6).long()[None]
    losses = [training_loss(model, x, y, docs)[0] for model in (reference, opaque)]
    assert abs(losses[0] - losses[1]) <= 1e-5 * abs(losses[0])
    for loss in losses:
        loss.backward()
    compared = 0
    for (name, a), b in zip(reference.named_parameters(), opaque.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and a.grad.abs().max() > 1e-9:
            compared += 1
            assert (b.grad - a.grad).norm() <= 1e-4 * a.grad.norm() + 1e-7, name
    assert compared > 50 and ran >= FORWARD | BACKWARD, (FORWARD | BACKWARD) - ran


@torch.no_grad()
def test_bf16_is_no_worse_than_that_of_references():
    args = dataclasses.replace(
        ARGS, n_hash_layers=4, index_topk=64
    )  # nothing to choose: rounding flips no choice
    exact = models(args)[0](tokens(2))
    errors = [rms(model(tokens(2)).float(), exact) for model in models(args, torch.bfloat16)]
    assert errors[1] <= 1.25 * errors[0] + 1e-4, errors


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@torch.no_grad()
def test_one_graph_runs_the_kernels(phase, monkeypatch):
    model = models()[1]
    n = 9 if phase == "prefill" else 1
    model.setup_caches(1, 64)
    args = tokens(1, n), torch.tensor([0]), torch.tensor([n])
    expected = model(*args)
    model.reset_caches()
    torch._dynamo.reset()
    ran = launched(monkeypatch)
    compiled = torch.compile(
        lambda *a: model(*a), backend="aot_eager", fullgraph=True, dynamic=False
    )
    assert rms(compiled(*args), expected) <= 1e-5
    assert ran >= FORWARD, FORWARD - ran
