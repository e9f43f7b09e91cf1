"""hc_post_pre: hc_post, then hc_pre of what it wrote: all that lies between two sub-layers (mHC, docs/v4.md#hyper-connections).

    x'                = hc_post(y, x, post, comb)
    y', post', comb'  = hc_pre(x', fn, base, scale, norm_eps, hc_eps, iters)

Shapes, dtypes, roundings and errors are theirs; x' is rounded to its dtype before it is mixed.

On a GPU, two launches. `hc_post_pre_mix` makes x' for a block of tokens and some columns of all n streams, writes it, and
multiplies it by fn while it is still at hand; `hc_pre_finish` does the rest. So the mix reads no stream a second time. The
collapse has to: it needs the mix of whole rows. It begins with the tokens that were written last and may still be cached;
up to about a thousand all are. Backward: that of hc_pre, which adds the gradient that x' has from elsewhere before it
rounds, then that of hc_post.
"""

from __future__ import annotations

import torch

from .cpp import plain
from .hc_cpp import SOURCE
from .hc_post import backward_kernel as post_backward_kernel
from .hc_post import backward_reference as post_backward
from .hc_post import dot_all
from .hc_post import reference as post_reference
from .hc_pre import FEW, add_mix, key, launch_finish, row_sums, split, store_mix
from .hc_pre import _fake as pre_fake
from .hc_pre import _flops as pre_flops
from .hc_pre import _on_cpu as pre_on_cpu
from .hc_pre import backward_kernel as pre_backward_kernel
from .hc_pre import backward_reference as pre_backward
from .hc_pre import reference as pre_reference
from .launch import cdiv, get_config, jit, launch, power_of_two, tl
from .registry import Op, register, require
from .sinkhorn import IN_REGISTERS

MIX = [
    {"BT": 64, "BD": 64, "STAGES": 3, "num_warps": 8},
    {"BT": 64, "BD": 64, "STAGES": 2, "num_warps": 8},
    {"BT": 64, "BD": 32, "STAGES": 2, "num_warps": 8},
    {"BT": 32, "BD": 32, "STAGES": 2, "num_warps": 4},
]
MIX_FEW = [
    {"BT": 16, "BD": 64, "STAGES": 2, "num_warps": 4},
    {"BT": 16, "BD": 32, "STAGES": 2, "num_warps": 4},
]


def check(y, x, post, comb, fn, base, scale, *constants):
    require(x.dim() == 4, f"hc_post_pre: x {tuple(x.shape)} is not [B, T, n, d]")
    B, T, n, d = x.shape
    rows = n * (2 + n)
    fits = dict(
        y=(B, T, d), post=(B, T, n), comb=(B, T, n, n), fn=(rows, n * d), base=(rows,), scale=(3,)
    )
    for (name, shape), t in zip(fits.items(), (y, post, comb, fn, base, scale)):
        require(
            t.shape == shape,
            f"hc_post_pre: {name} {tuple(t.shape)} does not go with x {tuple(x.shape)}",
        )


def reference(
    y: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
):
    x = post_reference(y, x, post, comb)
    return x, *pre_reference(x, fn, base, scale, norm_eps, hc_eps, iters)


def _backwards(pre, post):
    def backward(g_x, g_y, g_post, g_comb, y, x, post_in, comb_in, out, *rest):
        g, *of_pre = pre(g_y, g_post, g_comb, out, *rest, g_x)
        return *post(g, y, x, post_in, comb_in), *of_pre

    return backward


backward_reference = _backwards(pre_backward, post_backward)
"""Gradients of y, x, post, comb, fn, base and scale, from those of the outputs; out is x'."""


@jit
def hc_post_pre_mix(
    y,
    x,
    post,
    comb,
    fn,
    out,
    partial,
    N,
    d,
    width,
    splits,
    n: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    V: tl.constexpr,
    STAGES: tl.constexpr,
):
    s = tl.program_id(0) % splits
    t, row = tl.program_id(0) // splits * BT + tl.arange(0, BT), tl.arange(0, C)
    token, there, p, c = t.to(tl.int64)[:, None], (t < N)[:, None], (), ()
    for k in tl.static_range(n):
        p += (tl.load(post + token * n + k, mask=there, other=0.0).to(tl.float32),)
    for k in tl.static_range(n * n):
        c += (tl.load(comb + token * (n * n) + k, mask=there, other=0.0).to(tl.float32),)
    squares, end = tl.zeros([BT, BD // V], tl.float32), tl.minimum((s + 1) * width, d)
    acc = tl.zeros([2 * C if x.dtype.element_ty == tl.bfloat16 else C, BT], tl.float32)
    for start in tl.range(s * width, end, BD, num_stages=STAGES):
        cols, xs = (start + tl.arange(0, BD))[None, :], ()
        mask = there & (cols < end)
        yt = tl.load(y + token * d + cols, mask=mask, other=0.0).to(tl.float32)
        for j in tl.static_range(n):
            xs += (tl.load(x + (token * n + j) * d + cols, mask=mask, other=0.0).to(tl.float32),)
        for k in tl.static_range(n):
            new = (p[k] * yt + dot_all(c, xs, k, n, n)).to(out.dtype.element_ty)
            tl.store(out + (token * n + k) * d + cols, new, mask=mask)
            f = tl.load(
                fn + (row[:, None] * n + k) * d + cols,
                mask=(row < R)[:, None] & (cols < end),
                other=0.0,
            ).to(tl.float32)
            acc = add_mix(acc, f, new)
            new = new.to(tl.float32)
            squares += row_sums(new * new, V)
    store_mix(partial + t.to(tl.int64) * splits + s, acc, squares, N, splits, t, R, C)


def kernel(
    y: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    norm_eps: float,
    hc_eps: float,
    iters: int,
):
    B, T, n, d = x.shape
    if n > IN_REGISTERS:
        return reference(y, x, post, comb, fn, base, scale, norm_eps, hc_eps, iters)
    y, x, post, comb, fn, base, scale = (
        t.contiguous() for t in (y, x, post, comb, fn, base.float(), scale.float())
    )
    N, R, out = B * T, n * (2 + n), torch.empty_like(x)
    cfg = get_config("hc_post_pre_mix", key(x), MIX_FEW if N <= FEW else MIX, x)
    width, splits = split(x, cdiv(N, cfg["BT"]), d, cfg["BD"])
    partial = x.new_empty(R + 1, N, splits, dtype=torch.float32)
    launch(
        hc_post_pre_mix,
        (cdiv(N, cfg["BT"]) * splits,),
        y,
        x,
        post,
        comb,
        fn,
        out,
        partial,
        N,
        d,
        width,
        splits,
        n=n,
        R=R,
        C=power_of_two(R, 16),
        V=8,
        **cfg,
    )
    return out, *launch_finish(out, partial, base, scale, norm_eps, hc_eps, iters)


def _flops(y, x, post, comb, fn, *args, out_shape=None, **kw):
    return pre_flops(x, fn)


_backward_op = register(
    "hc_post_pre_backward(Tensor g_x, Tensor g_y, Tensor g_post, Tensor g_comb, Tensor y, Tensor x, Tensor post, Tensor comb, "
    "Tensor out, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps, int iters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    fake=lambda g_x, g_y, g_post, g_comb, y, x, post, comb, out, fn, base, scale, *args: tuple(
        t.new_empty(t.shape) for t in (y, x, post, comb, fn, base, scale)
    ),
    flops=lambda g_x, g_y, g_post, g_comb, y, x, post, comb, out, fn, *args, out_shape=None, **kw: (
        3 * pre_flops(x, fn)
    ),
    kernel=_backwards(pre_backward_kernel, post_backward_kernel),
    cpp=SOURCE,
    takes=plain,
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[0], *inputs[4:7])
    ctx.constants = inputs[7:]


def _backward(ctx, *gradients):
    return *_backward_op(*gradients, *ctx.saved_tensors, *ctx.constants), None, None, None


_opaque = register(
    "hc_post_pre(Tensor y, Tensor x, Tensor post, Tensor comb, Tensor fn, Tensor base, Tensor scale, float norm_eps, float hc_eps, "
    "int iters) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=reference,
    fake=lambda y, x, post, comb, *rest: (x.new_empty(x.shape), *pre_fake(x, *rest)),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
    kernel=kernel,
    cpp=SOURCE,
    takes=plain,
)


def _on_cpu(y, x, post, comb, *rest):
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        return _opaque(y, x, post, comb, *rest)
    x = post_reference(y, x, post, comb)
    return x, *pre_on_cpu(x, *rest)


hc_post_pre = Op("hc_post_pre", reference, _opaque, check, on_cpu=_on_cpu)
