"""The model in the GPU suite: slices of Flash with real widths and random weights that fit one GPU.

Decoding, prefill and training steps, compiled by the presets of compile_config.py, beside the same model with its ops off
(pure PyTorch, compiled) and Transformers' eager model on the same weights. What is said of the whole model is extrapolated
from slices, and called so. Published training numbers include communication between GPUs; these do not.
"""

from __future__ import annotations

import dataclasses
import time

import torch
import torch.nn.functional as F

from bench.cases import pack
from bench.gpu_measure import Bench, Side, against, case, nbytes
from compile_config import (
    PRESETS,
    CompileConfig,
    CompileCount,
    compile_decode,
    compile_prefill,
    compile_train_step,
    compile_verify,
)
from model import ModelArgs, Transformer
from tools.capture import MODEL_OPS

FLASH_LAYERS = 43
SHARES = {
    "attention": ("sparse_attn", "indexer_topk", "single_sort"),
    "hyper-connections": ("hc_", "sinkhorn"),
    "experts": ("moe",),
    "elementwise": ("triton_", "elementwise", "vectorized"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma"),
}


def slice_args(b: Bench, ratios: tuple[int, ...], experts: int = 256) -> ModelArgs:
    """Flash (toy: the debug model) with these layers: the first ones of it where they begin as it does."""
    base = ModelArgs.debug() if b.toy else ModelArgs.flash()
    return dataclasses.replace(
        base,
        n_layers=len(ratios),
        n_hash_layers=min(3, len(ratios)) if ratios[0] == 0 else 0,
        n_mtp_layers=0,
        compress_ratios=ratios,
        n_routed_experts=b.at(experts, 8),
        moe_inter_dim=b.at(base.moe_inter_dim, 128),
    )


def build(
    b: Bench, args: ModelArgs, weights: str = "bf16", modes: dict[str, str] | None = None
) -> Transformer:
    """A model with random weights made on the device; packed ones are random codes under scales that keep them near 0.02."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Transformer(args, ops=modes or {name: "opaque" for name in MODEL_OPS})
            if weights != "bf16":
                pack(model, weights)
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device=b.device)
    fill(b, model)
    return model


@torch.no_grad()
def fill(b: Bench, model: Transformer) -> None:
    for name, p in model.named_parameters():
        if p.dtype == torch.uint8:  # exponents: those of FP4 experts, or of FP8
            p.fill_(
                120
                if p.shape[-1] * 32 in (model.args.dim, model.args.moe_inter_dim) and p.dim() == 3
                else 115
            )
        elif p.dtype == torch.int8:
            p.view(torch.uint8).random_(0, 256, generator=b.random)
        elif p.dtype == torch.float8_e4m3fn:
            for part in p if p.dim() == 3 else (p,):
                part.copy_(b.normal(*part.shape, scale=64).clamp_(-448, 448))
        elif p.dim() == 1:
            p.fill_(float("norm" in name or name.endswith("_scale")))
        else:
            p.normal_(0, 0.02, generator=b.random)
    for name, t in model.named_buffers():
        if name.endswith("tid2eid"):
            t.copy_(
                torch.rand(
                    t.shape[0], model.args.n_routed_experts, generator=b.random, device=b.device
                )
                .topk(t.shape[1])
                .indices
            )


@torch.no_grad()
def caches(b: Bench, model: Transformer, batch: int, context: int) -> None:
    """Caches as after `context` tokens: random, not zeros."""
    model.setup_caches(batch, context)
    for name, t in model.named_buffers():
        if name.endswith(("ring.rows", ".entries")):
            t.normal_(0, 1, generator=b.random)


def twin(model: Transformer, modes: dict[str, str]) -> Transformer:
    """The same weights, other forms of the ops."""
    with torch.device("meta"):
        other = Transformer(model.args, ops=modes)
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def references() -> dict[str, str]:
    return {name: "reference" for name in MODEL_OPS}


def transformers_twin(b: Bench, model: Transformer):
    """Transformers' model on the same weights."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    from tests.testing import hf_name

    config, before = model.args.to_hf(), torch.get_default_dtype()
    config["rope_scaling"] = config["rope_scaling"] and {
        **config["rope_scaling"],
        "rope_type": "yarn",
    }
    torch.set_default_dtype(torch.bfloat16)
    try:
        with b.device:
            hf = DeepseekV4ForCausalLM._from_config(
                DeepseekV4Config(**config), attn_implementation="eager"
            )
    finally:
        torch.set_default_dtype(before)
    hf.load_state_dict(
        {hf_name(k): v for k, v in model.state_dict().items()}, strict=False, assign=True
    )
    return hf.eval()


def lazily(make, call, **options) -> Side:
    """A side that makes what it needs when it is first called; it fails by itself."""
    kept = []

    def run(*args):
        if not kept:
            kept.append(make())
        return call(kept[0], *args)

    return Side(run, graph=False, **options)


def numbers(model: Transformer) -> tuple[int, int]:
    """(parameters, parameters that one token multiplies with): those of a slice, embedding left out."""
    share = model.args.n_activated_experts / model.args.n_routed_experts
    sizes = [
        (name, p.numel()) for name, p in model.named_parameters() if not name.startswith("embed.")
    ]
    return sum(n for _, n in sizes), round(
        sum(n * (share if ".experts." in name else 1) for name, n in sizes)
    )


def flops(model: Transformer, S: int) -> float:
    """Forward FLOPs of S tokens from position 0: two per active parameter, attention and indexer by visible pairs."""
    args, pairs = model.args, 0.0
    window = sum(min(t + 1, args.window_size) for t in range(S))
    for ratio in args.compress_ratios[: args.n_layers]:
        visible = sum((t + 1) // ratio for t in range(S)) if ratio else 0
        chosen = (
            sum(min((t + 1) // ratio, args.index_topk) for t in range(S)) if ratio == 4 else visible
        )
        pairs += 4 * args.n_heads * args.head_dim * (window + chosen)
        pairs += 2 * args.index_n_heads * args.index_head_dim * visible if ratio == 4 else 0
    return 2 * numbers(model)[1] * S + pairs


def decode_bytes(model: Transformer, batch: int, context: int, length: int = 1) -> float:
    """Bytes that a step of `length` tokens per row must read: weights once, of the experts those that are chosen, and keys."""
    args, total = model.args, 0.0
    distinct = 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** (batch * length)
    for name, p in model.named_parameters():
        total += (
            0 if name.startswith("embed.") else p.nbytes * (distinct if ".experts." in name else 1)
        )
    for ratio in args.compress_ratios[: args.n_layers]:
        rows = args.window_size + (
            min(context // 4, args.index_topk) if ratio == 4 else context // ratio if ratio else 0
        )
        total += (
            2
            * batch
            * (rows * args.head_dim + (context // 4 * args.index_head_dim if ratio == 4 else 0))
        )
    return total


def shares(found: dict | None) -> dict | None:
    """Percent of the device's time by what it was spent on."""
    if not found:
        return None
    total = sum(found["us"].values())
    return {
        what: 100
        * sum(us for name, us in found["us"].items() if any(part in name for part in parts))
        / total
        for what, parts in SHARES.items()
    }


# ---------------------------------------------------------------------------------------------------------------------
# Decode

DECODE = {
    "bf16": ((1, 4096), (8, 4096), (64, 4096), (1, 65536)),
    "fp4": ((1, 4096), (8, 4096), (64, 4096), (1, 65536)),
    "fp8": ((1, 4096), (8, 4096)),
}


@case("G2", "decode, 4 layers of Flash [4, 128, 4, 128]", 110, {"bf16": 62, "fp4": 30, "fp8": 40})
@torch.no_grad()
def decode(b: Bench) -> None:
    graphs, eager = b.at(PRESETS["cudagraphs"], CompileConfig(backend="eager")), PRESETS["eager"]
    for weights in DECODE:
        if not b.wants(weights):
            continue
        model = build(b, slice_args(b, (4, 128, 4, 128)), weights)
        for batch, context in DECODE[weights][: b.at(4, 1)]:
            label, batch, context = (
                f"{weights}, B={batch}, {context >> 10}k",
                b.at(batch, min(batch, 3)),
                b.at(context, 160),
            )
            caches(b, model, batch, context)
            step = compile_decode(model, graphs)
            inputs = [
                (
                    b.integers(model.args.vocab_size, batch, 1),
                    torch.full((batch,), context - 8 + i, device=b.device),
                )
                for i in range(4)
            ]
            sides = {"ours": Side(step, True, False)}
            if batch == 1 and context < 8192:
                sides["ours, eager"] = Side(compile_decode(model, eager), graph=False)
            if label == "bf16, B=1, 4k":
                other = twin(model, references())
                caches(b, other, batch, context)
                for mine, its in zip(model.buffers(), other.buffers(), strict=True):
                    its.copy_(mine)
                sides["pure PyTorch, compiled"] = Side(compile_decode(other, graphs), True, False)
                if not b.prepare:
                    sides |= transformers_decode(b, model, context)
            row = b.compare(label, sides, inputs, moved=decode_bytes(model, batch, context))
            if "ms" in row:
                if "pure PyTorch, compiled" in sides:
                    row |= {
                        f"{name}_from_references": value
                        for name, value in against(
                            lambda: compile_decode(other, eager)(*inputs[0])
                        )(step(*inputs[0])).items()
                    }
                found, layers = b.profile(lambda: step(*inputs[0])), model.args.n_layers
                head = b.compare(
                    f"{label}, head",
                    {"ours": b.compiled(lambda X: model.lm_logits(X, None, "all"))},
                    [(b.normal(batch, 1, model.args.hc_mult, model.args.dim),)],
                    moved=nbytes(model.head.weight),
                )
                rest = row["ms"] - head.get("ms", 0.0)
                row |= {
                    "tokens_per_s": 1e3 * batch / row["ms"],
                    "us_per_layer": 1e3 * rest / layers,
                    "waits": b.syncs(lambda: step(*inputs[0])),
                    "kernels_per_layer": found and found["kernels"] / layers,
                    "host_to_device_copies": found and found["host_to_device"],
                    "extrapolated_flash_tokens_per_s": 1e3
                    * batch
                    / (rest / layers * FLASH_LAYERS + head.get("ms", 0.0)),
                }
            elif b.prepare:
                b.compare(
                    f"{label}, head",
                    {"ours": b.compiled(lambda X: model.lm_logits(X, None, "all"))},
                    [(b.normal(batch, 1, model.args.hc_mult, model.args.dim),)],
                )
            if (
                context < 8192 and batch == 1 and weights != "fp8"
            ):  # what a step costs that checks three drafted tokens
                verify = compile_verify(model, graphs)
                more = [(b.integers(model.args.vocab_size, batch, 4), pos) for _, pos in inputs]
                checked = b.compare(
                    f"{label}, verify 4 tokens",
                    {"ours": Side(verify, True, False)},
                    more,
                    moved=decode_bytes(model, batch, context, 4),
                )
                if "ms" in checked:
                    checked["times_a_decoded_token"] = checked["ms"] / row["ms"]
            step = sides = other = verify = None
        del model
        b.free()
    if b.wants("fp8"):
        model = build(b, slice_args(b, (4,)))
        context = b.at(1 << 20, 320)
        caches(b, model, 1, context)
        inputs = [
            (
                b.integers(model.args.vocab_size, 1, 1),
                torch.full((1,), context - 8 + i, device=b.device),
            )
            for i in range(4)
        ]
        b.compare(
            "bf16, one CSA layer, B=1, 1024k",
            {"ours": Side(compile_decode(model, graphs), True, False)},
            inputs,
            moved=decode_bytes(model, 1, context),
        )


def transformers_decode(b: Bench, model: Transformer, context: int) -> dict[str, Side]:
    """Transformers' eager decoding, by implementation of its experts; its cache only grows."""
    kept = []

    def make(name):
        def made():
            if not kept:
                hf = transformers_twin(b, model)
                kept.extend(
                    (
                        hf,
                        hf(
                            b.integers(model.args.vocab_size, 1, context - 8), use_cache=True
                        ).past_key_values,
                    )
                )
            return name

        return made

    def call(name, tokens, pos):
        kept[0].set_experts_implementation(name)
        return kept[0](tokens, past_key_values=kept[1], use_cache=True).logits

    return {
        f"transformers {name}": lazily(make(name), call)
        for name in ("eager", "batched_mm", "grouped_mm")
    }


# ---------------------------------------------------------------------------------------------------------------------
# Prefill, training


@case("G3", "prefill, 4 layers of Flash [4, 128, 4, 128]", 45, 62)
@torch.no_grad()
def prefill(b: Bench) -> None:
    model = build(b, slice_args(b, (4, 128, 4, 128)))
    for S in (4096, 8192, 16384)[: b.at(3, 1)]:
        label, S = f"{S} tokens", b.at(S, 160)
        caches(b, model, 1, S)
        ask = lambda call: (
            lambda tokens: call(tokens, torch.zeros(1, dtype=torch.int64, device=b.device), None)
        )
        compiled = b.at(PRESETS["default"], CompileConfig(backend="eager"))
        sides = {
            "ours": Side(ask(compile_prefill(model, compiled)), True, False),
            "ours, eager": Side(ask(compile_prefill(model, PRESETS["eager"])), graph=False),
        }
        if label == "4096 tokens":
            other = twin(model, references())
            caches(b, other, 1, S)
            sides["pure PyTorch, compiled"] = Side(
                ask(compile_prefill(other, compiled)), True, False
            )

            def theirs(hf, tokens):
                hf.set_experts_implementation("grouped_mm")
                return hf(tokens, use_cache=True, logits_to_keep=1).logits

            sides["transformers grouped_mm"] = lazily(lambda: transformers_twin(b, model), theirs)
        work = flops(model, S)
        row = b.compare(
            label, sides, [(b.integers(model.args.vocab_size, 1, S),) for _ in range(2)], flops=work
        )
        if "ms" in row:
            row |= {
                "tokens_per_s": 1e3 * S / row["ms"],
                "gflop_per_token": work / S / 1e9,
                "shares": shares(
                    b.profile(lambda: sides["ours"].call(b.integers(model.args.vocab_size, 1, S)))
                ),
            }
        sides = None


def trained(b: Bench, model: Transformer, preset: CompileConfig) -> Side:
    """A training step with AdamW, moments in the dtype of the parameters."""
    optimizer, rate = (
        torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        torch.tensor(1e-4, device=b.device),
    )
    step = compile_train_step(model.train(), optimizer, preset)

    def call(tokens, targets, docs):
        with torch.enable_grad():
            return step(tokens, targets, docs, rate)["loss"]

    return Side(call, True, False)


TRAIN = {
    "4 layers [0, 0, 4, 128], 12288 tokens": ((0, 0, 4, 128), 12288, "default"),
    "8 layers [0, 0, 4, 128, 4, 128, 4, 0], 4096 tokens": (
        (0, 0, 4, 128, 4, 128, 4, 0),
        4096,
        "regional",
    ),
}


@case(
    "G4",
    "training steps, 32 experts (what one of 8 GPUs holds), no communication",
    90,
    {name: gb for name, gb in zip(TRAIN, (70, 90))},
)
def train(b: Bench) -> None:
    for label, (ratios, S, preset) in TRAIN.items():
        if not b.wants(label):
            continue
        S, preset = b.at(S, 160), b.at(PRESETS[preset], CompileConfig(backend="eager"))
        model = build(b, slice_args(b, ratios, 32))
        tokens = [b.integers(model.args.vocab_size, 1, S + 1) for _ in range(2)]
        inputs = [
            (t[:, :-1].contiguous(), t[:, 1:].contiguous(), torch.zeros_like(t[:, 1:]))
            for t in tokens
        ]
        work, side = 3 * flops(model, S), trained(b, model, preset)
        sides = {"ours": side}
        if len(ratios) == 4:
            sides["hyper-connections off"] = trained(
                b,
                twin(
                    model, {n: "reference" if n.startswith("hc_") else "opaque" for n in MODEL_OPS}
                ),
                preset,
            )
        row = b.compare(label, sides, inputs, flops=work)
        if "ms" in row:
            found = b.profile(lambda: side.call(*inputs[0]))
            row |= {
                "tokens_per_s": 1e3 * S / row["ms"],
                "gflop_per_token": work / S / 1e9,
                "kernels": found and found["kernels"],
                "shares": shares(found),
                "peak_gb": None if b.toy else torch.cuda.max_memory_allocated() / 1e9,
                "loss": float(side.call(*inputs[0])),
            }
        side = sides = model = None
        b.free()
    if b.wants(next(iter(TRAIN))):
        short(b)


def short(b: Bench) -> None:
    """Forward and backward of 4 layers and 4096 tokens beside Transformers and the ops' references; no optimizer."""
    S, preset = b.at(4096, 160), b.at(PRESETS["default"], CompileConfig(backend="eager"))
    model = build(b, slice_args(b, (0, 0, 4, 128), 32))
    tokens = [b.integers(model.args.vocab_size, 1, S + 1) for _ in range(2)]

    class Nothing:
        def __init__(self, model):
            self.model = model

        def step(self, lr, load):
            self.model.zero_grad(set_to_none=True)

    def ours(model):
        step = compile_train_step(model.train(), Nothing(model), preset)

        def call(tokens):
            with torch.enable_grad():
                return step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, None)[
                    "loss"
                ]

        return Side(call, True, False)

    def theirs(hf, tokens):
        hf.set_experts_implementation("grouped_mm")
        with torch.enable_grad():
            loss = F.cross_entropy(
                hf(tokens[:, :-1], use_cache=False).logits.flatten(0, 1).float(),
                tokens[:, 1:].flatten(),
            )
            loss.backward()
        hf.zero_grad(set_to_none=True)
        return loss.detach()

    sides = {
        "ours": ours(model),
        "pure PyTorch, compiled": ours(twin(model, references())),
        "transformers grouped_mm": lazily(lambda: transformers_twin(b, model), theirs),
    }
    row = b.compare(
        "4 layers [0, 0, 4, 128], 4096 tokens, forward and backward",
        sides,
        [(t,) for t in tokens],
        flops=3 * flops(model, S),
    )
    if "ms" in row:
        row["tokens_per_s"] = 1e3 * S / row["ms"]


# ---------------------------------------------------------------------------------------------------------------------
# Compilation, waiting


@case("G5", "graphs and recompiles; host time under offload", 30, 20)
def compilation(b: Bench) -> None:
    args, preset = (
        ModelArgs.debug() if b.toy else ModelArgs.tiny(),
        b.at(PRESETS["default"], CompileConfig(backend="eager")),
    )
    model, S, count = build(b, args), b.at(256, 24), CompileCount()
    side = trained(b, model, preset)
    ids = lambda batch, length: b.integers(args.vocab_size, batch, length)
    for i in range(
        b.at(32, 3)
    ):  # valid tokens, documents and their lengths differ from call to call
        docs = (torch.arange(S, device=b.device) // (3 + 7 * i)).clamp(max=i)[None]
        docs = docs.masked_fill(torch.arange(S, device=b.device) >= S - i, -1)
        side.call(ids(1, S), ids(1, S), docs)
        if i == 0:
            count.warm()
    b.rows["training over 32 layouts"] = {
        "graphs": count.graphs,
        "breaks": count.breaks,
        "recompiles": count.recompiles,
    }
    model.eval().setup_caches(1, b.at(2048, 64))
    feed, count = compile_prefill(model, preset), CompileCount()
    for i in range(b.at(32, 3)):
        feed(
            ids(1, b.at(64, 8)),
            torch.full((1,), i, device=b.device),
            torch.full((1,), 1 + i % b.at(64, 8), device=b.device),
        )
        if i == 0:
            count.warm()
    b.rows["prefill over 32 positions and lengths"] = {
        "graphs": count.graphs,
        "breaks": count.breaks,
        "recompiles": count.recompiles,
    }
    offload(b)


@torch.no_grad()
def offload(b: Bench) -> None:
    """Host time of a compressor and an indexer while 2 x 200 MB are being copied to the host; with .item(), as was published."""
    model = build(b, slice_args(b, (4,), 8))
    attn, S = model.layers[0].attn, b.at(8192, 96)
    _, plan = model.prepare(b.integers(model.args.vocab_size, 1, S), {4}, None, None, None)
    x, qr = b.normal(1, S, model.args.dim), b.normal(1, S, model.args.q_lora_rank)
    call = b.compiled(lambda x, qr: (attn.compressor(x, plan), attn.indexer(x, qr, plan))).call
    call(x, qr)
    if b.prepare:
        return
    size = b.at(100_000_000, 1000)
    held = [
        (b.normal(size), torch.empty(size, dtype=torch.bfloat16, pin_memory=not b.toy))
        for _ in range(2)
    ]
    stream = None if b.toy else torch.cuda.Stream()

    def pressed(function):
        times = []
        for _ in range(b.at(20, 2)):
            b.sync()
            with torch.cuda.stream(stream) if stream else torch.no_grad():
                for source, target in held:
                    target.copy_(source, non_blocking=True)
            begun = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - begun))
        b.sync()
        return sorted(times)[len(times) // 2]

    def waiting():
        entries, chosen = call(x, qr)
        if stream:  # the published code read a length back behind the copies
            torch.cuda.current_stream().wait_stream(stream)
        return chosen.max().item()

    b.rows["host time under offload"] = {
        "us": pressed(lambda: call(x, qr)),
        "us_with_item": pressed(waiting),
        "waits": b.syncs(lambda: call(x, qr)),
    }
