"""The GPU suite: kernels and slices of the model beside published baselines, in one process, taking turns.

    python -m bench.gpu                    compile everything (minutes), then measure: bench/results/gpu_<name>.json
    python -m bench.gpu --warm             compile only: worker processes fill build/gpu_cache
    python -m bench.gpu --measure          measure only
    python -m bench.gpu --only G1.4,G2     some of the cases; what was recorded of the others stays
    python -m bench.gpu --toy              every case at toy sizes on CPU: exercises the code, measures and records nothing

One JSON line per case goes to standard output as it finishes, a scoreboard ends it: "match" is the least that published
results demand, "beat" the aim. Cases run in order of importance until --budget seconds would be exceeded. Published numbers
come from other machines: only ratios measured here in one run compare.
"""

from __future__ import annotations

import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / "build" / "gpu_cache"
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import json
import subprocess
import sys
import time
from typing import Callable, NamedTuple

import torch

from bench import gpu_cases, gpu_models
from bench.gpu_measure import CASES, Bench
from bench.record import RESULTS, environment, record
from ops.launch import INTERPRETING
from ops.registry import require
from tools import cli

assert gpu_cases and gpu_models  # they fill CASES
ORDER = (
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
WORKERS, WARM_LIMIT = (
    16,
    400,
)  # processes, and seconds: what is not compiled by then is compiled while measuring


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Scoreboard


class Headline(NamedTuple):
    """A published result: its number, the least to reach and the aim; most tells that less is better."""

    what: str
    published: str
    match: float
    beat: float
    value: Callable[[dict], float | None]
    most: bool = False

    def score(self, cases: dict) -> dict:
        try:
            value = self.value(cases)
        except (KeyError, TypeError, ZeroDivisionError):  # not measured, or failed
            value = None
        good = lambda limit: (
            None if value is None else value <= limit if self.most else value >= limit
        )
        return {
            "headline": self.what,
            "published": self.published,
            "match": self.match,
            "beat": self.beat,
            "reached": value,
            "matched": good(self.match),
            "beaten": good(self.beat),
        }


def of(case: str, row: str, *keys: str) -> Callable[[dict], float | None]:
    """A number of a row; "peak_mb" and the like are those of ours."""

    def value(cases):
        found = cases[case]["rows"][row]
        for key in keys or ("ms",):
            found = found[key]
        return found

    return value


def times(case: str, row: str, over: str) -> Callable[[dict], float | None]:
    """How many times longer another row of the case takes."""
    return lambda cases: cases[case]["rows"][over]["ms"] / cases[case]["rows"][row]["ms"]


OURS = ("sides", "ours")
SCOREBOARD = (
    Headline(
        "hc_post forward, times eager",
        "21",
        21,
        24,
        of("G1.1", "16384 x 4096, forward", "ratio", "eager"),
    ),
    Headline(
        "hc_post forward and backward, times eager",
        "7",
        7,
        9,
        of("G1.1", "16384 x 4096, forward and backward", "ratio", "eager"),
    ),
    Headline(
        "hc_post forward, times compiled",
        "-",
        1.0,
        1.8,
        of("G1.1", "16384 x 4096, forward", "ratio", "compiled"),
    ),
    Headline(
        "hc_pre forward 16k, ms",
        "0.6 in fp32",
        0.6,
        0.20,
        of("G1.2", "16384 x 4096, forward"),
        True,
    ),
    Headline(
        "hc_pre error of post and comb",
        "1.56e-2",
        1.56e-2,
        1e-4,
        lambda c: max(c["G1.2"]["rows"]["16384 x 4096, forward"]["sides"]["ours"]["errors"][1:]),
        True,
    ),
    Headline(
        "Sinkhorn forward 16k, times eager (wall)",
        "13.6",
        13.6,
        13.6,
        of("G1.3", "16384, forward", "wall_ratio", "eager"),
    ),
    Headline(
        "Sinkhorn backward 16k, times eager (wall)",
        "14.8",
        14.8,
        14.8,
        of("G1.3", "16384, backward", "wall_ratio", "eager"),
    ),
    Headline(
        "Sinkhorn forward and backward, launches each",
        "1",
        1,
        1,
        lambda c: max(
            c["G1.3"]["rows"][f"16384, {way}"]["launches"]["ours"]
            for way in ("forward", "backward")
        ),
        True,
    ),
    Headline(
        "Sinkhorn forward 16k, times compiled",
        "6.3",
        1.0,
        6.3,
        of("G1.3", "16384, forward", "ratio", "compiled"),
    ),
    Headline("indexer 8k, ms", "4.58", 4.58, 1.0, of("G1.4", "8192, one sample"), True),
    Headline(
        "indexer 8k, times eager", "1.6", 1.6, 7, of("G1.4", "8192, one sample", "ratio", "eager")
    ),
    Headline(
        "indexer 8k, peak MB",
        "774",
        774,
        150,
        of("G1.4", "8192, one sample", *OURS, "peak_mb"),
        True,
    ),
    Headline(
        "indexer 8k, 32 samples, times a single sort",
        "2.16",
        2.16,
        4,
        of("G1.4", "8192, 32 samples", "ratio", "single sort"),
    ),
    Headline(
        "indexer 8k, one sample, times a single sort",
        "below 1",
        1.0,
        4,
        of("G1.4", "8192, one sample", "ratio", "single sort"),
    ),
    Headline("CSA forward 4k, ms", "3.16", 3.16, 0.70, of("G1.5", "CSA 4096, 64 heads"), True),
    Headline("SWA forward 4k, ms", "0.71", 0.71, 0.20, of("G1.5", "SWA 4096, 64 heads"), True),
    Headline("HCA forward 4k, ms", "0.85", 0.85, 0.22, of("G1.5", "HCA 4096, 64 heads"), True),
    Headline("CSA backward 4k, ms", "16.31", 16.31, 3.0, of("G1.6", "CSA 4096, 64 heads"), True),
    Headline(
        "CSA backward 4k beside matrix products, ms",
        "-",
        32.62,
        6.0,
        of("G1.6", "CSA 4096, 64 heads", "ms_beside_matrix_products"),
        True,
    ),
    Headline("SWA backward 4k, ms", "7.65", 7.65, 0.9, of("G1.6", "SWA 4096, 64 heads"), True),
    Headline("HCA backward 4k, ms", "11.91", 11.91, 1.0, of("G1.6", "HCA 4096, 64 heads"), True),
    Headline(
        "CSA backward 4k, peak MB above its results",
        "4295",
        4295,
        1100,
        lambda c: (lambda o: o["peak_mb"] - o["results_mb"])(
            c["G1.6"]["rows"]["CSA 4096, 64 heads"]["sides"]["ours"]
        ),
        True,
    ),
    Headline(
        "RoPE forward 4k, times eager",
        "2.96",
        2.96,
        2.96,
        of("G1.7", "4096 x 64 x 512", "ratio", "eager"),
    ),
    Headline(
        "RoPE inverse (backward) 4k, times eager",
        "2.81",
        2.81,
        2.81,
        of("G1.7", "4096 x 64 x 512, inverse", "ratio", "eager"),
    ),
    Headline(
        "compressor CSA, times eager", "-", 1.0, 3, of("G1.8", "CSA, 1 samples", "ratio", "eager")
    ),
    Headline(
        "experts bf16 8k, times grouped_mm",
        "-",
        1.0,
        1.0,
        of("G1.9", "bf16, 8192 tokens", "ratio", "grouped_mm"),
    ),
    Headline(
        "experts fp4 B=1, percent of floor",
        "-",
        50,
        75,
        of("G1.9", "fp4, 1 tokens", "percent_of_floor"),
    ),
    *(
        Headline(
            f"experts B={B}, fp4 times {form}",
            "-",
            1.0,
            make_targets,
            times("G1.9", f"fp4, {B} tokens", f"{form}, {B} tokens"),
        )
        for B in (1, 8)
        for form, make_targets in (("fp8", 1.5), ("bf16", 3))
    ),
    Headline(
        "clamped SwiGLU forward, times eager",
        "-",
        1.0,
        4,
        of("G1.10", "swiglu, forward", "ratio", "eager"),
    ),
    Headline(
        "clamped SwiGLU forward, percent of floor",
        "-",
        50,
        80,
        of("G1.10", "swiglu, forward", "percent_of_floor"),
    ),
    Headline(
        "loss forward and backward, times unfused",
        "-",
        0.9,
        1.0,
        of("G1.11", "forward and backward", "ratio", "eager"),
    ),
    Headline(
        "loss forward and backward, share of its peak",
        "-",
        1.0,
        0.35,
        lambda c: (lambda s: s["ours"]["peak_mb"] / s["eager"]["peak_mb"])(
            c["G1.11"]["rows"]["forward and backward"]["sides"]
        ),
        True,
    ),
    Headline(
        "decode slice bf16 B=1, percent of bandwidth",
        "-",
        25,
        50,
        of("G2", "bf16, B=1, 4k", "percent_of_floor"),
    ),
    Headline(
        "decode slice fp4 B=1, percent of bandwidth",
        "-",
        20,
        40,
        of("G2", "fp4, B=1, 4k", "percent_of_floor"),
    ),
    Headline(
        "decode slice, times our own eager",
        "10.8",
        10.8,
        10.8,
        of("G2", "bf16, B=1, 4k", "ratio", "ours, eager"),
    ),
    Headline(
        "decode slice, times eager Transformers (best)",
        "-",
        10,
        20,
        lambda c: (
            min(
                v
                for k, v in c["G2"]["rows"]["bf16, B=1, 4k"]["ratio"].items()
                if k.startswith("transformers")
            )
            if c["G2"]["rows"]["bf16, B=1, 4k"]["ratio"]
            else None
        ),
    ),
    Headline(
        "decode kernels per layer",
        "-",
        50,
        25,
        of("G2", "bf16, B=1, 4k", "kernels_per_layer"),
        True,
    ),
    Headline(
        "prefill 4k, times eager Transformers",
        "-",
        1.0,
        5,
        of("G3", "4096 tokens", "ratio", "transformers grouped_mm"),
    ),
    Headline(
        "prefill 8k, percent of bf16 rate", "-", 20, 40, of("G3", "8192 tokens", "percent_of_floor")
    ),
    Headline(
        "training 4 layers, tokens/s, no communication",
        "23157",
        23157,
        35000,
        of("G4", next(iter(gpu_models.TRAIN)), "tokens_per_s"),
    ),
    Headline(
        "training, hyper-connections off, times",
        "1.04",
        1.04,
        1.04,
        of("G4", next(iter(gpu_models.TRAIN)), "ratio", "hyper-connections off"),
    ),
    Headline(
        "training 8 layers, tokens/s, no communication",
        "4600",
        4600,
        9392,
        of("G4", list(gpu_models.TRAIN)[1], "tokens_per_s"),
    ),
    Headline(
        "host time under offload, us",
        "656",
        656,
        100,
        of("G5", "host time under offload", "us"),
        True,
    ),
    Headline(
        "recompiles over 32 layouts",
        "-",
        0,
        0,
        of("G5", "training over 32 layouts", "recompiles"),
        True,
    ),
)


def scoreboard(cases: dict, toy: bool = False) -> tuple[list[dict], str]:
    """The headlines scored, and as a table; of toy sizes nothing is said."""
    cases = {} if toy else cases
    rows, mark = [line.score(cases) for line in SCOREBOARD], {None: "", True: "yes", False: "NO"}
    cell = lambda v: "" if v is None else f"{v:.4g}"
    lines = [["headline", "published", "match", "beat", "reached", "matched", "beaten"]]
    lines += [
        [
            r["headline"],
            r["published"],
            cell(r["match"]),
            cell(r["beat"]),
            cell(r["reached"]),
            mark[r["matched"]],
            mark[r["beaten"]],
        ]
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = "\n".join(
        "  ".join(
            v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(line, widths))
        )
        for line in lines
    )
    slices = [
        f"extrapolated, not measured: Flash decoding {name} {row['extrapolated_flash_tokens_per_s']:.0f} tokens/s on a GPU that would hold it"
        for name, row in cases.get("G2", {}).get("rows", {}).items()
        if "extrapolated_flash_tokens_per_s" in row and "B=1," in name
    ]
    return rows, "\n".join([text, *slices])


# ---------------------------------------------------------------------------------------------------------------------
# Phases


def prepare(name: str, part: str) -> None:
    """In a worker: compile a part of a case, and say on standard output what failed."""
    bench = Bench(prepare=True, part=part)
    CASES[name].run(bench)
    print(
        json.dumps({row: kept["failed"] for row, kept in bench.rows.items() if kept.get("failed")})
    )


def warm(names: list[str]) -> None:
    """Compile what the cases need, in worker processes that share the GPU's memory and the caches."""
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    room, begun = torch.cuda.mem_get_info()[0] / 1e9 * 0.95, time.perf_counter()
    waiting = sorted(
        ((gb, name, part) for name in names for part, gb in CASES[name].parts.items()),
        key=lambda w: (w[1] != "G2", w[1] != "G4", -w[0]),
    )
    running, seconds = {}, {}
    env = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": "1"}
    while waiting or running:
        for job in list(waiting):
            if len(running) < min(WORKERS, os.cpu_count() or 1) and (
                sum(j[0] for j in running) + job[0] <= room or not running
            ):
                waiting.remove(job)
                log = open(CACHE / f"{job[1]}.{len(seconds) + len(running)}.log", "w")
                running[job] = (
                    subprocess.Popen(
                        [sys.executable, "-m", "bench.gpu", "--prepare", f"{job[1]}:{job[2]}"],
                        stdout=log,
                        stderr=log,
                        env=env,
                    ),
                    log,
                )
        time.sleep(0.2)
        over = time.perf_counter() - begun > WARM_LIMIT
        for job, (process, log) in list(running.items()):
            if over:
                process.kill()
            if process.poll() is not None or over:
                process.wait()
                log.close()
                del running[job]
                seconds[f"{job[1]} {job[2]}".strip()] = time.perf_counter() - begun
                if process.returncode:
                    say(
                        f"{job[1]} {job[2]}: compiling {'took too long' if over else 'failed'}, see {log.name}"
                    )
        if over:
            waiting.clear()
    (CACHE / "warm.json").write_text(
        json.dumps({"seconds": time.perf_counter() - begun, "ended_after_s": seconds})
    )
    say(f"compiled in {time.perf_counter() - begun:.0f} s")


def stamp() -> dict:
    """When and with what a case was measured."""
    driver = (
        subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        ).stdout.strip()
        if torch.version.cuda
        else torch.version.hip
    )
    return {
        key: environment()[key] for key in ("date", "gpu", "torch", "triton", "transformers")
    } | {"driver": driver.splitlines()[0] if driver else None}


def measure(names: list[str], budget: float, toy: bool = False) -> dict:
    """Run cases within the budget of seconds -> {case: {"title", "rows", "seconds"}}, a JSON line each."""
    begun, cases = time.monotonic(), {}
    torch._dynamo.config.recompile_limit = (
        256  # the same function at many shapes is not a recompile here
    )
    for name in names:
        case, spent = CASES[name], time.monotonic() - begun
        if spent + case.seconds > budget and not toy:
            cases[name] = {
                "title": case.title,
                "rows": {},
                "left_out": f"{spent:.0f} of {budget:.0f} s were spent, and it takes about {case.seconds:.0f}",
            }
        else:
            say(f"{name} {case.title}")
            bench = Bench(toy=toy, deadline=begun + budget)
            try:
                case.run(bench)
            except Exception as error:  # the other cases are still worth measuring
                bench.rows["error"] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            bench.free()
            cases[name] = {
                "title": case.title,
                "rows": bench.rows,
                "seconds": time.monotonic() - begun - spent,
            }
        print(json.dumps({"case": name, **cases[name]}), flush=True)
        if not toy:
            torch.cuda.synchronize()  # a kernel that faulted spoils all that follows: stop here
    return cases


def run(argv: list[str] | None) -> None:
    parser = cli.Parser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--warm", action="store_true", help="compile only")
    parser.add_argument("--measure", action="store_true", help="measure only")
    parser.add_argument(
        "--only", default=",".join(ORDER), metavar="A,B", help="cases, comma-separated"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=460,
        metavar="S",
        help="seconds for the measured phase (460)",
    )
    parser.add_argument("--toy", action="store_true", help="toy sizes on CPU, nothing recorded")
    parser.add_argument("--prepare", help="for the workers of --warm")
    args = parser.parse_args(argv)
    if args.toy and INTERPRETING:
        from tests import interpreter

        interpreter.install()
    elif args.toy:
        say("neither a GPU nor TRITON_INTERPRET=1: ours are the references, no kernel runs")
    names = args.only.split(",")
    for name in names:
        require(name in CASES, f"--only {name}: choose from {', '.join(ORDER)}")
    require(
        args.toy or torch.cuda.is_available(),
        "no GPU is visible to torch here: run it where there is one, or exercise the code with --toy",
    )
    if args.prepare:
        return prepare(*args.prepare.split(":", 1))
    if not args.toy and (args.warm or not args.measure):
        warm(names)
    if args.warm and not args.measure:
        return
    begun = time.perf_counter()
    cases = measure(names, args.budget, args.toy)
    print(scoreboard(cases, args.toy)[1])
    say(
        f"measured in {time.perf_counter() - begun:.0f} s; left out: {', '.join(n for n, c in cases.items() if 'left_out' in c) or 'nothing'}"
    )
    if not args.toy:
        name = "gpu_" + "_".join(torch.cuda.get_device_name().lower().split())
        done = {
            key: case | {"measured_with": stamp()}
            for key, case in cases.items()
            if "left_out" not in case
        }
        old = (
            json.loads((RESULTS / f"{name}.json").read_text())["cases"]
            if (RESULTS / f"{name}.json").exists()
            else {}
        )
        kept = {key: (old | done)[key] for key in ORDER if key in old | done}
        warmed = (
            json.loads((CACHE / "warm.json").read_text())
            if (CACHE / "warm.json").exists()
            else None
        )
        record(
            name,
            {
                **stamp(),
                "budget_s": args.budget,
                "left_out": [n for n, c in cases.items() if "left_out" in c],
                "compiled_in": warmed,
                "scoreboard": scoreboard(kept)[0],
                "cases": kept,
            },
        )


if __name__ == "__main__":
    sys.exit(cli.main("bench.gpu", run, None))
