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
    """The C++ of a library, its header in place: the text is the key of Inductor's code cache."""
    text = (FOLDER / f"{library}.cpp").read_text()
    header = (FOLDER / "common.h").read_text().replace("#pragma once\n", "", 1)
    assert text.startswith(INCLUDE), f"{library}.cpp does not begin with {INCLUDE.strip()}"
    body = text.removeprefix(INCLUDE)
    return f'#line 2 "ops/cpu/common.h"\n{header}#line 2 "ops/cpu/{library}.cpp"\n{body}'


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
            together = [k for k in KERNELS.values() if k.library == self.library]
            for kernel in together:
                del kernel.registration  # two registrations at a time would be a warning
            built = _load(self.library, self.namespace, [kernel.name for kernel in together])
            for kernel in together:
                kernel.built = built
                if not built:
                    kernel._register_python()
        return self.built


def _load(library: str, namespace: str, names: list[str]) -> bool:
    """Compile and load a library that registers these functions for CPU. -> success."""
    lines = "\n".join(f'  m.impl("{name}", TORCH_BOX(&{name}));' for name in names)
    registration = f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m) {{\n{lines}\n}}\n"
    try:
        from torch._inductor.codecache import CppCodeCache  # Inductor takes seconds to import

        # torch/_inductor/codecache.py line 3648
        CppCodeCache.load(source(library) + registration, extra_flags=FLAGS)
    except Exception:  # no compiler, other headers: many classes, all of them mean the same
        return False
    return True
