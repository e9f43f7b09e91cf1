"""The indexer's top-k in the GPU suite."""

from __future__ import annotations

import torch

from bench.gpu_measure import Bench, Side, Skipped, case, nbytes
from bench.gpu_ops import SLICE, ours, packed
from ops.launch import INTERPRETING, jit, launch, power_of_two, tl


def scores(q, k, u, lo, hi):
    """sum_h relu(q_h k) u_h, [B, T, entries]; -inf where an entry is hidden."""
    s = (torch.einsum("bthd,bed->bteh", q, k).float().relu() * u.float()[:, :, None]).sum(-1)
    e = torch.arange(k.shape[1], device=q.device)
    return s.masked_fill((e < lo[..., None]) | (e >= hi[..., None]), float("-inf"))


def native_topk(q, k, u, lo, hi, topk):
    """The published native form: one [1, T, entries, heads] tensor of scores, fp32."""
    top = scores(q, k, u, lo, hi).topk(min(topk, k.shape[1]), -1)
    return torch.where(top.values > float("-inf"), top.indices, -1)


def chunked_topk(q, k, u, lo, hi, topk, chunk=512):
    parts = zip(*(t.split(chunk, 1) for t in (q, u, lo, hi)), strict=True)
    return torch.cat([native_topk(q, k, u, lo, hi, topk) for q, u, lo, hi in parts], 1)


@jit
def single_sort(
    # [T, H, D], [entries, D], [T, H], [T], [T]; scratch [T, EP] fp32; idx [T, K]
    q,
    k,
    u,
    lo,
    hi,
    scratch,
    idx,
    # sizes
    entries,
    K,
    H: tl.constexpr,
    D: tl.constexpr,
    BC: tl.constexpr,  # entries scored at a time
    EP: tl.constexpr,  # entries, padded to a power of two
):
    """The published Triton kernel's plan: one program scores a token's entries and sorts them."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, H)
    d = tl.arange(0, D)
    rows = tl.load(q + (t * H + h)[:, None] * D + d[None])
    weight = tl.load(u + t * H + h).to(tl.float32)
    first, last = tl.load(lo + t), tl.load(hi + t)
    for start in range(0, EP, BC):
        e = start + tl.arange(0, BC)
        keys = tl.load(k + e[None] * D + d[:, None], mask=(e < entries)[None], other=0.0)
        s = tl.sum(tl.maximum(tl.dot(rows, keys), 0.0) * weight[:, None], 0)
        tl.store(scratch + t * EP + e, tl.where((e >= first) & (e < last), s, float("-inf")))
    tl.debug_barrier()
    # keys that sort as the scores do, above the entry's number counted down
    e = tl.arange(0, EP)
    bits = tl.load(scratch + t * EP + e).to(tl.int32, bitcast=True)
    key = (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32) | (EP - 1 - e)
    best = tl.sort(key, descending=True)
    # -2139095041 is the key of -inf
    entry = tl.where((best >> 32) > -2139095041, EP - 1 - (best & 0xFFFFFFFF), -1)
    tl.store(idx + t * K + e, entry, mask=e < K)


def sorted_topk(q, k, u, lo, hi, topk):
    if not (q.is_cuda or INTERPRETING):
        raise Skipped("a Triton kernel, and there is neither a GPU nor TRITON_INTERPRET=1")
    _, T, H, D = q.shape
    entries = k.shape[1]
    EP, K = power_of_two(entries, 16), min(topk, entries)
    idx, scratch = lo.new_empty(1, T, K), torch.empty(T, EP, device=q.device)
    tensors = (q, k, u, lo, hi, scratch, idx)
    sizes = dict(H=H, D=D, BC=min(64, EP), EP=EP)
    launch(single_sort, (T,), *tensors, entries, K, **sizes, num_warps=8)
    return idx


def deepgemm_topk(q, k, u, lo, hi, topk):
    import deep_gemm  # may be absent

    fp8 = torch.float8_e4m3fn
    keys = k[0].to(fp8), torch.ones(k.shape[1], device=k.device)
    s = deep_gemm.fp8_mqa_logits(q[0].to(fp8), keys, u[0].float(), lo[0].int(), hi[0].int())
    return s[:, : k.shape[1]].topk(min(topk, k.shape[1]), -1).indices[None]


def recall(q, k, u, lo, hi, topk):
    """Judge: the share of the chosen that may be chosen, on some tokens.

    Ties within fp32 rounding may fall either way.
    """
    tokens = torch.linspace(0, q.shape[1] - 1, min(q.shape[1], SLICE), device=q.device).long()
    q, u, lo, hi = (t[:, tokens] for t in (q, u, lo, hi))
    K = min(topk, k.shape[1])

    def error_of(idx):
        # as in `scores`, in fp64: [B, T, entries]
        relu = torch.einsum("bthd,bed->bthe", q.double(), k.double()).relu()
        s = torch.einsum("bthe,bth->bte", relu, u.double())
        e = torch.arange(k.shape[1], device=q.device)
        s = s.masked_fill((e < lo[..., None]) | (e >= hi[..., None]), float("-inf"))
        # the least score that may be chosen, of a token that sees `visible` entries
        top = s.topk(K, -1).values
        visible = (top > float("-inf")).sum(-1, keepdim=True).clamp(min=1)
        least = top.gather(-1, visible - 1) - 1e-5 * top[..., :1].abs()
        mine = idx[:, tokens]
        chosen = torch.zeros_like(s).scatter_reduce_(
            -1, mine.clamp(min=0), (mine >= 0).double(), "amax"
        )
        good = (chosen * (s >= least) * (s > float("-inf"))).sum()
        wanted = (hi - lo).clamp(0, K).sum().clamp(min=1)
        return {"error": float(1 - good / wanted), "recall": float(good / wanted)}

    return error_of


PREFILLED = (  # label, tokens, documents, topk
    ("8192, one sample", 8192, 1, 512),
    ("8192, 32 samples", 8192, 32, 512),
    ("16384, one sample", 16384, 1, 1024),
    ("16384, 64 samples", 16384, 64, 1024),
)
DECODED = ((1, 65536), (8, 65536), (1, 1 << 20), (8, 1 << 20))  # batch, context


@case("G1.4", "indexer top-k", 40, 40, "indexer_topk")
def indexer(b: Bench) -> None:
    H, D = b.size(64, 16), b.size(128, 16)
    for label, T, documents, K in PREFILLED[: b.size(4, 2)]:
        T = b.size(T, 64)
        documents = b.size(documents, min(documents, 4))
        K = b.size(K, 8)
        win = packed(b, T, documents).windows[4]

        def tokens(T=T, win=win, K=K):
            q = b.normal(1, T, H, D)
            k = b.normal(1, T // 4, D)
            u = b.normal(1, T, H)
            return q, k, u, win.lo, win.hi, K

        inputs = b.sets(tokens)
        sides = {
            "ours": ours("indexer_topk"),
            "eager": native_topk,
            "compiled": b.compiled(native_topk),
            "chunked": chunked_topk,
            "single sort": Side(sorted_topk, True),
            "deep_gemm and topk": deepgemm_topk,
        }
        pairs = int((win.hi - win.lo).clamp(min=0).sum())
        b.compare(
            label,
            sides,
            inputs,
            flops=2 * H * D * pairs,
            moved=nbytes(inputs[0]) + 8 * T * K,
            error_of=recall(*inputs[0]),
        )
    for batch, context in DECODED[: b.size(4, 1)]:
        entries, K = b.size(context // 4, 96), b.size(512, 8)
        lo = torch.zeros(batch, 1, dtype=torch.int64, device=b.device)

        def token(batch=batch, entries=entries, lo=lo, K=K):
            q = b.normal(batch, 1, H, D)
            k = b.normal(batch, entries, D)
            u = b.normal(batch, 1, H)
            return q, k, u, lo, lo + entries, K

        inputs = b.sets(token)
        sides = {
            "ours": ours("indexer_topk"),
            "eager": native_topk,
            "compiled": b.compiled(native_topk),
        }
        b.compare(
            f"decode B={batch}, context {context >> 10}k",
            sides,
            inputs,
            flops=2 * H * D * batch * entries,
            moved=nbytes(inputs[0]),
            error_of=recall(*inputs[0]),
        )
