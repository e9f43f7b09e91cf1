"""The model and the data of a training run, from its flags."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from checkpoint import load
from model import ModelArgs, Transformer
from training import dataset
from training.flags import CONFIGS


def build(flags: argparse.Namespace, device: str) -> Transformer:
    """The model to train."""
    dtype = getattr(torch, flags.dtype)
    if flags.init:
        model = load(flags.init, device=device, dtype=dtype, act_quant=bool(flags.qat))
        model.args.expert_qat = flags.qat
        return model
    if flags.config in CONFIGS:
        args = CONFIGS[flags.config]()
    elif flags.config.endswith(".json") or os.path.isdir(flags.config):
        args = ModelArgs.from_json(flags.config)
    else:
        raise ValueError(
            f"--config {flags.config}: choose {', '.join(CONFIGS)}, "
            "a config.json, or a folder that holds one"
        )
    args.act_quant, args.expert_qat = bool(flags.qat), flags.qat
    torch.manual_seed(flags.seed)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Transformer(args)
    finally:
        torch.set_default_dtype(torch.float32)


def read_data(flags: argparse.Namespace, args: ModelArgs) -> dataset.Data:
    """The text as tokens: of the vocabulary of --init, or of one fitted to it."""
    names = ", ".join(flags.data)
    if args.vocab_size < 256:
        raise ValueError(
            f"{flags.config}: a vocabulary of {args.vocab_size} cannot hold the 256 bytes"
        )
    text = dataset.read_text(flags.data)
    try:
        cache = Path(flags.cache)
        data = dataset.prepare(text, cache, args.vocab_size, flags.init, flags.special_tokens)
    except RuntimeError:  # sentencepiece's only complaint about its input
        raise ValueError(
            f"{names}: too short a text for a vocabulary of {args.vocab_size}"
        ) from None
    for ids, purpose in ((data.train, "to train on"), (data.held_out, "held out")):
        if len(ids) < 2 * flags.seq_len:
            raise ValueError(
                f"{names}: {len(ids)} tokens {purpose} are fewer "
                f"than twice --seq-len {flags.seq_len}"
            )
    return data
