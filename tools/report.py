"""The numbers behind `python compile_config.py report`: a phase as captured, and as it runs.

Captured: see tools/capture.py. A deep model is captured with one layer of each kind, whose numbers
count as often as the kind occurs; --full captures every layer.

Lowered: layers of Flash and Pro, in bf16 and with packed weights, also for a GPU that is not there:
launches and bytes (tools/launches.py, in a process of its own).

Run: where the weights fit (tiny, debug, a folder), each phase is also compiled in two fresh
processes, the second of which finds the cache of the first, and run through a session. Recompiles
are counted in a session that keeps Dynamo's guards.
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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch._dynamo.utils import counters

import ops
from checkpoint import load, open_folder
from compile_config import (
    PRESETS,
    CompileConfig,
    compile_decode,
    compile_prefill,
    compile_train_step,
    compile_verify,
)
from model import ModelArgs, Transformer
from ops.registry import require
from tools import cli, stats
from tools.capture import (
    PHASES,
    PRODUCTION_DIM,
    Captured,
    Shape,
    capture_fake,
    census,
    faults,
    flops_of,
    kinds,
    largest,
    needed,
    one_of_each,
    repeats,
    saved,
    shape_of,
)
from tools.compile_count import CompileCount
from tools.compile_function import MAX_WHOLE_GRAPH_LAYERS
from tools.gpu_report import (
    BANDWIDTH,
    GPU_NOTE,
    answer_of,
    compare_launches,
    estimate,
    launch_lines,
    lowered,
)
from tools.released_layout import check, checkpoint_tensors, empty_model
from training.optim import Optimizer

NAMED: dict[str, Callable[[], ModelArgs]] = {
    "tiny": ModelArgs.tiny,
    "debug": ModelArgs.debug,
    "flash": ModelArgs.flash,
    "pro": ModelArgs.pro,
}


# --------------------------------------------------------------------------------------------------
# Compiled and run


def session(model: Transformer, phase: str, cfg: CompileConfig) -> Iterator[Callable]:
    """The phase compiled as cfg says: yields calls that between them meet every boundary."""
    return train_session(model, cfg) if phase == "train" else cached_session(model, phase, cfg)


def token_source(model: Transformer, shape: Shape) -> Callable[[], torch.Tensor]:
    random, device = torch.Generator().manual_seed(0), model.embed.weight.device
    size = shape.batch, shape.length

    def draw() -> torch.Tensor:
        return torch.randint(2, model.args.vocab_size, size, generator=random).to(device)

    return draw


def train_session(model: Transformer, cfg: CompileConfig) -> Iterator[Callable]:
    """Steps with documents of other lengths and other rates."""
    shape, device = shape_of(model.args, "train"), model.embed.weight.device
    draw = token_source(model, shape)
    step = compile_train_step(model.train(), Optimizer(model), cfg)
    for i in range(3):
        second = torch.arange(shape.length) >= 7 + 60 * i
        doc_ids = second.long()[None].repeat(shape.batch, 1).to(device)
        lr = torch.tensor(1e-3 / (i + 1), device=device)

        def call(doc_ids=doc_ids, lr=lr):
            return step(draw(), draw(), doc_ids, lr)

        yield call


def cached_session(model: Transformer, phase: str, cfg: CompileConfig) -> Iterator[Callable]:
    """Calls at the boundaries of windows and entries, of full and of shorter lengths."""
    shape, device = shape_of(model.args, phase), model.embed.weight.device
    draw = token_source(model, shape)
    model.eval().setup_caches(shape.batch, shape.context)
    compile_phase = {"prefill": compile_prefill, "decode": compile_decode, "verify": compile_verify}
    run = compile_phase[phase](model, cfg)
    last, window = shape.context - shape.length, model.args.window_size
    boundaries = 0, 3, 4, 5, window - 1, window, 2 * window - 1, last
    positions = sorted({min(position, last) for position in boundaries})
    for position in (*positions, 0):
        input_pos = torch.full((shape.batch,), position, device=device)
        for length in (shape.length, max(1, shape.length - 1)):

            def call(input_pos=input_pos, length=length):
                return run(draw(), input_pos, torch.full_like(input_pos, length))

            yield call


def args_of(config: str) -> ModelArgs:
    """The architecture of a name, of a name with another depth ("tiny:43"), or of a folder."""
    name, colon, depth = config.partition(":")
    require(
        bool(name),
        f"no model is called {config!r}: choose from {', '.join(NAMED)}, "
        "or name a checkpoint folder",
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
    n = int(depth)
    ratios, mtp_ratios = (
        args.compress_ratios[: args.n_layers],
        args.compress_ratios[args.n_layers :],
    )
    ratios = (ratios + ratios[-2:] * n)[:n]  # goes on as the last two layers alternate
    return dataclasses.replace(args, n_layers=n, compress_ratios=ratios + mtp_ratios)


def is_folder(config: str) -> bool:
    return config.partition(":")[0] not in NAMED


def build(config: str) -> Transformer:
    """A model to run: random weights for a name, the weights of a folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_folder(config):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return load(config, device=device, dtype=dtype)
    torch.manual_seed(0)
    with torch.device(device):
        return Transformer(args_of(config))


def require_runnable(config: str, preset: str) -> None:
    """A ValueError if this machine cannot run the preset, or the folder lacks weights.

    Raised before minutes are spent on the rest.
    """
    require(
        not PRESETS[preset].cudagraphs or torch.cuda.is_available(),
        f"--preset {preset} needs a CUDA device, and there is none here: "
        "choose another, or --no-run",
    )
    if is_folder(config):
        folder, args = open_folder(config)
        check(folder, checkpoint_tensors(empty_model(args)))


def recompiles(model: Transformer, phase: str, preset: str) -> int:
    """Compiles of the phase's session after its first call, with the guards that Phase drops.

    Guards belong to Dynamo's capture, so no code needs to be generated.
    """
    cfg, count = PRESETS[preset], CompileCount()
    cfg = dataclasses.replace(cfg, backend=cfg.backend and "eager", cudagraphs=False)
    torch._dynamo.reset()
    # A limit would end the session instead of counting.
    with torch._dynamo.config.patch(recompile_limit=1 << 10):
        for i, call in enumerate(session(model, phase, cfg)):
            call()
            if i == 0:
                count.warm()
    return count.recompiles


def measure(config: str, phase: str, preset: str) -> dict:
    """Compile the phase in this process and run its session.

    -> seconds to the first result, graphs, breaks, kernels, cache misses, recompiles
    """
    from torch._inductor import metrics  # imports all of Inductor

    stats.choose_threads(0)
    model = build(config)
    calls = session(model, phase, PRESETS[preset])
    first = next(calls)
    count, start = CompileCount(), time.perf_counter()
    metrics.reset()
    first()
    seconds = time.perf_counter() - start
    for call in calls:
        call()
    return {
        "compile_s": seconds,
        "run_graphs": count.graphs,
        "run_breaks": count.breaks,
        "kernels": metrics.generated_kernel_count,
        "cache_misses": counters["inductor"]["fxgraph_cache_miss"],
        "recompiles": recompiles(model, phase, preset),
    }


MEASURE = """
import json, sys
from tools import cli, report
try:
    print(json.dumps(report.measure(*sys.argv[1:])))
except Exception as error:
    lacks = cli.lacking_resource(error)
    if lacks is None:
        raise
    sys.exit(lacks)
"""


def measured(
    config: str, phase: str, preset: str, log: Callable[[str], None], trace: Path | None = None
) -> dict:
    """`measure` in two processes that share a new cache: cold, then warm.

    trace   a folder for generated code
    """
    if is_folder(config):
        config = os.path.abspath(config)  # the processes start elsewhere
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for state in ("cold", "warm"):
            log(f"compiling {phase}, {state} ...")
            done = subprocess.run(
                [sys.executable, "-c", MEASURE, config, phase, preset],
                capture_output=True,
                text=True,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder},
                cwd=Path(__file__).parent.parent,
            )
            runs.append(answer_of(done, f"compiling {phase} of {config}", log))
        if trace:
            to = trace / f"{phase}_code"
            to.mkdir(parents=True, exist_ok=True)
            for file in (*Path(folder).glob("??/*.main.cpp"), *Path(folder).glob("??/*.py")):
                shutil.copy(file, to)
    cold, warm = runs
    return {key: cold[key] for key in ("run_graphs", "run_breaks", "recompiles", "kernels")} | {
        "compile_cold_s": cold["compile_s"],
        "compile_warm_s": warm["compile_s"],
        "warm_cache_misses": warm["cache_misses"],
    }


# --------------------------------------------------------------------------------------------------
# The report


def report_phase(
    args: ModelArgs, phase: str, full: bool = False, trace: Path | None = None
) -> dict:
    """All that is captured of one phase; see the module's docstring. trace: a folder for graphs."""
    shape, start = shape_of(args, phase), time.perf_counter()
    partial = not full and args.n_layers > MAX_WHOLE_GRAPH_LAYERS
    captured, model = capture_fake(one_of_each(args) if partial else args, phase, shape)
    layers, repeat = kinds(args), repeats(args, model.args)
    flops = useful = nodes = 0.0
    for node in captured.calls():
        times = repeat.of(node)
        flops += flops_of(node) * times
        useful += flops_of(node) * needed(node, model.args, phase, shape) * times
        nodes += times
    counts = census(captured, model.args)
    opaque = collections.Counter()
    for kind, groups in counts.items():
        for name, n in groups["opaque"].items():
            opaque[name] += round(n * layers.get(kind, 1))
    nbytes, description = largest(captured, model)
    if trace:
        write_graphs(captured, phase, trace)
    return {
        **shape._asdict(),
        "captured_layers": model.args.n_layers,
        "graphs": captured.count,
        "breaks": captured.breaks,
        "faults": faults(captured),
        "operators": round(nodes),
        "opaque": dict(sorted(opaque.items())),
        "layers": {
            kind: {"count": layers.get(kind, 1), **groups} for kind, groups in counts.items()
        },
        "largest_bytes": nbytes,
        "largest": description,
        "flops": round(flops),
        "flops_per_token": flops / shape.batch / shape.length,
        "needed_flops_per_token": useful / shape.batch / shape.length,
        "saved_bytes": saved(captured, repeat.of) if phase == "train" else None,
        "capture_s": time.perf_counter() - start,
    }


def write_graphs(captured: Captured, phase: str, folder: Path) -> None:
    """To read: PHASE_forward.py, and PHASE_backward.py of training."""
    folder.mkdir(parents=True, exist_ok=True)
    for graph, part in zip(captured.graphs, ("forward", "backward"), strict=False):
        (folder / f"{phase}_{part}.py").write_text(graph.print_readable(print_output=False))


def saved_bytes(args: ModelArgs, recompute: str) -> int:
    """As `saved`, with activations computed again by compile_train_step's `recompute`.

    From one layer of each kind.
    """
    shape = shape_of(args, "train")
    captured, model = capture_fake(one_of_each(args), "train", shape, recompute=recompute)
    return saved(captured, repeats(args, model.args).of)


def report(
    config: str,
    phases=PHASES,
    preset: str = "default",
    full: bool = False,
    trace: str | None = None,
    compiled: bool = True,
    log: Callable[[str], None] = lambda message: None,
    gpu: str = "H200",
) -> dict:
    """config as in args_of -> {"config", "preset", "versions", "layers", "modes", "phases"}.

    gpu: of BANDWIDTH, for estimates
    """
    args = args_of(config)
    run = compiled and args.dim < PRODUCTION_DIM
    if run:
        require_runnable(config, preset)
    folder = Path(trace) if trace else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {
        "config": config,
        "preset": preset,
        "versions": stats.versions(),
        "layers": dict(kinds(args)),
        "modes": {"device": device, **ops.Table().modes_on(device)},
        "phases": {},
    }
    for phase in phases:
        log(f"capturing {phase} ...")
        numbers = report_phase(args, phase, full, folder)
        if phase == "train":
            for recompute in ("selective", "full"):
                numbers[f"saved_{recompute}_bytes"] = saved_bytes(args, recompute)
        if args.dim >= PRODUCTION_DIM:
            numbers |= lowered(args, phase, shape_of(args, phase), log)
            if phase == "decode":
                numbers["estimate"] = {"gpu": gpu, "tok_per_s": estimate(numbers, kinds(args), gpu)}
        if run:
            numbers |= measured(config, phase, preset, log, folder)
        result["phases"][phase] = numbers
    return result


ROWS = [  # of the table: label, key, unit
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
UNITS = {"MB": 1e6, "M": 1e6, "s": 1}
NOTE = (
    "FLOP needed: as a roofline counts; no MTP block, nothing computed twice, "
    "no pair that the causal mask hides"
)


def cell(value, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value / UNITS[unit]:,.1f} {unit}" if unit else f"{value:,}"


def describe_layers(layers: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in layers.items())


def describe_modes(modes: dict[str, str]) -> str:
    """Ops by mode: "ops on cpu: cpu (moe, ...), reference (rope, ...)"."""
    by_mode: dict[str, list[str]] = {}
    for op, mode in sorted(modes.items()):
        if op != "device":
            by_mode.setdefault(mode, []).append(op)
    listed = (f"{mode} ({', '.join(names)})" for mode, names in sorted(by_mode.items()))
    return f"modes of ops on {modes['device']}: {', '.join(listed)}"


def table(result: dict) -> str:
    """The report for people."""
    phases = result["phases"]
    lines = [["", *phases]]
    for label, key, unit in ROWS:
        figures = [phase.get(key) for phase in phases.values()]
        if any(figure is not None for figure in figures):
            lines.append([label, *(cell(figure, unit) for figure in figures)])
    for name in sorted({name for phase in phases.values() for name in phase["opaque"]}):
        lines.append([name, *(cell(phase["opaque"].get(name)) for phase in phases.values())])
    lines += launch_lines(phases)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            [label.ljust(widths[0])]
            + [value.rjust(width) for value, width in zip(figures, widths[1:], strict=True)]
        )
        for label, *figures in lines
    ]
    head = (
        f"{result['config']}: {describe_layers(result['layers'])}; preset {result['preset']}, "
        f"torch {result['versions']['torch']}"
    )
    modes = [describe_modes(result["modes"])] if result.get("modes") else []
    wrong = [f"{name}: {fault}" for name, phase in phases.items() for fault in phase["faults"]]
    notes = [NOTE] + [GPU_NOTE] * any(phase.get("launches") for phase in phases.values())
    return "\n".join([head, *text, *modes, *notes, *wrong])


# --------------------------------------------------------------------------------------------------
# Comparison with an earlier report


# These may not grow at all,
COUNTS = ("graphs", "breaks", "run_breaks", "recompiles", "warm_cache_misses")
# these by a factor.
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


def are_numbers(values, names=None) -> bool:
    """Whether values is a dict whose items (those of `names`) are numbers or None."""
    return isinstance(values, dict) and all(
        isinstance(values.get(name), (int, float, type(None))) for name in names or values
    )


def is_comparable(phase: dict) -> bool:
    if not are_numbers(phase, (*COUNTS, *MAY_GROW, *SIZES, *TIMES)):
        return False
    if not isinstance(phase.get("layers"), dict):
        return False
    return all(
        isinstance(groups, dict)
        and are_numbers(groups.get("opaque"))
        and are_numbers(groups.get("aten"))
        for groups in phase["layers"].values()
    )


def read(path: str) -> dict:
    """An earlier report: the output of --json, or a file of bench/results.

    A ValueError if it lacks anything that compare needs.
    """
    try:
        text = Path(path).read_text()
        try:
            old = json.loads(text)
        except ValueError:
            old = json.loads(text.splitlines()[-1])
        has_phases = isinstance(old, dict) and isinstance(old.get("phases"), dict)
        require(has_phases and are_numbers(old.get("layers")), "it has no layers or no phases")
        for name, phase in old["phases"].items():
            require(is_comparable(phase), f"its {name} lacks layers, or figures are no numbers")
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"{path}: is not the JSON of an earlier report ({error})") from None
    return old


class Changes:
    """Differences between two reports, and the regressions among them, one line each."""

    def __init__(self):
        self.moved: list[str] = []
        self.worse: list[str] = []

    def add(self, line: str, worse: bool) -> None:
        self.moved.append(line)
        if worse:
            self.worse.append(line)


def compare(old: dict, new: dict) -> tuple[list[str], list[str]]:
    """(changes, those of them that are regressions), one line each.

    Times are named, not judged: they belong to a machine. Another model and other sizes are
    regressions, too, and nothing else is compared then: the numbers would prove nothing.
    """
    changes = Changes()
    compare_settings(old, new, changes)
    if old["layers"] != new["layers"]:
        before, now = describe_layers(old["layers"]), describe_layers(new["layers"])
        changes.add(f"another model, nothing else is compared: {before} -> {now}", True)
        return changes.moved, changes.worse
    for name, now in new["phases"].items():
        if name in old["phases"]:
            compare_phases(name, old["phases"][name], now, changes)
        else:
            changes.add(f"{name}: new", False)
    for name in sorted({*old["phases"]} - {*new["phases"]}):
        changes.add(f"{name}: not reported any more", False)
    return changes.moved, changes.worse


def compare_settings(old: dict, new: dict, changes: Changes) -> None:
    def settings(report: dict) -> dict:
        versions = report.get("versions") or {}
        return {
            "config": report.get("config"),
            "preset": report.get("preset"),
            "torch": versions.get("torch"),
        }

    before, now = settings(old), settings(new)
    for key in before:
        if before[key] != now[key]:
            changes.add(f"{key} {before[key]} -> {now[key]}", False)
    before, now = old.get("modes"), new.get("modes")
    if before and now and before["device"] == now["device"]:
        for op in sorted(before.keys() & now.keys()):
            if before[op] != now[op]:
                changes.add(f"mode of {op} {before[op]} -> {now[op]}", False)


def compare_phases(name: str, before: dict, now: dict, changes: Changes) -> None:
    sizes = [
        f"{key} {before.get(key)} -> {now.get(key)}"
        for key in SIZES
        if before.get(key) != now.get(key)
    ]
    if sizes:
        changes.add(f"{name}: {', '.join(sizes)}: not compared", True)
        return

    def figure(value) -> str:
        return "not measured" if value is None else f"{value:,}"

    for key in (*COUNTS, *MAY_GROW):
        a, b = before.get(key), now.get(key)
        if a != b:
            grew = a is not None and b is not None and b > a * MAY_GROW.get(key, 1.0)
            changes.add(f"{name}: {key} {figure(a)} -> {figure(b)}", grew)
    compare_operators(name, before["layers"], now["layers"], changes)
    compare_launches(name, before.get("launches") or {}, now.get("launches") or {}, changes.add)
    for fault in now["faults"]:
        changes.add(f"{name}: {fault}", True)
    for key in TIMES:
        a, b = before.get(key), now.get(key)
        if a and b and not 0.8 < b / a < 1.25:
            changes.add(f"{name}: {key} {a:.1f} -> {b:.1f}", False)


def compare_operators(name: str, before: dict, now: dict, changes: Changes) -> None:
    """Another number of our nodes is another graph; aten's matter by their sum alone."""
    for kind in sorted({*before, *now}):
        for group in ("opaque", "aten"):
            old = before.get(kind, {}).get(group, {})
            new = now.get(kind, {}).get(group, {})
            for op in sorted({*old, *new}):
                a, b = old.get(op, 0), new.get(op, 0)
                if a != b:
                    changes.add(f"{name}: {kind}: {op} {a:g} -> {b:g}", group == "opaque")


# --------------------------------------------------------------------------------------------------
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
    about = "for estimates: " + ", ".join(BANDWIDTH)
    add("--gpu", default="H200", choices=BANDWIDTH, metavar="NAME", help=about)
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
        flags.config,
        flags.phases,
        flags.preset,
        flags.full,
        flags.trace,
        not flags.no_run,
        log,
        flags.gpu,
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
    """`compile_config.py report` -> 0; 1 on a regression; 2 after a one-line message."""
    return cli.main("compile_config.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
