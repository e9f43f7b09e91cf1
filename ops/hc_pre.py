"""hc_pre: read one input from the n residual streams, and say how its output is written back (mHC, spec 3.1).

    v    = flatten(x)                                     fp32, n d long
    m    = (fn v) * rsqrt(mean(v^2) + norm_eps)           n + n + n n mixing values
    pre  = sigmoid(m * scale0 + base) + hc_eps            first n
    post = 2 sigmoid(m * scale1 + base)                   next n
    comb = softmax rows(m * scale2 + base) + hc_eps       the rest, [n, n]; then Sinkhorn: columns, and iters - 1 times
                                                          rows and columns, each divided by (sum + hc_eps)
    y    = sum_j pre_j x_j

    x [B, T, n, d]   fn [n (2 + n), n d]   base [n (2 + n)]   scale [3]
    y [B, T, d] in the dtype of x   post [B, T, n] fp32   comb [B, T, n, n] fp32

All arithmetic is fp32. The backward recomputes the mix from x and walks the Sinkhorn steps in reverse.
Errors: shapes that do not fit together.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .registry import Op, register, require
from .sinkhorn import backward_reference as sinkhorn_backward, sinkhorn


def check(x, fn, base, scale, norm_eps, hc_eps, iters):
    require(x.dim() == 4, f"hc_pre: x {tuple(x.shape)} is not [B, T, n, d]")
    n, d = x.shape[2:]
    rows = n * (2 + n)
    require(fn.shape == (rows, n * d) and base.shape == (rows,) and scale.shape == (3,),
            f"hc_pre: x {tuple(x.shape)}, fn {tuple(fn.shape)}, base {tuple(base.shape)}, scale {tuple(scale.shape)} do not fit")


def _mix(x, fn, norm_eps):
    """-> v [B, T, n d], un-normalised mix u [B, T, n (2 + n)], r [B, T, 1]; m = u r."""
    v = x.float().flatten(2)
    return v, F.linear(v, fn.float()), torch.rsqrt(v.square().mean(-1, keepdim=True) + norm_eps)


def _split(m, base, scale, n):
    """Mixing values -> logits of pre [B, T, n], post [B, T, n], comb [B, T, n, n]."""
    pre, post, comb = m.split([n, n, n * n], -1)
    b0, b1, b2 = base.float().split([n, n, n * n])
    s0, s1, s2 = scale.float().unbind()
    return pre * s0 + b0, post * s1 + b1, (comb * s2 + b2).unflatten(-1, (n, n))


def _forward(x, fn, base, scale, norm_eps, hc_eps, iters, sinkhorn):
    n = x.shape[2]
    _, u, r = _mix(x, fn, norm_eps)
    pre, post, comb = _split(u * r, base, scale, n)
    y = ((torch.sigmoid(pre) + hc_eps)[..., None] * x.float()).sum(2).to(x.dtype)
    return y, 2 * torch.sigmoid(post), sinkhorn(comb, hc_eps, iters)


def reference(x: torch.Tensor, fn: torch.Tensor, base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float,
              iters: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _forward(x, fn, base, scale, norm_eps, hc_eps, iters, sinkhorn.reference)


def backward_reference(g_y: torch.Tensor, g_post: torch.Tensor, g_comb: torch.Tensor, x: torch.Tensor, fn: torch.Tensor,
                       base: torch.Tensor, scale: torch.Tensor, norm_eps: float, hc_eps: float, iters: int):
    """Gradients of x, fn, base and scale."""
    n, xf, g_y = x.shape[2], x.float(), g_y.float()
    v, u, r = _mix(x, fn, norm_eps)
    m = u * r
    pre, post, comb = _split(m, base, scale, n)
    pre, post, g = torch.sigmoid(pre), torch.sigmoid(post), sinkhorn_backward(g_comb.float(), comb, hc_eps, iters)
    g_pre = torch.einsum("btd,btjd->btj", g_y, xf) * pre * (1 - pre)
    g_logit = torch.cat((g_pre, g_post.float() * 2 * post * (1 - post), g.flatten(-2)), -1)  # [B, T, n (2 + n)]
    g_base = g_logit.sum((0, 1))
    g_scale = torch.stack([part.sum() for part in (g_logit * m).split([n, n, n * n], -1)])
    g_m = g_logit * torch.cat([s.expand(k) for s, k in zip(scale.float(), (n, n, n * n))])
    g_u = g_m * r
    g_v = g_u @ fn.float() - (g_m * u).sum(-1, keepdim=True) * r**3 * v / v.shape[-1]
    g_x = (pre + hc_eps)[..., None] * g_y[:, :, None] + g_v.view_as(xf)
    g_fn = g_u.flatten(0, 1).T @ v.flatten(0, 1)
    return g_x.to(x.dtype), g_fn.to(fn.dtype), g_base.to(base.dtype), g_scale.to(scale.dtype)


def _fake(x, fn, base, scale, norm_eps, hc_eps, iters):
    B, T, n, d = x.shape
    return x.new_empty(B, T, d), x.new_empty(B, T, n, dtype=torch.float32), x.new_empty(B, T, n, n, dtype=torch.float32)


def _flops(x, fn, *args, out_shape=None, **kw):
    """The mix is the only matrix product; pre, post and the collapse are elementwise."""
    return 2 * x[0] * x[1] * fn[0] * fn[1]


_backward_op = register(
    "hc_pre_backward(Tensor g_y, Tensor g_post, Tensor g_comb, Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, "
    "float hc_eps, int iters) -> (Tensor, Tensor, Tensor, Tensor)", impl=backward_reference,
    fake=lambda g_y, g_post, g_comb, x, fn, base, scale, *args: tuple(t.new_empty(t.shape) for t in (x, fn, base, scale)),
    flops=lambda g_y, g_post, g_comb, x, fn, *args, out_shape=None, **kw: 3 * _flops(x, fn))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.constants = inputs[4:]


def _backward(ctx, g_y, g_post, g_comb):
    return *_backward_op(g_y, g_post, g_comb, *ctx.saved_tensors, *ctx.constants), None, None, None


_opaque = register("hc_pre(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps, int iters) "
                   "-> (Tensor, Tensor, Tensor)", impl=reference, fake=_fake, flops=_flops, setup_context=_setup,
                   backward=_backward)


def _on_cpu(*args):
    """Compiled, a traced Sinkhorn would take half of the compile time: it is one node, or with gradients all of hc_pre is."""
    if not torch.compiler.is_compiling():
        return reference(*args)
    return _opaque(*args) if torch.is_grad_enabled() else _forward(*args, sinkhorn.opaque)


hc_pre = Op("hc_pre", reference, _opaque, check, on_cpu=_on_cpu)
