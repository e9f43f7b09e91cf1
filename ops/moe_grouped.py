"""moe, expert by expert: tokens that chose one are gathered, and go through matrix products.

The Python of the opaque op and of its backward (see moe.py for the formula, shapes and dtypes). How
many tokens an expert has must be known on the host, so this is not for tracing.
"""

from __future__ import annotations

import torch

from .act_quant import reference as fake_quant
from .formats import dequantize_fp4, dequantize_fp8
from .swiglu import swiglu, swiglu_backward


def quantized(x: torch.Tensor, act_quant: bool) -> torch.Tensor:
    return fake_quant(x, 128, "fp8") if act_quant else x


def activate(h13: torch.Tensor, weight: torch.Tensor, limit: float) -> torch.Tensor:
    """Pre-activations [..., 2I] and weights [..., 1] -> h [..., I] fp32."""
    gate, up = h13.float().chunk(2, -1)
    return swiglu(gate, up, limit) * weight


def dequantize(w: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weights of one or more experts [..., o, i] in dtype."""
    if scale is None:
        return w
    unpack = dequantize_fp4 if w.dtype == torch.int8 else dequantize_fp8
    return unpack(w, scale, dtype)


def dequantize13(w13: torch.Tensor, s13: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """W1 and W3 have block scales of their own, which need not meet at a multiple of 128 rows."""
    if s13 is None:
        return w13
    w, scale = w13.unflatten(-2, (2, -1)), s13.unflatten(-2, (2, -1))
    return dequantize(w, scale, dtype).flatten(-3, -2)


def one_of(scale: torch.Tensor | None, expert) -> torch.Tensor | None:
    """The scales of one expert, or of those that an index chooses."""
    return None if scale is None else scale[expert]


def _groups(idx, E):
    """Yield (expert e < E, flat positions in idx that chose it) for each expert that was chosen."""
    flat = idx.flatten()
    counts = torch.bincount(flat, minlength=E).tolist()
    order = flat.argsort(stable=True)
    for e, rows in enumerate(order.split(counts)[:E]):
        if len(rows):
            yield e, rows


def grouped(
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
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    xq, flat_weight = quantized(x, act_quant), weight.flatten()
    for e, rows in _groups(idx, w13.shape[0]):
        token = rows // idx.shape[1]
        # h [n, I] of the n pairs that chose e
        h13 = xq[token] @ dequantize13(w13[e], one_of(s13, e), x.dtype).T
        h = activate(h13, flat_weight[rows, None], limit).to(x.dtype)
        y_e = quantized(h, act_quant) @ dequantize(w2[e], one_of(s2, e), x.dtype).T
        y.index_add_(0, token, y_e.float())
    return y


def backward_reference(
    g: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, w13, w2 (empty where they are packed) and weight."""
    frozen, dtype = s13 is not None, x.dtype
    xq, flat_weight = quantized(x, act_quant), weight.flatten()
    g_x = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    g_w13, g_w2 = (x.new_zeros(0 if frozen else w.shape) for w in (w13, w2))
    g_weight = torch.zeros_like(flat_weight)
    for e, rows in _groups(idx, w13.shape[0]):
        token, w = rows // idx.shape[1], flat_weight[rows, None]
        x_e, g_e = xq[token], g[token].to(dtype)
        w13_e = dequantize13(w13[e], one_of(s13, e), dtype)
        w2_e = dequantize(w2[e], one_of(s2, e), dtype)
        gate, up = (x_e @ w13_e.T).float().chunk(2, -1)  # as in the forward
        g_h = (g_e @ w2_e).float()
        h, g_weight[rows], g_gate, g_up = swiglu_backward(g_h, w, gate, up, limit)
        h = quantized(h.to(dtype), act_quant)
        g_13 = torch.cat((g_gate, g_up), -1).to(dtype)
        g_x.index_add_(0, token, (g_13 @ w13_e).float())
        if not frozen:
            g_w13[e] = g_13.T @ x_e
            g_w2[e] = g_e.T @ h
    return g_x.to(dtype), g_w13, g_w2, g_weight.view_as(weight)


def backward_fake(g, x, w13, w2, idx, weight, s13, *args):
    g_w13, g_w2 = (x.new_empty(w.shape if s13 is None else 0) for w in (w13, w2))
    return x.new_empty(x.shape), g_w13, g_w2, weight.new_empty(weight.shape)


def flops(x, w13, w2, idx, *args, out_shape=None, **kw):
    """Three products of d x I per token and expert."""
    return 2 * 3 * idx[0] * idx[1] * x[1] * (w13[1] // 2)


def backward_flops(g, x, w13, w2, idx, weight, s13=None, *args, out_shape=None, **kw):
    """Two gradients for each product (one if weights are packed), and W1 x, W3 x again."""
    thirds = 8 if s13 is None else 5
    return thirds * flops(x, w13, w2, idx) // 3
