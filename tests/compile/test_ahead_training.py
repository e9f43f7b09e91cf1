"""Contracts of training with preset "auto": a step whose parts another process compiles."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import compile_config as C
from model import Aux, Transformer
from testing import random_tokens, randomize, small
from tools import ahead, ahead_parts, ahead_worker
from tools.ahead_compiler import AheadCompiler
from tools.ahead_training import BACKWARD, UPDATE, AheadStep, Joint, JointCall
from training.losses import LossWeights, training_loss
from training.optim import Optimizer

LAYERS = dict(n_layers=1, n_hash_layers=0, n_mtp_layers=1, compress_ratios=(4, 0))
LR = torch.tensor(1e-3)


def build(indexers_only: bool = False, **changes) -> Transformer:
    model = randomize(Transformer(small(**LAYERS, act_quant=False, **changes)), seed=1).train()
    for name, p in model.named_parameters():
        trains = ".indexer." in name if indexers_only else not name.endswith("gate.bias")
        p.requires_grad_(trains)
    return model


def batch_of(rows: int = 2, length: int = 24, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Rows whose tensors are slices of longer ones; the second document begins at 15."""
    tokens = random_tokens(rows, length + 1, seed=seed)
    labels = tokens[:, 1:].clone()
    labels[0, :3] = -1
    doc_ids = (torch.arange(length) >= 15).long().repeat(rows, 1)
    return tokens[:, :-1], labels, doc_ids


class Silent(AheadCompiler):
    """Takes jobs and compiles nothing."""

    def request(self, job):
        self.job = job

    def is_ready(self, key):
        return False

    busy = False


def ahead_step(model: Transformer, kind: str = "muon", **options) -> AheadStep:
    optimizer = Optimizer(model, kind, clip=1.0)
    options = dict(compiler=Silent()) | options
    return C.compile_train_step(model, optimizer, C.AUTO, **options)


def eager_step(model: Transformer, **options):
    return C.compile_train_step(model, Optimizer(model, clip=1.0), C.PRESETS["eager"], **options)


@pytest.fixture(autouse=True)
def nothing_compiled(tmp_path, monkeypatch, request):
    if "compiled" not in request.fixturenames:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


# --------------------------------------------------------------------------------------------------
# Parts, as graphs that Python runs: all but the C++


def run_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """As a library, which takes strides to be those it was compiled for."""
    nodes = graph.graph.find_nodes(op="placeholder")
    for node, x in zip(nodes, inputs, strict=True):
        made_for = zip(x.shape, x.stride(), node.meta["val"].stride(), strict=True)
        assert all(size == 1 or ours == theirs for size, ours, theirs in made_for), node.name
    with torch.no_grad():
        return list(graph(*inputs))


@pytest.fixture
def as_graphs(monkeypatch):
    """Parts are "compiled" to graphs: the library of a path is the graph that was kept there."""
    graphs = {}

    def keep(graph, inputs, level, library):
        graphs[str(library)] = graph
        library.write_bytes(b"")

    monkeypatch.setattr(ahead_parts, "compile_graph", keep)
    runner = lambda path: functools.partial(run_graph, graphs[path])  # noqa: E731
    monkeypatch.setattr(ahead, "library_runner", runner)
    return graphs


def load_graphs(step: AheadStep, batch, tmp_path) -> AheadStep:
    """Make and load all parts of a step but its update."""
    step.prepare(*batch)
    tasks = ahead_worker.tasks_of(step.compiler.job)
    joints = {}
    for task in tasks:
        if task.key == step.compiler.job.key and task.part != UPDATE:
            folder = tmp_path / task.part
            folder.mkdir()
            task.build(folder)
            joints[task.part] = Joint(folder)
    assert joints.keys() == {part.name for part in step.parts.values()}
    step.loaded = {f: JointCall(joints[part.name], part) for f, part in step.parts.items()}
    step.update_names = []  # the update stays eager
    return step


OPTIONS = (
    dict(),
    dict(weights=LossWeights(mtp=0.1, balance=0.5), aux=Aux(index_loss=True)),
    dict(aux=Aux(balance=False)),
    dict(micro_batch=1),
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("documents", (True, False))
def test_losses_and_gradients_of_parts_are_those_of_the_step(
    as_graphs, tmp_path, options, documents
):
    batch = batch_of() if documents else (*batch_of()[:2], None)
    ours, theirs = build(), build()
    step = load_graphs(ahead_step(ours, **options), batch, tmp_path)
    assert_same_gradients(ours, step.step, theirs, eager_step(theirs, **options), batch)
    layer = tmp_path / step.parts[ours.layers[0]].name
    for library in (ahead.CODE, BACKWARD):  # parts take the forms of compiled code
        called = {str(node.target) for node in as_graphs[str(layer / library)].graph.nodes}
        ops = {"hc_post_pre", "sparse_attn"}
        assert all(any(name.startswith(f"dsv4.{op}") for name in called) for op in ops)


def assert_same_gradients(ours, step, theirs, other, batch) -> None:
    """Of two steps on equal models."""
    found, expected = step.backward(*batch), other.backward(*batch)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5), name
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).norm() < 1e-4 * q.grad.norm(), name


def test_parts_without_gradients_have_no_backward(as_graphs, tmp_path):
    """Of the warm-up of indexers, which alone are trained: the MTP block has none."""
    batch, aux = batch_of(length=96), Aux(index_loss=True, dense=True)
    ours, theirs = build(True), build(True)
    step = load_graphs(ahead_step(ours, aux=aux), batch, tmp_path)
    indexed, mtp = (step.parts[block].name for block in (*ours.layers, *ours.mtp))
    assert (tmp_path / indexed / BACKWARD).exists() and not (tmp_path / mtp / BACKWARD).exists()
    assert_same_gradients(ours, step.step, theirs, eager_step(theirs, aux=aux), batch)


def test_what_parts_were_not_made_for_runs_eagerly(as_graphs, tmp_path):
    """Other shapes, as of the last rows, which micro_batch does not divide; modules with hooks."""
    step = load_graphs(ahead_step(build(), micro_batch=2), batch_of(3), tmp_path)
    calls = dict.fromkeys(step.loaded, 0)

    def counted(function):
        run = step.loaded[function]

        def call(*args):
            calls[function] += 1
            return run(*args)

        return call

    step.loaded = {function: counted(function) for function in step.loaded}
    metrics = step.step.backward(*batch_of(3))
    assert set(calls.values()) == {1} and metrics["loss"].isfinite()
    seen = []
    step.model.layers[0].ffn.register_forward_hook(lambda *args: seen.append(args))
    step.step.backward(*batch_of(3))
    assert set(calls.values()) == {1} and len(seen) == 2


# --------------------------------------------------------------------------------------------------
# The update


@pytest.mark.parametrize("kind", ("muon", "adamw"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_update_on_tensors_is_the_optimizers(kind, dtype):
    """Parameters, state and biases, two steps; bf16 has masters."""
    models = [build().to(dtype) for _ in range(2)]
    plain, flat = (Optimizer(model, kind, clip=0.5) for model in models)
    names = [name for name, *_ in (*flat.muon, *flat.adam)][::2]  # others have no gradient

    def update(grads, lr, load, corrections):
        rest = [*grads.values(), load, lr, *corrections]
        return flat.update_on([*flat.tensors(), *rest], names, has_load=True)

    flat.compile(lambda function, name: update)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        load = torch.randint(9, (len(plain.biases), 8), generator=generator).float()
        norms = []
        for optimizer, model in zip((plain, flat), models, strict=True):
            generator.manual_seed(1)
            for name, p in model.named_parameters():
                if name in names:
                    p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            norms.append(optimizer.step(LR, load)["grad_norm"])
        assert norms[0] == norms[1]
    assert len(plain.biases) > 1 and plain.state_dict().keys() == flat.state_dict().keys()
    for a, b in zip(plain.state_dict().values(), flat.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("aux", (Aux(), Aux(index_loss=True)))
def test_gradients_are_foreseen_without_a_backward(aux):
    """Which parameters a loss reaches: the indexer only with its own."""
    model, (tokens, labels, doc_ids) = build(), batch_of()
    total, _ = training_loss(model, tokens, labels, doc_ids, aux=aux)
    reached = ahead_worker.reached_by(total)
    total.backward()
    parameters = dict(model.named_parameters())
    assert reached == {p for p in parameters.values() if p.grad is not None}
    assert (parameters["layers.0.attn.indexer.wq_b.weight"] in reached) == aux.index_loss


def test_settings_make_an_equal_optimizer():
    options = dict(betas=(0.5, 0.6), eps=0.1, momentum=0.2, decay=0.3, clip=4.0, bias_rate=0.7)
    optimizer = Optimizer(build(), "adamw", **options)
    assert optimizer.settings() == {"kind": "adamw", **options}
    assert Optimizer(build(), **optimizer.settings()).settings() == optimizer.settings()


# --------------------------------------------------------------------------------------------------
# Jobs


def key_of(model=None, kind="muon", rows=2, **options) -> str:
    step = ahead_step(model or build(), kind, **options)
    return step.prepare(*batch_of(rows)).job.key


def test_the_key_changes_with_all_that_a_step_depends_on(monkeypatch):
    keys = [key_of(), key_of(rows=3), key_of(rows=3, micro_batch=1), key_of(kind="adamw")]
    keys.append(key_of(weights=LossWeights(mtp=0.5)))
    keys.append(key_of(aux=Aux(index_loss=True)))
    keys.append(key_of(build(indexers_only=True), aux=Aux(index_loss=True)))
    keys.append(key_of(build(norm_eps=1e-5)))
    keys.append(key_of(build().bfloat16()))
    monkeypatch.setattr(ahead, "cache_key", lambda: {"source": "edited"})
    keys.append(key_of())
    monkeypatch.undo()
    assert len(set(keys)) == len(keys)
    assert key_of() == keys[0], "the same step again"


def test_a_job_is_data_for_another_process():
    """What it pickles holds no weight, and builds the same parts on fake tensors."""
    step = ahead_step(build())
    step.prepare(*batch_of())
    data = pickle.dumps(step.compiler.job)
    assert len(data) < sum(p.nbytes for p in step.model.parameters()) / 4
    tasks = list(ahead_worker.tasks_of(pickle.loads(data)))
    parts = [task.part for task in tasks]
    eager_step(model := build()).backward(*batch_of())
    _, grads, _ = tasks[-1].build.args  # of the update
    assert grads.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    names = step.compiler.job.parts
    assert set(parts[-len(names) :]) == set(names) and parts[-1] == UPDATE
    assert not any(isinstance(t, FakeTensorMode) for t in step.model.parameters())


def test_what_another_process_cannot_know_is_compiled_in_this_one(monkeypatch):
    monkeypatch.setattr(C, "build_cpu_kernels", lambda *args: None)
    adamw = lambda model: torch.optim.AdamW(model.parameters())  # noqa: E731
    hooked = build()
    hooked.layers[0].register_forward_hook(lambda module, args, output: output)
    preset = C.AUTO
    loss = lambda model, *args: (model(args[0]).sum(), {})  # noqa: E731
    for model, optimizer, options in (
        (build(), adamw, {}),
        (hooked, Optimizer, {}),
        (build(), Optimizer, dict(recompute="full")),
        (build(), Optimizer, dict(wrap_block=lambda run: run)),
        (build(), Optimizer, dict(loss=loss)),
    ):
        step = C.compile_train_step(model, optimizer(model), preset, **options)
        assert not isinstance(step, AheadStep)
    assert isinstance(ahead_step(build()), AheadStep)


def test_until_code_is_there_steps_are_eager_ones():
    ours, theirs = build(), build()
    step, other = ahead_step(ours), eager_step(theirs)
    for seed in range(2):
        found, expected = step(*batch_of(seed=seed), LR), other(*batch_of(seed=seed), LR)
        assert found == expected and not step.ran_compiled
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


# --------------------------------------------------------------------------------------------------
# Compiled code


@pytest.fixture(scope="module")
def compiled():
    """A step's parts, in the folder of the tests' compile cache."""
    step = ahead_step(build(), compiler=None)
    step(*batch_of(), LR)
    assert step.ran_compiled


class Late(AheadCompiler):
    """Says after n questions that all is ready."""

    def __init__(self, n: int):
        super().__init__()
        self.questions = itertools.count(-n)

    def request(self, job):
        pass

    def is_ready(self, key):
        return next(self.questions) >= 0


def test_a_run_does_not_depend_on_when_compiled_code_takes_over(compiled, monkeypatch):
    """Losses of five steps, up to rounding. Compiled steps alone are equal to the bit."""
    batches = [batch_of(seed=seed) for seed in range(5)]
    eager = eager_step(build())
    expected = [eager(*batch, LR) for batch in batches]
    runs = []
    for n in (0, 0, 1, 3):
        monkeypatch.setattr(ahead, "missing", lambda *args: True)
        step = ahead_step(build(), compiler=Late(n))
        found, ran = [], []
        for batch in batches:
            found.append(step(*batch, LR.double() if n else LR))
            ran.append(step.ran_compiled)
        assert ran == [i >= n for i in range(5)]
        for metrics, other in zip(found, expected, strict=True):
            for name in ("loss", "mtp_loss", "balance", "grad_norm"):
                assert abs(float(metrics[name] / other[name]) - 1) < 1e-4, name
        runs.append((found, copy.deepcopy(list(step.model.parameters()))))
    (first, p), (second, q) = runs[:2]
    assert first == second and all(map(torch.equal, p, q))
