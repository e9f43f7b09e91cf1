"""Routed experts divided over processes: tokens go to them, and come back, by all-to-all."""

from __future__ import annotations

import torch

# all_to_all_single_autograd: torch/distributed/_functional_collectives.py line 592
import torch.distributed._functional_collectives as functional

from model import Experts


def all_to_all(x: torch.Tensor, group: str) -> torch.Tensor:
    """[processes, ...] -> the same shape: row i goes to process i, and comes from it."""
    return functional.all_to_all_single_autograd(x.contiguous(), None, None, group)


class AllToAllDispatch:
    """A MoE.dispatch: runs the routed experts of a group of processes on the tokens of all of them.

    Each process holds E / ep_size experts, in the order of the group. It sends all its tokens to
    each process, so that shapes are static; a process computes the pairs of token and expert that
    are its own.
    """

    def __init__(self, group: str, ep_size: int):
        self.group, self.ep_size = group, ep_size

    def __call__(
        self, experts: Experts, x: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        local_experts, K = len(experts.w13), chosen.shape[1]
        process = torch.arange(self.ep_size, device=x.device)[:, None, None]
        owned = chosen // local_experts == process  # [ep_size, tokens, K]
        # Of a pair that is not the receiver's, the expert is `local_experts`: none.
        expert = torch.where(owned, chosen - process * local_experts, local_experts)
        pairs = torch.cat([expert, torch.where(owned, weight, 0.0)], -1)  # [ep_size, tokens, 2K]
        x = all_to_all(x.expand(self.ep_size, -1, -1), self.group)
        pairs = all_to_all(pairs, self.group)
        # Eager calls have FSDP2's hooks gather the experts; for graphs, gather_around has done it.
        run = experts.forward if torch.compiler.is_compiling() else experts
        y = run(
            x.flatten(0, 1),
            pairs[..., :K].flatten(0, 1).long(),
            pairs[..., K:].flatten(0, 1).contiguous(),
        )
        return all_to_all(y.unflatten(0, (self.ep_size, -1)), self.group).sum(0)
