"""The calls of our ops that the graphs of Flash and Pro make, with their production shapes, as fake tensors."""

from __future__ import annotations

from typing import Iterator, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import ops
from model import Linear, Transformer
from ops.launch import Launch, override_config, record
from ops.registry import LAUNCHERS
from tools import report


class Phase(NamedTuple):
    """A phase of a model, and how its weights are stored: "bf16", "fp32", or "fp8" or "fp4" experts with fp8 linears."""

    model: str
    phase: str
    shape: report.Shape
    weights: str = "bf16"

    def __str__(self) -> str:
        return f"{self.model} {self.phase} {self.weights} {self.shape.batch}x{self.shape.length}"


MILLION = 1 << 20
PHASES = [
    phase
    for model in ("flash", "pro")
    for phase in (
        Phase(model, "prefill", report.Shape(1, 8192, 8192)),
        Phase(model, "train", report.Shape(1, 8192, 8192)),
        Phase(model, "decode", report.Shape(1, 1, MILLION)),
        Phase(model, "decode", report.Shape(8, 1, 4096)),
        Phase(model, "prefill", report.Shape(1, 8192, 8192), "fp4"),
        Phase(model, "decode", report.Shape(1, 1, MILLION), "fp4"),
        Phase(model, "prefill", report.Shape(1, 8192, 8192), "fp8"),
        Phase(model, "decode", report.Shape(1, 1, MILLION), "fp8"),
        Phase(model, "verify", report.Shape(1, 1 + report.DRAFTED, MILLION)),
        Phase(model, "decode", report.Shape(1, 1, MILLION), "fp32"),
    )
]
PHASES += [
    Phase("flash", "train", report.Shape(1, 4096, 4096), "fp32"),
    Phase("flash", "prefill", report.Shape(1, 8192, 8192), "fp32"),
]
TOKENS = {
    "moe": (64, 512, 1024),
    "quant_linear": (16, 128),
}  # other lengths than those of a phase that want tiles of their own
PARTED = dict(
    BM=16, BN=64, BK=128, num_warps=4, num_stages=3, SWAP=1
)  # a tile of moe_up that others must finish, split or not


class Call(NamedTuple):
    """One op with its arguments; tensors are fake and belong to one mode. tiles: of kernels that are not to take the table's."""

    op: str
    args: tuple
    tiles: dict[str, dict] = {}

    @property
    def key(self) -> str:
        """Equal for calls that launch the same."""
        leaves, spec = tree_flatten(self.args)
        return f"{self.op} {[(tuple(x.shape), x.stride(), str(x.dtype)) if isinstance(x, torch.Tensor) else x for x in leaves]} {spec} {self.tiles}"

    @property
    def mode(self) -> FakeTensorMode:
        """Dynamo's, which all its tensors belong to."""
        return next(x.fake_mode for x in tree_leaves(self.args) if isinstance(x, torch.Tensor))

    def launches(self, arch: str) -> list[Launch]:
        """What the op launches on an architecture."""
        with self.mode, torch.no_grad(), override_config(self.tiles), record(arch) as launched:
            LAUNCHERS[self.op](*self.args)
        return launched


def pack(model: Transformer, experts: str) -> None:
    """Weights as a released checkpoint stores them and `load(weights="native")` keeps them; without values."""
    frozen = lambda *shape, dtype: nn.Parameter(
        torch.empty(shape, dtype=dtype), requires_grad=False
    )
    blocks = lambda o, i: (-(-o // 128), -(-i // 128))
    for module in model.modules():
        if isinstance(module, Linear) and module.fp8:
            o, i = module.weight.shape
            module.weight = frozen(o, i, dtype=torch.float8_e4m3fn)
            module.scale = frozen(*blocks(o, i), dtype=torch.uint8)
        if hasattr(module, "w13"):
            for name in ("w13", "w2"):
                E, o, i = getattr(module, name).shape
                scale = (E, o, i // 32) if experts == "fp4" else (E, *blocks(o, i))
                weight = (
                    frozen(E, o, i // 2, dtype=torch.int8)
                    if experts == "fp4"
                    else frozen(E, o, i, dtype=torch.float8_e4m3fn)
                )
                setattr(module, name, weight)
                setattr(module, f"{name}_scale", frozen(*scale, dtype=torch.uint8))
    model.args.act_quant = True


def others(call: Call, phase: Phase) -> Iterator[Call]:
    """Calls that the graphs do not make, but users may: fewer tokens, gradients through packed experts, and what is
    a part of other kernels, finishes their work, or is in place."""
    long = phase.phase == "prefill"
    for n in TOKENS.get(call.op, ()) if long else ():
        per_token = (
            {0, 3, 4} if call.op == "moe" else {0}
        )  # which arguments have rows of tokens, and how many dims those have
        dims = 2 if call.op == "quant_linear" and call.args[3] > 1 else 1
        yield Call(
            call.op,
            tuple(
                x.new_empty(n, *x.shape[-dims:]) if i in per_token else x
                for i, x in enumerate(call.args)
            ),
        )
    if call.op == "moe" and call.args[5] is not None:  # packed
        if long:
            yield Call(
                "moe_backward",
                (call.args[0].new_empty(call.args[0].shape, dtype=torch.float32), *call.args),
            )
        else:
            yield from (
                Call("moe", call.args, {"moe_up": {**PARTED, "SPLIT": split}}) for split in (1, 2)
            )
    if call.op == "rope" and long and call.args[0].dim() == 4:
        yield Call("rope_", call.args)
    if call.op == "hc_pre" and long:
        comb = call.args[0].new_empty(
            *call.args[0].shape[:3], call.args[0].shape[2], dtype=torch.float32
        )
        yield Call("sinkhorn", (comb, *call.args[-2:]))
        yield Call("sinkhorn_backward", (comb, comb, *call.args[-2:]))


def calls(phase: Phase) -> list[Call]:
    """The different calls of ops with kernels in one phase, one layer of each kind, every op opaque."""
    args, before = report.one_of_each(report.NAMED[phase.model]()), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if phase.weights == "fp32" else torch.bfloat16)
    try:
        with FakeTensorMode():
            model = Transformer(args, ops={name: "opaque" for name in report.MODEL_OPS})
            if phase.weights in ("fp8", "fp4"):
                pack(model, phase.weights)
            if phase.phase != "train":
                model.setup_caches(phase.shape.batch, phase.shape.context)
            function, inputs = report.call_of(model, phase.phase, phase.shape)
            captured = report.capture(function, *inputs, grad=phase.phase == "train")
    finally:
        torch.set_default_dtype(before)
    value = lambda x: x.meta["val"] if isinstance(x, torch.fx.Node) else x
    found = []
    for node in captured.calls():
        name = report.name_of(node.target)
        if name.startswith(f"{ops.NAMESPACE}."):
            found.append(
                Call(
                    name.removeprefix(f"{ops.NAMESPACE}."),
                    tuple(
                        tree_map(value, node.args, is_leaf=lambda x: isinstance(x, torch.fx.Node))
                    ),
                )
            )
    with found[0].mode:
        found += [extra for call in found for extra in others(call, phase)]
    return list({call.key: call for call in found}.values())
