"""Training by several processes: `torchrun --nproc-per-node N train_step.py ...`, on GPUs by NCCL,
on CPUs by gloo.

    rows      each process trains on its part of a step's rows; losses are means over the counts of
              all processes
    FSDP2     the matrices of a block, the embedding and the head are gathered while they are used;
              a process keeps some rows of each, with their gradients and moments. Small parameters
              are replicated: vectors, mHC, `ape` and routers
    experts   each process of a group of --ep holds some of the routed experts. Tokens go to them
              and come back by all-to-all within the block's graph; no token is dropped
              (training/expert_parallel.py). Groups divide their experts further, as FSDP2 does
    Muon      needs whole matrices: each process assembles one of a batch by all-to-all, and returns
              its direction likewise (training/sharded_optim.py)
    saved     resumable checkpoints by torch.distributed.checkpoint, each process its part; the
              released layout by the first process, which receives one tensor at a time

The model knows one seam of this, MoE.dispatch. Gradients are sums over processes, because each loss
is a part of the mean. FSDP2 gathers around the compiled blocks, whose full graphs hold the exchange
of tokens.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from checkpoint import save
from compile_config import CompileConfig
from model import Transformer
from ops.registry import Table
from tools.launcher import from_launcher, join_group, launched
from tools.released_layout import checkpoint_tensors, empty_model
from training.dataset import RankRows, Rows
from training.expert_parallel import AllToAllDispatch
from training.optim import Optimizer
from training.sharded_optim import ShardedOptimizer, to_local

T = TypeVar("T")

# Parameters that every process holds whole, beside vectors.
REPLICATED = re.compile(r"(^|\.)hc_|\.ape$|\.gate\.")
# Routed experts: stacked, as the model holds them, or one by one, as they are released.
EXPERT = re.compile(r"(.*\.experts)\.(?:(w13|w2)|(\d+)\.(w[123])\.weight)$")


# FSDP2 acts by hooks on the calls of modules. These functions use its private state instead:
# https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_state.py


def gather_around(run: Callable) -> Callable:
    """run(block, *args), which calls block.forward without hooks -> run between FSDP2's hooks.

    A full graph cannot hold hooks. So the parameters of the block, and of its experts where these
    have a mesh of their own, are gathered before a compiled block, and resharded after it.
    """

    def run_gathered(block: torch.nn.Module, *args):
        modules = [m for m in (block, block.ffn.experts) if isinstance(m, FSDPModule)]
        states = [m._get_fsdp_state() for m in modules]
        for state in states:
            args, _ = state._pre_forward(block, args, {})
        output = run(block, *args)
        for state in reversed(states):
            output = state._post_forward(block, args, output)
        return output

    return run_gathered


def initialize_fsdp(model: FSDPModule) -> None:
    """Collect all parameters that require gradients at any time of the run, as all do now."""
    model._get_fsdp_state()._lazy_init()


class Ranks:
    """The processes of a training run: those that torchrun started, or this one alone.

    Alone, there is no process group: collectives return their arguments, and model and optimizer
    stay as they are.

    distributed  whether torchrun started this process (it may have started one only)
    rank, size   this process's number, and how many there are; is_main: the first
    device       "cpu" or "cuda"
    mesh         [size]: FSDP2 shards parameters over it
    expert_mesh  [ep_size, size / ep_size]: routed experts are divided by the first, and what is
                 left of them by the second
    """

    def __init__(self, device: str, batch: int, ep: int | None = None):
        """batch: rows of a step. ep: processes that share the routed experts; None: a machine's.

        ValueError if the processes cannot share the rows evenly, or if there is ep and no torchrun.
        """
        self.distributed = launched()
        self.rank, self.size = 0, 1
        self.ep = ep
        if self.distributed:
            self.rank, self.size = from_launcher("RANK"), from_launcher("WORLD_SIZE")
            if self.rank >= self.size:
                raise ValueError(
                    f"RANK={self.rank} in the environment is not below WORLD_SIZE={self.size}: "
                    "unset both, or start the processes with torchrun"
                )
        elif ep:
            raise ValueError(
                f"--ep {ep}: start the processes with torchrun --nproc-per-node N train_step.py ..."
            )
        self.is_main = self.rank == 0
        self.device = torch.device(device)
        if batch % self.size:
            raise ValueError(f"--batch {batch}: {self.size} processes cannot share its rows evenly")
        if self.distributed:
            if device == "cuda":
                torch.cuda.set_device(from_launcher("LOCAL_RANK"))
            join_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
            self.mesh = init_device_mesh(device, (self.size,))
            self.group = self.mesh.get_group().group_name

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error) -> None:
        if self.distributed:
            dist.destroy_process_group()

    # Collectives

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process. All processes wait for each other here."""
        if not self.distributed:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def barrier(self) -> None:
        """All processes wait for each other."""
        self.any(False)

    def main_first(self, make: Callable[[], T]) -> T:
        """make(), in the first process before the others, which find the files that it cached."""
        if not self.is_main:
            self.barrier()
            return make()
        try:
            return make()
        finally:
            self.barrier()

    def all_reduce_sum(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Sums over all processes, fp32."""
        if not self.distributed:
            return tensors
        flat = torch.cat([t.detach().flatten().float() for t in tensors])
        dist.all_reduce(flat, group=self.mesh.get_group())
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    # A run's parts, as this process needs them

    def rows(self, rows: Rows) -> RankRows:
        """This process's rows of each step."""
        return RankRows(rows, self.rank, self.size)

    def preset(self, cfg: CompileConfig) -> CompileConfig:
        """How to compile: FSDP2 gathers between the blocks, so that blocks are compiled."""
        return dataclasses.replace(cfg, region="layer") if self.distributed else cfg

    @property
    def wrap_block(self) -> Callable[[Callable], Callable] | None:
        """As in compile_train_step."""
        return gather_around if self.distributed else None

    def optimizer(self, model: Transformer, kind: str, **options) -> Optimizer:
        """Options as in Optimizer."""
        if self.distributed:
            return ShardedOptimizer(self, model, kind, **options)
        return Optimizer(model, kind, **options)

    # The model

    def shard(self, model: Transformer) -> Transformer:
        """Shard a model that every rank initialised identically on the CPU.

        Shards are placed on the device.

        ValueError if --ep divides neither the processes nor the experts.
        """
        if not self.distributed:
            return model
        blocks = [*model.layers, *model.mtp]
        self.n_experts = model.args.n_routed_experts
        self._make_expert_mesh()
        if self.ep_size > 1:
            self._keep_own_experts(blocks)
        ignored = {p for name, p in model.named_parameters() if self._fsdp_ignores(name, p)}
        for tensor in (*ignored, *model.buffers()):
            tensor.data = tensor.data.to(self.device)

        # Gradients are summed in fp32. Groups that divide their experts do so over their own mesh.
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        for block in blocks:
            if 1 < self.ep_size < self.size:
                mesh = self.expert_mesh["rest"]
                fully_shard(block.ffn.experts, mesh=mesh, mp_policy=policy)
            fully_shard(block, mesh=self.mesh, mp_policy=policy, ignored_params=ignored)
        fully_shard(
            model,
            mesh=self.mesh,
            mp_policy=policy,
            ignored_params=ignored,
            reshard_after_forward=False,
        )
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        initialize_fsdp(model)
        return model

    def _make_expert_mesh(self) -> None:
        per_machine = self._processes_per_machine()
        ep = self.ep or (per_machine if self.n_experts % per_machine == 0 else 1)
        if self.size % ep or self.n_experts % ep:
            raise ValueError(
                f"--ep {ep}: choose a divisor of {self.size} processes "
                f"and of {self.n_experts} experts"
            )
        self.ep_size = ep
        ranks = torch.arange(self.size).view(-1, ep).T.contiguous()  # a group's ranks are adjacent
        self.expert_mesh = DeviceMesh(self.device.type, ranks, mesh_dim_names=("ep", "rest"))

    def _processes_per_machine(self) -> int:
        """Ranks per machine; 1 if machines differ.

        Counts host names if LOCAL_WORLD_SIZE is unset.
        """
        if "LOCAL_WORLD_SIZE" in os.environ:
            return from_launcher("LOCAL_WORLD_SIZE")
        machines = [None] * self.size
        dist.all_gather_object(machines, platform.node())
        counts = set(Counter(machines).values())
        return counts.pop() if len(counts) == 1 else 1

    def _keep_own_experts(self, blocks: list[torch.nn.Module]) -> None:
        position = self.expert_mesh.get_local_rank("ep")
        group = self.expert_mesh.get_group("ep").group_name
        dispatch = AllToAllDispatch(group, self.ep_size)
        for ffn in (block.ffn for block in blocks):
            for name in ("w13", "w2"):
                part = getattr(ffn.experts, name).detach().chunk(self.ep_size)[position]
                part = torch.nn.Parameter(part.to(self.device, copy=True))
                setattr(ffn.experts, name, part)
            ffn.dispatch = dispatch
            # The opaque form is the one that knows pairs without an expert.
            ffn.experts.ops = Table({**ffn.experts.ops.modes, "moe": "opaque"})

    def _fsdp_ignores(self, name: str, p: torch.Tensor) -> bool:
        """Whether FSDP2 leaves a parameter alone: also experts that all processes divide."""
        if EXPERT.match(name):
            return self.ep_size == self.size > 1
        return p.dim() == 1 or REPLICATED.search(name) is not None

    def is_replicated(self, name: str, p: torch.Tensor) -> bool:
        """Whether every process holds all of a parameter, once the model is sharded."""
        return not isinstance(p, DTensor) and not EXPERT.match(name)

    # Saving

    def as_dtensor(self, name: str, part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """This process's part of a tensor, sharded as the parameter of that name -> a DTensor."""
        if EXPERT.match(name):
            mesh = self.expert_mesh
            shape = torch.Size((self.n_experts, *part.shape[1:]))
        elif isinstance(parameter, DTensor):
            mesh, shape = parameter.device_mesh, parameter.shape
        else:
            return part
        return DTensor.from_local(
            part,
            mesh,
            [Shard(0)] * mesh.ndim,
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def gather_full(self, model: Transformer) -> Callable[[str], torch.Tensor]:
        """-> get(released name) -> the whole tensor; all processes call it together."""
        tensors = model.state_dict()

        def get(name: str) -> torch.Tensor:
            match = EXPERT.match(name)
            if match is None:
                tensor = tensors[name]
                return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            prefix, _, number, matrix = match.groups()
            stack = to_local(tensors[f"{prefix}.{'w2' if matrix == 'w2' else 'w13'}"])
            owner, index = self._locate_expert(int(number))
            expert = stack[index] if self.rank == owner else stack.new_empty(stack.shape[1:])
            if matrix != "w2":
                w1, w3 = expert.chunk(2)
                expert = w1 if matrix == "w1" else w3
            expert = expert.contiguous()
            dist.broadcast(expert, owner, group=self.mesh.get_group())
            return expert

        return get

    def _locate_expert(self, number: int) -> tuple[int, int]:
        """-> the process that holds a routed expert, and its place in that process's stack."""
        per_group = self.n_experts // self.ep_size
        per_process = -(-per_group // self.expert_mesh.shape[1])  # FSDP2 shards in equal chunks
        column, index = divmod(number % per_group, per_process)
        return int(self.expert_mesh.mesh[number // per_group, column]), index

    @torch.no_grad()
    def save(self, model: Transformer, path, **layout) -> None:
        """checkpoint.save of the whole model, written by the first process."""
        if not self.distributed:
            save(model, path, **layout)
            return
        empty = empty_model(model.args, model.embed.weight.dtype)
        empty.source = getattr(model, "source", None)
        get = self.gather_full(model)
        if self.is_main:
            save(empty, path, get=get, **layout)
        else:
            for name in checkpoint_tensors(empty):
                get(name)

    def checkpoint_state(self, model: Transformer, optimizer: Optimizer) -> dict[str, torch.Tensor]:
        """All tensors of a distributed checkpoint, in the memory of model and optimizer."""
        weights = {
            f"weight.{name}": self.as_dtensor(name, to_local(t), t)
            for name, t in model.state_dict().items()
        }
        return weights | {f"optimizer.{name}": t for name, t in optimizer.state_dict().items()}
