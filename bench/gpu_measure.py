"""How the GPU suite measures: sides take turns on the same inputs, device events tell the time, fp64 tells the error.

A row is one function at one shape: ours first, then baselines, each on the same inputs in the same process, A/B/A/B. Inputs
are random and rotate, so that together they exceed the L2 cache. Times are medians of device events; what takes less than
0.1 ms is captured into a CUDA graph of many calls. A baseline that cannot run is listed with its error.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from typing import Callable, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

BF16_RATE, BANDWIDTH = (
    790e12,
    4.3e12,
)  # FLOP/s and bytes/s that an H200 reaches on random data: what floors are made of
L2 = 60e6
CASES: dict[str, "Case"] = {}


class Case(NamedTuple):
    """seconds: what it should take, measured; parts: gigabytes of GPU memory by what is compiled apart; ops: whose kernels it runs."""

    run: Callable[["Bench"], None]
    title: str
    seconds: float
    parts: dict[str, float]
    ops: tuple[str, ...]


def case(
    name: str, title: str, seconds: float, parts: float | dict[str, float], *ops: str
) -> Callable:
    """Register a function of a Bench as a case. parts: gigabytes, of the whole or by name of a part."""

    def add(run):
        CASES[name] = Case(
            run, title, seconds, parts if isinstance(parts, dict) else {"": parts}, ops
        )
        return run

    return add


class Skipped(Exception):
    """A side that cannot take part here, and why."""


class Side(NamedTuple):
    """One contender. made: it has code that the warm phase compiles; graph: it may be captured into a CUDA graph."""

    call: Callable
    made: bool = False
    graph: bool = True


def tensors(x) -> list[torch.Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


def nbytes(*x) -> int:
    return sum(t.nbytes for t in tensors(x))


def double(args):
    """The same values in fp64, cut from any graph; integers as they are."""
    cast = lambda t: (
        t.detach().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
    )
    return tree_map(cast, args)


def both(function: Callable, wrt: tuple[int, ...]) -> Callable:
    """Forward and backward: call(*args, g) -> gradients of the arguments `wrt` from those of the results."""

    def call(*args):
        *args, g = args
        with torch.enable_grad():
            return torch.autograd.grad(function(*args), [args[i] for i in wrt], g)

    return call


def backward_of(function: Callable, wrt: tuple[int, ...]) -> Side:
    """Backward alone, of a forward that is run once per set of inputs."""
    kept = {}

    def call(*args):
        *args, g = args
        with torch.enable_grad(), torch._functorch.config.patch(donated_buffer=False):
            if g.data_ptr() not in kept:
                kept[g.data_ptr()] = function(*args)
            return torch.autograd.grad(
                kept[g.data_ptr()], [args[i] for i in wrt], g, retain_graph=True
            )

    return Side(call, made=True, graph=False)


def against(exact: Callable[[], tuple], pick: Callable = lambda out: out) -> Callable:
    """Judge results by their distance from exact(); pick chooses of a side's results what exact() has."""
    kept = []

    def judge(out) -> dict:
        if not kept:
            kept.extend(t.double() for t in tensors(exact()))
        pairs = [(a.detach().double(), b) for a, b in zip(tensors(pick(out)), kept, strict=True)]
        errors = [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]
        return {
            "error": max(errors),
            "errors": errors,
            "max_error": max(float((a - b).abs().max()) for a, b in pairs),
        }

    return judge


class Bench:
    """What a case measures with. toy: tiny sizes on CPU, to exercise the code; prepare: compile only, for the warm phase."""

    def __init__(
        self, toy: bool = False, prepare: bool = False, part: str = "", deadline: float = math.inf
    ):
        self.toy, self.prepare, self.part, self.deadline, self.rows = (
            toy,
            prepare,
            part,
            deadline,
            {},
        )
        self.device = torch.device("cpu" if toy else "cuda")
        self.random = torch.Generator(self.device).manual_seed(0)

    def at(self, real, toy):
        """A size: the real one, or the toy one."""
        return toy if self.toy else real

    def normal(
        self,
        *shape: int,
        dtype: torch.dtype = torch.bfloat16,
        scale: float = 1.0,
        grad: bool = False,
    ) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device).normal_(
            0, scale, generator=self.random
        )
        return x.requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.random, device=self.device)

    def sets(self, make: Callable[[], tuple]) -> list[tuple]:
        """Inputs made as often as it takes to exceed the L2 cache."""
        first = make()
        return [first] + [
            make()
            for _ in range(
                1
                if self.toy
                else 0
                if self.prepare
                else min(63, math.ceil(2 * L2 / max(nbytes(first), 1)) - 1)
            )
        ]

    def compiled(self, function: Callable, whole: bool = True, graph: bool = True) -> Side:
        """torch.compile of a function, static shapes."""
        return Side(
            torch.compile(
                function,
                fullgraph=whole,
                dynamic=False,
                backend="eager" if self.toy else "inductor",
            ),
            True,
            graph,
        )

    def wants(self, part: str) -> bool:
        """Whether this part of a case is to be run."""
        return self.part in ("", part)

    def free(self) -> None:
        """Give back memory and compiled code that nothing uses any more."""
        gc.collect()
        torch._dynamo.reset()
        if not self.toy:
            torch.cuda.empty_cache()

    def sync(self) -> None:
        if not self.toy:
            torch.cuda.synchronize()

    def shot(self, call: Callable) -> float:
        """Milliseconds on the device of one call; the host gets a head start."""
        if self.toy:
            begun = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begun)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def captured(self, call: Callable, inputs: list[tuple]) -> tuple[Callable, int]:
        """Calls over all inputs as one CUDA graph -> its replay, and how many calls it makes."""
        turns = max(1, math.ceil(20 / len(inputs)))
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(*inputs[0])
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for args in inputs * turns:
                call(*args)
        return graph.replay, turns * len(inputs)

    def _enter(
        self, side: Side, inputs: list[tuple], judge: Callable | None
    ) -> tuple[dict, Callable, int, int]:
        """Run a side for the first times -> its result so far, a shot of it, calls per shot, and how many shots to take."""
        result: dict = {}
        begun = time.perf_counter()
        side.call(*inputs[0])
        self.sync()
        result["first_call_s"] = time.perf_counter() - begun
        base = 0
        if not self.toy:
            base = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        out = side.call(*inputs[0])
        self.sync()
        if not self.toy:
            result["peak_mb"] = (torch.cuda.max_memory_allocated() - base) / 1e6
        result["results_mb"] = nbytes(out) / 1e6
        if judge:
            result |= judge(out)
        del out
        once, turn = self.shot(lambda: side.call(*inputs[0])), iter(range(1 << 30))
        if not self.toy and side.graph and once < 0.1:
            try:
                replay, calls = self.captured(side.call, inputs)
                return result | {"method": "graph"}, replay, calls, 20
            except RuntimeError as error:
                result["not_captured"] = str(error).splitlines()[0][:160]
                self.sync()
        shots = 2 if self.toy else 20 if once < 50 else 5 if once < 3000 else 1
        return (
            result | {"method": "events"},
            lambda: side.call(*inputs[next(turn) % len(inputs)]),
            1,
            shots,
        )

    def compare(
        self,
        row: str,
        sides: dict[str, Side | Callable],
        inputs: list[tuple],
        *,
        flops: float = 0,
        moved: float = 0,
        judge: Callable | None = None,
        rate: float = BF16_RATE,
        **more,
    ) -> dict:
        """Measure sides, the first of which is ours, and keep the row. moved: the fewest bytes; more: goes into the row."""
        sides = {
            name: side if isinstance(side, Side) else Side(side, made=i == 0)
            for i, (name, side) in enumerate(sides.items())
        }
        if time.monotonic() > self.deadline:
            self.rows[row] = {"left_out": "the budget was spent"}
            return self.rows[row]
        with torch.no_grad():
            return (
                self._prepared(row, sides, inputs)
                if self.prepare
                else self._measured(row, sides, inputs, flops, moved, judge, rate, more)
            )

    def _prepared(self, row, sides, inputs) -> dict:
        failed = {}
        for name, side in sides.items():
            if side.made:
                try:
                    side.call(*inputs[0])
                    self.sync()
                except (ImportError, Skipped):
                    pass
                except Exception as error:  # the measured phase records it
                    failed[name] = f"{type(error).__name__}: {error}"[:300]
        self.rows[row] = {"failed": failed}
        return self.rows[row]

    def _measured(self, row, sides, inputs, flops, moved, judge, rate, more) -> dict:
        results, entered, times = {}, {}, {}
        for name, side in sides.items():
            try:
                results[name], *entered[name] = self._enter(side, inputs, judge)
                times[name] = []
            except Exception as error:  # whatever a contender raises is its result
                how = (
                    "absent"
                    if isinstance(error, ImportError)
                    else "skipped"
                    if isinstance(error, Skipped)
                    else "failed"
                )
                results[name] = {how: f"{type(error).__name__}: {error}".strip()[:300]}
            gc.collect()
        for i in range(max((shots for *_, shots in entered.values()), default=0)):
            for name, (call, calls, shots) in entered.items():
                if i < shots:
                    times[name].append(self.shot(call) / calls)
        for name, (call, calls, shots) in entered.items():
            ms = statistics.median(times[name])
            results[name] |= {
                "ms": ms,
                "least_ms": min(times[name]),
                "repetitions": shots * calls,
                "tflops": flops / ms / 1e9,
                "gb_s": moved / ms / 1e6,
            }
            if ms < 50:
                results[name]["wall_ms"] = self._wall(sides[name], inputs)
        ours = next(iter(sides))
        mine = results[ours]
        kept = {"sides": results, "shapes": [list(t.shape) for t in tensors(inputs[0])], **more}
        if "ms" in mine:
            for name in entered:
                results[name]["less_accurate"] = (
                    results[name].get("error", 0.0) > 1.1 * mine.get("error", math.inf) + 1e-9
                )
            floor = 1e3 * max(flops / rate, moved / BANDWIDTH)
            kept |= {
                "ms": mine["ms"],
                "floor_ms": floor,
                "percent_of_floor": 100 * floor / mine["ms"],
                "ratio": {
                    name: result["ms"] / mine["ms"]
                    for name, result in results.items()
                    if name != ours and "ms" in result
                },
                "wall_ratio": {
                    name: result["wall_ms"] / mine["wall_ms"]
                    for name, result in results.items()
                    if name != ours and "wall_ms" in result and "wall_ms" in mine
                },
            }
        self.rows[row] = kept
        print(
            f"  {row}: "
            + ", ".join(
                f"{name} {result['ms']:.3f} ms"
                if "ms" in result
                else f"{name} {next(iter(result))}"
                for name, result in results.items()
            ),
            file=sys.stderr,
            flush=True,
        )
        return kept

    def _wall(self, side: Side, inputs: list[tuple]) -> float:
        """Milliseconds by the host's clock of a call among many, launches included, no CUDA graph."""
        calls = 2 if self.toy else 20
        self.sync()
        begun = time.perf_counter()
        for i in range(calls):
            side.call(*inputs[i % len(inputs)])
        self.sync()
        return 1e3 * (time.perf_counter() - begun) / calls

    def beside(self, call: Callable, work: Callable, shots: int = 7) -> float | None:
        """Milliseconds of a call while other work runs on a stream of its own; work(ms) queues that much of it, and more."""
        if self.toy or self.prepare:
            return None
        other, times, alone = torch.cuda.Stream(), [], self.shot(call)
        for _ in range(shots):
            torch.cuda.synchronize()
            with torch.cuda.stream(other):
                work(4 * alone + 2)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def profile(self, call: Callable) -> dict | None:
        """What a call does on the device: kernels, copies from the host, and microseconds by kernel name."""
        if self.toy or self.prepare:
            return None
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        events = [
            e
            for e in profiler.events()
            if e.device_type != torch.autograd.DeviceType.CPU
            and not getattr(e, "is_user_annotation", False)
        ]
        found: dict = {"kernels": 0, "copies": 0, "host_to_device": 0, "us": {}}
        for e in events:
            found["copies" if e.name.startswith(("Memcpy", "Memset")) else "kernels"] += 1
            found["host_to_device"] += e.name.startswith("Memcpy HtoD")
            found["us"][e.name] = found["us"].get(e.name, 0.0) + e.time_range.elapsed_us()
        return found

    def syncs(self, call: Callable) -> str | None:
        """None if a call never waits for the device, else what waits."""
        if self.toy or self.prepare:
            return None
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
            return None
        except RuntimeError as error:
            return str(error).splitlines()[0][:160]
        finally:
            torch.cuda.set_sync_debug_mode("default")
