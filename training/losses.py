"""Losses of training (docs/v4.md#training).

Next-token cross-entropy, that of the MTP block on the token after, balanced routers, and the
indexers' objective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model import Aux, AuxOutputs, Transformer, call


class LossWeights(NamedTuple):
    """Weights of the other losses beside next-token cross-entropy."""

    mtp: float = 0.3
    balance: float = 1e-4
    index: float = 1.0


class Targets(NamedTuple):
    """Labels of some rows of a training step.

    labels      [B, S]  the token that follows each token; negative = ignored
    mtp_labels  [B, S]  the token after that; -1 outside the document or row
    mtp_inputs  [B, S]  the token that follows, known even where it is ignored as a label
    counts      [3]     of the whole step, over all processes: labels, MTP labels, rows (fp32)
    """

    labels: torch.Tensor
    mtp_labels: torch.Tensor
    mtp_inputs: torch.Tensor
    counts: torch.Tensor


def make_targets(
    tokens: torch.Tensor, labels: torch.Tensor, doc_ids: torch.Tensor | None
) -> Targets:
    """tokens, labels [B, S] int64, labels[:, i] follows tokens[:, i]; doc_ids as in forward."""
    mtp_labels = F.pad(labels[:, 1:], (0, 1), value=-1)
    if doc_ids is not None:
        last_of_document = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (0, 1))
        mtp_labels = mtp_labels.masked_fill(last_of_document, -1)
    mtp_inputs = torch.cat([tokens[:, 1:], labels[:, -1:].clamp(min=0)], 1)
    count = (labels >= 0).sum()
    rows = torch.full_like(count, len(tokens))
    counts = torch.stack([count, (mtp_labels >= 0).sum(), rows]).float()
    return Targets(labels, mtp_labels, mtp_inputs, counts)


def training_loss(
    model: Transformer,
    tokens: torch.Tensor,
    targets: Targets | torch.Tensor,
    doc_ids: torch.Tensor | None = None,
    weights: LossWeights = LossWeights(),
    aux: Aux = Aux(),
    run_block: Callable = call,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a model on tokens [B, S]; targets: Targets, or labels [B, S] (see make_targets).

    aux and run_block as in Transformer.forward.
    -> total () fp32, and a dict of its detached parts: loss, mtp_loss (nats per token), balance,
       index_loss (nats), load [routers that have a bias, E].
    """
    if not isinstance(targets, Targets):
        targets = make_targets(tokens, targets, doc_ids)
    options = dict(doc_ids=doc_ids, logits=None, aux=aux, run_block=run_block)
    _, hidden, aux_outputs = model(tokens, **options)
    mtp_hidden = None
    if len(model.mtp):
        _, mtp_hidden, mtp_aux_outputs = model.mtp(hidden, targets.mtp_inputs, **options)
        aux_outputs = aux_outputs + mtp_aux_outputs
    return run_block(combine_losses, model, hidden, mtp_hidden, aux_outputs, targets, weights)


def combine_losses(
    model: Transformer,
    hidden: torch.Tensor,
    mtp_hidden: torch.Tensor | None,
    aux_outputs: list[AuxOutputs],
    targets: Targets,
    weights: LossWeights,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The streams after the last block and after the MTP block -> as training_loss."""

    def cross_entropy(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x, labels = x.flatten(0, 1), labels.flatten()
        return model.ops.linear_cross_entropy(x, model.head.weight, labels).sum()

    counts = targets.counts.clamp(min=1)
    parts = {"loss": cross_entropy(model.head_input(hidden), targets.labels) / counts[0]}
    total = parts["loss"]
    if mtp_hidden is not None:
        mtp_loss = cross_entropy(model.mtp.head_input(mtp_hidden), targets.mtp_labels)
        parts["mtp_loss"] = mtp_loss / counts[1]
        total = total + weights.mtp * parts["mtp_loss"]
    for name, weight in (("balance", weights.balance), ("index_loss", weights.index)):
        values = [getattr(layer, name) for layer in aux_outputs]
        values = [value for value in values if value is not None]
        if values:
            parts[name] = torch.stack(values).sum() / counts[2]
            total = total + weight * parts[name]
    loads = [layer.load for layer in aux_outputs if layer.load is not None]
    if loads:
        parts["load"] = torch.stack(loads)
    return total, {name: part.detach() for name, part in parts.items()}
