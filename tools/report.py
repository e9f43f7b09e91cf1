"""What the compiler sees of a model and makes of it: the numbers behind `python compile_config.py report`.

Seen: each phase is captured whole, as one Dynamo graph with every op of ours a node, as on a GPU. That happens on fake
tensors: Flash and Pro need no weights and no memory. A deep model is captured with one layer of each kind, whose numbers
count as often as the kind occurs; --full captures every layer. Made: where the weights fit (tiny, debug, a folder), each
phase is also compiled in two fresh processes, the second of which finds the first one's cache, and run through a session.
Recompiles are counted in one that keeps Dynamo's guards.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import ops
from checkpoint import check, checkpoint_tensors, empty_model, load, open_folder
from compile_config import (
    PRESETS,
    CompileCount,
    checkpoint_blocks,
    compile_decode,
    compile_prefill,
    compile_train_step,
    compile_verify,
)
from config import CSA_RATIOS
from model import ModelArgs, Transformer
from ops.registry import require
from tools import cli, stats
from tools.torch_private import compile_isolated
from training.losses import training_loss
from training.optim import Optimizer

PHASES = ("prefill", "decode", "verify", "train")
NAMED: dict[str, Callable[[], ModelArgs]] = {
    "tiny": ModelArgs.tiny,
    "debug": ModelArgs.debug,
    "flash": ModelArgs.flash,
    "pro": ModelArgs.pro,
}
DRAFTED = 3  # tokens that verify checks beside the one it is sure of

# What makes a host wait for a GPU. fullgraph=True captures these silently.
SYNCS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "_assert_scalar",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave.Tensor",
    "is_nonzero",
    "equal",
    "sym_size",
    "sym_numel",
    "_linalg_check_errors",
)
BRANCHES = ("cond", "while_loop")  # so do these, to learn where to go on


# ---------------------------------------------------------------------------------------------------------------------
# Phases


class Shape(NamedTuple):
    """The static shape of a phase: rows, new tokens per row, and the context of the caches."""

    batch: int
    length: int
    context: int


def shape_of(args: ModelArgs, phase: str) -> Shape:
    """What the report uses: production sizes for models of production size."""
    big = args.dim >= 4096
    length = {
        "prefill": 8192 if big else 256,
        "decode": 1,
        "verify": 1 + DRAFTED,
        "train": 8192 if big else 256,
    }[phase]
    return Shape(
        1, length, length if phase == "train" or big and phase == "prefill" else args.max_seq_len
    )


def call_of(
    model: Transformer, phase: str, shape: Shape, recompute: str = "none"
) -> tuple[Callable, tuple]:
    """A function of tensors that runs the phase, and arguments for it."""
    tokens = torch.zeros(shape.batch, shape.length, dtype=torch.int64)
    if phase == "train":
        run_block = checkpoint_blocks(recompute)

        def loss(tokens, labels, doc_ids):
            return training_loss(model, tokens, labels, doc_ids, run_block=run_block)[0]

        return loss, (tokens, tokens + 1, tokens * 0)
    pos, lengths = (
        torch.zeros(shape.batch, dtype=torch.int64),
        torch.full((shape.batch,), shape.length),
    )
    logits = "last" if phase == "prefill" else "all"
    return lambda tokens, pos, lengths: model(tokens, pos, lengths, logits=logits), (
        tokens,
        pos,
        lengths,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Captured graphs


class Captured(NamedTuple):
    """The graphs of one function: one for inference, forward and backward for training; and how many Dynamo made."""

    graphs: list[torch.fx.GraphModule]
    count: int
    breaks: int

    def nodes(self) -> Iterator[torch.fx.Node]:
        """All nodes, those of nested regions and of branches included."""
        return (
            node
            for graph in self.graphs
            for part in graph.modules()
            if isinstance(part, torch.fx.GraphModule)
            for node in part.graph.nodes
        )

    def calls(self) -> Iterator[torch.fx.Node]:
        """Operators: calls of this project's and of aten's."""
        return (node for node in self.nodes() if isinstance(node.target, torch._ops.OpOverload))


def capture(function: Callable, *args, grad: bool = False) -> Captured:
    """`function(*args)` as AOT graphs, run as they are; with grad, function returns a loss and is differentiated."""
    graphs, captures = [], []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    aot = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        keep_inference_input_mutations=True,
        partition_fn=min_cut_rematerialization_partition,
    )

    def backend(graph, inputs):
        captures.append(graph)
        return aot(graph, inputs)

    torch._dynamo.reset()
    before = sum(counters["graph_break"].values())
    with torch.set_grad_enabled(grad):
        compiled = compile_isolated(
            function, "captured", backend=backend, fullgraph=True, dynamic=False
        )
        result = compiled(*args)
        if grad:
            result.backward()
    return Captured(graphs, len(captures), sum(counters["graph_break"].values()) - before)


def capture_fake(
    args: ModelArgs,
    phase: str,
    shape: Shape | None = None,
    forms: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
    recompute: str = "none",
) -> tuple[Captured, Transformer]:
    """A phase of a model without storage. forms: as in Transformer, default all opaque; dtype bf16 at production size;
    recompute: as in compile_train_step."""
    shape, before = shape or shape_of(args, phase), torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.bfloat16 if args.dim >= 4096 else torch.float32))
    try:
        with FakeTensorMode():
            model = Transformer(
                args, ops=forms if forms is not None else {name: "opaque" for name in MODEL_OPS}
            )
            if phase != "train":
                model.setup_caches(shape.batch, shape.context)
            function, inputs = call_of(model, phase, shape, recompute)
            return capture(function, *inputs, grad=phase == "train"), model
    finally:
        torch.set_default_dtype(before)


MODEL_OPS = tuple(ops.OPS)


def name_of(target) -> str:
    """ "dsv4.moe" or "aten.mm.default": ours are known by name, aten's by overload."""
    name = str(target)
    return name.removesuffix(".default") if name.startswith(f"{ops.NAMESPACE}.") else name


def kind_of(args: ModelArgs, layer: int) -> str:
    """ "CSA, score" and the like; layers of one kind are one graph."""
    ratio = args.compress_ratios[layer]
    released = {0: "sliding", 4: "CSA", 128: "HCA"}
    attention = released.get(ratio, f"{'CSA' if ratio in CSA_RATIOS else 'HCA'} {ratio}")
    return (
        "MTP"
        if layer >= args.n_layers
        else f"{attention}, {'hash' if layer < args.n_hash_layers else 'score'}"
    )


def kinds(args: ModelArgs) -> dict[str, int]:
    """Kind -> how many layers are of it."""
    return collections.Counter(
        kind_of(args, layer) for layer in range(args.n_layers + args.n_mtp_layers)
    )


def one_of_each(args: ModelArgs) -> ModelArgs:
    """The same model with a single layer of every kind."""
    first = {kind_of(args, layer): layer for layer in reversed(range(args.n_layers))}
    layers = sorted(first.values())
    ratios = [args.compress_ratios[layer] for layer in layers] + list(
        args.compress_ratios[args.n_layers :]
    )
    hashed = sum(layer < args.n_hash_layers for layer in layers)
    return dataclasses.replace(
        args, n_layers=len(layers), n_hash_layers=hashed, compress_ratios=tuple(ratios)
    )


def index_of(node: torch.fx.Node, args: ModelArgs) -> int | None:
    """The layer that a node belongs to, forward or backward, MTP blocks counted on; None before and after the layers."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    for path, _ in stack.values():
        parts = path.replace("[", ".").replace("]", "").split(".")
        for name, offset in (("layers", 0), ("mtp", args.n_layers)):
            if name in parts[:-1] and parts[parts.index(name) + 1].isdigit():
                return offset + int(parts[parts.index(name) + 1])
    return None


def layer_of(node: torch.fx.Node, args: ModelArgs) -> str:
    """The kind of layer that a node belongs to; "rest" for what comes before and after the layers."""
    layer = index_of(node, args)
    return "rest" if layer is None else kind_of(args, layer)


def is_view(node: torch.fx.Node) -> bool:
    return node.target.is_view or name_of(node.target) == "aten._unsafe_view.default"


def values(node: torch.fx.Node) -> list[torch.Tensor]:
    return [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def flops_of(node: torch.fx.Node) -> int:
    """Products and sums, by the formulas of torch.utils.flop_counter and of our ops; elementwise work is not counted."""
    formula = flop_registry.get(node.target.overloadpacket)
    if formula is None:
        return 0
    args, kwargs = tree_map(
        lambda a: a.meta["val"] if isinstance(a, torch.fx.Node) else a,
        (node.args, dict(node.kwargs)),
    )
    return formula(*args, **kwargs, out_val=node.meta["val"])


REPEATED = {
    "dsv4.moe_backward": 2 / 8,
    "dsv4.sparse_attn_backward": 1 / 5,
    "dsv4.linear_cross_entropy_backward": 1 / 3,
}


def keys(
    args: ModelArgs, ratio: int, shape: Shape, first: int | None, indexer: bool = False
) -> int:
    """How many keys (for the indexer: entries) the tokens of one row meet, summed, in a layer of this ratio.

    first is the position of the first token: each sees its window and its entries back to position 0. None: all of the
    window and of the entries for every token, which is what the ops' FLOP formulas count, for they know shapes only.
    """
    entries = -(-shape.context // ratio) if ratio else 0
    most = min(entries, args.index_topk) if ratio in CSA_RATIOS and not indexer else entries
    window = 0 if indexer else args.window_size
    if first is None:
        return shape.length * (window + most)
    return sum(
        min(window, t + 1) + (min(most, (t + 1) // ratio) if ratio else 0)
        for t in range(first, first + shape.length)
    )


def needed(node: torch.fx.Node, args: ModelArgs, phase: str, shape: Shape) -> float:
    """The part of flops_of(node) that rooflines count: no MTP block, nothing that a backward repeats, and visible pairs only.

    A prompt and a training row begin at position 0 and are one document; decode and verify stand at the end of a full cache.
    """
    name, layer = name_of(node.target), index_of(node, args)
    if layer is not None and layer >= args.n_layers:
        return 0.0
    part = 1.0 - REPEATED.get(name, 0)
    if name.startswith("dsv4.linear_cross_entropy"):
        part /= 1 + args.n_mtp_layers  # the MTP block's loss stands outside of it
    if name.startswith(("dsv4.sparse_attn", "dsv4.indexer_topk")):
        first, indexer = (
            0 if phase in ("prefill", "train") else shape.context - shape.length,
            name == "dsv4.indexer_topk",
        )
        counted, seen = (
            keys(args, args.compress_ratios[layer], shape, at, indexer) for at in (None, first)
        )
        part *= seen / counted
    return part


def largest(captured: Captured, model: Transformer) -> tuple[int, str]:
    """Bytes and description of the largest value that an operator makes; parameters, caches and their gradients excepted."""
    known = {tuple(t.shape) for t in (*model.parameters(), *model.buffers())}
    made = [
        (v.nbytes, f"{name_of(node.target)} {list(v.shape)} {str(v.dtype)[6:]}")
        for node in captured.calls()
        if not is_view(node)
        for v in values(node)
        if tuple(v.shape) not in known
    ]
    return max(made, default=(0, ""))


def saved(captured: Captured, times: Callable[[torch.fx.Node], float] = lambda node: 1) -> int:
    """Bytes of activations that a training forward keeps for its backward; parameters and inputs cost nothing more.

    times(node): how often a value counts.
    """
    if len(captured.graphs) < 2:
        return 0
    forward = captured.graphs[0].graph
    (output,) = (node for node in forward.nodes if node.op == "output")

    def origin(node):  # what a chain of views looks at
        while (
            node.op == "call_function"
            and isinstance(node.target, torch._ops.OpOverload)
            and is_view(node)
        ):
            node = node.args[0]
        return node

    kept = {origin(node) for node in tree_leaves(output.args) if isinstance(node, torch.fx.Node)}
    return round(
        sum(
            v.nbytes * times(node)
            for node in kept
            if node.op != "placeholder"
            for v in values(node)
        )
    )


def waits(name: str) -> bool:
    """Whether an operator makes the host wait for a GPU."""
    return any(name == f"aten.{sync}" or name.startswith(f"aten.{sync}.") for sync in SYNCS)


def faults(captured: Captured) -> list[str]:
    """What must not be in a graph: operators that wait for the device, and symbolic sizes or values. Empty if all is well."""
    found = []
    for node in captured.nodes():
        name = name_of(node.target)
        calls = [
            name_of(op) for op in (node.target, *node.args) if isinstance(op, torch._ops.OpOverload)
        ]  # with_effects(.., op, ..)
        found += [f"host sync {call}: {where(node)}" for call in calls if waits(call)]
        if isinstance(node.target, torch._ops.HigherOrderOperator) and name in BRANCHES:
            found.append(f"branch on data {name}: {where(node)}")
        for v in tree_leaves(node.meta.get("val")):
            if (
                isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool))
                or isinstance(v, torch.Tensor)
                and free_symbols(v)
            ):
                found.append(f"symbolic value in {name}: {where(node)}")
    return found


def where(node: torch.fx.Node) -> str:
    """The line of this project that a node comes from."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    ours = [
        f"{lines[i]} {lines[i + 1] if i + 1 < len(lines) else ''}"
        for i in range(len(lines))
        if lines[i].startswith("File")
    ]
    return ours[-1] if ours else node.format_node() or str(node)


def census(captured: Captured, args: ModelArgs) -> dict[str, dict[str, dict[str, int]]]:
    """{kind of layer or "rest": {"opaque": {name: count}, "aten": {name: count}}}, for one layer of the kind.

    Layers of a kind may differ by a node, such as the first gradient that is added to no other: then it is their mean.
    """
    count: dict = collections.defaultdict(
        lambda: {"opaque": collections.Counter(), "aten": collections.Counter()}
    )
    for node in captured.calls():
        name = name_of(node.target)
        count[layer_of(node, args)]["opaque" if name.startswith(ops.NAMESPACE) else "aten"][
            name
        ] += 1
    layers = kinds(args)
    mean = lambda n, of: n / of if n % of else n // of
    return {
        kind: {
            group: {name: mean(n, layers.get(kind, 1)) for name, n in sorted(counter.items())}
            for group, counter in groups.items()
        }
        for kind, groups in sorted(count.items())
    }


# ---------------------------------------------------------------------------------------------------------------------
# Compiled and run


def session(model: Transformer, phase: str, cfg) -> Iterator[Callable]:
    """The phase compiled as cfg says, as calls that between them meet every boundary: yields them one by one."""
    args, shape = model.args, shape_of(model.args, phase)
    device, random = model.embed.weight.device, torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(
        2, args.vocab_size, (shape.batch, shape.length), generator=random
    ).to(device)
    if phase == "train":
        model.train()
        step = compile_train_step(model, Optimizer(model), cfg)
        for i in range(3):
            docs = (
                (torch.arange(shape.length) >= 7 + 60 * i)
                .long()[None]
                .repeat(shape.batch, 1)
                .to(device)
            )
            yield lambda: step(draw(), draw(), docs, torch.tensor(1e-3 / (i + 1), device=device))
        return
    model.eval().setup_caches(shape.batch, shape.context)
    run = {"prefill": compile_prefill, "decode": compile_decode, "verify": compile_verify}[phase](
        model, cfg
    )
    last = shape.context - shape.length
    for at in sorted(
        {
            min(p, last)
            for p in (
                0,
                3,
                4,
                5,
                args.window_size - 1,
                args.window_size,
                2 * args.window_size - 1,
                last,
            )
        }
    ) + [0]:
        for lengths in (shape.length, max(1, shape.length - 1)):
            full = torch.full((shape.batch,), at, device=device)
            yield lambda: run(draw(), full, torch.full_like(full, lengths))


def args_of(config: str) -> ModelArgs:
    """The architecture of a name, of a name with another depth ("tiny:43"), or of a checkpoint folder."""
    name, colon, depth = config.partition(":")
    require(
        name,
        f"no model is called {config!r}: choose from {', '.join(NAMED)}, or name a checkpoint folder",
    )
    if name not in NAMED:
        return ModelArgs.from_json(config)
    args = NAMED[name]()
    if not colon:
        return args
    require(
        depth.isdigit() and int(depth) >= args.n_hash_layers,
        f"{config}: {depth!r} is no number of layers from {args.n_hash_layers} on",
    )
    ratios, n = args.compress_ratios[: args.n_layers], int(depth)
    ratios = (ratios + ratios[-2:] * n)[:n]  # goes on as the last two layers alternate
    return dataclasses.replace(
        args, n_layers=n, compress_ratios=ratios + args.compress_ratios[args.n_layers :]
    )


def build(config: str) -> Transformer:
    """A model to run: random weights for a name, the weights of a folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.partition(":")[0] not in NAMED:
        return load(
            config, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16
        )
    torch.manual_seed(0)
    with torch.device(device):
        return Transformer(args_of(config))


def require_runnable(config: str, preset: str) -> None:
    """A ValueError if this machine cannot run the preset, or the folder lacks weights: before minutes are spent on the rest."""
    require(
        not PRESETS[preset].cudagraphs or torch.cuda.is_available(),
        f"--preset {preset} needs a CUDA device, and there is none here: choose another, or --no-run",
    )
    if config.partition(":")[0] not in NAMED:
        folder, args = open_folder(config)
        check(folder, checkpoint_tensors(empty_model(args)))


def recompiles(model: Transformer, phase: str, preset: str) -> int:
    """How often the phase's session compiles anew after its first call, with Dynamo's guards kept, which Phase drops.

    Guards belong to what Dynamo captures, so nothing needs to be generated.
    """
    cfg, count = PRESETS[preset], CompileCount()
    cfg = dataclasses.replace(cfg, backend=cfg.backend and "eager", cudagraphs=False)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        recompile_limit=1 << 10
    ):  # a limit would end the session, not count
        for i, call in enumerate(session(model, phase, cfg)):
            call()
            if i == 0:
                count.warm()
    return count.recompiles


def measure(config: str, phase: str, preset: str) -> dict:
    """Compile the phase in this process and run its session: seconds to the first result, graphs, kernels, recompiles."""
    from torch._inductor import metrics

    stats.choose_threads(0)
    model, count, begun = build(config), None, 0.0
    result: dict = {}
    for i, call in enumerate(session(model, phase, PRESETS[preset])):
        if i == 0:
            count, begun = CompileCount(), time.perf_counter()
            metrics.reset()
        call()
        if i == 0:
            result["compile_s"] = time.perf_counter() - begun
    result |= {
        "run_graphs": count.graphs,
        "run_breaks": count.breaks,
        "kernels": metrics.generated_kernel_count,
        "cache_misses": counters["inductor"]["fxgraph_cache_miss"],
    }
    return result | {"recompiles": recompiles(model, phase, preset)}


def measured(
    config: str, phase: str, preset: str, say: Callable[[str], None], trace: Path | None = None
) -> dict:
    """`measure` in two processes that share a new cache: what it costs cold, then warm. trace: a folder for generated code."""
    if config.partition(":")[0] not in NAMED:
        config = os.path.abspath(config)  # the processes start elsewhere
    script = "import json, sys; from tools import report; print(json.dumps(report.measure(*sys.argv[1:])))"
    with tempfile.TemporaryDirectory() as folder:
        env, runs = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}, []
        for state in ("cold", "warm"):
            say(f"compiling {phase}, {state} ...")
            done = subprocess.run(
                [sys.executable, "-c", script, config, phase, preset],
                capture_output=True,
                text=True,
                env=env,
                cwd=Path(__file__).parent.parent,
            )
            if done.returncode:
                say(done.stderr.strip())
                raise ChildProcessError(
                    f"compiling {phase} of {config} failed, see above: "
                    f"{(done.stderr.strip() or 'no message').splitlines()[-1]}"
                )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        if trace:
            (trace / f"{phase}_code").mkdir(parents=True, exist_ok=True)
            for file in (*Path(folder).glob("??/*.main.cpp"), *Path(folder).glob("??/*.py")):
                shutil.copy(file, trace / f"{phase}_code")
    cold, warm = runs
    return {key: cold[key] for key in ("run_graphs", "run_breaks", "recompiles", "kernels")} | {
        "compile_cold_s": cold["compile_s"],
        "compile_warm_s": warm["compile_s"],
        "warm_cache_misses": warm["cache_misses"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report_phase(
    args: ModelArgs, phase: str, full: bool = False, trace: Path | None = None
) -> dict:
    """What is seen of one phase; see the module's docstring. trace: a folder for the graphs."""
    shape, begun = shape_of(args, phase), time.perf_counter()
    partial = not full and args.n_layers > 12
    captured, model = capture_fake(one_of_each(args) if partial else args, phase, shape)
    seen, layers = model.args, kinds(args)
    times = {kind: n / kinds(seen)[kind] for kind, n in layers.items()} | {"rest": 1}
    flops = useful = nodes = 0.0
    for node in captured.calls():
        often = times[layer_of(node, seen)]
        flops += flops_of(node) * often
        useful += flops_of(node) * needed(node, seen, phase, shape) * often
        nodes += often
    counts, (nbytes, what) = census(captured, seen), largest(captured, model)
    opaque = collections.Counter()
    for kind, groups in counts.items():
        for name, n in groups["opaque"].items():
            opaque[name] += round(n * layers.get(kind, 1))
    if trace:
        trace.mkdir(parents=True, exist_ok=True)
        for graph, part in zip(captured.graphs, ("forward", "backward")):
            (trace / f"{phase}_{part}.py").write_text(graph.print_readable(print_output=False))
    return {
        **shape._asdict(),
        "captured_layers": seen.n_layers,
        "graphs": captured.count,
        "breaks": captured.breaks,
        "faults": faults(captured),
        "operators": round(nodes),
        "opaque": dict(sorted(opaque.items())),
        "layers": {
            kind: {"count": layers.get(kind, 1), **groups} for kind, groups in counts.items()
        },
        "largest_bytes": nbytes,
        "largest": what,
        "flops": round(flops),
        "flops_per_token": flops / shape.batch / shape.length,
        "needed_flops_per_token": useful / shape.batch / shape.length,
        "saved_bytes": saved(captured, lambda node: times[layer_of(node, seen)])
        if phase == "train"
        else None,
        "capture_s": time.perf_counter() - begun,
    }


def saved_bytes(args: ModelArgs, recompute: str) -> int:
    """See `saved`, with activations computed again as compile_train_step does; from one layer of each kind."""
    captured, model = capture_fake(
        one_of_each(args), "train", shape_of(args, "train"), recompute=recompute
    )
    seen = kinds(model.args)
    times = {kind: n / seen[kind] for kind, n in kinds(args).items()} | {"rest": 1}
    return saved(captured, lambda node: times[layer_of(node, model.args)])


def report(
    config: str,
    phases=PHASES,
    preset: str = "default",
    full: bool = False,
    trace: str | None = None,
    compiled: bool = True,
    say: Callable[[str], None] = lambda message: None,
) -> dict:
    """config: see args_of -> {"config", "preset", "phases": {phase: ...}, "versions"}."""
    args = args_of(config)
    run = compiled and args.dim < 4096
    if run:
        require_runnable(config, preset)
    result = {
        "config": config,
        "preset": preset,
        "versions": stats.versions(),
        "layers": dict(kinds(args)),
        "phases": {},
    }
    for phase in phases:
        say(f"capturing {phase} ...")
        result["phases"][phase] = report_phase(args, phase, full, Path(trace) if trace else None)
        if phase == "train":
            result["phases"][phase] |= {
                f"saved_{how}_bytes": saved_bytes(args, how) for how in ("selective", "full")
            }
        if run:
            result["phases"][phase] |= measured(
                config, phase, preset, say, Path(trace) if trace else None
            )
    return result


ROWS = [  # what the table shows: label, key, unit
    ("new tokens", "length", ""),
    ("context", "context", ""),
    ("graphs captured", "graphs", ""),
    ("graph breaks", "breaks", ""),
    ("operators", "operators", ""),
    ("largest value", "largest_bytes", "MB"),
    ("FLOP per token", "flops_per_token", "M"),
    ("FLOP needed per token", "needed_flops_per_token", "M"),
    ("saved for backward", "saved_bytes", "MB"),
    ("  --recompute selective", "saved_selective_bytes", "MB"),
    ("  --recompute full", "saved_full_bytes", "MB"),
    ("graphs run", "run_graphs", ""),
    ("recompiles", "recompiles", ""),
    ("kernels generated", "kernels", ""),
    ("compile, cold", "compile_cold_s", "s"),
    ("compile, warm", "compile_warm_s", "s"),
    ("capture alone", "capture_s", "s"),
]
NOTE = "FLOP needed: as a roofline counts; no MTP block, nothing computed twice, no pair that the causal mask hides"


def table(result: dict) -> str:
    """The report for people."""
    phases = result["phases"]

    def cell(value, unit):
        if value is None:
            return "-"
        if unit:
            return f"{value / {'MB': 1e6, 'M': 1e6, 's': 1}[unit]:,.1f} {unit}"
        return f"{value:,}"

    lines = [["", *phases]]
    lines += [
        [label, *(cell(phase.get(key), unit) for phase in phases.values())]
        for label, key, unit in ROWS
        if any(phase.get(key) is not None for phase in phases.values())
    ]
    names = sorted({name for phase in phases.values() for name in phase["opaque"]})
    lines += [
        [name, *(cell(phase["opaque"].get(name), "") for phase in phases.values())]
        for name in names
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = "\n".join(
        "  ".join(
            value.ljust(w) if i == 0 else value.rjust(w)
            for i, (value, w) in enumerate(zip(line, widths))
        )
        for line in lines
    )
    wrong = [
        f"{phase}: {fault}" for phase, numbers in phases.items() for fault in numbers["faults"]
    ]
    layers = ", ".join(f"{n} {kind}" for kind, n in result["layers"].items())
    head = f"{result['config']}: {layers}; preset {result['preset']}, torch {result['versions']['torch']}"
    return "\n".join([head, text, NOTE, *wrong])


COUNTS = (
    "graphs",
    "breaks",
    "run_breaks",
    "recompiles",
    "warm_cache_misses",
)  # may not grow at all, others by a factor:
MAY_GROW = {
    "operators": 1.1,
    "largest_bytes": 1.0,
    "flops": 1.0,
    "saved_bytes": 1.0,
    "saved_selective_bytes": 1.0,
    "saved_full_bytes": 1.0,
    "kernels": 1.1,
    "run_graphs": 1.0,
}
SIZES = ("batch", "length", "context", "captured_layers")
TIMES = ("compile_cold_s", "compile_warm_s")


def read(path: str) -> dict:
    """An earlier report: what --json printed, or a file of bench/results. A ValueError if it is not all that compare needs."""

    def numbers(values, names=None):
        return isinstance(values, dict) and all(
            isinstance(values.get(name), (int, float, type(None))) for name in names or values
        )

    try:
        text = Path(path).read_text()
        try:
            old = json.loads(text)
        except ValueError:
            old = json.loads(text.splitlines()[-1])
        require(
            isinstance(old, dict)
            and numbers(old.get("layers"))
            and isinstance(old.get("phases"), dict),
            "it has no layers or no phases",
        )
        for name, phase in old["phases"].items():
            sound = (
                numbers(phase, (*COUNTS, *MAY_GROW, *SIZES, *TIMES))
                and isinstance(phase.get("layers"), dict)
                and all(
                    isinstance(groups, dict)
                    and numbers(groups.get("opaque"))
                    and numbers(groups.get("aten"))
                    for groups in phase["layers"].values()
                )
            )
            require(sound, f"its {name} lacks layers, or figures are no numbers")
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: is not the JSON of an earlier report ({error})") from None
    return old


def compare(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """(what moved, which of it is a regression), one line each. Times are told, not judged: they belong to a machine.

    Another model and other sizes are regressions too, and all that is said: their numbers would prove nothing.
    """
    moved, worse = [], []

    def tell(line, bad):
        moved.append(line)
        if bad:
            worse.append(line)

    def figure(value):
        return "not measured" if value is None else f"{value:,}"

    settings = [
        (report.get("config"), report.get("preset"), (report.get("versions") or {}).get("torch"))
        for report in (old, new)
    ]
    for key, a, b in zip(("config", "preset", "torch"), *settings):
        if a != b:
            tell(f"{key} {a} -> {b}", False)
    if old["layers"] != new["layers"]:
        a, b = (
            ", ".join(f"{n} {kind}" for kind, n in report["layers"].items())
            for report in (old, new)
        )
        tell(f"another model, nothing else is compared: {a} -> {b}", True)
        return moved, worse
    for name, now in new["phases"].items():
        before = old["phases"].get(name)
        if before is None:
            tell(f"{name}: new", False)
            continue
        sizes = [
            f"{key} {before.get(key)} -> {now.get(key)}"
            for key in SIZES
            if before.get(key) != now.get(key)
        ]
        if sizes:
            tell(f"{name}: {', '.join(sizes)}: not compared", True)
            continue
        for key in (*COUNTS, *MAY_GROW):
            a, b = before.get(key), now.get(key)
            if a != b:
                tell(
                    f"{name}: {key} {figure(a)} -> {figure(b)}",
                    None not in (a, b) and b > a * MAY_GROW.get(key, 1.0),
                )
        for kind in sorted({*before["layers"], *now["layers"]}):
            a, b = (phase["layers"].get(kind, {}) for phase in (before, now))
            for group in ("opaque", "aten"):
                for op in sorted({*a.get(group, {}), *b.get(group, {})}):
                    x, y = a.get(group, {}).get(op, 0), b.get(group, {}).get(op, 0)
                    if (
                        x != y
                    ):  # another number of our nodes is another graph; aten's only matter by their sum
                        tell(f"{name}: {kind}: {op} {x:g} -> {y:g}", group == "opaque")
        for fault in now["faults"]:
            tell(f"{name}: {fault}", True)
        for key in TIMES:
            a, b = before.get(key), now.get(key)
            if a and b and not 0.8 < b / a < 1.25:
                tell(f"{name}: {key} {a:.1f} -> {b:.1f}", False)
    for name in sorted({*old["phases"]} - {*new["phases"]}):
        tell(f"{name}: not reported any more", False)
    return moved, worse


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="compile_config.py report",
        description="Report graphs, operators, kernels, memory, FLOPs and compile seconds.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--config",
        default="tiny",
        metavar="NAME|DIR",
        help=f"{', '.join(NAMED)}, or a checkpoint folder",
    )
    add("--phase", default=",".join(PHASES), metavar="A,B", help=",".join(PHASES))
    add("--preset", default="default", choices=PRESETS)
    add(
        "--full",
        action="store_true",
        help="capture every layer of deep models, not one of each kind",
    )
    add("--no-run", action="store_true", help="capture only: compile and run nothing")
    add("--trace", metavar="DIR", help="keep captured graphs and generated code here, to read")
    add(
        "--compare",
        metavar="OLD.json",
        help="say what moved since an earlier --json; exit 1 on a regression",
    )
    add("--json", action="store_true", help="the last line of standard output is one JSON object")
    flags = parser.parse_args(argv)
    flags.phases = flags.phase.split(",")
    for phase in flags.phases:
        require(phase in PHASES, f"--phase {phase!r}: choose from {', '.join(PHASES)}")
    return flags


def read_comparable(path: str, config: str) -> dict:
    """The earlier report that --compare names, which must be of the same layers."""
    old = read(path)
    require(
        old["layers"] == kinds(args_of(config)),
        f"--compare {path}: reports {old.get('config')}, whose layers are not those of {config}",
    )
    return old


def make_folder(path: str) -> None:
    """The folder that --trace names."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--trace {path}: cannot be made a folder ({error.strerror})") from None


def run(argv: list[str] | None) -> int:
    flags = parse(argv)
    old = read_comparable(flags.compare, flags.config) if flags.compare else None
    if flags.trace:
        make_folder(flags.trace)

    def log(message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    result = report(
        flags.config, flags.phases, flags.preset, flags.full, flags.trace, not flags.no_run, log
    )
    out = sys.stderr if flags.json else sys.stdout
    print(table(result), file=out)
    moved, worse = compare(old, result) if old else ([], [])
    for line in moved:
        print(("WORSE  " if line in worse else "moved  ") + line, file=out)
    if flags.json:
        print(json.dumps(result), flush=True)
    return 1 if worse or any(phase["faults"] for phase in result["phases"].values()) else 0


def main(argv: list[str] | None = None) -> int:
    """`compile_config.py report`. -> 0; 1 on a regression; 2 after a one-line message on bad input."""
    return cli.main("compile_config.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
