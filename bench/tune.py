"""Choose the kernels' tiles and write them into ops/tuned.json.

    python -m bench.tune [--arch sm_90,gfx942] [--op sparse_attn] [--new]    by what the compiler makes of them: no GPU needed
    python -m bench.tune --measure [--only G1.5,G1.9]                by time, on the GPU that is here, at the shapes of bench.gpu

A kernel offers candidates (launch.tiles), from the largest to the smallest. Without a GPU the first one is taken that
compiles, fits into shared memory, keeps its matrix instructions, hardly spills and occupies every multiprocessor; if all
fall short, the one that does least.
Entries that the run does not come upon stay as they are; with --new all do, and only what the table lacks is chosen.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import sys

import torch

from bench import cases, gpu_cases, gpu_measure
from bench.offline import SHARED, TARGETS, all_calls, check_archs, compile_quietly
from bench.record import replace
from ops.launch import PROCESSORS, TUNED, Launch, arch, override_config, record_configs
from ops.registry import require
from tools import cli

IN_LOOPS, IN_ALL = 0.03, 0.05  # shares of instructions that may spill
CANNOT_RUN = 1000.0
assert gpu_cases  # fills CASES

Table = dict[tuple[str, str], dict]  # tiles by (kernel, key)


def shortcoming(found: dict, launch: Launch, where: str, tile: dict) -> float:
    """0 for a kernel as one wishes it, more the worse it is; found: what offline.compile_quietly says."""
    if (
        "error" in found
        or found["shared"] > SHARED[where] * 1024
        or found["dots"]
        and not found["matrix"]
    ):
        return CANNOT_RUN
    spills = found["spills"] / found["instructions"]
    adapts = any(
        "split" in name.lower() and name not in tile for name in launch.kernel.arg_names
    )  # to the GPU, by itself
    idle = 0.0 if adapts else max(0.0, 1 - math.prod(launch.grid) / PROCESSORS[where])
    return idle + (
        spills + found["spilling"] if spills > IN_ALL or found["spilling"] > IN_LOOPS else 0.0
    )


def by_resources(where: str, calls: list[cases.Call], known: dict | None = None) -> Table:
    """Tiles of all kernels that the calls launch on an architecture; a tile is judged by all that its call launches.
    known: of what is chosen already, by kernel, architecture and key."""
    table = {
        (name, key): tile
        for name, archs in (known or {}).items()
        for key, tile in archs.get(where, {}).items()
    }
    compiled = {}

    def worst(call: cases.Call, tile: dict) -> float:
        total = 0.0
        for launch in call.launches(where):
            key = f"{launch.name} {launch.specialization()}"
            if key not in compiled:
                compiled[key] = compile_quietly(launch, where)
            total += shortcoming(compiled[key], launch, where, tile)
        return total

    def open_questions(call: cases.Call) -> dict:
        with override_config(table), record_configs() as questions:
            call.launches(where)
        return {
            question: candidates
            for question, candidates in questions.items()
            if table.get(question) not in candidates
        }

    for call in calls:
        while questions := open_questions(call):  # an answer may change what is asked next
            question, candidates = next(iter(questions.items()))
            scores = []
            for tile in candidates:
                with override_config({**table, question: tile}):
                    scores.append(worst(call, tile))
                if not scores[-1]:
                    break
            table[question] = candidates[min(range(len(scores)), key=scores.__getitem__)]
            print(
                f"{where:7} {scores[-1]:.3f} {' '.join(question)} {table[question]}",
                file=sys.stderr,
                flush=True,
            )
    return table


_calls: list[cases.Call] = []  # what the forked workers find
_known: dict = {}


def _of_arch(where: str) -> Table:
    return by_resources(where, _calls, _known)


class Tuning(gpu_measure.Bench):
    """Times our side of every row with each candidate in turn, and keeps the fastest."""

    def __init__(self, toy: bool = False):
        super().__init__(toy)
        self.table: Table = {}

    def compare(self, row, sides, inputs, **_) -> dict:
        ours = next(iter(sides.values()))
        call = lambda: getattr(ours, "call", ours)(*inputs[0])

        def seconds(tile) -> float:
            try:
                with override_config({**self.table, question: tile}):
                    call()
                    return min(self.shot(call) for _ in range(10))
            except Exception as error:  # too large for this GPU
                print(f"{question} {tile}: {type(error).__name__}", file=sys.stderr)
                return float("inf")

        while True:
            with override_config(self.table), record_configs() as questions:
                call()
            left = [question for question in questions if question not in self.table]
            if not left:
                return {}
            question = left[0]
            self.table[question] = min(questions[question], key=seconds)
            print(
                f"{row}: {' '.join(question)} {self.table[question]}", file=sys.stderr, flush=True
            )


def by_time(names: list[str], toy: bool = False) -> Table:
    """Tiles of all kernels that these cases of bench.gpu launch; toy: at toy sizes, in the interpreter, to exercise the code."""
    bench = Tuning(toy)
    for name in names:
        if gpu_measure.CASES[name].ops:
            with torch.no_grad():
                gpu_measure.CASES[name].run(bench)
            bench.free()
    return bench.table


def write(tables: dict[str, Table]) -> None:
    """Put tables, by architecture, into tuned.json."""
    kept = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    for where, table in tables.items():
        for (name, key), tile in table.items():
            kept.setdefault(name, {}).setdefault(where, {})[key] = tile
    entry = lambda keys: (
        "{\n"
        + ",\n".join(f"   {json.dumps(key)}: {json.dumps(keys[key])}" for key in sorted(keys))
        + "}"
    )
    of = lambda archs: (
        "{\n"
        + ",\n".join(f"  {json.dumps(where)}: {entry(archs[where])}" for where in sorted(archs))
        + "}"
    )
    replace(
        TUNED,
        "{\n"
        + ",\n".join(f" {json.dumps(name)}: {of(kept[name])}" for name in sorted(kept))
        + "}\n",
    )


def run(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(TARGETS), help="architectures, comma-separated")
    parser.add_argument("--op", help="only this op (and its backward)")
    parser.add_argument("--new", action="store_true", help="only what the table lacks")
    parser.add_argument("--measure", action="store_true", help="by time, on this GPU")
    parser.add_argument(
        "--only",
        default=",".join(gpu_measure.CASES),
        metavar="A,B",
        help="with --measure: cases of bench.gpu",
    )
    args = parser.parse_args(argv)
    if args.measure:
        require(
            torch.cuda.is_available(),
            "no GPU is visible to torch here: without --measure none is needed",
        )
        for name in args.only.split(","):
            require(
                name in gpu_measure.CASES,
                f"--only {name}: choose from {', '.join(gpu_measure.CASES)}",
            )
        return write({arch(torch.empty(0, device="cuda")): by_time(args.only.split(","))})
    archs = args.arch.split(",")
    check_archs(archs)
    _calls.extend(all_calls(args.op))
    _known.update(json.loads(TUNED.read_text()) if args.new else {})
    with multiprocessing.get_context("fork").Pool(min(len(archs), os.cpu_count() or 1)) as pool:
        write(dict(zip(archs, pool.map(_of_arch, archs, chunksize=1))))


if __name__ == "__main__":
    sys.exit(cli.main("bench.tune", run, None))
