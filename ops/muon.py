"""muon: one update of a stack of matrices in place, muon_direction: its main part, and grad_norm:
the norm of many gradients (docs/v4.md#training).

    M = momentum M + scale G;   X = (momentum M + scale G) / its Frobenius norm
    X = a X + (b S + c S S) X,  S = X X^T
        ten times: eight with (a, b, c) = (3.4445, -4.7750, 2.0315), two with (2, -1.5, 0.5)
    W = W (1 - lr decay) - lr 0.18 sqrt(max(n, m)) X

    p          [..., blocks n, m] any float dtype
    first      M, fp32, as p
    master     W, fp32, as p; None: p is W
    g          as p
    scale, lr  () fp32
    muon_direction: momentum M + scale G [..., blocks n, m] fp32 -> the last X, for matrices that
        lie in parts on several ranks (see parallel.py)
    grad_norm: any tensors -> () fp32

All are opaque on every device: products with their sums in one library call each leave nothing for
a compiler to fuse, and generated code would be compiled for every shape. Products run in bf16 on a
GPU; CPUs multiply fp32 faster. The Newton-Schulz steps are those of arXiv 2606.19348
(docs/v4.md#training); torch.optim.Muon has one triple of coefficients and no stacks.
"""

from __future__ import annotations

import torch

from .registry import register

HYBRID = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2  # approach fast, then settle


def orthogonalize(m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Push the singular values of matrices [..., a, b] towards 1 -> in dtype."""
    x = m.reshape(-1, *m.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)).to(dtype)
    for a, b, c in HYBRID:
        s = x @ x.mT
        polynomial = torch.baddbmm(s, s, s, beta=b, alpha=c)  # b S + c S S
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if tall:
        x = x.mT
    return x.reshape(m.shape)


def product_dtype(m: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if m.is_cuda else torch.float32


def direction(m: torch.Tensor, blocks: int) -> torch.Tensor:
    m = m.unflatten(-2, (blocks, -1))
    return orthogonalize(m, product_dtype(m)).flatten(-3, -2).contiguous()


def step_length(shape: torch.Size, blocks: int) -> float:
    """Length of a step in the direction X, as a multiple of lr."""
    return 0.18 * max(shape[-2] // blocks, shape[-1]) ** 0.5


def update(
    # state
    p: torch.Tensor,
    first: torch.Tensor,
    master: torch.Tensor | None,
    # gradient, its factor, learning rate
    g: torch.Tensor,
    scale: torch.Tensor,
    lr: torch.Tensor,
    # matrices in dim -2
    blocks: int,
    momentum: float,
    decay: float,
) -> None:
    g = g.float() * scale
    first.mul_(momentum).add_(g)
    u = direction(g.add_(first, alpha=momentum), blocks)
    weight = p if master is None else master
    weight.mul_(1 - lr * decay)
    weight.sub_(u * (lr * step_length(p.shape, blocks)))
    if master is not None:
        p.copy_(master)


def norm(grads: list[torch.Tensor]) -> torch.Tensor:
    # as torch.nn.utils.get_total_norm: torch/nn/utils/clip_grad.py line 95
    norms = [n.float() for n in torch._foreach_norm(grads)]
    return torch.linalg.vector_norm(torch.stack(norms))


def _flops(m, blocks, *args, out_shape=None, **kw):
    """Three products of each of the ten steps; a is the shorter side."""
    stack = 1
    for size in m[:-2]:
        stack *= size
    a, b = sorted((m[-2] // blocks, m[-1]))
    return stack * blocks * len(HYBRID) * 2 * (2 * a * a * b + a**3)


muon = register(
    "muon(Tensor(a!) p, Tensor(b!) first, Tensor(c!)? master, Tensor g, Tensor scale, Tensor lr, "
    "int blocks, float momentum, float decay) -> ()",
    impl=update,
    fake=lambda *args: None,
    flops=lambda p, *args, **kw: _flops(p, args[5]),
)
muon_direction = register(
    "muon_direction(Tensor m, int blocks) -> Tensor",
    impl=direction,
    flops=_flops,
    fake=lambda m, blocks: m.new_empty(m.shape, dtype=product_dtype(m)),
)
grad_norm = register(
    "grad_norm(Tensor[] grads) -> Tensor",
    impl=norm,
    fake=lambda grads: grads[0].new_empty((), dtype=torch.float32),
    flops=lambda *args, out_shape=None, **kw: 0,
)
