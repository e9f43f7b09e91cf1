"""moe: the routed experts, each token through its K chosen ones (docs/v4.md#experts).

    gate, up = x W1^T, x W3^T          clamped: gate <= limit, |up| <= limit
    h        = silu(gate) up weight_k  fp32, rounded to the dtype of x
    y        = sum_k h W2^T            each term in the dtype of x, summed in fp32

    x [M, d]   w13 [E, 2I, d] (W1 rows first)   w2 [E, d, I]   idx [M, K] int64   weight [M, K] fp32
    packed weights   FP4: int8 [E, 2I, d/2], [E, d, I/2]; scales [E, 2I, d/32], [E, d, I/32]
                     FP8: e4m3, scales of blocks of 128 x 128, those of W1 and W3 stacked
                     scales: uint8 (e8m0 bits) or fp32; their sizes are rounded up
    act_quant        rounds x and h to fp8 in blocks of 128
    idx = E          no expert, in the opaque form, for more than one token: the pair costs next to
                     nothing (see parallel.py), and the gradient of its weight is not defined
    y [M, d] fp32, of M tokens

Formula: DeepSeek's code (`Expert` and `MoE` in inference/model.py).

The traced reference has static shapes: few tokens gather their experts' weights, many go through
all experts with zero weights. The opaque form groups tokens by expert instead, which needs the
counts on the host: cheap on CPU, where mode "cpu" takes it for many tokens. For several tokens, but
few (for one it gains nothing), it takes the variant moe_decode when compiled without gradients.
Packed weights are frozen. Errors: shapes that do not fit together.
"""

from __future__ import annotations

import torch

from . import cpp
from .moe_decode import gathered, moe_decode
from .moe_grouped import (
    activate,
    backward_fake,
    backward_flops,
    backward_reference,
    dequantize,
    dequantize13,
    flops,
    grouped,
    one_of,
    quantized,
)
from .registry import Op, register, require
from .swiglu import HAS_KERNELS
from .triton.moe import forward
from .triton.moe_backward import backward

CHUNK = 1 << 24  # intermediate values held at a time
DECODED_PAIRS = 256  # of token and expert; with more, moe_decode gains nothing


def check(
    x,
    # experts
    w13,
    w2,
    # routing
    idx,
    weight,
    # scales of packed experts
    s13,
    s2,
    # constants
    limit,
    act_quant,
):
    require(
        x.dim() == 2 and w13.dim() == 3,
        f"moe: x {tuple(x.shape)}, w13 {tuple(w13.shape)} are not [M, d], [E, 2I, d]",
    )
    pack = 1 + (w13.dtype == torch.int8)  # values a byte
    E, I = w13.shape[0], w13.shape[1] // 2
    d = x.shape[1]
    require(
        w13.shape == (E, 2 * I, d // pack)
        and w2.shape == (E, d, I // pack)
        and I % pack == 0
        and d % pack == 0
        and idx.dim() == 2
        and idx.shape[0] == x.shape[0]
        and weight.shape == idx.shape,
        f"moe: x {tuple(x.shape)}, w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)}, "
        f"idx {tuple(idx.shape)} do not fit",
    )
    require(
        (s13 is None) == (s2 is None) == (w13.dtype.itemsize > 1),
        f"moe: packed weights have scales, others have none; w13 is {w13.dtype}",
    )
    if s13 is not None:
        o, i = (1, 32) if pack == 2 else (128, 128)  # a scale's block
        require(
            s13.shape == (E, 2 * -(-I // o), -(-d // i))
            and s2.shape == (E, -(-d // o), -(-I // i)),
            f"moe: scales {tuple(s13.shape)}, {tuple(s2.shape)} do not fit "
            f"w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)}",
        )


def _few(idx, w13):
    """Whether gathering the experts' weights reads less than going through all experts."""
    return idx.numel() <= w13.shape[0]


def _many(x, w13, idx):
    """Whether grouping by expert beats, on CPU, both gathering experts and going through all."""
    M, E = len(x), len(w13)
    return not _few(idx, w13) and (M > 32 or 8 * idx.numel() < E * M)


def reference(
    x: torch.Tensor,
    # experts
    w13: torch.Tensor,
    w2: torch.Tensor,
    # routing
    idx: torch.Tensor,
    weight: torch.Tensor,
    # scales of packed experts
    s13: torch.Tensor | None,
    s2: torch.Tensor | None,
    # constants
    limit: float,
    act_quant: bool,
) -> torch.Tensor:
    M, E = x.shape[0], w13.shape[0]
    dtype = x.dtype
    if _few(idx, w13):
        w13 = dequantize13(w13[idx], one_of(s13, idx), dtype)
        w2 = dequantize(w2[idx], one_of(s2, idx), dtype)
        return gathered(x, w13, w2, weight, limit, act_quant)
    x = quantized(x, act_quant)
    w13, w2 = dequantize13(w13, s13, dtype), dequantize(w2, s2, dtype)
    # route [M, E]: each token's weights, zero for the experts it did not choose
    route = weight.new_zeros(M, E).scatter_add(1, idx, weight)
    step, out = max(1, CHUNK // (E * (w13.shape[1] + w2.shape[1]))), []
    for c in range(0, M, step):
        h13 = x[c : c + step] @ w13.transpose(1, 2)  # [E, step, 2I]
        h = activate(h13, route[c : c + step].T[..., None], limit).to(dtype)
        out.append((quantized(h, act_quant) @ w2.transpose(1, 2)).float().sum(0))
    return torch.cat(out)


def _supports_cpp(*args):
    *tensors, _limit, act_quant = args
    return cpp.supports_cpp(*tensors) and not act_quant


_backward_op = register(
    "moe_backward(Tensor g, Tensor x, Tensor w13, Tensor w2, Tensor idx, Tensor weight, "
    "Tensor? s13, Tensor? s2, float limit, bool act_quant) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    fake=backward_fake,
    flops=backward_flops,
    kernel=backward,
    cpp="moe",
    supports_cpp=_supports_cpp,
    native=HAS_KERNELS,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.limit, ctx.act_quant = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, g):
    saved = ctx.saved_tensors  # read once: recomputation allows no more
    g_x, g_w13, g_w2, g_weight = _backward_op(g, *saved, ctx.limit, ctx.act_quant)
    if saved[5] is not None:
        g_w13 = g_w2 = None
    return g_x, g_w13, g_w2, None, g_weight, None, None, None, None


_opaque = register(
    "moe(Tensor x, Tensor w13, Tensor w2, Tensor idx, Tensor weight, Tensor? s13, Tensor? s2, "
    "float limit, bool act_quant) -> Tensor",
    impl=grouped,
    fake=lambda x, *rest: x.new_empty(x.shape, dtype=torch.float32),
    flops=flops,
    setup_context=_setup,
    backward=_backward,
    kernel=forward,
    cpp="moe",
    supports_cpp=_supports_cpp,
    native=HAS_KERNELS,
)


def _cpu(
    x,
    # experts
    w13,
    w2,
    # routing
    idx,
    weight,
    # scales of packed experts
    s13,
    s2,
    # constants
    limit,
    act_quant,
):
    """moe_decode, the reference or the opaque op: see above."""
    some = len(x) > 1 and idx.numel() <= DECODED_PAIRS
    decoding = some and torch.compiler.is_compiling() and not torch.is_grad_enabled()
    fp32 = s13 is None and x.dtype == w13.dtype == torch.float32
    if decoding and fp32 and cpp.enabled("moe_decode"):
        return moe_decode.opaque(x, w13, w2, idx, weight, limit, act_quant)
    if not _many(x, w13, idx):
        return reference(x, w13, w2, idx, weight, s13, s2, limit, act_quant)
    return _opaque(x, w13, w2, idx, weight, s13, s2, limit, act_quant)


moe = Op(
    "moe",
    reference,
    _opaque,
    check,
    cpu=_cpu if HAS_KERNELS else None,
    cpp={"decode": ("moe_decode",), "prefill": ("moe_decode", "moe"), "train": ("moe",)},
)
