"""Compile seconds by depth, and the compile reports of the embedded model, Flash and Pro.

    python -m bench.compile            everything: bench/results/compile.json and
                                       report_{tiny,flash,pro}.json (about 20 minutes)
    python -m bench.compile depth      some of: depth tiny flash pro

Depths are those of the embedded width, compiled layer by layer (the regional preset): cold, then
warm, each in a process of its own with a cache of its own. Flash and Pro are captured at full
depth; nothing of them is compiled.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

from bench.record import record
from tools.capture import kinds
from tools.report import args_of, measured, report

DEPTHS, PHASES = (6, 12, 43), ("decode", "train")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def depth() -> None:
    result: dict = {"preset": "regional", "width": "tiny"}
    for phase in PHASES:
        for layers in DEPTHS:
            config, load = f"tiny:{layers}", os.getloadavg()[0]
            case = measured(config, phase, "regional", say)
            case |= {"kinds": len(kinds(args_of(config))), "load_average_before": load}
            result[f"{phase}, {layers} layers"] = case
        shallow, deep = (result[f"{phase}, {layers} layers"] for layers in (12, 43))
        result[f"{phase}, 43 to 12 layers"] = deep["compile_cold_s"] / shallow["compile_cold_s"]
        result.pop("environment", None)
        record("compile", result)


def tiny() -> None:
    record("report_tiny", report("tiny", log=say))


def captured(name: str) -> None:
    record(f"report_{name}", report(name, full=True, compiled=False, log=say))


CASES = {
    "depth": depth,
    "tiny": tiny,
    "flash": lambda: captured("flash"),
    "pro": lambda: captured("pro"),
}


def main(argv: list[str]) -> int:
    unknown = [name for name in argv if name not in CASES]
    if unknown:
        say(f"bench.compile: unknown case {unknown[0]!r}: choose from {', '.join(CASES)}")
        return 2
    for name in argv or CASES:
        CASES[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
