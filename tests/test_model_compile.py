"""Every phase is one full graph, free of host syncs and of symbolic integers, and computes what eager computes."""
from __future__ import annotations

import collections
import re

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.symbolic_shapes import free_symbols
from functorch.compile import make_boxed_func

import ops
from model import ModelArgs, Transformer
from oracle import randomize, rms, small

# fullgraph=True captures these silently; on a GPU each of them makes the host wait
SYNCS = ("_local_scalar_dense", "item", "nonzero", "_assert_scalar", "masked_select", "_unique2", "unique_dim", "bincount",
         "repeat_interleave.Tensor", "is_nonzero", "equal")
FORMS = {form: {name: form for name in ops.OPS} for form in ("reference", "opaque")}
CHUNK = 64


def build(form: str, act_quant: bool = False) -> Transformer:
    args = ModelArgs.debug()
    args.act_quant = act_quant
    model = randomize(Transformer(args, ops=FORMS[form]), seed=1)
    model.setup_caches(2, 512)
    return model


def tokens_of(T: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, T), generator=torch.Generator().manual_seed(T))


POS, LENGTHS = torch.tensor([3, 130]), torch.tensor([CHUNK, 17])
PHASES = {  # name -> a function of the model, ready to capture
    "prefill": lambda m, t=tokens_of(CHUNK): m(t, POS, LENGTHS, logits="last"),
    "decode": lambda m, t=tokens_of(1): m(t, POS),
    "verify": lambda m, t=tokens_of(4): m(t, POS, torch.tensor([4, 2])),
    "mtp draft": lambda m, t=tokens_of(1): m.mtp(torch.ones(2, 1, 4, 64), t, POS)[0],
}


def loss_of(model, tokens, targets, doc_ids):
    _, hidden = model(tokens, doc_ids=doc_ids, logits=None, return_hidden=True)
    mtp, _ = model.mtp(hidden, targets, doc_ids=doc_ids)
    x = model.head_input(hidden).flatten(0, 1)
    main = model.ops.linear_cross_entropy(x, model.head.weight, targets.flatten()).mean()
    return main + torch.nn.functional.cross_entropy(mtp.flatten(0, 1), targets.flatten())


class Recorder:
    """A backend that runs the captured graphs as they are and keeps them: `graphs` after AOT, `captures` from Dynamo."""

    def __init__(self):
        self.graphs, self.captures = [], 0
        self.aot = aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep, keep_inference_input_mutations=True)

    def keep(self, graph, inputs):
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)

    def __call__(self, graph, inputs):
        self.captures += 1
        return self.aot(graph, inputs)

    def nodes(self):
        return [node for graph in self.graphs for node in graph.graph.nodes]


def assert_static_and_free_of_syncs(recorder: Recorder):
    for node in recorder.nodes():
        name = str(node.target)
        assert not any(name.startswith(f"aten.{sync}.") or name == f"aten.{sync}" for sync in SYNCS), f"host sync: {name}"
        value = node.meta.get("val")
        for v in value if isinstance(value, (tuple, list)) else (value,):
            assert not isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)), f"symbolic value: {node.format_node()}"
            assert not (isinstance(v, torch.Tensor) and free_symbols(v)), f"symbolic shape: {node.format_node()}"


def opaque_calls(recorder: Recorder) -> collections.Counter:
    names = (str(node.target) for node in recorder.nodes() if node.op == "call_function")
    return collections.Counter(name.split(".")[1] for name in names if name.startswith("dsv4."))


@pytest.mark.parametrize("phase, form, act_quant", [(phase, form, False) for phase in PHASES for form in FORMS] +
                         [("prefill", "reference", True), ("decode", "opaque", True)])
def test_inference_is_one_graph(phase, form, act_quant):
    torch._dynamo.reset()
    counters.clear()
    model, eager, recorder = build(form, act_quant), build(form, act_quant), Recorder()
    with torch.no_grad():
        out = torch.compile(PHASES[phase], backend=recorder, fullgraph=True, dynamic=False)(model)
        assert rms(out, PHASES[phase](eager)) <= 1e-5
    assert recorder.captures == 1 and len(recorder.graphs) == 1 and not counters["graph_break"]
    assert_static_and_free_of_syncs(recorder)
    for (name, cache), (_, expected) in zip(model.named_buffers(), eager.named_buffers()):
        assert torch.allclose(cache, expected, atol=1e-5), name


@pytest.mark.parametrize("form", FORMS)
def test_training_forward_and_backward_are_one_graph_each(form):
    torch._dynamo.reset()
    counters.clear()
    model, recorder = build(form), Recorder()
    tokens, targets = tokens_of(150), tokens_of(150).roll(-1, 1)
    doc_ids = (torch.arange(150) >= torch.tensor([[40], [131]])).long()
    loss = torch.compile(loss_of, backend=recorder, fullgraph=True, dynamic=False)(model, tokens, targets, doc_ids)
    loss.backward()
    assert recorder.captures == 1 and len(recorder.graphs) == 2 and not counters["graph_break"]
    assert_static_and_free_of_syncs(recorder)
    eager = build(form)
    expected = loss_of(eager, tokens, targets, doc_ids)
    expected.backward()
    assert abs(loss.item() / expected.item() - 1) <= 1e-5
    for (name, p), q in zip(model.named_parameters(), eager.parameters()):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name


def test_decode_does_not_recompile_with_the_position():
    """One graph serves every position, across the window wrap and both compression boundaries, and a new conversation."""
    torch._dynamo.reset()
    model, eager, recorder = build("reference"), build("reference"), Recorder()
    decode = torch.compile(model, backend=recorder, fullgraph=True, dynamic=False)
    tokens = tokens_of(300)
    with torch.no_grad():
        for p in (*range(0, 10), *range(120, 140), *range(250, 262), 0, 1, 2):
            at = torch.tensor([p, max(0, p - 3)])
            assert rms(decode(tokens[:, p : p + 1], at), eager(tokens[:, p : p + 1], at)) <= 1e-5
    assert recorder.captures == 1


def test_each_opaque_op_is_one_node():
    """The opaque model calls its ops and nothing in their place; the reference model calls none."""
    counts = {}
    for form in FORMS:
        torch._dynamo.reset()
        recorder, model = Recorder(), build(form)
        with torch.no_grad():
            torch.compile(PHASES["prefill"], backend=recorder, fullgraph=True, dynamic=False)(model)
        counts[form] = opaque_calls(recorder)
    layers, csa, compressed = 4, 2, 3
    assert counts["reference"] == {}
    assert counts["opaque"] == {"sparse_attn": layers, "hc_pre": 2 * layers, "hc_post": 2 * layers, "moe": layers,
                                "compress": compressed + csa, "indexer_topk": csa, "rope": layers + csa}


def test_inductor_decode_equals_eager_and_writes_caches_in_place():
    """Two layers, CSA and HCA. No buffer of the generated code is as large as a ring or an entry cache."""
    torch._dynamo.reset()
    args = small(n_layers=2, n_hash_layers=1, n_mtp_layers=0, compress_ratios=(4, 128))
    model, eager = (randomize(Transformer(args, ops={"hc_pre": "opaque"}), seed=1) for _ in range(2))
    for m in (model, eager):
        m.setup_caches(2, 512)
    tokens = tokens_of(8)
    with torch.no_grad():
        decode = torch.compile(model, fullgraph=True, dynamic=False)
        _, (code,) = run_and_get_code(decode, tokens[:, :1], torch.tensor([0, 125]))
        eager(tokens[:, :1], torch.tensor([0, 125]))
        for p in range(1, 8):
            at = torch.tensor([p, 125 + p])
            assert rms(decode(tokens[:, p : p + 1], at), eager(tokens[:, p : p + 1], at)) <= 1e-5
    caches = {str(tuple(b.shape)) for name, b in model.named_buffers() if name.endswith(("ring.rows", "entries"))}
    allocated = set(re.findall(r"empty_strided_cpu\((\([^)]*\))", code))
    assert caches and not caches & allocated
