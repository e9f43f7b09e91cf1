"""Kinds of layers: those of one kind share a compiled graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def layer_signature(block: nn.Module) -> tuple:
    """Blocks of equal signature share a graph.

    All that a graph depends on: types and plain attributes of the modules, shapes and dtypes of the
    tensors.
    """
    modules = []
    for name, module in block.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, bool, type(None)))
        }
        modules.append((name, type(module).__name__, tuple(plain.items())))
    tensors = [
        (name, tuple(t.shape), t.dtype)
        for name, t in (*block.named_parameters(), *block.named_buffers())
    ]
    return tuple(modules), tuple(tensors)


def compile_layers(blocks, compile_layer: Callable[[], Callable]) -> dict[nn.Module, Callable]:
    """Block -> layer(block, *args), made by compile_layer() once for each signature."""
    by_signature: dict[tuple, Callable] = {}
    layers = {}
    for block in blocks:
        signature = layer_signature(block)
        if signature not in by_signature:
            by_signature[signature] = compile_layer()
        layers[block] = by_signature[signature]
    return layers
