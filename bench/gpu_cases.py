"""The kernels of the GPU suite: every op beside its baselines, at the shapes of Flash and Pro and of published benchmarks.

Baselines are written from the published formulas in eager PyTorch, and compute what ours computes on the same inputs: where
ours fuses more (sparse_attn normalises and rotates its queries), so do they. Transformers' modules and other libraries take
part where they can be imported. Labels name the real sizes, also of toy runs.
"""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import ops
from bench.gpu_measure import Bench, Side, Skipped, against, backward_of, both, case, double, nbytes
from model import ModelArgs, layer_frequencies, make_plan
from ops.formats import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8, scale_to_float
from ops.launch import INTERPRETING, jit, launch, power_of_two, tl
from ops.moe_grouped import activate
from ops.registry import LAUNCHERS

SLICE = 32  # tokens whose results are compared with fp64
EPS = 1e-6


def ours(name: str):
    return (ops.OPS | ops.INTERNAL)[name].opaque


def kernel(name: str):
    """An op that has no two forms."""
    return getattr(torch.ops.dsv4, name)


def reference(name: str):
    """The plain function behind an op's reference form; compiling it is what the model does with the op off."""
    module = importlib.import_module(f"ops.{name}")
    return getattr(module, "reference", None) or module.forward_reference


turned, doubly_stochastic = reference("rope"), reference("sinkhorn")


def hf(name: str):
    return getattr(
        importlib.import_module("transformers.models.deepseek_v4.modeling_deepseek_v4"), name
    )


def tail(n: int):
    """Pick the last n tokens of every result, which are along dim 1."""
    return lambda out: tuple(t[:, -n:] for t in (out if isinstance(out, tuple) else (out,)))


def angles(b: Bench, T: int, r: int):
    angle = torch.arange(T, device=b.device)[None, :, None] * layer_frequencies(ModelArgs.flash())[
        1, : r // 2
    ].to(b.device)
    return angle.cos(), angle.sin()


# ---------------------------------------------------------------------------------------------------------------------
# Hyper-connections

HC_SHAPES = (
    ("16384 x 4096", 16384, 4096),
    ("8192 x 4096", 8192, 4096),
    ("8192 x 7168", 8192, 7168),
)


def wide(t: torch.Tensor) -> torch.Tensor:
    """What baselines compute in: fp32, or fp64 where they serve as the exact result."""
    return t if t.dtype == torch.float64 else t.float()


def post_published(y, x, post, comb):
    """Broadcast and sum in fp32."""
    return (
        post[..., None] * wide(y)[:, :, None] + (comb[..., None] * wide(x)[:, :, :, None]).sum(2)
    ).to(x.dtype)


def post_hf(y, x, post, comb):
    return post.to(x.dtype)[..., None] * y[:, :, None] + torch.matmul(
        comb.to(x.dtype).transpose(-1, -2), x
    )


def streams(b: Bench, T: int, d: int, n: int = 4):
    """y, x, post, comb as hc_post meets them."""
    return (
        b.normal(1, T, d, grad=True),
        b.normal(1, T, n, d, grad=True),
        (2 * b.normal(1, T, n, dtype=torch.float32).sigmoid()).requires_grad_(),
        (b.normal(1, T, n, n, dtype=torch.float32).softmax(-1)).requires_grad_(),
    )


@case("G1.1", "hc_post", 15, 20, "hc_post")
def hc_post(b: Bench) -> None:
    for label, T, d in HC_SHAPES[: b.at(3, 1)]:
        T, d = b.at(T, 48), b.at(d, 32)
        inputs = b.sets(lambda: (*streams(b, T, d), b.normal(1, T, 4, d)))
        forward, exact = [args[:4] for args in inputs], double([t[:, -SLICE:] for t in inputs[0]])
        sides = {
            "ours": ours("hc_post"),
            "eager": post_published,
            "compiled": b.compiled(post_published),
            "transformers": post_hf,
        }
        b.compare(
            f"{label}, forward",
            sides,
            forward,
            moved=T * d * 2 * 9,
            judge=against(lambda: post_published(*exact[:4]), tail(SLICE)),
        )
        gradients = both(post_published, (0, 1, 2, 3))
        b.compare(
            f"{label}, forward and backward",
            {
                name: Side(both(side.call if isinstance(side, Side) else side, (0, 1, 2, 3)), True)
                for name, side in sides.items()
            },
            inputs,
            moved=T * d * 2 * (9 + 14),
            judge=against(
                lambda: gradients(*[t.requires_grad_() for t in exact[:4]], exact[4]), tail(SLICE)
            ),
        )


def hyper_connection(b: Bench, d: int, n: int = 4):
    return (
        b.normal(n * (n + 2), n * d, dtype=torch.float32, scale=(n * d) ** -0.5, grad=True),
        b.normal(n * (n + 2), dtype=torch.float32, scale=0.3, grad=True),
        (1 + b.normal(3, dtype=torch.float32, scale=0.1)).requires_grad_(),
    )


def with_weights(module: torch.nn.Module, **weights: torch.Tensor) -> torch.nn.Module:
    """A module of Transformers', with these tensors in place of its parameters."""
    for name, value in weights.items():
        delattr(module, name)
        setattr(module, name, value)
    return module


def pre_hf():
    """Transformers' module, its results in our order."""
    kept = []

    def call(x, fn, base, scale, norm_eps, hc_eps, iters):
        if not kept:
            config = SimpleNamespace(
                hc_mult=x.shape[2],
                hc_sinkhorn_iters=iters,
                hc_eps=hc_eps,
                rms_norm_eps=norm_eps,
                hidden_size=1,
            )
            kept.append(
                with_weights(hf("DeepseekV4HyperConnection")(config), fn=fn, base=base, scale=scale)
            )
        post, comb, y = kept[0](x)
        return y, post, comb

    return call


def pre_of(mix, square, x, base, scale, norm_eps, hc_eps, iters):
    """hc_pre from x fn^T and the mean square of x, in their precision."""
    n = x.shape[2]
    m = mix * torch.rsqrt(square + norm_eps)
    pre, post, comb = (
        m * torch.cat([s.expand(k) for s, k in zip(scale, (n, n, n * n))]) + base
    ).split([n, n, n * n], -1)
    y = ((torch.sigmoid(pre) + hc_eps)[..., None] * wide(x)).sum(2).to(x.dtype)
    return y, 2 * torch.sigmoid(post), doubly_stochastic(comb.unflatten(-1, (n, n)), hc_eps, iters)


def pre_bf16(x, fn, *rest):
    """The published faster form: the mix as a bf16 linear."""
    v = x.flatten(2)
    return pre_of(
        F.linear(v, fn.to(x.dtype)).float(), v.float().square().mean(-1, keepdim=True), x, *rest
    )


def pre_deepgemm(x, fn, *rest):
    """The mix and the squares by SGLang's kernel, in TF32."""
    import deep_gemm

    v, new = x.flatten(2)[0], lambda *shape: torch.empty(shape, device=x.device)
    mix, square = new(len(v), len(fn)), new(len(v))
    deep_gemm.tf32_hc_prenorm_gemm(v, fn, mix, square)
    return pre_of(mix[None], (square / v.shape[1])[None, :, None], x, *rest)


@case("G1.2", "hc_pre with Sinkhorn", 25, 20, "hc_pre", "hc_post_pre")
def hc_pre(b: Bench) -> None:
    constants = (EPS, EPS, 20)
    for label, T, d in HC_SHAPES[: b.at(3, 1)]:
        T, d = b.at(T, 48), b.at(d, 32)
        weights = hyper_connection(b, d)
        make = lambda: (b.normal(1, T, 4, d, grad=True), *weights, *constants)
        inputs, g = (
            b.sets(make),
            (
                b.normal(1, T, d),
                b.normal(1, T, 4, dtype=torch.float32),
                b.normal(1, T, 4, 4, dtype=torch.float32),
            ),
        )
        x = double(inputs[0][0][:, -SLICE:])
        sides = {
            "ours": ours("hc_pre"),
            "transformers": pre_hf(),
            "bf16 linear": pre_bf16,
            "compiled": b.compiled(reference("hc_pre")),
            "deep_gemm": pre_deepgemm,
        }
        b.compare(
            f"{label}, forward",
            sides,
            inputs,
            moved=T * d * 2 * 5,
            flops=2 * T * 24 * 4 * d,
            judge=against(fp64_pre(x, weights, constants), tail(SLICE)),
        )
        sliced = lambda: torch.autograd.grad(
            fp64_pre(x.requires_grad_(), weights, constants)(),
            x,
            [double(t[:, -SLICE:]) for t in g],
        )
        b.compare(
            f"{label}, forward and backward",
            {
                name: Side(both(side.call if isinstance(side, Side) else side, (0, 1, 2, 3)), True)
                for name, side in sides.items()
                if name != "deep_gemm"
            },
            [(*args, g) for args in inputs],
            moved=T * d * 2 * (5 + 4 + 1 + 4),
            flops=6 * T * 24 * 4 * d,
            judge=against(with_grad(sliced), lambda out: out[0][:, -SLICE:]),
        )
        if "hc_post_pre" in LAUNCHERS:
            inputs = b.sets(lambda: (*streams(b, T, d), *weights, *constants))
            two = lambda y, x, post, comb, *rest: (lambda new: (new, *ours("hc_pre")(new, *rest)))(
                ours("hc_post")(y, x, post, comb)
            )
            b.compare(
                f"{label}, hc_post and the next hc_pre",
                {"ours": kernel("hc_post_pre"), "two ops": Side(two, True)},
                inputs,
                moved=T * d * 2 * 10,
            )


def with_grad(function):
    def call():
        with torch.enable_grad():
            return function()

    return call


def fp64_pre(x, weights, constants):
    """hc_pre in fp64 throughout, as its module's docstring says."""

    def call():
        (fn, *rest), v = double(weights), x.flatten(2)
        return pre_of(F.linear(v, fn), v.square().mean(-1, keepdim=True), x, *rest, *constants)

    return call


@case("G1.3", "Sinkhorn", 6, 2, "sinkhorn")
def sinkhorn(b: Bench) -> None:
    eager = doubly_stochastic
    for label, T in (("4096", 4096), ("16384", 16384)):
        T = b.at(T, 40)
        inputs = b.sets(lambda: (b.normal(1, T, 4, 4, dtype=torch.float32, grad=True), EPS, 20))
        launches = lambda call: (b.profile(lambda: call(*inputs[0])) or {}).get("kernels")
        b.compare(
            f"{label}, forward",
            {"ours": ours("sinkhorn"), "eager": eager, "compiled": b.compiled(eager)},
            inputs,
            moved=2 * nbytes(inputs[0]),
            judge=against(lambda: eager(double(inputs[0][0]), EPS, 20)),
            launches={"ours": launches(ours("sinkhorn")), "eager": launches(eager)},
        )
        inputs = [(*args, b.normal(1, T, 4, 4, dtype=torch.float32)) for args in inputs]
        kernels = INTERPRETING or not b.toy  # in a model it is no op, but a part of hc_pre_backward
        mine = (
            LAUNCHERS["sinkhorn_backward"]
            if kernels
            else importlib.import_module("ops.sinkhorn").backward_reference
        )
        sides = {
            "ours": Side(lambda x, eps, iters, g: mine(g, x, eps, iters), True),
            "eager": backward_of(eager, (0,)),
            "compiled": backward_of(b.compiled(eager).call, (0,)),
        }
        exact = lambda x, g: both(lambda x: eager(x, EPS, 20), (0,))(x.requires_grad_(), g)
        b.compare(
            f"{label}, backward",
            sides,
            inputs,
            moved=3 * nbytes(inputs[0][0]),
            launches={"ours": launches(sides["ours"].call)},
            judge=against(lambda: exact(*double(inputs[0][::3]))),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Indexer


def native_topk(q, k, u, lo, hi, topk):
    """The published native form: one [1, S, T, heads] tensor of scores, fp32."""
    s = (torch.einsum("bthd,bed->bteh", q, k).float().relu() * u.float()[:, :, None]).sum(-1)
    e = torch.arange(k.shape[1], device=q.device)
    s = s.masked_fill((e < lo[..., None]) | (e >= hi[..., None]), float("-inf"))
    top = s.topk(min(topk, k.shape[1]), -1)
    return torch.where(top.values > float("-inf"), top.indices, -1)


def chunked_topk(q, k, u, lo, hi, topk, step=512):
    return torch.cat(
        [
            native_topk(
                q[:, c : c + step],
                k,
                u[:, c : c + step],
                lo[:, c : c + step],
                hi[:, c : c + step],
                topk,
            )
            for c in range(0, q.shape[1], step)
        ],
        1,
    )


@jit
def single_sort(
    q,
    k,
    u,
    lo,
    hi,
    scratch,
    idx,
    E,
    K,
    H: tl.constexpr,
    D: tl.constexpr,
    BC: tl.constexpr,
    EP: tl.constexpr,
):
    """The published Triton kernel's plan: a program scores all entries, padded, for one token, and sorts them at once."""
    t, h, d = tl.program_id(0).to(tl.int64), tl.arange(0, H), tl.arange(0, D)
    rows = tl.load(q + (t * H + h)[:, None] * D + d[None])
    weight = tl.load(u + t * H + h).to(tl.float32)
    first, last = tl.load(lo + t), tl.load(hi + t)
    for start in range(0, EP, BC):
        e = start + tl.arange(0, BC)
        keys = tl.load(k + e[None] * D + d[:, None], mask=(e < E)[None], other=0.0)
        s = tl.sum(tl.maximum(tl.dot(rows, keys), 0.0) * weight[:, None], 0)
        tl.store(scratch + t * EP + e, tl.where((e >= first) & (e < last), s, float("-inf")))
    tl.debug_barrier()
    e = tl.arange(0, EP)
    bits = tl.load(scratch + t * EP + e).to(tl.int32, bitcast=True)
    key = (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32) | (EP - 1 - e)
    best = tl.sort(key, descending=True)
    entry = tl.where(
        (best >> 32) > -2139095041, EP - 1 - (best & 0xFFFFFFFF), -1
    )  # the key of -inf
    tl.store(idx + t * K + e, entry, mask=e < K)


def sorted_topk(q, k, u, lo, hi, topk):
    if not (q.is_cuda or INTERPRETING):
        raise Skipped("a Triton kernel, and there is neither a GPU nor TRITON_INTERPRET=1")
    (_, T, H, D), E = q.shape, k.shape[1]
    EP, K = power_of_two(E, 16), min(topk, E)
    idx, scratch = lo.new_empty(1, T, K), torch.empty(T, EP, device=q.device)
    launch(
        single_sort,
        (T,),
        q,
        k,
        u,
        lo,
        hi,
        scratch,
        idx,
        E,
        K,
        H=H,
        D=D,
        BC=min(64, EP),
        EP=EP,
        num_warps=8,
    )
    return idx


def deepgemm_topk(q, k, u, lo, hi, topk):
    import deep_gemm

    keys = k[0].to(torch.float8_e4m3fn), torch.ones(k.shape[1], device=k.device)
    s = deep_gemm.fp8_mqa_logits(
        q[0].to(torch.float8_e4m3fn), keys, u[0].float(), lo[0].int(), hi[0].int()
    )
    return s[:, : k.shape[1]].topk(min(topk, k.shape[1]), -1).indices[None]


def recall(q, k, u, lo, hi, topk):
    """Judge: the share of the chosen that may be chosen, on some tokens; ties within fp32 rounding may fall either way."""
    at = torch.linspace(0, q.shape[1] - 1, min(q.shape[1], SLICE), device=q.device).long()
    q, u, lo, hi = (t[:, at] for t in (q, u, lo, hi))

    def judge(idx):
        s = torch.einsum(
            "bthe,bth->bte",
            torch.einsum("bthd,bed->bthe", q.double(), k.double()).relu(),
            u.double(),
        )
        e = torch.arange(k.shape[1], device=q.device)
        s = s.masked_fill((e < lo[..., None]) | (e >= hi[..., None]), float("-inf"))
        K = min(topk, k.shape[1])
        least = s.topk(K, -1).values
        want = (least > float("-inf")).sum(-1, keepdim=True).clamp(min=1)
        least = least.gather(-1, want - 1) - 1e-5 * least[..., :1].abs()
        mine = idx[:, at]
        good = (
            torch.zeros_like(s).scatter_reduce_(-1, mine.clamp(min=0), (mine >= 0).double(), "amax")
            * (s >= least)
            * (s > float("-inf"))
        )
        wanted = (hi - lo).clamp(0, K).sum()
        return {
            "error": float(1 - good.sum() / wanted.clamp(min=1)),
            "recall": float(good.sum() / wanted.clamp(min=1)),
        }

    return judge


def packed(b: Bench, T: int, documents: int, ratio: int = 4):
    """The plan of a row of equal documents."""
    length, args = -(-T // documents), ModelArgs.flash()
    ids = (torch.arange(T, device=b.device) // length)[None]
    freqs = layer_frequencies(args).to(b.device)
    return make_plan(args, freqs, ids, {ratio}, T, None, None, ids)


@case("G1.4", "indexer top-k", 40, 40, "indexer_topk")
def indexer(b: Bench) -> None:
    H, D = b.at(64, 16), b.at(128, 16)
    for label, T, documents, K in (
        ("8192, one sample", 8192, 1, 512),
        ("8192, 32 samples", 8192, 32, 512),
        ("16384, one sample", 16384, 1, 1024),
        ("16384, 64 samples", 16384, 64, 1024),
    )[: b.at(4, 2)]:
        T, documents, K = b.at(T, 64), b.at(documents, min(documents, 4)), b.at(K, 8)
        win = packed(b, T, documents).windows[4]
        make = lambda: (
            b.normal(1, T, H, D),
            b.normal(1, T // 4, D),
            b.normal(1, T, H),
            win.lo,
            win.hi,
            K,
        )
        inputs = b.sets(make)
        sides = {
            "ours": ours("indexer_topk"),
            "eager": native_topk,
            "compiled": b.compiled(native_topk),
            "chunked": chunked_topk,
            "single sort": Side(sorted_topk, True),
            "deep_gemm and topk": deepgemm_topk,
        }
        b.compare(
            label,
            sides,
            inputs,
            flops=2 * H * D * int((win.hi - win.lo).clamp(min=0).sum()),
            moved=nbytes(inputs[0]) + 8 * T * K,
            judge=recall(*inputs[0]),
        )
    for batch, context in ((1, 65536), (8, 65536), (1, 1 << 20), (8, 1 << 20))[: b.at(4, 1)]:
        E, K = b.at(context // 4, 96), b.at(512, 8)
        lo = torch.zeros(batch, 1, dtype=torch.int64, device=b.device)
        inputs = b.sets(
            lambda: (
                b.normal(batch, 1, H, D),
                b.normal(batch, E, D),
                b.normal(batch, 1, H),
                lo,
                lo + E,
                K,
            )
        )
        b.compare(
            f"decode B={batch}, context {context >> 10}k",
            {
                "ours": ours("indexer_topk"),
                "eager": native_topk,
                "compiled": b.compiled(native_topk),
            },
            inputs,
            flops=2 * H * D * batch * E,
            moved=nbytes(inputs[0]),
            judge=recall(*inputs[0]),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Sparse attention


def normed(q, eps):
    v = wide(q)
    return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)).to(q.dtype)


def gathered(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps, where):
    """The published native form: every token's keys gathered into [S, K, D], two einsums, one softmax with the sink."""
    q = turned(normed(q, eps), cos, sin, False)
    keys = (kv if entries is None else torch.cat((kv, entries), 1))[0][where.clamp(min=0)]
    s = wide(torch.einsum("thd,tkd->thk", q[0], keys)) * q.shape[-1] ** -0.5
    s = s.masked_fill((where < 0)[:, None], float("-inf"))
    s = torch.cat((s, wide(sink)[None, :, None].expand(*s.shape[:2], 1)), -1)
    o = torch.einsum("thk,tkd->thd", s.softmax(-1)[..., :-1].to(q.dtype), keys)
    return turned(o[None], cos, sin, True)


def fp64_gathered(n, q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps, where):
    """The same for the last n tokens in fp64; rotations in fp64 too."""

    def turn(x, sign):
        r = 2 * cos.shape[-1]
        a, c = x[..., -r:].unflatten(-1, (-1, 2)).unbind(-1)
        co, si = cos[:, -n:, None].double(), sign * sin[:, -n:, None].double()
        return torch.cat(
            (x[..., :-r], torch.stack((a * co - c * si, a * si + c * co), -1).flatten(-2)), -1
        )

    keys = (kv if entries is None else torch.cat((kv, entries), 1))[0][where[-n:].clamp(min=0)]
    s = torch.einsum("thd,tkd->thk", turn(normed(q[:, -n:], eps), 1)[0], keys) * q.shape[-1] ** -0.5
    s = torch.cat(
        (
            s.masked_fill((where[-n:] < 0)[:, None], float("-inf")),
            sink[None, :, None].expand(n, -1, 1),
        ),
        -1,
    )
    return turn(torch.einsum("thk,tkd->thd", s.softmax(-1)[..., :-1], keys)[None], -1)


def attention_inputs(
    b: Bench, kind: str, T: int, H: int, K: int, D: int, W: int, entries: int | None = None
) -> tuple[tuple, int]:
    """Arguments of sparse_attn, then each token's keys as places in [kv, entries]; and how many (token, key) pairs there are.

    entries: so many, none of them hidden, random ones of which are chosen, beside a token's own key.
    """
    at = torch.arange(T, device=b.device)
    seen = ((at + 1).clamp(max=W) if entries is None else torch.ones_like(at))[None]
    j = torch.arange(W, device=b.device)
    where = torch.where(j >= W - seen[0][:, None], at[:, None] + j, -1)
    q, kv, sink = (
        b.normal(1, T, H, D, grad=True),
        b.normal(1, W - 1 + T, D, grad=True),
        b.normal(H, dtype=torch.float32, grad=True),
    )
    entry = lo = hi = idx = None
    if kind != "SWA":
        ratio = {"CSA": 4, "HCA": b.at(128, 16)}[kind]
        E = entries or T // ratio
        entry, lo = b.normal(1, E, D, grad=True), torch.zeros_like(at)[None]
        hi = (torch.full_like(at, E) if entries else (at + 1) // ratio)[None]
        if kind == "HCA":
            e = torch.arange(E, device=b.device)
            chosen = torch.where(e < hi[0][:, None], e, -1)
        elif entries:
            chosen = b.integers(E, T, K)
        else:
            chosen = torch.cat([random_chosen(b, part, E, K) for part in hi[0].split(1024)])
        where = torch.cat((where, torch.where(chosen >= 0, chosen + kv.shape[1], -1)), 1)
        idx = chosen[None] if kind == "CSA" else None
    return (q, kv, sink, seen, *angles(b, T, b.at(64, 8)), entry, lo, hi, idx, EPS, where), int(
        (where >= 0).sum()
    )


def random_chosen(b: Bench, hi, E: int, K: int):
    """K of each token's visible entries at random, -1 where there are fewer."""
    score = torch.rand(len(hi), E, generator=b.random, device=b.device).masked_fill(
        torch.arange(E, device=b.device) >= hi[:, None], -1.0
    )
    top = score.topk(min(K, E), -1)
    return torch.where(top.values >= 0, top.indices, -1)


def dense_hf(W: int):
    """Transformers' eager attention: keys repeated to all heads, a dense mask made beforehand."""
    masks = {}

    def call(q, kv, sink, seen, cos, sin, entries, lo, hi, idx, eps, where):
        keys = (kv if entries is None else torch.cat((kv, entries), 1))[:, None]
        if not masks:
            mask = torch.full(
                (q.shape[1], keys.shape[2] + 1), float("-inf"), dtype=q.dtype, device=q.device
            )
            masks[0] = mask.scatter_(1, where % mask.shape[1], 0.0)[
                None, None, :, :-1
            ]  # -1 falls on the last column
        module = SimpleNamespace(
            num_key_value_groups=q.shape[2], sinks=sink.to(q.dtype), training=False
        )
        q = turned(normed(q, eps), cos, sin, False).transpose(1, 2)
        return turned(
            hf("eager_attention_forward")(module, q, keys, keys, masks[0], q.shape[-1] ** -0.5)[0],
            cos,
            sin,
            True,
        )

    return call


def flex(b: Bench, T: int, W: int, E: int, hi):
    """flex_attention over window and entries in order; the sink enters through the log-sum-exp."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    limit = torch.zeros(T, dtype=torch.int64, device=b.device) if hi is None else hi[0]

    def seen(batch, head, t, j):
        return ((j < T) & (j <= t) & (t - j < W)) | ((j >= T) & (j - T < limit[t]))

    attend, blocks = b.compiled(flex_attention, whole=False).call, []

    def call(q, kv, sink, seen_, cos, sin, entries, lo, hi, idx, eps, where):
        if not blocks:
            blocks.append(create_block_mask(seen, None, None, T, T + E, device=str(b.device)))
        keys = (kv[:, W - 1 :] if entries is None else torch.cat((kv[:, W - 1 :], entries), 1))[
            :, None
        ]
        q = turned(normed(q, eps), cos, sin, False).transpose(1, 2)
        o, lse = attend(q, keys, keys, block_mask=blocks[0], enable_gqa=True, return_lse=True)
        o = o * torch.sigmoid(lse - sink[:, None])[..., None].to(o.dtype)
        return turned(o.transpose(1, 2), cos, sin, True)

    return call


ATTENTION = (
    ("4096, 64 heads", 4096, 64, 512),
    ("8192, 64 heads", 8192, 64, 512),
    ("8192, 128 heads", 8192, 128, 1024),
)


def attention_cases(b: Bench):
    for label, T, H, K in ATTENTION[: b.at(3, 1)]:
        T, H, K, D, W = b.at(T, 48), b.at(H, 16), b.at(K, 4), b.at(512, 32), b.at(128, 8)
        for kind in ("CSA", "HCA", "SWA"):
            args, pairs = attention_inputs(b, kind, T, H, K, D, W)
            sides = {"eager": gathered, "compiled": b.compiled(gathered).call}
            if "4096" in label:
                sides["transformers"] = dense_hf(W)
            if kind != "CSA":
                sides["flex_attention"] = flex(
                    b, T, W, 0 if kind == "SWA" else args[6].shape[1], args[8]
                )
            yield f"{kind} {label}", args, pairs, sides


@case("G1.5", "sparse attention, forward", 50, 40, "sparse_attn")
def attention_forward(b: Bench) -> None:
    mine = lambda *args: ours("sparse_attn")(*args[:-1])
    for row, args, pairs, sides in attention_cases(b):
        H, D = args[0].shape[2:]
        sides = {
            "ours": mine,
            **{
                name: Side(side, name not in ("eager", "transformers"), name != "flex_attention")
                for name, side in sides.items()
            },
        }
        b.compare(
            row,
            sides,
            [args],
            flops=4 * H * D * pairs,
            moved=2 * nbytes(args[0]) + nbytes(args[1:-1]),
            pairs=pairs,
            judge=against(lambda: fp64_gathered(SLICE, *double(args)), tail(SLICE)),
        )
    for context in (8192, 32768, 65536)[
        : b.at(3, 1)
    ]:  # FlashMLA's shapes for this model: 4096 queries over entries of any context
        T, H, D, K = b.at(4096, 40), b.at(64, 16), b.at(512, 32), b.at(512, 8)
        args, pairs = attention_inputs(b, "CSA", T, H, K, D, b.at(128, 8), b.at(context, 64))
        b.compare(
            f"4096 queries, {context >> 10}k entries, 512 chosen",
            {"ours": mine},
            [args],
            flops=4 * H * D * pairs,
            pairs=pairs,
            moved=2 * nbytes(args[0]) + nbytes(args[1:-1]),
            judge=against(lambda: fp64_gathered(SLICE, *double(args)), tail(SLICE)),
        )


@case("G1.6", "sparse attention, backward", 60, 60, "sparse_attn_backward")
def attention_backward(b: Bench) -> None:
    size = b.at(8192, 16)
    m = b.normal(size, size, scale=size**-0.5)

    def products(ms):
        for _ in range(math.ceil(ms / 1.4)):  # what one takes, or more
            m @ m

    for row, args, pairs, sides in attention_cases(b):
        (T, H, D), has = args[0].shape[1:], args[6] is not None
        wrt = (0, 1, 2, 6) if has else (0, 1, 2)
        with torch.no_grad():
            lse = (
                kernel("sparse_attn")(*args[:-1])[1]
                if not b.prepare
                else args[0].new_zeros(1, T, H, dtype=torch.float32)
            )
        g = b.normal(1, T, H, D)
        mine = lambda *args: kernel("sparse_attn_backward")(args[-1], lse, *args[:-2])

        def exact_gradient():
            exact = tuple(t.requires_grad_() if i in wrt else t for i, t in enumerate(double(args)))
            with torch.enable_grad():
                return torch.autograd.grad(
                    fp64_gathered(SLICE, *exact), exact[0], double(g[:, -SLICE:])
                )[0][:, -SLICE:]

        pick = lambda out: out[0][
            :, -SLICE:
        ]  # a token's own gradient; those of keys collect from all tokens
        made = {
            "ours": Side(mine, True, False),
            **{
                name: backward_of(side, wrt)._replace(made=name not in ("eager", "transformers"))
                for name, side in sides.items()
            },
        }
        found = b.compare(
            row,
            made,
            [(*args, g)],
            flops=10 * H * D * pairs,
            moved=3 * nbytes(args[0]) + 2 * nbytes(args[1:-1]),
            pairs=pairs,
            judge=against(exact_gradient, pick),
        )
        if "ms" in found and "8192" not in row:
            found["ms_beside_matrix_products"] = b.beside(lambda: mine(*args, g), products)
        del made, sides, found


# ---------------------------------------------------------------------------------------------------------------------
# RoPE, compression


@case("G1.7", "RoPE", 8, 20, "rope", "rope_")
def rope(b: Bench) -> None:
    eager = turned
    for label, T, H in (
        ("4096 x 64 x 512", 4096, 64),
        ("8192 x 64 x 512", 8192, 64),
        ("8192 x 128 x 512", 8192, 128),
    )[: b.at(3, 1)]:
        T, H, D, r = b.at(T, 24), b.at(H, 4), b.at(512, 32), b.at(64, 8)
        for inverse in (False, True):
            inputs = b.sets(lambda: (b.normal(1, T, H, D), *angles(b, T, r), inverse))
            exact = lambda: fp64_rope(*[t[:, -SLICE:] for t in inputs[0][:3]], inverse)
            sides = {"ours": ours("rope"), "eager": eager, "compiled": b.compiled(eager)}
            b.compare(
                f"{label}{', inverse' if inverse else ''}",
                sides,
                inputs,
                moved=2 * nbytes(inputs[0][0]),
                judge=against(exact, tail(SLICE)),
            )
        if "rope_" in LAUNCHERS:
            inputs = b.sets(lambda: (b.normal(1, T, H, D), *angles(b, T, r), True))
            b.compare(
                f"{label}, inverse, in place",
                {"ours": kernel("rope_"), "eager": eager, "compiled": b.compiled(eager)},
                inputs,
                moved=2 * T * H * r * 2,
            )
        inputs = b.sets(lambda: (b.normal(1, T, H, D), *angles(b, T, r)))
        whole = lambda q, cos, sin: eager(normed(q, EPS), cos, sin, False)
        b.compare(
            f"{label}, with the queries' norm",
            {
                "ours": b.compiled(
                    lambda q, cos, sin: ours("rope")(normed(q, EPS), cos, sin, False)
                ),
                "eager": whole,
                "compiled": b.compiled(whole),
            },
            inputs,
            moved=2 * nbytes(inputs[0][0]),
        )


def fp64_rope(x, cos, sin, inverse):
    x, cos, sin = double((x, cos[:, :, None], sin[:, :, None]))
    r, sin = 2 * cos.shape[-1], -sin if inverse else sin
    a, c = x[..., -r:].unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat(
        (x[..., :-r], torch.stack((a * cos - c * sin, a * sin + c * cos), -1).flatten(-2)), -1
    )


def pooled_hf(rows, end, index, weight, cos, sin, ratio, eps, dtype):
    """Transformers' pooling of one document (bf16), from projections on."""
    lanes, D = (2 if ratio == 4 else 1), weight.shape[0]
    kv, gate = (
        t.unflatten(1, (-1, ratio)).to(dtype) for t in rows[:, lanes * ratio - 1 :].chunk(2, -1)
    )
    if lanes == 2:
        past = lambda t, value: F.pad(t[:, :-1, :, :D], (0, 0, 0, 0, 1, 0), value=value)
        kv, gate = (
            torch.cat((past(kv, 0.0), kv[..., D:]), 2),
            torch.cat((past(gate, float("-inf")), gate[..., D:]), 2),
        )
    e = (kv * gate.softmax(2, dtype=torch.float32).to(dtype)).sum(2)
    v = e.float()
    e = (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps) * weight.float()).to(dtype)
    return turned(e, cos, sin, False)


def gradient64(rows, end, index, weight, cos, sin, ratio, eps, dtype, g):
    """The gradient of the rows, from rows, weights and results in fp64."""
    rows, weight, g = double((rows, weight, g))
    pooled = lambda rows: reference("compress")(
        rows, end, index, weight, cos, sin, ratio, eps, torch.float64
    )
    return both(pooled, (0,))(rows.requires_grad_(), g)


@case("G1.8", "compressor", 12, 20, "compress", "compress_backward")
def compressor(b: Bench) -> None:
    eager, dtype = reference("compress"), torch.bfloat16
    for kind, ratio in (("CSA", 4), ("HCA", 128)):
        lanes, D, r = (2 if ratio == 4 else 1), b.at(512, 16), b.at(64, 8)
        weight = (1 + b.normal(D, dtype=torch.float32, scale=0.1)).requires_grad_()
        for documents in b.at((1, 32), (1, 4)):
            T = b.at(8192, 256)
            win, back = packed(b, T, documents, ratio).windows[ratio], lanes * ratio - 1
            make = lambda: (
                F.pad(
                    b.normal(1, T, 2 * lanes * D, dtype=torch.float32), (0, 0, back, 0)
                ).requires_grad_(),
                win.end + back,
                win.index,
                weight,
                win.cos[..., : r // 2],
                win.sin[..., : r // 2],
                ratio,
                EPS,
                dtype,
            )
            inputs = b.sets(make)
            sides = {"ours": ours("compress"), "eager": eager, "compiled": b.compiled(eager)} | (
                {"transformers": pooled_hf} if documents == 1 else {}
            )
            n = min(SLICE, b.at(8192, 256) // documents // ratio) or 1
            few = lambda: eager(
                *double((inputs[0][0], inputs[0][1][:, -n:], inputs[0][2][:, -n:], weight)),
                *(t[:, -n:] for t in inputs[0][4:6]),
                ratio,
                EPS,
                torch.float64,
            )
            held = bool((win.end[:, -n:] < T).all())
            b.compare(
                f"{kind}, {documents} samples",
                sides,
                inputs,
                moved=nbytes(inputs[0][0]) + T // ratio * D * 2,
                judge=against(few, tail(n)) if held else None,
            )
            g = b.normal(1, *win.end.shape[1:], D)
            seen = (win.end < T)[..., None]
            b.compare(
                f"{kind}, {documents} samples, forward and backward",
                {
                    name: Side(both(getattr(side, "call", side), (0, 3)), True)
                    for name, side in sides.items()
                },
                [(*args, g * seen) for args in inputs],
                moved=3 * nbytes(inputs[0][0]),
                judge=against(lambda: gradient64(*inputs[0], g * seen), lambda out: out[0]),
            )
        zero = torch.zeros(1, 1, dtype=torch.int64, device=b.device)
        cos, sin = angles(b, 1, r)
        inputs = b.sets(
            lambda: (
                b.normal(1, lanes * ratio, 2 * lanes * D, dtype=torch.float32),
                zero + lanes * ratio - 1,
                zero + 5,
                weight,
                cos,
                sin,
                ratio,
                EPS,
                dtype,
            )
        )
        b.compare(
            f"{kind}, decoded token",
            {"ours": ours("compress"), "eager": eager, "compiled": b.compiled(eager)},
            inputs,
            moved=nbytes(inputs[0][0]),
            judge=against(lambda: eager(*double(inputs[0][:4]), *inputs[0][4:8], torch.float64)),
        )


# ---------------------------------------------------------------------------------------------------------------------
# Experts


def grouped_mm(
    x,
    w13,
    w2,
    idx,
    weight,
    limit,
    product=lambda rows, ends, w: torch._grouped_mm(rows, w.transpose(1, 2), offs=ends),
):
    """The torch._grouped_mm form: rows sorted by expert, two grouped products; w13 and w2 as `product` wants them."""
    w13, w2 = ((w,) if isinstance(w, torch.Tensor) else w for w in (w13, w2))
    K = idx.shape[1]
    experts, order = idx.flatten().sort(stable=True)
    ends = torch.searchsorted(
        experts, torch.arange(len(w13[0]), device=x.device), right=True, out_int32=True
    )
    h = activate(product(x[order // K], ends, *w13), weight.flatten()[order, None], limit).to(x.dtype)
    y = product(h, ends, *w2)
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(
        0, order // K, y.float()
    )


def scaled_grouped_mm(w13, s13, w2, s2, limit):
    """torch._scaled_grouped_mm: FP8 by FP8 with a scale per row, which the weights are rounded to anew."""

    def by_row(t):
        scale = t.float().abs().amax(-1).clamp(min=1e-12) / 448
        return (t / scale[..., None]).to(torch.float8_e4m3fn), scale

    kept = []

    def call(x, idx, weight):
        if not kept:
            for w, s in ((w13, s13), (w2, s2)):
                parts = [by_row(dequantize_fp8(*one, torch.float32)) for one in zip(w, s)]
                kept.append([torch.stack(t) for t in zip(*parts)])

        def product(rows, ends, weights, scales):
            rows, scale = by_row(rows)
            return torch._scaled_grouped_mm(
                rows, weights.transpose(1, 2), scale, scales, offs=ends, out_dtype=x.dtype
            )

        return grouped_mm(x, kept[0], kept[1], idx, weight, limit, product)

    return call


def deepgemm_experts(w13, s13, w2, s2, limit):
    """DeepGEMM's grouped product of FP8, experts padded to the rows that it wants."""

    def product(rows, ends, weights, scales):
        import deep_gemm

        begins, E = torch.cat((ends.new_zeros(1), ends[:-1])), len(weights)
        counts = (ends - begins + 127) // 128 * 128
        first, at = counts.cumsum(0) - counts, torch.arange(len(rows), device=rows.device)
        expert = torch.searchsorted(ends, at, right=True)
        to = first[expert] + at - begins[expert]
        size = len(rows) + 127 * min(E, len(rows)) + 127 & -128
        owner = torch.full((size,), -1, dtype=torch.int32, device=rows.device).index_copy_(
            0, to, expert.int()
        )
        v = rows.float().unflatten(1, (-1, 128))
        scale = v.abs().amax(-1).clamp(min=1e-12) / 448
        padded = torch.zeros(size, rows.shape[1], dtype=torch.float8_e4m3fn, device=rows.device)
        padded[to] = (v / scale[..., None]).flatten(1).to(padded.dtype)
        padded_scale = scale.new_zeros(size, scale.shape[1]).index_copy_(0, to, scale)
        out = rows.new_empty(size, weights.shape[1])
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (padded, padded_scale), (weights, scale_to_float(scales)), out, owner
        )
        return out[to]

    return lambda x, idx, weight: grouped_mm(x, (w13, s13), (w2, s2), idx, weight, limit, product)


def experts_hf(implementation: str, w13, w2, limit: float):
    """Transformers' experts, in one of its implementations."""
    kept = []

    def call(x, idx, weight):
        if not kept:
            from transformers import DeepseekV4Config

            config = DeepseekV4Config(
                hidden_size=x.shape[1],
                moe_intermediate_size=w2.shape[2],
                n_routed_experts=len(w13),
                swiglu_limit=limit,
            )
            config._experts_implementation = implementation
            with torch.device("meta"):
                module = hf("DeepseekV4Experts")(config)
            kept.append(with_weights(module, gate_up_proj=w13, down_proj=w2))
        return kept[0](x, idx, weight.to(x.dtype))

    return call


def experts_fp64(x, w13, w2, idx, weight, limit):
    """Some tokens in fp64; w13 and w2 are functions of an expert's number."""
    rows = []
    for t in range(len(x)):
        rows.append(
            sum(
                swiglu64(w13(int(e)) @ x[t].double(), float(c), limit) @ w2(int(e)).T
                for e, c in zip(idx[t], weight[t])
            )
        )
    return torch.stack(rows)


def swiglu64(h, weight, limit):
    gate, up = h.chunk(2)
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit) * weight


def experts_of(b: Bench, form: str, E: int, I: int, d: int):
    """w13, w2 and their scales; packed ones expert by expert, from random values."""
    if form == "bf16":
        return b.normal(E, 2 * I, d, scale=d**-0.5), b.normal(E, d, I, scale=I**-0.5), None, None
    quantize = quantize_fp4 if form == "fp4" else quantize_fp8
    made = []
    for o, i in ((2 * I, d), (d, I)):
        parts = [
            quantize(b.normal(o, i, scale=i**-0.5)) for _ in range(min(E, 8))
        ]  # eight different ones, repeated
        made.append(
            [
                torch.stack([part[k].view(torch.uint8) for part in parts])
                .repeat(-(-E // len(parts)), 1, 1)[:E]
                .view(parts[0][k].dtype)
                for k in (0, 1)
            ]
        )
    (w13, s13), (w2, s2) = made
    return w13, w2, s13, s2


@case("G1.9", "experts", 60, 60, "moe", "moe_backward")
def experts(b: Bench) -> None:
    limit, d, I, K = 10.0, b.at(4096, 64), b.at(2048, 128), b.at(6, 2)
    for form in ("bf16", "fp8", "fp4"):
        E = b.at(256, 8)
        w13, w2, s13, s2 = experts_of(b, form, E, I, d)
        plain = {
            "bf16": lambda w, s, e: w[e].double(),
            "fp8": lambda w, s, e: dequantize_fp8(w[e], s[e], torch.float64),
            "fp4": lambda w, s, e: dequantize_fp4(w[e], s[e], torch.float64),
        }[form]
        if form != "bf16":  # what baselines without such weights are given
            unpacked = [
                torch.stack(
                    [
                        (dequantize_fp8 if form == "fp8" else dequantize_fp4)(*one, torch.bfloat16)
                        for one in zip(w, s)
                    ]
                )
                for w, s in ((w13, s13), (w2, s2))
            ]
            scaled = scaled_grouped_mm(w13, s13, w2, s2, limit) if form == "fp8" else None
        for N in b.at((1, 8, 64, 4096, 8192), (1, 8192)):
            tokens = b.at(N, min(N, 12))
            make = lambda: (
                b.normal(tokens, d),
                torch.rand(tokens, E, generator=b.random, device=b.device).topk(K).indices,
                b.normal(tokens, K, dtype=torch.float32).softmax(-1) * 1.5,
            )
            inputs = [make() for _ in range(1 if b.prepare or N > 64 else 4 if b.toy else 16)]
            sides = {
                "ours": lambda x, idx, weight: ours("moe")(
                    x, w13, w2, idx, weight, s13, s2, limit, False
                )
            }
            if form == "bf16":
                sides["grouped_mm"] = lambda x, idx, weight: grouped_mm(
                    x, w13, w2, idx, weight, limit
                )
                for name in ("eager", "grouped_mm", *(("batched_mm",) if N < 64 else ())):
                    sides[f"transformers {name}"] = Side(
                        experts_hf(name, w13, w2, limit), graph=name != "eager"
                    )
            else:
                sides["grouped_mm of bf16"] = lambda x, idx, weight: grouped_mm(
                    x, *unpacked, idx, weight, limit
                )
            if form == "fp8":
                sides |= {
                    "scaled_grouped_mm": scaled,
                    "deep_gemm": deepgemm_experts(w13, s13, w2, s2, limit),
                }
            touched = sum(len(idx.unique()) for _, idx, _ in inputs) / len(inputs)
            few = lambda: experts_fp64(
                *[t[:4] for t in inputs[0][:1]],
                lambda e: plain(w13, s13, e),
                lambda e: plain(w2, s2, e),
                *[t[:4] for t in inputs[0][1:]],
                limit,
            )
            b.compare(
                f"{form}, {N} tokens",
                sides,
                inputs,
                flops=6 * tokens * K * d * I,
                experts_touched=touched,
                moved=touched / E * nbytes(w13, w2, s13, s2) + tokens * d * 6,
                judge=against(few, lambda out: out[:4]),
            )
        w13 = w2 = s13 = s2 = None
        unpacked = scaled = None
    E, tokens = b.at(32, 4), b.at(8192, 12)
    w13, w2 = (w.requires_grad_() for w in experts_of(b, "bf16", E, I, d)[:2])
    inputs = [
        (
            b.normal(tokens, d, grad=True),
            w13,
            w2,
            torch.rand(tokens, E, generator=b.random, device=b.device).topk(K).indices,
            (b.normal(tokens, K, dtype=torch.float32).softmax(-1) * 1.5).requires_grad_(),
            b.normal(tokens, d, dtype=torch.float32),
        )
    ]
    mine = lambda x, w13, w2, idx, weight: ours("moe")(
        x, w13, w2, idx, weight, None, None, limit, False
    )
    theirs = lambda *args: grouped_mm(*args, limit)
    few = lambda x, idx, weight: experts_fp64(
        x, lambda e: double(w13[e]), lambda e: double(w2[e]), idx, weight, limit
    )
    b.compare(
        "bf16, 8192 tokens, 32 experts, forward and backward",
        {
            "ours": Side(both(mine, (0, 1, 2, 4)), True, False),
            "grouped_mm": Side(both(theirs, (0, 1, 2, 4)), False, False),
        },
        inputs,
        flops=18 * tokens * K * d * I,
        moved=3 * nbytes(w13, w2),
        judge=against(
            lambda: both(few, (0,))(
                double(inputs[0][0][:4]).requires_grad_(),
                *(double(t[:4]) for t in inputs[0][3:5]),
                double(inputs[0][5][:4]),
            ),
            lambda out: out[0][:4],
        ),
    )


@case(
    "G1.12",
    "FP8 linear, activation rounding",
    10,
    10,
    "quant_linear",
    "quant_linear_backward",
    "act_quant",
)
def linears(b: Bench) -> None:
    for name, o, i, groups in (
        ("wq_b", 32768, 1024, 1),
        ("wo_b", 4096, 8192, 1),
        ("wo_a", 8192, 4096, 8),
    ):
        o, i, groups = b.at(o, 256), b.at(i, 128), b.at(groups, min(groups, 2))
        weight, scale = quantize_fp8(b.normal(o, i, scale=i**-0.5))
        plain = dequantize_fp8(weight, scale, torch.bfloat16)
        for label in b.at((1, 8, 8192), (1, 8192)):
            N, act = b.at(label, min(label, 20)), groups == 1
            inputs = [
                (b.normal(1, N, groups, i) if groups > 1 else b.normal(1, N, i),)
                for _ in range(b.at(8, 2))
            ]
            call = lambda x, plainly=reference("quant_linear"): plainly(
                x, weight, scale, groups, act
            )
            sides = {
                "ours": lambda x: ours("quant_linear")(x, weight, scale, groups, act),
                "eager": call,
                "compiled": b.compiled(call),
            }
            if groups == 1:
                sides["bf16 weights, unrounded"] = lambda x: F.linear(x, plain)
            fp64 = lambda: torch.einsum(
                "...gi,goi->...go" if groups > 1 else "...i,oi->...o",
                rounded(inputs[0][0][:, -SLICE:]) if act else inputs[0][0][:, -SLICE:].double(),
                (lambda w: w.unflatten(0, (groups, -1)) if groups > 1 else w)(
                    dequantize_fp8(weight, scale, torch.float64)
                ),
            )
            b.compare(
                f"{name}, {label} rows",
                sides,
                inputs,
                flops=2 * N * groups * i * o // groups,
                moved=nbytes(weight, scale, inputs[0]) + 2 * N * o,
                judge=against(fp64, tail(SLICE)),
            )
    for N, n, block, form in ((8192, 4096, 128, "fp8"), (8192, 8192, 32, "fp4")):
        inputs = b.sets(lambda: (b.normal(1, b.at(N, 16), b.at(n, 256)), block, form))
        eager = reference("act_quant")
        b.compare(
            f"act_quant {form}, 8192 x {n}",
            {"ours": ours("act_quant"), "eager": eager, "compiled": b.compiled(eager)},
            inputs,
            moved=2 * nbytes(inputs[0]),
            judge=against(lambda: reference("act_quant")(*inputs[0])),
        )


def rounded(x):
    return reference("act_quant")(x, 128, "fp8").double()


# ---------------------------------------------------------------------------------------------------------------------
# Elementwise, loss


def liger(module: str, name: str):
    return getattr(importlib.import_module(f"liger_kernel.{module}"), name)


@case("G1.10", "clamped SwiGLU and RMSNorm, which Inductor makes", 6, 20)
def elementwise(b: Bench) -> None:
    N, n, w = (
        b.at(49152, 40),
        b.at(4096, 64),
        (1 + b.normal(b.at(4096, 64), dtype=torch.float32, scale=0.1)),
    )
    gate = lambda h, weight: activate(h, weight, 10.0).to(h.dtype)
    norm = lambda x: (
        x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS) * w
    ).to(x.dtype)
    inputs = b.sets(
        lambda: (
            b.normal(N, n, grad=True),
            (b.normal(N, 1, dtype=torch.float32).sigmoid()).requires_grad_(),
            b.normal(N, n // 2),
        )
    )
    b.compare(
        "swiglu, forward",
        {"ours": b.compiled(gate), "eager": gate},
        [args[:2] for args in inputs],
        moved=3 * N * n,
        judge=against(
            lambda: swiglu64_rows(*double([t[-SLICE:] for t in inputs[0][:2]])),
            lambda out: out[-SLICE:],
        ),
    )
    b.compare(
        "swiglu, forward and backward",
        {"ours": Side(both(b.compiled(gate).call, (0, 1)), True), "eager": both(gate, (0, 1))},
        inputs,
        moved=8 * N * n,
    )
    b.compare(
        "rmsnorm",
        {
            "ours": b.compiled(norm),
            "eager": norm,
            "liger": lambda x: liger("ops.rms_norm", "LigerRMSNormFunction").apply(
                x, w, EPS, 0.0, "gemma", False
            ),
        },
        [args[:1] for args in inputs],
        moved=4 * N * n,
        judge=against(lambda: norm64(inputs[0][0][-SLICE:].double(), w), lambda out: out[-SLICE:]),
    )


def swiglu64_rows(h, weight):
    gate, up = h.chunk(2, -1)
    return F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0) * weight


def norm64(x, w):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w.double()


@case(
    "G1.11", "linear cross-entropy", 15, 40, "linear_cross_entropy", "linear_cross_entropy_backward"
)
def loss(b: Bench) -> None:
    N, d, V = b.at(8192, 24), b.at(4096, 32), b.at(129280, 200)
    x, weight, target = (
        b.normal(N, d, grad=True),
        b.normal(V, d, scale=d**-0.5, grad=True),
        b.integers(V, N),
    )
    unfused = lambda x, weight, target: F.cross_entropy(
        F.linear(x, weight).float(), target, reduction="none"
    )
    fp64 = lambda: F.cross_entropy(
        double(x[-SLICE:]) @ double(weight).T, target[-SLICE:], reduction="none"
    )
    sides = {
        "ours": ours("linear_cross_entropy"),
        "eager": unfused,
        "compiled": b.compiled(unfused),
    }
    b.compare(
        "forward",
        sides,
        [(x, weight, target)],
        flops=2 * N * d * V,
        moved=nbytes(x, weight),
        judge=against(fp64, lambda out: out[-SLICE:]),
    )
    g = torch.full((N,), 1 / N, device=b.device)

    def exact():
        rows = double(x[-SLICE:]).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(
                F.cross_entropy(rows @ double(weight).T, target[-SLICE:], reduction="none"),
                rows,
                double(g[-SLICE:]),
            )

    def fused_liger(x, weight, target, g):
        with torch.enable_grad():
            total = liger(
                "transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss"
            )()(weight, x, target)
            return torch.autograd.grad(total, (x, weight))

    made = {
        name: Side(both(getattr(side, "call", side), (0, 1)), True, False)
        for name, side in sides.items()
    }
    b.compare(
        "forward and backward",
        made | {"liger": Side(fused_liger, graph=False)},
        [(x, weight, target, g)],
        flops=6 * N * d * V,
        moved=3 * nbytes(x, weight),
        judge=against(exact, lambda out: out[0][-SLICE:]),
    )
