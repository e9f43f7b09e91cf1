"""A phase as the compiler sees it: graphs of fake tensors, and the figures that are read from them.

Each phase is captured whole, as one Dynamo graph in which every op of ours is a node, as on a GPU.
On fake tensors, Flash and Pro need no weights and no memory.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import ops
from config import CSA_RATIOS
from model import ModelArgs, Transformer
from tools.torch_private import compile_isolated
from training.losses import training_loss
from training.recompute import checkpoint_blocks

PHASES = ("prefill", "decode", "verify", "train")
ops.register_flops()
MODEL_OPS = tuple(ops.OPS)
PRODUCTION_DIM = 4096  # models as wide as Flash are captured at production sizes, in bf16, not run
REST = "rest"  # the "kind of layer" of what stands before and after the layers
DRAFTED = 3  # tokens that verify checks beside the one it is sure of

# Operators that make a host wait for a GPU. fullgraph=True captures these silently.
SYNCS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "_assert_scalar",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave.Tensor",
    "is_nonzero",
    "equal",
    "sym_size",
    "sym_numel",
    "_linalg_check_errors",
)
BRANCHES = ("cond", "while_loop")  # these wait too, to learn where to go on


# --------------------------------------------------------------------------------------------------
# Phases


class Shape(NamedTuple):
    """The static shape of a phase: rows, new tokens per row, and the context of the caches."""

    batch: int
    length: int
    context: int


def shape_of(args: ModelArgs, phase: str) -> Shape:
    """The shape that the report uses: production sizes for models of production size."""
    production = args.dim >= PRODUCTION_DIM
    many = 8192 if production else 256
    lengths = {"prefill": many, "decode": 1, "verify": 1 + DRAFTED, "train": many}
    length = lengths[phase]
    no_more_context = phase == "train" or (production and phase == "prefill")
    return Shape(1, length, length if no_more_context else args.max_seq_len)


def call_of(
    model: Transformer, phase: str, shape: Shape, recompute: str = "none"
) -> tuple[Callable, tuple]:
    """A function of tensors that runs the phase, and arguments for it."""
    tokens = torch.zeros(shape.batch, shape.length, dtype=torch.int64)
    if phase == "train":
        run_block = checkpoint_blocks(recompute)

        def loss(tokens, labels, doc_ids):
            return training_loss(model, tokens, labels, doc_ids, run_block=run_block)[0]

        return loss, (tokens, tokens + 1, tokens * 0)

    input_pos = torch.zeros(shape.batch, dtype=torch.int64)
    lengths = torch.full((shape.batch,), shape.length)
    logits = "last" if phase == "prefill" else "all"

    def forward(tokens, input_pos, lengths):
        return model(tokens, input_pos, lengths, logits=logits)

    return forward, (tokens, input_pos, lengths)


# --------------------------------------------------------------------------------------------------
# Captured graphs


class Captured(NamedTuple):
    """The graphs of one function: one of inference, or forward and backward of training.

    count   graphs that Dynamo made
    """

    graphs: list[torch.fx.GraphModule]
    count: int
    breaks: int

    def nodes(self) -> Iterator[torch.fx.Node]:
        """All nodes, those of nested regions and of branches included."""
        return (
            node
            for graph in self.graphs
            for part in graph.modules()
            if isinstance(part, torch.fx.GraphModule)
            for node in part.graph.nodes
        )

    def calls(self) -> Iterator[torch.fx.Node]:
        """Operators: calls of this project's and of aten's."""
        return (node for node in self.nodes() if isinstance(node.target, torch._ops.OpOverload))


def capture(function: Callable, *args, grad: bool = False) -> Captured:
    """`function(*args)` as AOT graphs, which also run; with grad, its result is differentiated."""
    graphs, captures = [], []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    aot = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        keep_inference_input_mutations=True,
        partition_fn=min_cut_rematerialization_partition,
    )

    def backend(graph, inputs):
        captures.append(graph)
        return aot(graph, inputs)

    torch._dynamo.reset()
    before = sum(counters["graph_break"].values())
    compiled = compile_isolated(
        function, "captured", backend=backend, fullgraph=True, dynamic=False
    )
    with torch.set_grad_enabled(grad):
        result = compiled(*args)
        if grad:
            result.backward()
    return Captured(graphs, len(captures), sum(counters["graph_break"].values()) - before)


def capture_fake(
    args: ModelArgs,
    phase: str,
    shape: Shape | None = None,
    modes: dict[str, str] | None = None,
    dtype: torch.dtype | None = None,
    recompute: str = "none",
) -> tuple[Captured, Transformer]:
    """A phase of a model without storage, and the model.

    modes       of the ops, as in Transformer; None: all opaque
    dtype       None: bf16 at production size, else fp32
    recompute   as in compile_train_step
    """
    shape = shape or shape_of(args, phase)
    modes = {name: "opaque" for name in MODEL_OPS} if modes is None else modes
    production = args.dim >= PRODUCTION_DIM
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.bfloat16 if production else torch.float32))
    try:
        with FakeTensorMode():
            model = Transformer(args, ops=modes)
            if phase != "train":
                model.setup_caches(shape.batch, shape.context)
            function, inputs = call_of(model, phase, shape, recompute)
            return capture(function, *inputs, grad=phase == "train"), model
    finally:
        torch.set_default_dtype(before)


def name_of(target) -> str:
    """ "dsv4.moe" or "aten.mm.default": ours are known by name, aten's by overload."""
    name = str(target)
    return name.removesuffix(".default") if is_ours(name) else name


def is_ours(name: str) -> bool:
    return name.startswith(f"{ops.NAMESPACE}.")


# --------------------------------------------------------------------------------------------------
# Kinds of layers


def kind_of(args: ModelArgs, layer: int) -> str:
    """ "CSA, score" and the like; layers of one kind are one graph."""
    if layer >= args.n_layers:
        return "MTP"
    ratio = args.compress_ratios[layer]
    released = {0: "sliding", 4: "CSA", 128: "HCA"}
    attention = released.get(ratio, f"{'CSA' if ratio in CSA_RATIOS else 'HCA'} {ratio}")
    return f"{attention}, {'hash' if layer < args.n_hash_layers else 'score'}"


def kinds(args: ModelArgs) -> dict[str, int]:
    """Kind -> number of layers of it."""
    layers = range(args.n_layers + args.n_mtp_layers)
    return collections.Counter(kind_of(args, layer) for layer in layers)


def one_of_each(args: ModelArgs) -> ModelArgs:
    """The same model with a single layer of every kind."""
    first = {kind_of(args, layer): layer for layer in reversed(range(args.n_layers))}
    layers = sorted(first.values())
    ratios = [args.compress_ratios[layer] for layer in layers]
    mtp_ratios = args.compress_ratios[args.n_layers :]
    return dataclasses.replace(
        args,
        n_layers=len(layers),
        n_hash_layers=sum(layer < args.n_hash_layers for layer in layers),
        compress_ratios=(*ratios, *mtp_ratios),
    )


def index_of(node: torch.fx.Node, args: ModelArgs) -> int | None:
    """The layer that a node belongs to, forward or backward; None before and after the layers.

    MTP blocks come after the layers.
    """
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    for path, _ in stack.values():
        parts = path.replace("[", ".").replace("]", "").split(".")
        for name, offset in (("layers", 0), ("mtp", args.n_layers)):
            if name not in parts[:-1]:
                continue
            index = parts[parts.index(name) + 1]
            if index.isdigit():
                return offset + int(index)
    return None


def layer_of(node: torch.fx.Node, args: ModelArgs) -> str:
    """The kind of layer that a node belongs to; "rest" before and after the layers."""
    layer = index_of(node, args)
    return REST if layer is None else kind_of(args, layer)


class Repeats(NamedTuple):
    """How often a captured node stands for itself: layers of its kind in the model and captured."""

    args: ModelArgs  # of the captured model
    times: dict[str, float]

    def of(self, node: torch.fx.Node) -> float:
        return self.times[layer_of(node, self.args)]


def repeats(args: ModelArgs, captured: ModelArgs) -> Repeats:
    """For a model of which `captured` has all kinds of layers."""
    layers = kinds(captured)
    times = {kind: n / layers[kind] for kind, n in kinds(args).items()}
    return Repeats(captured, times | {REST: 1})


# --------------------------------------------------------------------------------------------------
# FLOPs


def flops_of(node: torch.fx.Node) -> int:
    """Products and sums, by the formulas of torch.utils.flop_counter and of our ops.

    Elementwise work is not counted.
    """
    formula = flop_registry.get(node.target.overloadpacket)
    if formula is None:
        return 0

    def value(a):
        return a.meta["val"] if isinstance(a, torch.fx.Node) else a

    args, kwargs = tree_map(value, (node.args, dict(node.kwargs)))
    return formula(*args, **kwargs, out_val=node.meta["val"])


REPEATED = {  # the share of a backward op that computes a part of the forward again
    "dsv4.moe_backward": 2 / 8,
    "dsv4.sparse_attn_backward": 1 / 5,
    "dsv4.linear_cross_entropy_backward": 1 / 3,
}


def keys(
    args: ModelArgs, ratio: int, shape: Shape, first: int | None, indexer: bool = False
) -> int:
    """Pairs of a token and a key (for the indexer: an entry), of one row in a layer of this ratio.

    first   position of the first token: each sees its window and its entries back to position 0.
            None: every token sees a full window and all entries, as the FLOP formulas of the ops
            count, which know nothing but shapes
    """
    entries = -(-shape.context // ratio) if ratio else 0
    window = 0 if indexer else args.window_size
    chooses = ratio in CSA_RATIOS and not indexer
    most = min(entries, args.index_topk) if chooses else entries
    if first is None:
        return shape.length * (window + most)
    pairs = 0
    for t in range(first, first + shape.length):
        pairs += min(window, t + 1)
        if ratio:
            pairs += min(most, (t + 1) // ratio)
    return pairs


def needed(node: torch.fx.Node, args: ModelArgs, phase: str, shape: Shape) -> float:
    """The part of flops_of(node) that a roofline counts.

    No MTP block, nothing that a backward computes again, and visible pairs only. A prompt and a
    training row begin at position 0 and are one document; decode and verify stand at the end of a
    full cache.
    """
    name, layer = name_of(node.target), index_of(node, args)
    if layer is not None and layer >= args.n_layers:
        return 0.0
    part = 1.0 - REPEATED.get(name, 0)
    if name.startswith("dsv4.linear_cross_entropy"):
        part /= 1 + args.n_mtp_layers  # the loss of the MTP block stands outside of it
    if name.startswith(("dsv4.sparse_attn", "dsv4.indexer_topk")):
        indexer = name == "dsv4.indexer_topk"
        first = 0 if phase in ("prefill", "train") else shape.context - shape.length
        ratio = args.compress_ratios[layer]
        visible = keys(args, ratio, shape, first, indexer)
        part *= visible / keys(args, ratio, shape, None, indexer)
    return part


# --------------------------------------------------------------------------------------------------
# Memory


def is_view(node: torch.fx.Node) -> bool:
    return node.target.is_view or name_of(node.target) == "aten._unsafe_view.default"


def values(node: torch.fx.Node) -> list[torch.Tensor]:
    return [v for v in tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]


def largest(captured: Captured, model: Transformer) -> tuple[int, str]:
    """Bytes and description of the largest value that an operator makes.

    Parameters, caches and their gradients do not count.
    """
    known = {tuple(t.shape) for t in (*model.parameters(), *model.buffers())}
    found = 0, ""
    for node in captured.calls():
        if is_view(node):
            continue
        for v in values(node):
            if tuple(v.shape) not in known:
                dtype = str(v.dtype).removeprefix("torch.")
                found = max(found, (v.nbytes, f"{name_of(node.target)} {list(v.shape)} {dtype}"))
    return found


def saved(captured: Captured, times: Callable[[torch.fx.Node], float] = lambda node: 1) -> int:
    """Bytes of activations that a training forward saves for its backward.

    Parameters and inputs cost nothing more. times(node): how often a value counts.
    """
    if len(captured.graphs) < 2:
        return 0
    forward = captured.graphs[0].graph
    (output,) = (node for node in forward.nodes if node.op == "output")

    def base(node):  # of a chain of views
        while isinstance(node.target, torch._ops.OpOverload) and is_view(node):
            node = node.args[0]
        return node

    results = [node for node in tree_leaves(output.args) if isinstance(node, torch.fx.Node)]
    nbytes = 0.0
    for node in {base(node) for node in results}:
        if node.op != "placeholder":
            nbytes += sum(v.nbytes for v in values(node)) * times(node)
    return round(nbytes)


# --------------------------------------------------------------------------------------------------
# Faults and counts


def waits(name: str) -> bool:
    """Whether an operator makes the host wait for a GPU."""
    return any(name == f"aten.{sync}" or name.startswith(f"aten.{sync}.") for sync in SYNCS)


def is_symbolic(value) -> bool:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return True
    return isinstance(value, torch.Tensor) and bool(free_symbols(value))


def faults(captured: Captured) -> list[str]:
    """Operators that wait for the device, and symbolic sizes or values; empty if all is well."""
    found = []
    for node in captured.nodes():
        name = name_of(node.target)
        # An operator may be an argument: with_effects(token, op, ...).
        called = [op for op in (node.target, *node.args) if isinstance(op, torch._ops.OpOverload)]
        for call in map(name_of, called):
            if waits(call):
                found.append(f"host sync {call}: {where(node)}")
        if isinstance(node.target, torch._ops.HigherOrderOperator) and name in BRANCHES:
            found.append(f"branch on data {name}: {where(node)}")
        for v in tree_leaves(node.meta.get("val")):
            if is_symbolic(v):
                found.append(f"symbolic value in {name}: {where(node)}")
    return found


def where(node: torch.fx.Node) -> str:
    """The line of this project that a node comes from."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [
        f"{line} {source}"
        for line, source in zip(lines, [*lines[1:], ""], strict=False)
        if line.startswith("File")
    ]
    return places[-1] if places else node.format_node() or str(node)


def census(captured: Captured, args: ModelArgs) -> dict[str, dict[str, dict[str, int]]]:
    """{kind of layer or "rest": {"opaque": {name: count}, "aten": {name: count}}}, for one layer.

    Layers of a kind may differ by a node, such as the first gradient that is added to no other:
    then it is their mean.
    """
    layers = kinds(args)
    counts: dict = {}
    for node in captured.calls():
        name, kind = name_of(node.target), layer_of(node, args)
        groups = counts.setdefault(
            kind, {"opaque": collections.Counter(), "aten": collections.Counter()}
        )
        groups["opaque" if is_ours(name) else "aten"][name] += 1

    def per_layer(counter: collections.Counter, n: int) -> dict[str, float]:
        return {
            name: count / n if count % n else count // n for name, count in sorted(counter.items())
        }

    return {
        kind: {group: per_layer(counter, layers.get(kind, 1)) for group, counter in groups.items()}
        for kind, groups in sorted(counts.items())
    }
