"""Experts in the GPU suite, in bf16, FP8 and FP4, beside grouped products of libraries."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.gpu_measure import Bench, Side, against, both, case, double, nbytes
from bench.gpu_ops import hf, ours, with_weights
from ops.formats import dequantize_fp4, dequantize_fp8, quantize_fp4, quantize_fp8, scale_to_float
from ops.moe_grouped import activate

LIMIT = 10.0  # of SwiGLU
QUANTIZE = {"fp4": quantize_fp4, "fp8": quantize_fp8}
DEQUANTIZE = {"fp4": dequantize_fp4, "fp8": dequantize_fp8}


class Weights(NamedTuple):
    """w13 [E, 2I, d] and w2 [E, d, I], packed or not, and their scales."""

    form: str
    w13: torch.Tensor
    w2: torch.Tensor
    s13: torch.Tensor | None
    s2: torch.Tensor | None

    def unpacked(self, name: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """The matrix of one expert; name: "13" or "2"."""
        weight = getattr(self, f"w{name}")[expert]
        if self.form == "bf16":
            return weight.to(dtype)
        return DEQUANTIZE[self.form](weight, getattr(self, f"s{name}")[expert], dtype)

    def all_unpacked(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack([self.unpacked(name, e, dtype) for e in range(len(self.w13))])


def random_weights(b: Bench, form: str, E: int, I: int, d: int) -> Weights:
    """Packed ones expert by expert, from random values: eight different ones, repeated."""
    if form == "bf16":
        w13, w2 = b.normal(E, 2 * I, d, scale=d**-0.5), b.normal(E, d, I, scale=I**-0.5)
        return Weights(form, w13, w2, None, None)
    made = []
    for rows, columns in ((2 * I, d), (d, I)):
        different = min(E, 8)
        parts = [
            QUANTIZE[form](b.normal(rows, columns, scale=columns**-0.5)) for _ in range(different)
        ]
        for stored in zip(*parts, strict=True):  # weights, then scales
            stacked = torch.stack([part.view(torch.uint8) for part in stored])
            repeated = stacked.repeat(-(-E // different), 1, 1)[:E]
            made.append(repeated.view(stored[0].dtype))
    w13, s13, w2, s2 = made
    return Weights(form, w13, w2, s13, s2)


# --------------------------------------------------------------------------------------------------
# Baselines


def plain_product(rows, ends, w):
    return torch._grouped_mm(rows, w.transpose(1, 2), offs=ends)


def grouped_mm(x, w13, w2, idx, weight, limit, product=plain_product):
    """The torch._grouped_mm form: rows sorted by expert, two grouped products.

    x [N, d], idx and weight [N, K] -> [N, d] fp32; w13 and w2 as `product` wants them
    """
    w13, w2 = ((w,) if isinstance(w, torch.Tensor) else w for w in (w13, w2))
    K, numbers = idx.shape[1], torch.arange(len(w13[0]), device=x.device)
    experts, order = idx.flatten().sort(stable=True)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    h13 = product(x[order // K], ends, *w13)
    h = activate(h13, weight.flatten()[order, None], limit).to(x.dtype)
    y = product(h, ends, *w2).float()
    sums = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    return sums.index_add_(0, order // K, y)


def quantized_by_row(t):
    """FP8 values, and a scale per row."""
    scale = t.float().abs().amax(-1).clamp(min=1e-12) / 448
    return (t / scale[..., None]).to(torch.float8_e4m3fn), scale


def scaled_grouped_mm(weights: Weights):
    """torch._scaled_grouped_mm: FP8 by FP8, a scale per row, which weights are rounded to anew."""
    matrices = []

    def by_row(name: str):
        experts = range(len(weights.w13))
        parts = [quantized_by_row(weights.unpacked(name, e, torch.float32)) for e in experts]
        return [torch.stack(stored) for stored in zip(*parts, strict=True)]

    def call(x, idx, weight):
        if not matrices:
            matrices.extend((by_row("13"), by_row("2")))

        def product(rows, ends, w, scales):
            rows, scale = quantized_by_row(rows)
            w = w.transpose(1, 2)
            return torch._scaled_grouped_mm(rows, w, scale, scales, offs=ends, out_dtype=x.dtype)

        return grouped_mm(x, *matrices, idx, weight, LIMIT, product)

    return call


def deepgemm_product(rows, ends, weights, scales):
    """DeepGEMM's grouped product of FP8, each expert's rows padded to a multiple of 128."""
    import deep_gemm  # may be absent

    E, device = len(weights), rows.device
    begins = torch.cat((ends.new_zeros(1), ends[:-1]))
    padded_counts = (ends - begins + 127) // 128 * 128
    first = padded_counts.cumsum(0) - padded_counts
    numbers = torch.arange(len(rows), device=device)
    expert = torch.searchsorted(ends, numbers, right=True)
    place = first[expert] + numbers - begins[expert]  # of each row among the padded ones
    size = len(rows) + 127 * min(E, len(rows)) + 127 & -128
    owner = torch.full((size,), -1, dtype=torch.int32, device=device)
    owner.index_copy_(0, place, expert.int())
    v = rows.float().unflatten(1, (-1, 128))
    scale = v.abs().amax(-1).clamp(min=1e-12) / 448
    padded = torch.zeros(size, rows.shape[1], dtype=torch.float8_e4m3fn, device=device)
    padded[place] = (v / scale[..., None]).flatten(1).to(padded.dtype)
    padded_scale = scale.new_zeros(size, scale.shape[1]).index_copy_(0, place, scale)
    out = rows.new_empty(size, weights.shape[1])
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
        (padded, padded_scale), (weights, scale_to_float(scales)), out, owner
    )
    return out[place]


def deepgemm_experts(weights: Weights):
    w13, w2 = (weights.w13, weights.s13), (weights.w2, weights.s2)

    def call(x, idx, weight):
        return grouped_mm(x, w13, w2, idx, weight, LIMIT, deepgemm_product)

    return call


def experts_hf(implementation: str, w13, w2):
    """Transformers' experts, in one of its implementations."""
    modules = []

    def call(x, idx, weight):
        if not modules:
            from transformers import DeepseekV4Config  # slow to import

            config = DeepseekV4Config(
                hidden_size=x.shape[1],
                moe_intermediate_size=w2.shape[2],
                n_routed_experts=len(w13),
                swiglu_limit=LIMIT,
            )
            config._experts_implementation = implementation
            with torch.device("meta"):
                module = hf("DeepseekV4Experts")(config)
            modules.append(with_weights(module, gate_up_proj=w13, down_proj=w2))
        return modules[0](x, idx, weight.to(x.dtype))

    return call


def swiglu_fp64(h, weight):
    gate, up = h.chunk(2, -1)
    return F.silu(gate.clamp(max=LIMIT)) * up.clamp(-LIMIT, LIMIT) * weight


def experts_fp64(x, w13, w2, idx, weight):
    """Tokens in fp64; w13 and w2 are functions of an expert's number."""
    rows = []
    for t in range(len(x)):
        row = 0
        for e, c in zip(idx[t].tolist(), weight[t], strict=True):
            row = row + swiglu_fp64(w13(e) @ x[t].double(), float(c)) @ w2(e).T
        rows.append(row)
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------
# Cases

CHECKED = 4  # tokens


def routing(b: Bench, tokens: int, E: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K different experts of each token, and their weights."""
    score = torch.rand(tokens, E, generator=b.random, device=b.device)
    weight = b.normal(tokens, K, dtype=torch.float32).softmax(-1) * 1.5
    return score.topk(K).indices, weight


@case("G1.9", "experts", 60, 60, "moe", "moe_backward")
def experts(b: Bench) -> None:
    I = b.size(2048, 128)
    d = b.size(4096, 64)
    K = b.size(6, 2)
    for form in ("bf16", "fp8", "fp4"):
        experts_forward(b, random_weights(b, form, b.size(256, 8), I, d), K)
    experts_backward(b, random_weights(b, "bf16", b.size(32, 4), I, d), K)


def experts_forward(b: Bench, weights: Weights, K: int) -> None:
    form, w13, w2, s13, s2 = weights
    E = len(w13)
    I = w13.shape[1] // 2
    d = b.size(4096, 64)  # FP4 packs two columns into one

    def mine(x, idx, weight):
        return ours("moe")(x, w13, w2, idx, weight, s13, s2, LIMIT, False)

    if form == "bf16":
        full = w13, w2
    else:  # baselines without such weights are given these
        full = tuple(weights.all_unpacked(name, torch.bfloat16) for name in ("13", "2"))
    scaled = scaled_grouped_mm(weights) if form == "fp8" else None

    def by_library(x, idx, weight):
        return grouped_mm(x, *full, idx, weight, LIMIT)

    def matrix(name):
        return lambda e: weights.unpacked(name, e, torch.float64)

    for N in b.size((1, 8, 64, 4096, 8192), (1, 8192)):
        tokens = b.size(N, min(N, 12))

        def make(tokens=tokens):
            return b.normal(tokens, d), *routing(b, tokens, E, K)

        if b.prepare or N > 64:
            sets = 1
        else:
            sets = b.size(16, 4)
        inputs = [make() for _ in range(sets)]
        sides = {"ours": mine}
        if form == "bf16":
            sides["grouped_mm"] = by_library
            for name in ("eager", "grouped_mm", *(("batched_mm",) if N < 64 else ())):
                side = Side(experts_hf(name, w13, w2), graph=name != "eager")
                sides[f"transformers {name}"] = side
        else:
            sides["grouped_mm of bf16"] = by_library
        if form == "fp8":
            sides |= {"scaled_grouped_mm": scaled, "deep_gemm": deepgemm_experts(weights)}

        def exact(inputs=inputs):
            x, idx, weight = (t[:CHECKED] for t in inputs[0])
            return experts_fp64(x, matrix("13"), matrix("2"), idx, weight)

        touched = sum(len(idx.unique()) for _, idx, _ in inputs) / len(inputs)
        b.compare(
            f"{form}, {N} tokens",
            sides,
            inputs,
            flops=6 * tokens * K * d * I,
            experts_touched=touched,
            moved=touched / E * nbytes(w13, w2, s13, s2) + tokens * d * 6,
            error_of=against(exact, lambda out: out[:CHECKED]),
        )


def experts_backward(b: Bench, weights: Weights, K: int) -> None:
    w13, w2 = weights.w13.requires_grad_(), weights.w2.requires_grad_()
    E, _, d = w13.shape
    I, tokens = w2.shape[2], b.size(8192, 12)
    x = b.normal(tokens, d, grad=True)
    idx, weight = routing(b, tokens, E, K)
    g = b.normal(tokens, d, dtype=torch.float32)
    inputs = [(x, w13, w2, idx, weight.requires_grad_(), g)]

    def mine(x, w13, w2, idx, weight):
        return ours("moe")(x, w13, w2, idx, weight, None, None, LIMIT, False)

    def by_library(*args):
        return grouped_mm(*args, LIMIT)

    def some(x, idx, weight):
        return experts_fp64(x, lambda e: double(w13[e]), lambda e: double(w2[e]), idx, weight)

    def gradient():
        exact, *rest, exact_g = (double(t[:CHECKED]) for t in (x, idx, weight, g))
        return both(some, (0,))(exact.requires_grad_(), *rest, exact_g)

    wrt = (0, 1, 2, 4)
    b.compare(
        "bf16, 8192 tokens, 32 experts, forward and backward",
        {
            "ours": Side(both(mine, wrt), True, False),
            "grouped_mm": Side(both(by_library, wrt), False, False),
        },
        inputs,
        flops=18 * tokens * K * d * I,
        moved=3 * nbytes(w13, w2),
        error_of=against(gradient, lambda out: out[0][:CHECKED]),
    )
