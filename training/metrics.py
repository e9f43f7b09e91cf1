"""Metrics of a training run: FLOPs, progress lines, the metrics file and its plot."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from config import CSA_RATIOS
from model import Transformer
from tools.stats import peak_memory


def flops_per_token(model: Transformer, length: int) -> float:
    """FLOPs that training on rows of `length` tokens needs per token: three forwards.

    A forward multiplies with each active matrix once, 2 FLOPs a weight; a query with the keys and
    values it sees.
    """
    args = model.args
    active_share = args.n_activated_experts / args.n_routed_experts
    flops = 0.0
    for name, p in model.named_parameters():
        if p.dim() > 1 and not name.startswith("embed."):
            flops += 2.0 * p.numel() * (active_share if ".experts." in name else 1)
    flops += 2.0 * model.head.weight.numel() * args.n_mtp_layers  # MTP uses the head again

    seen = np.arange(1, length + 1)  # tokens up to each position
    for ratio in args.compress_ratios:
        keys = np.minimum(seen, args.window_size)
        if ratio:
            entries = seen // ratio
            chosen = np.minimum(entries, args.index_topk) if ratio in CSA_RATIOS else entries
            keys = keys + chosen
            if ratio in CSA_RATIOS and length // ratio > args.index_topk:
                flops += 2.0 * args.index_n_heads * args.index_head_dim * entries.mean()
        flops += 4.0 * args.n_heads * args.head_dim * keys.mean()
    return 3 * flops


class MetricsLog:
    """Tells the progress of a run: a line for people, a line of JSON in a file, and `history`, for
    the plot.

    file    None, or what a resumed run continues: lines of steps after `first` are dropped
    steps   of the whole run
    peak    FLOP/s of the device; flops: FLOPs per token
    log     prints a line
    """

    def __init__(
        self,
        file: str | None,
        first: int,
        steps: int,
        peak: float,
        flops: float,
        device: torch.device,
        log: Callable[[str], None],
    ):
        self.file = Path(file).resolve() if file else None
        self.steps, self.log = steps, log
        self.peak, self.flops = peak, flops
        self.device = device
        self.history: list[dict] = []
        if self.file:
            self.history = self._read(first)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_name(f"{self.file.name}.tmp")
            temporary.write_text("".join(json.dumps(entry) + "\n" for entry in self.history))
            os.replace(temporary, self.file)

    def _read(self, first: int) -> list[dict]:
        """The file's entries up to step `first`. Its last line may be torn, as by a kill."""
        if not first or not self.file.exists():
            return []
        lines = self.file.read_text().splitlines(keepends=True)
        entries = []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if entry["step"] <= first:
                    entries.append(entry)
            except (ValueError, KeyError, TypeError):
                if number < len(lines) or line.endswith("\n"):
                    raise ValueError(
                        f"{self.file}: line {number} is not one of ours: "
                        "name another file with --metrics"
                    ) from None
        return entries

    def __call__(self, metrics: dict) -> None:
        """metrics: as `train_step.train` gives them."""
        speed = metrics["tok_per_s"]
        entry = metrics | {
            "share_of_peak": speed and speed * self.flops / self.peak,
            "memory_bytes": peak_memory(self.device),
        }
        self.history.append(entry)
        if self.file:
            with open(self.file, "a") as out:
                out.write(json.dumps(entry) + "\n")

        parts = [f"step {entry['step']}/{self.steps}"]
        for key in ("loss", "mtp_loss", "index_loss", "recall"):
            if key in entry:
                parts.append(f"{key.removesuffix('_loss')} {entry[key]:.4f}")
        parts.append(f"lr {entry['lr']:.1e}")
        if speed:
            parts.append(f"{speed:,.0f} tok/s")
            parts.append(f"{100 * entry['share_of_peak']:.0f} % of peak")
        parts.append(f"{entry['memory_bytes'] / 2**20:,.0f} MiB")
        if speed:
            parts.append(f"{metrics['minutes_left']:.1f} min left")
        self.log("  ".join(parts))


def plot(history: list[dict], path: str) -> None:
    """The losses over steps, as PNG."""
    import matplotlib  # optional

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    labels = {
        "loss": "next token",
        "mtp_loss": "MTP: token after next",
        "index_loss": "indexer, KL",
    }
    for key, label in labels.items():
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()
    temporary = f"{path}.tmp"
    figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    os.replace(temporary, path)
