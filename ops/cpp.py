"""C++ kernels of ops on CPU: built when an op is first traced there, by Inductor's toolchain, against torch's stable ABI.

Until then, and where nothing can be compiled, the op runs its Python function.
"""
from __future__ import annotations

from typing import Callable

import torch

HEADER = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static Tensor packed(const Tensor& t, ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "this CPU kernel takes float32 values and int64 indices");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
static Tensor floats(const Tensor& t) { return packed(t, ScalarType::Float); }
"""
KERNELS: dict[str, CppKernel] = {}


class CppKernel:
    """The CPU implementation of an op that has C++ source, a function of the op's own name and schema."""

    def __init__(self, namespace: str, name: str, python: Callable, source: str):
        self.namespace, self.name, self.python, self.built = namespace, name, python, None
        self.source = f"{HEADER}{source}\nSTABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m) {{ m.impl(\"{name}\", TORCH_BOX(&{name})); }}\n"
        self._use_python()
        KERNELS[name] = self

    def _use_python(self):
        self.library = torch.library.Library(self.namespace, "FRAGMENT")
        self.library.impl(self.name, self.python, "CPU")

    def build(self) -> bool:
        """Compile, once a machine, and register the C++ in place of the Python. -> whether that was possible."""
        if self.built is None:
            del self.library  # two registrations at a time would be a warning
            try:
                from torch._inductor.codecache import CppCodeCache
                CppCodeCache.load(self.source)
                self.built = True
            except Exception:  # no compiler, other headers: many classes, all of them mean the same
                self._use_python()
                self.built = False
        return self.built
