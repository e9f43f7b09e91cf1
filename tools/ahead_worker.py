"""The process that compiles phases ahead of time: `AheadCompiler` starts and reads it.

Its argument: the descriptor of a file of pickled jobs. Standard input: "all cores" when nothing
else wants them; its end is the end of the work, whatever ended the other side. Standard output: a
JSON object a line.

Parts are compiled side by side, each in a forked process that has Inductor imported already.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import importlib
import json
import os
import pickle
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model import Transformer, call
from ops.cpp import source
from tools import ahead, cli
from tools.ahead_compiler import WITHOUT, Job
from tools.ahead_parts import compile_joint, compile_kernels, compile_part, compile_update
from tools.ahead_training import UPDATE, Settings, arguments, training_parts
from tools.compile_cache import JOURNAL, WORK_PREFIX, cache_key
from tools.phase import Phase
from tools.torch_private import missing_cpu_toolchain
from training.losses import make_targets, training_loss
from training.optim import Optimizer

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Task(NamedTuple):
    """One part to compile. build(folder) leaves code.so there, and code.json if it needs it."""

    name: str
    key: str
    part: str
    build: Callable[[Path], None]


# --------------------------------------------------------------------------------------------------
# Jobs


def fake_model(job: Job, fake: FakeTensorMode) -> Transformer:
    """The model of a job, of fake tensors."""
    args, modes, cache_size, types = job.model
    with torch.device("meta"):
        model = Transformer(args, modes).eval()
    if ahead.module_types(model) != types:
        raise ValueError("the model is not that of model.py")
    for name, (is_parameter, shape, strides, dtype) in job.tensors.items():
        prefix, _, key = name.rpartition(".")
        owner = model.get_submodule(prefix)
        with fake:
            t = torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
        if is_parameter:
            owner.register_parameter(key, nn.Parameter(t, requires_grad=False))
        else:
            owner.register_buffer(key, t, persistent=False)
    model.cache_size = cache_size
    return model


def needs(job: Job) -> list[tuple[str, str]]:
    """The keys and names of the parts of a job."""
    libraries = [(ahead.library_key(source(library)), "kernels") for library in job.libraries]
    return libraries + [(job.key, part) for part in job.parts]


def tasks_of(job: Job) -> Iterator[Task]:
    """What makes the parts of a job, kernels of ops first."""
    for library in job.libraries:
        text = source(library)
        build = functools.partial(compile_kernels, library, text)
        yield Task(f"kernels {library}", ahead.library_key(text), "kernels", build)

    fake = FakeTensorMode()
    model = fake_model(job, fake)
    with fake:
        call = [torch.empty(a[0], dtype=a[1]) if isinstance(a, tuple) else a for a in job.call]
        if job.name == "train":
            tasks = training_tasks(model, *job.settings[2:], *call)
        else:
            tasks = phase_tasks(Phase(model.eval(), *job.settings), *call)
    for name, build in tasks.items():
        yield Task(f"{job.name}, {name}", job.key, name, build)


def phase_tasks(phase: Phase, tokens, input_pos, lengths, *rest) -> dict[str, Callable]:
    """name -> build(folder) of the parts of a phase of generation."""
    with torch.no_grad():
        first, *layers, last = phase.parts()
        streams = first.function(first.module, tokens, input_pos, lengths)
    calls = {first.name: (first, (tokens, input_pos, lengths))}
    tokens, plan, X = streams
    calls |= {part.name: (part, (X, tokens, plan)) for part in layers}
    calls[last.name] = last, (X, plan, input_pos, lengths, *rest)
    level = "O0" if phase.name == "prefill" else "O1"  # where kernels are small it counts
    return {
        name: functools.partial(compile_part, part, args, level)
        for name, (part, args) in calls.items()
    }


def training_tasks(
    model: Transformer, settings: Settings, tokens, labels, doc_ids
) -> dict[str, Callable]:
    """name -> build(folder) of the parts of a training step: a step on fake tensors shows them."""
    model.train()
    for name, p in model.named_parameters():
        p.requires_grad_(name in settings.trained)
    optimizer = Optimizer(model, **settings.optimizer)
    parts, calls = training_parts(model), {}

    def record(function: Callable, *args):
        calls.setdefault(parts[function].name, (parts[function], arguments(function, args)))
        return call(function, *args)

    targets = make_targets(tokens, labels, doc_ids)
    weights, aux = settings.weights, settings.aux
    total, metrics = training_loss(model, tokens, targets, doc_ids, weights, aux, record)
    tasks = {name: functools.partial(compile_joint, *call) for name, call in calls.items()}
    reached = reached_by(total)
    grads = {
        name: torch.empty_like(p)
        for name, p, *_ in (*optimizer.muon, *optimizer.adam)
        if p in reached
    }
    load = metrics.get("load")
    return tasks | {UPDATE: functools.partial(compile_update, optimizer, grads, load)}


def reached_by(loss: torch.Tensor) -> set[torch.Tensor]:
    """The parameters that a loss has gradients for.

    Without a backward, after which no forked process could make one: its threads are not forked.
    """
    found, seen = set(), set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


# --------------------------------------------------------------------------------------------------
# The process


def say(**event) -> None:
    print(json.dumps(event), flush=True)


class Worker:
    """Runs tasks side by side until they are done or standard input ends."""

    def __init__(self, work: Path, jobs: list[Job], tasks: list[Task]):
        self.work = work
        self.waiting = tasks
        self.lacking = {job.key: needs(job) for job in jobs}  # parts that are not there yet
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        self.at_once = max(1, self.cores - 1)
        self.running: dict[int, tuple[Task, Path, float]] = {}
        self.seconds: dict[str, float] = {}

    def run(self) -> None:
        """A ChildProcessError for a task that failed; EOFError if the other side is gone."""
        self._report()
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self.at_once:
                self._start(self.waiting.pop(0))
            self._listen(0.05)
            self._reap()

    def _report(self) -> None:
        """Say which jobs have all that they need."""
        for job, parts in list(self.lacking.items()):
            if all(ahead.is_kept(*part) for part in parts):
                say(ready=job)
                del self.lacking[job]

    def _start(self, task: Task) -> None:
        folder = Path(tempfile.mkdtemp(dir=self.work))
        say(begun=task.name)
        child = os.fork()
        if child:
            self.running[child] = task, folder, time.monotonic()
            return
        code = 1
        try:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            (folder / "made").mkdir()
            task.build(folder / "made")
            ahead.keep(folder / "made", task.key, task.part)
            code = 0
        except BaseException as error:
            line = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            (folder / "error").write_text(cli.lacking_resource(error) or line)
        finally:
            os._exit(code)

    def _reap(self) -> None:
        while self.running:
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                return
            task, folder, begun = self.running.pop(child)
            if status:
                error = folder / "error"
                reason = error.read_text() if error.exists() else f"ended with status {status}"
                raise ChildProcessError(f"{task.name}: {reason}")
            shutil.rmtree(folder, ignore_errors=True)
            self.seconds[task.name] = round(time.monotonic() - begun, 1)
            say(done=task.name)
            self._report()

    def _listen(self, seconds: float) -> None:
        if select.select([0], [], [], seconds)[0]:
            data = os.read(0, 4096)
            if not data:
                raise EOFError
            if b"all cores" in data:
                self.at_once = self.cores

    def kill(self) -> None:
        """All tasks, with the compilers that they started: they are in this process's group."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)
        for child in self.running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A folder for what is unfinished, locked while this process lives; others' leftovers go."""
    ahead.store().mkdir(parents=True, exist_ok=True)
    ahead.sweep()
    folder = ahead.store() / f"{WORK_PREFIX}{os.getpid()}"
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def expected_seconds() -> dict[str, float]:
    """What tasks took the last time."""
    try:
        found = dict(json.loads((ahead.store() / "seconds.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}
    return {name: s for name, s in found.items() if isinstance(s, int | float)}


def import_inductor() -> None:
    """Once, before the tasks fork."""
    importlib.import_module("torch._inductor.codegen.cpp_wrapper_cpu")
    importlib.import_module("torch._inductor.compile_fx")
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    pick_vec_isa()  # compiles a probe


def run(work: Path, jobs: list[Job]) -> None:
    torch.set_num_threads(jobs[0].threads)
    torch.use_deterministic_algorithms(jobs[0].deterministic, warn_only=True)
    lacks = missing_cpu_toolchain(work)
    if lacks:
        raise ValueError(f"{WITHOUT} {lacks}")
    if any(job.source != cache_key()["source"] for job in jobs):
        raise ValueError("the source has changed since the program started: start it again")
    tasks = {(task.key, task.part): task for job in jobs for task in tasks_of(job)}
    todo = [task for part, task in tasks.items() if not ahead.is_kept(*part)]
    say(tasks=[task.name for task in todo], expected=expected_seconds())
    import_inductor()
    worker = Worker(work, jobs, todo)
    # Compilers leave their temporary files where they are killed: in the work folder.
    os.environ["TMPDIR"] = tempfile.tempdir = str(work)
    try:
        worker.run()
    finally:
        worker.kill()
        ahead.write_text("seconds.json", json.dumps(expected_seconds() | worker.seconds))
    ahead.prune()


def main(descriptor: int) -> int:
    """Compile the jobs of an open file. SIGTERM ends it as the end of standard input does."""

    def end(*args):
        raise EOFError

    signal.signal(signal.SIGTERM, end)
    os.nice(19)
    with contextlib.suppress(OSError):  # Linux shares cores between sessions first
        Path("/proc/self/autogroup").write_text("19")
    try:
        with open(descriptor, "rb") as file:
            jobs = pickle.load(file)
        with work_folder() as work, JOURNAL.compiling():
            run(work, jobs)
    except EOFError:
        return 0
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        say(error=cli.lacking_resource(error) or lines[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
