"""The CPU suite: this model against Transformers' eager deepseek_v4, on the same weights, in one process, alternating.

    python -m bench.cpu            everything; records bench/results/cpu.json and cpu.svg (15 to 40 minutes)
    python -m bench.cpu decode     some of: decode prefill train train_memory experts memory cache start

Both sides run the embedded model, or a larger one where a case says small, in fp32 without activation quantisation, on one
thread, and are fed varying tokens. Times are the least CPU time of several rounds in which the sides take turns; wall time is
kept beside it, and a case whose wall time exceeds its CPU time by a third, or more, is marked "contended". Where a case names
several threads its time is wall time. Neither side has the huge pages that our command lines ask for (see cli.py). Transformers
runs with the fastest of its expert implementations, case by case. It recompiles at every decoded token, so its compiled decode
is three tokens, on one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.nn.functional as F

import ops
from bench.plot import bars
from bench.record import RESULTS, record
from checkpoint import load
from compile_config import PRESETS, compile_decode, compile_prefill, compile_train_step
from generate import ROOT
from model import LossWeights, ModelArgs, Transformer
from tests.testing import hf_model, rms
from training.optim import Optimizer

TINY, ROUNDS = str(ROOT / "assets" / "tiny"), 5
EXPERTS = ("eager", "batched_mm", "grouped_mm")  # Transformers' implementations


def side_by_side(sides: dict, rounds: int = ROUNDS) -> dict:
    """{name: function of the round's number} -> {name: {"ms": CPU, "wall_ms": wall}}, the least of the rounds.

    With several threads ms, too, is wall time: CPU time counts those that wait.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = {name: {"ms": float("inf"), "wall_ms": float("inf")} for name in sides}
    for name, run in sides.items():
        run(0)
    for i in range(rounds):
        for name, run in sides.items():
            start, wall = clock(), time.perf_counter()
            steps = run(i + 1) or 1
            now = {
                "ms": 1e3 * (clock() - start) / steps,
                "wall_ms": 1e3 * (time.perf_counter() - wall) / steps,
            }
            best[name] = {key: min(best[name][key], now[key]) for key in now}
    for case in best.values():
        case["contended"] = case["wall_ms"] > 1.33 * case["ms"]
    return best


def versus(result: dict, ours: str = "ours compiled") -> dict:
    """Adds how many times faster ours is than the fastest eager Transformers."""
    theirs = min(
        case["ms"] for name, case in result.items() if name.startswith("transformers eager")
    )
    return result | {"ratio": theirs / result[ours]["ms"]}


def tokens_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 1024, shape, generator=torch.Generator().manual_seed(seed))


def models(name: str = "tiny"):
    """Ours and Transformers', fp32: "tiny", the embedded one, or "small", of 56 M parameters, random ones."""
    if name == "tiny":
        ours = load(TINY, dtype=torch.float32, act_quant=False).eval()
    else:
        torch.manual_seed(0)
        ours = Transformer(
            ModelArgs(
                vocab_size=8192,
                dim=512,
                moe_inter_dim=256,
                n_layers=6,
                n_hash_layers=2,
                n_mtp_layers=0,
                n_heads=8,
                n_routed_experts=16,
                n_activated_experts=4,
                q_lora_rank=192,
                head_dim=128,
                rope_head_dim=16,
                o_groups=2,
                o_lora_rank=256,
                index_n_heads=16,
                index_head_dim=32,
                index_topk=64,
                max_seq_len=2048,
                compress_ratios=(0, 0, 4, 128, 4, 128),
            )
        ).eval()
    return ours, hf_model(ours)


def suffix(name: str) -> str:
    return "" if name == "tiny" else f", {name}"


def transformers_sides(hf, run) -> dict:
    """run(i), once per implementation of the experts."""

    def side(name):
        def go(i):
            hf.set_experts_implementation(name)
            return run(i)

        return go

    return {f"transformers eager, {name}": side(name) for name in EXPERTS}


@torch.no_grad()
def decode(result: dict, batch: int, steps: int = 24, context: int = 256) -> None:
    ours, hf = models()
    rounds = ROUNDS + 1
    need = context + steps * rounds * len(EXPERTS) + 1
    tokens = tokens_of(batch, need)
    ours.setup_caches(batch, 2048)
    compiled, prefill = (
        compile_decode(ours, PRESETS["default"]),
        compile_prefill(ours, PRESETS["eager"]),
    )
    pos = lambda p: torch.full((batch,), p)
    prefill(tokens[:, :context], pos(0), torch.full((batch,), context))
    start = time.perf_counter()
    compiled(tokens[:, context : context + 1], pos(context))
    seconds = time.perf_counter() - start
    got = torch.cat(
        [compiled(tokens[:, p : p + 1], pos(p)) for p in range(context, context + 8)], 1
    )
    expected = hf(tokens[:, : context + 8]).logits[:, -8:]
    cache = hf(tokens[:, :context], use_cache=True).past_key_values
    at = [context]  # where Transformers is; it cannot go back

    def theirs(i):
        for _ in range(steps):
            hf(tokens[:, at[0] : at[0] + 1], past_key_values=cache, use_cache=True)
            at[0] += 1
        return steps

    def mine(call):
        def go(i):
            for p in range(context + i * steps, context + (i + 1) * steps):
                call(tokens[:, p : p + 1], pos(p))
            return steps

        return go

    case = versus(
        side_by_side(
            {
                **transformers_sides(hf, theirs),
                "ours eager": mine(ours),
                "ours compiled": mine(compiled),
            }
        )
    )
    result[f"decode B={batch}"] = case | {
        "context": context,
        "compile_s": seconds,
        "rms": rms(got, expected),
    }
    if batch == 1:
        slow = torch.compile(lambda ids, past: hf(ids, past_key_values=past, use_cache=True).logits)
        spent = []
        for i in range(3):
            start = time.process_time()
            with torch._inductor.config.patch(force_disable_caches=True):
                slow(tokens[:, i : i + 1], cache)
            spent.append(time.process_time() - start)
        result["transformers compiled decode, CPU seconds of the first tokens"] = spent


@torch.no_grad()
def prefill(result: dict, length: int, chunk: int = 256) -> None:
    ours, hf = models()
    ours.setup_caches(1, 2048)
    compiled = compile_prefill(ours, PRESETS["default"])
    compiled_hf = torch.compile(lambda ids: hf(ids, use_cache=True, logits_to_keep=1).logits)
    prompts = [tokens_of(1, length, seed=i) for i in range(ROUNDS + 1)]

    def mine(call):
        def go(i):
            for p in range(0, length, chunk):
                part = prompts[i][:, p : p + chunk]
                now.append(
                    call(
                        F.pad(part, (0, chunk - part.shape[1])),
                        torch.tensor([p]),
                        torch.tensor([part.shape[1]]),
                    )
                )

        return go

    now: list[torch.Tensor] = []
    eager = lambda tokens, pos, lengths: ours(tokens, pos, lengths, logits="last")
    sides = {
        **transformers_sides(
            hf, lambda i: hf(prompts[i], use_cache=True, logits_to_keep=1) and None
        ),
        "ours eager": mine(eager),
        "ours compiled": mine(compiled),
    }
    if length <= 512:
        sides["transformers compiled"] = lambda i: compiled_hf(prompts[i]) is None
    case = versus(side_by_side(sides))
    mine(compiled)(0)
    result[f"prefill {length}"] = case | {
        "chunk": chunk,
        "rms": rms(now[-1][:, -1], hf(prompts[0]).logits[:, -1]),
    }


def train_sides(ours, hf, batch: int, length: int) -> dict:
    """One step each: forward, backward, norm of the gradient and AdamW, cross-entropy of the next token alone. Ours is compiled, all of it."""
    del ours.mtp[:]
    ours.train().requires_grad_(True), hf.train()
    batches = [tokens_of(batch, length + 1, seed=i) for i in range(ROUNDS + 1)]
    rate, optimizer = torch.tensor(1e-4), torch.optim.AdamW(hf.parameters(), lr=1e-4)
    adam = Optimizer(
        ours, "adamw", betas=(0.9, 0.999), eps=1e-8, decay=0.01, bias_rate=0.0
    )  # the same
    step = compile_train_step(
        ours, adam, PRESETS["regional"], weights=LossWeights(balance=0.0, index=0.0)
    )

    def mine(i):
        step(batches[i][:, :-1].contiguous(), batches[i][:, 1:].contiguous(), None, rate)

    def theirs(i):
        logits = hf(batches[i][:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1).float(), batches[i][:, 1:].flatten()).backward()
        torch.nn.utils.get_total_norm([p.grad for p in hf.parameters() if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()

    sides = transformers_sides(hf, theirs)
    del sides[
        "transformers eager, batched_mm"
    ]  # gathers the weights of every token: ten times slower
    return sides | {"ours compiled": mine}


def train(result: dict, batch: int, length: int, name: str = "tiny", threads: int = 1) -> None:
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    case = versus(side_by_side(train_sides(*models(name), batch, length)))
    torch.set_num_threads(1)
    key = f"train step {batch} x {length}{suffix(name)}" + (
        f", {threads} threads" if threads > 1 else ""
    )
    result[key] = case | {"tok_per_s": batch * length / case["ours compiled"]["ms"] * 1e3}


def train_memory(result: dict, batch: int, length: int, name: str = "tiny") -> None:
    """What a training step adds to what is held between steps, and that with the optimizer's state, per side and process.

    Each side has trained one step before (it compiles, and makes the state). Freed memory is handed back to the system
    before the peak is measured: gradients, activations and temporaries count, and nothing else.
    """
    script = """
import ctypes, gc, re, sys, torch
from bench.cpu import models, train_sides
torch.set_num_threads(1)
ours, hf = models("{name}")
step = train_sides(ours, hf, {batch}, {length})[sys.argv[1]]
step(0)
gc.collect(), ctypes.CDLL(None).malloc_trim(0)
def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = status("VmRSS")
step(1), step(2)
print(status("VmHWM") - before)
""".format(batch=batch, length=length, name=name)
    sides = {
        side: int(
            subprocess.run(
                [sys.executable, "-c", script, side],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
            ).stdout.split()[-1]
        )
        for side in ("ours compiled", "transformers eager, grouped_mm")
    }
    mine, theirs = sides.values()
    state = 2 * sum(p.nbytes for p in models(name)[1].parameters())
    result[f"memory of a train step {batch} x {length}{suffix(name)}"] = {
        f"{side}_bytes": used for side, used in sides.items()
    } | {
        "optimizer_state_bytes": state,
        "ratio": theirs / mine,
        "ratio_with_optimizer_state": (theirs + state) / (mine + state),
    }


@torch.no_grad()
def experts(result: dict) -> None:
    """Whole compiled steps with the experts in the form that is the default on CPU, beside the traced reference."""
    for key, compiled, batch, length in (
        ("decode B=1", compile_decode, 1, 1),
        ("decode B=8", compile_decode, 8, 1),
        ("prefill 512", compile_prefill, 1, 512),
    ):
        sides = {}
        for name, forms in (("opaque", None), ("traced", {"moe": "reference"})):
            model = load(TINY, dtype=torch.float32, act_quant=False, ops=forms).eval()
            model.setup_caches(batch, 2048)
            call, steps = compiled(model, PRESETS["default"]), 24 if length == 1 else 1

            def run(i, call=call, steps=steps):
                for p in range(i * steps, (i + 1) * steps):
                    call(
                        tokens_of(batch, length, seed=p),
                        torch.full((batch,), p),
                        torch.full((batch,), length),
                    )
                return steps

            sides[name] = run
        case = side_by_side(sides)
        result[f"experts in {key}"] = case | {"times": case["traced"]["ms"] / case["opaque"]["ms"]}


def memory(result: dict, length: int = 2048) -> None:
    """What one forward adds to the peak of a process that has loaded the model, each side in a process of its own."""
    script = """
import re, sys, torch
from bench.cpu import models, tokens_of
ours, hf = models()
tokens = tokens_of(1, {length})
def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
with torch.no_grad():
    warm = tokens[:, :64]
    (ours(warm, logits="last"), hf(warm, use_cache=False, logits_to_keep=1))
    open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
    before = status("VmRSS")
    ours(tokens, logits="last") if sys.argv[1] == "ours" else hf(tokens, use_cache=False, logits_to_keep=1)
print(status("VmHWM") - before)
""".format(length=length)
    used = {
        side: int(
            subprocess.run(
                [sys.executable, "-c", script, side],
                capture_output=True,
                text=True,
                check=True,
                cwd=ROOT,
            ).stdout.split()[-1]
        )
        for side in ("ours", "transformers")
    }
    result[f"memory of a forward over {length}"] = {
        **{f"{k}_bytes": v for k, v in used.items()},
        "ratio": used["transformers"] / used["ours"],
    }


def cache(result: dict, length: int = 131072) -> None:
    """Bytes of cache per token at 128k (docs/v4.md#dimensions; the embedded model's own sizes), from the buffers allocated."""
    with torch.device("meta"):
        model = Transformer(ModelArgs.flash()).to(torch.bfloat16)
    model.setup_caches(1, length)
    mine = sum(
        b.nbytes for name, b in model.named_buffers() if name.endswith(("ring.rows", "entries"))
    )
    mla, index = (
        43 * 2 * (512 + 64) * length,
        43 * 2 * 128 * length,
    )  # the same depth of V3's latent attention; V3.2's index keys
    result["cache at 128k, Flash"] = {
        "bytes": mine,
        "bytes_per_token": mine / length,
        "v3_ratio": mla / mine,
        "v32_ratio": (mla + index) / mine,
    }


def start(result: dict) -> None:
    """`python generate.py` in a fresh process: without a compile cache, then with the one that left."""
    for name in (folder := tempfile.TemporaryDirectory()) and ("cold", "warm"):
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder.name}
        env.pop("OMP_NUM_THREADS")
        load_before, wall = os.getloadavg()[0], time.perf_counter()
        out = subprocess.run(
            [sys.executable, "generate.py", "--json"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env=env,
        )
        report = json.loads(out.stdout.splitlines()[-1])
        if name == "cold":
            (RESULTS / "transcript.txt").write_text(out.stderr)
        result[f"start {name}"] = {
            "wall_s": time.perf_counter() - wall,
            "load_average_before": load_before,
        } | {
            key: report[key]
            for key in (
                "ttft_s",
                "ttft_warm_s",
                "compile_s",
                "tok_per_s",
                "graphs",
                "breaks",
                "recompiles",
                "threads",
                "memory_bytes",
                "act_quant",
            )
        }
    folder.cleanup()


CASES = {
    "decode": lambda result: (decode(result, 1), decode(result, 8)),
    "prefill": lambda result: (prefill(result, 512), prefill(result, 1800)),
    "train": lambda result: (
        train(result, 1, 256),
        train(result, 4, 256),
        train(result, 1, 1024),
        train(result, 1, 512, "small"),
        train(result, 1, 512, "small", threads=2),
    ),
    "train_memory": lambda result: (
        train_memory(result, 1, 256),
        train_memory(result, 4, 256),
        train_memory(result, 1, 1024),
        train_memory(result, 1, 512, "small"),
    ),
    "experts": experts,
    "memory": memory,
    "cache": cache,
    "start": start,
}


def main(argv: list[str]) -> int:
    unknown = [name for name in argv if name not in CASES]
    if unknown:
        print(
            f"bench.cpu: unknown case {unknown[0]!r}: choose from {', '.join(CASES)}",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    old = RESULTS / "cpu.json"
    result = json.loads(old.read_text()) if argv and old.exists() else {}
    result |= {
        "threads": torch.get_num_threads(),
        "weights": "assets/tiny (small: random), fp32, act_quant off",
    }
    for name in argv or CASES:
        before = set(result)
        torch._dynamo.reset()
        CASES[name](result)
        for key in result:
            if key not in before or name in key:
                print(key, json.dumps(result[key]), flush=True)
        result.pop("environment", None)
        record("cpu", result)
    ratios = {
        key: case["ratio"]
        for key, case in result.items()
        if isinstance(case, dict) and "ratio" in case
    }
    (RESULTS / "cpu.svg").write_text(
        bars("Times faster (or smaller) than Transformers eager, same weights, CPU", ratios)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
