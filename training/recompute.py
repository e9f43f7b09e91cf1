"""Activation checkpointing: activations of a block that its backward computes again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model import Block, call

SAVED_OPS = ("sparse_attn", "moe", "indexer_topk")  # not run again by "selective"


def checkpointed(function: Callable, recompute: str) -> Callable:
    """`function`, whose activations the backward computes again.

    recompute   "none": it saves them all; "selective": it saves the results of SAVED_OPS only;
                "full": it saves none
    """
    if recompute not in ("none", "selective", "full"):
        raise ValueError(f"recompute {recompute!r}: choose none, selective or full")
    if recompute == "none":
        return function
    saved = {getattr(torch.ops.dsv4, name).default for name in SAVED_OPS}

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    options = {}
    if recompute == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)

    def run(*args):
        return checkpoint(function, *args, use_reentrant=False, **options)

    return run


def checkpoint_blocks(recompute: str) -> Callable:
    """-> a run_block (see Transformer.forward) that calls blocks checkpointed."""
    call_checkpointed = checkpointed(call, recompute)

    def run_block(function: Callable, *args):
        run = call_checkpointed if isinstance(function, Block) else call
        return run(function, *args)

    return run_block
