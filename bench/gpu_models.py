"""The model in the GPU suite: slices of Flash with real widths and random weights that fit one GPU.

Decoding, prefill and training steps, compiled by the presets of compile_config.py, beside the same
model with its ops off (pure PyTorch, compiled) and Transformers' eager model on the same weights.
Speeds of the whole model are extrapolated from slices, and called so. Published training numbers
include communication between GPUs; these do not.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.gpu_measure import Bench, Side, against, case, nbytes
from compile_config import (
    PRESETS,
    CompileConfig,
    compile_decode,
    compile_prefill,
    compile_train_step,
    compile_verify,
)
from model import ModelArgs, Transformer
from tests.testing import hf_name
from tools.capture import MODEL_OPS
from tools.compile_count import CompileCount
from tools.launches import pack

FLASH_LAYERS = 43
SHARES = {  # parts of kernels' names, by what they compute
    "attention": ("sparse_attn", "indexer_topk", "single_sort"),
    "hyper-connections": ("hc_", "sinkhorn"),
    "experts": ("moe",),
    "elementwise": ("triton_", "elementwise", "vectorized"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma"),
}
EAGER = PRESETS["eager"]


# --------------------------------------------------------------------------------------------------
# Models


def slice_args(b: Bench, ratios: tuple[int, ...], experts: int = 256) -> ModelArgs:
    """Flash (toy: the debug model) with these layers; they begin as its own where they can."""
    base = ModelArgs.debug() if b.toy else ModelArgs.flash()
    return dataclasses.replace(
        base,
        n_layers=len(ratios),
        n_hash_layers=min(3, len(ratios)) if ratios[0] == 0 else 0,
        n_mtp_layers=0,
        compress_ratios=ratios,
        n_routed_experts=b.size(experts, 8),
        moe_inter_dim=b.size(base.moe_inter_dim, 128),
    )


def all_ops(mode: str) -> dict[str, str]:
    return {name: mode for name in MODEL_OPS}


def build(
    b: Bench, args: ModelArgs, weights: str = "bf16", modes: dict[str, str] | None = None
) -> Transformer:
    """A model with random weights made on the device, packed ones as random codes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Transformer(args, ops=modes or all_ops("opaque"))
            if weights != "bf16":
                pack(model, weights)
    finally:
        torch.set_default_dtype(before)
    model.to_empty(device=b.device)
    fill(b, model)
    return model


@torch.no_grad()
def fill(b: Bench, model: Transformer) -> None:
    """Random weights; scales of packed ones bring them near 0.02."""
    widths = (model.args.dim, model.args.moe_inter_dim)
    for name, p in model.named_parameters():
        if p.dtype == torch.uint8:  # exponents
            of_fp4 = p.dim() == 3 and p.shape[-1] * 32 in widths
            p.fill_(120 if of_fp4 else 115)
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
            shape = (t.shape[0], model.args.n_routed_experts)
            score = torch.rand(shape, generator=b.random, device=b.device)
            t.copy_(score.topk(t.shape[1]).indices)


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


def transformers_twin(b: Bench, model: Transformer):
    """Transformers' model on the same weights."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM  # slow to import

    config, before = model.args.to_hf(), torch.get_default_dtype()
    if config["rope_scaling"]:
        config["rope_scaling"] = {**config["rope_scaling"], "rope_type": "yarn"}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with b.device:
            hf = DeepseekV4ForCausalLM._from_config(
                DeepseekV4Config(**config), attn_implementation="eager"
            )
    finally:
        torch.set_default_dtype(before)
    weights = {hf_name(name): t for name, t in model.state_dict().items()}
    hf.load_state_dict(weights, strict=False, assign=True)
    return hf.eval()


def lazily(make: Callable, call: Callable, **options) -> Side:
    """A side call(made, *args) that makes what it needs at its first call, and fails by itself."""
    made = []

    def run(*args):
        if not made:
            made.append(make())
        return call(made[0], *args)

    return Side(run, graph=False, **options)


# --------------------------------------------------------------------------------------------------
# Work


def numbers(model: Transformer) -> tuple[int, int]:
    """(parameters, parameters that one token multiplies with), embedding left out."""
    args = model.args
    share = args.n_activated_experts / args.n_routed_experts
    total = active = 0
    for name, p in model.named_parameters():
        if not name.startswith("embed."):
            total += p.numel()
            active += p.numel() * (share if ".experts." in name else 1)
    return total, round(active)


def flops(model: Transformer, S: int) -> float:
    """Forward FLOPs of S tokens from position 0.

    Two per active parameter; attention and indexer by visible pairs.
    """
    args, pairs = model.args, 0.0
    window = sum(min(t + 1, args.window_size) for t in range(S))
    for ratio in args.compress_ratios[: args.n_layers]:
        counts = [(t + 1) // ratio for t in range(S)] if ratio else []
        visible = sum(counts)
        chosen = sum(min(n, args.index_topk) for n in counts) if ratio == 4 else visible
        pairs += 4 * args.n_heads * args.head_dim * (window + chosen)
        if ratio == 4:
            pairs += 2 * args.index_n_heads * args.index_head_dim * visible
    return 2 * numbers(model)[1] * S + pairs


def decode_bytes(model: Transformer, batch: int, context: int, length: int = 1) -> float:
    """Bytes that a step of `length` tokens per row must read.

    Weights once, of the experts those that are chosen, and keys.
    """
    args, total = model.args, 0.0
    distinct = 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** (batch * length)
    for name, p in model.named_parameters():
        if not name.startswith("embed."):
            total += p.nbytes * (distinct if ".experts." in name else 1)
    for ratio in args.compress_ratios[: args.n_layers]:
        entries = context // ratio if ratio else 0
        attended = min(entries, args.index_topk) if ratio == 4 else entries
        values = (args.window_size + attended) * args.head_dim
        if ratio == 4:
            values += entries * args.index_head_dim
        total += 2 * batch * values
    return total


def shares(found: dict | None) -> dict | None:
    """Percent of the device's time by what it was spent on, of Bench.profile's result."""
    if not found:
        return None
    total, result = sum(found["us"].values()), {}
    for kind, parts in SHARES.items():
        spent = [us for name, us in found["us"].items() if any(part in name for part in parts)]
        result[kind] = 100 * sum(spent) / total
    return result


# --------------------------------------------------------------------------------------------------
# Decode

DECODE = {  # weights -> (batch, context)
    "bf16": ((1, 4096), (8, 4096), (64, 4096), (1, 65536)),
    "fp4": ((1, 4096), (8, 4096), (64, 4096), (1, 65536)),
    "fp8": ((1, 4096), (8, 4096)),
}
ALTERNATING = (4, 128, 4, 128)  # compression ratios of the slice
VERIFIED = 4  # tokens


def by_graphs(b: Bench) -> CompileConfig:
    return b.size(PRESETS["cudagraphs"], CompileConfig(backend="eager"))


def step_inputs(b: Bench, model: Transformer, batch: int, context: int) -> list[tuple]:
    """Tokens [B, 1] and positions [B] of four steps near the end of the context."""
    return [
        (
            b.integers(model.args.vocab_size, batch, 1),
            torch.full((batch,), context - 8 + i, device=b.device),
        )
        for i in range(4)
    ]


@case("G2", "decode, 4 layers of Flash [4, 128, 4, 128]", 110, {"bf16": 62, "fp4": 30, "fp8": 40})
@torch.no_grad()
def decode(b: Bench) -> None:
    for weights, sizes in DECODE.items():
        if not b.wants(weights):
            continue
        model = build(b, slice_args(b, ALTERNATING), weights)
        for batch, context in sizes[: b.size(4, 1)]:
            label = f"{weights}, B={batch}, {context >> 10}k"
            decode_row(b, model, label, b.size(batch, min(batch, 3)), b.size(context, 160))
        del model
        b.free()
    if b.wants("fp8"):
        decode_million(b)


def decode_row(b: Bench, model: Transformer, label: str, batch: int, context: int) -> None:
    caches(b, model, batch, context)
    step = compile_decode(model, by_graphs(b))
    inputs = step_inputs(b, model, batch, context)
    moved = decode_bytes(model, batch, context)
    sides, other = {"ours": Side(step, True, False)}, None
    short = batch == 1 and context < 8192
    if short:
        sides["ours, eager"] = Side(compile_decode(model, EAGER), graph=False)
    if label == "bf16, B=1, 4k":
        other = twin(model, all_ops("reference"))
        caches(b, other, batch, context)
        for mine, its in zip(model.buffers(), other.buffers(), strict=True):
            its.copy_(mine)
        reference = compile_decode(other, by_graphs(b))
        sides["pure PyTorch, compiled"] = Side(reference, True, False)
        if not b.prepare:
            sides |= transformers_decode(b, model, context)
    row = b.compare(label, sides, inputs, moved=moved)
    if "ms" in row:
        if other is not None:
            exact = against(lambda: compile_decode(other, EAGER)(*inputs[0]))
            errors = exact(step(*inputs[0]))
            row |= {f"{name}_from_references": value for name, value in errors.items()}
        head = decode_head(b, model, label, batch)
        row |= decode_facts(b, model, row, head, step, inputs[0])
    elif b.prepare:
        decode_head(b, model, label, batch)
    if short and not label.startswith("fp8"):
        verify_row(b, model, label, context, inputs, row)


def decode_head(b: Bench, model: Transformer, label: str, batch: int) -> dict:
    """The head by itself, which a slice has as the whole model does."""

    def head(X):
        return model.lm_logits(X, None, "all")

    X = b.normal(batch, 1, model.args.hc_mult, model.args.dim)
    sides = {"ours": b.compiled(head)}
    return b.compare(f"{label}, head", sides, [(X,)], moved=nbytes(model.head.weight))


def decode_facts(
    b: Bench, model: Transformer, row: dict, head: dict, step: Callable, inputs: tuple
) -> dict:
    """Speed per token and layer, waits and launches; the speed of Flash, extrapolated."""
    layers, batch = model.args.n_layers, len(inputs[0])
    head_ms = head.get("ms", 0.0)
    layer_ms = (row["ms"] - head_ms) / layers
    found = b.profile(lambda: step(*inputs))
    return {
        "tokens_per_s": 1e3 * batch / row["ms"],
        "us_per_layer": 1e3 * layer_ms,
        "waits": b.syncs(lambda: step(*inputs)),
        "kernels_per_layer": found and found["kernels"] / layers,
        "host_to_device_copies": found and found["host_to_device"],
        "extrapolated_flash_tokens_per_s": 1e3 * batch / (layer_ms * FLASH_LAYERS + head_ms),
    }


def verify_row(
    b: Bench, model: Transformer, label: str, context: int, inputs: list[tuple], row: dict
) -> None:
    """A step that checks three drafted tokens, beside one that decodes."""
    verify = compile_verify(model, by_graphs(b))
    more = [(b.integers(model.args.vocab_size, 1, VERIFIED), pos) for _, pos in inputs]
    sides = {"ours": Side(verify, True, False)}
    moved = decode_bytes(model, 1, context, VERIFIED)
    checked = b.compare(f"{label}, verify {VERIFIED} tokens", sides, more, moved=moved)
    if "ms" in checked:
        checked["times_a_decoded_token"] = checked["ms"] / row["ms"]


def decode_million(b: Bench) -> None:
    """One CSA layer at a context of a million tokens."""
    model, context = build(b, slice_args(b, (4,))), b.size(1 << 20, 320)
    caches(b, model, 1, context)
    sides = {"ours": Side(compile_decode(model, by_graphs(b)), True, False)}
    inputs, moved = step_inputs(b, model, 1, context), decode_bytes(model, 1, context)
    b.compare("bf16, one CSA layer, B=1, 1024k", sides, inputs, moved=moved)


def transformers_decode(b: Bench, model: Transformer, context: int) -> dict[str, Side]:
    """Transformers' eager decoding, by implementation of its experts; its cache only grows."""
    made = []  # the model and its cache, shared by the sides

    def make():
        if not made:
            hf = transformers_twin(b, model)
            prompt = b.integers(model.args.vocab_size, 1, context - 8)
            made.extend((hf, hf(prompt, use_cache=True).past_key_values))
        return made

    def side(implementation: str) -> Side:
        def call(made, tokens, pos):
            hf, cache = made
            hf.set_experts_implementation(implementation)
            return hf(tokens, past_key_values=cache, use_cache=True).logits

        return lazily(make, call)

    return {f"transformers {name}": side(name) for name in ("eager", "batched_mm", "grouped_mm")}


# --------------------------------------------------------------------------------------------------
# Prefill


def by_default(b: Bench, preset: str = "default") -> CompileConfig:
    return b.size(PRESETS[preset], CompileConfig(backend="eager"))


@case("G3", "prefill, 4 layers of Flash [4, 128, 4, 128]", 45, 62)
@torch.no_grad()
def prefill(b: Bench) -> None:
    model = build(b, slice_args(b, ALTERNATING))
    for S in (4096, 8192, 16384)[: b.size(3, 1)]:
        prefill_row(b, model, f"{S} tokens", b.size(S, 160))


def prefill_row(b: Bench, model: Transformer, label: str, S: int) -> None:
    caches(b, model, 1, S)
    start = torch.zeros(1, dtype=torch.int64, device=b.device)

    def prefilled(model: Transformer, preset: CompileConfig) -> Callable:
        call = compile_prefill(model, preset)
        return lambda tokens: call(tokens, start, None)

    ours = prefilled(model, by_default(b))
    sides = {
        "ours": Side(ours, True, False),
        "ours, eager": Side(prefilled(model, EAGER), graph=False),
    }
    if label == "4096 tokens":
        other = twin(model, all_ops("reference"))
        caches(b, other, 1, S)
        sides["pure PyTorch, compiled"] = Side(prefilled(other, by_default(b)), True, False)

        def theirs(hf, tokens):
            hf.set_experts_implementation("grouped_mm")
            return hf(tokens, use_cache=True, logits_to_keep=1).logits

        sides["transformers grouped_mm"] = lazily(lambda: transformers_twin(b, model), theirs)
    total_flops = flops(model, S)
    prompts = [(b.integers(model.args.vocab_size, 1, S),) for _ in range(2)]
    row = b.compare(label, sides, prompts, flops=total_flops)
    if "ms" in row:
        prompt = b.integers(model.args.vocab_size, 1, S)
        row |= {
            "tokens_per_s": 1e3 * S / row["ms"],
            "gflop_per_token": total_flops / S / 1e9,
            "shares": shares(b.profile(lambda: ours(prompt))),
        }


# --------------------------------------------------------------------------------------------------
# Training


def trained(b: Bench, model: Transformer, preset: CompileConfig) -> Side:
    """A training step with AdamW, moments in the dtype of the parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rate = torch.tensor(1e-4, device=b.device)
    step = compile_train_step(model.train(), optimizer, preset)

    def call(tokens, labels, doc_ids):
        with torch.enable_grad():
            return step(tokens, labels, doc_ids, rate)["loss"]

    return Side(call, True, False)


TRAIN = {  # label -> compression ratios, tokens, preset
    "4 layers [0, 0, 4, 128], 12288 tokens": ((0, 0, 4, 128), 12288, "default"),
    "8 layers [0, 0, 4, 128, 4, 128, 4, 0], 4096 tokens": (
        (0, 0, 4, 128, 4, 128, 4, 0),
        4096,
        "regional",
    ),
}
TRAIN_GIGABYTES = dict(zip(TRAIN, (70, 90), strict=True))


@case(
    "G4",
    "training steps, 32 experts (what one of 8 GPUs holds), no communication",
    90,
    TRAIN_GIGABYTES,
)
def train(b: Bench) -> None:
    for label, (ratios, S, preset) in TRAIN.items():
        if b.wants(label):
            train_row(b, label, ratios, b.size(S, 160), by_default(b, preset))
            b.free()
    if b.wants(next(iter(TRAIN))):
        short(b)


def train_row(b: Bench, label: str, ratios: tuple[int, ...], S: int, preset: CompileConfig) -> None:
    model = build(b, slice_args(b, ratios, 32))
    inputs = []
    for _ in range(2):
        tokens = b.integers(model.args.vocab_size, 1, S + 1)
        labels = tokens[:, 1:].contiguous()
        inputs.append((tokens[:, :-1].contiguous(), labels, torch.zeros_like(labels)))
    total_flops, side = 3 * flops(model, S), trained(b, model, preset)
    sides = {"ours": side}
    if len(ratios) == 4:
        modes = {n: "reference" if n.startswith("hc_") else "opaque" for n in MODEL_OPS}
        sides["hyper-connections off"] = trained(b, twin(model, modes), preset)
    row = b.compare(label, sides, inputs, flops=total_flops)
    if "ms" in row:
        found = b.profile(lambda: side.call(*inputs[0]))
        row |= {
            "tokens_per_s": 1e3 * S / row["ms"],
            "gflop_per_token": total_flops / S / 1e9,
            "kernels": found and found["kernels"],
            "shares": shares(found),
            "peak_gb": None if b.toy else torch.cuda.max_memory_allocated() / 1e9,
            "loss": float(side.call(*inputs[0])),
        }


class NoOptimizer:
    """Drops the gradients."""

    def __init__(self, model: Transformer):
        self.model = model

    def step(self, lr, load):
        self.model.zero_grad(set_to_none=True)


def short(b: Bench) -> None:
    """Forward and backward of 4 layers beside Transformers and the ops' references."""
    S = b.size(4096, 160)
    model = build(b, slice_args(b, (0, 0, 4, 128), 32))
    inputs = [(b.integers(model.args.vocab_size, 1, S + 1),) for _ in range(2)]

    def ours(model):
        step = compile_train_step(model.train(), NoOptimizer(model), by_default(b))

        def call(tokens):
            with torch.enable_grad():
                inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
                return step(inputs, labels, None, None)["loss"]

        return Side(call, True, False)

    def theirs(hf, tokens):
        hf.set_experts_implementation("grouped_mm")
        with torch.enable_grad():
            logits = hf(tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
        hf.zero_grad(set_to_none=True)
        return loss.detach()

    sides = {
        "ours": ours(model),
        "pure PyTorch, compiled": ours(twin(model, all_ops("reference"))),
        "transformers grouped_mm": lazily(lambda: transformers_twin(b, model), theirs),
    }
    label = "4 layers [0, 0, 4, 128], 4096 tokens, forward and backward"
    row = b.compare(label, sides, inputs, flops=3 * flops(model, S))
    if "ms" in row:
        row["tokens_per_s"] = 1e3 * S / row["ms"]


# --------------------------------------------------------------------------------------------------
# Compilation, waiting


@case("G5", "graphs and recompiles; host time under offload", 30, 20)
def compilation(b: Bench) -> None:
    model = build(b, ModelArgs.debug() if b.toy else ModelArgs.tiny())
    b.rows["training over 32 layouts"] = layouts(b, model)
    b.rows["prefill over 32 positions and lengths"] = positions(b, model)
    offload(b)


def counted(count: CompileCount) -> dict[str, int]:
    return {"graphs": count.graphs, "breaks": count.breaks, "recompiles": count.recompiles}


def layouts(b: Bench, model: Transformer) -> dict[str, int]:
    """Training where valid tokens, documents and their lengths differ from call to call."""
    S = b.size(256, 24)
    count = CompileCount()
    vocab_size = model.args.vocab_size
    side = trained(b, model, by_default(b))
    t = torch.arange(S, device=b.device)
    for i in range(b.size(32, 3)):
        docs = (t // (3 + 7 * i)).clamp(max=i)[None].masked_fill(t >= S - i, -1)
        side.call(b.integers(vocab_size, 1, S), b.integers(vocab_size, 1, S), docs)
        if i == 0:
            count.warm()
    return counted(count)


def positions(b: Bench, model: Transformer) -> dict[str, int]:
    model.eval().setup_caches(1, b.size(2048, 64))
    feed = compile_prefill(model, by_default(b))
    count = CompileCount()
    chunk = b.size(64, 8)
    for i in range(b.size(32, 3)):
        tokens = b.integers(model.args.vocab_size, 1, chunk)
        position, length = (torch.full((1,), n, device=b.device) for n in (i, 1 + i % chunk))
        feed(tokens, position, length)
        if i == 0:
            count.warm()
    return counted(count)


@torch.no_grad()
def offload(b: Bench) -> None:
    """Host time of a compressor and an indexer while 2 x 200 MB are being copied to the host.

    Also with .item(), as in the published code, which read a length back behind the copies.
    """
    model, S = build(b, slice_args(b, (4,), 8)), b.size(8192, 96)
    attn = model.layers[0].attn
    _, plan = model.prepare(b.integers(model.args.vocab_size, 1, S), {4}, None, None, None)
    x, qr = b.normal(1, S, model.args.dim), b.normal(1, S, model.args.q_lora_rank)

    def compressed(x, qr):
        return attn.compressor(x, plan), attn.indexer(x, qr, plan)

    call = b.compiled(compressed).call
    call(x, qr)
    if b.prepare:
        return
    size = b.size(100_000_000, 1000)
    copies = [
        (b.normal(size), torch.empty(size, dtype=torch.bfloat16, pin_memory=not b.toy))
        for _ in range(2)
    ]
    stream = None if b.toy else torch.cuda.Stream()

    def median_us(function: Callable) -> float:
        """Of the host's time in function() while the copies are under way."""
        times = []
        for _ in range(b.size(20, 2)):
            b.sync()
            with torch.cuda.stream(stream) if stream else torch.no_grad():
                for source, target in copies:
                    target.copy_(source, non_blocking=True)
            begun = time.perf_counter()
            function()
            times.append(1e6 * (time.perf_counter() - begun))
        b.sync()
        return sorted(times)[len(times) // 2]

    def without_item():
        return call(x, qr)

    def with_item():
        _, chosen = call(x, qr)
        if stream:
            torch.cuda.current_stream().wait_stream(stream)
        return chosen.max().item()

    b.rows["host time under offload"] = {
        "us": median_us(without_item),
        "us_with_item": median_us(with_item),
        "waits": b.syncs(without_item),
    }
