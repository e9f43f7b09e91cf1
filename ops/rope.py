"""rope: rotate consecutive pairs of the last r dims (docs/v4.md#rope).

    (a + ib) * e^{i angle}, or its conjugate for inverse; the other dims pass through

    x         [B, T, D] or [B, T, H, D], any strides
    cos, sin  [B, T, r/2] fp32
    y         as x; rotated in fp32, one cast back

`apply_rotary_emb` of DeepSeek's inference code (partial rotation: arXiv 2606.19348, section 2.3).
The backward is the inverse rotation. `rotate_` is for callers that need x no more: without
gradients it overwrites the last r dims and leaves the others alone, which moves D / r times fewer
bytes. Errors: r > D, mismatched leading dims.
"""

from __future__ import annotations

import math

import torch

from .registry import Op, register, require
from .triton.rope import rope_kernel, rope_kernel_


def check(x, cos, sin, inverse):
    require(
        x.dim() in (3, 4) and x.shape[:2] == cos.shape[:2] == sin.shape[:2],
        f"rope: x {tuple(x.shape)} does not go with angles {tuple(cos.shape)}",
    )
    require(
        2 * cos.shape[-1] <= x.shape[-1],
        f"rope: {2 * cos.shape[-1]} rotated dims exceed {x.shape[-1]}",
    )


def _rotate(pairs, cos, sin, inverse):
    """pairs [B, T, r] or [B, T, H, r] -> rotated, in their dtype."""
    if pairs.dim() == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    if inverse:
        sin = -sin
    a, b = pairs.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return rotated.flatten(-2).to(pairs.dtype)


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> torch.Tensor:
    nope, pairs = x.tensor_split([x.shape[-1] - 2 * cos.shape[-1]], -1)
    return torch.cat((nope, _rotate(pairs, cos, sin, inverse)), -1)


def reference_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> None:
    pairs = x[..., x.shape[-1] - 2 * cos.shape[-1] :]
    pairs.copy_(_rotate(pairs, cos, sin, inverse))


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad):
    return _opaque(grad.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None


def _flops(x, cos, *args, out_shape=None, **kw):
    """Elementwise: no matrix products are counted."""
    return 0


_opaque = register(
    "rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    impl=reference,
    fake=lambda x, cos, sin, inverse: x.new_empty(x.shape),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
    kernel=rope_kernel,
)
_in_place = register(
    "rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse) -> ()",
    impl=reference_,
    fake=lambda x, cos, sin, inverse: None,
    flops=_flops,
    kernel=rope_kernel_,
)

rope = Op("rope", reference, _opaque, check)


def rotate_(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool, mode: str | None = None
) -> torch.Tensor:
    """rope(x, ...) for callers that need x no more. Returns x itself, overwritten, where the op is
    opaque and gradients are off; else a new tensor.

    mode is the table's choice for rope (registry.Op.bind). Compiled code writes in place too,
    without a copy.
    """
    traced = mode == "reference" or (mode is None and x.device.type == "cpu")
    if traced or torch.is_grad_enabled():
        return rope.bind(mode)(x, cos, sin, inverse)
    if not torch.compiler.is_compiling():
        check(x, cos, sin, inverse)
    _in_place(x, cos, sin, inverse)
    return x


def rope_frequencies(
    dim: int,
    base: float,
    factor: float = 1.0,
    original_seq_len: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> torch.Tensor:
    """Angular frequency of each rotated pair, [dim / 2] fp32 on CPU (docs/v4.md#rope).

    base^(-2i / dim); with original_seq_len (YaRN) high frequencies are kept and low ones divided by
    factor, with a ramp between the pairs that turn beta_fast and beta_slow times in that length.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    freqs = 1.0 / (base**exponent)
    if not original_seq_len:
        return freqs

    def pair_of(turns: float) -> float:
        return dim * math.log(original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(beta_fast)), 0)
    high = min(math.ceil(pair_of(beta_slow)), dim - 1)
    pair = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freqs / factor * ramp + freqs * (1 - ramp)
