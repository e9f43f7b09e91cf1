"""Long proofs, too long for a test run: hundreds of kills, thousands of tokens, many random
layouts.

    python -m bench.soak NAME [--count N] [--seed S]    records bench/results/soak_NAME.json
    python -m bench.soak all

NAME is one of PROOFS below. A proof raises AssertionError where the contract does not hold;
tests/cli/test_soak.py runs a sample of each.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import load_file

import train_step
from bench.dense import Dense, dense_loss, equal_inter
from bench.record import record
from bench.soak_commands import command_kills
from checkpoint import load, save
from compile_config import (
    PRESETS,
    CompileConfig,
    compile_decode,
    compile_function,
    compile_prefill,
    compile_train_step,
    compile_verify,
)
from model import ModelArgs, Transformer
from ops.registry import require
from tests.testing import randomize, rms, small
from tokenizer import load_tokenizer
from tools import cli, compile_cache
from training.dataset import BYTES, Rows, tokenize
from training.optim import Optimizer
from training.stages import learning_rate

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "data" / "shakespeare.txt"
TOLERANCE = 1e-5  # relative RMS of logits in fp32


# --------------------------------------------------------------------------------------------------
# Kills


def started(work: Callable[[], object]) -> int:
    """work() in a forked process, a group of its own, quiet -> its id."""
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)


def seconds_of(work: Callable[[], object]) -> float:
    """How long work() takes in a process of its own, which must end well."""
    begun = time.perf_counter()
    _, status = os.waitpid(started(work), 0)
    assert status == 0, f"it ended with status {status} without being killed"
    return time.perf_counter() - begun


def kill(work: Callable[[], object], seconds: float) -> bool:
    """Run work() in a process of its own and kill its group -> whether it was still at work."""
    child = started(work)
    time.sleep(seconds)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet, or is gone
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "it failed before it was killed"
    return os.WIFSIGNALED(status)


def train_kills(count: int, seed: int) -> dict:
    """A training run that saves after every step, killed at random moments, goes on to the bit."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text(TEXT.read_text()[:60_000])

        def run(checkpoints: str, *more: str) -> Callable[[], int]:
            flags = ["--steps", "100000", "--batch", "1", "--seq-len", "32", "--save-every", "1"]
            flags += ["--compile", "eager"]
            places = ["--data", str(folder / "text.txt"), "--cache", str(folder / "cache")]
            saved = ["--checkpoints", str(folder / checkpoints)]
            return lambda: train_step.main([*flags, *places, *saved, *more])

        def steps_in(checkpoints: str) -> list[int]:
            paths = (folder / checkpoints).glob("step-*")
            return sorted(int(path.name.removeprefix("step-")) for path in paths)

        def state(checkpoints: str, step: int) -> dict[str, torch.Tensor]:
            return load_file(folder / checkpoints / f"step-{step:06d}" / "state.safetensors")

        seconds_of(run("killed", "--stop-after", "1"))  # makes the cache of tokens
        usual = seconds_of(run("killed", "--stop-after", "4"))
        newest, alive = steps_in("killed")[-1], 0
        for _ in range(count):
            alive += kill(run("killed"), rng.uniform(0.2, 1.2) * usual)
            found = steps_in("killed")
            assert found[-1] >= newest, f"step {newest} was saved, then lost"
            newest = found[-1]
            for step in found:
                assert state("killed", step), f"step {step} is torn"
            load(folder / "killed" / f"step-{newest:06d}", dtype=torch.float32)
        last = newest + 1
        seconds_of(run("killed", "--stop-after", str(last)))
        seconds_of(run("whole", "--stop-after", str(last), "--save-every", str(last)))
        ours, expected = state("killed", last), state("whole", last)
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in expected)
        assert not list((folder / "killed").glob(".step-*")), "leftovers of killed saves"
    return {"kills": alive, "steps": last}


def save_kills(count: int, seed: int) -> dict:
    """A checkpoint whose replacement is killed at random holds the old weights or the new."""
    rng = random.Random(seed)
    args = small(n_layers=2, n_hash_layers=0, compress_ratios=(0, 4), n_mtp_layers=0)
    versions = [randomize(Transformer(args), seed=i) for i in range(2)]
    states = [version.state_dict() for version in versions]

    def is_version(state: dict, i: int) -> bool:
        return all(torch.equal(t, states[i][key]) for key, t in state.items())

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "saved"

        def replace(i: int) -> Callable[[], None]:
            return lambda: save(versions[i], folder, dtype=None)

        seconds_of(replace(0))
        usual = seconds_of(replace(0))
        holds = 0
        replaced = 0
        alive = 0
        for _ in range(count):
            alive += kill(replace(1 - holds), rng.uniform(0, 1.1) * usual)
            state = load(folder, dtype=torch.float32).state_dict()
            assert is_version(state, 0) or is_version(state, 1), "neither the old nor the new"
            now = 0 if is_version(state, 0) else 1
            replaced += now != holds
            holds = now
    return {"kills": alive, "replaced": replaced}


def cache_kills(count: int, seed: int) -> dict:
    """Unpacking a saved compile cache, killed at random moments, leaves whole files only."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        source, target, packed = (Path(name) / part for part in ("source", "target", "packed.gz"))
        for i in range(40):
            file = source / f"{i:02d}" / f"{i}.json"  # not a .so: random bytes are no library
            file.parent.mkdir(parents=True)
            file.write_bytes(rng.randbytes(rng.randrange(1, 400_000)))
        contents = {file.relative_to(source): file.read_bytes() for file in source.rglob("*.json")}

        def in_cache(folder: Path, work: Callable) -> Callable[[], None]:
            def run():
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
                work(str(packed))

            return run

        seconds_of(in_cache(source, compile_cache.save_cache))
        unpack = in_cache(target, compile_cache.load_cache)
        usual = seconds_of(in_cache(Path(name) / "first", compile_cache.load_cache))
        alive = unfinished = 0
        for _ in range(count):
            for file in target.rglob("*.json"):  # otherwise nothing is left to unpack
                if rng.random() < 0.7:
                    file.unlink()
            alive += kill(unpack, rng.uniform(0.2, 1) * usual)
            found = {file.relative_to(target) for file in target.rglob("*.json")}
            assert all((target / file).read_bytes() == contents[file] for file in found)
            unfinished += found != set(contents)
        seconds_of(unpack)
        assert {file.relative_to(target) for file in target.rglob("*.json")} == set(contents)
    return {"kills": alive, "unfinished": unfinished}


def compile_kills(count: int, seed: int) -> dict:
    """A compiler killed at random moments leaves a cache folder from which the next process
    computes rightly.
    """
    rng = random.Random(seed)
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory() as name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = name

        def compiled(factor: float) -> Callable[[], None]:
            def run():
                x = torch.arange(64.0)
                wave = compile_function(lambda x: (x * factor).sin().sum(), "wave", CompileConfig())
                result = wave(x)
                assert torch.allclose(result, (x * factor).sin().sum(), atol=1e-4)

            return run

        try:
            seconds_of(compiled(0.5))  # precompiles headers
            usual, alive = seconds_of(compiled(1.5)), 0
            for i in range(count):
                work = compiled(2.5 + i)
                alive += kill(work, rng.uniform(0.1, 0.9) * usual)
                seconds_of(work)
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    return {"kills": alive}


# --------------------------------------------------------------------------------------------------
# Sessions and layouts


def without_choices(**changes) -> Transformer:
    """All layers routed by hash and every entry attended to: rounding cannot flip a discrete
    choice.
    """
    args = small(swiglu_limit=1.5, n_hash_layers=4, index_topk=256, **changes)
    return randomize(Transformer(args), seed=1).eval()


class Session:
    """Random calls for rows at different positions: tokens to feed, rewinds, new conversations."""

    def __init__(self, rows: int, length: int, rewind: int, rng: random.Random):
        self.length = length
        self.rewind = rewind
        self.rng = rng
        self.position = [0] * rows
        self.highest = [0] * rows  # position since the conversation began
        self.rewinds = self.conversations = self.fed = 0

    def next_call(self, T: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [B] and lengths [B] of a call of T tokens a row."""
        lengths = []
        for row, position in enumerate(self.position):
            chance = self.rng.random()
            if position + T > self.length or chance < 0.005:
                self.position[row] = self.highest[row] = 0
                self.conversations += 1
            elif chance < 0.15:
                deepest = max(0, self.highest[row] - self.rewind)
                self.position[row] = self.rng.randint(min(deepest, position), position)
                self.rewinds += 1
            lengths.append(T if self.rng.random() < 0.8 else self.rng.randint(0, T))
        positions = list(self.position)
        for row, n in enumerate(lengths):
            self.position[row] += n
            self.highest[row] = max(self.highest[row], self.position[row])
        self.fed += sum(lengths)
        return torch.tensor(positions), torch.tensor(lengths)


@torch.no_grad()
def decode(count: int, seed: int, preset: str = "default") -> dict:
    """Compiled phases over shared caches equal an eager model, whatever the order of calls."""
    rows = 3
    length = 700
    rewind = 8
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ours, eager = without_choices(), without_choices()
    for model in (ours, eager):
        model.setup_caches(rows, length, rewind)
    phases = {  # new tokens -> (compiled phase, logits, how often it is called)
        1: (compile_decode(ours, PRESETS[preset]), "all", 0.8),
        4: (compile_verify(ours, PRESETS[preset]), "all", 0.15),
        64: (compile_prefill(ours, PRESETS[preset]), "last", 0.05),
    }
    session, worst = Session(rows, length, rewind, rng), 0.0
    sizes, shares = list(phases), [share for *_, share in phases.values()]
    while session.fed < count:
        T = rng.choices(sizes, shares)[0]
        call, logits, _ = phases[T]
        positions, lengths = session.next_call(T)
        tokens = torch.randint(0, 256, (rows, T), generator=generator)
        got = call(tokens, positions, lengths)
        expected = eager(tokens, positions, lengths, logits=logits)
        valid = torch.arange(got.shape[1]) < lengths[:, None]
        if valid.any():
            worst = max(worst, rms(got[valid], expected[valid]))
            assert worst <= TOLERANCE, f"{worst} at {positions.tolist()}, {lengths.tolist()}"
    return {
        "tokens": session.fed,
        "rewinds": session.rewinds,
        "conversations": session.conversations,
        "worst_rms": worst,
    }


@torch.no_grad()
def packing(count: int, seed: int) -> dict:
    """Documents packed at random, padded before and after, equal the documents alone."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    model = without_choices()
    documents = 0
    worst = 0.0
    for _ in range(count):
        longest = rng.choice((4, 20, 140, 300))
        lengths = [rng.randint(1, longest) for _ in range(rng.randint(1, 8))]
        before, after = (rng.choice((0, 0, 1, 3, 129)) for _ in range(2))
        ids = [-1] * before
        for i, n in enumerate(lengths):
            ids += [3 * i] * n
        doc_ids = torch.tensor([ids + [-1] * after])
        tokens = torch.randint(0, 256, doc_ids.shape, generator=generator)
        packed = model(tokens.masked_fill(doc_ids < 0, -1), doc_ids=doc_ids)
        start = before
        for n in lengths:
            span = slice(start, start + n)
            worst = max(worst, rms(packed[:, span], model(tokens[:, span])))
            assert worst <= TOLERANCE, f"{worst} in {lengths}, padded {before} and {after}"
            start += n
        documents += len(lengths)
    return {"packings": count, "documents": documents, "worst_rms": worst}


# --------------------------------------------------------------------------------------------------
# Learning


def loss_after(model: torch.nn.Module, loss: Callable | None, rows: Rows, steps: int) -> float:
    """Mean of the last 20 losses of a training run of the model on rows."""
    step = compile_train_step(model, Optimizer(model, clip=1.0), PRESETS["eager"], loss)
    losses = []
    for i in range(steps):
        rate = torch.tensor(learning_rate(i, steps, 6e-3))
        losses.append(float(step(*rows(range(4 * i, 4 * i + 4)), rate)["loss"]))
    return float(np.mean(losses[-20:]))


def learning(count: int, seed: int, steps: int = 200) -> dict:
    """From every seed the debug model learns more than a dense transformer of its active size."""
    text = TEXT.read_text()[:1_000_000]
    ids = np.concatenate(list(tokenize(text, load_tokenizer(BYTES))))
    args = ModelArgs.debug()
    inter = equal_inter(args, multiple=1)
    found = {}
    for s in range(seed, seed + count):
        rows = Rows(ids, 96, 0, s)
        torch.manual_seed(s)
        ours = loss_after(Transformer(args), None, rows, steps)
        torch.manual_seed(s)
        yardstick = Dense(args.vocab_size, args.dim, args.n_layers, args.n_heads, inter)
        dense = loss_after(yardstick, dense_loss, rows, steps)
        assert ours < dense < 3.0, f"seed {s}: {ours} and dense {dense}"
        found[str(s)] = {"ours": ours, "dense": dense}
    return {"seeds": found}


# --------------------------------------------------------------------------------------------------
# Command line

PROOFS = {  # name -> (proof, how many kills, tokens, packings or seeds)
    "train_kills": (train_kills, 60),
    "save_kills": (save_kills, 500),
    "cache_kills": (cache_kills, 300),
    "compile_kills": (compile_kills, 6),
    "command_kills": (command_kills, 100),
    "decode": (decode, 10_000),
    "packing": (packing, 400),
    "learning": (learning, 3),
}


def prove(name: str, count: int | None = None, seed: int = 0) -> dict:
    """Run a proof -> its record."""
    proof, usual = PROOFS[name]
    count, begun = count or usual, time.perf_counter()
    torch.set_num_threads(1)
    found = proof(count, seed)
    minutes = (time.perf_counter() - begun) / 60
    proved = " ".join(proof.__doc__.split())
    about = {"name": name, "proved": proved, "count": count, "seed": seed, "minutes": minutes}
    return about | found


def run(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(PROOFS)}, or all")
    parser.add_argument("--count", type=int, help="kills, tokens, packings or seeds")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    names = list(PROOFS) if flags.names == ["all"] else flags.names
    for name in names:
        require(name in PROOFS, f"{name}: choose from {', '.join(PROOFS)}")
    for name in names:
        record(f"soak_{name}", prove(name, flags.count, flags.seed))


def main(argv: list[str] | None = None) -> int:
    return cli.main("bench.soak", run, argv, outlives_reader=True)


if __name__ == "__main__":
    sys.exit(main())
