"""Train a DeepSeek-V4 on plain text, on any device: `python train_step.py` trains the debug model
briefly.

    text -> packed rows (training/dataset.py)
         -> one compiled step: losses, gradients, update (compile_config.py, training/optim.py)

Without --init a model begins with random weights and a vocabulary fitted to the text; with it, a
folder in the released layout is trained on. The loss is next-token cross-entropy plus 0.3 times
that of the MTP block (throughout: V4's weight falls to 0.1 with the rate), and 1e-4 times the
routers' balance; router biases follow the load. --index-loss trains the lightning indexers too, by
the recipe of DeepSeek-V3.2: V4's own is not published. (docs/v4.md#training.)

The parts of a run stand in training/. With torchrun several processes share it (parallel.py).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C while modules load: an end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator

import torch

from compile_config import compile_train_step, compiled_as, config_of
from config import CSA_RATIOS
from parallel import Ranks
from tools import cli
from tools.ahead_compiler import AheadCompiler, finish
from tools.ahead_training import AheadStep
from tools.launcher import is_other_rank
from tools.stats import choose_threads, device_sync, peak_flops, peak_memory, process_start
from training import dataset
from training.evaluation import held_out_loss, index_recall, sample_text
from training.flags import parse
from training.losses import LossWeights
from training.metrics import MetricsLog, flops_per_token, plot
from training.resume import Checkpoints, exclusive, unused
from training.setup import build, read_data
from training.stages import Stage

# ----------------------------------------------------------------------------------------------
# The loop


def require_finite(metrics: dict, step: int) -> None:
    """FloatingPointError if the loss or the gradient is not finite."""
    for key in ("loss", "grad_norm"):
        if not math.isfinite(metrics[key]):
            raise FloatingPointError(
                f"the {key} is {float(metrics[key])} at step {step}: choose a lower --lr"
            )


def train(
    # The work of a step
    step: Callable,
    rows: Callable,
    device: torch.device,
    *,
    # Its schedule
    steps: int,
    batch: int,
    rate: Callable[[int], float],
    first: int = 0,
    # Called between steps
    every: int = 10,
    after: Callable[[int, dict], bool] | None = None,
    log: Callable[[dict], None] = print,
) -> float:
    """Run a step from number `first` to `steps` -> seconds, compiling included.

    step   step(tokens, targets, doc_ids, lr) -> metrics, see compile_train_step
    rows   as dataset.Rows
    rate   number of the step -> its learning rate
    after  after(i, metrics) is called when i steps are done, and ends the run by returning True
    log    is given a dict every `every` steps, and for the first and the last one
    """
    begun = time.perf_counter()
    compiled_at = begun
    for i in range(first, steps):
        tensors = [t.to(device) for t in rows(range(i * batch, (i + 1) * batch))]
        lr = rate(i)
        metrics = step(*tensors, torch.tensor(lr, device=device))
        if i == first or i == steps - 1 or i % every == every - 1:
            metrics = {key: value.item() for key, value in metrics.items()}
            require_finite(metrics, i + 1)
            done = i - first  # since the step that compiled
            seconds = time.perf_counter() - compiled_at
            log(
                {
                    "step": i + 1,
                    **metrics,
                    "lr": lr,
                    "tok_per_s": done * batch * rows.length / seconds if done else None,
                    "minutes_left": seconds / done * (steps - 1 - i) / 60 if done else None,
                }
            )
        if i == first:
            device_sync(device)
            compiled_at = time.perf_counter()
        if after is not None and after(i + 1, metrics):
            break
    return time.perf_counter() - begun


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Add up gradients of embeddings and of `ape` in one order, whatever the threads do."""
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # for debugging
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Interrupt:
    """Within it, the first Ctrl-C or SIGTERM sets `stop_requested`; a second one ends the run."""

    def __init__(self, log: Callable[[str], None]):
        self.stop_requested, self.log = False, log

    def _handle(self, number, frame) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
        self.log("interrupted: finishing this step; once more ends at once")

    def __enter__(self) -> Interrupt:
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------
# A run


class Trainer:
    """A run of the command line: `run` sets up, trains each stage, saves, evaluates and reports.

    ranks      the processes that share the run
    first      steps done before, by the run that this one resumes
    last       the step after which this run ends
    stopped    whether the user has ended the run early
    recall     of the indexers, before each stage and at the end
    counts     of steps: eager, compiled
    switched_at   when compiled code took over from eager steps, in seconds of time.time(), or None
    """

    def __init__(self, flags: argparse.Namespace, ranks: Ranks):
        self.flags, self.ranks = flags, ranks
        self.device = torch.device(flags.device)
        self.interrupt = Interrupt(self.log)
        self.stages = [Stage(flags, warmup=True), Stage(flags, warmup=False)]
        self.metrics_log: MetricsLog | None = None
        self.stopped = False
        self.seconds = 0.0
        self.recall: list[float | None] = []
        self.compiler = AheadCompiler()
        self.progress = cli.Progress()
        self.started = process_start()
        self.counts = [0, 0]
        self.switched_at: float | None = None

    def log(self, message: str) -> None:
        print(message, file=sys.stderr if self.flags.json else sys.stdout, flush=True)

    def run(self) -> None:
        """KeyboardInterrupt if the user ended the run early, when its state is saved."""
        folder = self.flags.checkpoints
        resumable_on_cpu = bool(folder) and self.device.type == "cpu"
        try:
            with exclusive(folder if self.ranks.is_main else None), deterministic(resumable_on_cpu):
                self.setup()
                self.run_stages()
        finally:
            self.compiler.stop()

    def run_stages(self) -> None:
        """Train, save the model, evaluate and report."""
        with self.interrupt:
            for stage in self.stages:
                if stage.begin < stage.end and stage.begin < self.last and stage.end >= self.first:
                    self.begin_stage(stage)
                    self.run_stage()
                if self.stopped:
                    raise KeyboardInterrupt
            if self.flags.out:
                self.ranks.save(self.model, self.flags.out, **self.layout)
                self.log(f"saved {self.flags.out}")
        if self.ranks.any(self.interrupt.stop_requested):
            raise KeyboardInterrupt
        self.report(self.evaluate())

    def setup(self) -> None:
        """Build the model, read the data, and find the step that the run goes on from."""
        flags, ranks = self.flags, self.ranks
        self.threads = choose_threads(1 << 28)  # training is compute-bound: every core helps
        model = build(flags, "cpu" if ranks.size > 1 else flags.device).train()
        args = model.args
        has_indexer = set(CSA_RATIOS) & set(args.compress_ratios)
        if (flags.index_loss or flags.index_warmup) and not has_indexer:
            raise ValueError(
                "--index-loss, --index-warmup: this model has no indexer, "
                "which layers of ratio 4 have"
            )
        self.data = ranks.main_first(lambda: read_data(flags, args))
        self.bos = self.data.tokenizer.bos_id
        self.flops = flops_per_token(model, flags.seq_len)
        rows = dataset.Rows(self.data.train, flags.seq_len, self.bos, flags.seed)
        self.rows, self.model = ranks.rows(rows), ranks.shard(model)

        self.layout = {
            "experts": flags.experts,
            "linears": flags.linears,
            "tokenizer": self.data.source,
        }
        self.run_config = {
            "config": args.to_hf(),
            "data": self.data.folder.name,
            "batch": flags.batch,
            "seq_len": flags.seq_len,
            "seed": flags.seed,
            "optimizer": flags.optimizer,
            "dtype": flags.dtype,
            "qat": flags.qat,
            "index_warmup": flags.index_warmup,
            "index_loss": flags.index_loss,
        }
        folder = flags.checkpoints or unused("interrupted")
        self.checkpoints = Checkpoints(folder, flags.keep, ranks)
        self.total = flags.index_warmup + flags.steps
        self.last = min(flags.stop_after or self.total, self.total)
        saved = self.checkpoints.steps() if flags.checkpoints else []
        self.first = saved[-1] if saved else 0
        if self.first > self.last or (self.first == self.last and not flags.out):
            raise ValueError(
                f"--checkpoints {flags.checkpoints}: is already at step {self.first}; "
                "ask for more --steps, or a later --stop-after"
            )
        self.peak = ranks.size * peak_flops(self.device, getattr(torch, flags.dtype))

    def begin_stage(self, stage: Stage) -> None:
        """Make the optimizer and the compiled step of a stage; resume a run that has begun it."""
        flags, ranks = self.flags, self.ranks
        self.stage = stage
        for name, p in self.model.named_parameters():
            p.requires_grad_(stage.trains(name))
        self.optimizer = ranks.optimizer(self.model, flags.optimizer, clip=flags.clip)
        if stage.begin < self.first:
            self.checkpoints.load(self.model, self.optimizer, self.run_config)
            self.log(f"going on from {self.checkpoints.path(self.first)}")
        self.compiled_step = compile_train_step(
            self.model,
            self.optimizer,
            ranks.preset(config_of(flags.preset)),
            weights=LossWeights(index=flags.index_loss or 1.0),
            aux=stage.aux,
            micro_batch=flags.micro_batch,
            recompute=flags.recompute,
            all_reduce_sum=ranks.all_reduce_sum,
            wrap_block=ranks.wrap_block,
            compiler=self.compiler,
        )
        if self.metrics_log is None:  # not before: a refused run leaves the file alone
            self.metrics_log = MetricsLog(
                flags.metrics if ranks.is_main else None,
                self.first,
                self.total,
                self.peak,
                self.flops,
                self.device,
                self.log,
            )
        self.evaluate_indexers()

    def compile(self) -> None:
        """Begin to compile the stage's step, or say that its first call will.

        Runs with --checkpoints wait for it, so that a resumed one has the same steps.
        """
        step, batch = self.compiled_step, range(self.flags.batch)
        if not isinstance(step, AheadStep):
            if config_of(self.flags.preset).backend:
                self.log("compiling the step, which takes minutes the first time")
            return
        if step.prepare(*self.rows(batch)).loaded:
            return
        if not self.flags.checkpoints:
            self.log("compiling in another process; steps run eagerly until it has finished")
            return
        self.log("compiling first, which takes minutes; the next run finds what this one made")
        self.compiler.use_all_cores()
        self.compiler.wait(self.show_compiler)
        self.progress("")

    def show_compiler(self) -> None:
        if self.interrupt.stop_requested:
            raise KeyboardInterrupt
        if sys.stderr.isatty():
            self.progress(f" {self.compiler.progress()}")

    def run_stage(self) -> None:
        """Train until the stage or the run ends, or the user stops it."""
        try:
            self.compile()
            self.seconds += train(
                self.step,
                self.rows,
                self.device,
                steps=min(self.stage.end, self.last),
                batch=self.flags.batch,
                rate=self.stage.rate,
                first=max(self.stage.begin, self.first),
                after=self.after_step,
                log=self.metrics_log,
            )
        except RuntimeError:
            if not self.interrupt.stop_requested:
                raise
            # The signal has also ended a C++ compiler that this process had started.
            raise KeyboardInterrupt from None

    def step(self, tokens, targets, doc_ids, lr) -> dict[str, torch.Tensor]:
        """One step, see compile_train_step."""
        try:
            metrics = self.compiled_step(tokens, targets, doc_ids, lr)
        except torch.OutOfMemoryError:
            raise ValueError(
                "the GPU's memory does not hold a step: "
                "choose a smaller --micro-batch, or --recompute full"
            ) from None
        self.count_step()
        return metrics

    def count_step(self) -> None:
        """As eager or compiled; say when that changes, or will not."""
        compiled = config_of(self.flags.preset).backend is not None
        if isinstance(self.compiled_step, AheadStep):
            compiled = self.compiled_step.ran_compiled
            if compiled and self.counts[0] and self.switched_at is None:
                self.switched_at = time.time()
                self.log("compiled code takes over")
            if self.compiler.error:
                print(self.compiler.error, file=sys.stderr)
                self.compiler = AheadCompiler()  # of the next stage
        self.counts[compiled] += 1

    def after_step(self, done: int, metrics: dict) -> bool:
        """Save if it is time to; True ends the run."""
        flags = self.flags
        self.stopped = self.ranks.any(self.interrupt.stop_requested)
        due = done % flags.save_every == 0 or done in (self.stage.end, self.last)
        if self.stopped or (flags.checkpoints and due):
            require_finite(metrics, done)
            self.save(done)
        return self.stopped

    def save(self, done: int) -> None:
        """A checkpoint; if the run ends with it, the user is told how to go on."""
        path = self.checkpoints.save(
            self.model, self.optimizer, done, self.run_config, **self.layout
        )
        if not self.stopped:
            return
        message = f"saved {path}"
        if done < self.last or self.flags.out:
            message += (
                f"; the same command with --checkpoints {self.checkpoints.folder} "
                "goes on from there"
            )
        self.log(message)

    def evaluate_indexers(self) -> None:
        if not (self.flags.index_loss or self.flags.index_warmup):
            return
        recall = index_recall(self.model, self.data.held_out, self.flags.seq_len, self.bos)
        self.recall.append(recall)
        if recall is None:
            self.log("indexers: rows are too short for a choice")
        else:
            self.log(f"indexers choose {100 * recall:.0f} % of the entries attended to most")

    def evaluate(self) -> float:
        """Held-out loss, nats per token: of short runs, on as much text as they read."""
        self.evaluate_indexers()
        flags = self.flags
        return held_out_loss(
            self.model,
            self.data.held_out[: max(self.trained_tokens, 2 * flags.seq_len)],
            flags.seq_len,
            flags.batch // self.ranks.size,
            self.bos,
        )

    @property
    def trained_tokens(self) -> int:
        """Tokens that this run has read."""
        return (self.last - self.first) * self.flags.batch * self.flags.seq_len

    def report(self, loss: float) -> None:
        """Tell the results, plot the losses, and draw a sample. loss: held out."""
        flags, data = self.flags, self.data
        history = self.metrics_log.history if self.metrics_log else []
        newest = history[-1] if history else {}
        report = {
            "steps": self.last,
            "tokens": self.trained_tokens,
            "seconds": self.seconds,
            "held_out_loss": loss,
            "held_out_nats_per_char": loss * len(data.held_out) / data.held_out_chars,
            "loss": newest.get("loss"),
            "mtp_loss": newest.get("mtp_loss"),
            "index_loss": newest.get("index_loss"),
            "tok_per_s": newest.get("tok_per_s"),
            "share_of_peak": newest.get("share_of_peak"),
            "index_recall": self.recall or None,
            "memory_bytes": peak_memory(self.device),
            "eager_steps": self.counts[0],
            "compiled_steps": self.counts[1],
            "switched_at": self.switched_at and self.switched_at - self.started,
            "preset": flags.compile or flags.preset,
            "compiled_as": compiled_as(flags.preset, self.counts[1] > 0),
            "threads": self.threads,
            "device": flags.device,
            "torch": torch.__version__,
        }
        self.log(
            f"held out: {loss:.3f} nats per token, "
            f"{report['held_out_nats_per_char']:.3f} per character; "
            f"peak memory {report['memory_bytes'] / 2**20:,.0f} MiB"
        )
        if flags.plot and self.ranks.is_main:
            plot(history, flags.plot)
            self.log(f"drew {flags.plot}")
        report["sample"] = sample_text(
            self.model, data.tokenizer, "KING RICHARD.\n", 160, flags.seed
        )
        self.log(f"\n{report['sample']}")
        sys.stdout.flush()
        finish(self.compiler, flags.no_wait)
        if flags.json:
            print(json.dumps(report))


# ----------------------------------------------------------------------------------------------
# Command line


def run(argv: list[str] | None) -> None:
    flags = parse(argv)
    with Ranks(flags.device, flags.batch, flags.ep) as ranks:
        Trainer(flags, ranks).run()


def main(argv: list[str] | None = None) -> int:
    """The command line -> 0; 2 after a one-line message on bad input; 130 when interrupted.

    Of several processes the first one speaks.
    """
    if not is_other_rank():
        return cli.main("train_step.py", run, argv, outlives_reader=True)
    with (
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        return cli.main("train_step.py", run, argv, outlives_reader=True)


if __name__ == "__main__":
    sys.exit(main())
