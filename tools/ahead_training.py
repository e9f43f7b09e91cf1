"""A training step whose parts another process compiles ahead of time.

The parts are those that `run_block` calls (embedding, each kind of layer, losses), each a library
of its forward and one of its backward, and the update. Steps run eagerly until all are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from model import Aux, Transformer, call
from tools import ahead
from tools.ahead_compiler import AheadCompiler, AheadRun, Job
from tools.layer_graphs import compile_layers
from tools.torch_private import hook_dicts
from training.losses import LossWeights, combine_losses, make_targets, training_loss
from training.optim import Optimizer
from training.step import TrainStep

BACKWARD, LINKS = "backward.so", "links.pickle"
UPDATE = "update"  # the part


class Settings(NamedTuple):
    """Of a training step, beside its model and shapes. trained: names of parameters."""

    weights: LossWeights
    aux: Aux
    trained: tuple[str, ...]
    optimizer: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Of a value: the i-th "input" of a part, the i-th one that its forward has "made", or a
    "constant", itself.
    """

    kind: str
    value: object

    def of(self, inputs: Sequence[torch.Tensor], made: Sequence[torch.Tensor]):
        """-> the value."""
        if self.kind == "constant":
            return self.value
        return (inputs if self.kind == "input" else made)[self.value]


class Links(NamedTuple):
    """How the two libraries of a part fit together and make its result.

    result           with an Origin in place of each leaf
    differentiable   of each leaf that the forward makes; the backward takes their gradients
    saved            of the backward's other inputs, in order
    """

    result: object
    differentiable: list[bool]
    saved: list[Origin]


class Call(torch.autograd.Function):
    """A part, differentiable: apply(joint, *tensors) -> what the forward makes."""

    @staticmethod
    def forward(ctx, joint: Joint, *tensors):
        made = joint.forward([*tensors])
        ctx.joint = joint
        ctx.save_for_backward(*(origin.of(tensors, made) for origin in joint.links.saved))
        results = made[: len(joint.links.differentiable)]
        pairs = zip(results, joint.links.differentiable, strict=True)
        ctx.mark_non_differentiable(*(t for t, differentiable in pairs if not differentiable))
        return tuple(results)

    @staticmethod
    def backward(ctx, *grads):
        pairs = zip(grads, ctx.joint.links.differentiable, strict=True)
        grads = [g.contiguous() for g, differentiable in pairs if differentiable]
        return None, *ctx.joint.backward([*ctx.saved_tensors, *grads])


class Joint:
    """The loaded libraries of a part, for all modules of its kind."""

    def __init__(self, folder: Path):
        self.links: Links = pickle.loads((folder / LINKS).read_bytes())
        self.forward = ahead.open_library(folder)
        self.backward = None
        if any(self.links.differentiable):
            self.backward = ahead.open_library(folder, BACKWARD)


class JointCall:
    """A loaded part as a function of its arguments, on the tensors of one module."""

    def __init__(self, joint: Joint, part: ahead.Part):
        self.joint, self.links = joint, joint.links
        self._slots = [(holder, key) for _, holder, key in part.slots()]

    def __call__(self, *args):
        tensors = [holder[key] for holder, key in self._slots]
        tensors += [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if self.joint.backward is None:
            made = self.joint.forward(tensors)
        else:
            made = Call.apply(self.joint, *tensors)
        return tree_map(lambda origin: origin.of(tensors, made), self.links.result)


def has_hooks(model: Transformer) -> bool:
    """Whether calls of any module run hooks, which parts leave out."""
    return any(hook_dicts(model))


def embed(model: Transformer, *args):
    return model.embed_inputs(*args)


def embed_mtp(model: Transformer, *args):
    return model.mtp.embed_inputs(*args)


def training_parts(model: Transformer) -> dict[Callable, ahead.Part]:
    """The parts of a step by the function that `run_block` is given."""
    whole = ("layers.",)  # of the model's tensors, all but its layers'
    parts = {
        model.embed_inputs: ahead.Part("embed", model, embed, whole),
        combine_losses: ahead.Part("losses", model, combine_losses, whole),
    }
    if len(model.mtp):
        parts[model.mtp.embed_inputs] = ahead.Part("MTP embed", model, embed_mtp, whole)
    kinds = compile_layers((*model.layers, *model.mtp), itertools.count(1).__next__)
    for block, i in kinds.items():
        parts[block] = ahead.Part(f"layer kind {i}", block, call)
    return parts


def arguments(function: Callable, args: tuple) -> tuple:
    """Of a part, whose first one, the module, is known; tensors are contiguous, as compiled code
    takes them to be.
    """
    args = args[1:] if function is combine_losses else args
    return tree_map(lambda x: x.contiguous() if isinstance(x, torch.Tensor) else x, args)


@contextlib.contextmanager
def a_core_free() -> Iterator[None]:
    """Run on a thread less, if there are two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class AheadStep:
    """step(tokens, targets, doc_ids, lr) of compile_train_step: eager until its parts are there.

    ran_compiled   whether the last call ran compiled code
    """

    def __init__(
        self,
        # what trains
        model: Transformer,
        optimizer: Optimizer,
        cfg,
        # the loss and the step, as in compile_train_step
        weights: LossWeights,
        aux: Aux,
        micro_batch: int | None,
        all_reduce_sum: Callable | None,
        # None: the first call waits
        compiler: AheadCompiler | None,
    ):
        self.model, self.optimizer = model, optimizer
        self.cfg, self.micro_batch = cfg, micro_batch
        self.weights, self.aux = weights, aux
        self.compiler = compiler
        self.ran_compiled = False
        self.parts = training_parts(model)
        self.loaded: dict[Callable, Callable] = {}
        self.shapes: list = []
        self.run: AheadRun | None = None
        self.step = TrainStep(
            model, optimizer, self.loss, make_targets, micro_batch, all_reduce_sum
        )
        optimizer.compile(self._wrap_update)

    def __call__(self, *batch) -> dict[str, torch.Tensor]:
        run = self.prepare(*batch)
        compiles = self.compiler is not None and run.loaded is None and self.compiler.busy
        with a_core_free() if compiles else contextlib.nullcontext():
            metrics = run(*batch)
        self.ran_compiled = run.compiled
        return metrics

    def prepare(self, tokens, targets, doc_ids, lr=None) -> AheadRun:
        """Load what was compiled for such a batch, or ask for it."""
        if self.run is None:
            model, rows = self.model, self.micro_batch or len(tokens)
            trained = [name for name, p in model.named_parameters() if p.requires_grad]
            settings = Settings(self.weights, self.aux, tuple(trained), self.optimizer.settings())
            batch = [t if t is None else t[:rows] for t in (tokens, targets, doc_ids)]
            names = [*(part.name for part in self.parts.values()), UPDATE]
            job = Job.of(model, (self.cfg, "train", settings), batch, names, "train", skip=())
            self.shapes = job.call
            self.run = AheadRun(job, self._load, self.step, self.compiler)
        return self.run

    def _load(self, job: Job) -> Callable:
        """-> the step, whose parts are now the compiled ones."""
        folders = ahead.load(job.key, job.parts, job.libraries)
        joints = {name: Joint(folder) for name, folder in folders.items() if name != UPDATE}
        self.update_names = pickle.loads((folders[UPDATE] / LINKS).read_bytes())
        self.update = ahead.open_library(folders[UPDATE])
        self.loaded = {f: JointCall(joints[part.name], part) for f, part in self.parts.items()}
        return self.step

    def loss(self, model: Transformer, tokens, targets, doc_ids):
        """As training_loss."""
        shapes = ahead.shapes((tokens, targets.labels, doc_ids))
        fits = self.loaded and shapes == self.shapes and not has_hooks(model)
        run_block = self._run_block if fits else call
        return training_loss(model, tokens, targets, doc_ids, self.weights, self.aux, run_block)

    def _run_block(self, function: Callable, *args):
        return self.loaded[function](*arguments(function, args))

    def _wrap_update(self, eager: Callable, name: str) -> Callable:
        """The optimizer's update, compiled when it is there."""

        def update(grads, lr, load, corrections):
            if not self.loaded or list(grads) != self.update_names:
                return eager(grads, lr, load, corrections)
            loads = [] if load is None else [load]
            rest = (*grads.values(), *loads, lr.float(), *corrections)
            return self.update([*self.optimizer.tensors(), *rest])[0]

        return update
