"""muon: one update of a stack of matrices in place, and grad_norm: the norm of many gradients (spec 12).

    M = momentum M + scale G;   X = (momentum M + scale G) / its Frobenius norm
    X = a X + (b S + c S S) X,  S = X X^T      ten times: eight with (3.4445, -4.7750, 2.0315), two with (2, -1.5, 0.5)
    W = W (1 - lr decay) - lr 0.18 sqrt(max(n, m)) X

    p [..., blocks n, m] any float dtype   first (M), master (W; None: p is) likewise, fp32   g as p   scale, lr () fp32
    grads: any tensors -> () fp32

Both are opaque on every device: products with their sums in one library call each leave nothing for a compiler to fuse,
and generated code would be compiled for every shape. Products run in bf16 on a GPU; CPUs multiply fp32 faster.
The Newton-Schulz steps are those of DeepSeek-V4's paper; torch.optim.Muon has one triple of coefficients and no stacks.
"""
from __future__ import annotations

import torch

from .registry import register

HYBRID = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2  # approach fast, then settle


def orthogonalize(m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Push the singular values of matrices [..., a, b] towards 1 -> in dtype."""
    x = m.reshape(-1, *m.shape[-2:])
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-12)).to(dtype)
    for a, b, c in HYBRID:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(m.shape)


def update(p: torch.Tensor, first: torch.Tensor, master: torch.Tensor | None, g: torch.Tensor, scale: torch.Tensor, lr: torch.Tensor,
           blocks: int, momentum: float, decay: float) -> None:
    g = g.float() * scale
    first.mul_(momentum).add_(g)
    m = g.add_(first, alpha=momentum).unflatten(-2, (blocks, -1))
    u = orthogonalize(m, torch.bfloat16 if m.is_cuda else torch.float32).flatten(-3, -2)
    weight = p if master is None else master
    weight.mul_(1 - lr * decay).sub_(u * (lr * (0.18 * max(m.shape[-2:]) ** 0.5)))
    if master is not None:
        p.copy_(master)


def norm(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(grads)]))


def _flops(p, *args, out_shape=None, **kw):
    """Three products a step, of the shorter side."""
    blocks, stack = args[5], 1
    for size in p[:-2]:
        stack *= size
    a, b = sorted((p[-2] // blocks, p[-1]))
    return stack * blocks * len(HYBRID) * 2 * (2 * a * a * b + a**3)


muon = register("muon(Tensor(a!) p, Tensor(b!) first, Tensor(c!)? master, Tensor g, Tensor scale, Tensor lr, int blocks, float momentum, "
                "float decay) -> ()", impl=update, fake=lambda *args: None, flops=_flops)
grad_norm = register("grad_norm(Tensor[] grads) -> Tensor", impl=norm, fake=lambda grads: grads[0].new_empty((), dtype=torch.float32),
                     flops=lambda *args, out_shape=None, **kw: 0)
