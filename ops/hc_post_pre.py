"""hc_post_pre: hc_post, then hc_pre of the streams it wrote: all that lies between two sub-layers.

    x'                = hc_post(y, x, post, comb)
    y', post', comb'  = hc_pre(x', fn, base, scale, norm_eps, hc_eps, iters)

Shapes, dtypes, rounding, errors and sources are those of hc_post.py and hc_pre.py
(docs/v4.md#hyper-connections); x' is rounded to its dtype before it is mixed. Gradients of all
seven tensors. Backward: that of hc_pre, which adds the gradient that x' has from elsewhere before
it rounds, then that of hc_post. The kernels are in triton/hc_post_pre.py, for up to 8 streams; with
more the references run.
"""

from __future__ import annotations

import torch

from .cpp import enabled, supports_cpp
from .hc_post import backward as post_backward
from .hc_post import backward_reference as post_backward_reference
from .hc_post import reference as post_reference
from .hc_pre import backward as pre_backward
from .hc_pre import backward_reference as pre_backward_reference
from .hc_pre import fake as pre_fake
from .hc_pre import flops as pre_flops
from .hc_pre import on_cpu as pre_on_cpu
from .hc_pre import reference as pre_reference
from .registry import Op, register, require
from .triton import hc_post_pre as kernels
from .triton.sinkhorn import MAX_STREAMS


def check(y, x, post, comb, fn, base, scale, *constants):
    require(x.dim() == 4, f"hc_post_pre: x {tuple(x.shape)} is not [B, T, n, d]")
    B, T, n, d = x.shape
    rows = n * (2 + n)
    expected = {
        "y": (y, (B, T, d)),
        "post": (post, (B, T, n)),
        "comb": (comb, (B, T, n, n)),
        "fn": (fn, (rows, n * d)),
        "base": (base, (rows,)),
        "scale": (scale, (3,)),
    }
    for name, (tensor, shape) in expected.items():
        given = tuple(tensor.shape)
        require(given == shape, f"hc_post_pre: {name} {given} does not go with x {tuple(x.shape)}")


def reference(
    # of hc_post
    y: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    # of hc_pre
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    # constants
    norm_eps: float,
    hc_eps: float,
    iters: int,
) -> tuple[torch.Tensor, ...]:
    x = post_reference(y, x, post, comb)
    return x, *pre_reference(x, fn, base, scale, norm_eps, hc_eps, iters)


def backward_reference(
    # gradients of the outputs
    g_x,
    g_y,
    g_post,
    g_comb,
    # of hc_post, and its result
    y,
    x,
    post,
    comb,
    out,
    *rest,
):
    """Gradients of y, x, post, comb, fn, base and scale, from those of the outputs; out is x'.

    rest: fn, base, scale, norm_eps, hc_eps, iters
    """
    g_out, *g_parameters = pre_backward_reference(g_y, g_post, g_comb, out, *rest, g_x)
    return *post_backward_reference(g_out, y, x, post, comb), *g_parameters


def backward(
    # gradients of the outputs
    g_x,
    g_y,
    g_post,
    g_comb,
    # of hc_post, and its result
    y,
    x,
    post,
    comb,
    out,
    *rest,
):
    """As `backward_reference`, with the kernels of hc_pre and hc_post."""
    g_out, *g_parameters = pre_backward(g_y, g_post, g_comb, out, *rest, g_x)
    return *post_backward(g_out, y, x, post, comb), *g_parameters


def forward(y, x, *rest):
    """The kernels, for as many streams as they take; else the reference."""
    return (reference if x.shape[2] > MAX_STREAMS else kernels.forward)(y, x, *rest)


def _fake(y, x, post, comb, *rest):
    return x.new_empty(x.shape), *pre_fake(x, *rest)


def _flops(y, x, post, comb, fn, *args, out_shape=None, **kw):
    return pre_flops(x, fn)


def _backward_fake(
    # gradients of the outputs
    g_x,
    g_y,
    g_post,
    g_comb,
    # of hc_post, and its result
    y,
    x,
    post,
    comb,
    out,
    # of hc_pre
    fn,
    base,
    scale,
    *constants,
):
    return tuple(t.new_empty(t.shape) for t in (y, x, post, comb, fn, base, scale))


def _backward_flops(
    # gradients of the outputs
    g_x,
    g_y,
    g_post,
    g_comb,
    # of hc_post, and its result
    y,
    x,
    post,
    comb,
    out,
    # of hc_pre
    fn,
    *args,
    **kw,
):
    return 3 * pre_flops(x, fn)


_backward_op = register(
    "hc_post_pre_backward(Tensor g_x, Tensor g_y, Tensor g_post, Tensor g_comb, Tensor y, "
    "Tensor x, Tensor post, Tensor comb, Tensor out, Tensor fn, Tensor base, Tensor scale, "
    "float norm_eps, float hc_eps, int iters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    fake=_backward_fake,
    flops=_backward_flops,
    kernel=backward,
    cpp="hc",
    supports_cpp=supports_cpp,
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[0], *inputs[4:7])
    ctx.constants = inputs[7:]


def _backward(ctx, *gradients):
    return *_backward_op(*gradients, *ctx.saved_tensors, *ctx.constants), None, None, None


_opaque = register(
    "hc_post_pre(Tensor y, Tensor x, Tensor post, Tensor comb, Tensor fn, Tensor base, "
    "Tensor scale, float norm_eps, float hc_eps, int iters) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=reference,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    kernel=forward,
    cpp="hc",
    supports_cpp=supports_cpp,
)


def on_cpu(y, x, post, comb, *rest):
    """Compiled with gradients, a node in C++; else hc_post, then hc_pre as it runs on CPU."""
    training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if training and enabled("hc_post_pre"):
        return _opaque(y, x, post, comb, *rest)
    x = post_reference(y, x, post, comb)
    return x, *pre_on_cpu(x, *rest)


hc_post_pre = Op(
    "hc_post_pre",
    reference,
    _opaque,
    check,
    cpu=on_cpu,
    cpp={"decode": ("sinkhorn",), "prefill": ("sinkhorn",), "train": ("hc_post_pre",)},
)
