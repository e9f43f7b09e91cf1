"""Choose the kernels' tiles and write them into ops/tuned.json.

    python -m bench.tune [--arch sm_90,gfx942] [--op sparse_attn] [--new]
                                by what the compiler makes of them: no GPU needed
    python -m bench.tune --measure [--only G1.5,G1.9]
                                by time, on the GPU that is here, at the shapes of bench.gpu

A kernel offers candidates (launch.get_config), from the largest to the smallest. Without a GPU the
first one is taken that compiles, fits into shared memory, keeps its matrix instructions, hardly
spills and occupies every multiprocessor; if all fall short, the one that does least. Entries that
the run does not come upon stay as they are; with --new all do, and only missing ones are chosen.
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

Question = tuple[str, str]  # (kernel, key)
Table = dict[Question, dict]  # tiles


# --------------------------------------------------------------------------------------------------
# By resources


def shortcoming(found: dict, launch: Launch, where: str, tile: dict) -> float:
    """0 for a kernel without fault, more the worse it is; found: of offline.compile_quietly."""
    if "error" in found or found["shared"] > SHARED[where] * 1024:
        return CANNOT_RUN
    if found["dots"] and not found["matrix"]:
        return CANNOT_RUN
    spills, in_loops = found["spills"] / found["instructions"], found["spilling"]
    spilled = spills + in_loops if spills > IN_ALL or in_loops > IN_LOOPS else 0.0
    # such a kernel adapts its grid to the GPU by itself
    adapts = any("split" in name.lower() and name not in tile for name in launch.kernel.arg_names)
    idle = 0.0 if adapts else max(0.0, 1 - math.prod(launch.grid) / PROCESSORS[where])
    return idle + spilled


class ByResources:
    """Chooses tiles for one architecture; a tile is judged by all kernels that its call launches.

    known: tiles chosen already, by kernel, architecture and key
    """

    def __init__(self, where: str, known: dict):
        self.where = where
        self.table: Table = {
            (name, key): tile
            for name, archs in known.items()
            for key, tile in archs.get(where, {}).items()
        }
        self.compiled: dict[str, dict] = {}

    def faults(self, call: cases.Call, question: Question, tile: dict) -> float:
        """The sum over the kernels that a call launches with this tile."""
        total = 0.0
        with override_config({**self.table, question: tile}):
            for launch in call.launches(self.where):
                key = f"{launch.name} {launch.specialization()}"
                if key not in self.compiled:
                    self.compiled[key] = compile_quietly(launch, self.where)
                total += shortcoming(self.compiled[key], launch, self.where, tile)
        return total

    def open_questions(self, call: cases.Call) -> dict[Question, list[dict]]:
        """Candidates of the tiles that a call asks for and the table lacks."""
        with override_config(self.table), record_configs() as questions:
            call.launches(self.where)
        return {
            question: candidates
            for question, candidates in questions.items()
            if self.table.get(question) not in candidates
        }

    def choose(self, call: cases.Call, question: Question, candidates: list[dict]) -> None:
        scores = []
        for tile in candidates:
            scores.append(self.faults(call, question, tile))
            if not scores[-1]:
                break
        self.table[question] = candidates[min(range(len(scores)), key=scores.__getitem__)]
        chosen = f"{' '.join(question)} {self.table[question]}"
        print(f"{self.where:7} {scores[-1]:.3f} {chosen}", file=sys.stderr, flush=True)


def by_resources(where: str, calls: list[cases.Call], known: dict | None = None) -> Table:
    """Tiles of all kernels that the calls launch on an architecture; known: as in ByResources."""
    choice = ByResources(where, known or {})
    for call in calls:
        while questions := choice.open_questions(call):  # an answer may change the next question
            choice.choose(call, *next(iter(questions.items())))
    return choice.table


_calls: list[cases.Call] = []  # set before workers are forked
_known: dict = {}


def _of_arch(where: str) -> Table:
    return by_resources(where, _calls, _known)


# --------------------------------------------------------------------------------------------------
# By time


class Tuning(gpu_measure.Bench):
    """Times our side of every row with each candidate in turn, and keeps the fastest."""

    def __init__(self, toy: bool = False):
        super().__init__(toy)
        self.table: Table = {}

    def seconds(self, call, question: Question, tile: dict) -> float:
        try:
            with override_config({**self.table, question: tile}):
                call()
                return min(self.shot(call) for _ in range(10))
        except Exception as error:  # too large for this GPU
            print(f"{question} {tile}: {type(error).__name__}", file=sys.stderr)
            return float("inf")

    def compare(self, row, sides, inputs, **_) -> dict:
        ours = next(iter(sides.values()))

        def call():
            return getattr(ours, "call", ours)(*inputs[0])

        while True:
            with override_config(self.table), record_configs() as questions:
                call()
            question = next((q for q in questions if q not in self.table), None)
            if question is None:
                return {}
            times = [self.seconds(call, question, tile) for tile in questions[question]]
            self.table[question] = questions[question][times.index(min(times))]
            chosen = f"{' '.join(question)} {self.table[question]}"
            print(f"{row}: {chosen}", file=sys.stderr, flush=True)


def by_time(names: list[str], toy: bool = False) -> Table:
    """Tiles of all kernels that these cases of bench.gpu launch.

    toy: at toy sizes, in the interpreter, to exercise the code
    """
    bench = Tuning(toy)
    for name in names:
        if gpu_measure.CASES[name].ops:
            with torch.no_grad():
                gpu_measure.CASES[name].run(bench)
            bench.free()
    return bench.table


# --------------------------------------------------------------------------------------------------
# The file


def json_object(entries: dict[str, str], indent: int) -> str:
    """Sorted entries, values as JSON text, one a line."""
    space = " " * indent
    lines = (f"{space}{json.dumps(key)}: {entries[key]}" for key in sorted(entries))
    return "{\n" + ",\n".join(lines) + "}"


def write(tables: dict[str, Table]) -> None:
    """Put tables, by architecture, into tuned.json: kernel -> architecture -> key -> tile."""
    kept = json.loads(TUNED.read_text()) if TUNED.exists() else {}
    for where, table in tables.items():
        for (name, key), tile in table.items():
            kept.setdefault(name, {}).setdefault(where, {})[key] = tile
    kernels = {}
    for name, archs in kept.items():
        by_arch = {}
        for where, keys in archs.items():
            tiles = {key: json.dumps(tile) for key, tile in keys.items()}
            by_arch[where] = json_object(tiles, 3)
        kernels[name] = json_object(by_arch, 2)
    replace(TUNED, json_object(kernels, 1) + "\n")


def run(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m bench.tune", description=__doc__.splitlines()[0])
    add, names = parser.add_argument, ",".join(gpu_measure.CASES)
    add("--arch", default=",".join(TARGETS), help="architectures, comma-separated")
    add("--op", help="only this op (and its backward)")
    add("--new", action="store_true", help="only what the table lacks")
    add("--measure", action="store_true", help="by time, on this GPU")
    add("--only", default=names, metavar="A,B", help="with --measure: cases of bench.gpu")
    args = parser.parse_args(argv)
    if args.measure:
        require(
            torch.cuda.is_available(),
            "no GPU is visible to torch here: without --measure none is needed",
        )
        for name in args.only.split(","):
            require(name in gpu_measure.CASES, f"--only {name}: choose from {names}")
        here = arch(torch.empty(0, device="cuda"))
        write({here: by_time(args.only.split(","))})
        return
    archs = args.arch.split(",")
    check_archs(archs)
    _calls.extend(all_calls(args.op))
    _known.update(json.loads(TUNED.read_text()) if args.new else {})
    with multiprocessing.get_context("fork").Pool(min(len(archs), os.cpu_count() or 1)) as pool:
        tables = pool.map(_of_arch, archs, chunksize=1)
    write(dict(zip(archs, tables, strict=True)))


if __name__ == "__main__":
    sys.exit(cli.main("bench.tune", run, None, outlives_reader=True))
