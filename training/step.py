"""A training step, around the functions that compile_config.py compiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from model import Transformer
from ops.registry import require


class TrainStep:
    """step(tokens, targets, doc_ids, lr) -> metrics: the gradients of all rows, then the update.

    Shapes are in compile_train_step, which makes steps. Every loss is a part of the mean over the
    whole step, whose labels are counted first. So gradients and metrics are sums: over parts of
    micro_batch rows, and over the processes that share the step's rows.

    loss          loss(model, tokens, targets, doc_ids) -> total, dict of its parts
    make_targets  as in training/losses.py
    hooks         dictionaries of hooks that were compiled in: ValueError if there are others later
    """

    def __init__(
        self,
        model: Transformer,
        optimizer,
        # Functions, compiled or not
        loss: Callable,
        make_targets: Callable,
        # As in compile_train_step
        micro_batch: int | None,
        all_reduce_sum: Callable | None,
        hooks: Sequence[dict] = (),
    ):
        self.hooks = [(found, list(found)) for found in hooks]
        self.model, self.optimizer = model, optimizer
        self.loss, self.make_targets = loss, make_targets
        self.micro_batch, self.all_reduce_sum = micro_batch, all_reduce_sum

    def __call__(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        doc_ids: torch.Tensor | None,
        lr: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        for found, before in self.hooks:
            require(
                list(found) == before, "hooks changed after compile_train_step: set them before"
            )
        metrics = self.backward(tokens, targets, doc_ids)
        load = metrics.pop("load", None)
        return metrics | update(self.optimizer, lr, load)

    def backward(
        self, tokens: torch.Tensor, labels: torch.Tensor, doc_ids: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of a step's rows to the parameters' -> the parts of its loss."""
        rows = self.micro_batch or len(tokens)
        docs = [None] * len(tokens) if doc_ids is None else doc_ids.split(rows)
        parts = list(zip(tokens.split(rows), labels.split(rows), docs, strict=False))
        targets = [self.make_targets(*part) for part in parts]
        counts = torch.stack([t.counts for t in targets]).sum(0)
        if self.all_reduce_sum:
            counts = self.all_reduce_sum([counts])[0]
        metrics: dict[str, torch.Tensor] = {}
        for (tokens, _, doc_ids), target in zip(parts, targets, strict=True):
            total, new = self.loss(self.model, tokens, target._replace(counts=counts), doc_ids)
            total.backward()
            for name, value in new.items():
                metrics[name] = metrics[name] + value if name in metrics else value
        if self.all_reduce_sum:
            sums = self.all_reduce_sum([*metrics.values()])
            metrics = dict(zip(metrics, sums, strict=True))
        return metrics


def update(optimizer, lr: torch.Tensor, load: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """One step of an optimizer, ours or one of torch.optim -> its metrics."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return optimizer.step(lr, load) or {}
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return {}
