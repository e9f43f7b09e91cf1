"""Shared by the GPU suite's cases: forms of our ops, modules of Transformers, slices of results."""

from __future__ import annotations

import importlib

import torch

import ops
from bench.gpu_measure import Bench, Side
from model import ModelArgs, layer_frequencies, make_plan

SLICE = 32  # tokens whose results are compared with fp64
EPS = 1e-6


def ours(name: str):
    """The opaque form of an op."""
    return (ops.OPS | ops.INTERNAL)[name].opaque


def kernel(name: str):
    """An op that has no two forms."""
    return getattr(torch.ops.dsv4, name)


def reference(name: str):
    """The plain function behind an op's reference form; the model compiles it with the op off."""
    module = importlib.import_module(f"ops.{name}")
    return getattr(module, "reference", None) or module.forward_reference


def call_of(side):
    """The function of a side."""
    return side.call if isinstance(side, Side) else side


def hf(name: str):
    module = "transformers.models.deepseek_v4.modeling_deepseek_v4"
    return getattr(importlib.import_module(module), name)


def with_weights(module: torch.nn.Module, **weights: torch.Tensor) -> torch.nn.Module:
    """A module of Transformers', with these tensors in place of its parameters."""
    for name, value in weights.items():
        delattr(module, name)
        setattr(module, name, value)
    return module


def tail(n: int):
    """Pick the last n tokens of every result, which are along dim 1."""

    def pick(out):
        return tuple(t[:, -n:] for t in (out if isinstance(out, tuple) else (out,)))

    return pick


def wide(t: torch.Tensor) -> torch.Tensor:
    """In the precision of baselines: fp32, or fp64 where they serve as the exact result."""
    return t if t.dtype == torch.float64 else t.float()


def angles(b: Bench, T: int, rope_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, T, rope_dim / 2] of positions 0 .. T - 1 in compressed layers of Flash."""
    frequencies = layer_frequencies(ModelArgs.flash())[1, : rope_dim // 2].to(b.device)
    angle = torch.arange(T, device=b.device)[None, :, None] * frequencies
    return angle.cos(), angle.sin()


def packed(b: Bench, T: int, documents: int, ratio: int = 4):
    """The plan of a row of equal documents."""
    args = ModelArgs.flash()
    ids = (torch.arange(T, device=b.device) // -(-T // documents))[None]
    frequencies = layer_frequencies(args).to(b.device)
    return make_plan(args, frequencies, ids, {ratio}, T, None, None, ids)
