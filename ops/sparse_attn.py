"""sparse_attn: multi-query attention over a sliding window and compressed entries, one softmax with a sink (docs/v4.md#attention).

Token t of a row sees, with K = V shared by all heads:
    window    kv[t + W - seen[t]] .. kv[t + W - 1]              (the last one is its own)
    entries   entries[lo[t]] .. entries[hi[t] - 1], all of them  if idx is None
              entries[i] for i in idx[t], i >= 0                 otherwise

    q'  = q * rsqrt(mean(q^2) + eps) per head, its last r dims rotated to the token's position
    s_j = q' . k_j / sqrt(D)         m = max(s_j, sink)      den = sum_j exp(s_j - m) + exp(sink - m)
    o'  = sum_j exp(s_j - m) k_j / den               lse = m + log(den)
    o   = o', its last r dims rotated back

    q [B, T, H, D]   kv [B, W - 1 + T, D]   sink [H] fp32   seen [B, T] int64   cos, sin [B, T, r/2] fp32
    entries [B, E, D], lo, hi [B, T] int64 or None   idx [B, T, K] int64 or None
    o [B, T, H, D] in the dtype of q   lse [B, T, H] fp32, without gradient

A call returns o; with_lse, a last argument that may be left out, makes it (o, lse), from which indexer_loss takes up.
Norm, rotation, scores and softmax are fp32; q', the probabilities and o' are rounded to the dtype of q.
Entries in idx are distinct. Gradients of chosen entries are added by atomics, in any order, where a context has more than
MASKED times as many entries as are chosen; torch.use_deterministic_algorithms(True) collects them by entry instead, which
reads more. All else is deterministic.
The reference cuts the tokens into blocks that share one band of the window, and into chunks that bound the scores held
at a time: it never builds a query x key x dim tensor for a long prefill. Errors: shapes that do not fit together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .cpp import enabled, supports_cpp
from .registry import Op, register, require
from .rope import reference as rotate
from .triton.sparse_attn import forward_kernel
from .triton.sparse_attn_backward import backward

CHUNK = 1 << 24  # elements (scores and gathered entries) held at a time
BLOCK = 64  # tokens that share one band of W - 1 + BLOCK window keys


def check(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps, with_lse=False):
    require(q.dim() == 4, f"sparse_attn: q {tuple(q.shape)} is not [B, T, H, D]")
    B, T, H, D = q.shape
    require(
        kv.dim() == 3
        and kv.shape[0] == B
        and kv.shape[1] >= T
        and kv.shape[2] == D
        and sink.shape == (H,)
        and seen.shape == cos.shape[:2] == sin.shape[:2] == (B, T)
        and 2 * cos.shape[2] <= D,
        f"sparse_attn: q {tuple(q.shape)}, kv {tuple(kv.shape)}, sink {tuple(sink.shape)}, seen {tuple(seen.shape)}, "
        f"cos {tuple(cos.shape)} do not fit",
    )
    if entries is not None:
        require(
            entries.dim() == 3
            and entries.shape[::2] == (B, D)
            and lo is not None
            and hi is not None
            and lo.shape == hi.shape == (B, T),
            f"sparse_attn: entries {tuple(entries.shape)} do not fit q {tuple(q.shape)}, or lo, hi are not [B, T]",
        )
    require(
        idx is None or entries is not None and idx.shape[:2] == (B, T),
        "sparse_attn: idx needs entries and shape [B, T, K]",
    )


def _chunks(q, kv, seen, cos, sin, entries, lo, hi, idx):
    """Cut the tokens, then hand each chunk's operands over, padded to whole blocks; yields (slice, operands)."""
    B, T, H, D = q.shape
    n = min(T, BLOCK)  # tokens in a block
    band = kv.shape[1] - T + n
    held = max(H, D // n) * band + (
        0 if entries is None else entries.shape[1] * H if idx is None else idx.shape[2] * (H + D)
    )
    step = max(1, CHUNK // (B * held * n)) * n
    for c in range(0, T, step):
        now, size = slice(c, min(c + step, T)), min(step, T - c)
        pad = -size % n
        keys = F.pad(kv[:, c : c + size + band - n], (0, 0, 0, pad))
        rows = [
            None if t is None else F.pad(t[:, now], (0,) * (2 * (t.dim() - 2)) + (0, pad))
            for t in (cos, sin, seen, lo, hi, idx)
        ]
        yield now, (F.pad(q[:, now], (0, 0, 0, 0, 0, pad)), keys, n, band, *rows)


def _normalized(q, eps):
    """-> q / rms [.., D] fp32, 1 / rms [.., 1]"""
    v = q.float()
    r = torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return v * r, r


def _scores(q, keys, n, band, seen, lo, hi, idx, entries):
    """One chunk -> scores [B, t, H, band + E or K] fp32 (-inf where hidden), band keys [B t/n, band, D], entries gathered."""
    B, t, H, D = q.shape
    qf = q.float()
    bands = keys.float().unfold(1, band, n).reshape(-1, D, band)  # [B t/n, D, band]
    window = (qf.reshape(-1, n * H, D) @ bands).view(B, t, H, band)
    j = torch.arange(band, device=q.device)
    last = torch.arange(t, device=q.device) % n + band - n  # a token's own key in its band
    hidden = (j > last[:, None]) | (j <= last[:, None] - seen[..., None])  # [B, t, band]
    if entries is None:
        scores, ents = window, None
    elif idx is None:
        ents = entries.float()
        e = torch.arange(ents.shape[1], device=q.device)
        scores = torch.cat(
            (window, (qf.flatten(1, 2) @ ents.transpose(1, 2)).view(B, t, H, -1)), -1
        )
        hidden = torch.cat((hidden, (e < lo[..., None]) | (e >= hi[..., None])), -1)
    else:
        row = torch.arange(B, device=q.device)[:, None, None]
        ents = entries[row, idx.clamp(min=0)].float()  # [B, t, K, D]
        scores = torch.cat((window, qf @ ents.transpose(2, 3)), -1)
        hidden = torch.cat((hidden, idx < 0), -1)
    return (scores * D**-0.5).masked_fill(hidden[:, :, None], float("-inf")), bands, ents


def _attend(q, keys, n, band, cos, sin, seen, lo, hi, idx, entries, sink, eps):
    B, t, H, D = q.shape
    q = rotate(_normalized(q, eps)[0].to(q.dtype), cos, sin, False)
    scores, bands, ents = _scores(q, keys, n, band, seen, lo, hi, idx, entries)
    m = torch.maximum(scores.amax(-1), sink.float())  # [B, t, H]
    p = (scores - m[..., None]).exp()
    den = p.sum(-1) + (sink.float() - m).exp()
    p = p.to(q.dtype).float()
    o = (p[..., :band].reshape(-1, n * H, band) @ bands.transpose(1, 2)).view(B, t, H, D)
    if idx is not None:
        o = o + p[..., band:] @ ents
    elif entries is not None:
        o = o + (p[..., band:].flatten(1, 2) @ ents).view(B, t, H, D)
    return rotate((o / den[..., None]).to(q.dtype), cos, sin, True), m + den.log()


def forward_reference(
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    seen: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entries: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    idx: torch.Tensor | None,
    eps: float,
):
    """-> o, lse"""
    if entries is not None and entries.requires_grad:
        entries = entries.float()  # the gradients of an entry chosen by many tokens add up in fp32
    out, lse = [], []
    for now, operands in _chunks(q, kv, seen, cos, sin, entries, lo, hi, idx):
        o, l = _attend(*operands, entries, sink, eps)
        out.append(o[:, : now.stop - now.start])
        lse.append(l[:, : now.stop - now.start])
    return torch.cat(out, 1), torch.cat(lse, 1)


def backward_reference(
    g: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    kv: torch.Tensor,
    sink: torch.Tensor,
    seen: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    entries: torch.Tensor | None,
    lo: torch.Tensor | None,
    hi: torch.Tensor | None,
    idx: torch.Tensor | None,
    eps: float,
):
    """Gradients of q, kv, sink and entries (empty where there are none), recomputing probabilities from lse."""
    B, T, H, D = q.shape
    g_q, delta = (
        q.new_empty(q.shape),
        torch.empty_like(lse),
    )  # delta = sum_j p_j (g' . k_j), exact where g . o would be rounded
    g_kv = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    g_entries = torch.zeros(
        q.new_empty(0).shape if entries is None else entries.shape,
        dtype=torch.float32,
        device=q.device,
    )
    for now, (qc, keys, n, band, c, s, *rows) in _chunks(
        q, kv, seen, cos, sin, entries, lo, hi, idx
    ):
        size, pad = now.stop - now.start, qc.shape[1] - (now.stop - now.start)
        unit, r = _normalized(qc, eps)
        qc = rotate(unit.to(q.dtype), c, s, False)
        scores, bands, ents = _scores(qc, keys, n, band, *rows, entries)
        gc = rotate(F.pad(g[:, now].float(), (0, 0, 0, 0, 0, pad)), c, s, False)
        p = (
            scores - F.pad(lse[:, now], (0, 0, 0, pad), value=float("inf"))[..., None]
        ).exp()  # padded tokens: 0
        blocks = lambda x: x.reshape(-1, n * H, x.shape[-1])  # [B, t, H, x] -> [B t/n, n H, x]
        flat = lambda x: x.flatten(1, 2)  # -> [B, t H, x]
        g_p = (blocks(gc) @ bands).view(*gc.shape[:3], band)
        if rows[3] is not None:
            g_p = torch.cat((g_p, gc @ ents.transpose(2, 3)), -1)
        elif entries is not None:
            g_p = torch.cat((g_p, (flat(gc) @ ents.transpose(1, 2)).view(*gc.shape[:3], -1)), -1)
        dc = (p * g_p).sum(-1, keepdim=True)
        g_s, delta[:, now] = p * (g_p - dc) * D**-0.5, dc[:, :size, :, 0]  # [B, t, H, keys]
        qf, g_w, p_w = qc.float(), g_s[..., :band], p[..., :band]
        g_qc = (blocks(g_w) @ bands.transpose(1, 2)).view_as(qf)
        g_band = blocks(g_w).transpose(1, 2) @ blocks(qf) + blocks(p_w).transpose(1, 2) @ blocks(
            gc
        )  # [B t/n, band, D]
        g_keys = torch.zeros_like(keys, dtype=torch.float32)
        where = (
            torch.arange(0, qc.shape[1], n, device=q.device)[:, None]
            + torch.arange(band, device=q.device)
        ).flatten()
        g_keys.index_add_(1, where, g_band.view(B, -1, D))
        g_kv[:, now.start : now.stop + band - n] += g_keys[:, : size + band - n]
        if entries is not None:
            g_w, p_w = g_s[..., band:], p[..., band:]
            if rows[3] is None:
                g_qc += (flat(g_w) @ ents).view_as(qf)
                g_entries += flat(g_w).transpose(1, 2) @ flat(qf) + flat(p_w).transpose(
                    1, 2
                ) @ flat(gc)
            else:
                g_qc += g_w @ ents
                g_e = (
                    g_w.transpose(2, 3) @ qf + p_w.transpose(2, 3) @ gc
                )  # [B, t, K, D]; zero where idx is -1
                target = (
                    rows[3].clamp(min=0)
                    + torch.arange(B, device=q.device)[:, None, None] * entries.shape[1]
                )
                g_entries.view(-1, D).index_add_(0, target.flatten(), g_e.reshape(-1, D))
        g_qc = rotate(g_qc, c, s, True)
        g_q[:, now] = (r * (g_qc - unit * (g_qc * unit).mean(-1, keepdim=True)))[:, :size].to(
            q.dtype
        )
    return g_q, g_kv.to(kv.dtype), _sink_gradient(delta, lse, sink), g_entries.to(q.dtype)


def _sink_gradient(delta, lse, sink):
    return -((sink.float() - lse).exp() * delta).sum((0, 1)).to(sink.dtype)


def backward_kernel(g, lse, q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps):
    g_q, g_kv, g_entries, delta = backward(g, lse, q, kv, seen, cos, sin, entries, lo, hi, idx, eps)
    return g_q, g_kv, _sink_gradient(delta, lse, sink), g_entries


def _flops(
    q,
    kv,
    sink,
    seen,
    cos,
    sin,
    entries=None,
    lo=None,
    hi=None,
    idx=None,
    *args,
    out_shape=None,
    **kw,
):
    """Scores and values over every key that a token may see: the window, and all entries or the chosen ones."""
    B, T, H, D = q
    keys = kv[1] - T + 1 + (0 if entries is None else entries[1] if idx is None else idx[2])
    return 4 * B * T * H * D * keys


_backward_op = register(
    "sparse_attn_backward(Tensor g, Tensor lse, Tensor q, Tensor kv, Tensor sink, Tensor seen, Tensor cos, "
    "Tensor sin, Tensor? entries, Tensor? lo, Tensor? hi, Tensor? idx, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=backward_reference,
    kernel=backward_kernel,
    cpp="sparse_attn",
    supports_cpp=supports_cpp,
    fake=lambda g, lse, q, kv, sink, seen, cos, sin, entries, *rest: (
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
    return (
        g_q,
        g_kv,
        g_sink,
        None,
        None,
        None,
        g_entries if tensors[6] is not None else None,
        *[None] * 4,
    )


_opaque = register(
    "sparse_attn(Tensor q, Tensor kv, Tensor sink, Tensor seen, Tensor cos, Tensor sin, Tensor? entries, "
    "Tensor? lo, Tensor? hi, Tensor? idx, float eps) -> (Tensor, Tensor)",
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
    def call(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps, with_lse=False):
        o, lse = form(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps)
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
