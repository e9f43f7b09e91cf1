"""What is in the graphs, per phase and kind of layer: a snapshot of operators, a ceiling on kernels, and nothing that waits.

`python -m pytest tests/test_compile_census.py --update-snapshots` rewrites tests/snapshots/ after a change that was meant.
"""
from __future__ import annotations

import datetime
import difflib
import json
import re
from pathlib import Path

import pytest
import torch
from torch._inductor import metrics

from compile_config import CompileConfig, compile_function, kind
from fake_cuda import lower
from model import ModelArgs, Transformer
from oracle import randomize, whole_caches
from report import PHASES, Shape, capture, capture_fake, census, faults, is_view, kind_of, name_of, shape_of, values, where

SNAPSHOTS = Path(__file__).parent / "snapshots"
MINOR = ".".join(torch.__version__.split(".")[:2])
ARGS = ModelArgs.debug
pytestmark = pytest.mark.compile


def known(name: str) -> dict:
    path = SNAPSHOTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def update(name: str, content: dict) -> None:
    SNAPSHOTS.mkdir(exist_ok=True)
    (SNAPSHOTS / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def lines(counts: dict, group: str | None = None) -> list[str]:
    return [f"{phase}: {kind}: {name} {n}" for phase, kinds in sorted(counts.items()) for kind, groups in sorted(kinds.items())
            for key, ops in sorted(groups.items()) if group in (None, key) for name, n in sorted(ops.items())]


def difference(old: list[str], new: list[str]) -> str:
    return "\n".join(line for line in difflib.unified_diff(old, new, "snapshot", "now", lineterm="", n=0) if not line.startswith("@@"))


@pytest.fixture(scope="module")
def counts() -> dict:
    """{phase: {kind: {"opaque": ..., "aten": ...}}} of the debug model."""
    found = {}
    for phase in PHASES:
        captured, model = capture_fake(ARGS(), phase)
        assert faults(captured) == []
        found[phase] = census(captured, model.args)
    return found


def test_our_operators_are_those_of_the_snapshot(counts, request):
    """On every torch version: which of our ops a layer of each kind calls, and how often."""
    snapshots = known("operators")
    if request.config.getoption("--update-snapshots"):
        snapshots[MINOR] = counts
        update("operators", snapshots)
    assert snapshots, "no snapshot yet: run with --update-snapshots"
    for version, snapshot in snapshots.items():
        changed = difference(lines(snapshot, "opaque"), lines(counts, "opaque"))
        assert not changed, f"our operators differ from those of torch {version}; --update-snapshots accepts:\n{changed}"


def test_aten_operators_are_those_of_the_snapshot(counts):
    snapshot = known("operators").get(MINOR)
    if snapshot is None:
        pytest.skip(f"no snapshot for torch {MINOR}; --update-snapshots makes one")
    changed = difference(lines(snapshot, "aten"), lines(counts, "aten"))
    assert not changed, f"aten operators differ from the snapshot of torch {MINOR}; --update-snapshots accepts:\n{changed}"


def kernels_by_kind(phase: str) -> dict[str, int]:
    """Inductor's CPU kernels for one layer of each kind, forward, and backward in training."""
    torch._dynamo.reset()
    args, shape, found, made = ARGS(), shape_of(ARGS(), phase), {}, {}
    model, train = randomize(Transformer(args), seed=1), phase == "train"
    if not train:
        model.eval().setup_caches(shape.batch, shape.context)
    tokens, at = torch.zeros(1, shape.length, dtype=torch.int64), None if train else torch.zeros(1, dtype=torch.int64)
    with torch.set_grad_enabled(train):
        tokens, plan, X = model.start(tokens, at)
        for i, block in enumerate(model.layers):
            if kind(block) in made:
                continue
            made[kind(block)] = layer = compile_function(lambda block, *args: block(*args), phase, CompileConfig())
            metrics.reset()
            out = layer(block, X.detach().requires_grad_(train), tokens, plan)
            if train:
                out.sum().backward()
            found[kind_of(args, i)] = metrics.generated_kernel_count
    return found


@pytest.mark.parametrize("phase", ("decode", "train"))
def test_kernels_per_layer_stay_under_their_ceiling(phase, request, tell):
    """The ceiling is the recorded count times 1.1; raising it needs --update-snapshots and a reason in the commit."""
    now, snapshots = kernels_by_kind(phase), known("kernels")
    if request.config.getoption("--update-snapshots"):
        snapshots.setdefault(MINOR, {})[phase] = now | {"date": datetime.date.today().isoformat()}
        update("kernels", snapshots)
    if MINOR not in snapshots:
        pytest.skip(f"no kernel counts for torch {MINOR}; --update-snapshots records them")
    recorded = snapshots[MINOR][phase]
    tell(f"kernels per layer, {phase}, of at most 1.1 times those of {recorded['date']}: " +
         ", ".join(f"{kind} {n} of {1.1 * recorded[kind]:.0f}" for kind, n in now.items()))
    over = {kind: n for kind, n in now.items() if not 0 < n <= 1.1 * recorded[kind]}
    assert not over, f"{phase}: more kernels than 1.1 times {recorded}: {over}"


def test_no_cache_is_computed_whole():
    """Decode, two rows: caches are read by view and by index, written by index, and nothing else has their shape."""
    captured, model = capture_fake(ARGS(), "decode", Shape(2, 1, 600))  # entries of other sizes than the window
    caches, writes = whole_caches(model), ("aten.index_put.default", "aten.copy_.default")
    whole = [where(node) for node in captured.calls() if name_of(node.target) not in writes and not is_view(node)
             and any(tuple(v.shape) in caches for v in values(node))]
    assert caches and not whole, f"decode computes a whole cache: {whole}"


# ---------------------------------------------------------------------------------------------------------------------
# Host syncs


WAITS = {
    "item": lambda x: x + x.argmax().item(),
    "nonzero": lambda x: x.nonzero().sum(),
    "mask": lambda x: x[x > 0].sum(),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long(), 0).sum(),
    "bincount": lambda x: (x > 0).long().flatten().bincount().sum(),
    "unique": lambda x: x.unique().sum(),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_host_sync_is_found_and_located(name):
    """What fullgraph=True lets pass, the scan does not."""
    def function(x):
        return WAITS[name](x) * 2
    found = faults(capture(function, torch.randn(3)))
    assert found and any("test_compile_census.py" in line for line in found), found


def test_a_symbolic_size_is_found():
    def function(x):
        return x + 1
    x = torch.randn(7, 3)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.reset()
    graphs = []
    torch.compile(function, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)(x)
    from report import Captured
    for node in graphs[0].graph.nodes:
        node.meta.setdefault("val", node.meta.get("example_value"))
    assert any("symbolic" in line for line in faults(Captured(graphs, 1, 0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("phase", ("prefill", "decode"))
def test_the_forward_does_not_wait_for_the_gpu(phase):
    shape = shape_of(ARGS(), phase)
    model = randomize(Transformer(ARGS()), seed=1).cuda().eval()
    model.setup_caches(1, 512)
    tokens, at = torch.zeros(1, shape.length, dtype=torch.int64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        model(tokens, at)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(tokens, at)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------
# Lowered for CUDA, without a GPU


@pytest.fixture(scope="module")
def cuda_code() -> dict[str, str]:
    """{kind: the code that Inductor writes for one decoded token in one layer}, on sm_90; all ops opaque."""
    from report import MODEL_OPS
    args, found = ARGS(), {}
    model = randomize(Transformer(args, ops={name: "opaque" for name in MODEL_OPS}), seed=1).eval()
    model.setup_caches(1, 600)  # entries of other sizes than the window
    try:
        with torch.no_grad():
            tokens, plan, X = model.start(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
            for i, block in enumerate(model.layers):
                found[kind_of(args, i)] = lower(lambda X, tokens, plan, block=block: block(X, tokens, plan), X, tokens, plan)
    except (AttributeError, ImportError, TypeError, RuntimeError, AssertionError) as error:  # it replaces much of torch.cuda
        pytest.skip(f"torch {torch.__version__} cannot be lowered for CUDA here: {type(error).__name__}: {error}")
    return found


def launches(code: str) -> dict[str, int]:
    patterns = {"triton": r"\.run\(", "extern": r"extern_kernels\.\w+\(", "ours": r"= torch\.ops\.dsv4\.\w+\.default\("}
    return {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}


def test_launches_on_cuda_stay_under_their_ceiling(cuda_code, request):
    now, snapshots = {kind: launches(code) for kind, code in cuda_code.items()}, known("cuda_launches")
    if request.config.getoption("--update-snapshots"):
        snapshots[MINOR] = now
        update("cuda_launches", snapshots)
    if MINOR not in snapshots:
        pytest.skip(f"no launch counts for torch {MINOR}; --update-snapshots records them")
    for kind, counts in now.items():
        before = snapshots[MINOR][kind]
        assert counts["ours"] == before["ours"], (kind, counts, before)
        assert 0 < counts["triton"] <= 1.1 * before["triton"] and counts["extern"] <= before["extern"], (kind, counts, before)


def test_no_cache_is_copied_whole_on_cuda(cuda_code):
    args = ARGS()
    model = Transformer(args)
    model.setup_caches(1, 600)
    for i, block in enumerate(model.layers):
        caches = whole_caches(block)
        copies = [shape for shape in caches if f"empty_strided_cuda({shape}" in cuda_code[kind_of(args, i)]]
        assert caches and not copies, f"{kind_of(args, i)}: decode copies a whole cache of shape {copies}"
