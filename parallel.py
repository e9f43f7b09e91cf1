"""Training by several processes: `torchrun --nproc-per-node N train_step.py ...`, on GPUs by NCCL, on CPUs by gloo.

    rows      each process takes its share of a step's rows; losses are means over the counts of all of them
    FSDP2     a block's matrices, and embedding and head, are gathered while they are used; of each, a process keeps some rows
              with their gradients and moments. What is small is whole everywhere: vectors, mHC, `ape` and routers
    experts   each process of a group of --ep holds some of the routed experts. Tokens go to them and come back by
              all-to-all, within the block's graph: each process sends all its tokens to each other one, so that shapes are
              static and no token is dropped; experts see only the pairs that are theirs. Groups divide their experts
              further, as FSDP2 does
    Muon      whole matrices: every process puts one of as many together by all-to-all, and hands its direction back
    saved     resumable checkpoints by torch.distributed.checkpoint, each process its part; the released layout by the first
              process, which is handed one tensor at a time

Nothing here is known to the model. Gradients are sums over processes: each one's loss is its share of the mean. Each process
runs hooks of FSDP2 around the compiled layers, whose full graphs hold the exchange of tokens.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from checkpoint import checkpoint_tensors, empty_model, save
from compile_config import CompileConfig
from model import Experts, Transformer
from ops.muon import grad_norm, muon_direction, step_length
from ops.registry import Table
from training.optim import Optimizer

WHOLE = re.compile(
    r"(^|\.)hc_|\.ape$|\.gate\."
)  # parameters that every process holds, beside vectors
FACTS = "facts.json"
EXPERT = re.compile(
    r"(.*\.experts)\.(?:(w13|w2)|(\d+)\.(w[123])\.weight)$"
)  # in the model; released


def local(t: torch.Tensor) -> torch.Tensor:
    """This process's part."""
    return t.to_local() if isinstance(t, DTensor) else t


def exchange(x: torch.Tensor, group: str) -> torch.Tensor:
    """[ways, ...] -> [ways, ...]: the i-th goes to process i of the group, and comes from it. Differentiable."""
    return functional.all_to_all_single_autograd(x.contiguous(), None, None, group)


class AllToAllDispatch:
    """Runs the routed experts of the `ep_size` processes of a group on the tokens of all of them (see MoE.dispatch).

    Each process holds E / ep_size experts, in the order of the group. It sends all its tokens to each process, so that
    shapes are static; a process computes the pairs of token and expert that are its own.
    """

    def __init__(self, group: str, ep_size: int):
        self.group, self.ep_size = group, ep_size

    def __call__(
        self, experts: Experts, x: torch.Tensor, chosen: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        local_experts, K = len(experts.w13), chosen.shape[1]
        process = torch.arange(self.ep_size, device=x.device)[:, None, None]
        owned = chosen // local_experts == process  # [ep_size, N, K]
        # Of a pair that is not the receiver's, the expert is `local_experts`: none.
        expert = torch.where(owned, chosen - process * local_experts, local_experts)
        pairs = torch.cat([expert, torch.where(owned, weight, 0.0)], -1)  # [ep_size, N, 2K]
        x = exchange(x.expand(self.ep_size, -1, -1), self.group)
        pairs = exchange(pairs, self.group)
        y = experts(
            x.flatten(0, 1),
            pairs[..., :K].flatten(0, 1).long(),
            pairs[..., K:].flatten(0, 1).contiguous(),
        )
        return exchange(y.unflatten(0, (self.ep_size, -1)), self.group).sum(0)


class Share:
    """Of the rows asked for, those of this process."""

    def __init__(self, rows, rank: int, size: int):
        self.rows, self.length, self.rank, self.size = rows, rows.length, rank, size

    def __call__(self, rows: range):
        part = len(rows) // self.size
        return self.rows(rows[self.rank * part : (self.rank + 1) * part])


class Ranks:
    """The processes that torchrun started, as train_step.py sees them (train_step.Solo is one process).

    mesh   [processes]: what FSDP2 divides parameters by
    grid   [ep, processes / ep]: the first divides the routed experts, the second divides what is left of them
    """

    def __init__(self, device: str, batch: int, ep: int | None = None):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.lead, self.ep = self.rank == 0, ep
        if batch % self.size:
            raise ValueError(f"--batch {batch}: {self.size} processes cannot share its rows evenly")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        self.device, self.mesh = torch.device(device), init_device_mesh(device, (self.size,))
        self.group = self.mesh.get_group().group_name

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error) -> None:
        dist.destroy_process_group()

    # What processes agree on

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all wait for each other."""
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def first(self, make: Callable):
        """make(), in the first process before the others, which find what it cached."""
        if not self.lead:
            self.any(False)
            return make()
        try:
            return make()
        finally:
            self.any(False)

    def total(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Sums over all processes, fp32."""
        flat = torch.cat([t.detach().flatten().float() for t in tensors])
        dist.all_reduce(flat, group=self.mesh.get_group())
        return [
            part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)
        ]

    def share(self, rows) -> Share:
        return Share(rows, self.rank, self.size)

    def preset(self, cfg: CompileConfig) -> CompileConfig:
        """Hooks run between layers, so that these are what is compiled."""
        return dataclasses.replace(cfg, region="layer")

    # The model

    def shard(self, model: Transformer) -> Transformer:
        """Divide a model that all processes have made alike, block by block; what is left of it lies on the device."""
        blocks, self.experts = (*model.layers, *model.mtp), model.args.n_routed_experts
        near = int(os.environ["LOCAL_WORLD_SIZE"])
        ep = self.ep or (near if self.experts % near == 0 else 1)
        if self.size % ep or self.experts % ep:
            raise ValueError(
                f"--ep {ep}: choose a divisor of {self.size} processes and of {self.experts} experts"
            )
        ranks = torch.arange(self.size).view(-1, ep).T.contiguous()  # groups are neighbours
        self.ep, self.grid = ep, DeviceMesh(self.device.type, ranks, mesh_dim_names=("ep", "rest"))
        if ep > 1:
            position = self.grid.get_local_rank("ep")
            dispatch = AllToAllDispatch(self.grid.get_group("ep").group_name, ep)
            for ffn in (block.ffn for block in blocks):
                for name in ("w13", "w2"):
                    part = getattr(ffn.experts, name).detach().chunk(ep)[position]
                    part = torch.nn.Parameter(part.to(self.device, copy=True))
                    setattr(ffn.experts, name, part)
                ffn.dispatch = dispatch
                # The opaque form is the one that knows pairs without an expert.
                ffn.experts.ops = Table({**ffn.experts.ops.modes, "moe": "opaque"})
        named = dict(model.named_parameters())
        whole = {
            p
            for name, p in named.items()
            if p.dim() == 1 or WHOLE.search(name) or ep == self.size > 1 and EXPERT.match(name)
        }
        for tensor in (*whole, *model.buffers()):
            tensor.data = tensor.data.to(self.device)
        how = dict(mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
        for block in blocks:
            if 1 < ep < self.size:
                self._shard_with(
                    block, fully_shard(block.ffn.experts, mesh=self.grid["rest"], **how)
                )
            fully_shard(block, mesh=self.mesh, ignored_params=whole, **how)
        fully_shard(model, mesh=self.mesh, ignored_params=whole, reshard_after_forward=False, **how)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        model._get_fsdp_state()._lazy_init()  # while all parameters learn: those of a later stage are known then, too
        return model

    @staticmethod
    def _shard_with(block: torch.nn.Module, experts: FSDPModule) -> None:
        """Experts are gathered as their block is: around its graph, not within it."""
        state = experts._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        block.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
        block.register_forward_hook(state._post_forward)

    def describe(self, name: str, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """This process's part of what has the name and shape of a parameter, as a part; `like` is the parameter."""
        if EXPERT.match(name):
            mesh, shape = self.grid, torch.Size((self.experts, *part.shape[1:]))
        elif isinstance(like, DTensor):
            mesh, shape = like.device_mesh, like.shape
        else:
            return part
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            part, mesh, [Shard(0)] * mesh.ndim, run_check=False, shape=shape, stride=stride
        )

    def whole(self, model: Transformer) -> Callable[[str], torch.Tensor]:
        """-> get(released name) -> the tensor; all processes call it together."""
        tensors = model.state_dict()

        def get(name: str) -> torch.Tensor:
            if not (match := EXPERT.match(name)):
                return (
                    tensors[name].full_tensor()
                    if isinstance(tensors[name], DTensor)
                    else tensors[name]
                )
            prefix, _, e, part = match.groups()
            stack, held = (
                local(tensors[f"{prefix}.{'w2' if part == 'w2' else 'w13'}"]),
                self.experts // self.ep,
            )
            i, e = divmod(
                int(e), held
            )  # the group's process, and its expert, of which it has kept `each`
            each = -(-held // self.grid.shape[1])
            owner = int(self.grid.mesh[i, e // each])
            expert = stack[e % each] if self.rank == owner else stack.new_empty(stack.shape[1:])
            if part != "w2":
                expert = expert.chunk(2)[part == "w3"]
            expert = expert.contiguous()
            dist.broadcast(expert, owner, group=self.mesh.get_group())
            return expert

        return get

    @torch.no_grad()
    def save(self, model: Transformer, path, **layout) -> None:
        """As checkpoint.save, by the first process."""
        empty, get = empty_model(model.args, model.embed.weight.dtype), self.whole(model)
        empty.source = getattr(model, "source", None)
        if self.lead:
            save(empty, path, get=get, **layout)
        else:
            for name in checkpoint_tensors(empty):
                get(name)

    def optimizer(self, model: Transformer, kind: str, **options) -> Divided:
        return Divided(self, model, kind, **options)

    def checkpoints(self, base: type) -> type:
        """train_step.Checkpoints, of which each process writes its part."""
        ranks = self

        class Shared(base):
            @torch.no_grad()
            def save(
                self, model: Transformer, optimizer: Divided, step: int, facts: dict, **layout
            ) -> Path:
                temporary = self.begin(step) if ranks.lead else self.folder / f".step-{step:06d}"
                ranks.any(False)
                ranks.save(model, temporary, **layout)
                dcp.save(ranks.state(model, optimizer), checkpoint_id=temporary)
                if ranks.lead:
                    (temporary / FACTS).write_text(json.dumps({"step": step, "facts": facts}))
                    self.finish(temporary, step)
                ranks.any(False)
                return self.path(step)

            @torch.no_grad()
            def load(self, model: Transformer, optimizer: Divided, facts: dict) -> int:
                path = self.path(self.steps()[-1])
                try:
                    about = json.loads((path / FACTS).read_text())
                except (OSError, ValueError):
                    raise ValueError(
                        f"{path}: was not saved by several processes: name another folder"
                    ) from None
                self.compare(path, about["facts"], facts)
                try:
                    dcp.load(ranks.state(model, optimizer), checkpoint_id=path)
                except Exception as error:  # a torn checkpoint fails in as many ways
                    raise ValueError(
                        f"{path}: cannot be read ({str(error).splitlines()[0]}); remove it"
                    ) from None
                return about["step"]

        return Shared

    def state(self, model: Transformer, optimizer: Divided) -> dict[str, torch.Tensor]:
        """All that a checkpoint holds, as parts of whole tensors, in the memory where training has it."""
        weights = {
            f"weight.{name}": self.describe(name, local(t), t)
            for name, t in model.state_dict().items()
        }
        return weights | {f"optimizer.{name}": t for name, t in optimizer.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# The optimizer


class Divided(Optimizer):
    """Updates this process's parts. What is whole everywhere is updated everywhere, alike.

    parameters  name -> parameter, as the model holds it; all else here is local
    alike       names of those that are whole everywhere
    rounds      divided matrices of one shape, at most as many as processes: their rows, blocks, and [(name, part)]
    """

    @torch.no_grad()
    def __init__(self, ranks: Ranks, model: Transformer, *args, **options):
        super().__init__(model, *args, **options)
        self.ranks, self.size, self.group = ranks, ranks.size, ranks.group
        self.parameters, shapes = {name: p for name, p, *_ in (*self.muon, *self.adam)}, {}
        self.alike = {
            name
            for name, p in self.parameters.items()
            if not isinstance(p, DTensor) and not EXPERT.match(name)
        }
        for name, p, blocks in self.muon:
            if isinstance(p, DTensor) and p.dim() == 2:
                shapes.setdefault((p.shape, blocks), []).append((name, local(p)))
        self.rounds = [
            (shape, blocks, found[at : at + self.size])
            for (shape, blocks), found in shapes.items()
            for at in range(0, len(found), self.size)
        ]
        divided = {name for *_, found in self.rounds for name, _ in found}
        self.muon = [
            (name, local(p), blocks) for name, p, blocks in self.muon if name not in divided
        ]
        self.adam = [(name, local(p)) for name, p in self.adam]
        self.state = {
            name: {key: local(t) for key, t in state.items()} for name, state in self.state.items()
        }

    def compile(self, compiler: Callable) -> None:
        """Eager where parts differ in size: graphs that differ might communicate in another order."""
        if all(
            len(p) % p.device_mesh.size() == 0
            for p in self.parameters.values()
            if isinstance(p, DTensor)
        ):
            super().compile(compiler)

    def gradients(self) -> dict[str, torch.Tensor]:
        grads = {}
        for name, p in self.parameters.items():
            if p.grad is not None:
                grads[name], p.grad = local(p.grad), None
        alike = [name for name in grads if name in self.alike]
        return grads | dict(zip(alike, self.ranks.total([grads[name] for name in alike])))

    def norm(self, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        alike, parts = (
            [g for name, g in grads.items() if (name in self.alike) == which]
            for which in (True, False)
        )
        return (
            functional.all_reduce(grad_norm(parts).square(), "sum", self.group)
            + grad_norm(alike).square()
        ).sqrt()

    def update_matrices(
        self, grads: dict[str, torch.Tensor], scale: torch.Tensor, lr: torch.Tensor
    ) -> None:
        super().update_matrices(grads, scale, lr)
        for shape, blocks, found in self.rounds:
            found, each, sent = (
                [(name, p) for name, p in found if name in grads],
                -(-shape[0] // self.size),
                [],
            )
            if not found:
                continue
            for name, p in found:
                first, g = self.state[name]["first"], grads[name].float() * scale
                first.mul_(self.momentum).add_(g)
                sent.append(F.pad(g + self.momentum * first, (0, 0, 0, each - len(p))))
            sent += [torch.zeros_like(sent[0])] * (self.size - len(sent))
            u = muon_direction(
                exchange(torch.stack(sent), self.group).flatten(0, 1)[: shape[0]], blocks
            )
            u = exchange(
                F.pad(u, (0, 0, 0, each * self.size - shape[0])).unflatten(0, (self.size, each)),
                self.group,
            )
            for (name, p), part in zip(found, u):
                weight = self.state[name].get("master", p)
                weight.mul_(1 - lr * self.decay).sub_(
                    part[: len(p)] * (lr * step_length(shape, blocks))
                )
                if weight is not p:
                    p.copy_(weight)

    @torch.no_grad()
    def state_dict(self) -> dict[str, torch.Tensor]:
        """As parts of whole tensors."""
        state = {(name, key): t for name, entry in self.state.items() for key, t in entry.items()}
        return {
            "count": self.count,
            **{
                f"{name}.{key}": self.ranks.describe(name, t, self.parameters[name])
                for (name, key), t in state.items()
            },
        }
