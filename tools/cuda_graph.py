"""A function of tensors as a recorded CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def clone_tensors(args) -> list:
    """The arguments with copies of the tensors among them."""
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


def record_cuda_graph(run: Callable, *args) -> Callable:
    """-> replay(*args): run(*args) as a recorded CUDA graph, with arguments and results copied.

    The warm-up calls that recording needs feed the same tokens to the same positions: the caches
    end as after one call.
    """
    static = clone_tensors(args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(*static)

    def replay(*args):
        for to, value in zip(static, args, strict=True):
            if isinstance(to, torch.Tensor):
                to.copy_(value)
        graph.replay()
        if isinstance(result, tuple):
            return tuple(r.clone() for r in result)
        return result.clone()

    return replay
