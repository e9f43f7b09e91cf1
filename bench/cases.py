"""The calls of our ops that the graphs of Flash and Pro make: production shapes, fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton  # noqa: F401, before ops: kernels are defined by it without a GPU, too
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import ops
from model import Transformer
from ops.launch import Launch, override_config, record
from ops.registry import LAUNCHERS
from tools import capture
from tools.launches import pack
from tools.report import NAMED

MILLION = 1 << 20
# other token counts than those of a phase whose kernels have tiles of their own
TOKENS = {"moe": (64, 512, 1024), "quant_linear": (16, 128)}
# a tile of moe_up whose sums other programs finish, split or not
PARTIAL = dict(BM=16, BN=64, BK=128, num_warps=4, num_stages=3, SWAP=1)


class Phase(NamedTuple):
    """A phase of a model, and how its weights are stored.

    weights: "bf16", "fp32", or "fp8" or "fp4" experts with fp8 linears
    """

    model: str
    phase: str
    shape: capture.Shape
    weights: str = "bf16"

    def __str__(self) -> str:
        return f"{self.model} {self.phase} {self.weights} {self.shape.batch}x{self.shape.length}"


def phases(model: str) -> list[Phase]:
    prefill, decode = capture.Shape(1, 8192, 8192), capture.Shape(1, 1, MILLION)
    return [
        Phase(model, "prefill", prefill),
        Phase(model, "train", prefill),
        Phase(model, "decode", decode),
        Phase(model, "decode", capture.Shape(8, 1, 4096)),
        Phase(model, "prefill", prefill, "fp4"),
        Phase(model, "decode", decode, "fp4"),
        Phase(model, "prefill", prefill, "fp8"),
        Phase(model, "decode", decode, "fp8"),
        Phase(model, "verify", capture.Shape(1, 1 + capture.DRAFTED, MILLION)),
        Phase(model, "decode", decode, "fp32"),
    ]


PHASES = [
    *phases("flash"),
    *phases("pro"),
    Phase("flash", "train", capture.Shape(1, 4096, 4096), "fp32"),
    Phase("flash", "prefill", capture.Shape(1, 8192, 8192), "fp32"),
]


def shape_key(x):
    """Shape, strides and dtype of a tensor, on which a launch can depend; other arguments as is."""
    return (tuple(x.shape), x.stride(), str(x.dtype)) if isinstance(x, torch.Tensor) else x


class Call(NamedTuple):
    """One op with its arguments; tensors are fake and belong to one mode."""

    op: str
    args: tuple
    tiles: dict[str, dict] = {}  # of kernels that are not to take those of the table

    @property
    def key(self) -> str:
        """Equal for calls that launch the same."""
        leaves, spec = tree_flatten(self.args)
        return f"{self.op} {[shape_key(x) for x in leaves]} {spec} {self.tiles}"

    @property
    def mode(self) -> FakeTensorMode:
        """Dynamo's, which all its tensors belong to."""
        return next(x.fake_mode for x in tree_leaves(self.args) if isinstance(x, torch.Tensor))

    def launches(self, arch: str) -> list[Launch]:
        """The kernels that the op launches on an architecture."""
        with self.mode, torch.no_grad(), override_config(self.tiles), record(arch) as launched:
            LAUNCHERS[self.op](*self.args)
        return launched


def with_tokens(call: Call, n: int) -> Call:
    """A call of moe or quant_linear for n tokens."""
    per_token = {0, 3, 4} if call.op == "moe" else {0}  # arguments with a row per token
    grouped = call.op == "quant_linear" and call.args[3] > 1
    dims = 2 if grouped else 1  # of a row
    args = [
        x.new_empty(n, *x.shape[-dims:]) if i in per_token else x for i, x in enumerate(call.args)
    ]
    return Call(call.op, tuple(args))


def others(call: Call, phase: Phase) -> Iterator[Call]:
    """Calls that the graphs do not make, but users may, and kernels that are parts of others.

    Fewer tokens, gradients through packed experts, rope in place, Sinkhorn by itself.
    """
    long = phase.phase == "prefill"
    if long:
        for n in TOKENS.get(call.op, ()):
            yield with_tokens(call, n)
    if call.op == "moe" and call.args[5] is not None:  # packed
        if long:
            x = call.args[0]
            yield Call("moe_backward", (x.new_empty(x.shape, dtype=torch.float32), *call.args))
        else:
            for split in (1, 2):
                yield Call("moe", call.args, {"moe_up": {**PARTIAL, "SPLIT": split}})
    if call.op == "rope" and long and call.args[0].dim() == 4:
        yield Call("rope_", call.args)
    if call.op == "hc_pre" and long:
        x, (eps, iters) = call.args[0], call.args[-2:]
        B, T, n, _ = x.shape
        comb = x.new_empty(B, T, n, n, dtype=torch.float32)
        yield Call("sinkhorn", (comb, eps, iters))
        yield Call("sinkhorn_backward", (comb, comb, eps, iters))


def captured_of(phase: Phase) -> capture.Captured:
    """The graph of one layer of each kind, every op opaque, on fake tensors."""
    args, before = capture.one_of_each(NAMED[phase.model]()), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if phase.weights == "fp32" else torch.bfloat16)
    try:
        with FakeTensorMode():
            model = Transformer(args, ops={name: "opaque" for name in capture.MODEL_OPS})
            if phase.weights in ("fp8", "fp4"):
                pack(model, phase.weights)
            if phase.phase != "train":
                model.setup_caches(phase.shape.batch, phase.shape.context)
            function, inputs = capture.call_of(model, phase.phase, phase.shape)
            return capture.capture(function, *inputs, grad=phase.phase == "train")
    finally:
        torch.set_default_dtype(before)


def calls(phase: Phase) -> list[Call]:
    """The different calls of ops with kernels in one phase."""

    def is_node(x) -> bool:
        return isinstance(x, torch.fx.Node)

    def value(x):
        return x.meta["val"] if is_node(x) else x

    found, prefix = [], f"{ops.NAMESPACE}."
    for node in captured_of(phase).calls():
        name = capture.name_of(node.target)
        if name.startswith(prefix):
            args = tree_map(value, node.args, is_leaf=is_node)
            found.append(Call(name.removeprefix(prefix), tuple(args)))
    with found[0].mode:
        found += [extra for call in found for extra in others(call, phase)]
    return list({call.key: call for call in found}.values())
