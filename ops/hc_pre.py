"""hc_pre: read a sub-layer's input from n residual streams, and compute how to write to them.

    v    = flatten(x)                                     fp32, [n d]
    m    = (fn v) * rsqrt(mean(v^2) + norm_eps)           n + n + n n mixing values
    pre  = sigmoid(m * scale0 + base) + hc_eps            from the first n
    post = 2 sigmoid(m * scale1 + base)                   from the next n
    comb = sinkhorn(m * scale2 + base)                    from the rest, [n, n], row-major
    y    = sum_j pre_j x_j

    x [B, T, n, d]   fn [n (2 + n), n d]   base [n (2 + n)]   scale [3]
    y [B, T, d] in the dtype of x   post [B, T, n] fp32   comb [B, T, n, n] fp32

Formula: manifold-constrained hyper-connections (mHC) of arXiv 2606.19348, as in DeepSeek's code
(`hc_pre` in inference/model.py, `hc_split_sinkhorn` in inference/kernel.py):
docs/v4.md#hyper-connections.

All arithmetic is fp32. The backward recomputes the mixing values from x. Its gradients are those of
all four tensors. Errors: shapes that do not fit together. The kernels are in triton/hc_pre.py and
triton/hc_pre_backward.py, for up to 8 streams; with more the references run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cpp import enabled, supports_cpp
from .linear import linear
from .registry import Op, register, require
from .sinkhorn import backward_reference as sinkhorn_backward
from .sinkhorn import sinkhorn
from .triton import hc_pre as kernels
from .triton import hc_pre_backward as backward_kernels
from .triton.sinkhorn import MAX_STREAMS


def check(x, fn, base, scale, norm_eps, hc_eps, iters):
    require(x.dim() == 4, f"hc_pre: x {tuple(x.shape)} is not [B, T, n, d]")
    n, d = x.shape[2:]
    rows = n * (2 + n)
    require(
        fn.shape == (rows, n * d) and base.shape == (rows,) and scale.shape == (3,),
        f"hc_pre: x {tuple(x.shape)}, fn {tuple(fn.shape)}, base {tuple(base.shape)}, "
        f"scale {tuple(scale.shape)} do not fit",
    )


def mix(x, fn, norm_eps, linear=F.linear):
    """-> v [B, T, n d], mixing values before the norm u [B, T, n (2 + n)], r [B, T, 1]; m = u r."""
    v = x.float().flatten(2)
    r = torch.rsqrt(v.square().mean(-1, keepdim=True) + norm_eps)
    return v, linear(v, fn.float()), r


def split_mix(m, base, scale, n):
    """Mixing values -> logits of pre [B, T, n], post [B, T, n], comb [B, T, n, n]."""
    sizes = [n, n, n * n]
    m_pre, m_post, m_comb = m.split(sizes, -1)
    base_pre, base_post, base_comb = base.float().split(sizes)
    scale_pre, scale_post, scale_comb = scale.float().unbind()
    pre = m_pre * scale_pre + base_pre
    post = m_post * scale_post + base_post
    comb = (m_comb * scale_comb + base_comb).unflatten(-1, (n, n))
    return pre, post, comb


def compute(x, fn, base, scale, norm_eps, hc_eps, iters, sinkhorn, linear=F.linear):
    """The formula, with a form of sinkhorn and of linear."""
    n = x.shape[2]
    _, u, r = mix(x, fn, norm_eps, linear)
    pre, post, comb = split_mix(u * r, base, scale, n)
    y = ((torch.sigmoid(pre) + hc_eps)[..., None] * x.float()).sum(2).to(x.dtype)
    return y, 2 * torch.sigmoid(post), sinkhorn(comb, hc_eps, iters)


def reference(x, fn, base, scale, norm_eps, hc_eps, iters):
    return compute(x, fn, base, scale, norm_eps, hc_eps, iters, sinkhorn.reference)


def backward_reference(
    # gradients of the outputs
    g_y,
    g_post,
    g_comb,
    # the inputs of the forward
    x,
    fn,
    base,
    scale,
    # constants
    norm_eps,
    hc_eps,
    iters,
    g_in=None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, fn, base and scale; g_in is a gradient of x from elsewhere, to be added."""
    n = x.shape[2]
    sizes = (n, n, n * n)
    xf = x.float()
    g_y = g_y.float()
    v, u, r = mix(x, fn, norm_eps)
    m = u * r
    pre, post, comb = split_mix(m, base, scale, n)
    pre = torch.sigmoid(pre)
    post = torch.sigmoid(post)

    # Of the logits of pre, post and comb, [B, T, n (2 + n)]: logits = m scale + base.
    g_logits_pre = torch.einsum("btd,btjd->btj", g_y, xf) * pre * (1 - pre)
    g_logits_post = g_post.float() * 2 * post * (1 - post)
    g_logits_comb = sinkhorn_backward(g_comb.float(), comb, hc_eps, iters).flatten(-2)
    g_logits = torch.cat((g_logits_pre, g_logits_post, g_logits_comb), -1)
    g_base = g_logits.sum((0, 1))
    g_scale = torch.stack([part.sum() for part in (g_logits * m).split(sizes, -1)])

    # Of m, then of u and v: m = u r, u = fn v, r = rsqrt(mean(v^2) + norm_eps).
    scale_by_row = [s.expand(size) for s, size in zip(scale.float(), sizes, strict=True)]
    g_m = g_logits * torch.cat(scale_by_row)
    g_u = g_m * r
    g_v = g_u @ fn.float() - (g_m * u).sum(-1, keepdim=True) * r**3 * v / v.shape[-1]

    # x is read by y = sum_j pre_j x_j and by v.
    g_x = (pre + hc_eps)[..., None] * g_y[:, :, None] + g_v.view_as(xf)
    if g_in is not None:
        g_x = g_x + g_in
    g_fn = g_u.flatten(0, 1).T @ v.flatten(0, 1)
    return g_x.to(x.dtype), g_fn.to(fn.dtype), g_base.to(base.dtype), g_scale.to(scale.dtype)


def forward(x, *rest):
    """The kernels, for as many streams as they take; else the reference."""
    return (reference if x.shape[2] > MAX_STREAMS else kernels.forward)(x, *rest)


def backward(g_y, g_post, g_comb, x, *rest):
    """As `backward_reference`, with kernels for as many streams as they take."""
    form = backward_reference if x.shape[2] > MAX_STREAMS else backward_kernels.backward
    return form(g_y, g_post, g_comb, x, *rest)


def fake(x, *rest):
    B, T, n, d = x.shape
    y = x.new_empty(B, T, d)
    post = x.new_empty(B, T, n, dtype=torch.float32)
    comb = x.new_empty(B, T, n, n, dtype=torch.float32)
    return y, post, comb


def flops(x, fn, *args, out_shape=None, **kw):
    """The mix is the only matrix product; pre, post and y are elementwise."""
    return 2 * x[0] * x[1] * fn[0] * fn[1]


def _backward_flops(g_y, g_post, g_comb, x, fn, *args, out_shape=None, **kw):
    return 3 * flops(x, fn)


def _backward_fake(g_y, g_post, g_comb, x, fn, base, scale, *constants):
    return tuple(t.new_empty(t.shape) for t in (x, fn, base, scale))


_backward_op = register(
    "hc_pre_backward(Tensor g_y, Tensor g_post, Tensor g_comb, Tensor x, Tensor fn, Tensor base, "
    "Tensor scale, float norm_eps, float hc_eps, int iters) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
    kernel=backward,
    cpp="hc",
    supports_cpp=supports_cpp,
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.constants = inputs[4:]


def _backward(ctx, g_y, g_post, g_comb):
    grads = _backward_op(g_y, g_post, g_comb, *ctx.saved_tensors, *ctx.constants)
    return *grads, None, None, None


_opaque = register(
    "hc_pre(Tensor x, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps, "
    "int iters) -> (Tensor, Tensor, Tensor)",
    impl=reference,
    fake=fake,
    flops=flops,
    setup_context=_setup_context,
    backward=_backward,
    kernel=forward,
    cpp="hc",
    supports_cpp=supports_cpp,
)


def on_cpu(*args):
    """Traced, Sinkhorn takes half of the compile time: compiled, it is one node in C++.

    With gradients all of hc_pre is.
    """
    if not torch.compiler.is_compiling():
        return reference(*args)
    if torch.is_grad_enabled():
        return _opaque(*args) if enabled("hc_pre") else reference(*args)
    form = sinkhorn.opaque if enabled("sinkhorn") else sinkhorn.reference
    return compute(*args, form, linear.cpu)


hc_pre = Op(
    "hc_pre",
    reference,
    _opaque,
    check,
    cpu=on_cpu,
    cpp={"decode": ("sinkhorn",), "prefill": ("sinkhorn",), "train": ("hc_pre",)},
)
