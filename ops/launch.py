"""Launching Triton kernels: the one door that every kernel of ops/ goes through.

A launch runs on the GPU that its tensors are on, or in Triton's interpreter on CPU tensors (TRITON_INTERPRET=1). Within
`record(arch)` it is only noted down, specialised as Triton's launcher would, so that it can be compiled ahead of time for
a GPU that is not there: tensors may then be fake.

Tiles are never searched for at run time: `tiles` takes them from tuned.json.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform, and no GPU that it could serve: kernels are defined, never launched
    triton = tl = None

INTERPRETING = triton is not None and bool(triton.knobs.runtime.interpret)
TUNED = Path(__file__).with_name("tuned.json")
# Multiprocessors (compute units) of the largest part of an architecture: how many programs keep it busy.
PROCESSORS = {
    "sm_80": 108,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 188,
    "gfx942": 304,
    "gfx950": 256,
}
# Architectures whose tiles suit one that has no table of its own.
LIKE = {
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

_recorded: list[Launch] | None = None
_recorded_arch = ""
_chosen: dict[str | tuple[str, str], dict] = {}
_asked: dict[tuple[str, str], list[dict]] | None = None


def jit(function):
    """triton.jit, where there is Triton."""
    return function if triton is None else triton.jit(function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int = 1) -> int:
    """The least power of two >= n and >= least."""
    return max(least, 1 << max(n - 1, 0).bit_length())


class Launch(NamedTuple):
    """One recorded launch: positional arguments (fake tensors, ints, floats), then constants and options by name."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    meta: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def specialization(
        self,
    ) -> tuple[dict[str, str], dict[str, object], tuple[str, ...], dict[str, int]]:
        """(types by argument, constants, arguments divisible by 16, options): what Triton compiles, and its key in a cache."""
        given = {
            **dict(zip(self.kernel.arg_names, self.args)),
            **{k: v for k, v in self.meta.items() if k in self.kernel.arg_names},
        }
        options = {k: v for k, v in self.meta.items() if k not in self.kernel.arg_names}
        types, constants, aligned = {}, {}, []
        for param in self.kernel.params:
            value = given[param.name] if param.name in given else param.default
            if param.is_constexpr or value is None or type(value) is int and value == 1:
                types[param.name], constants[param.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[param.name] = "*" + TYPES[value.dtype]
                if value.storage_offset() * value.dtype.itemsize % 16 == 0:
                    aligned.append(param.name)
            elif isinstance(value, float):
                types[param.name] = "fp32"
            else:
                types[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
                if value % 16 == 0:
                    aligned.append(param.name)
        return types, constants, tuple(aligned), options


def launch(kernel, grid: tuple[int, ...], *args, **meta) -> None:
    """`kernel[grid](*args, **meta)` on the device of its first tensor; an empty grid launches nothing."""
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, meta))
        return
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **meta)


@contextlib.contextmanager
def record(arch: str):
    """Within the block launches are appended to the list that it yields, as if the GPU were an `arch` ("sm_90")."""
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
    """ "sm_90", "gfx942" and the like: what x is on, or what launches are being recorded for; "cpu" in the interpreter."""
    if _recorded is not None:
        return _recorded_arch
    return _arch(x.device.index) if x.device.type == "cuda" else "cpu"


def processors(x: torch.Tensor) -> int:
    """How many programs of one kernel keep the GPU of x busy; a small number in the interpreter."""
    if _recorded is None and x.device.type == "cuda":
        return _processors(x.device.index)
    return PROCESSORS.get(arch(x), 4)


@functools.cache
def _table() -> dict:
    return json.loads(TUNED.read_text()) if TUNED.exists() else {}


@functools.cache
def _tuned(name: str, where: str, key: str) -> dict | None:
    """The table's tiles for a kernel on an architecture, or one like it."""
    by_arch, number = _table().get(name, {}), re.compile(r"~(\d+)")
    found = by_arch.get(where, by_arch.get(LIKE.get(where), {}))
    alike = [k for k in found if number.sub("~", k) == number.sub("~", key)]
    size = lambda k: math.log2(int(number.search(k)[1])) if "~" in k else 0.0
    return found[min(alike, key=lambda k: abs(size(k) - size(key)))] if alike else None


@contextlib.contextmanager
def record_configs():
    """Yields a dict of what `tiles` is asked for within the block: candidates by (name, key), in order."""
    global _asked
    before, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = before


@contextlib.contextmanager
def override_config(tiles_by_kernel: dict[str | tuple[str, str], dict]):
    """Within the block these kernels, or (name, key), take these tiles, whatever the table says: to test and compare them."""
    before = dict(_chosen)
    _chosen.update(tiles_by_kernel)
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


def get_config(name: str, key: str, candidates: list[dict], x: torch.Tensor) -> dict:
    """Tile sizes and launch options of a kernel.

    name        of the kernel
    key         what of the shapes and dtypes matters to the choice, "H64 D512 bf16"
    candidates  all that are valid for these shapes, from the largest to the smallest
    x           a tensor on the GPU in question

    A number after "~" in a key may differ from that of the table's entry, of which the nearest is taken. An architecture or
    a key that is not in the table takes the last candidate, which must fit everywhere.
    """
    if _asked is not None:
        _asked[name, key] = candidates
    chosen = _chosen.get((name, key), _chosen.get(name))
    if chosen is not None:
        return chosen
    found = _tuned(name, arch(x), key)
    return found if found in candidates else candidates[-1]
