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
import runpy
import sys
from collections.abc import Callable

import torch

from model import Aux, Transformer
from tools import cli, compile_cache, torch_private
from tools.ahead_compiler import WITHOUT, AheadCompiler
from tools.ahead_training import AheadStep, has_hooks
from tools.compile_function import (
    CompileConfig,
    build_cpu_kernels,
    call_forward,
    compile_function,
    compiles_by_layer,
)
from tools.layer_graphs import compile_layers
from tools.phase import Phase
from training.losses import LossWeights, combine_losses, make_targets, training_loss
from training.optim import Optimizer
from training.recompute import checkpoint_blocks, checkpointed
from training.step import TrainStep

AUTOTUNE = (("max_autotune", True), ("coordinate_descent_tuning", True))
AUTO = CompileConfig(ahead=True)
PRESETS = {
    "eager": CompileConfig(backend=None),
    "default": CompileConfig(),
    "cudagraphs": CompileConfig(cudagraphs=True),
    "regional": CompileConfig(region="layer"),
    "max-autotune": CompileConfig(cudagraphs=True, options=AUTOTUNE),
}


CHOICES = ("auto", *PRESETS)  # values of --compile, and of Engine's config


def config_of(choice: str) -> CompileConfig:
    """ "auto" or a preset's name -> CompileConfig. ValueError if it is neither."""
    if choice not in CHOICES:
        raise ValueError(f"preset {choice!r}: choose from {', '.join(CHOICES)}")
    return AUTO if choice == "auto" else PRESETS[choice]


def usable_preset(asked: str | None, default: str, device: str) -> str:
    """The preset asked for, or the default; or "auto", for CPU.

    Where code for CPU cannot be compiled: "eager" in place of the default; a ValueError if asked.
    "auto" finds that out as it runs; on other devices it is "default".
    """
    name = asked or default
    if name == "auto":
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


def compiled_as(preset: str, ran_compiled: bool) -> str:
    """The preset whose code ran, for reports: that of "auto" is compiled by layer."""
    if preset != "auto":
        return preset
    return "regional" if ran_compiled else "eager"


# --------------------------------------------------------------------------------------------------
# Generation


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


def can_compile_ahead(model: Transformer, optimizer) -> bool:
    """Whether another process can know all that a step of training is made of."""
    on_cpu = model.embed.weight.device.type == "cpu"
    return on_cpu and not has_hooks(model) and type(optimizer) is Optimizer


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
    # Presets that compile ahead of time
    compiler: AheadCompiler | None = None,
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
    compiler        as of a Phase; where it does not know a step (on other devices, with another
                    loss or optimizer, recomputation or wrap_block), this process compiles by layer
    """
    if cfg.ahead:
        plain = loss is None and recompute == "none" and wrap_block is None
        if plain and can_compile_ahead(model, optimizer):
            return AheadStep(
                model, optimizer, cfg, weights, aux, micro_batch, all_reduce_sum, compiler
            )
        cfg = dataclasses.replace(cfg, ahead=False, region=None if loss else "layer")
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
    hooks = torch_private.hook_dicts(model) if cfg.backend else ()
    return TrainStep(model, optimizer, loss, prepare, micro_batch, all_reduce_sum, hooks)


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
