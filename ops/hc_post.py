"""hc_post: write the output of a sub-layer back into the n residual streams.

    x'_k = post_k y + sum_j comb[j, k] x_j        (the contraction is over the first index of comb)

    y [B, T, d]   x [B, T, n, d]   post [B, T, n] fp32   comb [B, T, n, n] fp32
    x' [B, T, n, d] in the dtype of x; fp32 arithmetic, one cast

Formula: manifold-constrained hyper-connections (mHC) of arXiv 2606.19348, as in DeepSeek's code
(`hc_post` in inference/model.py): docs/v4.md#hyper-connections. Gradients of all four. Errors:
shapes that do not fit together. The kernels are in triton/hc_post.py, for up to 8 streams; with
more the references run.
"""

from __future__ import annotations

import torch

from .cpp import enabled, supports_cpp
from .registry import Op, register, require
from .triton import hc_post as kernels
from .triton.sinkhorn import MAX_STREAMS


def check(y, x, post, comb):
    require(x.dim() == 4, f"hc_post: x {tuple(x.shape)} is not [B, T, n, d]")
    B, T, n, d = x.shape
    require(
        y.shape == (B, T, d) and post.shape == (B, T, n) and comb.shape == (B, T, n, n),
        f"hc_post: y {tuple(y.shape)}, x {tuple(x.shape)}, post {tuple(post.shape)}, "
        f"comb {tuple(comb.shape)} do not fit",
    )


def reference(
    y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    out = post[..., None] * y.float()[:, :, None]
    # n small terms fuse into one pass over the streams; a matrix product would not.
    for j in range(x.shape[2]):
        out = out + comb[:, :, j, :, None] * x[:, :, j, None].float()
    return out.to(x.dtype).contiguous()


def backward_reference(
    g: torch.Tensor, y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of y, x, post and comb."""
    g = g.float()
    g_y = torch.einsum("btk,btkd->btd", post, g)
    g_x = torch.einsum("btjk,btkd->btjd", comb, g)
    g_post = torch.einsum("btkd,btd->btk", g, y.float())
    g_comb = torch.einsum("btjd,btkd->btjk", x.float(), g)
    return g_y.to(y.dtype), g_x.to(x.dtype), g_post.contiguous(), g_comb.contiguous()


def forward(y, x, post, comb):
    """The kernel, for as many streams as it takes; else the reference."""
    return (reference if x.shape[2] > MAX_STREAMS else kernels.forward)(y, x, post, comb)


def backward(g, y, x, post, comb):
    """As `backward_reference`, with a kernel for as many streams as it takes."""
    form = backward_reference if x.shape[2] > MAX_STREAMS else kernels.backward
    return form(g, y, x, post, comb)


def _flops(y, x, *args, out_shape=None, **kw):
    """Elementwise: no matrix products are counted."""
    return 0


_backward_op = register(
    "hc_post_backward(Tensor g, Tensor y, Tensor x, Tensor post, Tensor comb) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    fake=lambda g, *inputs: tuple(t.new_empty(t.shape) for t in inputs),
    flops=_flops,
    kernel=backward,
    cpp="hc",
    supports_cpp=supports_cpp,
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, g):
    return _backward_op(g, *ctx.saved_tensors)


_opaque = register(
    "hc_post(Tensor y, Tensor x, Tensor post, Tensor comb) -> Tensor",
    impl=reference,
    fake=lambda y, x, post, comb: x.new_empty(x.shape),
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    kernel=forward,
    cpp="hc",
    supports_cpp=supports_cpp,
)


def on_cpu(*args):
    """Compiled with gradients, a node in C++."""
    training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if training and enabled("hc_post"):
        return _opaque(*args)
    return reference(*args)


hc_post = Op("hc_post", reference, _opaque, check, cpu=on_cpu, cpp={"train": ("hc_post",)})
