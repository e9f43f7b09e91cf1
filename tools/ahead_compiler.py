"""A process that compiles phases ahead of time while this one generates.

tools/ahead_worker.py is that process, tools/ahead.py the folder where it keeps what it made.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

import ops
from tools import ahead, cli
from tools.compile_cache import ROOT, WORK_PREFIX, discard_unfinished
from tools.torch_private import cache_dir, unusable_folder

USUAL_SECONDS = 15.0  # of a part
WITHOUT = "running without torch.compile, which needs"


class Job(NamedTuple):
    """A phase to compile, as another process can build it.

    source      digest of the project's code
    settings    of the phase: its CompileConfig, its name, what else it is made of
    model       ModelArgs, modes of its ops, cache_size, classes of its modules
    tensors     {name: (is a parameter, shape, strides, dtype)}
    call        the arguments: (shape, dtype) of tensors, other values as they are
    parts       their names
    libraries   of C++ kernels
    """

    key: str
    source: str
    settings: tuple
    model: tuple
    tensors: dict[str, tuple]
    call: list
    parts: list[str]
    libraries: list[str]
    threads: int
    deterministic: bool

    @classmethod
    def of(
        cls,
        model: nn.Module,
        settings: tuple,
        call: Sequence,
        parts: list[str],
        kernels: str,
        skip: tuple[str, ...] = ("mtp.",),
    ) -> Job:
        """kernels: the phase as ops.cpu_kernels names it; skip: submodules it does not read."""
        libraries: dict[str, None] = {}
        if next(model.parameters()).dtype == torch.float32:
            found = ops.cpu_kernels(model.ops, kernels)
            libraries = dict.fromkeys(kernel.library for kernel in found)
        described = tuple(
            f"{x.__module__}.{x.__qualname__}" if callable(x) else x for x in settings
        )
        specs = ahead.tensor_specs(model, skip)
        return cls(
            ahead.phase_key(model, described, call, specs),
            ahead.cache_key()["source"],
            settings,
            (model.args, dict(model.ops.modes), model.cache_size, ahead.module_types(model)),
            specs,
            ahead.shapes(call),
            list(dict.fromkeys(parts)),
            list(libraries),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )

    @property
    def name(self) -> str:
        return self.settings[1]


class AheadRun:
    """run(*args) of a phase: by `eager` until its parts are there.

    load        load(job) -> run(*args), compiled
    compiled    whether the last call ran compiled code
    """

    def __init__(self, job: Job, load: Callable, eager: Callable, compiler: AheadCompiler | None):
        self.job, self.load = job, load
        self.eager = eager
        self.compiled = self.failed = False
        self.compiler = compiler or AheadCompiler()
        self.loaded: Callable | None = None
        if not ahead.missing(job.key, job.parts, job.libraries):
            self._load()
        if self.loaded is None:
            self.compiler.request(job)
            if compiler is None:
                self.compiler.use_all_cores()
                self.compiler.wait()
                if self.compiler.error:
                    print(self.compiler.error, file=sys.stderr)

    def __call__(self, *args):
        if self.loaded is None and not self.failed and self.compiler.is_ready(self.job.key):
            self._load()
            self.failed = self.loaded is None
        self.compiled = self.loaded is not None
        return self.loaded(*args) if self.compiled else self.eager(*args)

    def _load(self) -> None:
        try:
            self.loaded = self.load(self.job)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"compiled code is not used: {error}".splitlines()[0], file=sys.stderr)


class AheadCompiler:
    """Compiles the jobs that it is given, in order, in a process of low priority.

    It leaves a core free until `use_all_cores`. error: why it gave up, in one line, or None.
    The process ends with this one, however this one ends.
    """

    def __init__(self):
        self.error: str | None = None
        self._waiting: list[Job] = []
        self._known: set[str] = set()  # keys of jobs
        self._ready: set[str] = set()
        self._process: subprocess.Popen | None = None
        self._started = self._seconds = 0.0  # of the process; that earlier ones ran
        self._output = b""
        self._all_cores = self._stopping = False
        # of the current process: tasks to do, what is being done since when, what it should take
        self._tasks: list[str] = []
        self._count = 0
        self._running: dict[str, float] = {}
        self._expected: dict[str, float] = {}

    def request(self, job: Job) -> None:
        """Compile a phase, unless that was asked before."""
        if job.key not in self._known:
            self._known.add(job.key)
            self._waiting.append(job)

    def is_ready(self, key: str) -> bool:
        """Whether a phase was compiled. Reads what the process says, starts it if need be."""
        self._advance(0.0)
        return key in self._ready

    @property
    def busy(self) -> bool:
        """Whether something is being compiled, or will be."""
        self._advance(0.0)
        return self._process is not None

    @property
    def seconds(self) -> float:
        """That its processes ran."""
        running = time.monotonic() - self._started if self._process else 0.0
        return self._seconds + running

    def use_all_cores(self) -> None:
        """Nothing else wants them any more."""
        self._all_cores = True
        self._send(b"all cores\n")

    def seconds_left(self) -> float:
        """About how long it will take, by the last time, or by what is usual.

        Waits, some seconds, until the process has said what there is to do.
        """
        while not self._count and self.busy:
            self._advance(1.0)
        now = time.monotonic()
        expected = {name: self._expected.get(name, USUAL_SECONDS) for name in self._tasks}
        spent = sum(min(now - begun, expected[name]) for name, begun in self._running.items())
        return (sum(expected.values()) - spent) / max(1, len(self._running))

    def progress(self) -> str:
        """What compiles now: "decode, layer kind 3: 4 s; 7 of 12 done, about 41 s to go"."""
        now = time.monotonic()
        running = [f"{name}: {now - begun:.0f} s" for name, begun in self._running.items()]
        done = self._count - len(self._tasks)
        still = f"{done} of {self._count} done, about {self.seconds_left():.0f} s to go"
        return f"{', '.join(running)}; {still}" if running else still

    def wait(self, tick: Callable[[], None] = lambda: None) -> None:
        """Until nothing is left to compile; tick() is called about once a second."""
        while self.busy:
            tick()
            self._advance(1.0)

    def stop(self) -> None:
        """Drop what is unfinished; the process is gone when this returns."""
        self._waiting.clear()
        if self._process is not None:
            self._stopping = True
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            self._end()
            self._stopping = False

    # ----------------------------------------------------------------------------------------------

    def _advance(self, seconds: float) -> None:
        """Start the process if there is work; take what it says, waiting for it at most so long."""
        if self._process is None:
            if not self._waiting or self.error:
                return
            self._start()
        while self._process and select.select([self._process.stdout], [], [], seconds)[0]:
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                self._end()
                return
            *lines, self._output = (self._output + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            seconds = 0.0

    def _start(self) -> None:
        jobs, self._waiting = self._waiting, []
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": str(jobs[0].threads),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }
        try:
            env["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir())
            with tempfile.TemporaryFile(dir=cache_dir()) as file:
                # Not by a pipe: it would be full until the other side has imported torch.
                pickle.dump(jobs, file)
                file.seek(0)
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "tools.ahead_worker", str(file.fileno())],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[file.fileno()],
                    env=env,
                    start_new_session=True,  # Ctrl-C is this process's
                )
        except OSError as error:
            self.error = f"{WITHOUT} {unusable_folder(error)}"
            return
        self._output, self._started = b"", time.monotonic()
        if self._all_cores:
            self.use_all_cores()

    def _send(self, data: bytes) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(data)

    def _take(self, event: dict) -> None:
        """What the process says: one of these."""
        if "tasks" in event:
            self._tasks, self._expected = event["tasks"], event["expected"]
            self._count = len(self._tasks)
        elif "begun" in event:
            self._running[event["begun"]] = time.monotonic()
        elif "done" in event:
            self._running.pop(event["done"], None)
            self._tasks.remove(event["done"])
        elif "ready" in event:
            self._ready.add(event["ready"])
        elif "error" in event:
            self.error = event["error"]

    def _end(self) -> None:
        """Of the process: take its last children with it, if it was killed."""
        process, self._process = self._process, None
        if process.returncode != 0:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        self._seconds += time.monotonic() - self._started
        process.stdin.close()
        process.stdout.close()
        left = ahead.store() / f"{WORK_PREFIX}{process.pid}"
        if left.exists():  # it was killed
            with contextlib.suppress(OSError):
                shutil.rmtree(left, ignore_errors=True)
                discard_unfinished()
        if code and not self.error and not self._stopping:
            self.error = f"the compiling process ended with exit code {code}"
        self._tasks, self._running = [], {}
        self._count = 0


def finish(compiler: AheadCompiler, no_wait: bool) -> None:
    """At the end of a run: wait until all is compiled for the next one; not with no_wait, and until
    Ctrl-C.
    """
    show = cli.Progress()
    try:
        if no_wait or not compiler.busy:
            return
        compiler.use_all_cores()
        seconds = compiler.seconds_left()
        if not compiler.error:
            print(
                f"compiled code will be ready in about {seconds:.0f} s for the next time "
                "(Ctrl-C leaves)",
                file=sys.stderr,
            )
        if sys.stderr.isatty():
            compiler.wait(lambda: show(f" {compiler.progress()}"))
        else:
            compiler.wait()
    except KeyboardInterrupt:
        pass
    finally:
        show("")
        compiler.stop()
        if compiler.error:
            print(compiler.error, file=sys.stderr)
