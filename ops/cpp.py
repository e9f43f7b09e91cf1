"""C++ kernels of ops on CPU: ops/cpu/*.cpp, compiled by Inductor, against torch's stable ABI.

`registry.build_cpu_kernels` builds them, once a machine, before a phase or training step is traced.
Until then, and where nothing can be compiled, an op runs its Python function. `disabled` switches
kernels off, to measure or to test without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

FOLDER = Path(__file__).with_name("cpu")
FLAGS = ("-ffp-contract=fast",)  # fused multiply-add
INCLUDE = '#include "common.h"\n'
KERNELS: dict[str, CppKernel] = {}
_disabled: dict[str, bool] = {}  # by op; a plain dict, so that compiled code can read and guard it


def supports_cpp(*args) -> bool:
    """Whether all tensors are of the types that kernels take: float32 values, int64 indices."""
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    return all(t.dtype in (torch.float32, torch.int64) for t in tensors)


def enabled(op: str) -> bool:
    """Whether an op's C++ may run; its backward counts as the same op."""
    return not _disabled.get(op.removesuffix("_backward"), False)


def disabled_ops() -> list[str]:
    """The ops whose C++ is switched off."""
    return sorted(op for op, off in _disabled.items() if off)


@contextlib.contextmanager
def disabled(*ops: str):
    """Within the block these ops run, and are traced, as if they had no C++ kernels.

    Compiled code keeps what it was traced with. A kernel that takes all arguments (`sinkhorn`,
    `moe_decode`) is registered in the op itself: an explicitly opaque call keeps running it once it
    is built.
    """
    before = dict(_disabled)
    _disabled.update(dict.fromkeys(ops, True))
    try:
        yield
    finally:
        _disabled.clear()
        _disabled.update(before)


def source(library: str) -> str:
    """The C++ of a library: header, functions and their registration, in one text.

    It is the key of Inductor's code cache.
    """
    text = (FOLDER / f"{library}.cpp").read_text()
    header = (FOLDER / "common.h").read_text().replace("#pragma once\n", "", 1)
    assert text.startswith(INCLUDE), f"{library}.cpp does not begin with {INCLUDE.strip()}"
    body = text.removeprefix(INCLUDE)
    kernels = kernels_of(library)
    names = [kernel.name for kernel in kernels]
    lines = "\n".join(f'  m.impl("{name}", TORCH_BOX(&{name}));' for name in names)
    registration = f"STABLE_TORCH_LIBRARY_IMPL({kernels[0].namespace}, CPU, m) {{\n{lines}\n}}\n"
    included = f'#line 2 "ops/cpu/common.h"\n{header}#line 2 "ops/cpu/{library}.cpp"\n{body}'
    return included + registration


class CppKernel:
    """The CPU implementation of an op: a function of its name and schema in ops/cpu/<library>.cpp.

    Ops of one library are built together.
    """

    def __init__(self, namespace: str, name: str, python: Callable, library: str):
        self.namespace = namespace
        self.name = name
        self.python = python
        self.library = library
        self.built: bool | None = None  # None: not tried yet
        self._register_python()
        KERNELS[name] = self

    def _register_python(self):
        self.registration = torch.library.Library(self.namespace, "FRAGMENT")
        self.registration.impl(self.name, self.python, "CPU")

    def build(self) -> bool:
        """Compile, once a machine, and register the C++ in place of the Python. -> success."""
        if self.built is None:
            register_library(self.library, lambda: compile_library(source(self.library)))
        return self.built


def kernels_of(library: str) -> list[CppKernel]:
    """The kernels of a library."""
    return [kernel for kernel in KERNELS.values() if kernel.library == library]


def compile_library(text: str) -> Path:
    """Compile a library's source -> the file, in Inductor's cache; loaded, which registers its
    functions for CPU.
    """
    from torch._inductor.codecache import CppCodeCache  # Inductor takes seconds to import

    # torch/_inductor/codecache.py line 3648
    return Path(CppCodeCache.load(text, extra_flags=FLAGS)._name)


def register_library(library: str, load: Callable[[], object]) -> None:
    """Let load() register a library's functions; after any exception of it Python stays."""
    kernels = kernels_of(library)
    for kernel in kernels:
        del kernel.registration  # two registrations at a time would be a warning
    try:
        load()
        built = True
    except Exception:  # no compiler, other headers: many classes, all of them mean the same
        built = False
    for kernel in kernels:
        kernel.built = built
        if not built:
            kernel._register_python()
