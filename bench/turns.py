"""Time rows of the CPU suite on several sides, which take turns round by round, each in a process
of its own.

A side is a checkout of the project, with or without some of its C++ kernels. Only one side computes
at a time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from ops.cpp import KERNELS

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "cpu_worker.py"
TOLERANCE = 0.05  # what a row may lose beyond the spread of its rounds


class Worker:
    """One side of one row. first: {"first_round_s", "kernels"}; rounds: {"ms", "wall_ms"} each.

    cache   a folder for compiled code; None: the usual one
    """

    def __init__(
        self, row: str, root: Path = ROOT, without: tuple[str, ...] = (), cache: str | None = None
    ):
        command = [sys.executable, "-P", str(WORKER), row]
        if without:
            command += ["--without", ",".join(without)]
        env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        env["PYTHONDONTWRITEBYTECODE"] = "1"  # the other checkout may be read-only
        if cache is not None:
            env["TORCHINDUCTOR_CACHE_DIR"] = cache
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, cwd=root, env=env, stdin=pipe, stdout=pipe, text=True
        )
        self.first = self._answer()
        self.rounds: list[dict] = []

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)}: ended with {self.process.wait()}")
        return json.loads(line)

    def run(self) -> None:
        """One round."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(self._answer())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def take_turns(sides: dict[str, Worker], rounds: int) -> dict[str, list[dict]]:
    """{side: its rounds}."""
    for _ in range(rounds):
        for worker in sides.values():
            worker.run()
    return {name: worker.rounds for name, worker in sides.items()}


def summary(rounds: list[dict]) -> dict:
    """The least of the rounds; spread: how far their median lies above it, relative to it."""
    times = [entry["ms"] for entry in rounds]
    least = min(times)
    wall = min(entry["wall_ms"] for entry in rounds)
    return {
        "ms": least,
        "wall_ms": wall,
        "spread": statistics.median(times) / least - 1,
        "contended": wall > 1.33 * least,
    }


def ratio(rounds: list[dict], base: list[dict]) -> dict:
    """How many times longer the base takes: of the least times, and its range over the rounds."""
    pairs = [b["ms"] / a["ms"] for a, b in zip(rounds, base, strict=True)]
    mine, theirs = summary(rounds), summary(base)
    return {
        "ratio": theirs["ms"] / mine["ms"],
        "least_ratio": min(pairs),
        "most_ratio": max(pairs),
        "spread": max(mine["spread"], theirs["spread"]),
    }


def loses(case: dict) -> bool:
    """Whether a row takes longer than the base by more than the tolerance and its spread."""
    return 1 / case["ratio"] > 1 + TOLERANCE + case["spread"]


def against(other: Path, rows: list[str], rounds: int) -> dict[str, dict]:
    """Rows of this checkout beside those of another one, printed as they are measured."""
    found = {}
    for row in rows:
        with Worker(row) as ours, Worker(row, other) as base:
            times = take_turns({"this": ours, "other": base}, rounds)
            compiled = {"this": ours.first, "other": base.first}
        case = ratio(times["this"], times["other"])
        for name, measured in times.items():
            case[name] = summary(measured) | {"first_round_s": compiled[name]["first_round_s"]}
        found[row] = case | {"loses": loses(case)}
        print(
            f"{row:38} {case['this']['ms']:9.2f} ms, other {case['other']['ms']:9.2f} ms: "
            f"{case['ratio']:.3f} times as fast ({case['least_ratio']:.3f} to "
            f"{case['most_ratio']:.3f}), spread {100 * case['spread']:.1f} %"
            f"{'  LOSES' if found[row]['loses'] else ''}",
            flush=True,
        )
    return found


KERNEL_ROWS = ("decode B=1", "decode B=8", "prefill 512", "train step 1 x 256")


def kernels(rounds: int, rows: tuple[str, ...] = KERNEL_ROWS) -> dict[str, dict]:
    """Ops' C++ kernels (with the backward's) switched off in turn, on the rows that call them, and
    all of a library together if it has several.

    -> {op or library: {row: case}}; "times" is how many times longer the row takes without the
    kernels, "compile_times" the same of its first round, which compiles into an empty folder.
    """
    found: dict[str, dict] = {}
    for row in rows:
        with tempfile.TemporaryDirectory() as folder, Worker(row, cache=folder) as on:
            for name, off in groups(on.first["kernels"]).items():
                found.setdefault(name, {})[row] = without_kernels(row, name, off, on, rounds)
    return found


def groups(called: list[str]) -> dict[str, tuple[str, ...]]:
    """{name: ops to switch off}: each op alone, then libraries of several."""
    alone = {op: (op,) for op in called}
    libraries: dict[str, tuple[str, ...]] = {}
    for op in called:
        library = KERNELS[op].library
        libraries[library] = (*libraries.get(library, ()), op)
    return alone | {name: together for name, together in libraries.items() if len(together) > 1}


def without_kernels(row: str, name: str, ops: tuple[str, ...], on: Worker, rounds: int) -> dict:
    """The case of some kernels on one row, printed; on: the worker with all kernels."""
    on.rounds = []
    with tempfile.TemporaryDirectory() as folder, Worker(row, without=ops, cache=folder) as off:
        sides = {"on": on, "off": off}
        times = take_turns(sides, rounds)
    case = ratio(times["on"], times["off"])
    case = {"times": case.pop("ratio"), **case}
    for side, worker in sides.items():
        case[side] = summary(times[side]) | {"first_round_s": worker.first["first_round_s"]}
    case["compile_times"] = case["off"]["first_round_s"] / case["on"]["first_round_s"]
    print(
        f"{name:24} {row:20} {case['times']:.3f} times as long without "
        f"({case['least_ratio']:.3f} to {case['most_ratio']:.3f}), "
        f"compiling {case['compile_times']:.2f} times",
        flush=True,
    )
    return case
