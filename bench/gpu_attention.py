"""Attention in the GPU suite: sparse attention forward and backward, RoPE, the compressor's
pooling.

Where sparse_attn fuses more than attention (it normalises and rotates its queries), so do
baselines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.gpu_measure import Bench, Side, against, backward_of, both, case, double, nbytes
from bench.gpu_ops import (
    EPS,
    SLICE,
    angles,
    call_of,
    hf,
    kernel,
    ours,
    packed,
    reference,
    tail,
    wide,
)
from ops.registry import LAUNCHERS

rotated = reference("rope")


def normed(q, eps):
    v = wide(q)
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)).to(q.dtype)


def rotated_fp64(x, cos, sin):
    """x [..., D] rotated in its last dims by angles in fp64, broadcast."""
    r = 2 * cos.shape[-1]
    even, odd = x[..., -r:].unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return torch.cat((x[..., :-r], pairs.flatten(-2)), -1)


# --------------------------------------------------------------------------------------------------
# Sparse attention: inputs


class Inputs(NamedTuple):
    """Arguments of sparse_attn, then each token's keys as rows of [kv, entries], -1 for none."""

    q: torch.Tensor  # [1, T, H, D]
    kv: torch.Tensor  # [1, W - 1 + T, D]
    sink: torch.Tensor  # [H]
    window_len: torch.Tensor  # [1, T]
    cos: torch.Tensor  # [1, T, rope_dim / 2]
    sin: torch.Tensor
    entries: torch.Tensor | None  # [1, entries, D]
    lo: torch.Tensor | None  # [1, T]
    hi: torch.Tensor | None
    idx: torch.Tensor | None  # [1, T, topk]
    eps: float
    where: torch.Tensor  # [T, keys]

    @property
    def pairs(self) -> int:
        """(token, key) pairs."""
        return int((self.where >= 0).sum())


def random_chosen(b: Bench, hi, entries: int, topk: int):
    """topk of each token's visible entries at random, -1 where there are fewer."""
    score = torch.rand(len(hi), entries, generator=b.random, device=b.device)
    hidden = torch.arange(entries, device=b.device) >= hi[:, None]
    top = score.masked_fill(hidden, -1.0).topk(min(topk, entries), -1)
    return torch.where(top.values >= 0, top.indices, -1)


def attention_inputs(
    b: Bench,
    kind: str,  # SWA, HCA or CSA
    # sizes: tokens, heads, chosen entries, head dim, window
    T: int,
    H: int,
    topk: int,
    D: int,
    W: int,
    # so many entries, none of them hidden, random ones of which are chosen, beside a token's own
    # key; None: those of a causal sequence
    entries: int | None = None,
) -> Inputs:
    position = torch.arange(T, device=b.device)
    window_len = (position + 1).clamp(max=W) if entries is None else torch.ones_like(position)
    j = torch.arange(W, device=b.device)
    where = torch.where(j >= W - window_len[:, None], position[:, None] + j, -1)
    q = b.normal(1, T, H, D, grad=True)
    kv = b.normal(1, W - 1 + T, D, grad=True)
    sink = b.normal(H, dtype=torch.float32, grad=True)
    entry = lo = hi = idx = None
    if kind != "SWA":
        ratio = {"CSA": 4, "HCA": b.size(128, 16)}[kind]
        count = entries or T // ratio
        entry, lo = b.normal(1, count, D, grad=True), torch.zeros_like(position)[None]
        hi = (torch.full_like(position, count) if entries else (position + 1) // ratio)[None]
        if kind == "HCA":
            e = torch.arange(count, device=b.device)
            chosen = torch.where(e < hi[0][:, None], e, -1)
        elif entries:
            chosen = b.integers(count, T, topk)
        else:
            parts = hi[0].split(1024)
            chosen = torch.cat([random_chosen(b, part, count, topk) for part in parts])
        where = torch.cat((where, torch.where(chosen >= 0, chosen + kv.shape[1], -1)), 1)
        idx = chosen[None] if kind == "CSA" else None
    cos, sin = angles(b, T, b.size(64, 8))
    return Inputs(q, kv, sink, window_len[None], cos, sin, entry, lo, hi, idx, EPS, where)


# --------------------------------------------------------------------------------------------------
# Sparse attention: baselines


def all_keys(kv, entries):
    return kv if entries is None else torch.cat((kv, entries), 1)


def gathered(*args):
    """The published native form: keys gathered into [T, K, D], two einsums, a softmax with the
    sink.
    """
    x = Inputs(*args)
    q = rotated(normed(x.q, x.eps), x.cos, x.sin, False)
    keys = all_keys(x.kv, x.entries)[0][x.where.clamp(min=0)]
    s = wide(torch.einsum("thd,tkd->thk", q[0], keys)) * q.shape[-1] ** -0.5
    s = s.masked_fill((x.where < 0)[:, None], float("-inf"))
    s = torch.cat((s, wide(x.sink)[None, :, None].expand(*s.shape[:2], 1)), -1)
    o = torch.einsum("thk,tkd->thd", s.softmax(-1)[..., :-1].to(q.dtype), keys)
    return rotated(o[None], x.cos, x.sin, True)


def gathered_fp64(n, x: Inputs):
    """The same for the last n tokens in fp64; rotations in fp64 too."""
    cos, sin = x.cos[:, -n:, None].double(), x.sin[:, -n:, None].double()
    where = x.where[-n:]
    q = rotated_fp64(normed(x.q[:, -n:], x.eps), cos, sin)[0]
    keys = all_keys(x.kv, x.entries)[0][where.clamp(min=0)]
    s = torch.einsum("thd,tkd->thk", q, keys) * q.shape[-1] ** -0.5
    s = s.masked_fill((where < 0)[:, None], float("-inf"))
    s = torch.cat((s, x.sink[None, :, None].expand(n, -1, 1)), -1)
    o = torch.einsum("thk,tkd->thd", s.softmax(-1)[..., :-1], keys)
    return rotated_fp64(o[None], cos, -sin)


def dense_hf(W: int):
    """Transformers' eager attention: keys repeated to all heads, a dense mask made beforehand."""
    masks = []

    def mask_of(x: Inputs, keys: int):
        """[1, 1, T, keys]; hidden keys, -1 in `where`, fall on a last column that is cut off."""
        shape = (x.q.shape[1], keys + 1)
        mask = torch.full(shape, float("-inf"), dtype=x.q.dtype, device=x.q.device)
        return mask.scatter_(1, x.where % shape[1], 0.0)[None, None, :, :-1]

    def call(*args):
        x = Inputs(*args)
        keys = all_keys(x.kv, x.entries)[:, None]
        if not masks:
            masks.append(mask_of(x, keys.shape[2]))
        sinks = x.sink.to(x.q.dtype)
        module = SimpleNamespace(num_key_value_groups=x.q.shape[2], sinks=sinks, training=False)
        q = rotated(normed(x.q, x.eps), x.cos, x.sin, False).transpose(1, 2)
        attend = hf("eager_attention_forward")
        o = attend(module, q, keys, keys, masks[0], q.shape[-1] ** -0.5)[0]
        return rotated(o, x.cos, x.sin, True)

    return call


def flex(b: Bench, T: int, W: int, entries: int, hi):
    """flex_attention over window and entries in order; the sink enters by the log-sum-exp."""
    from torch.nn.attention.flex_attention import (  # slow to import
        create_block_mask,
        flex_attention,
    )

    limit = torch.zeros(T, dtype=torch.int64, device=b.device) if hi is None else hi[0]

    def visible(batch, head, t, j):
        return ((j < T) & (j <= t) & (t - j < W)) | ((j >= T) & (j - T < limit[t]))

    attend, blocks = b.compiled(flex_attention, whole=False).call, []

    def call(*args):
        x = Inputs(*args)
        if not blocks:
            keys = T + entries
            blocks.append(create_block_mask(visible, None, None, T, keys, device=str(b.device)))
        keys = all_keys(x.kv[:, W - 1 :], x.entries)[:, None]
        q = rotated(normed(x.q, x.eps), x.cos, x.sin, False).transpose(1, 2)
        o, lse = attend(q, keys, keys, block_mask=blocks[0], enable_gqa=True, return_lse=True)
        o = o * torch.sigmoid(lse - x.sink[:, None])[..., None].to(o.dtype)
        return rotated(o.transpose(1, 2), x.cos, x.sin, True)

    return call


# --------------------------------------------------------------------------------------------------
# Sparse attention: cases

SHAPES = (  # label, tokens, heads, chosen entries
    ("4096, 64 heads", 4096, 64, 512),
    ("8192, 64 heads", 8192, 64, 512),
    ("8192, 128 heads", 8192, 128, 1024),
)
UNCOMPILED = ("eager", "transformers")  # sides


def attention_rows(b: Bench) -> Iterator[tuple[str, Inputs, dict]]:
    """(row, arguments, baselines)."""
    for label, T, H, topk in SHAPES[: b.size(3, 1)]:
        T = b.size(T, 48)
        H = b.size(H, 16)
        topk = b.size(topk, 4)
        D, W = b.size(512, 32), b.size(128, 8)
        for kind in ("CSA", "HCA", "SWA"):
            args = attention_inputs(b, kind, T, H, topk, D, W)
            sides = {"eager": gathered, "compiled": b.compiled(gathered).call}
            if "4096" in label:
                sides["transformers"] = dense_hf(W)
            if kind != "CSA":
                entries = 0 if kind == "SWA" else args.entries.shape[1]
                sides["flex_attention"] = flex(b, T, W, entries, args.hi)
            yield f"{kind} {label}", args, sides


def forward_row(b: Bench, row: str, args: Inputs, sides: dict) -> None:
    H, D = args.q.shape[2:]
    b.compare(
        row,
        {"ours": lambda *args: ours("sparse_attn")(*args[:-1]), **sides},
        [tuple(args)],
        flops=4 * H * D * args.pairs,
        moved=2 * nbytes(args.q) + nbytes(tuple(args)[1:-1]),
        pairs=args.pairs,
        error_of=against(lambda: gathered_fp64(SLICE, Inputs(*double(tuple(args)))), tail(SLICE)),
    )


@case("G1.5", "sparse attention, forward", 50, 40, "sparse_attn")
def attention_forward(b: Bench) -> None:
    for row, args, baselines in attention_rows(b):
        sides = {
            name: Side(call, name not in UNCOMPILED, name != "flex_attention")
            for name, call in baselines.items()
        }
        forward_row(b, row, args, sides)
    # FlashMLA's shapes for this model: 4096 queries over entries of any context
    for context in (8192, 32768, 65536)[: b.size(3, 1)]:
        T = b.size(4096, 40)
        H = b.size(64, 16)
        D = b.size(512, 32)
        topk = b.size(512, 8)
        args = attention_inputs(b, "CSA", T, H, topk, D, b.size(128, 8), b.size(context, 64))
        forward_row(b, f"4096 queries, {context >> 10}k entries, 512 chosen", args, {})


@case("G1.6", "sparse attention, backward", 60, 60, "sparse_attn_backward")
def attention_backward(b: Bench) -> None:
    size = b.size(8192, 16)
    m = b.normal(size, size, scale=size**-0.5)

    def products(ms):
        for _ in range(math.ceil(ms / 1.4)):  # 1.4 ms is what one takes, at least
            m @ m

    for row, args, baselines in attention_rows(b):
        backward_row(b, row, args, baselines, products)


def backward_row(b: Bench, row: str, x: Inputs, baselines: dict, products) -> None:
    T, H, D = x.q.shape[1:]
    wrt = (0, 1, 2) if x.entries is None else (0, 1, 2, 6)
    if b.prepare:
        lse = x.q.new_zeros(1, T, H, dtype=torch.float32)
    else:
        with torch.no_grad():
            lse = kernel("sparse_attn")(*tuple(x)[:-1])[1]
    g = b.normal(1, T, H, D)

    def mine(*args):
        *args, _, g = args
        return kernel("sparse_attn_backward")(g, lse, *args)

    def gradient():
        """Of the queries: a token's own gradient; those of keys collect from all tokens."""
        args = double(tuple(x))
        exact = Inputs(*(t.requires_grad_() if i in wrt else t for i, t in enumerate(args)))
        with torch.enable_grad():
            out = gathered_fp64(SLICE, exact)
            return torch.autograd.grad(out, exact.q, double(g[:, -SLICE:]))[0][:, -SLICE:]

    sides = {"ours": Side(mine, True, False)}
    for name, call in baselines.items():
        sides[name] = backward_of(call, wrt)._replace(made=name not in UNCOMPILED)
    found = b.compare(
        row,
        sides,
        [(*x, g)],
        flops=10 * H * D * x.pairs,
        moved=3 * nbytes(x.q) + 2 * nbytes(tuple(x)[1:-1]),
        pairs=x.pairs,
        error_of=against(gradient, lambda out: out[0][:, -SLICE:]),
    )
    if "ms" in found and "8192" not in row:
        found["ms_beside_matrix_products"] = b.beside(lambda: mine(*x, g), products)


# --------------------------------------------------------------------------------------------------
# RoPE


def rope_fp64(x, cos, sin, inverse):
    x, cos, sin = double((x, cos[:, :, None], sin[:, :, None]))
    return rotated_fp64(x, cos, -sin if inverse else sin)


def normed_and_rotated(q, cos, sin):
    return rotated(normed(q, EPS), cos, sin, False)


def normed_and_rotated_by_ours(q, cos, sin):
    return ours("rope")(normed(q, EPS), cos, sin, False)


ROPE_SHAPES = (
    ("4096 x 64 x 512", 4096, 64),
    ("8192 x 64 x 512", 8192, 64),
    ("8192 x 128 x 512", 8192, 128),
)


@case("G1.7", "RoPE", 8, 20, "rope", "rope_")
def rope(b: Bench) -> None:
    D, r = b.size(512, 32), b.size(64, 8)
    for label, T, H in ROPE_SHAPES[: b.size(3, 1)]:
        T, H = b.size(T, 24), b.size(H, 4)

        def queries(*inverse, T=T, H=H):
            return b.normal(1, T, H, D), *angles(b, T, r), *inverse

        for inverse in (False, True):
            inputs = b.sets(lambda inverse=inverse, make=queries: make(inverse))
            last = [t[:, -SLICE:] for t in inputs[0][:3]]
            b.compare(
                f"{label}{', inverse' if inverse else ''}",
                {"ours": ours("rope"), "eager": rotated, "compiled": b.compiled(rotated)},
                inputs,
                moved=2 * nbytes(inputs[0][0]),
                error_of=against(lambda args=(*last, inverse): rope_fp64(*args), tail(SLICE)),
            )
        if "rope_" in LAUNCHERS:
            b.compare(
                f"{label}, inverse, in place",
                {"ours": kernel("rope_"), "eager": rotated, "compiled": b.compiled(rotated)},
                b.sets(lambda make=queries: make(True)),
                moved=2 * T * H * r * 2,
            )
        inputs = b.sets(queries)
        sides = {
            "ours": b.compiled(normed_and_rotated_by_ours),
            "eager": normed_and_rotated,
            "compiled": b.compiled(normed_and_rotated),
        }
        b.compare(f"{label}, with the queries' norm", sides, inputs, moved=2 * nbytes(inputs[0][0]))


# --------------------------------------------------------------------------------------------------
# Compressor


def pooled_hf(
    # the rows and their windows
    rows,
    end,
    index,
    # norm and RoPE of the entries
    weight,
    cos,
    sin,
    # constants
    ratio,
    eps,
    dtype,
):
    """Transformers' pooling of one document (bf16), from projections on."""
    lanes, D = (2 if ratio == 4 else 1), weight.shape[0]
    windows = rows[:, lanes * ratio - 1 :].unflatten(1, (-1, ratio)).to(dtype)
    kv, gate = windows.chunk(2, -1)

    def overlapping(t, value):
        """[windows, ratio, 2 D] -> [windows, 2 ratio, D]: the first lane of the window before."""
        before = F.pad(t[:, :-1, :, :D], (0, 0, 0, 0, 1, 0), value=value)
        return torch.cat((before, t[..., D:]), 2)

    if lanes == 2:
        kv, gate = overlapping(kv, 0.0), overlapping(gate, float("-inf"))
    e = (kv * gate.softmax(2, dtype=torch.float32).to(dtype)).sum(2)
    v = e.float()
    e = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * weight.float()).to(dtype)
    return rotated(e, cos, sin, False)


def compress_gradient(
    # the rows and their windows
    rows,
    end,
    index,
    # norm and RoPE of the entries
    weight,
    cos,
    sin,
    # constants
    ratio,
    eps,
    dtype,
    g,
):
    """The gradient of the rows, from rows, weights and results in fp64."""
    rows, weight, g = double((rows, weight, g))

    def pooled(rows):
        rest = (end, index, weight, cos, sin, ratio, eps)
        return reference("compress")(rows, *rest, torch.float64)

    return both(pooled, (0,))(rows.requires_grad_(), g)


@case("G1.8", "compressor", 12, 20, "compress", "compress_backward")
def compressor(b: Bench) -> None:
    D = b.size(512, 16)
    for kind, ratio in (("CSA", 4), ("HCA", 128)):
        weight = (1 + b.normal(D, dtype=torch.float32, scale=0.1)).requires_grad_()
        for documents in b.size((1, 32), (1, 4)):
            pooled_documents(b, kind, ratio, weight, documents)
        decoded_entry(b, kind, ratio, weight)


def pooled_documents(b: Bench, kind: str, ratio: int, weight, documents: int) -> None:
    """A row of documents, forward, and forward and backward."""
    eager, dtype = reference("compress"), torch.bfloat16
    lanes = 2 if ratio == 4 else 1
    D = len(weight)
    r = b.size(64, 8)
    T, lookback = b.size(8192, 256), lanes * ratio - 1
    win = packed(b, T, documents, ratio).windows[ratio]

    def rows():
        projected = b.normal(1, T, 2 * lanes * D, dtype=torch.float32)
        padded = F.pad(projected, (0, 0, lookback, 0)).requires_grad_()
        cos, sin = win.cos[..., : r // 2], win.sin[..., : r // 2]
        return padded, win.end + lookback, win.index, weight, cos, sin, ratio, EPS, dtype

    inputs = b.sets(rows)
    first = inputs[0]
    sides = {"ours": ours("compress"), "eager": eager, "compiled": b.compiled(eager)}
    if documents == 1:
        sides["transformers"] = pooled_hf
    n = min(SLICE, T // documents // ratio) or 1  # entries that are judged

    def last_entries():
        x, end, index, weight, cos, sin = first[:6]
        exact = double((x, end[:, -n:], index[:, -n:], weight))
        return eager(*exact, cos[:, -n:], sin[:, -n:], ratio, EPS, torch.float64)

    complete = bool((win.end[:, -n:] < T).all())
    b.compare(
        f"{kind}, {documents} samples",
        sides,
        inputs,
        moved=nbytes(first[0]) + T // ratio * D * 2,
        error_of=against(last_entries, tail(n)) if complete else None,
    )
    g = b.normal(1, *win.end.shape[1:], D) * (win.end < T)[..., None]
    b.compare(
        f"{kind}, {documents} samples, forward and backward",
        {name: Side(both(call_of(side), (0, 3)), True) for name, side in sides.items()},
        [(*args, g) for args in inputs],
        moved=3 * nbytes(first[0]),
        error_of=against(lambda: compress_gradient(*first, g), lambda out: out[0]),
    )


def decoded_entry(b: Bench, kind: str, ratio: int, weight) -> None:
    eager = reference("compress")
    lanes, D = (2 if ratio == 4 else 1), len(weight)
    zero = torch.zeros(1, 1, dtype=torch.int64, device=b.device)
    cos, sin = angles(b, 1, b.size(64, 8))

    def ring():
        rows = b.normal(1, lanes * ratio, 2 * lanes * D, dtype=torch.float32)
        end, index = zero + lanes * ratio - 1, zero + 5
        return rows, end, index, weight, cos, sin, ratio, EPS, torch.bfloat16

    inputs = b.sets(ring)
    first = inputs[0]
    b.compare(
        f"{kind}, decoded token",
        {"ours": ours("compress"), "eager": eager, "compiled": b.compiled(eager)},
        inputs,
        moved=nbytes(first[0]),
        error_of=against(lambda: eager(*double(first[:4]), *first[4:8], torch.float64)),
    )
