"""sinkhorn: turn logits into nearly doubly stochastic matrices; the inner part of hc_pre.

    c = softmax over rows (logits) + eps
    c = c / (column sums + eps)
    iters - 1 times:  c = c / (row sums + eps);  c = c / (column sums + eps)

    logits [..., n, n] fp32   c [..., n, n] fp32

Formula: eq. 8 of arXiv 2606.19348, in the order of DeepSeek's code (`hc_split_sinkhorn` in
inference/kernel.py), which ends with columns: docs/v4.md#hyper-connections,
docs/v4.md#disagreements. Errors: the last two dims differ or exceed 16; iters < 1.

Traced, these are 2 iters small loops, half of all nodes of a whole model. So hc_pre makes it one
node when compiled for CPU without gradients, with a C++ kernel (see cpp.py) that keeps a matrix in
registers. The node has no gradient (looking for one would cost more than the kernel); hc_pre's
backward walks the steps in reverse by `backward_reference`.
"""

from __future__ import annotations

import torch

from .registry import LAUNCHERS, Op, register, require
from .triton import sinkhorn as kernels

MAX_STREAMS = 16


def check(logits, eps, iters):
    require(
        logits.dim() >= 2 and 0 < logits.shape[-1] == logits.shape[-2] <= MAX_STREAMS,
        f"sinkhorn: logits {tuple(logits.shape)} are not [..., n, n] with n from 1 to "
        f"{MAX_STREAMS}",
    )
    require(iters > 0, f"sinkhorn: iters must be positive, not {iters}")


def summed_axes(iters: int) -> list[int]:
    """The axis of the sums in each division: columns (-2), then rows and columns by turns."""
    return [-2] + [-1, -2] * (iters - 1)


def reference(logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    c = logits.softmax(-1) + eps
    for axis in summed_axes(iters):
        c = c / (c.sum(axis, keepdim=True) + eps)
    return c


def backward_reference(
    g: torch.Tensor, logits: torch.Tensor, eps: float, iters: int
) -> torch.Tensor:
    """Gradient of logits."""
    soft = logits.softmax(-1)
    c = soft + eps
    steps = []  # the matrix after each division, with the divisor and its axis
    for axis in summed_axes(iters):
        divisor = c.sum(axis, keepdim=True) + eps
        c = c / divisor
        steps.append((c, divisor, axis))
    for c, divisor, axis in reversed(steps):
        g = (g - (g * c).sum(axis, keepdim=True)) / divisor
    return soft * (g - (g * soft).sum(-1, keepdim=True))


def forward(logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    """The kernel, for as many streams as it takes; else the reference."""
    if logits.shape[-1] > kernels.MAX_STREAMS:
        return reference(logits, eps, iters).contiguous()
    return kernels.forward(logits, eps, iters)


def backward(g: torch.Tensor, logits: torch.Tensor, eps: float, iters: int) -> torch.Tensor:
    """As `backward_reference`; for benchmarks: in a model it happens inside hc_pre's backward."""
    if logits.shape[-1] > kernels.MAX_STREAMS:
        return backward_reference(g, logits, eps, iters)
    return kernels.backward(g, logits, eps, iters)


_opaque = register(
    "sinkhorn(Tensor logits, float eps, int iters) -> Tensor",
    impl=lambda *args: reference(*args).contiguous(),
    fake=lambda logits, *args: logits.new_empty(logits.shape),
    flops=lambda *shapes, out_shape=None, **kw: 0,
    cpp="sinkhorn",
    kernel=forward,
)

LAUNCHERS["sinkhorn_backward"] = backward

sinkhorn = Op("sinkhorn", reference, _opaque, check, internal=True)
