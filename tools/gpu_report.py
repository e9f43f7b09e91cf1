"""The part of the report that a GPU would decide: launches and bytes of layers, and an estimate.

Layers of Flash and Pro are lowered by a process of its own (tools/launches.py), since that replaces
much of torch.cuda.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from model import ModelArgs
from tools.capture import REST, Shape

BANDWIDTH = {  # bytes a second
    "A100": 2.04e12,
    "H100": 3.35e12,
    "H200": 4.8e12,
    "B200": 8.0e12,
    "MI300X": 5.3e12,
    "MI355X": 8.0e12,
    "RTX 5090": 1.79e12,
}
NODE_S = 2.2e-6  # of a launch in a CUDA graph, about
GPU_NOTE = (
    "GPU launches: of a layer, in bf16 / with FP4 experts and FP8 linears, lowered for an H200\n"
    "that is not there; estimate: bytes over bandwidth plus 2.2 us a launch"
)


def answer_of(done: subprocess.CompletedProcess, task: str, log: Callable[[str], None]) -> dict:
    """The JSON that a process printed last; a ChildProcessError if it failed."""
    if done.returncode:
        message = done.stderr.strip()
        if "Traceback" in message:
            log(message)
        raise ChildProcessError(f"{task} failed: {(message or 'no message').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def lowered(args: ModelArgs, phase: str, shape: Shape, log: Callable[[str], None]) -> dict:
    """`launches.figures` of a layer of each kind, those of the head as "head"; nothing where this
    torch cannot be lowered.
    """
    log(f"lowering {phase} for a GPU ...")
    wanted = {"args": dataclasses.asdict(args), "phase": phase}
    wanted["shape"] = shape._asdict()
    done = subprocess.run(
        [sys.executable, "-m", "tools.launches"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    try:
        figures = answer_of(done, f"lowering {phase}", lambda traceback: None)
    except ChildProcessError as error:  # it replaces much of torch.cuda
        log(str(error))
        return {}
    return figures | {"head": {name: kinds.pop(REST, None) for name, kinds in figures.items()}}


def estimate(numbers: dict, layers: dict[str, int], gpu: str) -> dict[str, float] | None:
    """Tokens a second of decode on a GPU, by weights: bytes over bandwidth plus launches."""
    if not numbers.get("launches"):
        return None
    seconds: dict[str, float] = collections.Counter()

    def add(launches: dict[str, int], moved: dict[str, int], times: int) -> None:
        for weights, n in launches.items():
            seconds[weights] += times * (moved[weights] / BANDWIDTH[gpu] + n * NODE_S)

    for kind, launches in numbers["launches"].items():
        add(launches, numbers["moved_bytes"][kind], layers[kind])
    add(numbers["head"]["launches"], numbers["head"]["moved_bytes"], 1)
    return {weights: numbers["batch"] / s for weights, s in seconds.items()}


def launch_lines(phases: dict[str, dict]) -> list[list[str]]:
    """Of the table, for layers lowered for a GPU: in each cell bf16, then fp4 if there is any."""

    def pair(values: dict | None, digits: int = 0) -> str:
        if not values:
            return "-"
        return " / ".join(f"{value:,.{digits}f}" for value in values.values())

    def share(phase: dict, kind: str) -> dict | None:
        moved, needed = (phase.get(key, {}).get(kind) for key in ("moved_bytes", "needed_bytes"))
        return moved and {weights: moved[weights] / needed[weights] for weights in moved}

    names = dict.fromkeys(kind for phase in phases.values() for kind in phase.get("launches") or ())
    lines = []
    for kind in names:
        counts = [pair(phase.get("launches", {}).get(kind)) for phase in phases.values()]
        lines.append([f"GPU launches: {kind}", *counts])
        shares = [pair(share(phase, kind), 2) for phase in phases.values()]
        lines.append(["  bytes moved / needed", *shares])
    estimates = [phase.get("estimate") or {} for phase in phases.values()]
    if any(estimates):
        gpu = next(e["gpu"] for e in estimates if e)
        lines.append(
            [f"estimate, tok/s on {gpu}", *(pair(e.get("tok_per_s"), 1) for e in estimates)]
        )
    return lines


def compare_launches(name: str, before: dict, now: dict, add: Callable[[str, bool], None]) -> None:
    """Changes between two reports' launches, by add(line, whether it is a regression)."""
    for kind in before.keys() & now.keys():
        for weights in before[kind].keys() & now[kind].keys():
            a, b = before[kind][weights], now[kind][weights]
            if a != b:
                add(f"{name}: {kind}: launches in {weights} {a} -> {b}", b > a)
