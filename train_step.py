"""Train a DeepSeek-V4 on plain text, on whatever device there is: `python train_step.py` trains the debug model briefly.

    text -> packed rows (dataset.py) -> one compiled step: losses, gradients, update (compile_config.py, optim.py)

Without --init a model begins with random weights and a vocabulary fitted to the text; with it, a folder in the released
layout is trained on. The loss is next-token cross-entropy plus 0.3 times that of the MTP block (throughout: V4's weight
falls to 0.1 with the rate), and 1e-4 times the routers' balance; router biases follow the load. --index-loss trains the
lightning indexers too, by the recipe of DeepSeek-V3.2: V4's own is not published. (docs/v4.md#training.)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from checkpoint import load, save
from compile_config import PRESETS, compile_train_step, usable_preset
from config import CSA_RATIOS
from model import Aux, ModelArgs, Transformer
from tools import cli
from tools.compile_cache import discard_unfinished
from tools.stats import choose_threads, device_sync, peak_flops, peak_memory
from training import dataset
from training.losses import LossWeights, make_targets, training_loss
from training.optim import Optimizer

ROOT = Path(__file__).parent
NAMED = {"debug": ModelArgs.debug, "tiny": ModelArgs.tiny}  # --config


# ---------------------------------------------------------------------------------------------------------------------
# Rates and measures


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, constant, then a cosine over the last half to a tenth of the peak."""
    warm, done = max(1, steps // 20), step / max(1, steps)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * done - 1))))


def flops_per_token(model: Transformer, length: int) -> float:
    """FLOPs that training on rows of `length` needs per token: three forwards, of what a token multiplies with and sees."""
    args, t = model.args, np.arange(1, length + 1)
    share = args.n_activated_experts / args.n_routed_experts
    flops = sum(
        2.0 * p.numel() * (share if ".experts." in name else 1)
        for name, p in model.named_parameters()
        if p.dim() > 1 and not name.startswith("embed.")
    )
    flops += 2.0 * model.head.weight.numel() * args.n_mtp_layers
    for ratio in args.compress_ratios:
        keys = np.minimum(t, args.window_size)
        if ratio:
            entries = t // ratio
            keys = keys + (np.minimum(entries, args.index_topk) if ratio in CSA_RATIOS else entries)
            if ratio in CSA_RATIOS and length // ratio > args.index_topk:
                flops += 2.0 * args.index_n_heads * args.index_head_dim * entries.mean()
        flops += 4.0 * args.n_heads * args.head_dim * keys.mean()
    return 3 * flops


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module,
    ids: np.ndarray,
    length: int,
    batch: int,
    bos: int,
    loss: Callable = training_loss,
) -> float:
    """Nats per token over consecutive rows; a token sees at most the length - 1 tokens before it."""
    device, total, targets, count = (
        next(model.parameters()).device,
        0.0,
        0,
        len(ids) // (length + 1),
    )
    grid = torch.from_numpy(ids[: count * (length + 1)].astype(np.int64)).view(count, -1).to(device)
    training = model.training
    model.eval()
    for part in grid.split(batch):
        tokens, target, doc_ids = dataset.packed(part, bos)
        number = int((target >= 0).sum())
        total += (
            float(loss(model, tokens, make_targets(tokens, target, doc_ids), doc_ids)[1]["loss"])
            * number
        )
        targets += number
    model.train(training)
    return total / targets


@torch.no_grad()
def index_recall(
    model: Transformer, ids: np.ndarray, length: int, bos: int, count: int = 8
) -> float | None:
    """Of the index_topk entries most attended to, the share that the indexers choose, over `count` rows; None if all are seen."""
    found = torch.zeros(2)
    for row in torch.from_numpy(
        ids[: len(ids) // (length + 1) * (length + 1)].astype(np.int64)
    ).view(-1, length + 1)[:count]:
        tokens, _, doc_ids = dataset.packed(row[None].to(model.embed.weight.device), bos)
        aux = Aux(index_loss=True, dense=True, recall=True)
        layers = model(tokens, doc_ids=doc_ids, logits=None, aux=aux)[2]
        found += sum(layer.recall for layer in layers if layer.recall is not None).cpu()
    return float(found[0] / found[1]) if found[1] else None


@torch.no_grad()
def sample(model: Transformer, tokenizer, prompt: str, count: int, seed: int) -> str:
    """`count` tokens after a prompt, drawn at temperature 0.8, run eagerly."""
    from generate import Generator, Sampling

    device, ids, out = model.embed.weight.device, tokenizer.encode(prompt, bos=True), []
    generator = Generator(model, PRESETS["eager"], 1, len(ids) + count + 1)

    def done(row: int, token: int) -> bool:
        out.append(token)
        return len(out) >= count or token == tokenizer.eos_id

    generator([ids], Sampling.of(0.8, 0, 1.0, seed, device), done)
    return prompt + tokenizer.decode(out).removesuffix("\n")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Checkpoints:
    """`folder`/step-000123: a model in the released layout, and state.safetensors, from which training goes on to the bit.

    A checkpoint gets its name when it is complete, and only then the oldest goes, so that `keep` of them remain. Names that
    begin with a dot are of what is not complete, or no longer.
    """

    def __init__(self, folder: str, keep: int):
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        return sorted(
            int(match[1]) for name in names if (match := re.fullmatch(r"step-(\d{6,})", name))
        )

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def begin(self, step: int) -> Path:
        """A folder to fill."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear()
        return self.folder / f".step-{step:06d}"

    def finish(self, temporary: Path, step: int) -> Path:
        """The folder that begin gave is complete."""
        os.rename(temporary, self.path(step))
        for old in self.steps()[: -self.keep]:
            os.rename(self.path(old), self.folder / f".step-{old:06d}")
        self._clear()
        return self.path(step)

    def _clear(self) -> None:
        for stale in self.folder.glob(".step-*"):
            shutil.rmtree(stale)

    @staticmethod
    def compare(path: Path, then: dict, facts: dict) -> None:
        for key, value in facts.items():
            if then.get(key) != value:
                raise ValueError(
                    f"{path}: was trained with {key} {then.get(key)!r}, not {value!r}: name another folder"
                )

    def save(
        self, model: Transformer, optimizer: Optimizer, step: int, facts: dict, **layout
    ) -> Path:
        """facts: what must be equal for a run to go on from here."""
        temporary = self.begin(step)
        save(model, temporary, **layout)
        masters = {name for name, state in optimizer.state.items() if "master" in state}
        tensors = {
            f"weight.{name}": t for name, t in model.state_dict().items() if name not in masters
        }
        tensors |= {f"optimizer.{name}": t for name, t in optimizer.state_dict().items()}
        try:
            save_file(
                {name: t.detach().contiguous() for name, t in tensors.items()},
                temporary / "state.safetensors",
                {"step": str(step), "facts": json.dumps(facts)},
            )
        except SafetensorError as error:  # the disk is full
            shutil.rmtree(temporary)
            raise ValueError(
                f"{self.path(step)}: cannot be written ({error}); free some room, or choose another folder"
            ) from None
        return self.finish(temporary, step)

    def load(self, model: Transformer, optimizer: Optimizer, facts: dict) -> int:
        """Bring model and optimizer to where the newest checkpoint left them -> its step; 0 if there is none."""
        if not self.steps():
            return 0
        path = self.path(self.steps()[-1]) / "state.safetensors"
        if not path.exists():
            raise ValueError(
                f"{path.parent}: was not saved by one process: go on with torchrun as before, or name another folder"
            )
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            step, then = int(about["step"]), json.loads(about["facts"])
        except Exception as error:  # a torn or foreign file fails in as many ways
            raise ValueError(
                f"{path}: cannot be read ({str(error).splitlines()[0]}); remove {path.parent}"
            ) from None
        self.compare(path, then, facts)
        weights = {
            name.removeprefix("weight."): t
            for name, t in tensors.items()
            if name.startswith("weight.")
        }
        optimizer.load_state_dict(
            {
                name.removeprefix("optimizer."): t
                for name, t in tensors.items()
                if name.startswith("optimizer.")
            }
        )
        masters = {
            name: state["master"] for name, state in optimizer.state.items() if "master" in state
        }
        model.load_state_dict({**weights, **masters})
        return step


# ---------------------------------------------------------------------------------------------------------------------
# Training


class Solo:
    """One process. parallel.Ranks is the same for those that torchrun starts, which share the work."""

    size, lead, total = 1, True, None
    first = staticmethod(lambda make: make())
    any = bool
    shard = share = preset = checkpoints = staticmethod(lambda it: it)
    optimizer, save = staticmethod(Optimizer), staticmethod(save)


class Interrupt:
    """Within it, the first Ctrl-C or SIGTERM sets `asked`, and a second one ends the program at once."""

    def __init__(self, say: Callable[[str], None]):
        self.asked, self.say = False, say

    def __enter__(self) -> None:
        def ask(number, frame):
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            self.say("interrupted: finishing this step; once more ends at once")

        self.before = {
            number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
        }

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def require_finite(metrics: dict, step: int) -> None:
    for key in ("loss", "grad_norm"):
        if not math.isfinite(metrics[key]):
            raise FloatingPointError(
                f"the {key} is {float(metrics[key])} at step {step}: choose a lower --lr"
            )


def train(
    step: Callable,
    rows: dataset.Rows,
    device: torch.device,
    *,
    steps: int,
    batch: int,
    rate: Callable[[int], float],
    first: int = 0,
    every: int = 10,
    after: Callable[[int, dict], bool | None] = lambda step, metrics: None,
    log: Callable[[dict], None] = print,
) -> float:
    """Run `step` (see compile_train_step) from number `first` to `steps` -> seconds, compiling included.

    after(i, metrics) is called when i steps are done and ends the run by returning True; log gets a dict every `every` steps.
    """
    begun, warm = time.perf_counter(), 0.0
    for i in range(first, steps):
        now = rate(i)
        tensors = (t.to(device) for t in rows(range(i * batch, (i + 1) * batch)))
        try:
            metrics = step(*tensors, torch.tensor(now, device=device))
        except torch.OutOfMemoryError:
            raise ValueError(
                "the GPU's memory does not hold a step: choose a smaller --micro-batch, or --recompute full"
            ) from None
        if i == first or i == steps - 1 or i % every == every - 1:
            metrics = {key: value.item() for key, value in metrics.items()}
            require_finite(metrics, i + 1)
            done, seconds = i - first, time.perf_counter() - warm
            log(
                {
                    "step": i + 1,
                    **metrics,
                    "lr": now,
                    "tok_per_s": done * batch * rows.length / seconds if done else None,
                    "minutes_left": seconds / done * (steps - 1 - i) / 60 if done else None,
                }
            )
        if i == first:
            device_sync(device)
            warm = time.perf_counter()  # the first step compiled
        if after(i + 1, metrics):
            break
    return time.perf_counter() - begun


class Log:
    """Progress: a line for people, a JSON object in `file` (if any), which a resumed run continues, and `history` for the plot."""

    def __init__(
        self,
        file: str | None,
        first: int,
        steps: int,
        peak: float,
        flops: float,
        device: torch.device,
        say: Callable[[str], None],
    ):
        self.steps, self.peak, self.flops, self.device, self.say = steps, peak, flops, device, say
        self.file, self.history = Path(file).resolve() if file else None, []
        if self.file:
            self.history = self.entries(first)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_name(f"{self.file.name}.tmp")
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.history))
            os.replace(temporary, self.file)

    def entries(self, first: int) -> list[dict]:
        """What the file tells of the steps up to `first`; its last line may be torn, as by a kill."""
        lines, found = (
            self.file.read_text().splitlines(keepends=True) if first and self.file.exists() else [],
            [],
        )
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if entry["step"] <= first:
                    found.append(entry)
            except (ValueError, KeyError, TypeError):
                if number < len(lines) or line.endswith("\n"):
                    raise ValueError(
                        f"{self.file}: line {number} is not one of ours: name another file with --metrics"
                    ) from None
        return found

    def __call__(self, metrics: dict) -> None:
        speed = metrics["tok_per_s"]
        entry = metrics | {
            "share_of_peak": speed and speed * self.flops / self.peak,
            "memory_bytes": peak_memory(self.device),
        }
        self.history.append(entry)
        if self.file:
            with open(self.file, "a") as out:
                out.write(json.dumps(entry) + "\n")
        losses = "  ".join(
            f"{key.removesuffix('_loss')} {entry[key]:.4f}"
            for key in ("loss", "mtp_loss", "index_loss", "recall")
            if key in entry
        )
        pace = (
            f"  {speed:,.0f} tok/s  {100 * entry['share_of_peak']:.0f} % of peak" if speed else ""
        )
        left = f"  {metrics['minutes_left']:.1f} min left" if speed else ""
        self.say(
            f"step {entry['step']}/{self.steps}  {losses}  lr {entry['lr']:.1e}{pace}  {entry['memory_bytes'] / 2**20:,.0f} MiB{left}"
        )


def plot(history: list[dict], path: str) -> None:
    """The losses over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for key, label in (
        ("loss", "next token"),
        ("mtp_loss", "MTP: token after next"),
        ("index_loss", "indexer, KL"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points), label=label)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    temporary = f"{path}.tmp"
    figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="train_step.py", description="Train a DeepSeek-V4 on plain text.", allow_abbrev=False
    )
    group = parser.add_argument_group("model").add_argument
    group(
        "--config",
        metavar="NAME|FILE",
        help="debug (default), tiny, or a config.json: begin with random weights",
    )
    group(
        "--init",
        metavar="DIR",
        help="train a folder in the released layout instead, with its tokenizer",
    )
    group(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and activations; masters are fp32",
    )
    group(
        "--qat",
        choices=("fp4", "fp8"),
        help="see the experts through this format and activations as released models do",
    )
    group = parser.add_argument_group("data").add_argument
    group(
        "--data",
        nargs="+",
        default=[str(ROOT / "data" / "shakespeare.txt")],
        metavar="PATH",
        help="UTF-8 text files, or folders of them",
    )
    group(
        "--cache",
        default=str(ROOT / ".cache"),
        metavar="DIR",
        help="where tokens are kept for the next run",
    )
    group("--batch", type=int, default=4, help="rows per step")
    group(
        "--micro-batch",
        type=int,
        metavar="ROWS",
        help="rows whose activations are held at a time (default: all)",
    )
    group("--seq-len", type=int, default=128, help="tokens per row")
    group = parser.add_argument_group("training").add_argument
    group("--steps", type=int, default=40)
    group("--stop-after", type=int, metavar="STEP", help="end here; rates are those of --steps")
    group("--optimizer", choices=("muon", "adamw"), default="muon")
    group("--lr", type=float, default=6e-3, help="peak learning rate")
    group("--clip", type=float, default=1.0, help="norm that the gradient is held to")
    group(
        "--index-loss",
        type=float,
        default=0.0,
        metavar="WEIGHT",
        help="train the lightning indexers; 1 is usual",
    )
    group(
        "--index-warmup",
        type=int,
        default=0,
        metavar="STEPS",
        help="train them alone before, with dense attention, at lr 1e-3",
    )
    group("--seed", type=int, default=0)
    group = parser.add_argument_group("execution").add_argument
    group("--device", choices=("cpu", "cuda"))
    group(
        "--compile",
        choices=PRESETS,
        metavar="PRESET",
        help=f"{', '.join(PRESETS)} (default: regional)",
    )
    group(
        "--ep",
        type=int,
        metavar="SIZE",
        help="processes that share the routed experts, with torchrun (default: those of a machine)",
    )
    group(
        "--recompute",
        choices=("none", "selective", "full"),
        default="none",
        help="activations computed again in the backward",
    )
    group = parser.add_argument_group("results").add_argument
    group(
        "--out", metavar="DIR", help="save the model and its tokenizer here, in the released layout"
    )
    group(
        "--experts",
        choices=("bf16", "fp8", "fp4"),
        help="how experts are stored (default: as --qat says, else bf16)",
    )
    group(
        "--linears",
        choices=("bf16", "fp8"),
        help="how the linears that releases quantise are stored (default: fp8 with --qat)",
    )
    group(
        "--checkpoints",
        metavar="DIR",
        help="keep resumable checkpoints here, and go on from the newest one",
    )
    group("--save-every", type=int, default=200, metavar="STEPS")
    group("--keep", type=int, default=3, help="checkpoints to keep")
    group(
        "--metrics",
        metavar="FILE",
        help="a JSON object per progress line (default: metrics.jsonl in --checkpoints)",
    )
    group("--plot", metavar="FILE", help="draw the losses as PNG")
    group(
        "--json",
        action="store_true",
        help="the last line of standard output is one JSON object; progress on standard error",
    )
    flags = parser.parse_args(argv)
    for name in (
        "steps",
        "batch",
        "seq_len",
        "save_every",
        "keep",
        "micro_batch",
        "stop_after",
        "ep",
    ):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(flags, name)}: at least 1")
    for name in ("seed", "index_loss", "index_warmup"):
        if not 0 <= getattr(flags, name) < 1 << 63:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(flags, name)}: choose 0 or more, below 2^63"
            )
    for name in ("lr", "clip"):
        if not 0 < getattr(flags, name) < math.inf:
            raise ValueError(f"--{name} {getattr(flags, name)}: choose a positive number")
    for name in ("out", "checkpoints", "cache", "metrics", "plot"):
        if not getattr(flags, name):
            continue
        path, folder = (
            Path(getattr(flags, name)).absolute(),
            name in ("out", "checkpoints", "cache"),
        )
        if not path.parent.is_dir():
            raise ValueError(f"--{name} {getattr(flags, name)}: there is no folder {path.parent}")
        found, wanted = (
            "folder" if path.is_dir() else "file" if path.is_file() else "device",
            "folder" if folder else "file",
        )
        if path.exists() and found != wanted:
            raise ValueError(f"--{name} {getattr(flags, name)}: is a {found}; name a {wanted}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(
                f"--{name} {getattr(flags, name)}: may not be written to; name another"
            )
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available here; use cpu")
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if flags.config and flags.init:
        raise ValueError(
            "--config and --init exclude each other: --init brings its own config.json"
        )
    flags.config = flags.config or "debug"
    flags.compile = usable_preset(flags.compile, "regional", flags.device)
    if PRESETS[flags.compile].cudagraphs:
        raise ValueError(
            f"--compile {flags.compile}: CUDA graphs are for generation; choose default or regional"
        )
    if flags.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    if flags.plot and flags.plot == flags.metrics:
        raise ValueError(f"--plot {flags.plot}: is where --metrics writes; name another")
    if flags.metrics is None and flags.checkpoints:
        flags.metrics = str(Path(flags.checkpoints) / "metrics.jsonl")
    flags.experts = flags.experts or flags.qat or "bf16"
    flags.linears = flags.linears or ("fp8" if flags.qat else "bf16")
    return flags


def build(flags: argparse.Namespace, device: str) -> Transformer:
    """The model to train."""
    if flags.init:
        model = load(
            flags.init, device=device, dtype=getattr(torch, flags.dtype), act_quant=bool(flags.qat)
        )
        model.args.expert_qat = flags.qat
        return model
    if (
        flags.config not in NAMED
        and not flags.config.endswith(".json")
        and not os.path.isdir(flags.config)
    ):
        raise ValueError(
            f"--config {flags.config}: choose {', '.join(NAMED)}, a config.json, or a folder that holds one"
        )
    args = NAMED[flags.config]() if flags.config in NAMED else ModelArgs.from_json(flags.config)
    args.act_quant, args.expert_qat = bool(flags.qat), flags.qat
    torch.manual_seed(flags.seed)
    torch.set_default_dtype(getattr(torch, flags.dtype))
    try:
        with torch.device(device):
            return Transformer(args)
    finally:
        torch.set_default_dtype(torch.float32)


def read_data(flags: argparse.Namespace, args: ModelArgs) -> dataset.Data:
    """The text as tokens: of the vocabulary of --init, or of one fitted to it."""
    if args.vocab_size < 256:
        raise ValueError(
            f"{flags.config}: a vocabulary of {args.vocab_size} cannot hold the 256 bytes"
        )
    try:
        data = dataset.prepare(
            dataset.read_text(flags.data), Path(flags.cache), args.vocab_size, flags.init
        )
    except RuntimeError:  # sentencepiece's only complaint about its input
        raise ValueError(
            f"{', '.join(flags.data)}: too short a text for a vocabulary of {args.vocab_size}"
        ) from None
    for part, what in ((data.train, "to train on"), (data.held_out, "held out")):
        if len(part) < 2 * flags.seq_len:
            raise ValueError(
                f"{', '.join(flags.data)}: {len(part)} tokens {what} are fewer than twice --seq-len {flags.seq_len}"
            )
    return data


class Stage:
    """A part of the run: from step `begin` to `end`; what it trains, at which rates.

    The dense warm-up trains the indexers alone, at a constant rate; what follows, everything (the recipe of DeepSeek-V3.2).
    """

    def __init__(self, flags: argparse.Namespace, warmup: bool):
        W = flags.index_warmup
        self.begin, self.end = (0, W) if warmup else (W, W + flags.steps)
        self.aux = Aux(index_loss=warmup or bool(flags.index_loss), dense=warmup)
        self.rate = lambda i: 1e-3 if warmup else learning_rate(i - W, flags.steps, flags.lr)
        self.trains = lambda name: (
            (".indexer." in name or not warmup) and not name.endswith("gate.bias")
        )


def run(argv: list[str] | None) -> None:
    flags = parse(argv)
    if {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys():  # torchrun
        from parallel import Ranks

        with Ranks(flags.device, flags.batch, flags.ep) as ranks:
            return work(flags, ranks)
    if flags.ep:
        raise ValueError(
            f"--ep {flags.ep}: start the processes with torchrun --nproc-per-node N train_step.py ..."
        )
    work(flags, Solo)


def unused(folder: str) -> str:
    """The name, or the first of name-2, name-3, ... that no file has."""
    return next(
        name
        for name in itertools.chain([folder], (f"{folder}-{i}" for i in itertools.count(2)))
        if not os.path.lexists(name)
    )


def work(flags: argparse.Namespace, ranks) -> None:
    say = lambda message: print(message, file=sys.stderr if flags.json else sys.stdout, flush=True)
    device, threads = (
        torch.device(flags.device),
        choose_threads(1 << 28),
    )  # training is compute-bound: every core helps
    model = build(flags, "cpu" if ranks.size > 1 else flags.device).train()
    if (flags.index_loss or flags.index_warmup) and 4 not in model.args.compress_ratios:
        raise ValueError(
            "--index-loss, --index-warmup: this model has no indexer, which layers of ratio 4 have"
        )
    data, flops = (
        ranks.first(lambda: read_data(flags, model.args)),
        flops_per_token(model, flags.seq_len),
    )
    rows, model = (
        ranks.share(dataset.Rows(data.train, flags.seq_len, data.tokenizer.bos_id, flags.seed)),
        ranks.shard(model),
    )
    checkpoints, layout = (
        ranks.checkpoints(Checkpoints)(flags.checkpoints or unused("interrupted"), flags.keep),
        dict(experts=flags.experts, linears=flags.linears, tokenizer=data.source),
    )
    facts = {
        "config": model.args.to_hf(),
        "data": data.folder.name,
        **{
            key: getattr(flags, key)
            for key in (
                "batch",
                "seq_len",
                "seed",
                "optimizer",
                "dtype",
                "qat",
                "index_warmup",
                "index_loss",
            )
        },
    }
    total = flags.index_warmup + flags.steps
    last, first = (
        min(flags.stop_after or total, total),
        (checkpoints.steps() or [0])[-1] if flags.checkpoints else 0,
    )
    if first > last or first == last and not flags.out:
        raise ValueError(
            f"--checkpoints {flags.checkpoints}: is already at step {first}; ask for more --steps, or a later --stop-after"
        )
    peak = ranks.size * peak_flops(device, getattr(torch, flags.dtype))
    log, interrupt, seconds, stopped, recall = None, Interrupt(say), 0.0, False, []

    def judge_indexers() -> None:
        if flags.index_loss or flags.index_warmup:
            recall.append(index_recall(model, data.held_out, flags.seq_len, data.tokenizer.bos_id))
            say(
                "indexers: rows are too short for a choice"
                if recall[-1] is None
                else f"indexers choose {100 * recall[-1]:.0f} % of the entries attended to most"
            )

    def after(done: int, metrics: dict) -> bool:
        nonlocal stopped
        stopped = ranks.any(interrupt.asked)
        if (
            stopped
            or flags.checkpoints
            and (done % flags.save_every == 0 or done in (stage.end, last))
        ):
            require_finite(metrics, done)
            path = checkpoints.save(model, optimizer, done, facts, **layout)
            if stopped:
                say(
                    f"saved {path}"
                    + (
                        f"; the same command with --checkpoints {checkpoints.folder} goes on from there"
                        if done < last or flags.out
                        else ""
                    )
                )
        return stopped

    with interrupt:
        for stage in (Stage(flags, True), Stage(flags, False)):
            if stage.begin == stage.end or not stage.begin < last or first > stage.end:
                continue
            for name, p in model.named_parameters():
                p.requires_grad_(stage.trains(name))
            optimizer = ranks.optimizer(model, flags.optimizer, clip=flags.clip)
            if stage.begin < first:
                checkpoints.load(model, optimizer, facts)
                say(f"going on from {checkpoints.path(first)}")
            step = compile_train_step(
                model,
                optimizer,
                ranks.preset(PRESETS[flags.compile]),
                weights=LossWeights(index=flags.index_loss or 1.0),
                aux=stage.aux,
                micro_batch=flags.micro_batch,
                recompute=flags.recompute,
                add_up=ranks.total,
            )
            log = log or Log(
                flags.metrics if ranks.lead else None, first, total, peak, flops, device, say
            )
            judge_indexers()
            try:
                seconds += train(
                    step,
                    rows,
                    device,
                    steps=min(stage.end, last),
                    batch=flags.batch,
                    rate=stage.rate,
                    first=max(stage.begin, first),
                    after=after,
                    log=log,
                )
            except RuntimeError:
                if not interrupt.asked:
                    raise
                discard_unfinished()  # the signal has ended a C++ compiler of ours, too, before this stage's first step
                raise KeyboardInterrupt from None
            if stopped:
                raise KeyboardInterrupt
        if flags.out:
            ranks.save(model, flags.out, **layout)
            say(f"saved {flags.out}")
    if ranks.any(interrupt.asked):
        raise KeyboardInterrupt
    judge_indexers()
    seen, newest = (last - first) * flags.batch * flags.seq_len, (log.history or [{}])[-1]
    scored = data.held_out[
        : max(seen, 2 * flags.seq_len)
    ]  # short runs are judged on as much text as they read
    loss = held_out_loss(
        model, scored, flags.seq_len, flags.batch // ranks.size, data.tokenizer.bos_id
    )
    report = {
        "steps": last,
        "tokens": seen,
        "seconds": seconds,
        "held_out_loss": loss,
        "held_out_nats_per_char": loss * len(data.held_out) / data.held_out_chars,
        **{
            key: newest.get(key)
            for key in ("loss", "mtp_loss", "index_loss", "tok_per_s", "share_of_peak")
        },
        "index_recall": recall or None,
        "memory_bytes": peak_memory(device),
        "threads": threads,
        "device": flags.device,
        "torch": torch.__version__,
    }
    say(
        f"held out: {loss:.3f} nats per token, {report['held_out_nats_per_char']:.3f} per character; "
        f"peak memory {report['memory_bytes'] / 2**20:,.0f} MiB"
    )
    if flags.plot and ranks.lead:
        plot(log.history, flags.plot)
        say(f"drew {flags.plot}")
    report["sample"] = sample(model, data.tokenizer, "KING RICHARD.\n", 160, flags.seed)
    say(f"\n{report['sample']}")
    if flags.json:
        print(json.dumps(report))


def main(argv: list[str] | None = None) -> int:
    if os.environ.get("RANK", "0") == "0":
        return cli.main("train_step.py", run, argv)
    with (
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        return cli.main("train_step.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
