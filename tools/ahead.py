"""Parts of a phase that were compiled ahead of time, and the folder that keeps them.

A part is a function of a module and some tensors. AOTInductor compiles it to a shared library whose
inputs are the module's tensors, then the others: no weight is in it, one library serves all layers
of a kind, and to load it takes neither Dynamo nor Inductor.

    <compile cache>/ahead/<key>/<part>/     code.so, code.json, checksums.json
    <compile cache>/ahead/making-<process>/ what is not whole yet

The key tells all that a phase's code depends on. A folder of a part is renamed into place when it
is whole, so it is whole or not there; checksums tell whether it stayed so.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import ops
from ops.cpp import FLAGS, register_library, source
from tools import compile_cache
from tools.compile_cache import AHEAD, WORK_PREFIX
from tools.layer_graphs import layer_signature
from tools.torch_private import cache_path, library_runner

CODE = "code.so"
NODES = "code.json"
CHECKSUMS = "checksums.json"
MOST_KEPT = 24  # phases; the least recently used go

cache_key = functools.cache(compile_cache.cache_key)
cache_key()  # now: of the source that this process has imported


class Part(NamedTuple):
    """function(module, *args), to be compiled; layers of a kind share the part's name.

    others   submodules of a whole model that the part does not read
    """

    name: str
    module: nn.Module
    function: Callable
    others: tuple[str, ...] = ("layers.", "mtp.")

    def slots(self) -> list[tuple]:
        """(name, holder, key) of the tensors that the part may read."""
        return slots(self.module, self.others)


def slots(module: nn.Module, skip: tuple[str, ...]) -> list[tuple]:
    """(name, holder, key) of a module's tensors, holder[key], by name, but for some submodules'.

    Tensors are looked up at each call: caches are replaced, weights may be.
    """
    found = []
    for prefix, child in module.named_modules():
        if prefix.startswith(skip):
            continue
        for holder in (child._parameters, child._buffers):
            for key, tensor in holder.items():
                if tensor is not None:
                    found.append((f"{prefix}.{key}" if prefix else key, holder, key))
    return sorted(found, key=lambda slot: slot[0])


def tensor_specs(model: nn.Module, skip: tuple[str, ...]) -> dict[str, tuple]:
    """{name: (is a parameter, shape, strides, dtype)} of a model's tensors, but for some
    submodules'.
    """
    specs = {}
    for name, holder, key in slots(model, skip):
        t = holder[key]
        specs[name] = isinstance(t, nn.Parameter), tuple(t.shape), t.stride(), t.dtype
    return specs


def shapes(call: Sequence) -> list:
    """(shape, dtype) of tensors, other values as they are."""
    return [(tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in call]


def module_types(model: nn.Module) -> list[str]:
    """Where each module's class is defined: another process builds the model of model.py."""
    return [f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()]


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def phase_key(model: nn.Module, settings: tuple, call: Sequence, specs: dict[str, tuple]) -> str:
    """Of all that the code of a phase depends on: machine, source, model, settings and shapes.

    settings    of the phase, static
    call        its arguments
    specs       of the model's tensors
    """
    parts = {
        **cache_key(),
        "settings": settings,
        "call": shapes(call),
        "args": dataclasses.asdict(model.args),
        "cache": model.cache_size,
        "ops": sorted(model.ops.modes_on("cpu").items()),
        "C++ off": ops.cpp.disabled_ops(),
        "modules": module_types(model),
        "layers": [layer_signature(block) for block in model.layers],
        "tensors": specs,
        "threads": torch.get_num_threads(),
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    return digest(repr(parts))


# --------------------------------------------------------------------------------------------------
# The folder


def store() -> Path:
    """The folder of all that was compiled ahead of time."""
    return cache_path() / AHEAD


def library_key(text: str) -> str:
    """The key of a library of C++ kernels, by its source; it is kept as a part "kernels"."""
    machine = {name: value for name, value in cache_key().items() if name != "source"}
    return digest(repr((machine, FLAGS)) + text)


def is_kept(key: str, part: str) -> bool:
    return os.path.isdir(store() / key / part)  # False where the folder may not be read


def keep(made: Path, key: str, part: str) -> None:
    """Move a folder of finished files into place, unless another process was faster."""
    sums = {file.name: zlib.crc32(file.read_bytes()) for file in sorted(made.iterdir())}
    (made / CHECKSUMS).write_text(json.dumps(sums))
    target = store() / key / part
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.is_dir():
        target.unlink(missing_ok=True)  # it is none of ours
    try:
        os.rename(made, target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(made)


def checked(key: str, part: str) -> Path:
    """-> the folder of a part; a ValueError if it is damaged, and then it is gone."""
    folder = store() / key / part
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        whole = CODE in sums and all(
            zlib.crc32((folder / name).read_bytes()) == value for name, value in sums.items()
        )
    except (OSError, ValueError, TypeError):
        whole = False
    if not whole:
        shutil.rmtree(folder, ignore_errors=True)
        raise ValueError(f"{folder}: is damaged: compiled anew")
    return folder


def write_text(name: str, text: str) -> None:
    """Write a file of the folder; an old one is replaced when the new one is complete."""
    temporary = store() / f"{name}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text)
        temporary.replace(store() / name)
    finally:
        temporary.unlink(missing_ok=True)


def sweep() -> None:
    """Delete what compiling processes left that were killed."""
    killed = False
    for left in store().glob(f"{WORK_PREFIX}*"):
        with contextlib.suppress(OSError), open(left / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
            killed = True
    if killed:
        compile_cache.discard_unfinished()


def prune() -> None:
    """Delete the phases that were not used for longest."""
    phases = [path for path in store().iterdir() if path.is_dir()]
    phases = [path for path in phases if not path.name.startswith(WORK_PREFIX)]
    phases.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in phases[MOST_KEPT:]:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Loading


class Library:
    """A loaded part: library(*tensors) -> list of tensors, on the tensors of one module."""

    def __init__(self, run: Callable, part: Part):
        self._run = run
        self._slots = [(holder, key) for _, holder, key in part.slots()]

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return self._run([*(holder[key] for holder, key in self._slots), *tensors])


def load_kernels(library: str) -> None:
    """Register a library of C++ kernels from the folder, unless this process has it."""
    kernels = ops.cpp.kernels_of(library)
    if kernels[0].built is None:
        key = library_key(source(library))
        path = checked(key, "kernels") / CODE
        register_library(library, lambda: ctypes.CDLL(str(path)))
        note_use(key)


def missing(key: str, parts: list[str], libraries: list[str]) -> bool:
    """Whether a phase lacks any of its parts or kernels."""
    kernels = ((library_key(source(library)), "kernels") for library in libraries)
    return not all(is_kept(*name) for name in (*kernels, *((key, part) for part in parts)))


def load(key: str, parts: list[str], libraries: list[str]) -> dict[str, Path]:
    """Load a phase's kernels -> the folders of its parts. A ValueError or OSError if it cannot."""
    for library in libraries:
        load_kernels(library)
    folders = {name: checked(key, name) for name in parts}
    note_use(key)
    with contextlib.suppress(OSError):
        sweep()
    return folders


def note_use(key: str) -> None:
    """For `prune`. The folder may be another user's."""
    with contextlib.suppress(OSError):
        os.utime(store() / key)


def open_library(folder: Path, name: str = CODE) -> Callable:
    """Load a library of a part -> its function; a ValueError if it cannot, and then it is gone."""
    try:
        return library_runner(str(folder / name))
    except RuntimeError as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: does not load ({reason}): compiled anew") from None
