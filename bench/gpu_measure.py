"""How the GPU suite measures: sides take turns on the same inputs, device events tell the time.

A row is one function at one shape: ours first, then baselines, each on the same inputs in the same
process, A/B/A/B. Inputs are random and rotate, so that together they exceed the L2 cache. Times are
medians of device events; calls of less than 0.1 ms are captured many at a time into a CUDA graph.
Errors are against fp64. A baseline that cannot run is listed with its error.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

# FLOP/s and bytes/s that an H200 reaches on random data: floors are made of them
BF16_RATE, BANDWIDTH = 790e12, 4.3e12
L2 = 60e6  # bytes
CASES: dict[str, Case] = {}


class Case(NamedTuple):
    run: Callable[[Bench], None]
    title: str
    seconds: float  # that measuring should take
    parts: dict[str, float]  # gigabytes of GPU memory, by part that is compiled by itself
    ops: tuple[str, ...]  # whose kernels it runs


def case(
    name: str, title: str, seconds: float, parts: float | dict[str, float], *ops: str
) -> Callable:
    """Register a function of a Bench as a case. parts: gigabytes, of the whole or by part."""

    def add(run):
        by_part = parts if isinstance(parts, dict) else {"": parts}
        CASES[name] = Case(run, title, seconds, by_part, ops)
        return run

    return add


class Skipped(Exception):
    """A side that cannot take part here, and why."""


class Side(NamedTuple):
    call: Callable
    made: bool = False  # whether it has code that the warm phase compiles
    graph: bool = True  # whether it may be captured into a CUDA graph


class Entry(NamedTuple):
    """A side about to be timed."""

    shot: Callable  # what one measurement runs
    calls: int  # calls of the side in one shot
    shots: int


# --------------------------------------------------------------------------------------------------
# Arguments and results


def tensors(x) -> list[torch.Tensor]:
    return [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]


def nbytes(*x) -> int:
    return sum(t.nbytes for t in tensors(x))


def double(args):
    """The same values in fp64, cut from any graph; integers as they are."""

    def cast(t):
        floating = isinstance(t, torch.Tensor) and t.is_floating_point()
        return t.detach().double() if floating else t

    return tree_map(cast, args)


def both(function: Callable, wrt: tuple[int, ...]) -> Callable:
    """Forward and backward: call(*args, g) -> gradients of `wrt` from those of the results."""

    def call(*args):
        *args, g = args
        with torch.enable_grad():
            return torch.autograd.grad(function(*args), [args[i] for i in wrt], g)

    return call


def backward_of(function: Callable, wrt: tuple[int, ...]) -> Side:
    """Backward alone, of a forward that is run once per set of inputs."""
    results = {}

    def call(*args):
        *args, g = args
        with torch.enable_grad(), torch._functorch.config.patch(donated_buffer=False):
            if g.data_ptr() not in results:
                results[g.data_ptr()] = function(*args)
            wanted = [args[i] for i in wrt]
            return torch.autograd.grad(results[g.data_ptr()], wanted, g, retain_graph=True)

    return Side(call, made=True, graph=False)


def everything(out):
    return out


def against(exact: Callable[[], tuple], pick: Callable = everything) -> Callable:
    """-> error_of: distances of results from exact(); pick chooses those that exact() gives."""
    kept = []

    def error_of(out) -> dict:
        if not kept:
            kept.extend(t.double() for t in tensors(exact()))
        found = [t.detach().double() for t in tensors(pick(out))]
        pairs = list(zip(found, kept, strict=True))
        errors = [float((a - b).norm() / b.norm().clamp(min=1e-300)) for a, b in pairs]
        return {
            "error": max(errors),
            "errors": errors,
            "max_error": max(float((a - b).abs().max()) for a, b in pairs),
        }

    return error_of


def message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip()[:300]


def outcome(error: Exception) -> str:
    """Why a side has no time."""
    if isinstance(error, ImportError):
        return "absent"
    return "skipped" if isinstance(error, Skipped) else "failed"


# --------------------------------------------------------------------------------------------------


class Bench:
    """The tools of a case. rows: its results so far.

    toy       tiny sizes on CPU, to exercise the code
    prepare   compile only, for the warm phase
    part      the part of the case to run; "": all
    deadline  of time.monotonic, after which rows are left out
    """

    def __init__(
        self, toy: bool = False, prepare: bool = False, part: str = "", deadline: float = math.inf
    ):
        self.toy = toy
        self.prepare = prepare
        self.part = part
        self.deadline = deadline
        self.rows: dict[str, dict] = {}
        self.device = torch.device("cpu" if toy else "cuda")
        self.random = torch.Generator(self.device).manual_seed(0)

    # Inputs

    def size(self, full, toy):
        """The full size, or the one of toy runs."""
        return toy if self.toy else full

    def normal(
        self,
        *shape: int,
        dtype: torch.dtype = torch.bfloat16,
        scale: float = 1.0,
        grad: bool = False,
    ) -> torch.Tensor:
        x = torch.empty(shape, dtype=dtype, device=self.device)
        return x.normal_(0, scale, generator=self.random).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.random, device=self.device)

    def sets(self, make: Callable[[], tuple]) -> list[tuple]:
        """Inputs made as often as it takes to exceed the L2 cache."""
        first = make()
        if self.toy:
            more = 1
        elif self.prepare:
            more = 0
        else:
            more = min(63, math.ceil(2 * L2 / max(nbytes(first), 1)) - 1)
        return [first, *(make() for _ in range(more))]

    def compiled(self, function: Callable, whole: bool = True, graph: bool = True) -> Side:
        """torch.compile of a function, static shapes."""
        backend = "eager" if self.toy else "inductor"
        made = torch.compile(function, fullgraph=whole, dynamic=False, backend=backend)
        return Side(made, True, graph)

    def wants(self, part: str) -> bool:
        """Whether this part of a case is to be run."""
        return self.part in ("", part)

    def free(self) -> None:
        """Give back memory and compiled code that nothing uses any more."""
        gc.collect()
        torch._dynamo.reset()
        if not self.toy:
            torch.cuda.empty_cache()

    # Time

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

    def _first_calls(self, side: Side, inputs: list[tuple], error_of: Callable | None) -> dict:
        """Seconds of the first call, peak memory and errors of the second."""
        result: dict = {}
        begun = time.perf_counter()
        side.call(*inputs[0])
        self.sync()
        result["first_call_s"] = time.perf_counter() - begun
        held = 0
        if not self.toy:
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        out = side.call(*inputs[0])
        self.sync()
        if not self.toy:
            result["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
        result["results_mb"] = nbytes(out) / 1e6
        if error_of:
            result |= error_of(out)
        return result

    def _shots(self, ms: float) -> int:
        """How many shots to take of a call of so many milliseconds."""
        if self.toy:
            return 2
        if ms < 50:
            return 20
        return 5 if ms < 3000 else 1

    def _enter(
        self, side: Side, inputs: list[tuple], error_of: Callable | None
    ) -> tuple[dict, Entry]:
        """Run a side for the first times -> its results so far, and how it is to be timed."""
        result = self._first_calls(side, inputs, error_of)
        ms = self.shot(lambda: side.call(*inputs[0]))
        if not self.toy and side.graph and ms < 0.1:
            try:
                replay, calls = self.captured(side.call, inputs)
                return result | {"method": "graph"}, Entry(replay, calls, 20)
            except RuntimeError as error:
                result["not_captured"] = str(error).splitlines()[0][:160]
                self.sync()
        rotating = itertools.cycle(inputs)
        entry = Entry(lambda: side.call(*next(rotating)), 1, self._shots(ms))
        return result | {"method": "events"}, entry

    # Rows

    def compare(
        self,
        row: str,
        sides: dict[str, Side | Callable],
        inputs: list[tuple],
        *,
        flops: float = 0,
        moved: float = 0,
        error_of: Callable | None = None,
        rate: float = BF16_RATE,
        **more,
    ) -> dict:
        """Measure sides, the first of which is ours, and keep the row.

        flops, moved   that the function needs at least, and bytes: the floor of its time
        error_of       results of a side -> its errors
        more           goes into the row
        """
        if time.monotonic() > self.deadline:
            self.rows[row] = {"left_out": "the budget was spent"}
            return self.rows[row]
        contenders = {
            name: side if isinstance(side, Side) else Side(side, made=i == 0)
            for i, (name, side) in enumerate(sides.items())
        }
        with torch.no_grad():
            if self.prepare:
                self.rows[row] = {"failed": self._prepared(contenders, inputs)}
                return self.rows[row]
            results, entered = self._measured(contenders, inputs, error_of)
        for name in entered:
            ms = results[name]["ms"]
            results[name] |= {"tflops": flops / ms / 1e9, "gb_s": moved / ms / 1e6}
        for name in entered:
            if results[name]["ms"] < 50:
                results[name]["wall_ms"] = self._wall(contenders[name], inputs)
        shapes = [list(t.shape) for t in tensors(inputs[0])]
        kept = {"sides": results, "shapes": shapes, **more}
        ours = next(iter(contenders))
        if "ms" in results[ours]:
            kept |= beside(ours, results, entered)
            floor = 1e3 * max(flops / rate, moved / BANDWIDTH)
            kept |= {"floor_ms": floor, "percent_of_floor": 100 * floor / kept["ms"]}
        self.rows[row] = kept
        self._print(row, results)
        return kept

    def _print(self, row: str, results: dict) -> None:
        said = []
        for name, result in results.items():
            time_or_why = f"{result['ms']:.3f} ms" if "ms" in result else next(iter(result))
            said.append(f"{name} {time_or_why}")
        print(f"  {row}: {', '.join(said)}", file=sys.stderr, flush=True)

    def _prepared(self, sides: dict[str, Side], inputs: list[tuple]) -> dict[str, str]:
        """Run the sides that have something to compile -> errors by side."""
        failed = {}
        for name, side in sides.items():
            if not side.made:
                continue
            try:
                side.call(*inputs[0])
                self.sync()
            except (ImportError, Skipped):
                pass
            except Exception as error:  # the measured phase records it
                failed[name] = message(error)
        return failed

    def _measured(
        self, sides: dict[str, Side], inputs: list[tuple], error_of: Callable | None
    ) -> tuple[dict[str, dict], list[str]]:
        """-> results by side, and the sides that were timed."""
        results = {}
        entries = {}
        times = {}
        for name, side in sides.items():
            try:
                results[name], entries[name] = self._enter(side, inputs, error_of)
                times[name] = []
            except Exception as error:  # whatever a contender raises is its result
                results[name] = {outcome(error): message(error)}
            gc.collect()
        for i in range(max((entry.shots for entry in entries.values()), default=0)):
            for name, entry in entries.items():
                if i < entry.shots:
                    times[name].append(self.shot(entry.shot) / entry.calls)
        for name, entry in entries.items():
            results[name] |= {
                "ms": statistics.median(times[name]),
                "least_ms": min(times[name]),
                "repetitions": entry.shots * entry.calls,
            }
        return results, list(entries)

    def _wall(self, side: Side, inputs: list[tuple]) -> float:
        """Milliseconds by the host's clock of a call among many, with launches, no CUDA graph."""
        calls = 2 if self.toy else 20
        self.sync()
        begun = time.perf_counter()
        for i in range(calls):
            side.call(*inputs[i % len(inputs)])
        self.sync()
        return 1e3 * (time.perf_counter() - begun) / calls

    # Beyond time

    def beside(self, call: Callable, load: Callable, shots: int = 7) -> float | None:
        """Milliseconds of a call while a load runs on a stream of its own.

        load(ms) queues at least so many milliseconds of it.
        """
        if self.toy or self.prepare:
            return None
        other = torch.cuda.Stream()
        times = []
        alone = self.shot(call)
        for _ in range(shots):
            torch.cuda.synchronize()
            with torch.cuda.stream(other):
                load(4 * alone + 2)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)

    def profile(self, call: Callable) -> dict | None:
        """Kernels that a call launches, copies from the host, microseconds by kernel name."""
        if self.toy or self.prepare:
            return None
        call()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        found: dict = {"kernels": 0, "copies": 0, "host_to_device": 0, "us": {}}
        for event in profiler.events():
            on_host = event.device_type == torch.autograd.DeviceType.CPU
            if on_host or getattr(event, "is_user_annotation", False):
                continue
            copies = event.name.startswith(("Memcpy", "Memset"))
            found["copies" if copies else "kernels"] += 1
            found["host_to_device"] += event.name.startswith("Memcpy HtoD")
            spent = found["us"].get(event.name, 0.0)
            found["us"][event.name] = spent + event.time_range.elapsed_us()
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


def beside(ours: str, results: dict[str, dict], timed: list[str]) -> dict:
    """Our time, and how many times longer the others take; marks those that are less accurate."""
    mine = results[ours]
    for name in timed:
        limit = 1.1 * mine.get("error", math.inf) + 1e-9
        results[name]["less_accurate"] = results[name].get("error", 0.0) > limit

    def ratios(key: str) -> dict[str, float]:
        return {
            name: result[key] / mine[key]
            for name, result in results.items()
            if name != ours and key in result and key in mine
        }

    return {"ms": mine["ms"], "ratio": ratios("ms"), "wall_ratio": ratios("wall_ms")}
