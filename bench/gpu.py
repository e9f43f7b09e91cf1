"""The GPU suite: kernels and slices of the model beside published baselines, taking turns.

    python -m bench.gpu                    compile everything (minutes), then measure:
                                           bench/results/gpu_<name>.json
    python -m bench.gpu --warm             compile only: worker processes fill build/gpu_cache
    python -m bench.gpu --measure          measure only
    python -m bench.gpu --only G1.4,G2     some of the cases; the record of the others stays
    python -m bench.gpu --toy              every case at toy sizes on CPU: exercises the code,
                                           measures and records nothing

One JSON line per case goes to standard output as it finishes, a scoreboard ends it: "match" is the
least that published results demand, "beat" the target. Cases run in order of importance until
--budget seconds would be exceeded. Published numbers come from other machines: only ratios measured
here in one run compare.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench import gpu_cases, gpu_models
from bench.gpu_measure import CASES, Bench
from bench.gpu_scoreboard import scoreboard
from bench.record import RESULTS, environment, record
from ops.launch import INTERPRETING
from ops.registry import require
from tests import interpreter
from tools import cli

CACHE = Path(__file__).parent.parent / "build" / "gpu_cache"
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
assert gpu_cases and gpu_models  # they fill CASES
ORDER = (  # of importance
    "G1.1",
    "G1.4",
    "G1.5",
    "G1.6",
    "G1.2",
    "G2",
    "G4",
    "G3",
    "G1.9",
    "G5",
    "G1.3",
    "G1.11",
    "G1.8",
    "G1.7",
    "G1.12",
    "G1.10",
)
WORKERS = 16  # processes that compile
WARM_LIMIT = 400  # seconds: whatever is not compiled by then is compiled while measuring


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# Compile


def prepare(name: str, part: str) -> None:
    """In a worker: compile a part of a case, and print which rows failed."""
    bench = Bench(prepare=True, part=part)
    CASES[name].run(bench)
    failed = {row: kept["failed"] for row, kept in bench.rows.items() if kept.get("failed")}
    print(json.dumps(failed))


class Job(NamedTuple):
    """A part of a case to compile, and the gigabytes of GPU memory that it needs."""

    gigabytes: float
    case: str
    part: str

    def __str__(self) -> str:
        return f"{self.case} {self.part}".strip()


class Worker(NamedTuple):
    process: subprocess.Popen
    log_path: Path

    @classmethod
    def start(cls, job: Job, number: int) -> Worker:
        command = [sys.executable, "-m", "bench.gpu", "--prepare", f"{job.case}:{job.part}"]
        env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
        path = CACHE / f"{job.case}.{number}.log"
        with open(path, "w") as out:
            return cls(subprocess.Popen(command, stdout=out, stderr=out, env=env), path)


def urgency(job: Job) -> tuple:
    """Whole models first, then by size: they compile longest."""
    return job.case != "G2", job.case != "G4", -job.gigabytes


def warm(names: list[str]) -> None:
    """Compile in worker processes that share the GPU's memory and the caches."""
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    memory, begun = torch.cuda.mem_get_info()[0] / 1e9 * 0.95, time.perf_counter()
    jobs = [Job(gb, name, part) for name in names for part, gb in CASES[name].parts.items()]
    waiting = sorted(jobs, key=urgency)
    limit = min(WORKERS, os.cpu_count() or 1)
    running: dict[Job, Worker] = {}
    ended: dict[str, float] = {}

    def fits(job: Job) -> bool:
        held = sum(other.gigabytes for other in running)
        return not running or (len(running) < limit and held + job.gigabytes <= memory)

    while waiting or running:
        for job in list(waiting):
            if fits(job):
                waiting.remove(job)
                running[job] = Worker.start(job, len(ended) + len(running))
        time.sleep(0.2)
        late = time.perf_counter() - begun > WARM_LIMIT
        for job, (process, log_path) in list(running.items()):
            if late:
                process.kill()
            elif process.poll() is None:
                continue
            process.wait()
            del running[job]
            ended[str(job)] = time.perf_counter() - begun
            if process.returncode:
                reason = "took too long" if late else "failed"
                log(f"{job.case} {job.part}: compiling {reason}, see {log_path}")
        if late:
            waiting.clear()
    seconds = time.perf_counter() - begun
    (CACHE / "warm.json").write_text(json.dumps({"seconds": seconds, "ended_after_s": ended}))
    log(f"compiled in {seconds:.0f} s")


# --------------------------------------------------------------------------------------------------
# Measure


def driver_version() -> str | None:
    if not torch.version.cuda:
        return torch.version.hip
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def stamp() -> dict:
    """Date, device and versions of a measurement."""
    about, driver = environment(), driver_version()
    kept = {key: about[key] for key in ("date", "gpu", "torch", "triton", "transformers")}
    return kept | {"driver": driver.splitlines()[0] if driver else None}


def measure_case(name: str, toy: bool, deadline: float) -> dict:
    """-> {row: results}."""
    case, bench = CASES[name], Bench(toy=toy, deadline=deadline)
    log(f"{name} {case.title}")
    try:
        case.run(bench)
    except Exception as error:  # the other cases are still worth measuring
        bench.rows["error"] = {"failed": f"{type(error).__name__}: {error}"[:500]}
    bench.free()
    return bench.rows


def measure(names: list[str], budget: float, toy: bool = False) -> dict:
    """Run cases within a budget of seconds -> {case: {"title", "rows", "seconds"}}, a JSON line
    each.
    """
    begun, cases = time.monotonic(), {}
    # the same function at many shapes is not a recompile here
    torch._dynamo.config.recompile_limit = 256
    for name in names:
        case, spent = CASES[name], time.monotonic() - begun
        cases[name] = {"title": case.title}
        if spent + case.seconds > budget and not toy:
            cases[name] |= {
                "rows": {},
                "left_out": f"{spent:.0f} of {budget:.0f} s were spent, and it takes about "
                f"{case.seconds:.0f}",
            }
        else:
            rows = measure_case(name, toy, begun + budget)
            cases[name] |= {"rows": rows, "seconds": time.monotonic() - begun - spent}
        print(json.dumps({"case": name, **cases[name]}), flush=True)
        if not toy:
            torch.cuda.synchronize()  # a kernel that faulted spoils all that follows: stop here
    return cases


def left_out(cases: dict) -> list[str]:
    return [name for name, case in cases.items() if "left_out" in case]


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.exists() else None


def keep(cases: dict, budget: float) -> None:
    """Record what was measured beside what was recorded before of other cases."""
    name = "gpu_" + "_".join(torch.cuda.get_device_name().lower().split())
    measured = {
        key: case | {"measured_with": stamp()}
        for key, case in cases.items()
        if "left_out" not in case
    }
    old = read(RESULTS / f"{name}.json")
    known = (old["cases"] if old else {}) | measured
    kept = {key: known[key] for key in ORDER if key in known}
    result = {
        **stamp(),
        "budget_s": budget,
        "left_out": left_out(cases),
        "compiled_in": read(CACHE / "warm.json"),
        "scoreboard": scoreboard(kept)[0],
        "cases": kept,
    }
    record(name, result)


# --------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--warm", action="store_true", help="compile only")
    add("--measure", action="store_true", help="measure only")
    add("--only", default=",".join(ORDER), metavar="A,B", help="cases, comma-separated")
    add("--budget", type=float, default=460, metavar="S", help="seconds to measure in (460)")
    add("--toy", action="store_true", help="toy sizes on CPU, nothing recorded")
    add("--prepare", help="for the workers of --warm")
    args = parser.parse_args(argv)
    for name in args.only.split(","):
        require(name in CASES, f"--only {name}: choose from {', '.join(ORDER)}")
    require(
        args.toy or torch.cuda.is_available(),
        "no GPU is visible to torch here: run it where there is one, or exercise the code with "
        "--toy",
    )
    return args


def run(argv: list[str] | None) -> None:
    args = parse(argv)
    names = args.only.split(",")
    if args.toy and INTERPRETING:
        interpreter.install()
    elif args.toy:
        log("neither a GPU nor TRITON_INTERPRET=1: ours are the references, no kernel runs")
    if args.prepare:
        return prepare(*args.prepare.split(":", 1))
    if not args.toy and (args.warm or not args.measure):
        warm(names)
    if args.warm and not args.measure:
        return
    begun = time.perf_counter()
    cases = measure(names, args.budget, args.toy)
    print(scoreboard(cases, args.toy)[1])
    missing = ", ".join(left_out(cases)) or "nothing"
    log(f"measured in {time.perf_counter() - begun:.0f} s; left out: {missing}")
    if not args.toy:
        keep(cases, args.budget)


if __name__ == "__main__":
    sys.exit(cli.main("bench.gpu", run, None, outlives_reader=True))
