"""The Triton kernel of hc_post_pre (see ops/hc_post_pre.py)."""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl
from .hc_post import dot_all
from .hc_pre import FEW, add_mix, key, launch_finish, row_sums, split, store_mix

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


def forward(
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
