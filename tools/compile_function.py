"""How one function of a model becomes a compiled graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

import ops
from model import Transformer
from tools import compile_cache, torch_private

MAX_WHOLE_GRAPH_LAYERS = 12  # deeper models compile layer by layer unless a preset says otherwise


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """How phases are compiled.

    backend     a torch.compile backend, or None to run eagerly
    region      "model": one graph; "layer": one per kind of layer; None: "layer" for prefill, where
                it costs no speed, and for models of more than MAX_WHOLE_GRAPH_LAYERS, else "model"
    cudagraphs  record decode and verify into a CUDA graph
    options     Inductor options, as pairs
    ahead       on CPU: compiled ahead of time by another process, layer by layer
    """

    backend: str | None = "inductor"
    region: str | None = None
    cudagraphs: bool = False
    options: tuple[tuple[str, object], ...] = ()
    ahead: bool = False

    def __post_init__(self):
        if self.region not in (None, "model", "layer"):
            raise ValueError(f"region {self.region!r}: choose 'model', 'layer' or None")
        if self.ahead and (self.backend != "inductor" or self.region == "model" or self.cudagraphs):
            raise ValueError("ahead: Inductor compiles layer by layer, without CUDA graphs")


def compile_function(function: Callable, name: str, cfg: CompileConfig, **options) -> Callable:
    """`function` as one full graph of static shapes, with a compile count of its own.

    options     of Inductor, beside those of cfg
    """
    if cfg.backend is None:
        return function
    options = {**options, **dict(cfg.options)} if cfg.backend == "inductor" else {}
    torch_private.on_compile(compile_cache.JOURNAL.begin, compile_cache.JOURNAL.end)
    return torch_private.compile_isolated(
        function, name, backend=cfg.backend, fullgraph=True, dynamic=False, options=options or None
    )


def build_cpu_kernels(model: Transformer, cfg: CompileConfig, phase: str) -> None:
    """Before tracing: the C++ that the model's ops run on CPU, in fp32. See ops/registry.py."""
    weight = model.embed.weight
    if cfg.backend and weight.device.type == "cpu" and weight.dtype == torch.float32:
        with compile_cache.JOURNAL.compiling():
            ops.build_cpu_kernels(model.ops, phase)


def compiles_by_layer(model: Transformer, cfg: CompileConfig, phase: str) -> bool:
    """Whether cfg compiles this phase of the model layer by layer."""
    if cfg.backend is None:
        return False
    if cfg.region is not None:
        return cfg.region == "layer"
    return phase == "prefill" or len(model.layers) > MAX_WHOLE_GRAPH_LAYERS


def call_forward(block: nn.Module, *args):
    """The block's forward alone: hooks of the module stay outside of the graph."""
    return type(block).forward(block, *args)
