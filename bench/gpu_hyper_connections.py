"""Hyper-connections in the GPU suite: hc_post, hc_pre with Sinkhorn, Sinkhorn by itself."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.gpu_measure import Bench, Side, against, backward_of, both, case, double, nbytes
from bench.gpu_ops import EPS, SLICE, call_of, hf, kernel, ours, reference, tail, wide, with_weights
from ops.launch import INTERPRETING
from ops.registry import LAUNCHERS

SHAPES = (  # label, tokens, model dim
    ("16384 x 4096", 16384, 4096),
    ("8192 x 4096", 8192, 4096),
    ("8192 x 7168", 8192, 7168),
)
doubly_stochastic = reference("sinkhorn")


# --------------------------------------------------------------------------------------------------
# hc_post


def post_published(y, x, post, comb):
    """Broadcast and sum in fp32."""
    old = (comb[..., None] * wide(x)[:, :, :, None]).sum(2)
    return (post[..., None] * wide(y)[:, :, None] + old).to(x.dtype)


def post_hf(y, x, post, comb):
    old = torch.matmul(comb.to(x.dtype).transpose(-1, -2), x)
    return post.to(x.dtype)[..., None] * y[:, :, None] + old


def streams(b: Bench, T: int, d: int, n: int = 4):
    """y [1, T, d], x [1, T, n, d], post [1, T, n], comb [1, T, n, n] as hc_post meets them."""
    y = b.normal(1, T, d, grad=True)
    x = b.normal(1, T, n, d, grad=True)
    post = 2 * b.normal(1, T, n, dtype=torch.float32).sigmoid()
    comb = b.normal(1, T, n, n, dtype=torch.float32).softmax(-1)
    return y, x, post.requires_grad_(), comb.requires_grad_()


@case("G1.1", "hc_post", 15, 20, "hc_post")
def hc_post(b: Bench) -> None:
    wrt = (0, 1, 2, 3)
    gradients = both(post_published, wrt)
    for label, T, d in SHAPES[: b.size(3, 1)]:
        T, d = b.size(T, 48), b.size(d, 32)
        inputs = b.sets(lambda T=T, d=d: (*streams(b, T, d), b.normal(1, T, 4, d)))
        sides = {
            "ours": ours("hc_post"),
            "eager": post_published,
            "compiled": b.compiled(post_published),
            "transformers": post_hf,
        }
        *exact, g = double([t[:, -SLICE:] for t in inputs[0]])

        def result(exact=exact):
            return post_published(*exact)

        def gradient(exact=exact, g=g):
            return gradients(*[t.requires_grad_() for t in exact], g)

        b.compare(
            f"{label}, forward",
            sides,
            [args[:4] for args in inputs],
            moved=T * d * 2 * 9,
            error_of=against(result, tail(SLICE)),
        )
        trained = {name: Side(both(call_of(side), wrt), True) for name, side in sides.items()}
        b.compare(
            f"{label}, forward and backward",
            trained,
            inputs,
            moved=T * d * 2 * (9 + 14),
            error_of=against(gradient, tail(SLICE)),
        )


# --------------------------------------------------------------------------------------------------
# hc_pre


def hyper_connection(b: Bench, d: int, n: int = 4):
    """fn [n (n + 2), n d], base [n (n + 2)], scale [3]."""
    rows = n * (n + 2)
    fn = b.normal(rows, n * d, dtype=torch.float32, scale=(n * d) ** -0.5, grad=True)
    base = b.normal(rows, dtype=torch.float32, scale=0.3, grad=True)
    scale = 1 + b.normal(3, dtype=torch.float32, scale=0.1)
    return fn, base, scale.requires_grad_()


def pre_hf():
    """Transformers' module, its results in our order."""
    modules = []

    def call(x, fn, base, scale, norm_eps, hc_eps, iters):
        if not modules:
            config = SimpleNamespace(
                hc_mult=x.shape[2],
                hc_sinkhorn_iters=iters,
                hc_eps=hc_eps,
                rms_norm_eps=norm_eps,
                hidden_size=1,
            )
            module = hf("DeepseekV4HyperConnection")(config)
            modules.append(with_weights(module, fn=fn, base=base, scale=scale))
        post, comb, y = modules[0](x)
        return y, post, comb

    return call


def pre_of(mix, square, x, base, scale, norm_eps, hc_eps, iters):
    """hc_pre from mix = x fn^T and the mean square of x, in their precision."""
    n = x.shape[2]
    sizes = (n, n, n * n)
    m = mix * torch.rsqrt(square + norm_eps)
    scales = torch.cat([s.expand(size) for s, size in zip(scale, sizes, strict=True)])
    pre, post, comb = (m * scales + base).split(sizes, -1)
    y = ((torch.sigmoid(pre) + hc_eps)[..., None] * wide(x)).sum(2).to(x.dtype)
    comb = doubly_stochastic(comb.unflatten(-1, (n, n)), hc_eps, iters)
    return y, 2 * torch.sigmoid(post), comb


def pre_bf16(x, fn, *rest):
    """The published faster form: the mix as a bf16 linear."""
    v = x.flatten(2)
    mix = F.linear(v, fn.to(x.dtype)).float()
    return pre_of(mix, v.float().square().mean(-1, keepdim=True), x, *rest)


def pre_deepgemm(x, fn, *rest):
    """The mix and the squares by SGLang's kernel, in TF32."""
    import deep_gemm  # may be absent

    v = x.flatten(2)[0]
    mix = torch.empty(len(v), len(fn), device=x.device)
    square = torch.empty(len(v), device=x.device)
    deep_gemm.tf32_hc_prenorm_gemm(v, fn, mix, square)
    return pre_of(mix[None], (square / v.shape[1])[None, :, None], x, *rest)


def pre_fp64(x, weights, constants):
    """hc_pre in fp64 throughout: its formula (ops/hc_pre.py)."""
    (fn, *rest), v = double(weights), x.flatten(2)
    return pre_of(F.linear(v, fn), v.square().mean(-1, keepdim=True), x, *rest, *constants)


def post_then_pre(y, x, post, comb, *rest):
    """hc_post_pre as two ops."""
    new = ours("hc_post")(y, x, post, comb)
    return new, *ours("hc_pre")(new, *rest)


@case("G1.2", "hc_pre with Sinkhorn", 25, 20, "hc_pre", "hc_post_pre")
def hc_pre(b: Bench) -> None:
    constants = (EPS, EPS, 20)
    for label, T, d in SHAPES[: b.size(3, 1)]:
        hc_pre_at(b, label, b.size(T, 48), b.size(d, 32), constants)


def hc_pre_at(b: Bench, label: str, T: int, d: int, constants: tuple) -> None:
    weights = hyper_connection(b, d)
    inputs = b.sets(lambda: (b.normal(1, T, 4, d, grad=True), *weights, *constants))
    g = (
        b.normal(1, T, d),
        b.normal(1, T, 4, dtype=torch.float32),
        b.normal(1, T, 4, 4, dtype=torch.float32),
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
        error_of=against(lambda: pre_fp64(x, weights, constants), tail(SLICE)),
    )

    def gradient():
        with torch.enable_grad():
            results = pre_fp64(x.requires_grad_(), weights, constants)
            return torch.autograd.grad(results, x, [double(t[:, -SLICE:]) for t in g])

    trained = {
        name: Side(both(call_of(side), (0, 1, 2, 3)), True)
        for name, side in sides.items()
        if name != "deep_gemm"
    }
    b.compare(
        f"{label}, forward and backward",
        trained,
        [(*args, g) for args in inputs],
        moved=T * d * 2 * (5 + 4 + 1 + 4),
        flops=6 * T * 24 * 4 * d,
        error_of=against(gradient, lambda out: out[0][:, -SLICE:]),
    )
    if "hc_post_pre" in LAUNCHERS:
        b.compare(
            f"{label}, hc_post and the next hc_pre",
            {"ours": kernel("hc_post_pre"), "two ops": Side(post_then_pre, True)},
            b.sets(lambda: (*streams(b, T, d), *weights, *constants)),
            moved=T * d * 2 * 10,
        )


# --------------------------------------------------------------------------------------------------
# Sinkhorn


@case("G1.3", "Sinkhorn", 6, 2, "sinkhorn")
def sinkhorn(b: Bench) -> None:
    eager = doubly_stochastic
    kernels = INTERPRETING or not b.toy  # in a model it is no op, but a part of hc_pre_backward
    module = importlib.import_module("ops.sinkhorn")
    backward = LAUNCHERS["sinkhorn_backward"] if kernels else module.backward_reference

    def mine(x, eps, iters, g):
        return backward(g, x, eps, iters)

    def gradient(x, g):
        return both(lambda x: eager(x, EPS, 20), (0,))(x.requires_grad_(), g)

    for label, T in (("4096", 4096), ("16384", 16384)):
        T = b.size(T, 40)

        def matrices(T=T):
            return b.normal(1, T, 4, 4, dtype=torch.float32, grad=True), EPS, 20

        inputs = b.sets(matrices)

        def launches(call, args):
            return (b.profile(lambda: call(*args)) or {}).get("kernels")

        x = inputs[0][0]
        b.compare(
            f"{label}, forward",
            {"ours": ours("sinkhorn"), "eager": eager, "compiled": b.compiled(eager)},
            inputs,
            moved=2 * nbytes(inputs[0]),
            error_of=against(lambda x=x: eager(double(x), EPS, 20)),
            launches={
                "ours": launches(ours("sinkhorn"), inputs[0]),
                "eager": launches(eager, inputs[0]),
            },
        )
        inputs = [(*args, b.normal(1, T, 4, 4, dtype=torch.float32)) for args in inputs]
        sides = {
            "ours": Side(mine, True),
            "eager": backward_of(eager, (0,)),
            "compiled": backward_of(b.compiled(eager).call, (0,)),
        }
        g = inputs[0][3]
        b.compare(
            f"{label}, backward",
            sides,
            inputs,
            moved=3 * nbytes(x),
            launches={"ours": launches(mine, inputs[0])},
            error_of=against(lambda x=x, g=g: gradient(*double((x, g)))),
        )
