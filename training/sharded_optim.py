"""The optimizer of several processes, each of which updates its parts of the parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Collectives in a graph: torch/distributed/_functional_collectives.py line 161
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from model import Transformer
from ops.muon import grad_norm, muon_direction, step_length
from training.expert_parallel import all_to_all
from training.optim import Optimizer


def to_local(t: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


class ShardedOptimizer(Optimizer):
    """Updates this process's parts of the parameters, and all replicated parameters as every other
    process does.

    ranks         the processes, parallel.Ranks
    parameters    name -> parameter, as the model holds it; all other tensors here are local parts
    replicated    names of the replicated parameters
    muon_batches  sharded matrices of one shape, at most as many as processes: shape, blocks of
                  rows, [(name, local part)]
    """

    @torch.no_grad()
    def __init__(self, ranks, model: Transformer, *args, **options):
        super().__init__(model, *args, **options)
        self.ranks = ranks
        self.size, self.group = ranks.size, ranks.group
        self.parameters = {name: p for name, p, *_ in (*self.muon, *self.adam)}
        self.replicated = {
            name for name, p in self.parameters.items() if ranks.is_replicated(name, p)
        }

        by_shape: dict[tuple[torch.Size, int], list[tuple[str, torch.Tensor]]] = {}
        for name, p, blocks in self.muon:
            if isinstance(p, DTensor) and p.dim() == 2:
                by_shape.setdefault((p.shape, blocks), []).append((name, to_local(p)))
        self.muon_batches = [
            (shape, blocks, matrices[i : i + self.size])
            for (shape, blocks), matrices in by_shape.items()
            for i in range(0, len(matrices), self.size)
        ]

        sharded = {name for *_, matrices in self.muon_batches for name, _ in matrices}
        self.muon = [
            (name, to_local(p), blocks) for name, p, blocks in self.muon if name not in sharded
        ]
        self.adam = [(name, to_local(p)) for name, p in self.adam]
        self.state = {
            name: {key: to_local(t) for key, t in state.items()}
            for name, state in self.state.items()
        }

    def compile(self, compiler: Callable[[Callable, str], Callable]) -> None:
        """Like Optimizer.compile, but stays eager if shards differ in size: ranks would compile
        different graphs, whose collectives could run in different orders.
        """
        sharded = [p for p in self.parameters.values() if isinstance(p, DTensor)]
        if all(len(p) % p.device_mesh.size() == 0 for p in sharded):
            super().compile(compiler)

    def gradients(self) -> dict[str, torch.Tensor]:
        """This process's parts; FSDP2 has summed those of sharded parameters."""
        grads = {}
        for name, p in self.parameters.items():
            if p.grad is not None:
                grads[name], p.grad = to_local(p.grad), None
        names = [name for name in grads if name in self.replicated]
        sums = self.ranks.all_reduce_sum([grads[name] for name in names])
        return grads | dict(zip(names, sums, strict=True))

    def norm(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        """sqrt(sum over processes |parts|^2 + |replicated|^2), () fp32."""
        replicated = [g for name, g in grads.items() if name in self.replicated]
        parts = [g for name, g in grads.items() if name not in self.replicated]
        squares = functional.all_reduce(grad_norm(parts).square(), "sum", self.group)
        return (squares + grad_norm(replicated).square()).sqrt()

    def update_matrices(
        self, grads: dict[str, torch.Tensor], scale: torch.Tensor, lr: torch.Tensor
    ) -> None:
        super().update_matrices(grads, scale, lr)
        for shape, blocks, matrices in self.muon_batches:
            matrices = [(name, p) for name, p in matrices if name in grads]
            if matrices:
                self._update_batch(shape, blocks, matrices, grads, scale, lr)

    def _update_batch(
        self,
        shape: torch.Size,
        blocks: int,
        matrices: list[tuple[str, torch.Tensor]],
        grads: dict[str, torch.Tensor],
        scale: torch.Tensor,
        lr: torch.Tensor,
    ) -> None:
        """Muon on up to `size` matrices [rows, columns] of one shape, from some rows of each."""
        rows = shape[0]
        part_rows = -(-rows // self.size)  # of a part; the last ones may be shorter or empty

        # M = momentum M + scale G; sent: momentum M + scale G, [size, part_rows, columns]
        sent = []
        for name, p in matrices:
            first, g = self.state[name]["first"], grads[name].float() * scale
            first.mul_(self.momentum).add_(g)
            sent.append(F.pad(g + self.momentum * first, (0, 0, 0, part_rows - len(p))))
        sent += [torch.zeros_like(sent[0])] * (self.size - len(sent))

        # Process i assembles matrix i, and returns the rows of its direction, X:
        # [size, part_rows, columns]
        whole = all_to_all(torch.stack(sent), self.group).flatten(0, 1)[:rows]
        u = muon_direction(whole, blocks)
        u = F.pad(u, (0, 0, 0, part_rows * self.size - rows)).unflatten(0, (self.size, part_rows))
        u = all_to_all(u, self.group)

        # W = W (1 - lr decay) - lr step_length X
        distance = lr * step_length(shape, blocks)
        for (name, p), part in zip(matrices, u, strict=False):
            weight = self.state[name].get("master", p)
            weight.mul_(1 - lr * self.decay).sub_(part[: len(p)] * distance)
            if weight is not p:
                p.copy_(weight)

    @torch.no_grad()
    def state_dict(self) -> dict[str, torch.Tensor]:
        """As Optimizer.state_dict, with DTensors for parts."""
        state = {"count": self.count}
        for name, entry in self.state.items():
            for key, t in entry.items():
                state[f"{name}.{key}"] = self.ranks.as_dtensor(name, t, self.parameters[name])
        return state
