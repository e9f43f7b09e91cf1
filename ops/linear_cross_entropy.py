"""linear_cross_entropy: the loss of a linear head, without ever holding all logits
(docs/v4.md#training).

    logits = x W^T in fp32;   loss_i = logsumexp(logits_i) - logits_i[target_i], 0 if target_i < 0

    x [N, d]   weight [V, d]   target [N] int64, negative = ignored
    loss [N] fp32   lse [N] fp32

Logits are held in chunks, forward and backward; the backward recomputes them and takes the softmax
from lse. Formula: cross-entropy of the next token and of MTP, equation 24 of DeepSeek-V3 (arXiv
2412.19437), which arXiv 2606.19348 keeps. Errors: shapes that do not fit together.
"""

from __future__ import annotations

import torch

from .registry import Op, register, require
from .triton.linear_cross_entropy import backward_kernels, forward_kernels

CHUNK = 1 << 24  # logits held at a time by the reference


def check(x, weight, target):
    require(
        x.dim() == 2
        and weight.dim() == 2
        and x.shape[1] == weight.shape[1]
        and target.shape == x.shape[:1],
        f"linear_cross_entropy: x {tuple(x.shape)}, weight {tuple(weight.shape)}, "
        f"target {tuple(target.shape)} do not fit",
    )


def _chunks(N, V):
    """Slices of rows."""
    step = max(1, CHUNK // V)
    return [slice(start, min(start + step, N)) for start in range(0, max(N, 1), step)]


def forward_reference(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> loss, lse"""
    w = weight.float()
    losses, lses = [], []
    for rows in _chunks(x.shape[0], weight.shape[0]):
        logits = x[rows].float() @ w.T
        lse = logits.logsumexp(-1)
        t = target[rows]
        target_logit = logits.gather(1, t.clamp(min=0)[:, None])[:, 0]
        losses.append(torch.where(t < 0, 0.0, lse - target_logit))
        lses.append(lse)
    return torch.cat(losses), torch.cat(lses)


def backward_reference(
    g: torch.Tensor, lse: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor
):
    """Gradients of x and weight: those of the logits are p = (softmax - onehot(target)) g."""
    w = weight.float()
    g_x = x.new_empty(x.shape)
    g_w = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    for rows in _chunks(x.shape[0], weight.shape[0]):
        x_rows, t = x[rows].float(), target[rows]
        p = (x_rows @ w.T - lse[rows, None]).exp_()
        p.scatter_add_(1, t.clamp(min=0)[:, None], p.new_full((len(t), 1), -1.0))
        p *= torch.where(t < 0, 0.0, g[rows])[:, None]
        g_x[rows] = (p @ w).to(x.dtype)
        g_w += p.T @ x_rows
    return g_x, g_w.to(weight.dtype)


def _flops(x, weight, *args, out_shape=None, **kw):
    return 2 * x[0] * x[1] * weight[0]


_backward_op = register(
    "linear_cross_entropy_backward(Tensor g, Tensor lse, Tensor x, Tensor weight, Tensor target) "
    "-> (Tensor, Tensor)",
    impl=backward_reference,
    kernel=backward_kernels,
    fake=lambda g, lse, x, weight, target: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
    flops=lambda g, lse, x, weight, *args, out_shape=None, **kw: 3 * _flops(x, weight),
)


def _setup(ctx, inputs, output):
    _, lse = output
    ctx.save_for_backward(lse, *inputs)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx, g, _):
    return *_backward_op(g, *ctx.saved_tensors), None


_opaque = register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor target) -> (Tensor, Tensor)",
    impl=forward_reference,
    fake=lambda x, weight, target: tuple(
        x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2)
    ),
    kernel=forward_kernels,
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
)

linear_cross_entropy = Op(
    "linear_cross_entropy",
    lambda *args: forward_reference(*args)[0],
    lambda *args: _opaque(*args)[0],
    check,
)
