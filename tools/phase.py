"""A phase of generation, compiled: by this process, or ahead of time by another one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from model import Transformer
from ops.registry import require
from tools import ahead, compile_cache, torch_private
from tools.ahead_compiler import AheadCompiler, AheadRun, Job
from tools.compile_function import (
    CompileConfig,
    build_cpu_kernels,
    compile_function,
    compiles_by_layer,
)
from tools.cuda_graph import clone_tensors, record_cuda_graph
from tools.layer_graphs import compile_layers


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
        self.hooks = torch_private.hook_dicts(model)
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

        require(
            not any(self.hooks[:4]),
            "hooks of all modules are not compiled: remove them, or use preset eager",
        )
        if not compiles_by_layer(self.model, self.cfg, self.name):
            return compiled(self.whole)
        require(
            not (self.model._forward_hooks or self.model._forward_pre_hooks),
            "a hook of the whole model is not called where layers are compiled one by one: remove "
            "it, or use preset eager",
        )
        first, last = compiled(embed, "_embed"), compiled(self.head, "_head")
        layers = compile_layers(self.model.layers, lambda: compiled(layer, "_layer"))

        def by_layer(tokens, input_pos, lengths, *rest):
            tokens, plan, X = first(self.model, tokens, input_pos, lengths)
            for block, run in layers.items():
                X = run(block, X, tokens, plan)
            return last(self.model, X, plan, input_pos, lengths, *rest)

        return by_layer

    @property
    def graphs_loaded(self) -> int:
        """Graphs in use that were compiled ahead of time."""
        runs = [run for run in self.built.values() if isinstance(run, AheadRun)]
        return sum(len(run.job.parts) for run in runs if run.loaded is not None)

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

    def _build_ahead(self, args: Sequence) -> AheadRun:
        """-> run(...) of code that was compiled ahead of time, or will be."""
        settings = self.cfg, self.name, self.logits, self.epilogue
        names = [part.name for part in self.parts()]
        job = Job.of(self.model, settings, args, names, self._kernels)
        return AheadRun(job, self._load, self.whole, self.compiler)

    def _load(self, job: Job) -> Callable:
        """-> run(...) of compiled parts. They take tensors only: what else there is was compiled
        in.
        """
        folders = ahead.load(job.key, job.parts, job.libraries)
        runs = {name: ahead.open_library(folder) for name, folder in folders.items()}
        first, *layers, last = (ahead.Library(runs[part.name], part) for part in self.parts())

        def by_part(tokens, input_pos, lengths, *rest):
            positions = [input_pos] if lengths is None else [input_pos, lengths]
            rest = [a for a in rest if isinstance(a, torch.Tensor)]
            tokens, *plan, X = first(tokens, *positions)
            for layer in layers:
                (X,) = layer(X, tokens, *plan)
            results = last(X, *plan, *positions, *rest)
            return results[0] if len(results) == 1 else tuple(results)

        return by_part

    def parts(self) -> list[ahead.Part]:
        """What is compiled ahead of time, in the order of calls."""
        layers = compile_layers(self.model.layers, itertools.count(1).__next__)
        return [
            ahead.Part("embed", self.model, embed),
            *(ahead.Part(f"layer kind {i}", block, layer) for block, i in layers.items()),
            ahead.Part("head", self.model, self.head),
        ]


def only_logits(logits: torch.Tensor, *rest) -> torch.Tensor:
    """The epilogue of a phase that has no other."""
    return logits
