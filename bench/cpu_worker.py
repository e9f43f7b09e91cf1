"""Time one row of the CPU suite in a process of its own, one round whenever it is told to.

    python -P bench/cpu_worker.py ROW [--without OP,OP]

bench/turns.py starts one process per side and lets them take turns: it writes a line to standard
input, the process runs a round and answers with a line of JSON. The code that is timed is that of
the checkout PYTHONPATH names, which may be older than this file, so what has moved since is looked
for in both places. --without switches the C++ kernels of ops off.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import load
from compile_config import (
    PRESETS,
    CompileConfig,
    compile_decode,
    compile_prefill,
    compile_train_step,
)
from model import ModelArgs, Transformer

ROOT = Path(inspect.getfile(Transformer)).parent  # of the checkout that is timed
TINY = str(ROOT / "assets" / "tiny")
CONTEXT = 2048  # positions that caches hold
PREFILLED = 256  # where decoding starts
DECODED = 24  # steps of a round of decoding beside Transformers
DECODED_LONG = 96  # and beside another process: a longer round is timed more exactly
CHUNK = 256  # tokens per call of prefill
SMALL = dict(  # 56 M parameters
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


def find(*places: str):
    """The first of "module:name" that exists: names move between versions of the project."""
    for place in places:
        module, name = place.split(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {', '.join(places)} exists in this checkout")


LossWeights = find("training.losses:LossWeights", "model:LossWeights", "model:Weights")
Optimizer = find("training.optim:Optimizer", "optim:Optimizer")


def tokens_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 1024, shape, generator=torch.Generator().manual_seed(seed))


def build(name: str) -> Transformer:
    """In fp32, without activation quantisation: "tiny", the embedded model, or "small", with random
    weights.
    """
    if name == "tiny":
        return load(TINY, dtype=torch.float32, act_quant=False).eval()
    torch.manual_seed(0)
    return Transformer(ModelArgs(**SMALL)).eval()


def train_step(model: Transformer, cfg: CompileConfig = PRESETS["regional"]) -> Callable:
    """step(tokens [B, S], labels [B, S], doc_ids, lr), compiled: next-token cross-entropy and
    AdamW, no MTP block.
    """
    del model.mtp[:]
    model.args.n_mtp_layers = 0
    model.args.compress_ratios = model.args.compress_ratios[: model.args.n_layers]
    model.train().requires_grad_(True)
    adam = Optimizer(model, "adamw", betas=(0.9, 0.999), eps=1e-8, decay=0.01, bias_rate=0.0)
    weights = LossWeights(balance=0.0, index=0.0)
    return compile_train_step(model, adam, cfg, weights=weights)


# --------------------------------------------------------------------------------------------------
# Rows: a function that prepares a row and returns run(round) -> steps that the round took


def decode(batch: int) -> Callable[[int], int]:
    model = build("tiny")
    model.setup_caches(batch, CONTEXT)
    step = compile_decode(model, PRESETS["default"])
    prefill = compile_prefill(model, PRESETS["eager"])
    tokens = tokens_of(batch, CONTEXT)
    filled = torch.full((batch,), PREFILLED)
    prefill(tokens[:, :PREFILLED], torch.zeros_like(filled), filled)
    rounds = (CONTEXT - PREFILLED) // DECODED_LONG

    def run(i: int) -> int:
        first = PREFILLED + i % rounds * DECODED_LONG
        for p in range(first, first + DECODED_LONG):
            step(tokens[:, p : p + 1], torch.full((batch,), p))
        return DECODED_LONG

    return run


def prefill(length: int) -> Callable[[int], int]:
    model = build("tiny")
    model.setup_caches(1, CONTEXT)
    step = compile_prefill(model, PRESETS["default"])

    def run(i: int) -> int:
        prompt = tokens_of(1, length, seed=i)
        for p in range(0, length, CHUNK):
            part = prompt[:, p : p + CHUNK]
            valid = part.shape[1]
            step(F.pad(part, (0, CHUNK - valid)), torch.tensor([p]), torch.tensor([valid]))
        return 1

    return run


def train(batch: int, length: int, name: str = "tiny", threads: int = 1) -> Callable[[int], int]:
    torch.set_num_threads(threads)
    step, rate = train_step(build(name)), torch.tensor(1e-4)

    def run(i: int) -> int:
        tokens = tokens_of(batch, length + 1, seed=i)
        step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, rate)
        return 1

    return run


ROWS = {
    "decode B=1": (decode, 1),
    "decode B=8": (decode, 8),
    "prefill 512": (prefill, 512),
    "prefill 1800": (prefill, 1800),
    "train step 1 x 256": (train, 1, 256),
    "train step 4 x 256": (train, 4, 256),
    "train step 1 x 1024": (train, 1, 1024),
    "train step 1 x 512, small": (train, 1, 512, "small"),
    "train step 1 x 512, small, 2 threads": (train, 1, 512, "small", 2),
}


# --------------------------------------------------------------------------------------------------
# The process


def called(run: Callable[[int], int]) -> list[str]:
    """Ops with a C++ kernel, of the op or of its backward, that a round calls."""
    kernels = find("ops.cpp:KERNELS")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run(0)
    names = {event.name.split("::")[-1] for event in profiler.events() if "::" in event.name}
    return sorted({name.removesuffix("_backward") for name in names & set(kernels)})


def timed(run: Callable[[int], int], i: int) -> dict[str, float]:
    """Milliseconds per step of round i; with several threads "ms", too, is wall time: CPU time
    counts threads that wait.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begun, wall = clock(), time.perf_counter()
    steps = run(i)
    return {
        "ms": 1e3 * (clock() - begun) / steps,
        "wall_ms": 1e3 * (time.perf_counter() - wall) / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--without", default="")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    prepare, *sizes = ROWS[flags.row]
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(prepare is train))
        if flags.without:
            stack.enter_context(find("ops.cpp:disabled")(*flags.without.split(",")))
        run = prepare(*sizes)
        run(0)  # compiles
        seconds = time.perf_counter() - begun
        print(json.dumps({"first_round_s": seconds, "kernels": called(run)}), flush=True)
        for i, _ in enumerate(sys.stdin, 1):
            print(json.dumps(timed(run, i)), flush=True)


if __name__ == "__main__":
    main()
