"""muon: one update of a stack of matrices in place, muon_direction: its main part, and grad_norm: the norm of many gradients (docs/v4.md#training).

    M = momentum M + scale G;   X = (momentum M + scale G) / its Frobenius norm
    X = a X + (b S + c S S) X,  S = X X^T      ten times: eight with (3.4445, -4.7750, 2.0315), two with (2, -1.5, 0.5)
    W = W (1 - lr decay) - lr 0.18 sqrt(max(n, m)) X

    p [..., blocks n, m] any float dtype   first (M), master (W; None: p is) likewise, fp32   g as p   scale, lr () fp32
    muon_direction: momentum M + scale G [..., blocks n, m] fp32 -> the last X, for matrices in parts (see parallel.py)
    grads: any tensors -> () fp32

All are opaque on every device: products with their sums in one library call each leave nothing for a compiler to fuse,
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


def low(m: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if m.is_cuda else torch.float32


def direction(m: torch.Tensor, blocks: int) -> torch.Tensor:
    m = m.unflatten(-2, (blocks, -1))
    return orthogonalize(m, low(m)).flatten(-3, -2).contiguous()


def length(shape: torch.Size, blocks: int) -> float:
    """How far a step goes in the direction X, as a multiple of lr."""
    return 0.18 * max(shape[-2] // blocks, shape[-1]) ** 0.5


def update(
    p: torch.Tensor,
    first: torch.Tensor,
    master: torch.Tensor | None,
    g: torch.Tensor,
    scale: torch.Tensor,
    lr: torch.Tensor,
    blocks: int,
    momentum: float,
    decay: float,
) -> None:
    g = g.float() * scale
    first.mul_(momentum).add_(g)
    u = direction(g.add_(first, alpha=momentum), blocks)
    weight = p if master is None else master
    weight.mul_(1 - lr * decay).sub_(u * (lr * length(p.shape, blocks)))
    if master is not None:
        p.copy_(master)


def norm(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.stack([n.float() for n in torch._foreach_norm(grads)]))


def _flops(m, blocks, *args, out_shape=None, **kw):
    """Three products a step, of the shorter side."""
    stack = 1
    for size in m[:-2]:
        stack *= size
    a, b = sorted((m[-2] // blocks, m[-1]))
    return stack * blocks * len(HYBRID) * 2 * (2 * a * a * b + a**3)


muon = register(
    "muon(Tensor(a!) p, Tensor(b!) first, Tensor(c!)? master, Tensor g, Tensor scale, Tensor lr, int blocks, float momentum, "
    "float decay) -> ()",
    impl=update,
    fake=lambda *args: None,
    flops=lambda p, *args, **kw: _flops(p, args[5]),
)
muon_direction = register(
    "muon_direction(Tensor m, int blocks) -> Tensor",
    impl=direction,
    flops=_flops,
    fake=lambda m, blocks: m.new_empty(m.shape, dtype=low(m)),
)
grad_norm = register(
    "grad_norm(Tensor[] grads) -> Tensor",
    impl=norm,
    fake=lambda grads: grads[0].new_empty((), dtype=torch.float32),
    flops=lambda *args, out_shape=None, **kw: 0,
)
