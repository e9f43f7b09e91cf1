"""The proof of bench/soak.py about whole commands: signals at random moments of any of them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from checkpoint import save
from model import ModelArgs, Transformer
from tools.compile_cache import AHEAD, WORK_PREFIX
from training.dataset import BYTES

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "data" / "shakespeare.txt"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


class Command:
    """A command line, and a check of what it left when it ended well.

    argv(i) is that of round i: the first word is a file of the project
    """

    def __init__(self, argv: Callable[[int], list[str]], check: Callable[[str, int], None]):
        self.argv, self.check = argv, check
        self.seconds = 0.0  # of the last run that was not stopped

    def start(self, i: int, env: dict) -> subprocess.Popen:
        """In a group of its own, as a terminal would start it."""
        return subprocess.Popen(
            [sys.executable, *self.argv(i)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, i: int, env: dict) -> None:
        """To its end, which must be good."""
        begun = time.perf_counter()
        out, err = (process := self.start(i, env)).communicate()
        self.seconds = time.perf_counter() - begun
        assert process.returncode == 0, f"{self.argv(i)} ended with {process.returncode}: {err}"
        self.check(out, i)

    def stop(self, i: int, env: dict, seconds: float, number: signal.Signals) -> bool:
        """Send a signal to its group after some seconds -> whether it still ran."""
        process = self.start(i, env)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
        out, err = process.communicate(timeout=300)
        assert "Traceback" not in out + err, f"{self.argv(i)} after {seconds:.2f} s: {err}"
        assert process.returncode in (0, 130, -number), f"{self.argv(i)}: {process.returncode}"
        return process.returncode != 0

    def lose_compiler(self, i: int, env: dict, seconds: float) -> bool:
        """Kill the process that compiles for it after some seconds -> whether there was one.

        The command ends well all the same.
        """
        process = self.start(i, env)
        time.sleep(seconds)
        compilers = children(process.pid)
        for compiler in compilers:
            os.kill(compiler, signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0 and "Traceback" not in err, f"{self.argv(i)}: {err}"
        self.check(out, i)
        return bool(compilers)


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    try:
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []


def same(path: Path, other: Path) -> bool:
    ours, theirs = load_file(path), load_file(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def commands(folder: Path) -> dict[str, Command]:
    """Generating and training (compiled anew in many rounds), eager training, converting, packing a
    cache.
    """
    model, cache = str(folder / "model"), str(folder / "cache.tar.gz")
    texts: dict[int, str] = {}
    weights: dict[int, Path] = {}

    def generate(i: int) -> list[str]:
        sizes = ["--max-new-tokens", "8", "--max-seq-len", str(64 + i % 50)]
        return ["generate.py", "--checkpoint", model, "--prompt", "To be", *sizes, "--json"]

    def check_text(out: str, i: int) -> None:
        tokens = json.loads(out.splitlines()[-1])["tokens"]
        assert texts.setdefault(0, tokens) == tokens, "other tokens than in the first run"

    def train(i: int) -> list[str]:
        run = str(folder / f"run{i}")
        places = ["--data", str(folder / "text.txt"), "--cache", str(folder / "cache")]
        sizes = ["--steps", "8", "--batch", "2", "--seq-len", "48", "--save-every", "2"]
        saved = ["--checkpoints", run, "--out", f"{run}-out", "--compile", "eager"]
        return ["train_step.py", *places, *sizes, *saved]

    def check_weights(out: str, i: int) -> None:
        name = "model.safetensors"
        assert same(folder / f"run{i}-out" / name, folder / "run0-out" / name), "other weights"

    def compiled_length(i: int) -> int:
        return 40 + i % 8

    def train_compiled(i: int) -> list[str]:
        run = str(folder / f"compiled{i}")
        places = ["--data", str(folder / "text.txt"), "--cache", str(folder / "cache")]
        sizes = ["--steps", "8", "--batch", "2", "--seq-len", str(compiled_length(i))]
        saved = ["--checkpoints", run, "--save-every", "2", "--out", f"{run}-out"]
        return ["train_step.py", "--config", model, *places, *sizes, *saved]

    def check_compiled(out: str, i: int) -> None:
        """The weights of the first run of as long rows: all steps were compiled ones."""
        found = folder / f"compiled{i}-out" / "model.safetensors"
        assert same(found, weights.setdefault(compiled_length(i), found)), "other weights"

    def convert(i: int) -> list[str]:
        return ["checkpoint.py", "convert", model, str(folder / f"converted{i}")]

    def check_conversion(out: str, i: int) -> None:
        name = "model.safetensors"
        assert same(folder / f"converted{i}" / name, folder / "converted0" / name), "other tensors"

    def carry(i: int) -> list[str]:
        return ["compile_config.py", "cache", "load" if i % 2 else "save", cache]

    def check_count(out: str, i: int) -> None:
        assert "packed" in out, out

    return {
        "generate": Command(generate, check_text),
        "train": Command(train, check_weights),
        "train compiled": Command(train_compiled, check_compiled),
        "convert": Command(convert, check_conversion),
        "cache": Command(carry, check_count),
    }


def command_kills(count: int, seed: int) -> dict:
    """Commands that get SIGINT, SIGTERM or SIGKILL at random moments show no traceback, lose
    nothing that was saved, and do their work when they are run again.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(seed)
        layer = dict(n_layers=1, n_hash_layers=0, compress_ratios=(4,), n_mtp_layers=0)
        args = dataclasses.replace(ModelArgs.debug(), **layer)  # compiles fast
        save(Transformer(args), folder / "model", tokenizer=BYTES)
        (folder / "text.txt").write_text(TEXT.read_text()[:60_000])
        cache = folder / "inductor"
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
        known = commands(folder)
        for command in known.values():
            command.run(0, env)
        stopped = dict.fromkeys(known, 0)
        lost = 0
        for i in range(1, count + 1):
            name = rng.choice(list(known))
            command, number = known[name], rng.choice(SIGNALS)
            seconds = rng.uniform(0, 1) * command.seconds
            if name == "generate" and rng.random() < 0.3:  # training waits for its compiler
                lost += command.lose_compiler(i, env, seconds)
            else:
                stopped[name] += command.stop(i, env, seconds, number)
            command.run(i, env)
        left = [*cache.glob("unfinished/*"), *cache.glob(f"{AHEAD}/{WORK_PREFIX}*")]
        assert not left, f"left: {left}"
    return {"stopped": stopped, "compilers_killed": lost}
