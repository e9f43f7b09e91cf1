"""hc_post: write an output back into the n residual streams (mHC, docs/v4.md#hyper-connections).

    x'_k = post_k y + sum_j comb[j, k] x_j        (combT x: the contraction is over the first index)

    y [B, T, d]   x [B, T, n, d]   post [B, T, n] fp32   comb [B, T, n, n] fp32
    x' [B, T, n, d] in the dtype of x; fp32 arithmetic, one cast

Errors: shapes that do not fit together.

Both directions are bounded by bandwidth, so their kernels touch each byte once. Forward: a program takes a piece of a
token's row from all n streams; post and comb are scalars to it. Backward: a program walks along a token's row; each thread
holds V neighbouring columns of everything, adds their part of the n + n n sums to registers of its own, and threads meet
only at the end of the row. No atomics: results do not vary from run to run. Above n = 8 the reference runs.
"""

from __future__ import annotations

import torch

from .cpp import plain
from .hc_cpp import SOURCE
from .launch import cdiv, get_config, jit, launch, power_of_two, tl
from .registry import Op, register, require
from .sinkhorn import IN_REGISTERS, as_columns

FORWARD = [
    {"BD": 2048, "num_warps": 8},
    {"BD": 2048, "num_warps": 4},
    {"BD": 1024, "num_warps": 4},
    {"BD": 512, "num_warps": 2},
]
BACKWARD = [
    {"BD": 2048, "V": 8, "num_warps": 8},
    {"BD": 1024, "V": 8, "num_warps": 4},
    {"BD": 512, "V": 4, "num_warps": 4},
]


def check(y, x, post, comb):
    require(x.dim() == 4, f"hc_post: x {tuple(x.shape)} is not [B, T, n, d]")
    B, T, n, d = x.shape
    require(
        y.shape == (B, T, d) and post.shape == (B, T, n) and comb.shape == (B, T, n, n),
        f"hc_post: y {tuple(y.shape)}, x {tuple(x.shape)}, post {tuple(post.shape)}, comb {tuple(comb.shape)} do not fit",
    )


def reference(
    y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    out = post[..., None] * y.float()[:, :, None]
    for j in range(
        x.shape[2]
    ):  # n small terms fuse into one pass over the streams, a matrix product would not
        out = out + comb[:, :, j, :, None] * x[:, :, j, None].float()
    return out.to(x.dtype).contiguous()


def backward_reference(
    g: torch.Tensor, y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
):
    """Gradients of y, x, post and comb."""
    g = g.float()
    g_y = torch.einsum("btk,btkd->btd", post, g)
    g_x = torch.einsum("btjk,btkd->btjd", comb, g)
    g_post = torch.einsum("btkd,btd->btk", g, y.float())
    g_comb = torch.einsum("btjd,btkd->btjk", x.float(), g)
    return g_y.to(y.dtype), g_x.to(x.dtype), g_post.contiguous(), g_comb.contiguous()


@jit
def load_scalars(at, count: tl.constexpr):
    out = ()
    for k in tl.static_range(count):
        out += (tl.load(at + k).to(tl.float32),)
    return out


@jit
def dot_all(weights, values, first: tl.constexpr, step: tl.constexpr, n: tl.constexpr):
    """sum_k weights[first + k step] values[k]"""
    out = weights[first] * values[0]
    for k in tl.static_range(1, n):
        out += weights[first + k * step] * values[k]
    return out


@jit
def hc_post_forward(y, x, post, comb, out, d, n: tl.constexpr, BD: tl.constexpr):
    blocks = tl.cdiv(d, BD)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    at, mask = token * n * d + cols, cols < d
    yt, xs = tl.load(y + token * d + cols, mask=mask, other=0.0).to(tl.float32), ()
    for j in tl.static_range(n):
        xs += (tl.load(x + at + j * d, mask=mask, other=0.0).to(tl.float32),)
    p, c = load_scalars(post + token * n, n), load_scalars(comb + token * n * n, n * n)
    for k in tl.static_range(n):
        tl.store(
            out + at + k * d,
            (p[k] * yt + dot_all(c, xs, k, n, n)).to(out.dtype.element_ty),
            mask=mask,
        )


@jit
def hc_post_backward(
    g,
    y,
    x,
    post,
    comb,
    g_y,
    g_x,
    g_post,
    g_comb,
    d,
    n: tl.constexpr,
    P: tl.constexpr,
    BD: tl.constexpr,
    V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    p, c, sums = load_scalars(post + token * n, n), load_scalars(comb + token * n * n, n * n), ()
    for _ in tl.static_range(n + n * n):
        sums += (tl.zeros([BD // V], tl.float32),)
    for start in range(0, d, BD):
        cols = (
            start + tl.arange(0, BD // V)[:, None] * V + tl.arange(0, V)[None, :]
        )  # a row of V is one thread's
        mask, at, gs, xs, new = cols < d, token * n * d + cols, (), (), ()
        for k in tl.static_range(n):
            gs += (tl.load(g + at + k * d, mask=mask, other=0.0).to(tl.float32),)
        yt = tl.load(y + token * d + cols, mask=mask, other=0.0).to(tl.float32)
        for j in tl.static_range(n):
            xs += (tl.load(x + at + j * d, mask=mask, other=0.0).to(tl.float32),)
        tl.store(
            g_y + token * d + cols, dot_all(p, gs, 0, 1, n).to(g_y.dtype.element_ty), mask=mask
        )
        for j in tl.static_range(n):
            tl.store(
                g_x + at + j * d, dot_all(c, gs, j * n, 1, n).to(g_x.dtype.element_ty), mask=mask
            )
        for k in tl.static_range(n):
            new += (sums[k] + tl.sum(gs[k] * yt, 1),)
        for k in tl.static_range(n * n):
            new += (sums[n + k] + tl.sum(xs[k // n] * gs[k % n], 1),)
        sums = new
    total = tl.sum(as_columns(sums, n + n * n, P), 0)  # all at once: threads meet one time
    k = tl.arange(0, P)
    tl.store(g_post + token * n + k, total, mask=k < n)
    tl.store(g_comb + token * n * n + k - n, total, mask=(k >= n) & (k < n + n * n))


def kernel(
    y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
) -> torch.Tensor:
    B, T, n, d = x.shape
    if n > IN_REGISTERS:
        return reference(y, x, post, comb)
    y, x, post, comb = (t.contiguous() for t in (y, x, post, comb))
    out, cfg = (
        torch.empty_like(x),
        get_config("hc_post_forward", f"n{n} d{d} {x.dtype}", FORWARD, x),
    )
    launch(hc_post_forward, (B * T * cdiv(d, cfg["BD"]),), y, x, post, comb, out, d, n=n, **cfg)
    return out


def backward_kernel(
    g: torch.Tensor, y: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor
):
    B, T, n, d = x.shape
    if n > IN_REGISTERS:
        return backward_reference(g, y, x, post, comb)
    g, *inputs = (t.contiguous() for t in (g, y, x, post, comb))
    out, cfg = (
        [torch.empty_like(t) for t in inputs],
        get_config("hc_post_backward", f"n{n} d{d} {x.dtype}", BACKWARD, x),
    )
    launch(hc_post_backward, (B * T,), g, *inputs, *out, d, n=n, P=power_of_two(n + n * n), **cfg)
    return tuple(out)


def _flops(y, x, *args, out_shape=None, **kw):
    """Elementwise: no matrix products are counted."""
    return 0


_backward_op = register(
    "hc_post_backward(Tensor g, Tensor y, Tensor x, Tensor post, Tensor comb) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    fake=lambda g, *inputs: tuple(t.new_empty(t.shape) for t in inputs),
    flops=_flops,
    kernel=backward_kernel,
    cpp=SOURCE,
    takes=plain,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, g):
    return _backward_op(g, *ctx.saved_tensors)


_opaque = register(
    "hc_post(Tensor y, Tensor x, Tensor post, Tensor comb) -> Tensor",
    impl=reference,
    fake=lambda y, x, post, comb: x.new_empty(x.shape),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
    kernel=kernel,
    cpp=SOURCE,
    takes=plain,
)


def _on_cpu(*args):
    """Compiled with gradients, a node in C++."""
    return (_opaque if torch.compiler.is_compiling() and torch.is_grad_enabled() else reference)(
        *args
    )


hc_post = Op("hc_post", reference, _opaque, check, on_cpu=_on_cpu)
