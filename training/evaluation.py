"""Evaluation of a model in training: held-out loss, recall of the indexers, a sample. Eager."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from generation.engine import Engine
from model import Aux, Transformer
from training.dataset import packed
from training.losses import make_targets, training_loss


def to_rows(ids: np.ndarray, length: int, device: torch.device) -> torch.Tensor:
    """All ids but a rest as rows [count, length + 1] int64, whose last token is only a target."""
    count = len(ids) // (length + 1)
    flat = torch.from_numpy(ids[: count * (length + 1)].astype(np.int64))
    return flat.view(count, length + 1).to(device)


@torch.no_grad()
def held_out_loss(
    model: torch.nn.Module,
    ids: np.ndarray,
    length: int,
    batch: int,
    bos: int,
    loss: Callable = training_loss,
) -> float:
    """Nats per token over consecutive rows; a token sees at most the length - 1 tokens before it.

    loss(model, tokens, targets, doc_ids) -> total, {"loss": mean over the targets, ...}
    """
    rows = to_rows(ids, length, next(model.parameters()).device)
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for part in rows.split(batch):
        tokens, targets, doc_ids = packed(part, bos)
        number = int((targets >= 0).sum())
        parts = loss(model, tokens, make_targets(tokens, targets, doc_ids), doc_ids)[1]
        total += float(parts["loss"]) * number
        count += number
    model.train(training)
    return total / count


@torch.no_grad()
def index_recall(
    model: Transformer, ids: np.ndarray, length: int, bos: int, count: int = 8
) -> float | None:
    """Of the index_topk entries most attended to, the share that the indexers choose, over `count`
    rows.

    None if rows are so short that all entries are chosen.
    """
    found = torch.zeros(2)  # entries chosen among the most attended, and entries most attended
    for row in to_rows(ids, length, model.embed.weight.device)[:count]:
        tokens, _, doc_ids = packed(row[None], bos)
        aux = Aux(index_loss=True, dense=True, recall=True)
        layers = model(tokens, doc_ids=doc_ids, logits=None, aux=aux)[2]
        found += sum(layer.recall for layer in layers if layer.recall is not None).cpu()
    return float(found[0] / found[1]) if found[1] else None


@torch.no_grad()
def sample_text(model: Transformer, tokenizer, prompt: str, count: int, seed: int) -> str:
    """The prompt, and `count` tokens after it or fewer until EOS, drawn at temperature 0.8."""
    prompt_ids = tokenizer.encode(prompt, bos=True)
    room = min(len(prompt_ids) + count + 1, model.args.max_seq_len)
    engine = Engine(model, "eager", max_batch_size=1, max_seq_len=room)
    settings = dict(max_new_tokens=count, temperature=0.8, seed=seed, eos_id=tokenizer.eos_id)
    generated = [token for _, token in engine.stream([prompt_ids], **settings)]
    if generated[-1:] == [tokenizer.eos_id]:  # which the stream gives, too
        generated.pop()
    return prompt + tokenizer.decode(generated).removesuffix("\n")
