"""The optimizer: Muon for matrices, AdamW for the rest, router biases by load
(docs/v4.md#training); a step is one graph.

    Muon   ops/muon.py; all matrices but the embedding, the head and `ape`; experts one by one, W1
           and W3 apart, groups of wo_a apart
    AdamW  torch.optim.AdamW's formula, in this graph, with fp32 masters; betas (0.9, 0.95), eps
           1e-20; vectors (norms, sinks, the mHC's bases and scales) do not decay, as is usual,
           though V4's recipe names no exception
    bias   b += rate * sign(mean load - load), per router that is trained

Parameters below fp32 are updated through fp32 masters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch

from model import Gate, Linear
from ops.muon import grad_norm, muon


def is_muon_matrix(name: str, p: torch.Tensor) -> bool:
    """Whether a parameter is a matrix, or a stack of matrices, that Muon updates."""
    return p.dim() > 1 and not name.startswith(("embed.", "head.")) and not name.endswith("ape")


class Optimizer:
    """Updates the parameters of `model` that require gradients. kind: "muon" as above, or "adamw"
    for all of them.

    muon    [(name, parameter, matrices of equal size along its rows)]
    adam    [(name, parameter)]
    state   name -> "first" moment, "second" moment (AdamW), "master" (parameters below fp32), all
            fp32
    biases  of the routers that are trained
    count   of steps, fp32
    """

    def __init__(
        self,
        model: torch.nn.Module,
        kind: str = "muon",
        *,
        # AdamW
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
        # Muon
        momentum: float = 0.95,
        # All
        decay: float = 0.1,
        clip: float = float("inf"),
        bias_rate: float = 1e-3,
    ):
        """clip: the largest norm of all gradients together. ValueError if the kind is unknown."""
        if kind not in ("muon", "adamw"):
            raise ValueError(f"optimizer {kind!r}: choose muon or adamw")
        self.kind = kind
        self.betas, self.eps = betas, eps
        self.decay, self.momentum = decay, momentum
        self.clip, self.bias_rate = clip, bias_rate
        self.biases = [
            m.bias
            for m in model.modules()
            if isinstance(m, Gate) and m.bias is not None and m.weight.requires_grad
        ]
        self.muon: list[tuple[str, torch.Tensor, int]] = []
        self.adam: list[tuple[str, torch.Tensor]] = []
        self.state: dict[str, dict[str, torch.Tensor]] = {}
        self.count = torch.zeros((), device=next(model.parameters()).device)
        groups = {m.weight: m.groups for m in model.modules() if isinstance(m, Linear)}
        balanced = set(self.biases)  # no loss has a gradient for them, whatever they require
        for name, p in model.named_parameters():
            if not p.requires_grad or p in balanced:
                continue
            moments = ["first"]
            if kind == "muon" and is_muon_matrix(name, p):
                matrices = 2 if name.endswith("w13") else groups.get(p, 1)
                self.muon.append((name, p, matrices))
            else:
                self.adam.append((name, p))
                moments.append("second")
            self.state[name] = {key: torch.zeros_like(p, dtype=torch.float32) for key in moments}
            if p.dtype != torch.float32:
                self.state[name]["master"] = p.detach().float()
        self._run = self._update

    def compile(self, compiler: Callable[[Callable, str], Callable]) -> None:
        """Run steps through compiler(function, name) -> compiled function."""
        self._run = compiler(lambda *args: self._update(*args), "optimizer")

    @torch.no_grad()
    def step(self, lr: torch.Tensor, load: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """One update from the gradients, which are then freed.

        lr is a 0-D tensor; load [routers with a bias, E]: tokens that chose each expert, or None.
        -> grad_norm, of all gradients before they are clipped.
        """
        self.count += 1
        # 1 - beta^count, here: in the graph, each kernel that updates some parameters would compute
        # the powers.
        corrections = [1 - beta**self.count for beta in self.betas]
        return {"grad_norm": self._run(self.gradients(), lr, load, corrections)}

    def gradients(self) -> dict[str, torch.Tensor]:
        """By name, taken away from the parameters. Without its loss, the indexer has none."""
        grads = {}
        for name, p, *_ in (*self.muon, *self.adam):
            if p.grad is not None:
                grads[name], p.grad = p.grad, None
        return grads

    def norm(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of all gradients together, () fp32."""
        return grad_norm(list(grads.values()))

    def update_matrices(
        self, grads: dict[str, torch.Tensor], scale: torch.Tensor, lr: torch.Tensor
    ) -> None:
        """Muon, with gradients times `scale`."""
        for name, p, matrices in self.muon:
            if name not in grads:
                continue
            state, g = self.state[name], grads[name]
            first, master = state["first"], state.get("master")
            muon(p, first, master, g, scale, lr, matrices, self.momentum, self.decay)

    def update_rest(
        self,
        grads: dict[str, torch.Tensor],
        scale: torch.Tensor,
        lr: torch.Tensor,
        corrections: list[torch.Tensor],
    ) -> None:
        """AdamW: W = W (1 - lr decay) - lr / c1 first / (sqrt(second / c2) + eps).

        c1, c2: corrections of the bias of the moving averages, which begin with zero.
        """
        beta1, beta2 = self.betas
        for name, p in self.adam:
            if name not in grads:
                continue
            state, g = self.state[name], grads[name].float() * scale
            state["first"].lerp_(g, 1 - beta1)
            state["second"].lerp_(g.square(), 1 - beta2)
            u = state["first"] / ((state["second"] / corrections[1]).sqrt() + self.eps)
            weight = state.get("master", p)
            decay = self.decay if p.dim() > 1 else 0.0
            weight.mul_(1 - lr * decay).sub_(lr / corrections[0] * u)
            if weight is not p:
                p.copy_(weight)

    def _update(
        self,
        grads: dict[str, torch.Tensor],
        lr: torch.Tensor,
        load: torch.Tensor | None,
        corrections: list[torch.Tensor],
    ) -> torch.Tensor:
        """All of a step -> the norm of the gradients; arguments as above."""
        norm = self.norm(grads)
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)
        self.update_matrices(grads, scale, lr)
        self.update_rest(grads, scale, lr, corrections)
        if load is not None and self.biases:
            for bias, row in zip(self.biases, load, strict=True):
                bias += self.bias_rate * (row.mean() - row).sign()
        return norm

    def settings(self) -> dict[str, object]:
        """Keywords that make such an optimizer for another model."""
        names = ("kind", "betas", "eps", "momentum", "decay", "clip", "bias_rate")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> list[torch.Tensor]:
        """All that a step changes but `count`: parameters, state, biases."""
        parameters = [p for _, p, *_ in (*self.muon, *self.adam)]
        state = [t for entry in self.state.values() for t in entry.values()]
        return [*parameters, *state, *self.biases]

    def update_on(
        self, tensors: Sequence[torch.Tensor], names: list[str], has_load: bool
    ) -> torch.Tensor:
        """A step's update as a function of tensors: `tensors()`, the gradients of these names, the
        load if there is one, lr and the two corrections -> the norm of the gradients.
        """
        rest, other = iter(tensors), copy.copy(self)
        other.muon = [(name, next(rest), matrices) for name, _, matrices in self.muon]
        other.adam = [(name, next(rest)) for name, _ in self.adam]
        other.state = {
            name: {key: next(rest) for key in entry} for name, entry in self.state.items()
        }
        other.biases = [next(rest) for _ in self.biases]
        grads = {name: next(rest) for name in names}
        load = next(rest) if has_load else None
        lr, *corrections = rest
        return other._update(grads, lr, load, corrections)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Flat: "count", and NAME.first, NAME.second, NAME.master."""
        state = {"count": self.count}
        for name, entry in self.state.items():
            for key, t in entry.items():
                state[f"{name}.{key}"] = t
        return state

    def load_state_dict(self, saved: dict[str, torch.Tensor]) -> None:
        """ValueError if the state is of another model or kind: it names an entry that differs."""
        state = self.state_dict()
        if state.keys() != saved.keys():
            name = sorted(state.keys() ^ saved.keys())[0]
            raise ValueError(f"the optimizer's state differs in {name!r}")
        for key, tensor in state.items():
            tensor.copy_(saved[key])
