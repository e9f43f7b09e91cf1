"""FP8 linears, activation rounding, elementwise functions and the fused loss in the GPU suite."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from bench.gpu_experts import LIMIT, swiglu_fp64
from bench.gpu_measure import Bench, Side, against, both, case, double, nbytes
from bench.gpu_ops import EPS, SLICE, call_of, ours, reference, tail
from ops.formats import dequantize_fp8, quantize_fp8
from ops.moe_grouped import activate

# --------------------------------------------------------------------------------------------------
# FP8 linears

LINEARS = (  # name, rows of the matrix, columns, groups
    ("wq_b", 32768, 1024, 1),
    ("wo_b", 4096, 8192, 1),
    ("wo_a", 8192, 4096, 8),
)
FP32 = (("head", 129280, 4096, 1), ("compressor", 1024, 4096, 8192))  # with bf16 weights; tokens
ROUNDINGS = ((8192, 4096, 128, "fp8"), (8192, 8192, 32, "fp4"))  # rows, columns, block, format


@case(
    "G1.12",
    "FP8 linear, fp32 linear, activation rounding",
    10,
    10,
    "quant_linear",
    "quant_linear_backward",
    "linear_fp32",
    "linear_fp32_backward",
    "act_quant",
)
def linears(b: Bench) -> None:
    for name, rows, columns, groups in LINEARS:
        rows = b.size(rows, 256)
        columns = b.size(columns, 128)
        groups = b.size(groups, min(groups, 2))
        linear(b, name, rows, columns, groups)
    for name, rows, columns, tokens in FP32:
        linear_fp32(b, name, b.size(rows, 256), b.size(columns, 128), b.size(tokens, 20))
    rounding = reference("act_quant")
    for N, n, block, form in ROUNDINGS:

        def make(N=N, n=n, block=block, form=form):
            return b.normal(1, b.size(N, 16), b.size(n, 256)), block, form

        inputs = b.sets(make)
        b.compare(
            f"act_quant {form}, 8192 x {n}",
            {"ours": ours("act_quant"), "eager": rounding, "compiled": b.compiled(rounding)},
            inputs,
            moved=2 * nbytes(inputs[0]),
            error_of=against(lambda args=inputs[0]: rounding(*args)),
        )


def linear(b: Bench, name: str, rows: int, columns: int, groups: int) -> None:
    """One matrix at several batch sizes; grouped ones multiply each group by rows of their own."""
    weight, scale = quantize_fp8(b.normal(rows, columns, scale=columns**-0.5))
    plain = dequantize_fp8(weight, scale, torch.bfloat16)
    act_quant = groups == 1
    eager_op = reference("quant_linear")

    def mine(x):
        return ours("quant_linear")(x, weight, scale, groups, act_quant)

    def eager(x):
        return eager_op(x, weight, scale, groups, act_quant)

    def unrounded(x):
        return F.linear(x, plain)

    def exact(x):
        """The last tokens in fp64."""
        x, w = x[:, -SLICE:], dequantize_fp8(weight, scale, torch.float64)
        if groups > 1:
            return torch.einsum("...gi,goi->...go", x.double(), w.unflatten(0, (groups, -1)))
        return torch.einsum("...i,oi->...o", reference("act_quant")(x, 128, "fp8").double(), w)

    for batch in b.size((1, 8, 8192), (1, 8192)):
        N = b.size(batch, min(batch, 20))
        shape = (1, N, groups, columns) if groups > 1 else (1, N, columns)
        inputs = [(b.normal(*shape),) for _ in range(b.size(8, 2))]
        sides = {"ours": mine, "eager": eager, "compiled": b.compiled(eager)}
        if groups == 1:
            sides["bf16 weights, unrounded"] = unrounded
        b.compare(
            f"{name}, {batch} rows",
            sides,
            inputs,
            flops=2 * N * groups * columns * rows // groups,
            moved=nbytes(weight, scale, inputs[0]) + 2 * N * rows,
            error_of=against(lambda x=inputs[0][0]: exact(x), tail(SLICE)),
        )


def linear_fp32(b: Bench, name: str, rows: int, columns: int, tokens: int) -> None:
    """A bf16 matrix with an fp32 result, and its gradients."""
    weight = b.normal(rows, columns, scale=columns**-0.5, grad=True)
    widened = reference("linear_fp32")

    def row():
        x = b.normal(tokens, columns, grad=True)
        return x, weight, b.normal(tokens, rows, dtype=torch.float32)

    inputs = b.sets(row)
    sides = {
        "ours": ours("linear_fp32"),
        "eager": widened,
        "compiled": b.compiled(widened),
        "bf16 result": F.linear,
    }
    b.compare(
        f"linear_fp32, {name}, {tokens} tokens",
        sides,
        [args[:2] for args in inputs],
        flops=2 * tokens * rows * columns,
        moved=nbytes(weight, inputs[0][0]) + 4 * tokens * rows,
        error_of=against(lambda: double(inputs[0][0][-SLICE:]) @ double(weight).T, last_rows),
    )
    if tokens > 1:
        b.compare(
            f"linear_fp32, {name}, forward and backward",
            {side: Side(both(call_of(f), (0, 1)), True) for side, f in sides.items()},
            inputs,
            flops=6 * tokens * rows * columns,
            moved=3 * nbytes(weight, inputs[0][0]),
        )


# --------------------------------------------------------------------------------------------------
# Elementwise


def liger(module: str, name: str):
    return getattr(importlib.import_module(f"liger_kernel.{module}"), name)


def last_rows(out):
    return out[-SLICE:]


@case("G1.10", "clamped SwiGLU and RMSNorm, which Inductor makes", 6, 20)
def elementwise(b: Bench) -> None:
    N, n = b.size(49152, 40), b.size(4096, 64)
    w = 1 + b.normal(n, dtype=torch.float32, scale=0.1)

    def gate(h, weight):
        return activate(h, weight, LIMIT).to(h.dtype)

    def norm(x):
        v = x.float()
        return (v * torch.rsqrt(v.square().mean(-1, keepdim=True) + EPS) * w).to(x.dtype)

    def norm_fp64(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w.double()

    def norm_liger(x):
        function = liger("ops.rms_norm", "LigerRMSNormFunction")
        return function.apply(x, w, EPS, 0.0, "gemma", False)

    def rows():
        h = b.normal(N, n, grad=True)
        weight = b.normal(N, 1, dtype=torch.float32).sigmoid().requires_grad_()
        return h, weight, b.normal(N, n // 2)

    inputs = b.sets(rows)
    h, weight = double([t[-SLICE:] for t in inputs[0][:2]])
    b.compare(
        "swiglu, forward",
        {"ours": b.compiled(gate), "eager": gate},
        [args[:2] for args in inputs],
        moved=3 * N * n,
        error_of=against(lambda: swiglu_fp64(h, weight), last_rows),
    )
    b.compare(
        "swiglu, forward and backward",
        {"ours": Side(both(b.compiled(gate).call, (0, 1)), True), "eager": both(gate, (0, 1))},
        inputs,
        moved=8 * N * n,
    )
    b.compare(
        "rmsnorm",
        {"ours": b.compiled(norm), "eager": norm, "liger": norm_liger},
        [args[:1] for args in inputs],
        moved=4 * N * n,
        error_of=against(lambda: norm_fp64(h), last_rows),
    )


# --------------------------------------------------------------------------------------------------
# Loss


def unfused_loss(x, weight, target):
    logits = F.linear(x, weight).float()
    return F.cross_entropy(logits, target, reduction="none")


def liger_loss(x, weight, target, g):
    """The mean over tokens, whose gradient is 1 / N for each."""
    with torch.enable_grad():
        module = "transformers.fused_linear_cross_entropy"
        total = liger(module, "LigerFusedLinearCrossEntropyLoss")()(weight, x, target)
        return torch.autograd.grad(total, (x, weight))


@case(
    "G1.11", "linear cross-entropy", 15, 40, "linear_cross_entropy", "linear_cross_entropy_backward"
)
def loss(b: Bench) -> None:
    N = b.size(8192, 24)
    d = b.size(4096, 32)
    V = b.size(129280, 200)
    x = b.normal(N, d, grad=True)
    weight = b.normal(V, d, scale=d**-0.5, grad=True)
    target = b.integers(V, N)
    g = torch.full((N,), 1 / N, device=b.device)

    def exact(rows):
        return F.cross_entropy(rows @ double(weight).T, target[-SLICE:], reduction="none")

    def gradient():
        rows = double(x[-SLICE:]).requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(exact(rows), rows, double(g[-SLICE:]))

    sides = {
        "ours": ours("linear_cross_entropy"),
        "eager": unfused_loss,
        "compiled": b.compiled(unfused_loss),
    }
    b.compare(
        "forward",
        sides,
        [(x, weight, target)],
        flops=2 * N * d * V,
        moved=nbytes(x, weight),
        error_of=against(lambda: exact(double(x[-SLICE:])), last_rows),
    )
    trained = {name: Side(both(call_of(side), (0, 1)), True, False) for name, side in sides.items()}
    b.compare(
        "forward and backward",
        trained | {"liger": Side(liger_loss, graph=False)},
        [(x, weight, target, g)],
        flops=6 * N * d * V,
        moved=3 * nbytes(x, weight),
        error_of=against(gradient, lambda out: out[0][-SLICE:]),
    )
