"""The Triton kernel of rope (see ops/rope.py), in place or into a new tensor.

A program takes BN vectors x[b, t, h], loads their last r dims as pairs that lie in one thread's
registers, rotates and stores them; out of place it also copies the other dims, unchanged.
"""

from __future__ import annotations

import torch

from ..launch import cdiv, get_config, jit, launch, power_of_two, tl


@jit
def rotate_pairs(x, cos, sin, M: tl.constexpr, N: tl.constexpr):
    """Rotate the pairs of neighbours in x [M, N] fp32; cos, sin [M, N/2]."""
    a, b = tl.split(tl.reshape(x, [M, N // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [M, N])


@jit
def rope_rotate(
    # tensors: x, y [B, T, H, D] (y may be x), cos, sin [B, T, r/2]
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    # number of vectors B T H, tokens in a row
    n_vectors,
    T,
    # strides
    x_stride_b,
    x_stride_t,
    x_stride_h,
    x_stride_d,
    y_stride_b,
    y_stride_t,
    y_stride_h,
    y_stride_d,
    # conjugate rotation; whether the other dims are copied
    INVERSE: tl.constexpr,
    COPY: tl.constexpr,
    # shapes
    H: tl.constexpr,
    D: tl.constexpr,
    r: tl.constexpr,
    # block sizes: vectors, copied dims, rotated dims
    BN: tl.constexpr,
    BD: tl.constexpr,
    BR: tl.constexpr,
):
    # Vector n is x[b, t, h]; its token (b, t) has one row of angles.
    offs_n = tl.program_id(0) * BN + tl.arange(0, BN)
    token = offs_n // H
    b = (token // T).to(tl.int64)
    t = (token % T).to(tl.int64)
    h = (offs_n % H).to(tl.int64)
    x_ptrs = x_ptr + (b * x_stride_b + t * x_stride_t + h * x_stride_h)[:, None]  # [BN, 1]
    y_ptrs = y_ptr + (b * y_stride_b + t * y_stride_t + h * y_stride_h)[:, None]
    mask_n = (offs_n < n_vectors)[:, None]

    # y[.., :D - r] = x[.., :D - r]
    if COPY:
        for start in tl.static_range(0, D - r, BD):
            offs_d = start + tl.arange(0, BD)[None, :]
            mask = mask_n & (offs_d < D - r)
            tl.store(
                y_ptrs + offs_d * y_stride_d,
                tl.load(x_ptrs + offs_d * x_stride_d, mask=mask),
                mask=mask,
            )

    # The angles of the tokens, [BN, BR/2]
    offs_r = tl.arange(0, BR)[None, :]
    offs_pair = tl.arange(0, BR // 2)[None, :]
    offs_angle = token.to(tl.int64)[:, None] * (r // 2) + offs_pair
    mask = mask_n & (offs_pair < r // 2)
    cos = tl.load(cos_ptr + offs_angle, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + offs_angle, mask=mask, other=0.0)

    # y[.., D - r:] = rotated x[.., D - r:], in fp32
    offs_d = D - r + offs_r
    mask = mask_n & (offs_r < r)
    x = tl.load(x_ptrs + offs_d * x_stride_d, mask=mask, other=0.0).to(tl.float32)
    y = rotate_pairs(x, cos, -sin if INVERSE else sin, BN, BR)
    tl.store(y_ptrs + offs_d * y_stride_d, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> None:
    """Rotate x into y, which may be x itself."""
    copy = y is not x
    D = x.shape[-1]
    r = 2 * cos.shape[-1]
    if r == 0 and not copy:
        return
    if x.dim() == 3:
        x, y = x[:, :, None], y[:, :, None]
    B, T, H, _ = x.shape

    BR = power_of_two(r, 2)
    BD = min(power_of_two(D - r), 512)
    width = max(BR, BD) if copy else BR  # dims loaded at once
    candidates = [{"BN": max(1, size // width), "num_warps": 4} for size in (16384, 8192, 4096)]
    key = f"{'copy' if copy else 'in place'} D{D} r{r} {str(x.dtype)[6:]}"
    config = get_config("rope_rotate", key, candidates, x)
    n_vectors = B * T * H
    launch(
        rope_rotate,
        (cdiv(n_vectors, config["BN"]),),
        *(x, y, cos.contiguous(), sin.contiguous()),
        *(n_vectors, T),
        *x.stride(),
        *y.stride(),
        INVERSE=inverse,
        COPY=copy,
        H=H,
        D=D,
        r=r,
        BD=BD,
        BR=BR,
        **config,
    )


def rope_kernel(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> torch.Tensor:
    """-> a new contiguous tensor."""
    y = x.new_empty(x.shape)
    _launch(x, y, cos, sin, inverse)
    return y


def rope_kernel_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> None:
    """In place."""
    _launch(x, x, cos, sin, inverse)
