"""sinkhorn: turn logits into nearly doubly stochastic matrices (mHC, spec 3.1); the inner part of hc_pre.

    c = softmax rows(logits) + eps; then columns, and iters - 1 times rows and columns, each divided by (sum + eps)

    logits [..., n, n] fp32   c likewise

Traced, these are 2 iters small loops, half of what a compiler sees of a whole model. hc_pre therefore makes it one node
when it is compiled for CPU without gradients, with a C++ kernel that keeps a matrix in registers; without a C++ compiler
the node runs the reference. The node has no gradient (looking for one would cost more than the kernel); hc_pre's backward
walks the steps in reverse by `backward_reference`. Errors: the last two dims differ.
"""
from __future__ import annotations

import ctypes
import functools

import torch

from .registry import Op, register, require

SOURCE = """
#include <algorithm>
#include <cmath>
#include <cstdint>
extern "C" void sinkhorn(const float* in, float* out, int64_t matrices, int64_t iters, float eps) {
  constexpr int n = %d;
  for (int64_t m = 0; m < matrices; m++, in += n * n, out += n * n) {
    float c[n][n], sum[n];
    for (int i = 0; i < n; i++) {
      float top = in[i * n], total = 0;
      for (int j = 1; j < n; j++) top = std::max(top, in[i * n + j]);
      for (int j = 0; j < n; j++) total += c[i][j] = std::exp(in[i * n + j] - top);
      for (int j = 0; j < n; j++) c[i][j] = c[i][j] / total + eps;
    }
    for (int64_t step = 0; step < 2 * iters - 1; step++) {
      const bool columns = step %% 2 == 0;
      for (int i = 0; i < n; i++) sum[i] = eps;
      for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) sum[columns ? j : i] += c[i][j];
      for (int i = 0; i < n; i++) sum[i] = 1 / sum[i];
      for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[i][j] *= sum[columns ? j : i];
    }
    for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) out[i * n + j] = c[i][j];
  }
}
"""


def check(logits, eps, iters):
    require(logits.dim() >= 2 and logits.shape[-1] == logits.shape[-2], f"sinkhorn: logits {tuple(logits.shape)} are not [..., n, n]")


def _axes(iters):
    return -2, *(-1, -2) * (iters - 1)


def reference(logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    c = logits.softmax(-1) + eps
    for axis in _axes(iters):
        c = c / (c.sum(axis, keepdim=True) + eps)
    return c


def backward_reference(g: torch.Tensor, logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    """Gradient of logits."""
    soft = logits.softmax(-1)
    steps, c = [], soft + eps  # the matrix after each division, with the divisor and its axis
    for axis in _axes(iters):
        total = c.sum(axis, keepdim=True) + eps
        c = c / total
        steps.append((c, total, axis))
    for c, total, axis in reversed(steps):
        g = (g - (g * c).sum(axis, keepdim=True)) / total
    return soft * (g - (g * soft).sum(-1, keepdim=True))


@functools.cache
def _kernel(n: int):
    """The C++ kernel for n x n matrices, built once a machine; None where that is impossible."""
    try:
        from torch._inductor.codecache import CppCodeCache
        kernel = CppCodeCache.load(SOURCE % n).sinkhorn
    except Exception:  # no compiler: many classes, all of them mean the reference
        return None
    kernel.restype, kernel.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_float)
    return kernel


def _impl(logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    n = logits.shape[-1]
    kernel = _kernel(n) if logits.device.type == "cpu" and logits.dtype == torch.float32 else None
    logits, out = logits.contiguous(), logits.new_empty(logits.shape)
    if kernel is None:
        return out.copy_(reference(logits, eps, iters))
    kernel(logits.data_ptr(), out.data_ptr(), logits.numel() // (n * n), iters, eps)
    return out


_opaque = register("sinkhorn(Tensor logits, float eps, int iters) -> Tensor", impl=_impl,
                   fake=lambda logits, *args: logits.new_empty(logits.shape), flops=lambda *shapes, out_shape=None, **kw: 0)

sinkhorn = Op("sinkhorn", reference, _opaque, check)
