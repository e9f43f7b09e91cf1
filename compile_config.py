"""What is compiled, and how: presets, and one function per phase that compiles it.

A phase (prefill chunk, decode, verify, training step) is a function of its own with static shapes. Two facts are kept
apart. Capturable: every phase of every model is one Dynamo graph. Executed: what a preset runs may be that one graph
("model"), or one graph per layer kind, shared by the layers of that kind, between a graph for what comes before the
layers and one for what comes after ("layer"): deep models compile in a fraction of the time, and no arithmetic lies
between the graphs. Either way there is no graph break, and nothing recompiles as positions, lengths or rates change.
"""

from __future__ import annotations

import dataclasses
import functools
import runpy
import sys
import types
from typing import Callable

import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import ops
from model import Aux, Transformer, call
from tools import cli, compile_cache, stats
from training.losses import LossWeights, combine_losses, make_targets, training_loss

DEEP = 12  # layers above which a preset without a region of its own compiles layer by layer


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """How phases are compiled.

    backend     a torch.compile backend, or None to run eagerly
    region      "model": one graph; "layer": one per layer kind; None: "layer" for prefill, where it costs nothing, and for
                deep models, else "model"
    cudagraphs  capture decode and verify into a CUDA graph
    options     Inductor options, as pairs
    """

    backend: str | None = "inductor"
    region: str | None = None
    cudagraphs: bool = False
    options: tuple[tuple[str, object], ...] = ()


PRESETS = {
    "eager": CompileConfig(backend=None),
    "default": CompileConfig(),
    "cudagraphs": CompileConfig(cudagraphs=True),
    "regional": CompileConfig(region="layer"),
    "max-autotune": CompileConfig(
        cudagraphs=True, options=(("max_autotune", True), ("coordinate_descent_tuning", True))
    ),
}


def compile_function(function: Callable, name: str, cfg: CompileConfig, **options) -> Callable:
    """`function` as one full graph of static shapes, under a name and a compile count of its own."""
    if cfg.backend is None:
        return function
    code = function.__code__.replace(co_name=name)  # Dynamo counts compiles per code object
    function = types.FunctionType(
        code, function.__globals__, name, function.__defaults__, function.__closure__
    )
    options = {**options, **dict(cfg.options)} if cfg.backend == "inductor" else {}
    return torch.compile(
        function, backend=cfg.backend, fullgraph=True, dynamic=False, options=options or None
    )


def build_cpu_kernels(model: Transformer, cfg: CompileConfig, phase: str) -> None:
    """Before tracing: the C++ that the model's ops run on CPU, in fp32. See ops/registry.py."""
    weight = model.embed.weight
    if cfg.backend and weight.device.type == "cpu" and weight.dtype == torch.float32:
        ops.build_cpu_kernels(model.ops, phase)


def regional(model: Transformer, cfg: CompileConfig, phase: str) -> bool:
    """Whether cfg compiles this phase of the model layer by layer."""
    region = cfg.region or ("layer" if phase == "prefill" or len(model.layers) > DEEP else "model")
    return cfg.backend is not None and region == "layer"


def kind(block: torch.nn.Module) -> tuple:
    """What a compiled layer depends on: its modules' types and plain attributes, its tensors' shapes and dtypes."""
    plain = (int, float, str, bool, type(None))
    modules = tuple(
        (name, type(m).__name__, tuple((k, v) for k, v in vars(m).items() if isinstance(v, plain)))
        for name, m in block.named_modules()
    )
    tensors = (*block.named_parameters(), *block.named_buffers())
    return modules, tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)


class Phase:
    """A compiled phase of generation: `phase(tokens [B, T], input_pos [B], lengths=None, *rest)`.

    Calls run without gradients. `then(logits, input_pos, lengths, *rest)` is part of the graph and makes the result;
    without it the logits are the result. Each combination of shapes is compiled once, when it is first called (`build`).
    Dynamo's guards are off: the shapes and the caches, all that may change between calls, are checked here instead.
    """

    def __init__(
        self,
        model: Transformer,
        cfg: CompileConfig,
        name: str,
        logits: str,
        then: Callable | None = None,
    ):
        self.model, self.cfg, self.name, self.logits = model, cfg, name, logits
        self.then = then or (lambda logits, *rest: logits)
        self.built: dict[tuple, Callable] = {}
        device = model.embed.weight.device
        if cfg.cudagraphs and device.type != "cuda":
            raise ValueError(
                f"cudagraphs need a CUDA device, not {device.type}: choose another preset"
            )

    @torch.no_grad()
    def __call__(
        self,
        tokens: torch.Tensor,
        input_pos: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *rest,
    ):
        args = [
            a.contiguous() if isinstance(a, torch.Tensor) else a
            for a in (tokens, input_pos, lengths, *rest)
        ]
        weight, caches = self.model.embed.weight, ()
        if self.cfg.cudagraphs:  # a recorded graph holds on to addresses
            caches = (weight.data_ptr(), self.model.layers[0].attn.ring.rows.data_ptr())
        key = (
            self.model.cache_size,
            self.model.args.act_quant,
            weight.dtype,
            weight.device,
            caches,
            *[(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in args],
        )
        run = self.built.get(key)
        if run is None:
            run = self.built[key] = self.build()
            args = [
                a.clone() if isinstance(a, torch.Tensor) else a for a in args
            ]  # or one tensor given twice stays one
            if self.cfg.cudagraphs and self.name != "prefill":
                run = self.built[key] = captured(run, *args)
        return run(*args)

    def build(self) -> Callable:
        model, then, logits = self.model, self.then, self.logits
        build_cpu_kernels(model, self.cfg, "prefill" if self.name == "prefill" else "decode")
        options = {"guard_filter_fn": lambda guards: [False] * len(guards)}
        if model.embed.weight.device.type == "cpu" and self.name != "prefill":
            options["cpp_wrapper"] = (
                True  # small kernels: calling them from Python would cost as much as running them
            )

        def phase(function, part=""):
            return compile_function(function, self.name + part, self.cfg, **options)

        if not regional(model, self.cfg, self.name):
            return phase(
                lambda tokens, input_pos, lengths, *rest: then(
                    model(tokens, input_pos, lengths, logits=logits), input_pos, lengths, *rest
                )
            )
        start = phase(lambda *args: model.embed_inputs(*args), "_start")
        kinds = {}
        layers = [
            (
                block,
                kinds.setdefault(kind(block), phase(lambda block, *args: block(*args), "_layer")),
            )
            for block in model.layers
        ]
        finish = phase(
            lambda X, plan, *rest: then(model.lm_logits(X, plan, logits), *rest), "_finish"
        )

        def run(tokens, input_pos, lengths, *rest):
            tokens, plan, X = start(tokens, input_pos, lengths)
            for block, layer in layers:
                X, _ = layer(block, X, tokens, plan)
            return finish(X, plan, input_pos, lengths, *rest)

        return run


def captured(run: Callable, *args) -> Callable:
    """Record run(*args) into a CUDA graph -> a function that copies its arguments in, replays, and copies results out.

    The warm-up calls that recording needs feed the same tokens to the same positions: the caches end as after one call.
    """
    static = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run(*static)

    def replay(*args):
        for a, b in zip(static, args):
            if isinstance(a, torch.Tensor):
                a.copy_(b)
        graph.replay()
        return tuple(r.clone() for r in result) if isinstance(result, tuple) else result.clone()

    return replay


def compile_prefill(model: Transformer, cfg: CompileConfig, then: Callable | None = None) -> Phase:
    """-> prefill(tokens [B, T], input_pos [B], lengths=None) -> logits [B, 1, V] of each row's last valid token.

    Feed prompts in chunks of one size T; lengths pads the last one. then: see Phase.
    """
    return Phase(model, cfg, "prefill", "last", then)


def compile_decode(model: Transformer, cfg: CompileConfig, then: Callable | None = None) -> Phase:
    """-> decode(tokens [B, 1], input_pos [B], lengths=None) -> logits [B, 1, V]. then: see Phase."""
    return Phase(model, cfg, "decode", "all", then)


def compile_verify(model: Transformer, cfg: CompileConfig, then: Callable | None = None) -> Phase:
    """-> verify(tokens [B, 1 + k], input_pos [B], lengths=None) -> logits [B, 1 + k, V]. then: see Phase."""
    return Phase(model, cfg, "verify", "all", then)


KEPT = (
    "sparse_attn",
    "moe",
    "moe_train",
    "indexer_topk",
)  # what selective recomputation does not do again


def recomputed(forward: Callable, how: str) -> Callable:
    """`forward`, whose activations are not kept for the backward but computed again there: "full"; "selective": all but those
    of KEPT; "none": as it is."""
    if how not in ("none", "selective", "full"):
        raise ValueError(f"recompute {how!r}: choose none, selective or full")
    if how == "none":
        return forward
    kept = {getattr(torch.ops.dsv4, name).default for name in KEPT}

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    how = (
        {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}
        if how == "selective"
        else {}
    )
    return lambda *args: checkpoint(forward, *args, use_reentrant=False, **how)


def compile_train_step(
    model: Transformer,
    optimizer,
    cfg: CompileConfig,
    loss: Callable | None = None,
    *,
    weights: LossWeights = LossWeights(),
    aux: Aux = Aux(),
    micro_batch: int | None = None,
    recompute: str = "none",
    add_up: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
) -> Callable:
    """-> step(tokens, targets, doc_ids, lr) -> {"loss", "mtp_loss", ...}: detached 0-D tensors, see training_loss.

    tokens, targets [B, S] int64, doc_ids likewise or None; lr a 0-D tensor.
    optimizer    one of torch.optim; or one whose step(lr, load) frees the gradients and returns a dict of metrics, and that
                 may have compile(compiler), with compiler(function, name) -> function; load as in training_loss, or None
    loss         loss(model, tokens, targets: Targets, doc_ids) -> total, dict of its parts; None: training_loss, with weights
                 and aux
    micro_batch  rows whose activations are held at a time; their gradients add up. None: all
    recompute    activations that are computed again in the backward: "none", "selective" or "full", block by block
    add_up       tensors -> their sums over the processes that share the step's rows; None: there is one
    """
    build_cpu_kernels(model, cfg, "train")
    compiled, patches = lambda function, name: compile_function(function, name, cfg), {}
    layerwise = regional(model, cfg, "train")
    kinds: dict[tuple, Callable] = {}
    forward = recomputed(lambda block, *args: type(block).forward(block, *args), recompute)
    for block in (*model.layers, *model.mtp):
        layer = (
            kinds.setdefault(kind(block), compiled(lambda *args: forward(*args), "train_layer"))
            if layerwise
            else forward
        )
        if layerwise or recompute != "none":
            patches[block, "forward"] = functools.partial(layer, block)
    run_block = call
    if layerwise and loss is None:
        for part in (model, model.mtp):
            start = compiled(
                lambda part, *args: type(part).embed_inputs(part, *args), "train_start"
            )
            patches[part, "embed_inputs"] = functools.partial(start, part)
        finish = compiled(combine_losses, "train_finish")

        def run_block(function, *args):
            return (finish if function is combine_losses else function)(*args)

    loss = loss or (lambda *args: training_loss(*args, weights, aux, run_block))
    if not layerwise:
        loss = compiled(loss, "train")
    prepare = compiled(make_targets, "train_aim")
    if hasattr(optimizer, "compile"):
        optimizer.compile(compiled)

    def step(tokens, targets, doc_ids, lr):
        size, metrics = micro_batch or len(tokens), {}
        parts = list(
            zip(
                tokens.split(size),
                targets.split(size),
                [None] * len(tokens) if doc_ids is None else doc_ids.split(size),
            )
        )
        goals = [prepare(*part) for part in parts]
        counts = torch.stack([goal.counts for goal in goals]).sum(0)
        if add_up:
            counts = add_up([counts])[0]
        try:  # within the step only: what else is done with the model stays eager
            for (module, name), function in patches.items():
                module.__dict__[name] = function
            for (tokens, _, doc_ids), goal in zip(parts, goals):
                total, new = loss(model, tokens, goal._replace(counts=counts), doc_ids)
                total.backward()
                metrics = {
                    name: metrics[name] + value if name in metrics else value
                    for name, value in new.items()
                }
        finally:
            for module, name in patches:
                del module.__dict__[name]
        if add_up:
            metrics = dict(zip(metrics, add_up([*metrics.values()])))
        load = metrics.pop("load", None)
        if isinstance(optimizer, torch.optim.Optimizer):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        else:
            metrics |= optimizer.step(lr, load) or {}
        return metrics

    return step


class CompileCount:
    """Graphs and graph breaks since it was made, and recompiles: graphs compiled since `warm()`, the declared warm-up."""

    def __init__(self):
        self._graphs, self._breaks, self._warm = *self._now(), None

    @staticmethod
    def _now() -> tuple[int, int]:
        return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())

    def warm(self) -> None:
        self._warm = self._now()[0]

    @property
    def graphs(self) -> int:
        return self._now()[0] - self._graphs

    @property
    def breaks(self) -> int:
        return self._now()[1] - self._breaks

    @property
    def recompiles(self) -> int | None:
        return None if self._warm is None else self._now()[0] - self._warm


def usable_preset(asked: str | None, default: str, device: str) -> str:
    """The preset asked for, or the default. Where CPU code cannot be compiled, eager instead of the default, and ValueError if asked."""
    name = asked or default
    lacks = stats.missing_cpu_toolchain() if device == "cpu" and PRESETS[name].backend else None
    if lacks and asked:
        raise ValueError(f"--compile {name} needs {lacks}: install it, or use --compile eager")
    if lacks:
        print(f"running without torch.compile, which needs {lacks}", file=sys.stderr)
    return "eager" if lacks else name


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def run(argv: list[str] | None) -> int:
    parser = cli.Parser(
        prog="compile_config.py",
        description="What torch.compile makes of the model, and its cache.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "report", help="graphs, operators, kernels, memory, FLOPs and compile seconds"
    )
    cache = commands.add_parser("cache", help="carry compiled code to an equal machine")
    cache.add_argument("action", choices=("save", "load"))
    cache.add_argument("file")
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:  # stands above this module, which therefore cannot import it
        return runpy.run_module("tools.report")["run"](argv[1:])
    flags = parser.parse_args(argv)
    if flags.action == "save":
        print(f"packed {compile_cache.save_cache(flags.file)} files")
    else:
        print(f"unpacked {compile_cache.load_cache(flags.file)} files")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. -> 0; 1 on a regression; 2 after a one-line message on bad input."""
    return cli.main("compile_config.py", run, argv)


if __name__ == "__main__":
    sys.exit(main())
