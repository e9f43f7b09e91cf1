"""sinkhorn: turn logits into nearly doubly stochastic matrices (mHC, spec 3.1); the inner part of hc_pre.

    c = softmax rows(logits) + eps; then columns, and iters - 1 times rows and columns, each divided by (sum + eps)

    logits [..., n, n] fp32   c likewise

Traced, these are 2 iters small loops, half of what a compiler sees of a whole model. hc_pre therefore makes it one node
when it is compiled for CPU without gradients, with a C++ kernel (see cpp.py) that keeps a matrix in registers. The node
has no gradient (looking for one would cost more than the kernel); hc_pre's backward walks the steps in reverse by
`backward_reference`. Errors: the last two dims differ, or exceed 16.
"""
from __future__ import annotations

import torch

from .registry import Op, register, require

MOST = 16  # streams

SOURCE = """
template <int N> void run(const float* in, float* out, int64_t matrices, int64_t iters, float eps, int64_t given) {
  const int64_t n = N ? N : given;  // N = 0: not known at compile time
  for (int64_t m = 0; m < matrices; m++, in += n * n, out += n * n) {
    float c[N ? N : 16][N ? N : 16], sum[N ? N : 16];
    for (int i = 0; i < n; i++) {
      float top = in[i * n], total = 0;
      for (int j = 1; j < n; j++) top = std::max(top, in[i * n + j]);
      for (int j = 0; j < n; j++) total += c[i][j] = std::exp(in[i * n + j] - top);
      for (int j = 0; j < n; j++) c[i][j] = c[i][j] / total + eps;
    }
    for (int64_t step = 0; step < 2 * iters - 1; step++) {
      const bool columns = step % 2 == 0;
      for (int i = 0; i < n; i++) sum[i] = eps;
      for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) sum[columns ? j : i] += c[i][j];
      for (int i = 0; i < n; i++) sum[i] = 1 / sum[i];
      for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) c[i][j] *= sum[columns ? j : i];
    }
    for (int i = 0; i < n; i++) for (int j = 0; j < n; j++) out[i * n + j] = c[i][j];
  }
}

Tensor sinkhorn(const Tensor& logits, double eps, int64_t iters) {
  const Tensor in = floats(logits), out = torch::stable::empty_like(in);
  const int64_t n = in.size(-1);
  (n == 4 ? run<4> : run<0>)((const float*)in.data_ptr(), (float*)out.data_ptr(), in.numel() / (n * n), iters, eps, n);
  return out;
}
"""


def check(logits, eps, iters):
    require(logits.dim() >= 2 and 0 < logits.shape[-1] == logits.shape[-2] <= MOST,
            f"sinkhorn: logits {tuple(logits.shape)} are not [..., n, n] with n from 1 to {MOST}")
    require(iters > 0, f"sinkhorn: iters must be positive, not {iters}")


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


_opaque = register("sinkhorn(Tensor logits, float eps, int iters) -> Tensor",
                   impl=lambda *args: reference(*args).contiguous(), fake=lambda logits, *args: logits.new_empty(logits.shape),
                   flops=lambda *shapes, out_shape=None, **kw: 0, cpp=SOURCE)

sinkhorn = Op("sinkhorn", reference, _opaque, check)
