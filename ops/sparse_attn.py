"""sparse_attn: multi-query attention over a sliding window and compressed entries, one softmax with
a sink (docs/v4.md#attention).

Token t of a row sees, with K = V shared by all heads, window_len[t] keys of the window and entries:
    window    kv[t + W - window_len[t]] .. kv[t + W - 1]        (the last one is its own)
    entries   entries[lo[t]] .. entries[hi[t] - 1], all of them  if idx is None
              entries[i] for i in idx[t], i >= 0                 otherwise

    q'  = q * rsqrt(mean(q^2) + eps) per head, its last r dims rotated to the token's position
    s_j = q' . k_j / sqrt(D)     m = max(s_j, sink)     den = sum_j exp(s_j - m) + exp(sink - m)
    o'  = sum_j exp(s_j - m) k_j / den               lse = m + log(den)
    o   = o', its last r dims rotated back

    q           [B, T, H, D]
    kv          [B, W - 1 + T, D]
    sink        [H] fp32
    window_len  [B, T] int64
    cos, sin    [B, T, r/2] fp32
    entries     [B, N, D] or None
    lo, hi      [B, T] int64 or None
    idx         [B, T, topk] int64 or None, distinct entries or -1
    o           [B, T, H, D] in the dtype of q
    lse         [B, T, H] fp32, without gradient

Section 2.3 of arXiv 2606.19348; `sparse_attn` of DeepSeek's inference code. A call returns o;
with_lse, a last argument that may be left out, makes it (o, lse), of which indexer_loss takes lse.
Norm, rotation, scores and softmax are fp32; q', the probabilities and o' are rounded to the dtype
of q. Gradients of chosen entries are added by atomics, in any order, where a context has more than
MASKED times as many entries as are chosen (triton/sparse_attn_backward.py);
torch.use_deterministic_algorithms(True) collects them by entry instead, which reads more. All else
is deterministic. Errors: shapes that do not fit together.
"""

from __future__ import annotations

import torch

from .cpp import enabled, supports_cpp
from .registry import Op, register, require
from .sparse_attn_reference import backward_reference, forward_reference, sink_gradient
from .triton.sparse_attn import forward_kernel
from .triton.sparse_attn_backward import backward_kernels


def check(
    # queries, keys of the window, angles
    q,
    kv,
    sink,
    window_len,
    cos,
    sin,
    # entries and which of them a token sees
    entries,
    lo,
    hi,
    idx,
    eps,
    with_lse=False,
):
    require(q.dim() == 4, f"sparse_attn: q {tuple(q.shape)} is not [B, T, H, D]")
    B, T, H, D = q.shape
    require(
        kv.dim() == 3
        and kv.shape[0] == B
        and kv.shape[1] >= T
        and kv.shape[2] == D
        and sink.shape == (H,)
        and window_len.shape == cos.shape[:2] == sin.shape[:2] == (B, T)
        and 2 * cos.shape[2] <= D,
        f"sparse_attn: q {tuple(q.shape)}, kv {tuple(kv.shape)}, sink {tuple(sink.shape)}, "
        f"window_len {tuple(window_len.shape)}, cos {tuple(cos.shape)} do not fit",
    )
    if entries is not None:
        require(
            entries.dim() == 3
            and entries.shape[::2] == (B, D)
            and lo is not None
            and hi is not None
            and lo.shape == hi.shape == (B, T),
            f"sparse_attn: entries {tuple(entries.shape)} do not fit q {tuple(q.shape)}, "
            "or lo, hi are not [B, T]",
        )
    require(
        idx is None or entries is not None and idx.shape[:2] == (B, T),
        "sparse_attn: idx needs entries and shape [B, T, topk]",
    )


def backward_kernel(g, lse, q, kv, sink, *rest):
    g_q, g_kv, g_entries, delta = backward_kernels(g, lse, q, kv, *rest)
    return g_q, g_kv, sink_gradient(delta, lse, sink), g_entries


def _flops(
    # queries, keys of the window, angles
    q,
    kv,
    sink,
    window_len,
    cos,
    sin,
    # entries and which of them a token sees
    entries=None,
    lo=None,
    hi=None,
    idx=None,
    *args,
    out_shape=None,
    **kw,
):
    """Scores and values of the whole window and of all or the chosen entries, hidden or not."""
    B, T, H, D = q
    keys = kv[1] - T + 1
    if idx is not None:
        keys += idx[2]
    elif entries is not None:
        keys += entries[1]
    return 4 * B * T * H * D * keys


_backward_op = register(
    "sparse_attn_backward(Tensor g, Tensor lse, Tensor q, Tensor kv, Tensor sink, "
    "Tensor window_len, Tensor cos, Tensor sin, Tensor? entries, Tensor? lo, Tensor? hi, "
    "Tensor? idx, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    kernel=backward_kernel,
    cpp="sparse_attn",
    supports_cpp=supports_cpp,
    fake=lambda g, lse, q, kv, sink, window_len, cos, sin, entries, *rest: (
        q.new_empty(q.shape),
        kv.new_empty(kv.shape),
        sink.new_empty(sink.shape),
        q.new_empty(0 if entries is None else entries.shape),
    ),
    flops=lambda g, lse, *args, out_shape=None, **kw: 5 * _flops(*args) // 2,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, g, _):
    lse, *tensors = ctx.saved_tensors
    g_q, g_kv, g_sink, g_entries = _backward_op(g.contiguous(), lse, *tensors, ctx.eps)
    if tensors[6] is None:
        g_entries = None
    return g_q, g_kv, g_sink, None, None, None, g_entries, *[None] * 4


_opaque = register(
    "sparse_attn(Tensor q, Tensor kv, Tensor sink, Tensor window_len, Tensor cos, Tensor sin, "
    "Tensor? entries, Tensor? lo, Tensor? hi, Tensor? idx, float eps) -> (Tensor, Tensor)",
    impl=forward_reference,
    kernel=forward_kernel,
    cpp="sparse_attn",
    supports_cpp=supports_cpp,
    fake=lambda q, *rest: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)),
    flops=_flops,
    setup_context=_setup,
    backward=_backward,
)


def _on_cpu(q, *rest):
    """Compiled for more tokens than are decoded, in fp32: a node, in C++."""
    many = torch.compiler.is_compiling() and q.shape[1] > 8
    if many and enabled("sparse_attn") and supports_cpp(q, *rest):
        return _opaque(q, *rest)
    return forward_reference(q, *rest)


def _form(form):
    """An optional last argument with_lse."""

    def call(
        q,
        kv,
        sink,
        window_len,
        cos,
        sin,
        # entries and which of them a token sees
        entries,
        lo,
        hi,
        idx,
        eps,
        with_lse=False,
    ):
        o, lse = form(q, kv, sink, window_len, cos, sin, entries, lo, hi, idx, eps)
        return (o, lse.detach()) if with_lse else o

    return call


sparse_attn = Op(
    "sparse_attn",
    _form(forward_reference),
    _form(_opaque),
    check,
    cpu=_form(_on_cpu),
    cpp={"prefill": ("sparse_attn",), "train": ("sparse_attn",)},
)
