"""How the model is compiled: presets, and one function per phase that compiles it.

A phase (prefill chunk, decode, verify, training step) is a function of its own with static shapes.
Two facts are kept apart:

    capturable  every phase of every model is one Dynamo graph
    executed    a preset runs that one graph (region "model"), or one graph per kind of layer, which
                the layers of that kind share, between a graph before the layers and one after them
                (region "layer"): deep models compile in a fraction of the time, and no arithmetic
                lies between the graphs

Either way there is no graph break, and nothing recompiles as positions, lengths or rates change.

Preset "auto" waits for no compiler: its phases run eagerly until another process has compiled them
ahead of time, layer by layer; later processes load what it made (tools/ahead.py).

Elsewhere: which layers share a graph (tools/layer_graphs.py), CUDA graphs (tools/cuda_graph.py),
private parts of PyTorch (tools/torch_private.py); of a training step, the work around its graphs
(training/step.py), its losses (training/losses.py) and recomputation (training/recompute.py).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while modules load: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dataclasses
import itertools
import runpy
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

import ops
from model import Aux, Transformer
from tools import ahead, cli, compile_cache, torch_private
from tools.ahead_compiler import WITHOUT, AheadCompiler, AheadRun, Job
from tools.cuda_graph import clone_tensors, record_cuda_graph
from tools.layer_graphs import compile_layers
from training.losses import LossWeights, combine_losses, make_targets, training_loss
from training.recompute import checkpoint_blocks, checkpointed
from training.step import TrainStep

MAX_WHOLE_GRAPH_LAYERS = 12  # deeper models compile layer by layer unless a preset says otherwise


@dataclasses.dataclass(frozen=True)
class CompileConfig:
    """How phases are compiled.

    backend     a torch.compile backend, or None to run eagerly
    region      "model": one graph; "layer": one per kind of layer; None: "layer" for prefill, where
                it costs no speed, and for models of more than MAX_WHOLE_GRAPH_LAYERS, else "model"
    cudagraphs  record decode and verify into a CUDA graph
    options     Inductor options, as pairs
    ahead       generation on CPU: compiled ahead of time by another process, layer by layer
    """

    backend: str | None = "inductor"
    region: str | None = None
    cudagraphs: bool = False
    options: tuple[tuple[str, object], ...] = ()
    ahead: bool = False

    def __post_init__(self):
        if self.region not in (None, "model", "layer"):
            raise ValueError(f"region {self.region!r}: choose 'model', 'layer' or None")
        if self.ahead and (self.backend != "inductor" or self.region == "model" or self.cudagraphs):
            raise ValueError("ahead: Inductor compiles layer by layer, without CUDA graphs")


AUTOTUNE = (("max_autotune", True), ("coordinate_descent_tuning", True))
PRESETS = {
    "auto": CompileConfig(ahead=True),
    "eager": CompileConfig(backend=None),
    "default": CompileConfig(),
    "cudagraphs": CompileConfig(cudagraphs=True),
    "regional": CompileConfig(region="layer"),
    "max-autotune": CompileConfig(cudagraphs=True, options=AUTOTUNE),
}
# Of training and of the report: compiled by the process that asks
IN_PROCESS = tuple(name for name, cfg in PRESETS.items() if not cfg.ahead)


def usable_preset(asked: str | None, default: str, device: str) -> str:
    """The preset asked for, or the default.

    Where code for CPU cannot be compiled: "eager" in place of the default; a ValueError if asked.
    "auto" finds that out as it runs; on other devices it is "default".
    """
    name = asked or default
    if PRESETS[name].ahead:
        return name if device == "cpu" else "default"
    if device != "cpu" or PRESETS[name].backend is None:
        return name
    lacks = torch_private.missing_cpu_toolchain()
    if lacks is None:
        return name
    if asked:
        raise ValueError(f"--compile {name} needs {lacks}: see to that, or use --compile eager")
    print(f"{WITHOUT} {lacks}", file=sys.stderr)
    return "eager"


# --------------------------------------------------------------------------------------------------
# Graphs


def compile_function(function: Callable, name: str, cfg: CompileConfig, **options) -> Callable:
    """`function` as one full graph of static shapes, with a compile count of its own.

    options     of Inductor, beside those of cfg
    """
    if cfg.backend is None:
        return function
    options = {**options, **dict(cfg.options)} if cfg.backend == "inductor" else {}
    torch_private.on_compile(compile_cache.JOURNAL.begin, compile_cache.JOURNAL.end)
    return torch_private.compile_isolated(
        function, name, backend=cfg.backend, fullgraph=True, dynamic=False, options=options or None
    )


def build_cpu_kernels(model: Transformer, cfg: CompileConfig, phase: str) -> None:
    """Before tracing: the C++ that the model's ops run on CPU, in fp32. See ops/registry.py."""
    weight = model.embed.weight
    if cfg.backend and weight.device.type == "cpu" and weight.dtype == torch.float32:
        with compile_cache.JOURNAL.compiling():
            ops.build_cpu_kernels(model.ops, phase)


def compiles_by_layer(model: Transformer, cfg: CompileConfig, phase: str) -> bool:
    """Whether cfg compiles this phase of the model layer by layer."""
    if cfg.backend is None:
        return False
    if cfg.region is not None:
        return cfg.region == "layer"
    return phase == "prefill" or len(model.layers) > MAX_WHOLE_GRAPH_LAYERS


def call_forward(block: nn.Module, *args):
    """The block's forward alone: hooks of the module stay outside of the graph."""
    return type(block).forward(block, *args)


# --------------------------------------------------------------------------------------------------
# Generation


def embed(model: Transformer, *args):
    """The part of a phase before its layers -> tokens, plan, X."""
    return model.embed_inputs(*args)


def layer(block: nn.Module, *args) -> torch.Tensor:
    """A layer of a phase -> X. Compiled in a Phase only: entries without guards match any call."""
    return block(*args)[0]


class Phase:
    """A compiled phase of generation: `phase(tokens [B, T], input_pos [B], lengths=None, *rest)`.

    Calls run without gradients. `epilogue(logits, input_pos, lengths, *rest)` is part of the graph
    and makes the result; without it the logits are the result. Each combination of shapes is
    compiled once, when it is first called (`build`). Dynamo's guards are off: the shapes and the
    caches, all that may change between calls, are checked here instead.

    ran_compiled   whether the last call ran compiled code

    compiler   of a preset that compiles ahead of time: calls run eagerly until it is ready. None:
               the first call waits for one
    """

    def __init__(
        self,
        model: Transformer,
        cfg: CompileConfig,
        name: str,
        logits: str,
        epilogue: Callable | None = None,
        compiler: AheadCompiler | None = None,
    ):
        self.model, self.cfg = model, cfg
        self.name, self.logits = name, logits
        self.epilogue = epilogue or only_logits
        self.compiler = compiler
        self.built: dict[tuple, Callable] = {}
        self.ran_compiled = cfg.backend is not None
        self._knows_epilogue = compile_cache.is_project_function(self.epilogue)
        self.hooks = [  # of nn.Module: torch/nn/modules/module.py line 469
            hooks
            for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_hooks)
        ]
        device = model.embed.weight.device.type
        if cfg.cudagraphs and device != "cuda":
            raise ValueError(f"cudagraphs need a CUDA device, not {device}: choose another preset")

    @torch.no_grad()
    def __call__(
        self,
        tokens: torch.Tensor,
        input_pos: torch.Tensor,
        lengths: torch.Tensor | None = None,
        *rest,
    ):
        args = tokens, input_pos, lengths, *rest
        args = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
        if self.cfg.backend is None and not self.cfg.cudagraphs:
            return self.whole(*args)
        key = self._key(args)
        if self.compiles_ahead:
            run = self.prepare(*args)
            result = run(*args)
            self.ran_compiled = run.compiled
            return result
        if key not in self.built:
            run = self.build()
            args = clone_tensors(args)  # or the graph would take one tensor given twice as one
            with torch_private.unlimited_compiles():
                if self.cfg.cudagraphs and self.name != "prefill":
                    run = record_cuda_graph(run, *args)
                self.built[key] = run
                return run(*args)
        return self.built[key](*args)

    def _key(self, args: Sequence) -> tuple:
        """All that a graph without guards depends on and that may change between calls."""
        model, weight = self.model, self.model.embed.weight
        addresses = ()
        if self.cfg.cudagraphs:  # a recorded graph holds on to them
            addresses = weight.data_ptr(), model.layers[0].attn.ring.rows.data_ptr()
        shapes = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in args]
        hooks = sum(map(len, self.hooks))  # they are traced
        settings = model.cache_size, model.args.act_quant, weight.dtype, weight.device, hooks
        return *settings, addresses, *shapes

    def build(self) -> Callable:
        """-> run(tokens, input_pos, lengths, *rest), compiled when it is first called."""
        build_cpu_kernels(self.model, self.cfg, self._kernels)
        options = {"guard_filter_fn": torch_private.skip_all_guards}
        if self.model.embed.weight.device.type == "cpu" and self.name != "prefill":
            # Small kernels: calling them from Python would cost as much as running them.
            options["cpp_wrapper"] = True

        def compiled(function: Callable, part: str = "") -> Callable:
            return compile_function(function, self.name + part, self.cfg, **options)

        if not compiles_by_layer(self.model, self.cfg, self.name):
            return compiled(self.whole)
        first, last = compiled(embed, "_embed"), compiled(self.head, "_head")
        layers = compile_layers(self.model.layers, lambda: compiled(layer, "_layer"))

        def by_layer(tokens, input_pos, lengths, *rest):
            tokens, plan, X = first(self.model, tokens, input_pos, lengths)
            for block, run in layers.items():
                X = run(block, X, tokens, plan)
            return last(self.model, X, plan, input_pos, lengths, *rest)

        return by_layer

    @property
    def _kernels(self) -> str:
        """The phase as ops.build_cpu_kernels names it."""
        return "prefill" if self.name == "prefill" else "decode"

    def whole(self, tokens, input_pos, lengths, *rest):
        """The phase, not compiled."""
        y = self.model(tokens, input_pos, lengths, logits=self.logits)
        return self.epilogue(y, input_pos, lengths, *rest)

    def head(self, model: Transformer, X, plan, *rest):
        """The part of the phase after the layers."""
        return self.epilogue(model.lm_logits(X, plan, self.logits), *rest)

    @property
    def compiles_ahead(self) -> bool:
        """Another process compiles for CPU, and knows the project's functions, but no hooks."""
        on_cpu = self.model.embed.weight.device.type == "cpu"
        return self.cfg.ahead and on_cpu and self._knows_epilogue and not any(self.hooks)

    def prepare(self, *args) -> AheadRun:
        """Load what was compiled ahead of time for calls with such arguments, or ask for it."""
        key = self._key(args)
        if key not in self.built:
            self.built[key] = self._build_ahead(args)
        return self.built[key]

    def _build_ahead(self, args: Sequence) -> Callable:
        """-> run(...) of code that was compiled ahead of time, or will be: see AheadCompiler."""
        model = self.model
        libraries: dict[str, None] = {}
        if model.embed.weight.dtype == torch.float32:
            kernels = ops.cpu_kernels(model.ops, self._kernels)
            libraries = dict.fromkeys(kernel.library for kernel in kernels)
        settings = self.cfg, self.name, self.logits, self.epilogue
        parts = self.parts()
        job = Job.of(model, settings, args, parts, list(libraries))
        return AheadRun(job, parts, self.whole, self.compiler)

    def parts(self) -> list[ahead.Part]:
        """What is compiled ahead of time, in the order of calls; see AheadRun."""
        layers = compile_layers(self.model.layers, itertools.count(1).__next__)
        return [
            ahead.Part("embed", self.model, embed),
            *(ahead.Part(f"layer kind {i}", block, layer) for block, i in layers.items()),
            ahead.Part("head", self.model, self.head),
        ]


def only_logits(logits: torch.Tensor, *rest) -> torch.Tensor:
    """The epilogue of a phase that has no other."""
    return logits


def compile_prefill(
    model: Transformer,
    cfg: CompileConfig,
    epilogue: Callable | None = None,
    compiler: AheadCompiler | None = None,
) -> Phase:
    """-> prefill(tokens [B, T], input_pos [B], lengths=None) -> logits [B, 1, V].

    They are those of each row's last valid token. Feed prompts in chunks of one size T; lengths
    pads the last one. epilogue, compiler: see Phase.
    """
    return Phase(model, cfg, "prefill", "last", epilogue, compiler)


def compile_decode(
    model: Transformer,
    cfg: CompileConfig,
    epilogue: Callable | None = None,
    compiler: AheadCompiler | None = None,
) -> Phase:
    """-> decode(tokens [B, 1], input_pos [B], lengths=None) -> logits [B, 1, V]."""
    return Phase(model, cfg, "decode", "all", epilogue, compiler)


def compile_verify(
    model: Transformer,
    cfg: CompileConfig,
    epilogue: Callable | None = None,
    compiler: AheadCompiler | None = None,
) -> Phase:
    """-> verify(tokens [B, 1 + k], input_pos [B], lengths=None) -> logits [B, 1 + k, V]."""
    return Phase(model, cfg, "verify", "all", epilogue, compiler)


# --------------------------------------------------------------------------------------------------
# Training


def compile_blocks(
    model: Transformer,
    cfg: CompileConfig,
    recompute: str,
    wrap_block: Callable[[Callable], Callable] | None,
) -> Callable:
    """-> a run_block (see Transformer.forward) that calls compiled layers, embedding and losses."""

    def compile_layer() -> Callable:
        layer = compile_function(checkpointed(call_forward, recompute), "train_layer", cfg)
        return wrap_block(layer) if wrap_block else layer

    layers = compile_layers((*model.layers, *model.mtp), compile_layer)
    others = {
        model.embed_inputs: compile_function(model.embed_inputs, "train_embed", cfg),
        model.mtp.embed_inputs: compile_function(model.mtp.embed_inputs, "train_embed", cfg),
        combine_losses: compile_function(combine_losses, "train_losses", cfg),
    }

    def run_block(function: Callable, *args):
        if function in layers:
            return layers[function](function, *args)
        return others[function](*args)

    return run_block


def compile_train_step(
    model: Transformer,
    optimizer,
    cfg: CompileConfig,
    loss: Callable | None = None,
    *,
    # The loss
    weights: LossWeights = LossWeights(),
    aux: Aux = Aux(),
    # Memory
    micro_batch: int | None = None,
    recompute: str = "none",
    # Several processes
    all_reduce_sum: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None,
    wrap_block: Callable[[Callable], Callable] | None = None,
) -> Callable:
    """-> step(tokens, targets, doc_ids, lr) -> {"loss", "mtp_loss", ...}: see training_loss.

    tokens, targets [B, S] int64, doc_ids likewise or None; lr () fp32; results () fp32, detached.

    optimizer       one of torch.optim; or one whose step(lr, load) frees the gradients and returns
                    a dict of metrics, load as in training_loss, or None. It may have
                    compile(compiler), with compiler(function, name) -> function
    loss            loss(model, tokens, targets: Targets, doc_ids) -> total, dict of its parts,
                    which compiles as one graph. None: training_loss, with weights and aux
    micro_batch     rows whose activations are held at a time; their gradients add up. None: all
    recompute       activations that the backward computes again, block by block: see checkpointed
    all_reduce_sum  tensors -> their sums over the processes that share the step's rows. None: one
    wrap_block      run -> run, around each compiled layer, run(block, *args): FSDP2 gathers there
    """
    by_layer = compiles_by_layer(model, cfg, "train")

    def compiled(function: Callable, name: str) -> Callable:
        return compile_function(function, name, cfg)

    if loss is None:
        build_cpu_kernels(model, cfg, "train")
        run_block = checkpoint_blocks(recompute)
        if by_layer:
            run_block = compile_blocks(model, cfg, recompute, wrap_block)

        def loss(model, tokens, targets, doc_ids):
            return training_loss(model, tokens, targets, doc_ids, weights, aux, run_block)

    elif by_layer or recompute != "none":
        raise ValueError("a loss of your own is one graph: choose region 'model', recompute 'none'")
    if not by_layer:
        loss = compiled(loss, "train")
    if hasattr(optimizer, "compile"):
        optimizer.compile(compiled)
    prepare = compiled(make_targets, "train_targets")
    return TrainStep(model, optimizer, loss, prepare, micro_batch, all_reduce_sum)


# --------------------------------------------------------------------------------------------------
# Command line


def run(argv: list[str] | None) -> int:
    parser = cli.Parser(
        prog="compile_config.py",
        description="Report what torch.compile makes of the model; carry its cache.",
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
