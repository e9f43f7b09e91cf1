"""The flags of `python train_step.py`."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch

from compile_config import CHOICES, config_of, usable_preset
from model import ModelArgs
from tools import cli
from tools.launcher import launched

ROOT = Path(__file__).parent.parent
CONFIGS = {"debug": ModelArgs.debug, "tiny": ModelArgs.tiny}  # --config


def make_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="train_step.py", description="Train a DeepSeek-V4 on plain text.", allow_abbrev=False
    )
    text = str(ROOT / "data" / "shakespeare.txt")

    def group(title: str) -> Callable:
        return parser.add_argument_group(title).add_argument

    flag = group("model")
    about = "debug (default), tiny, or a config.json: begin with random weights"
    flag("--config", metavar="NAME|FILE", help=about)
    about = "train a folder in the released layout instead, with its tokenizer"
    flag("--init", metavar="DIR", help=about)
    about = "of weights and activations; masters are fp32"
    flag("--dtype", choices=("float32", "bfloat16"), default="float32", help=about)
    about = "round the experts to this format, and activations as released models do"
    flag("--qat", choices=("fp4", "fp8"), help=about)

    flag = group("data")
    about = "UTF-8 text files, or folders of them"
    flag("--data", nargs="+", default=[text], metavar="PATH", help=about)
    about = "read names of special tokens in the text as those tokens, not as text"
    flag("--special-tokens", action="store_true", help=about)
    about = "where tokens are kept for the next run"
    flag("--cache", default=str(ROOT / ".cache"), metavar="DIR", help=about)
    flag("--batch", type=int, default=4, help="rows per step")
    about = "rows whose activations are held at a time (default: all)"
    flag("--micro-batch", type=int, metavar="ROWS", help=about)
    flag("--seq-len", type=int, default=128, help="tokens per row")

    flag = group("training")
    flag("--steps", type=int, default=40)
    about = "end here; rates are those of --steps"
    flag("--stop-after", type=int, metavar="STEP", help=about)
    flag("--optimizer", choices=("muon", "adamw"), default="muon")
    flag("--lr", type=float, default=6e-3, help="peak learning rate")
    flag("--clip", type=float, default=1.0, help="largest norm of the gradient")
    about = "train the lightning indexers; 1 is usual"
    flag("--index-loss", type=float, default=0.0, metavar="WEIGHT", help=about)
    about = "train them alone before, with dense attention, at lr 1e-3"
    flag("--index-warmup", type=int, default=0, metavar="STEPS", help=about)
    flag("--seed", type=int, default=0)

    flag = group("execution")
    flag("--device", choices=("cpu", "cuda"))
    about = f"{', '.join(CHOICES)} (default: auto where it can be, else regional)"
    flag("--compile", choices=CHOICES, metavar="PRESET", help=about)
    about = "auto: leave when training has ended, although the compiler has not finished"
    flag("--no-wait", action="store_true", help=about)
    about = "processes that share the routed experts, with torchrun (default: those of a machine)"
    flag("--ep", type=int, metavar="SIZE", help=about)
    about = "activations computed again in the backward"
    flag("--recompute", choices=("none", "selective", "full"), default="none", help=about)

    flag = group("results")
    about = "save the model and its tokenizer here, in the released layout"
    flag("--out", metavar="DIR", help=about)
    about = "how experts are stored (default: as --qat says, else bf16)"
    flag("--experts", choices=("bf16", "fp8", "fp4"), help=about)
    about = "how the linears that releases quantise are stored (default: fp8 with --qat)"
    flag("--linears", choices=("bf16", "fp8"), help=about)
    about = "keep resumable checkpoints here, and go on from the newest one"
    flag("--checkpoints", metavar="DIR", help=about)
    flag("--save-every", type=int, default=200, metavar="STEPS")
    flag("--keep", type=int, default=3, help="checkpoints to keep")
    about = "a JSON object per progress line (default: metrics.jsonl in --checkpoints)"
    flag("--metrics", metavar="FILE", help=about)
    flag("--plot", metavar="FILE", help="draw the losses as PNG")
    about = "the last line of standard output is one JSON object; progress on standard error"
    flag("--json", action="store_true", help=about)
    return parser


def check_numbers(flags: argparse.Namespace) -> None:
    counts = ("steps", "batch", "seq_len", "save_every", "keep", "micro_batch", "stop_after", "ep")
    for name in counts:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least 1")
    for name in ("seed", "index_loss", "index_warmup"):
        value = getattr(flags, name)
        if not 0 <= value < 1 << 63:
            raise ValueError(f"--{name.replace('_', '-')} {value}: choose 0 or more, below 2^63")
    for name in ("lr", "clip"):
        value = getattr(flags, name)
        if not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: choose a positive number")


def check_writable(flag: str, name: str, wanted: str) -> None:
    """wanted: "folder" or "file", existing or new."""
    path = Path(name).absolute()
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {name}: there is no folder {path.parent}")
    if path.exists():
        found = "folder" if path.is_dir() else "device"
        if path.is_file():
            found = "file"
        if found != wanted:
            raise ValueError(f"{flag} {name}: is a {found}; name a {wanted}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{flag} {name}: may not be written to; name another")


def choose_preset(flags: argparse.Namespace) -> str:
    """The preset of a run: another process compiles for CPU, but neither for several processes nor
    with recomputation.
    """
    if flags.device == "cpu" and flags.recompute == "none" and not launched():
        return usable_preset(flags.compile, "auto", flags.device)
    asked = None if flags.compile == "auto" else flags.compile
    return usable_preset(asked, "regional", flags.device)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags, checked and complete. ValueError says how to mend them."""
    flags = make_parser().parse_args(argv)
    check_numbers(flags)
    for name in ("out", "checkpoints", "cache", "metrics", "plot"):
        if getattr(flags, name):
            wanted = "file" if name in ("metrics", "plot") else "folder"
            check_writable(f"--{name}", getattr(flags, name), wanted)
    if flags.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available here; use cpu")
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if flags.config and flags.init:
        raise ValueError(
            "--config and --init exclude each other: --init brings its own config.json"
        )
    flags.config = flags.config or "debug"
    flags.preset = choose_preset(flags)
    if config_of(flags.preset).cudagraphs:
        raise ValueError(
            f"--compile {flags.preset}: CUDA graphs are for generation; choose default or regional"
        )
    if flags.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install matplotlib")
    if flags.plot and flags.plot == flags.metrics:
        raise ValueError(f"--plot {flags.plot}: is where --metrics writes; name another")
    if flags.metrics is None and flags.checkpoints:
        flags.metrics = str(Path(flags.checkpoints) / "metrics.jsonl")
    flags.experts = flags.experts or flags.qat or "bf16"
    flags.linears = flags.linears or ("fp8" if flags.qat else "bf16")
    return flags
