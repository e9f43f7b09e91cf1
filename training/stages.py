"""The stages of a training run: which parameters train, at which rate, for which losses."""

from __future__ import annotations

import argparse
import math

from model import Aux


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, constant, a cosine to peak / 10 over a half."""
    warmup_steps = max(1, steps // 20)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = step / max(1, steps)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * done - 1))))


class Stage:
    """Steps `begin` to `end` of a run, and the parameters, rates and losses of their training.

    The dense warm-up trains the indexers alone, at a constant rate; the main stage, all parameters
    (the recipe of DeepSeek-V3.2). Router biases follow the load instead of a gradient.
    """

    def __init__(self, flags: argparse.Namespace, warmup: bool):
        self.flags, self.warmup = flags, warmup
        self.begin, self.end = 0, flags.index_warmup
        if not warmup:
            self.begin, self.end = self.end, self.end + flags.steps
        self.aux = Aux(index_loss=warmup or flags.index_loss > 0, dense=warmup)

    def rate(self, step: int) -> float:
        """The learning rate of a step of the run."""
        if self.warmup:
            return 1e-3
        return learning_rate(step - self.begin, self.flags.steps, self.flags.lr)

    def trains(self, name: str) -> bool:
        """Whether the stage trains the parameter of that name."""
        return (".indexer." in name or not self.warmup) and not name.endswith("gate.bias")
