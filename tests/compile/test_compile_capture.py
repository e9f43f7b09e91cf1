"""Every phase is one full graph without host syncs and symbolic integers, on every backend."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from model import ModelArgs, Transformer
from testing import cache_shapes, randomize, rms, small
from tools.capture import MODEL_OPS, capture, faults, name_of
from training.losses import training_loss
from training.optim import Optimizer

FORMS = {form: {name: form for name in MODEL_OPS} for form in ("reference", "opaque")}
CHUNK = 64
pytestmark = pytest.mark.compile


def build(form: str, act_quant: bool = False) -> Transformer:
    args = ModelArgs.debug()
    args.act_quant = act_quant
    model = randomize(Transformer(args, ops=FORMS[form]), seed=1)
    model.setup_caches(2, 512)
    return model


def tokens_of(T: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, T), generator=torch.Generator().manual_seed(T))


POS, LENGTHS = torch.tensor([3, 130]), torch.tensor([CHUNK, 17])
ONE, TWO, FOUR, MANY = (tokens_of(T) for T in (1, 2, 4, CHUNK))
PHASES = {  # name -> a function of the model, ready to capture
    "prefill": lambda m: m(MANY, POS, LENGTHS, logits="last"),
    "decode": lambda m: m(ONE, POS),
    "verify 1": lambda m: m(TWO, POS, torch.tensor([2, 1])),
    "verify 3": lambda m: m(FOUR, POS, torch.tensor([4, 2])),
    "mtp draft": lambda m: m.mtp(torch.ones(2, 1, 4, 64), ONE, POS)[0],
}


def opaque_calls(captured) -> collections.Counter:
    return collections.Counter(
        name_of(node.target).split(".")[1]
        for node in captured.calls()
        if name_of(node.target).startswith("dsv4.")
    )


@pytest.mark.parametrize(
    "phase, form, act_quant",
    [
        *(pytest.param(phase, "opaque", False, marks=pytest.mark.quick) for phase in PHASES),
        *((phase, "reference", False) for phase in PHASES),
        ("prefill", "reference", True),
        ("decode", "opaque", True),
    ],
)
def test_inference_is_one_graph(phase, form, act_quant):
    model, eager = build(form, act_quant), build(form, act_quant)
    captured = capture(PHASES[phase], model)
    assert (captured.count, len(captured.graphs), captured.breaks) == (1, 1, 0)
    assert faults(captured) == []
    with torch.no_grad():
        PHASES[phase](eager)
    expected = dict(eager.named_buffers())
    for name, cache in model.named_buffers():
        assert torch.allclose(cache, expected[name], atol=1e-5), name


def loss_of(model, tokens, targets, doc_ids):
    return training_loss(model, tokens, targets, doc_ids)[0]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = tokens_of(150)
    return tokens, tokens.roll(-1, 1), (torch.arange(150) >= torch.tensor([[40], [131]])).long()


@pytest.mark.parametrize("form", FORMS)
def test_training_forward_and_backward_are_one_graph_each(form):
    model, eager = build(form), build(form)
    captured = capture(loss_of, model, *batch(), grad=True)
    assert (captured.count, len(captured.graphs), captured.breaks) == (1, 2, 0)
    assert faults(captured) == []
    loss_of(eager, *batch()).backward()
    expected = dict(eager.named_parameters())
    for name, p in model.named_parameters():
        q = expected[name]
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name


def test_the_optimizer_step_is_one_graph():
    """Muon, AdamW, fp32 masters and router biases: parameters are those of an eager step."""
    args = small(n_layers=2, n_hash_layers=1, n_mtp_layers=0, compress_ratios=(0, 4))
    models, optimizers = [randomize(Transformer(args), seed=1).bfloat16() for _ in range(2)], []
    for model in models:
        optimizers.append(Optimizer(model))
        loss_of(model, *batch()).backward()
    captured = capture(optimizers[0].step, torch.tensor(1e-2))
    assert (captured.count, len(captured.graphs), captured.breaks) == (1, 1, 0) and faults(
        captured
    ) == []
    optimizers[1].step(torch.tensor(1e-2))
    expected = dict(models[1].named_parameters())
    for name, p in models[0].named_parameters():
        q = expected[name]
        assert p.grad is None and (p - q).float().norm() <= 1e-3 * q.float().norm(), name


def test_each_opaque_op_is_one_node():
    """The opaque model calls its ops and nothing in their place; the reference model calls none."""
    counts = {form: opaque_calls(capture(PHASES["prefill"], build(form))) for form in FORMS}
    layers, csa = 4, 2
    compressed = 3
    assert counts["reference"] == {}
    assert counts["opaque"] == {
        "sparse_attn": layers,
        "hc_pre": layers,
        "hc_post_pre": layers,
        "hc_post": layers,
        "moe": layers,
        "compress": compressed + csa,
        "indexer_topk": csa,
        "rope": layers + csa,
        "linear_fp32": layers + 2 * (compressed + csa) + 1,  # routers, compressors, head
    }


TOLERANCES = {
    "prefill": 1e-5,
    "decode": 1e-5,
    "verify 3": 1e-5,
    "train": 1e-4,
    "optimizer": 5e-2,
}  # Muon orthogonalizes in bf16


@pytest.fixture(scope="module")
def backends(tell) -> dict:
    """(phase, backend) -> relative RMS of its result against eager; two layers and MTP, all kinds.

    The result of training is the gradient of every parameter; that of the optimizer, the step of
    each parameter.
    """
    args = small(n_layers=2, n_hash_layers=1, compress_ratios=(4, 128, 0))
    reference = randomize(Transformer(args), seed=1)
    reference.setup_caches(2, 512)
    found = {}

    def gradients(model, backend):
        torch.compile(loss_of, backend=backend, fullgraph=True, dynamic=False)(
            model, *batch()
        ).backward()
        return torch.cat(
            [
                p.grad.flatten() / p.grad.norm().clamp(min=1e-9)
                for p in model.parameters()
                if p.grad is not None
            ]
        )

    def update(backend):
        """Of a router, an expert and a norm: Muon, AdamW and the router's bias."""
        block = copy.deepcopy(reference.layers[-1])
        ffn, generator = block.ffn, torch.Generator().manual_seed(0)
        part = torch.nn.ModuleList([ffn.gate, ffn.shared_experts, block.ffn_norm])
        before, optimizer = copy.deepcopy(part), Optimizer(part)
        load = torch.arange(args.n_routed_experts).float()[None]
        for p in part.parameters():
            p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
        torch.compile(optimizer.step, backend=backend, fullgraph=True, dynamic=False)(
            torch.tensor(1e-2), load
        )
        pairs = zip(part.parameters(), before.parameters(), strict=True)
        steps = [(p - q).detach().flatten() for p, q in pairs]
        assert all(step.any() for step in steps)
        return torch.cat([step / step.norm() for step in steps])

    available = ("aot_eager", "inductor") + ("cudagraphs",) * torch.cuda.is_available()
    for backend in available:
        for phase in ("prefill", "decode", "verify 3"):
            torch._dynamo.reset()
            model, eager = copy.deepcopy(reference), copy.deepcopy(reference)
            with torch.no_grad():
                got = torch.compile(PHASES[phase], backend=backend, fullgraph=True, dynamic=False)(
                    model
                )
                found[phase, backend] = rms(got, PHASES[phase](eager))
        for phase, result in (
            ("train", lambda backend: gradients(copy.deepcopy(reference), backend)),
            ("optimizer", update),
        ):
            torch._dynamo.reset()
            expected = result("eager")
            torch._dynamo.reset()
            found[phase, backend] = rms(result(backend), expected)
    tell(
        f"{'relative RMS against eager, fp32':34}"
        + "".join(f"{backend:>12}" for backend in available)
        + "   tolerance"
    )
    for phase, tolerance in TOLERANCES.items():
        tell(
            f"{phase:34}"
            + "".join(f"{found[phase, backend]:12.1e}" for backend in available)
            + f"{tolerance:12.0e}"
        )
    return found


def test_every_backend_computes_what_eager_computes(backends):
    assert {key[0] for key in backends} == set(TOLERANCES) and {"aot_eager", "inductor"} <= {
        key[1] for key in backends
    }
    wrong = {key: error for key, error in backends.items() if not error <= TOLERANCES[key[0]]}
    assert not wrong, wrong


def test_inductor_decode_writes_caches_in_place():
    """Two layers, CSA and HCA: no buffer of the generated code is as large as a cache."""
    torch._dynamo.reset()
    args = small(n_layers=2, n_hash_layers=1, n_mtp_layers=0, compress_ratios=(4, 128))
    modes = {"hc_pre": "opaque", "hc_post_pre": "opaque"}
    model, eager = (randomize(Transformer(args, ops=modes), seed=1) for _ in range(2))
    for m in (model, eager):
        m.setup_caches(2, 600)  # entries of other sizes than the window
    tokens = tokens_of(8)
    with torch.no_grad():
        decode = torch.compile(model, fullgraph=True, dynamic=False)
        _, (code,) = run_and_get_code(decode, tokens[:, :1], torch.tensor([0, 125]))
        eager(tokens[:, :1], torch.tensor([0, 125]))
        for p in range(1, 8):
            at = torch.tensor([p, 125 + p])
            assert rms(decode(tokens[:, p : p + 1], at), eager(tokens[:, p : p + 1], at)) <= 1e-5
    caches = cache_shapes(model)
    allocated = {shape for shape in caches if f"empty_strided_cpu({shape}" in code}
    assert caches and not allocated, f"decode copies a whole cache: {allocated}"
