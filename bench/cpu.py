"""The CPU suite: this model against Transformers' eager deepseek_v4 on the same weights.

    python -m bench.cpu                 everything; records bench/results/cpu.json and cpu.svg
                                        (15 to 40 minutes)
    python -m bench.cpu decode          some of: decode prefill train train_memory experts memory
                                        cache start
    python -m bench.cpu kernels         every C++ kernel switched off in turn: cpu_kernels.json
    python -m bench.cpu --against DIR   rows of decode, prefill and train beside those of another
                                        checkout; records nothing

Both sides run in one process, in fp32 without activation quantisation and on one thread, and are
fed varying tokens. Times are the least CPU time of several rounds in which the sides take turns;
wall time is kept beside it, and a case whose wall time exceeds its CPU time by a third, or more,
is marked "contended". Where a case names several threads its time is wall time. The model is the
embedded one, or a larger one where a case says small. Neither side has the huge pages that our
command lines ask for (see tools/cli.py). Transformers runs with the fastest of its expert
implementations, case by case. It recompiles at every decoded token, so its compiled decode is
three tokens, on one line.

kernels and --against run each side in a process of its own; these take turns round by round (see
turns.py). A row "LOSES" where it takes over 5 % longer than the other checkout, and longer than
the spread of its rounds explains.
"""

from __future__ import annotations

import datetime
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F

from bench import turns
from bench.cpu_worker import CHUNK, CONTEXT, DECODED, PREFILLED, ROWS, TINY, build, tokens_of
from bench.cpu_worker import train_step as our_train_step
from bench.plot import bars
from bench.record import RESULTS, record
from checkpoint import load
from compile_config import AUTO, PRESETS, CompileConfig, compile_decode, compile_prefill
from model import ModelArgs, Transformer
from ops.registry import require
from tests.testing import hf_model, rms
from tools import cli

ROOT = Path(__file__).parent.parent
ROUNDS = 5
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # Transformers' implementations

Run = Callable[[int], int | None]  # run(round) -> how many steps it took, or None for one


# --------------------------------------------------------------------------------------------------
# Timing


def side_by_side(sides: dict[str, Run], rounds: int = ROUNDS) -> dict[str, dict]:
    """{name: run} -> {name: {"ms": CPU, "wall_ms": wall, "contended"}}, per step, the least of the
    rounds.

    With several threads ms, too, is wall time: CPU time counts threads that wait.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = {name: {"ms": float("inf"), "wall_ms": float("inf")} for name in sides}
    for run in sides.values():
        run(0)
    for i in range(rounds):
        for name, run in sides.items():
            begun, wall = clock(), time.perf_counter()
            steps = run(i + 1) or 1
            ms = 1e3 * (clock() - begun) / steps
            wall_ms = 1e3 * (time.perf_counter() - wall) / steps
            least = best[name]
            least["ms"] = min(least["ms"], ms)
            least["wall_ms"] = min(least["wall_ms"], wall_ms)
    for case in best.values():
        case["contended"] = case["wall_ms"] > 1.33 * case["ms"]
    return best


def transformers_ms(case: dict) -> float:
    """Of the fastest of its expert implementations."""
    return min(side["ms"] for name, side in case.items() if name.startswith("transformers eager"))


def versus(case: dict, ours: str = "ours compiled") -> dict:
    """Adds how many times faster ours is than the fastest eager Transformers."""
    return case | {"ratio": transformers_ms(case) / case[ours]["ms"]}


def models(name: str = "tiny") -> tuple[Transformer, torch.nn.Module]:
    """Ours and Transformers' with the same weights: "tiny" or "small", see cpu_worker.build."""
    ours = build(name)
    return ours, hf_model(ours)


def suffix(name: str) -> str:
    return "" if name == "tiny" else f", {name}"


def transformers_sides(hf: torch.nn.Module, run: Run) -> dict[str, Run]:
    """One side per implementation of the experts, each of which calls run(i)."""

    def side(implementation: str) -> Run:
        def go(i: int):
            hf.set_experts_implementation(implementation)
            return run(i)

        return go

    return {f"transformers eager, {name}": side(name) for name in EXPERTS}


# --------------------------------------------------------------------------------------------------
# Decode and prefill


@torch.no_grad()
def decode(result: dict, batch: int) -> None:
    ours, hf = models()
    needed = PREFILLED + DECODED * (ROUNDS + 1) * len(EXPERTS) + 1
    tokens = tokens_of(batch, needed)
    prompt = tokens[:, :PREFILLED]
    ours.setup_caches(batch, CONTEXT)
    compiled = compile_decode(ours, PRESETS["default"])
    by_parts = compile_decode(ours, AUTO)
    prefill = compile_prefill(ours, PRESETS["eager"])

    def positions(p: int) -> torch.Tensor:
        return torch.full((batch,), p)

    def decoded(call: Callable, p: int) -> torch.Tensor:
        return call(tokens[:, p : p + 1], positions(p))

    prefill(prompt, positions(0), positions(PREFILLED))
    begun = time.perf_counter()
    decoded(compiled, PREFILLED)
    compile_s = time.perf_counter() - begun
    begun = time.perf_counter()
    decoded(by_parts, PREFILLED)
    compile_ahead_s = time.perf_counter() - begun
    checked = range(PREFILLED, PREFILLED + 8)
    logits = torch.cat([decoded(compiled, p) for p in checked], 1)
    expected = hf(tokens[:, : checked.stop]).logits[:, checked.start :]
    cache = hf(prompt, use_cache=True).past_key_values
    cached = PREFILLED  # tokens in Transformers' cache, which cannot go back

    def theirs(i: int) -> int:
        nonlocal cached
        for _ in range(DECODED):
            hf(tokens[:, cached : cached + 1], past_key_values=cache, use_cache=True)
            cached += 1
        return DECODED

    def mine(call: Callable) -> Run:
        def go(i: int) -> int:
            first = PREFILLED + i * DECODED
            for p in range(first, first + DECODED):
                decoded(call, p)
            return DECODED

        return go

    sides = {
        **transformers_sides(hf, theirs),
        "ours eager": mine(ours),
        "ours compiled": mine(compiled),
        "ours compiled ahead": mine(by_parts),
    }
    case = versus(side_by_side(sides))
    case |= {"context": PREFILLED, "rms": rms(logits, expected)}
    case |= {"compile_s": compile_s, "compile_ahead_s": compile_ahead_s}
    result[f"decode B={batch}"] = case
    if batch == 1:
        seconds = transformers_compiled_decode(hf, tokens, cache)
        result["transformers compiled decode, CPU seconds of the first tokens"] = seconds


def transformers_compiled_decode(hf: torch.nn.Module, tokens: torch.Tensor, cache) -> list[float]:
    """CPU seconds of three decoded tokens, each of which compiles anew."""

    @torch.compile
    def step(ids, past):
        return hf(ids, past_key_values=past, use_cache=True).logits

    seconds = []
    for i in range(3):
        begun = time.process_time()
        with torch._inductor.config.patch(force_disable_caches=True):
            step(tokens[:, i : i + 1], cache)
        seconds.append(time.process_time() - begun)
    return seconds


@torch.no_grad()
def prefill(result: dict, length: int) -> None:
    ours, hf = models()
    ours.setup_caches(1, CONTEXT)
    compiled = compile_prefill(ours, PRESETS["default"])
    prompts = [tokens_of(1, length, seed=i) for i in range(ROUNDS + 1)]

    @torch.compile
    def compiled_hf(ids):
        return hf(ids, use_cache=True, logits_to_keep=1).logits

    def eager(tokens, pos, lengths):
        return ours(tokens, pos, lengths, logits="last")

    def prefilled(call: Callable, i: int) -> torch.Tensor:
        """Logits of the last token of a prompt, [1, 1, V]."""
        for p in range(0, length, CHUNK):
            part = prompts[i][:, p : p + CHUNK]
            valid = part.shape[1]
            logits = call(F.pad(part, (0, CHUNK - valid)), torch.tensor([p]), torch.tensor([valid]))
        return logits

    def theirs(i: int) -> None:
        hf(prompts[i], use_cache=True, logits_to_keep=1)

    def theirs_compiled(i: int) -> None:
        compiled_hf(prompts[i])

    def mine(call: Callable) -> Run:
        def go(i: int) -> None:
            prefilled(call, i)

        return go

    sides = {
        **transformers_sides(hf, theirs),
        "ours eager": mine(eager),
        "ours compiled": mine(compiled),
    }
    if length <= 512:
        sides["transformers compiled"] = theirs_compiled
    case = versus(side_by_side(sides))
    logits, expected = prefilled(compiled, 0), hf(prompts[0]).logits
    case |= {"chunk": CHUNK, "rms": rms(logits[:, -1], expected[:, -1])}
    result[f"prefill {length}"] = case


# --------------------------------------------------------------------------------------------------
# Training


AHEAD = (1, 256)  # rows, tokens of the step that is also compiled ahead of time


def train_sides(ours: Transformer, hf: torch.nn.Module, batch: int, length: int) -> dict[str, Run]:
    """One step each: next-token cross-entropy, gradients, their norm, AdamW; ours all compiled."""
    rate = torch.tensor(1e-4)
    hf.train()
    optimizer = torch.optim.AdamW(hf.parameters(), lr=1e-4)
    batches = [tokens_of(batch, length + 1, seed=i) for i in range(ROUNDS + 1)]

    def inputs(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return batches[i][:, :-1].contiguous(), batches[i][:, 1:].contiguous()

    def mine(cfg: CompileConfig) -> Run:
        step = our_train_step(ours, cfg)

        def run(i: int) -> None:
            step(*inputs(i), None, rate)
            require(cfg is not AUTO or step.ran_compiled, "the step was not compiled ahead of time")

        return run

    def theirs(i: int) -> None:
        tokens, labels = inputs(i)
        logits = hf(tokens, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()
        torch.nn.utils.get_total_norm([p.grad for p in hf.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()

    sides = transformers_sides(hf, theirs)
    # gathers the weights of every token: ten times slower
    del sides["transformers eager, batched_mm"]
    sides["ours compiled"] = mine(PRESETS["regional"])
    if (batch, length) == AHEAD:
        sides["ours compiled ahead"] = mine(AUTO)
    return sides


def train(result: dict, batch: int, length: int, name: str = "tiny", threads: int = 1) -> None:
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    case = versus(side_by_side(train_sides(*models(name), batch, length)))
    torch.set_num_threads(1)
    key = f"train step {batch} x {length}{suffix(name)}"
    if threads > 1:
        key += f", {threads} threads"
    result[key] = case | {"tok_per_s": batch * length / case["ours compiled"]["ms"] * 1e3}


PEAK = """
import ctypes, gc, re

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def forget_the_peak():  # freed memory is handed back before
    gc.collect(), ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    return status("VmRSS")
"""


def printed_by(script: str, side: str) -> int:
    """The integer that a script prints last, in a process of its own, given the side."""
    command = [sys.executable, "-c", PEAK + script, side]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return int(done.stdout.split()[-1])


TRAIN_MEMORY = """
import sys, torch
from bench.cpu import models, train_sides
torch.set_num_threads(1)
step = train_sides(*models("{name}"), {batch}, {length})[sys.argv[1]]
step(0)
before = forget_the_peak()
step(1), step(2)
print(status("VmHWM") - before)
"""


def train_memory(result: dict, batch: int, length: int, name: str = "tiny") -> None:
    """Peak memory of a training step above that held between steps, with and without the
    optimizer's state.

    Each side runs in a process of its own and has trained one step before (it compiles, and makes
    the state), so gradients, activations and temporaries count, and nothing else.
    """
    script = TRAIN_MEMORY.format(batch=batch, length=length, name=name)
    sides = ("ours compiled", "transformers eager, grouped_mm")
    mine, theirs = (printed_by(script, side) for side in sides)
    state = 2 * sum(p.nbytes for p in models(name)[1].parameters())
    result[f"memory of a train step {batch} x {length}{suffix(name)}"] = {
        f"{sides[0]}_bytes": mine,
        f"{sides[1]}_bytes": theirs,
        "optimizer_state_bytes": state,
        "ratio": theirs / mine,
        "ratio_with_optimizer_state": (theirs + state) / (mine + state),
    }


# --------------------------------------------------------------------------------------------------
# Experts, memory, start


@torch.no_grad()
def experts(result: dict) -> None:
    """Whole compiled steps with the experts in CPU's default form, beside the traced reference."""
    for key, compiled, batch, length in (
        ("decode B=1", compile_decode, 1, 1),
        ("decode B=8", compile_decode, 8, 1),
        ("prefill 512", compile_prefill, 1, 512),
    ):
        sides = {}
        for name, modes in (("opaque", None), ("traced", {"moe": "reference"})):
            model = load(TINY, dtype=torch.float32, act_quant=False, ops=modes).eval()
            model.setup_caches(batch, CONTEXT)
            call = compiled(model, PRESETS["default"])
            steps = DECODED if length == 1 else 1

            def run(i: int, call=call, steps=steps, batch=batch, length=length) -> int:
                lengths = torch.full((batch,), length)
                for p in range(i * steps, (i + 1) * steps):
                    call(tokens_of(batch, length, seed=p), torch.full((batch,), p), lengths)
                return steps

            sides[name] = run
        case = side_by_side(sides)
        result[f"experts in {key}"] = case | {"times": case["traced"]["ms"] / case["opaque"]["ms"]}


FORWARD_MEMORY = """
import sys, torch
from bench.cpu import models, tokens_of
ours, hf = models()
tokens = tokens_of(1, {length})
with torch.no_grad():
    for ids in (tokens[:, :64], tokens):
        before = forget_the_peak()
        if sys.argv[1] == "ours":
            ours(ids, logits="last")
        else:
            hf(ids, use_cache=False, logits_to_keep=1)
print(status("VmHWM") - before)
"""


def memory(result: dict, length: int = 2048) -> None:
    """Memory that one forward adds to the peak of a process that has loaded the model."""
    script = FORWARD_MEMORY.format(length=length)
    ours, theirs = (printed_by(script, side) for side in ("ours", "transformers"))
    result[f"memory of a forward over {length}"] = {
        "ours_bytes": ours,
        "transformers_bytes": theirs,
        "ratio": theirs / ours,
    }


def cache(result: dict, length: int = 131072) -> None:
    """Bytes of cache per token of Flash (docs/v4.md#dimensions), from the buffers allocated."""
    with torch.device("meta"):
        model = Transformer(ModelArgs.flash()).to(torch.bfloat16)
    model.setup_caches(1, length)
    caches = [b for name, b in model.named_buffers() if name.endswith(("ring.rows", "entries"))]
    ours = sum(b.nbytes for b in caches)
    layers = model.args.n_layers
    v3_latents = layers * 2 * (512 + 64) * length  # V3's latent attention at the same depth
    v32_index_keys = layers * 2 * 128 * length  # and V3.2's indexer
    result["cache at 128k, Flash"] = {
        "bytes": ours,
        "bytes_per_token": ours / length,
        "v3_ratio": v3_latents / ours,
        "v32_ratio": (v3_latents + v32_index_keys) / ours,
    }


STARTED = (
    "ttft_s",
    "text_s",
    "switched_at",
    "eager_tokens",
    "compiled_tokens",
    "ttft_warm_s",
    "tok_per_s",
    "threads",
    "memory_bytes",
    "act_quant",
)


def start(result: dict) -> None:
    """`python generate.py` in a fresh process: without a compile cache, then with the one that
    left; in a cold one wall_s is when everything was compiled. The same of training.

    The transcript of the second one goes into the README.
    """
    result["imports"] = imports()
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
        env.pop("OMP_NUM_THREADS")
        for name in ("cold", "warm"):
            load_before, begun = os.getloadavg()[0], time.perf_counter()
            cpu_before = cpu_seconds()
            command = [sys.executable, "generate.py", "--json"]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, cwd=ROOT, env=env
            )
            report = json.loads(done.stdout.splitlines()[-1])
            result[f"start {name}"] = {
                "wall_s": time.perf_counter() - begun,
                "cpu_s": cpu_seconds() - cpu_before,
                "load_average_before": load_before,
                **{key: report[key] for key in STARTED},
            }
    with tempfile.TemporaryDirectory() as folder:
        env["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name in ("cold", "warm"):
            result[f"start training {name}"] = start_training(env)
    (RESULTS / "transcript.txt").write_text(done.stderr)


def cpu_seconds() -> float:
    """Of all processes that this one started and that have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start_training(env: dict) -> dict:
    """`python train_step.py` in a fresh process -> seconds to its first step, to its last and to
    its end.
    """
    load_before, begun = os.getloadavg()[0], time.perf_counter()
    cpu_before, seen = cpu_seconds(), []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as out:
        command = [sys.executable, "-u", "train_step.py", "--cache", folder, "--json"]
        with subprocess.Popen(
            command, stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env
        ) as process:
            for line in process.stderr:
                if line.startswith("step "):
                    seen.append(time.perf_counter() - begun)
        assert process.returncode == 0
        out.seek(0)
        report = json.loads(out.read().splitlines()[-1])
    return {
        "first_step_s": seen[0],
        "last_step_s": seen[-1],
        "wall_s": time.perf_counter() - begun,
        "cpu_s": cpu_seconds() - cpu_before,
        "load_average_before": load_before,
        **{key: report[key] for key in ("eager_steps", "compiled_steps", "tok_per_s", "threads")},
    }


def imports() -> dict[str, float]:
    """Seconds to import torch, then generate.py, then to load the embedded model."""
    script = """
import time
start = time.perf_counter(); import torch
loaded = time.perf_counter(); import generate
ours = time.perf_counter(); generate.load(generate.ROOT / "assets" / "tiny", dtype=torch.float32)
print(loaded - start, ours - loaded, time.perf_counter() - ours)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    names = ("torch_s", "ours_s", "load_s")
    return dict(zip(names, map(float, done.stdout.split()), strict=True))


# --------------------------------------------------------------------------------------------------
# Command line


def decode_cases(result: dict) -> None:
    for batch in (1, 8):
        decode(result, batch)


def prefill_cases(result: dict) -> None:
    for length in (512, 1800):
        prefill(result, length)


TRAINED = ((1, 256), (4, 256), (1, 1024), (1, 512, "small"))


def train_cases(result: dict) -> None:
    for case in TRAINED:
        train(result, *case)
    train(result, 1, 512, "small", threads=2)


def train_memory_cases(result: dict) -> None:
    for case in TRAINED:
        train_memory(result, *case)


CASES = {
    "decode": decode_cases,
    "prefill": prefill_cases,
    "train": train_cases,
    "train_memory": train_memory_cases,
    "experts": experts,
    "memory": memory,
    "cache": cache,
    "start": start,
}


def measure(names: list[str]) -> None:
    """Run these cases, or all, and record after each; what was recorded of the others stays."""
    torch.set_num_threads(1)
    old = RESULTS / "cpu.json"
    result = json.loads(old.read_text()) if names and old.exists() else {}
    result.setdefault("dates", {})
    result["threads"] = torch.get_num_threads()
    result["weights"] = "assets/tiny (small: random), fp32, act_quant off"
    for name in names or CASES:
        torch._dynamo.reset()
        measured: dict = {}
        CASES[name](measured)
        result.pop("environment", None)
        for key, case in measured.items():
            result[key] = case
            result["dates"][key] = datetime.date.today().isoformat()
            print(key, json.dumps(case), flush=True)
        record("cpu", result)
    ratios = {
        key: case["ratio"]
        for key, case in result.items()
        if isinstance(case, dict) and "ratio" in case
    }
    title = "Times faster (or smaller) than Transformers eager, same weights, CPU"
    (RESULTS / "cpu.svg").write_text(bars(title, ratios))


def run(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}; or kernels")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout")
    parser.add_argument("--rounds", type=int, default=7, help="with kernels and --against")
    flags = parser.parse_args(argv)
    unknown = [name for name in flags.cases if name not in (*CASES, "kernels")]
    require(not unknown, f"unknown case {unknown and unknown[0]!r}: choose from {', '.join(CASES)}")
    if flags.against:
        require((flags.against / "model.py").exists(), f"--against {flags.against}: no model.py")
        kinds = tuple(flags.cases) or ("decode", "prefill", "train")
        rows = [row for row in ROWS if row.startswith(kinds)]
        require(rows, "--against compares decode, prefill and train")
        turns.against(flags.against.resolve(), rows, flags.rounds)
        return
    if "kernels" in flags.cases:
        record("cpu_kernels", {"rounds": flags.rounds, "kernels": turns.kernels(flags.rounds)})
        flags.cases.remove("kernels")
        if not flags.cases:
            return
    measure(flags.cases)


def main(argv: list[str] | None = None) -> int:
    return cli.main("bench.cpu", run, argv, outlives_reader=True)


if __name__ == "__main__":
    sys.exit(main())
