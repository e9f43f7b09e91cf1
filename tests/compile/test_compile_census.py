"""The graphs' content by phase and kind of layer: operators as recorded, few kernels, no waits.

After a change that was meant, this rewrites tests/compile/snapshots/:
`python -m pytest tests/compile/test_compile_census.py --update-snapshots`
"""

from __future__ import annotations

import collections
import datetime
import difflib
import json
import re
import traceback
from pathlib import Path

import pytest
import torch
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compile_config import CompileConfig, call_forward, compile_function
from model import ModelArgs, Transformer
from testing import cache_shapes, randomize
from tools.capture import (
    MODEL_OPS,
    PHASES,
    Captured,
    Shape,
    call_of,
    capture,
    capture_fake,
    census,
    faults,
    is_view,
    kind_of,
    name_of,
    shape_of,
    values,
    waits,
    where,
)
from tools.fake_cuda import lower, on_cuda, trace
from tools.layer_graphs import layer_signature

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


def difference(old: dict, new: dict) -> str:
    """The changes of {phase: {kind: {operator: count}}}, as a diff."""

    def lines(counts: dict) -> list[str]:
        return [
            f"{phase}: {kind}: {name} {n}"
            for phase, kinds in sorted(counts.items())
            for kind, ops in sorted(kinds.items())
            for name, n in sorted(ops.items())
        ]

    diff = difflib.unified_diff(lines(old), lines(new), "snapshot", "now", lineterm="", n=0)
    return "\n".join(line for line in diff if not line.startswith("@@"))


def accepted(snapshot: dict, counts: dict) -> dict:
    """The snapshot after --update-snapshots: aten's operators, unlike ours, are kept by version."""
    return {"ours": counts["opaque"], "aten": snapshot.get("aten", {}) | {MINOR: counts["aten"]}}


@pytest.fixture(scope="module")
def counts() -> dict:
    """{"opaque" or "aten": {phase: {kind: {operator: count}}}} of the debug model."""
    found: dict = {"opaque": {}, "aten": {}}
    for phase in PHASES:
        captured, model = capture_fake(ARGS(), phase)
        assert faults(captured) == []
        for kind, groups in census(captured, model.args).items():
            for group, ops in groups.items():
                found[group].setdefault(phase, {})[kind] = ops
    return found


def test_our_operators_are_those_of_the_snapshot(counts, request):
    """On every torch version: which of our ops a layer of each kind calls, and how often."""
    snapshot = known("operators")
    if request.config.getoption("--update-snapshots"):
        update("operators", snapshot := accepted(snapshot, counts))
    assert snapshot, "no snapshot yet: run with --update-snapshots"
    changed = difference(snapshot["ours"], counts["opaque"])
    assert not changed, (
        f"our operators differ from the snapshot; --update-snapshots accepts:\n{changed}"
    )


def test_aten_operators_are_those_of_the_snapshot(counts):
    snapshot = known("operators")["aten"].get(MINOR)
    if snapshot is None:
        pytest.skip(f"no snapshot for torch {MINOR}; --update-snapshots makes one")
    changed = difference(snapshot, counts["aten"])
    assert not changed, (
        f"aten operators differ from the snapshot of torch {MINOR}; "
        f"--update-snapshots accepts:\n{changed}"
    )


def test_accepting_a_change_of_ours_accepts_it_for_every_version():
    """And of aten for the running version alone."""
    old = {phase: {"rest": {"x": 1}} for phase in PHASES}
    new = {phase: {"rest": {"x": 2}} for phase in PHASES}
    snapshot = accepted(
        {"ours": old, "aten": {"1.0": old, MINOR: old}}, {"opaque": new, "aten": new}
    )
    assert not difference(snapshot["ours"], new)
    assert not difference(snapshot["aten"][MINOR], new)
    assert not difference(snapshot["aten"]["1.0"], old)
    changed = difference(old, new)
    assert "-decode: rest: x 1" in changed and "+decode: rest: x 2" in changed


def kernels_by_kind(phase: str) -> dict[str, int]:
    """Inductor's CPU kernels for one layer of each kind, forward, and backward in training."""
    torch._dynamo.reset()
    args, train = ARGS(), phase == "train"
    shape = shape_of(args, phase)
    model = randomize(Transformer(args), seed=1)
    input_pos = None
    if not train:
        model.eval().setup_caches(shape.batch, shape.context)
        input_pos = torch.zeros(1, dtype=torch.int64)
    tokens = torch.zeros(1, shape.length, dtype=torch.int64)
    found, compiled = {}, set()
    with torch.set_grad_enabled(train):
        tokens, plan, X = model.embed_inputs(tokens, input_pos)
        for i, block in enumerate(model.layers):
            if layer_signature(block) in compiled:
                continue
            compiled.add(layer_signature(block))
            layer = compile_function(call_forward, phase, CompileConfig())
            metrics.reset()
            out, _ = layer(block, X.detach().requires_grad_(train), tokens, plan)
            if train:
                out.sum().backward()
            found[kind_of(args, i)] = metrics.generated_kernel_count
    return found


@pytest.mark.parametrize("phase", ("decode", "train"))
def test_kernels_per_layer_stay_under_their_ceiling(phase, request, tell):
    """1.1 times the recorded count. Raise it by --update-snapshots, with a reason in the commit."""
    now, snapshots = kernels_by_kind(phase), known("kernels")
    if request.config.getoption("--update-snapshots"):
        snapshots.setdefault(MINOR, {})[phase] = now | {"date": datetime.date.today().isoformat()}
        update("kernels", snapshots)
    if MINOR not in snapshots:
        pytest.skip(f"no kernel counts for torch {MINOR}; --update-snapshots records them")
    recorded = snapshots[MINOR][phase]
    tell(
        f"kernels per layer, {phase}, of at most 1.1 times those of {recorded['date']}: "
        + ", ".join(f"{kind} {n} of {1.1 * recorded[kind]:.0f}" for kind, n in now.items())
    )
    over = {kind: n for kind, n in now.items() if not 0 < n <= 1.1 * recorded[kind]}
    assert not over, f"{phase}: more kernels than 1.1 times {recorded}: {over}"


def test_no_cache_is_computed_whole():
    """Decode, two rows: caches are read by view or index and written by index."""
    captured, model = capture_fake(
        ARGS(), "decode", Shape(2, 1, 600)
    )  # entries of other sizes than the window
    caches, writes = cache_shapes(model), ("aten.index_put.default", "aten.copy_.default")
    whole = [
        where(node)
        for node in captured.calls()
        if name_of(node.target) not in writes
        and not is_view(node)
        and any(tuple(v.shape) in caches for v in values(node))
    ]
    assert caches and not whole, f"decode computes a whole cache: {whole}"


# --------------------------------------------------------------------------------------------------
# Host syncs


WAITS = {
    "item": lambda x: x + x.argmax().item(),
    "nonzero": lambda x: x.nonzero().sum(),
    "mask": lambda x: x[x > 0].sum(),
    "repeat_interleave": lambda x: x.repeat_interleave((x > 0).long(), 0).sum(),
    "bincount": lambda x: (x > 0).long().flatten().bincount().sum(),
    "unique": lambda x: x.unique().sum(),
    "inverse": lambda x: torch.linalg.inv(x[:, None] * x + torch.eye(3)).sum(),
    "cond": lambda x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
    "item in a branch": lambda x: torch.cond(
        x.sum() > 0, lambda x: x + x.argmax().item(), lambda x: x + x.argmin().item(), (x,)
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_host_sync_is_found_and_located(name):
    """What fullgraph=True lets pass, the scan does not."""

    def function(x):
        return WAITS[name](x) * 2

    if name == "inverse" and MINOR == "2.11":
        pytest.skip(
            "torch 2.11 leaves the check for singular matrices out of the graph, and so the wait"
        )
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
    for node in graphs[0].graph.nodes:
        node.meta.setdefault("val", node.meta.get("example_value"))
    assert any("symbolic" in line for line in faults(Captured(graphs, 1, 0)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("phase", ("prefill", "decode"))
def test_the_forward_does_not_wait_for_the_gpu(phase):
    shape = shape_of(ARGS(), phase)
    model = randomize(Transformer(ARGS()), seed=1).cuda().eval()
    model.setup_caches(1, 512)
    tokens = torch.zeros(1, shape.length, dtype=torch.int64, device="cuda")
    input_pos = torch.zeros(1, dtype=torch.int64, device="cuda")
    with torch.no_grad():
        model(tokens, input_pos)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(tokens, input_pos)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Elsewhere(TorchDispatchMode):
    """Runs on meta tensors, which are not on the CPU: finds operators that leave the device or wait
    for it, and counts our ops."""

    def __init__(self):
        super().__init__()
        self.left, self.ours = [], collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace == "dsv4":
            self.ours[name_of(op)] += 1
        if waits(name_of(op)) or any(
            t.device.type != "meta"
            for t in tree_leaves((args, kwargs, out))
            if isinstance(t, torch.Tensor)
        ):
            self.left.append(f"{name_of(op)}\n{''.join(traceback.format_stack()[:-1])}")
        return out


@pytest.mark.parametrize("phase", PHASES)
def test_nothing_leaves_the_device_and_the_default_form_there_is_opaque(phase):
    """Graphs captured on CPU show no copies to and from it, and ops have another mode there."""
    with torch.device("meta"), Elsewhere() as seen, torch.set_grad_enabled(phase == "train"):
        model, shape = Transformer(ARGS()), shape_of(ARGS(), phase)
        if phase != "train":
            model.setup_caches(shape.batch, shape.context)
        function, inputs = call_of(model, phase, shape)
        out = function(*inputs)
        if phase == "train":
            out.backward()
    assert not seen.left, f"{phase} leaves the device or waits for it: {seen.left[0]}"
    ours = collections.Counter()
    for ops in known("operators")["ours"][phase].values():
        ours.update(ops)
    assert seen.ours == ours, (
        f"{phase} by default does not run the opaque ops: {seen.ours} instead of {ours}"
    )


# --------------------------------------------------------------------------------------------------
# Lowered for CUDA, without a GPU


def lowered() -> dict[str, str]:
    """{kind: Inductor's code for one decoded token in one layer}, on sm_90; all ops opaque.

    The test is skipped only on a torch version on which this has never worked: it replaces much of
    torch.cuda.
    """
    args, found = ARGS(), {}
    model = randomize(Transformer(args, ops={name: "opaque" for name in MODEL_OPS}), seed=1).eval()
    model.setup_caches(1, 600)  # entries of other sizes than the window
    try:
        with torch.no_grad():
            tokens, plan, X = model.embed_inputs(
                torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            )
            for i, block in enumerate(model.layers):
                (traced,) = trace(
                    lambda X, tokens, plan, block=block: block(X, tokens, plan)[0], X, tokens, plan
                )
                found[kind_of(args, i)] = lower(*on_cuda(*traced))
    except (AttributeError, ImportError, TypeError, RuntimeError, AssertionError) as error:
        if MINOR in known("cuda_launches"):
            raise
        pytest.skip(
            f"torch {torch.__version__} cannot be lowered for CUDA here: "
            f"{type(error).__name__}: {error}"
        )
    return found


@pytest.fixture(scope="module")
def cuda_code() -> dict[str, str]:
    return lowered()


@pytest.mark.parametrize("recorded", (True, False))
def test_a_model_that_cannot_be_lowered_fails_where_a_version_is_known(recorded, monkeypatch):
    def broken(*args):
        raise RuntimeError("broken")

    monkeypatch.setitem(globals(), "lower", broken)
    monkeypatch.setitem(globals(), "known", lambda name: {MINOR: {}} if recorded else {})
    with pytest.raises(RuntimeError if recorded else pytest.skip.Exception, match="broken"):
        lowered()


def launches(code: str) -> dict[str, int]:
    """Triton kernels, library calls, aten's own kernels (each a launch or several) and our ops."""
    patterns = {
        "triton": r"\.run\(",
        "extern": r"extern_kernels\.\w+\(",
        "aten": r"= (?:torch\.ops\.)?aten\.\w+(?:\.\w+)?\(",
        "ours": r"= torch\.ops\.dsv4\.\w+\.default\(",
    }
    return {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}


def test_launches_of_every_sort_are_counted():
    code = """aten = torch.ops.aten
        triton_poi_fused_add_0.run(arg0_1, buf0, 64, stream=stream0)
        extern_kernels.mm(buf0, arg1_1, out=buf1)
        buf2 = torch.ops.aten.topk.default(buf1, 2)
        buf3 = aten.sort(buf1)
        buf4 = torch.ops.dsv4.moe.default(buf1)"""
    assert launches(code) == {"triton": 1, "extern": 1, "aten": 2, "ours": 1}


def test_launches_on_cuda_stay_under_their_ceiling(cuda_code, request, tell):
    """The recorded count, of Triton's kernels times 1.1; raise it as for kernels."""
    now = {kind: launches(code) for kind, code in cuda_code.items()}
    snapshots = known("cuda_launches")
    if request.config.getoption("--update-snapshots"):
        snapshots[MINOR] = now | {"date": datetime.date.today().isoformat()}
        update("cuda_launches", snapshots)
    if MINOR not in snapshots:
        pytest.skip(f"no launch counts for torch {MINOR}; --update-snapshots records them")
    recorded = snapshots[MINOR]
    tell(
        f"CUDA launches per layer, decode, against those of {recorded['date']}: "
        + ", ".join(
            f"{kind} {sum(counts.values())} of {sum(recorded[kind].values())}"
            for kind, counts in now.items()
        )
    )
    for kind, counts in now.items():
        before = recorded[kind]
        both = kind, counts, before
        assert counts["ours"] == before["ours"], both
        assert 0 < counts["triton"] <= 1.1 * before["triton"] + 1, both
        assert counts["extern"] <= before["extern"] and counts["aten"] <= before["aten"], both


def test_no_cache_is_copied_whole_on_cuda(cuda_code):
    args = ARGS()
    model = Transformer(args)
    model.setup_caches(1, 600)
    for i, block in enumerate(model.layers):
        caches = cache_shapes(block)
        copies = [
            shape
            for shape in caches
            if f"empty_strided_cuda({shape}" in cuda_code[kind_of(args, i)]
        ]
        assert caches and not copies, (
            f"{kind_of(args, i)}: decode copies a whole cache of shape {copies}"
        )
