"""The Triton kernel of rope (see rope.py), in place or into a new tensor.

A program takes some vectors x[b, t, h], loads their last r dims as pairs that lie in one thread's registers, turns them
and stores them; out of place it copies the other dims on the side, untouched.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl


@jit
def turn_pairs(x, cos, sin, M: tl.constexpr, N: tl.constexpr):
    """Rotate the pairs of neighbours in x [M, N] fp32; cos, sin [M, N/2]."""
    a, b = tl.split(tl.reshape(x, [M, N // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [M, N])


@jit
def rope_turn(
    x,
    y,
    cos,
    sin,
    n,
    T,
    xb,
    xt,
    xh,
    xd,
    yb,
    yt,
    yh,
    yd,
    INVERSE: tl.constexpr,
    COPY: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    r: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    i = tl.program_id(0) * BN + tl.arange(0, BN)  # vectors [b, t, h], n of them
    token = i // H
    b, t, h = (token // T).to(tl.int64), (token % T).to(tl.int64), (i % H).to(tl.int64)
    x += (b * xb + t * xt + h * xh)[:, None]
    y += (b * yb + t * yt + h * yh)[:, None]
    there = (i < n)[:, None]
    if COPY:
        for start in tl.static_range(0, D - r, BD):
            c = start + tl.arange(0, BD)[None, :]
            tl.store(
                y + c * yd, tl.load(x + c * xd, mask=there & (c < D - r)), mask=there & (c < D - r)
            )
    c, pair = tl.arange(0, BR)[None, :], tl.arange(0, BR // 2)[None, :]
    angle = token.to(tl.int64)[:, None] * (r // 2) + pair
    cos = tl.load(cos + angle, mask=there & (pair < r // 2), other=1.0)
    sin = tl.load(sin + angle, mask=there & (pair < r // 2), other=0.0)
    v = tl.load(x + (D - r + c) * xd, mask=there & (c < r), other=0.0).to(tl.float32)
    v = turn_pairs(v, cos, -sin if INVERSE else sin, BN, BR)
    tl.store(y + (D - r + c) * yd, v.to(y.dtype.element_ty), mask=there & (c < r))


def _launch(x, y, cos, sin, inverse):
    """Turn x into y, which may be x itself."""
    copy, D, r = y is not x, x.shape[-1], 2 * cos.shape[-1]
    x, y = (v if v.dim() == 4 else v[:, :, None] for v in (x, y))
    B, T, H, _ = x.shape
    BR, BD = power_of_two(r, 2), min(power_of_two(D - r), 512)
    width = max(BR, BD) if copy else BR  # of what is loaded at once
    candidates = [{"BN": max(1, size // width), "num_warps": 4} for size in (16384, 8192, 4096)]
    cfg = get_config(
        "rope_turn", f"{'copy' if copy else 'in place'} D{D} r{r} {str(x.dtype)[6:]}", candidates, x
    )
    if r or copy:
        launch(
            rope_turn,
            (cdiv(B * T * H, cfg["BN"]),),
            x,
            y,
            cos.contiguous(),
            sin.contiguous(),
            B * T * H,
            T,
            *x.stride(),
            *y.stride(),
            INVERSE=inverse,
            COPY=copy,
            H=H,
            D=D,
            r=r,
            BD=BD,
            BR=BR,
            **cfg,
        )


def kernel(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    y = x.new_empty(x.shape)
    _launch(x, y, cos, sin, inverse)
    return y


def kernel_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> None:
    _launch(x, x, cos, sin, inverse)
