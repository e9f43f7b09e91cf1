"""moe: the routed experts, each token through its K chosen ones (docs/v4.md#experts).

    gate, up = x W1^T, x W3^T          clamped: gate <= limit, |up| <= limit
    h        = silu(gate) up weight_k  fp32, rounded to the dtype of x
    y        = sum_k h W2^T            each term in the dtype of x, summed in fp32

    x [N, d]   w13 [E, 2I, d] (W1 rows first)   w2 [E, d, I]   idx [N, K] int64   weight [N, K] fp32
    packed weights: FP4 int8 [E, 2I, d/2], [E, d, I/2] with scales [E, 2I, ceil(d/32)], [E, d, ceil(I/32)];
                    FP8 e4m3 with 128 x 128 scales, those of W1 and W3 stacked; scales uint8 (e8m0 bits) or fp32
    act_quant rounds x and h to fp8 in blocks of 128
    idx = E: no expert, in the opaque form, for more than one token: the pair costs next to nothing (see parallel.py), and
             what the gradient of its weight is, is not defined
    y [N, d] fp32

The traced reference has static shapes: few tokens gather their experts' weights, many go through all experts with
zero weights. The opaque form groups tokens by expert instead, which needs the counts on the host: cheap on CPU, where
it is the default for many tokens; for few, compiled without gradients, moe_few is; for many in fp32 with gradients,
moe_kept, whose backward reads W1 x and W3 x where moe's computes them again. Packed weights are frozen. Errors: shapes
that do not fit together.
"""

from __future__ import annotations

import torch

from .cpp import plain
from .formats import dequantize_fp4, dequantize_fp8
from .moe_cpp import SOURCE
from .moe_few import gathered, moe_few, quantized, swiglu
from .registry import Op, register, require
from .triton.moe import backward, forward

CHUNK = 1 << 24  # intermediate values held at a time


def check(x, w13, w2, idx, weight, s13, s2, limit, act_quant, name="moe"):
    require(
        x.dim() == 2 and w13.dim() == 3,
        f"{name}: x {tuple(x.shape)}, w13 {tuple(w13.shape)} are not [N, d], [E, 2I, d]",
    )
    pack, E, I, d = 1 + (w13.dtype == torch.int8), w13.shape[0], w13.shape[1] // 2, x.shape[1]
    require(
        w13.shape == (E, 2 * I, d // pack)
        and w2.shape == (E, d, I // pack)
        and I % pack == d % pack == 0
        and idx.dim() == 2
        and idx.shape[0] == x.shape[0]
        and weight.shape == idx.shape,
        f"{name}: x {tuple(x.shape)}, w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)}, idx {tuple(idx.shape)} do not fit",
    )
    require(
        (s13 is None) == (s2 is None) == (w13.dtype.itemsize > 1),
        f"{name}: packed weights have scales, others have none; w13 is {w13.dtype}",
    )
    if s13 is not None:
        o, i = (1, 32) if pack == 2 else (128, 128)  # a scale's block
        require(
            s13.shape == (E, 2 * -(-I // o), -(-d // i))
            and s2.shape == (E, -(-d // o), -(-I // i)),
            f"{name}: scales {tuple(s13.shape)}, {tuple(s2.shape)} do not fit w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)}",
        )


def _few(idx, w13):
    return idx.numel() <= w13.shape[0]


def _many(x, w13, w2, idx, *rest):
    """Whether grouping by expert beats, on CPU, both gathering experts and going through all of them."""
    N, E = len(x), len(w13)
    return not _few(idx, w13) and (N > 32 or E * N > 8 * idx.numel())


def _dequantize(w, scale, dtype):
    """The weights of one or more experts [..., o, i] in dtype."""
    if scale is None:
        return w
    return (dequantize_fp4 if w.dtype == torch.int8 else dequantize_fp8)(w, scale, dtype)


def _dequantize13(w13, s13, dtype):
    """W1 and W3 have block scales of their own, which need not meet at a multiple of 128 rows."""
    if s13 is None:
        return w13
    return _dequantize(w13.unflatten(-2, (2, -1)), s13.unflatten(-2, (2, -1)), dtype).flatten(
        -3, -2
    )


def reference(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    idx: torch.Tensor,
    weight: torch.Tensor,
    s13: torch.Tensor | None,
    s2: torch.Tensor | None,
    limit: float,
    act_quant: bool,
) -> torch.Tensor:
    N, E, dtype = x.shape[0], w13.shape[0], x.dtype
    pick = lambda scale: None if scale is None else scale[idx]
    if _few(idx, w13):
        w13, w2 = _dequantize13(w13[idx], pick(s13), dtype), _dequantize(w2[idx], pick(s2), dtype)
        return gathered(x, w13, w2, weight, limit, act_quant)
    x = quantized(x, act_quant)
    w13, w2 = _dequantize13(w13, s13, dtype), _dequantize(w2, s2, dtype)
    route = weight.new_zeros(N, E).scatter_add(1, idx, weight)
    step, out = max(1, CHUNK // (E * (w13.shape[1] + w2.shape[1]))), []
    for c in range(0, N, step):
        h13 = x[c : c + step] @ w13.transpose(1, 2)  # [E, n, 2I]
        h = swiglu(h13, route[c : c + step].T[..., None], limit).to(dtype)
        out.append((quantized(h, act_quant) @ w2.transpose(1, 2)).float().sum(0))
    return torch.cat(out)


def _groups(idx, E):
    """Yield (expert, flat positions in idx that chose it) for every expert that was chosen; there is none beyond E - 1."""
    order = idx.flatten().argsort(stable=True)
    for e, rows in enumerate(order.split(torch.bincount(idx.flatten(), minlength=E).tolist())[:E]):
        if len(rows):
            yield e, rows


def grouped(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    idx: torch.Tensor,
    weight: torch.Tensor,
    s13: torch.Tensor | None,
    s2: torch.Tensor | None,
    limit: float,
    act_quant: bool,
) -> torch.Tensor:
    """The reference's mathematics, expert by expert."""
    one = lambda scale, e: None if scale is None else scale[e]
    y, xq, flat = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device),
        quantized(x, act_quant),
        weight.flatten(),
    )
    for e, rows in _groups(idx, w13.shape[0]):
        token = rows // idx.shape[1]
        h13 = xq[token] @ _dequantize13(w13[e], one(s13, e), x.dtype).T
        h = quantized(swiglu(h13, flat[rows, None], limit).to(x.dtype), act_quant)
        y.index_add_(0, token, (h @ _dequantize(w2[e], one(s2, e), x.dtype).T).float())
    return y


def backward_reference(
    g: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    idx: torch.Tensor,
    weight: torch.Tensor,
    s13: torch.Tensor | None,
    s2: torch.Tensor | None,
    limit: float,
    act_quant: bool,
):
    """Gradients of x, w13, w2 (empty where they are packed) and weight, expert by expert."""
    one = lambda scale, e: None if scale is None else scale[e]
    frozen, dtype, xq, flat = s13 is not None, x.dtype, quantized(x, act_quant), weight.flatten()
    g_x, g_weight = (
        torch.zeros(x.shape, dtype=torch.float32, device=x.device),
        torch.zeros_like(flat),
    )
    g_w13, g_w2 = (x.new_zeros(0 if frozen else w.shape) for w in (w13, w2))
    for e, rows in _groups(idx, w13.shape[0]):
        token, w = rows // idx.shape[1], flat[rows, None]
        xe, ge = xq[token], g[token].to(dtype)
        w13e, w2e = _dequantize13(w13[e], one(s13, e), dtype), _dequantize(w2[e], one(s2, e), dtype)
        gate, up = (xe @ w13e.T).float().chunk(2, -1)
        gate_c, up_c = gate.clamp(max=limit), up.clamp(-limit, limit)
        sig = torch.sigmoid(gate_c)
        silu = gate_c * sig
        h = quantized((silu * up_c * w).to(dtype), act_quant)
        g_h = (ge @ w2e).float()
        g_weight[rows] = (g_h * silu * up_c).sum(-1)
        g_gate = g_h * w * up_c * sig * (1 + gate_c - silu) * (gate <= limit)
        g_up = g_h * w * silu * (up.abs() <= limit)
        g_13 = torch.cat((g_gate, g_up), -1).to(dtype)
        g_x.index_add_(0, token, (g_13 @ w13e).float())
        if not frozen:
            g_w13[e], g_w2[e] = g_13.T @ xe, ge.T @ h
    return g_x.to(dtype), g_w13, g_w2, g_weight.view_as(weight)


def _flops(x, w13, w2, idx, *args, out_shape=None, **kw):
    """Three products of d x I per token and expert."""
    return 2 * 3 * idx[0] * idx[1] * x[1] * (w13[1] // 2)


def _takes(*args):
    return plain(*args) and not args[-1]


def _fake_backward(g, x, w13, w2, idx, weight, s13, *args):
    weights = (x.new_empty(w.shape if s13 is None else 0) for w in (w13, w2))
    return x.new_empty(x.shape), *weights, weight.new_empty(weight.shape)


_backward_op = register(
    "moe_backward(Tensor g, Tensor x, Tensor w13, Tensor w2, Tensor idx, Tensor weight, Tensor? s13, Tensor? s2, float limit, "
    "bool act_quant) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    kernel=backward,
    fake=_fake_backward,
    cpp=SOURCE,
    takes=_takes,
    # two gradients each (one if packed), and h13 again
    flops=lambda g, x, w13, w2, idx, weight, s13=None, *args, out_shape=None, **kw: (
        (8 if s13 is None else 5) * _flops(x, w13, w2, idx) // 3
    ),
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
    "moe(Tensor x, Tensor w13, Tensor w2, Tensor idx, Tensor weight, Tensor? s13, Tensor? s2, float limit, "
    "bool act_quant) -> Tensor",
    impl=grouped,
    kernel=forward,
    cpp=SOURCE,
    takes=_takes,
    fake=lambda x, *rest: x.new_empty(x.shape, dtype=torch.float32),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
)


from .moe_kept import moe_kept  # noqa: E402: it stands on what is above


def _on_cpu(x, w13, w2, idx, weight, s13, s2, limit, act_quant):
    decoding = torch.compiler.is_compiling() and not torch.is_grad_enabled() and idx.numel() <= 256
    if decoding and s13 is None and x.dtype == w13.dtype == torch.float32:
        return moe_few.opaque(x, w13, w2, idx, weight, limit, act_quant)
    if not _many(x, w13, w2, idx):
        return reference(x, w13, w2, idx, weight, s13, s2, limit, act_quant)
    if torch.is_grad_enabled() and _takes(x, w13, w2, weight, act_quant):
        return moe_kept.opaque(x, w13, w2, idx, weight, limit)
    return _opaque(x, w13, w2, idx, weight, s13, s2, limit, act_quant)


moe = Op("moe", reference, _opaque, check, on_cpu=_on_cpu)
