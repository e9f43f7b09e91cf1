"""How a part is compiled ahead of time: traced with fake tensors, then made a library.

A part of a phase is traced by torch.export; one of a training step by AOTAutograd, which splits its
joint graph into a forward and a backward.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ops import cpp
from tools import ahead
from tools.ahead_training import BACKWARD, LINKS, Links, Origin
from training.optim import Optimizer


class Bound(nn.Module):
    """function(module, *args) as a module, whose tensors torch.func can exchange."""

    def __init__(self, part: ahead.Part):
        super().__init__()
        self.module, self.function = part.module, part.function

    def forward(self, *args):
        return self.function(self.module, *args)


class Flat(nn.Module):
    """A part as a function of tensors alone: those of its module, then those among its arguments.

    They are inputs, not attributes: nothing of the module is compiled in.
    """

    def __init__(self, part: ahead.Part, args: tuple):
        super().__init__()
        self.leaves, self.spec = tree_flatten(args)
        slots = part.slots()
        self.names = [f"module.{name}" for name, _, _ in slots]
        self.bound = (Bound(part),)  # in a tuple: no submodule
        self.inputs = [holder[key] for _, holder, key in slots]
        self.inputs += [x for x in self.leaves if isinstance(x, torch.Tensor)]

    def result(self, *tensors):
        """What the part returns for other tensors in the place of `inputs`."""
        state = dict(zip(self.names, tensors, strict=False))
        rest = iter(tensors[len(self.names) :])
        leaves = [next(rest) if isinstance(x, torch.Tensor) else x for x in self.leaves]
        args = tree_unflatten(leaves, self.spec)
        return torch.func.functional_call(self.bound[0], state, args)

    def forward(self, *tensors):
        return tuple(x for x in tree_leaves(self.result(*tensors)) if isinstance(x, torch.Tensor))


def exported(module: nn.Module, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The graph of a module without tensors of its own, which may write into its inputs."""
    program = torch.export.export(module, tuple(inputs), strict=False)
    assert not program.constants and not program.state_dict, "a tensor was compiled in"
    return program.module(check_guards=False)


def compile_graph(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], level: str, library: Path
) -> None:
    """Compile a graph to a library, and what it needs beside it.

    level   of the optimisation of the code between kernels: "O1", or "O0", which saves 4 s of 16
    """
    work = library.parent / "work"
    work.mkdir()
    options = {
        "aot_inductor.output_path": str(work / library.name),
        "aot_inductor.compile_wrapper_opt_level": level,
    }
    with torch.no_grad():
        made = torch._inductor.aot_compile(graph, tuple(inputs), options=options)
    os.rename(made, library)
    for nodes in work.glob("*.wrapper.json"):  # of calls of our ops, where there are
        os.rename(nodes, library.with_suffix(".json"))
    shutil.rmtree(work)


def compile_part(part: ahead.Part, args: tuple, level: str, folder: Path) -> None:
    """Compile a part of a phase for fake arguments into `folder`."""
    flat = Flat(part, args)
    with torch.no_grad():
        graph = exported(flat, flat.inputs)
    compile_graph(graph, flat.inputs, level, folder / ahead.CODE)


def compile_kernels(library: str, text: str, folder: Path) -> None:
    """Compile a library of ops' C++ kernels, whose source is `text`, into `folder`."""
    found = {}

    def compiled() -> None:
        try:
            found["path"] = cpp.compile_library(text)
        except Exception as error:
            found["error"] = error
            raise

    cpp.register_library(library, compiled)
    if "error" in found:
        raise found["error"]
    shutil.copyfile(found["path"], folder / ahead.CODE)


# --------------------------------------------------------------------------------------------------
# Training


def compile_joint(part: ahead.Part, args: tuple, folder: Path) -> None:
    """Compile the forward and the backward of a part of a training step into `folder`.

    The backward is left out where nothing has a gradient.
    """
    # All of Inductor, which only this process needs. torch/_export/utils.py line 1442,
    # torch/_functorch/aot_autograd.py line 1756, torch/_inductor/compile_fx.py line 2273
    from torch._export.utils import _compiling_state_context
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table

    flat = Flat(part, args)
    fake = flat.inputs[0].fake_mode
    differentiable: list[bool] = []  # of the leaves that are made

    def origin(leaf) -> Origin:
        if not isinstance(leaf, torch.Tensor):
            return Origin("constant", leaf)
        for i, x in enumerate(flat.inputs):
            if x is leaf:
                return Origin("input", i)
        differentiable.append(leaf.requires_grad)
        return Origin("made", len(differentiable) - 1)

    with fake:
        result = tree_map(origin, flat.result(*flat.inputs))
    origins = tree_leaves(result)

    def made(*tensors) -> tuple:
        """The leaves that are no inputs, and none a view: AOTAutograd's condition."""
        pairs = zip(tree_leaves(flat.result(*tensors)), origins, strict=True)
        leaves = [leaf for leaf, origin in pairs if origin.kind == "made"]
        dense = torch.contiguous_format
        return tuple(
            x.contiguous() if x.requires_grad else x.clone(memory_format=dense) for x in leaves
        )

    options = dict(trace_joint=any(differentiable), decompositions=select_decomp_table())
    with fake, _compiling_state_context():  # ops take the forms of compiled code
        joint = aot_export_joint_simple(made, tuple(flat.inputs), **options)
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    values = [node.meta["val"] for node in placeholders]
    forward, backward = joint, None
    saved = []
    if any(differentiable):
        with torch._guards.tracing(torch._guards.TracingContext(fake)):
            forward, backward = partition_fn(joint, values, num_fwd_outputs=len(differentiable))
        names = [node.name for node in placeholders]
        saved = split_saved(forward, backward, names, len(differentiable))
        inputs = [node.meta["val"] for node in backward.graph.nodes if node.op == "placeholder"]
        compile_graph(backward, inputs, "O0", folder / BACKWARD)
    compile_graph(forward, flat.inputs, "O0", folder / ahead.CODE)
    links = Links(result, differentiable, saved)
    (folder / LINKS).write_bytes(pickle.dumps(links))


def split_saved(
    forward: fx.GraphModule, backward: fx.GraphModule, names: list[str], count: int
) -> list[Origin]:
    """Have the forward return no input -> origins of the backward's first inputs.

    names   of the joint graph's inputs
    count   of results, which stand first among the forward's
    """
    (output,) = forward.graph.find_nodes(op="output")
    results, others = output.args[0][:count], output.args[0][count:]
    made = [*results, *dict.fromkeys(node for node in others if node.op != "placeholder")]
    output.args = (tuple(made),)
    forward.recompile()
    index = {node.name: i for i, node in enumerate(made)}
    saved = []
    for node in backward.graph.find_nodes(op="placeholder"):
        if node.name in index:
            saved.append(Origin("made", index[node.name]))
        elif not node.name.startswith("tangents"):
            saved.append(Origin("input", names.index(node.name)))
    return saved


class Update(nn.Module):
    """An optimizer's step as a function of tensors alone: see `Optimizer.update_on`."""

    def __init__(self, optimizer: Optimizer, names: list[str], routers: bool):
        super().__init__()
        self.optimizer, self.names, self.routers = optimizer, names, routers

    def forward(self, *tensors):
        return (self.optimizer.update_on(tensors, self.names, self.routers),)


def compile_update(
    optimizer: Optimizer, grads: dict[str, torch.Tensor], load: torch.Tensor | None, folder: Path
) -> None:
    """Compile the update of a training step into `folder`."""
    rest = [torch.empty(()) for _ in ("lr", "first correction", "second correction")]
    loads = [] if load is None else [load]
    inputs = [t.detach() for t in (*optimizer.tensors(), *grads.values(), *loads, *rest)]
    with torch.no_grad():
        graph = exported(Update(optimizer, list(grads), load is not None), inputs)
    compile_graph(graph, inputs, "O0", folder / ahead.CODE)
    (folder / LINKS).write_bytes(pickle.dumps(list(grads)))
