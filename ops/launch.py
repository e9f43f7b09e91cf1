"""Launching Triton kernels: every kernel of ops/ is launched through here.

A launch runs on the GPU that its tensors are on, or in Triton's interpreter on CPU tensors
(TRITON_INTERPRET=1). Within `record(arch)` it is only noted, specialised as Triton's launcher would
do it, so that it can be compiled ahead of time for a GPU that is not there: tensors may then be
fake.

Block sizes are never searched for at run time: `get_config` takes them from tuned.json.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

triton = tl = None  # then kernels are defined, never launched
# It takes a quarter of a second. Tools that compile kernels for a GPU that is not there have
# imported it before.
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ or "triton" in sys.modules:
    with contextlib.suppress(ImportError):  # there is none for this platform
        import triton

        tl = triton.language

INTERPRETING = triton is not None and bool(triton.knobs.runtime.interpret)
TUNED = Path(__file__).with_name("tuned.json")
# Multiprocessors (compute units) of the largest GPU of an architecture
PROCESSORS = {
    "sm_80": 108,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 188,
    "gfx942": 304,
    "gfx950": 256,
}
# Architectures without configs of their own, and those whose configs they take
SIMILAR = {
    "sm_86": "sm_120",
    "sm_89": "sm_120",
    "sm_103": "sm_100",
    "sm_121": "sm_120",
    "gfx90a": "gfx942",
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}

_recorded: list[Launch] | None = None  # of `record`
_recorded_arch = ""
_overrides: dict[str | tuple[str, str], dict] = {}  # of `override_config`
_requested: dict[tuple[str, str], list[dict]] | None = None  # of `record_configs`


def jit(function):
    """triton.jit, where there is Triton."""
    return function if triton is None else triton.jit(function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The least power of two >= n and >= least."""
    return max(least, 1 << max(n - 1, 0).bit_length())


class Launch(NamedTuple):
    """One recorded launch: positional arguments (fake tensors, ints, floats), then constants and
    options by name.
    """

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    meta: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def specialization(self) -> tuple[dict, dict, tuple, dict]:
        """The specialisation that Triton compiles for these arguments: the key in its cache.

        -> types by argument, constants by argument, arguments divisible by 16, compiler options
        """
        parameters = self.kernel.arg_names
        values = dict(zip(parameters, self.args, strict=False))  # constants may follow, in meta
        values.update({name: v for name, v in self.meta.items() if name in parameters})
        options = {name: v for name, v in self.meta.items() if name not in parameters}
        types: dict[str, str] = {}
        constants: dict[str, object] = {}
        aligned = []
        for param in self.kernel.params:
            name = param.name
            value = values.get(name, param.default)
            is_one = type(value) is int and value == 1
            if param.is_constexpr or value is None or is_one:
                types[name] = "constexpr"
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                types[name] = "*" + TYPES[value.dtype]
                if value.storage_offset() * value.dtype.itemsize % 16 == 0:
                    aligned.append(name)
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
                if value % 16 == 0:
                    aligned.append(name)
        return types, constants, tuple(aligned), options


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """`kernel[grid](*args, **meta)` on the device of its first tensor; an empty grid launches
    nothing.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[grid](*args, **meta)


@contextlib.contextmanager
def record(arch: str):
    """Within the block launches are appended to the list that it yields, not run, as if the GPU
    were an `arch` ("sm_90").
    """
    global _recorded, _recorded_arch
    before = _recorded, _recorded_arch
    _recorded, _recorded_arch = [], arch
    try:
        yield _recorded
    finally:
        _recorded, _recorded_arch = before


@functools.cache
def _arch(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def arch(x: torch.Tensor) -> str:
    """Architecture that x is on ("sm_90", "gfx942"), or that launches are recorded for; "cpu" in
    the interpreter.
    """
    if _recorded is not None:
        return _recorded_arch
    return _arch(x.device.index) if x.device.type == "cuda" else "cpu"


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of the GPU of x: programs that keep it busy. 4 in the interpreter."""
    if _recorded is None and x.device.type == "cuda":
        return _processors(x.device.index)
    return PROCESSORS.get(arch(x), 4)


@functools.cache
def _table() -> dict:
    return json.loads(TUNED.read_text()) if TUNED.exists() else {}


LOAD = re.compile(r"~(\d+)")  # the number in a key that may differ from that of the table's entry


def _load(key: str) -> float:
    match = LOAD.search(key)
    return math.log2(int(match[1])) if match else 0.0


@functools.cache
def _tuned(name: str, arch: str, key: str) -> dict | None:
    """The table's config of a kernel for an architecture, or for a similar one."""
    by_arch = _table().get(name, {})
    by_key = by_arch.get(arch, by_arch.get(SIMILAR.get(arch), {}))
    same = [k for k in by_key if LOAD.sub("~", k) == LOAD.sub("~", key)]
    if not same:
        return None
    return by_key[min(same, key=lambda k: abs(_load(k) - _load(key)))]


@contextlib.contextmanager
def record_configs():
    """Yields a dict of the calls of `get_config` within the block: candidates by (name, key), in
    order.
    """
    global _requested
    before, _requested = _requested, {}
    try:
        yield _requested
    finally:
        _requested = before


@contextlib.contextmanager
def override_config(configs: dict[str | tuple[str, str], dict]):
    """Within the block these kernels, or (name, key), take these configs instead of the table's: to
    test and compare them.
    """
    before = dict(_overrides)
    _overrides.update(configs)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def get_config(name: str, key: str, candidates: list[dict], x: torch.Tensor) -> dict:
    """Block sizes and launch options of a kernel.

    name        of the kernel
    key         the shapes and dtypes that matter to the choice, "H64 D512 bf16"
    candidates  all configs that are valid for these shapes, from the largest to the smallest
    x           a tensor on the GPU in question

    A number after "~" in a key may differ from that of the table's entry, of which the nearest is
    taken. An architecture or a key that is not in the table takes the last candidate, which must
    fit everywhere.
    """
    if _requested is not None:
        _requested[name, key] = candidates
    override = _overrides.get((name, key), _overrides.get(name))
    if override is not None:
        return override
    tuned = _tuned(name, arch(x), key)
    return tuned if tuned in candidates else candidates[-1]
