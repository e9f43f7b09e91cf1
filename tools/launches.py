"""Launches of a layer on an H200 that is not there, and the bytes that they move.

A layer is captured on fake tensors and lowered for CUDA (fake_cuda.py). What Inductor made of it is
read from its scheduler: its own kernels, calls of libraries and of aten. Our ops are expanded to
what they launch (ops/launch.py).

Bytes are those of DRAM at best: each launch reads and writes each tensor once, or the part of it
that it indexes. Of experts and of entries in a cache only chosen ones count.

`python -m tools.launches` is a process of the report, with ModelArgs, phase and shape as JSON on
standard input: see `figures`.
"""

from __future__ import annotations

import json
import re
import sys
from typing import NamedTuple

import torch
import triton  # noqa: F401, before ops: kernels are defined by it without a GPU, too
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import ops
from model import Aux, Block, Linear, ModelArgs, Transformer
from ops.launch import record
from ops.registry import LAUNCHERS
from tools.capture import MODEL_OPS, REST, Shape, call_of, is_ours, kind_of, name_of, one_of_each
from tools.fake_cuda import Traced, lower, on_cuda, trace

WEIGHTS = ("bf16", "fp4")  # fp4: experts, frozen; linears are FP8
ARCH = "sm_90"
# aten operators that only describe or allocate memory
FREE = re.compile(
    r"aten\.(empty|empty_like|new_empty|empty_strided|new_empty_strided|view|_unsafe_view|expand|"
    r"slice|select|unsqueeze|squeeze|permute|transpose|t|as_strided|detach|alias|split|"
    r"split_with_sizes|unbind|reshape|_reshape_alias|unfold|lift_fresh)\."
)


class Row(NamedTuple):
    """A call in lowered code.

    name      of the op, or of what Inductor fused
    sort      "triton" (Inductor's), "extern" (a library's), "aten" or "ours"
    launches  that it makes
    read, written   bytes
    copies    shapes of the weights that it writes again
    """

    name: str
    sort: str
    launches: int
    read: int
    written: int
    copies: tuple[tuple[int, ...], ...] = ()


class Lowered(NamedTuple):
    """A layer, lowered.

    rows    its calls, those of our ops last
    needed  bytes that any implementation moves: weights, cache rows and streams, once each
    """

    rows: list[Row]
    needed: int

    @property
    def launches(self) -> int:
        return sum(row.launches for row in self.rows)

    @property
    def moved(self) -> int:
        """Bytes that the rows read and write."""
        return sum(row.read + row.written for row in self.rows)


# --------------------------------------------------------------------------------------------------
# Models without storage


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def blocks(rows: int, columns: int) -> tuple[int, int]:
    """Blocks of 128 x 128 of a matrix, each of which has a scale."""
    return -(-rows // 128), -(-columns // 128)


def pack(model: Transformer, experts: str) -> None:
    """Weights as a checkpoint stores them and `load(weights="native")` keeps them, without values.

    experts: "fp8" or "fp4"
    """
    for module in model.modules():
        if isinstance(module, Linear) and module.fp8:
            shape = module.weight.shape
            module.weight = frozen(*shape, dtype=torch.float8_e4m3fn)
            module.scale = frozen(*blocks(*shape), dtype=torch.uint8)
        if hasattr(module, "w13"):
            for name in ("w13", "w2"):
                E, rows, columns = getattr(module, name).shape
                if experts == "fp4":
                    weight = frozen(E, rows, columns // 2, dtype=torch.int8)
                    scale = frozen(E, rows, columns // 32, dtype=torch.uint8)
                else:
                    weight = frozen(E, rows, columns, dtype=torch.float8_e4m3fn)
                    scale = frozen(E, *blocks(rows, columns), dtype=torch.uint8)
                setattr(module, name, weight)
                setattr(module, f"{name}_scale", scale)
    model.args.act_quant = True


def build(args: ModelArgs, weights: str, modes: dict[str, str]) -> Transformer:
    """A model of fake tensors, in the mode that is active; modes of ops, of others "opaque"."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Transformer(args, ops=dict.fromkeys(MODEL_OPS, "opaque") | modes).eval()
        if weights != "bf16":
            pack(model, weights)
        return model
    finally:
        torch.set_default_dtype(before)


# --------------------------------------------------------------------------------------------------
# Layers


def lower_layers(
    args: ModelArgs,
    phase: str,
    shape: Shape,
    weights: str = "bf16",
    modes: dict[str, str] | None = None,
) -> dict[str, Lowered]:
    """A layer of each kind, by its name, and the head (REST); in training layers alone, forward and
    backward. modes: of ops, as in build
    """
    args, training = one_of_each(args), phase == "train"
    with FakeTensorMode(), torch.set_grad_enabled(training):
        model = build(args, weights, modes or {}).train(training)
        if not training:
            model.setup_caches(shape.batch, shape.context)
        _, (tokens, *positions) = call_of(model, phase, shape)
        if training:
            positions = None, None, positions[-1], Aux()
        tokens, plan, X = model.embed_inputs(tokens, *positions)
        traced = {
            kind_of(args, i): (block, trace_block(block, X, tokens, plan, training))
            for i, block in enumerate(model.layers)
        }
        if not training:
            logits = "last" if phase == "prefill" else "all"
            head = trace(lambda X, plan: model.lm_logits(X, plan, logits), X, plan)
            traced[REST] = model, head
    return {
        kind: Lowered(
            [row for graph in graphs for row in rows_of(*graph, module, shape)],
            needed(module, shape, phase),
        )
        for kind, (module, graphs) in traced.items()
    }


def trace_block(block: Block, X, tokens, plan, training: bool) -> list[Traced]:
    def run(X, tokens, plan):
        return block(X, tokens, plan)[0]

    return trace(run, X.detach().requires_grad_(training), tokens, plan, grad=training)


def rows_of(
    graph: torch.fx.GraphModule, inputs: list, module: nn.Module, shape: Shape
) -> list[Row]:
    """What Inductor launches for a graph of `trace`."""
    traced = on_cuda(graph, inputs)
    tokens = shape.length if module.training else 0  # saved activations may have a weight's shape
    weights = {tuple(p.shape) for p in module.parameters() if p.dim() > 1 and len(p) != tokens}
    rows: list[Row] = []
    lower(*traced, lambda lowering: rows.extend(scheduled(lowering, weights)))
    calls = [node for node in traced.graph.graph.nodes if is_ours(name_of(node.target))]
    return rows + [row_of_ours(node) for node in calls]


def scheduled(lowering, weights: set[tuple[int, ...]]) -> list[Row]:
    """The nodes of Inductor's scheduler that launch something, but for our ops."""
    from torch._inductor import ir, scheduler

    rows = []
    for node in lowering.scheduler.nodes:
        sizes = node.get_read_buffer_sizes(), node.get_write_buffer_sizes()
        if isinstance(node, scheduler.NopKernelSchedulerNode):
            continue
        if not isinstance(node, scheduler.ExternKernelSchedulerNode):
            rows.append(Row(node.get_name(), "triton", 1, *sizes, copied(node, lowering, weights)))
        elif isinstance(node.node, ir.FallbackKernel):
            name = name_of(node.node.op_overload)
            if not is_ours(name) and not FREE.match(name):
                rows.append(Row(name, "aten", 1, *sizes))
        elif not isinstance(node.node, ir.MultiOutput):
            name = getattr(node.node, "python_kernel_name", None) or type(node.node).__name__
            rows.append(Row(name, "extern", 1, *sizes))
    return rows


def copied(node, lowering, weights: set[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The weights that a kernel of Inductor's writes again, in another dtype or order."""
    read = []
    for name in (dep.name for dep in node.read_writes.reads):
        buffer = lowering.graph_inputs.get(name)
        if buffer is not None:
            read.append(tuple(int(n) for n in buffer.get_size()))
    written = [
        int(lowering.get_buffer(dep.name).get_numel())
        for dep in node.read_writes.writes
        if dep.name in lowering.name_to_buffer
    ]
    return tuple(s for s in read if s in weights and torch.Size(s).numel() in written)


# --------------------------------------------------------------------------------------------------
# Our ops


class Launching(TorchDispatchMode):
    """Counts the operators of aten that launch something."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        makes = any(isinstance(x, torch.Tensor) for x in tree_leaves(out))
        self.count += makes and not FREE.match(name_of(op))
        return out


def row_of_ours(node: torch.fx.Node) -> Row:
    """A call of one of our ops: what it launches, and the bytes of that."""

    def value(x):
        """The same on CPU: without a GPU's driver, fake CUDA tensors cannot be indexed."""
        x = x.meta["val"] if isinstance(x, torch.fx.Node) else x
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

    name = name_of(node.target).removeprefix(f"{ops.NAMESPACE}.")
    with FakeTensorMode(), torch.no_grad(), record(ARCH) as launched, Launching() as others:
        args = tree_map(value, node.args, is_leaf=lambda x: isinstance(x, torch.fx.Node))
        given = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(LAUNCHERS[name](*args)) if isinstance(x, torch.Tensor)]
    outside = {id(x.untyped_storage()) for x in (*given, *made)}
    inside = {
        id(x.untyped_storage()): x.untyped_storage().nbytes()
        for launch in launched
        for x in launch.args
        if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in outside
    }
    read = sum(x.nbytes for x in given) - unread(name, args)
    written = sum(x.nbytes for x in made)
    between = sum(inside.values())  # written by one launch, read by another
    return Row(name, "ours", len(launched) + others.count, read + between, written + between)


def unread(op: str, args: tuple) -> int:
    """Bytes of an op's tensors that a call does not read: experts and entries not chosen."""
    if op == "moe":
        _, w13, w2, idx, _, s13, s2, *_ = args
        packed = sum(x.nbytes for x in (w13, w2, s13, s2) if x is not None)
        return round(packed * (1 - chosen_share(len(w13), idx.numel())))
    if op == "sparse_attn":
        entries, idx = args[6], args[9]
        if idx is not None:
            rows = min(idx.numel(), entries.shape[0] * entries.shape[1])
            return entries.nbytes - rows * entries.shape[2] * entries.element_size()
    return 0


def chosen_share(n_experts: int, pairs: int) -> float:
    """The most experts that pairs of token and expert can choose, as a share of all."""
    return min(1.0, pairs / n_experts)


# --------------------------------------------------------------------------------------------------
# Bytes that cannot be saved


def needed(module: Block | Transformer, shape: Shape, phase: str) -> int:
    """Bytes that a call on a layer, or on the head, cannot but move: weights, rows of caches,
    streams.

    Training, where there are no caches: weights read twice and gradients written, streams and their
    gradients in and out.
    """
    args, tokens = module.args, shape.batch * shape.length
    if isinstance(module, Transformer):
        tokens = shape.batch if phase == "prefill" else tokens
        weights = [module.norm.weight, module.head.weight, *hc_weights(module)]
        return sum(p.nbytes for p in weights) + tokens * (
            args.hc_mult * args.dim * module.embed.weight.element_size() + 4 * args.vocab_size
        )
    share = chosen_share(args.n_routed_experts, tokens * args.n_activated_experts)
    weights = 0.0
    for name, p in module.named_parameters():
        weights += p.nbytes * (share if ".experts." in name else 1)
    if module.ffn.gate.tid2eid is not None:
        weights += tokens * args.n_activated_experts * 8
    streams = 2 * tokens * args.hc_mult * args.dim * module.ffn.gate.weight.element_size()
    if module.training:
        return round(3 * weights + 2 * streams)
    return round(weights + streams + cached_bytes(module, shape))


def hc_weights(model: Transformer) -> tuple[nn.Parameter, ...]:
    return model.hc_head_fn, model.hc_head_base, model.hc_head_scale


def cached_bytes(block: Block, shape: Shape) -> int:
    """Bytes of the rows that a call reads from a layer's caches and writes to them."""
    args, attn = block.args, block.attn
    rings, total = [attn.ring], 0
    if attn.compressor is not None:
        rings.append(attn.compressor.ring)
        chosen = entries = shape.context // attn.ratio
        if attn.indexer is not None and attn.compressor.entries.shape[1] - 1 > args.index_topk:
            chosen = min(entries, shape.length * args.index_topk)
            rings.append(attn.indexer.compressor.ring)
            total += entries * row_bytes(attn.indexer.compressor.entries)
        total += chosen * row_bytes(attn.compressor.entries)
    total += sum((ring.lookback + shape.length) * row_bytes(ring.rows) for ring in rings)
    return shape.batch * total


def row_bytes(cache: torch.Tensor) -> int:
    """Bytes of one row of a cache [B, rows, C]."""
    return cache.shape[2] * cache.element_size()


# --------------------------------------------------------------------------------------------------
# For people and for the report


def describe(lowered: dict[str, Lowered]) -> str:
    """The calls of each kind of layer: launches, bytes read and written."""
    lines = []
    for kind, layer in lowered.items():
        share = layer.moved / layer.needed
        lines.append(f"{kind}: {layer.launches} launches, {share:.2f} of the bytes needed")
        for row in layer.rows:
            copies = "".join(f"  copies a weight {list(shape)}" for shape in row.copies)
            size = f"{row.read:13,} {row.written:13,}"
            lines.append(f"  {row.launches} {row.sort:7} {size}  {row.name}{copies}")
    return "\n".join(lines)


def figures(args: ModelArgs, phase: str, shape: Shape) -> dict[str, dict]:
    """{"launches", "moved_bytes", "needed_bytes", "copied_weights": {kind of layer: {weights: n}}},
    weights being "bf16", and "fp4" but for training.
    """
    found: dict[str, dict] = {}
    for weights in WEIGHTS[:1] if phase == "train" else WEIGHTS:
        for kind, layer in lower_layers(args, phase, shape, weights).items():
            numbers = {
                "launches": layer.launches,
                "moved_bytes": layer.moved,
                "needed_bytes": layer.needed,
                "copied_weights": sum(len(row.copies) for row in layer.rows),
            }
            for name, number in numbers.items():
                found.setdefault(name, {}).setdefault(kind, {})[weights] = number
    return found


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    shape = Shape(**wanted["shape"])
    print(json.dumps(figures(ModelArgs(**wanted["args"]), wanted["phase"], shape)))
