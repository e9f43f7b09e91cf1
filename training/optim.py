"""The optimizer: Muon for matrices, AdamW for the rest, router biases by load (docs/v4.md#training); a step is one graph.

    Muon   ops/muon.py; all matrices but the embedding, the head and `ape`; experts one by one, W1 and W3 apart, groups of
           wo_a apart
    AdamW  torch.optim.AdamW's formula, in this graph, with fp32 masters; betas (0.9, 0.95), eps 1e-20; vectors (norms, sinks,
           the mHC's bases and scales) do not decay, as is usual, though V4's recipe names no exception
    bias   b += rate * sign(mean load - load), per router that is trained

Parameters below fp32 are updated through fp32 masters.
"""

from __future__ import annotations

from typing import Callable

import torch

from model import Gate, Linear
from ops.muon import grad_norm, muon


class Optimizer:
    """Updates the parameters of `model` that require gradients. kind: "muon" as above, or "adamw" for all of them."""

    def __init__(
        self,
        model: torch.nn.Module,
        kind: str = "muon",
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        decay: float = 0.1,
        momentum: float = 0.95,
        clip: float = float("inf"),
        bias_rate: float = 1e-3,
    ):
        if kind not in ("muon", "adamw"):
            raise ValueError(f"optimizer {kind!r}: choose muon or adamw")
        self.betas, self.eps, self.decay, self.momentum, self.clip, self.bias_rate = (
            betas,
            eps,
            decay,
            momentum,
            clip,
            bias_rate,
        )
        groups = {m.weight: m.groups for m in model.modules() if isinstance(m, Linear)}
        self.biases = [
            m.bias
            for m in model.modules()
            if isinstance(m, Gate) and m.bias is not None and m.weight.requires_grad
        ]
        self.muon: list[
            tuple[str, torch.Tensor, int]
        ] = []  # name, parameter, matrices along its rows
        self.adam: list[tuple[str, torch.Tensor]] = []
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        self.count = torch.zeros((), device=next(model.parameters()).device)
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            matrix = (
                kind == "muon"
                and p.dim() > 1
                and not name.startswith(("embed.", "head."))
                and not name.endswith("ape")
            )
            if matrix:
                self.muon.append((name, p, 2 if name.endswith("w13") else groups.get(p, 1)))
            else:
                self.adam.append((name, p))
            self.state[name] = {
                key: torch.zeros_like(p, dtype=torch.float32)
                for key in ("first", "second")[: 2 - matrix]
            }
            if p.dtype != torch.float32:
                self.state[name]["master"] = p.detach().float()
        self._run = self._update

    def compile(self, compiler: Callable[[Callable, str], Callable]) -> None:
        """Steps run as compiler(function, name) makes them."""
        self._run = compiler(lambda *args: self._update(*args), "optimizer")

    @torch.no_grad()
    def step(self, lr: torch.Tensor, load: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """One update from the gradients, which are then freed.

        lr is a 0-D tensor; load [routers with a bias, E]: tokens that chose each expert, or None.
        -> grad_norm, of all gradients before they are clipped.
        """
        self.count += 1
        filled = [
            1 - b**self.count for b in self.betas
        ]  # not in the graph, where every few elements would compute the powers
        return {"grad_norm": self._run(self.gradients(), lr, load, filled)}

    def gradients(self) -> dict[str, torch.Tensor]:
        """By name; the language-model loss does not reach the indexer. The parameters let go of them."""
        grads = {}
        for name, p, *_ in (*self.muon, *self.adam):
            if p.grad is not None:
                grads[name], p.grad = p.grad, None
        return grads

    def norm(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of all gradients, () fp32."""
        return grad_norm(list(grads.values()))

    def update_matrices(
        self, grads: dict[str, torch.Tensor], scale: torch.Tensor, lr: torch.Tensor
    ) -> None:
        for name, p, blocks in self.muon:
            if name in grads:
                state = self.state[name]
                muon(
                    p,
                    state["first"],
                    state.get("master"),
                    grads[name],
                    scale,
                    lr,
                    blocks,
                    self.momentum,
                    self.decay,
                )

    def _update(
        self,
        grads: dict[str, torch.Tensor],
        lr: torch.Tensor,
        load: torch.Tensor | None,
        filled: list[torch.Tensor],
    ) -> torch.Tensor:
        """filled: how much of each moving average is filled by now."""
        norm, (b1, b2) = self.norm(grads), self.betas
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        self.update_matrices(grads, scale, lr)
        for name, p in self.adam:
            if name in grads:
                state, g = self.state[name], grads[name].float() * scale
                state["first"].lerp_(g, 1 - b1)
                state["second"].lerp_(g.square(), 1 - b2)
                u = state["first"] / ((state["second"] / filled[1]).sqrt() + self.eps)
                weight = state.get("master", p)
                weight.mul_(1 - lr * (self.decay if p.dim() > 1 else 0.0)).sub_(lr / filled[0] * u)
                if weight is not p:
                    p.copy_(weight)
        if load is not None and self.biases:
            for bias, row in zip(self.biases, load):
                bias += self.bias_rate * (row.mean() - row).sign()
        return norm

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Flat: "count", and NAME.first, NAME.second, NAME.master."""
        return {
            "count": self.count,
            **{
                f"{name}.{key}": t for name, state in self.state.items() for key, t in state.items()
            },
        }

    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        """A ValueError names what a state of another model, or of another kind, has more or less."""
        mine = self.state_dict()
        if mine.keys() != saved.keys():
            raise ValueError(
                f"the optimizer's state differs in {sorted(mine.keys() ^ saved.keys())[0]!r}"
            )
        for key, tensor in mine.items():
            tensor.copy_(saved[key])
