"""The model equals Transformers' deepseek_v4 in fp32, and needs each component for that."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ops
from model import ModelArgs, Transformer, layer_frequencies, quantize_kv
from ops.formats import fake_quant
from ops.registry import Table
from testing import (
    Margins,
    clear_choices,
    hf_model,
    hf_name,
    random_model,
    random_tokens,
    rms,
    small,
)

TOLERANCE = 1e-5  # relative RMS; two independent fp32 implementations agree to a few 1e-6
LENGTHS = (1, 3, 4, 5, 127, 128, 129, 131, 255, 257, 513, 1030)
CONFIGS = {
    "flash-like": small(swiglu_limit=1.5),  # ratios 0, 4, 128, 4; the limit is low enough to bite
    "pro-like": small(
        n_layers=5,
        n_hash_layers=3,
        compress_ratios=(128, 128, 4, 128, 4, 0),
        route_scale=2.5,
        index_topk=8,
    ),
    "no-yarn": small(
        original_seq_len=0,
        n_hash_layers=0,
        n_layers=3,
        compress_ratios=(4, 0, 128, 0),
        hc_mult=2,
        o_groups=4,
    ),
}


@functools.cache
def pair(config: str):
    """Our model and Transformers', with the same weights."""
    model = random_model(CONFIGS[config])
    return model, hf_model(model)


def prompt(config: str, length: int, batch: int = 1) -> torch.Tensor:
    """The beginning of a fixed random text on which this config's choices are clear."""
    text = random_tokens(2, 1030, seed={"no-yarn": 1}.get(config, 0))
    return text[:batch, :length]


@functools.cache
@torch.no_grad()
def reference(config: str, length: int, batch: int = 1):
    """The prompt, Transformers' logits, and the positions [B, S] whose choices are clear."""
    tokens = prompt(config, length, batch)
    hf = pair(config)[1]
    with Margins(hf) as margins:
        logits = hf(tokens).logits
    return tokens, logits, clear_choices(margins.smallest())


COMPARED = {}  # case -> (compared, all) positions; a later test looks at the sum


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_equal_transformers(config, length):
    tokens, expected, ok = reference(config, length, batch=2)
    with torch.no_grad():
        logits = pair(config)[0](tokens)
    COMPARED[config, length] = int(ok.sum()), ok.numel()
    assert rms(logits[ok], expected[ok]) <= TOLERANCE


@pytest.mark.parametrize("config", CONFIGS)
def test_200_decoded_tokens_equal_transformers_decoding(config):
    """Prefill, then token by token through both caches; and as Transformers' single forward."""
    model, hf = pair(config)
    tokens, whole, _ = reference(config, 330, batch=2)
    model.setup_caches(2, 512)
    with torch.no_grad(), Margins(hf) as margins:
        cached = hf(tokens[:, :130], use_cache=True)
        cache = cached.past_key_values
        theirs = [cached.logits]
        ours = [model(tokens[:, :130], torch.zeros(2, dtype=torch.int64))]
        gaps = [margins.smallest()]
        for t in range(130, 330):
            margins.gaps.clear()
            theirs.append(hf(tokens[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
            gaps.append(margins.smallest())
            ours.append(model(tokens[:, t : t + 1], torch.full((2,), t)))
    ok = clear_choices(torch.cat(gaps, 1))
    COMPARED[config, "decode"] = int(ok.sum()), ok.numel()
    ours, theirs = torch.cat(ours, 1), torch.cat(theirs, 1)
    assert rms(ours[ok], theirs[ok]) <= TOLERANCE
    assert torch.equal(ours.argmax(-1)[ok], theirs.argmax(-1)[ok])
    assert rms(ours[ok], whole[ok]) <= TOLERANCE


def test_at_least_nine_tenths_of_the_positions_were_compared():
    """Otherwise the tests above would say little. Runs after them (the file runs in order)."""
    if len(COMPARED) < len(CONFIGS) * (len(LENGTHS) + 1):
        pytest.skip("only some cases were run")
    compared = sum(some for some, _ in COMPARED.values())
    assert compared >= 0.9 * sum(total for _, total in COMPARED.values())


@pytest.mark.parametrize("form", ("reference", "opaque"))
@pytest.mark.parametrize("config", CONFIGS)
def test_loss_and_every_gradient_equal_transformers(config, form):
    origin, hf = pair(config)
    tokens, _, ok = reference(config, 300)
    assert ok.all(), "choose a seed whose choices are clear"
    model = Transformer(origin.args, ops={name: form for name in ops.OPS})
    model.load_state_dict(origin.state_dict())

    hf.zero_grad()
    expected = hf(tokens, labels=tokens).loss
    expected.backward()
    _, hidden = model(tokens, logits=None, return_hidden=True)
    x = model.head_input(hidden[:, :-1]).flatten(0, 1)
    loss = model.ops.linear_cross_entropy(x, model.head.weight, tokens[:, 1:].flatten()).mean()
    loss.backward()

    assert abs(loss.item() / expected.item() - 1) <= TOLERANCE
    theirs = dict(hf.named_parameters())
    for name, p in model.named_parameters():
        if name.startswith("mtp.") or name.endswith("gate.bias"):
            continue  # Transformers drops MTP; the bias only selects
        grad = theirs[hf_name(name)].grad
        if ".indexer." in name:
            # The choice is discrete (docs/v4.md#indexer).
            assert p.grad is None and (grad is None or not grad.any()), name
        else:
            assert (p.grad - grad).norm() <= 1e-4 * grad.norm() and grad.norm() > 0, name


# --------------------------------------------------------------------------------------------------
# Ablation: distort one component, and parity must be gone


def segments(name: str, p: torch.Tensor, n: int):
    """The parts of a parameter that are components: pre, post and comb of a hyper-connection."""
    if "hc_head" in name or "hc_" not in name:
        return {"": slice(None)}
    if name.endswith("_scale"):
        return {"pre": slice(0, 1), "post": slice(1, 2), "comb": slice(2, 3)}
    return {"pre": slice(0, n), "post": slice(n, 2 * n), "comb": slice(2 * n, None)}


def ablations():
    model = random_model(CONFIGS["flash-like"])
    for name, p in model.named_parameters():
        if not name.startswith("mtp."):
            yield from ((name, part) for part in segments(name, p, model.args.hc_mult))


@torch.no_grad()
def distorted_by(change) -> float:
    """Relative RMS from Transformers after change(model) on a copy of the weights."""
    tokens, expected, ok = reference("flash-like", 300)
    assert ok.all()
    model = copy.deepcopy(pair("flash-like")[0])
    model = change(model) or model
    return rms(model(tokens), expected)


@pytest.mark.parametrize("name, part", list(ablations()))
def test_no_parameter_can_be_lost(name, part):
    def change(model):
        p = model.get_parameter(name)
        segment = p[segments(name, p, model.args.hc_mult)[part]]
        segment.copy_(segment.flip(0) if "norm" in name else torch.zeros_like(segment))

    moved = distorted_by(change)
    if name.startswith("layers.0.hc_attn") and part != "post":
        # The streams are still equal: a norm undoes pre, unit column sums undo comb.
        assert moved <= TOLERANCE
    else:
        assert moved > 10 * TOLERANCE


FIELDS = dict(
    rope_theta=20000.0,
    compress_rope_theta=10000.0,
    original_seq_len=0,
    rope_factor=8.0,
    beta_fast=16.0,
    swiglu_limit=10.0,
    route_scale=1.0,
    hc_sinkhorn_iters=2,
    index_topk=15,
    window_size=127,
    n_activated_experts=1,
)


@pytest.mark.parametrize("field", FIELDS)
def test_no_architecture_field_is_ignored(field):
    def change(model):
        other = Transformer(small(**{"swiglu_limit": 1.5, field: FIELDS[field]}))
        state = model.state_dict()
        if field == "n_activated_experts":
            state = {k: v[:, :1] if "tid2eid" in k else v for k, v in state.items()}
        other.load_state_dict(state)
        return other

    assert distorted_by(change) > 10 * TOLERANCE


def roll_hash_routes(model):
    model.layers[0].ffn.gate.tid2eid.copy_(model.layers[0].ffn.gate.tid2eid.roll(1, 0))


def swap_compressor_lanes(model):
    w = model.layers[1].attn.compressor.wkv.weight
    w.copy_(w.roll(len(w) // 2, 0))


def skip_inverse_rope(model):
    def sparse_attn(op, q, kv, sink, window_len, cos, sin, *rest):
        out = op(q, kv, sink, window_len, cos, sin, *rest)
        return ops.rope(out, cos, sin, False)  # rotates forward again

    replace_op(model, "sparse_attn", sparse_attn)


def transpose_comb(model):
    def hc_post(op, y, x, post, comb):
        return op(y, x, post, comb.transpose(2, 3))

    replace_op(model, "hc_post", hc_post)


def replace_op(model, name, wrapper):
    """Modules call wrapper(op, *args) in place of op(*args)."""
    for module in model.modules():
        if hasattr(module, "ops"):
            wrapped = functools.partial(wrapper, getattr(module.ops, name))
            module.ops = SimpleNamespace(**{**vars(module.ops), name: wrapped})


@pytest.mark.parametrize(
    "change", (roll_hash_routes, swap_compressor_lanes, skip_inverse_rope, transpose_comb)
)
def test_no_structural_detail_is_ignored(change):
    assert distorted_by(change) > 10 * TOLERANCE


def test_query_heads_are_normalised():
    """Doubling the projection of a head changes nothing."""

    def double(model):
        model.layers[0].attn.wq_b.weight[: model.args.head_dim].mul_(2)

    assert distorted_by(double) <= TOLERANCE


# --------------------------------------------------------------------------------------------------
# Small facts of the specification


def test_rope_frequencies_equal_the_published_values():
    f = layer_frequencies(ModelArgs.flash())[1]
    expected = {
        0: 1.0,
        1: 0.687656022,
        15: 0.00363553858,
        16: 0.002265625,
        20: 2.96977780e-4,
        24: 1.953125e-5,
        25: 5.37231267e-6,
        31: 5.68052904e-7,
    }
    for i, value in expected.items():
        assert abs(float(f[i]) / value - 1) < 1e-6, i
    plain = layer_frequencies(ModelArgs.flash())[0]
    assert torch.allclose(plain, 10000.0 ** (-torch.arange(32) / 32.0), rtol=1e-6)


def test_keys_are_quantised_but_for_their_rotated_dims():
    args = small(head_dim=48)  # 32 + 16
    kv = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(0))
    nope, rope = quantize_kv(args, Table(None), kv).split((32, 16), -1)
    assert torch.equal(rope, kv[..., 32:])
    assert torch.equal(nope, fake_quant(kv[..., :32], 64, "fp8"))


@torch.no_grad()
def test_activations_are_quantised_where_the_specification_says():
    """The op's calls in each kind of layer, by width, block and format."""
    args = small(n_mtp_layers=0, compress_ratios=(0, 4, 128, 4), act_quant=True)
    model, points = random_model(args), []

    def note(op, x, block, fmt):
        points.append((x.shape[-1], block, fmt))
        return op(x, block, fmt)

    replace_op(model, "act_quant", note)
    _, plan, X = model.embed_inputs(random_tokens(1, 130))
    keys = (args.head_dim - args.rope_head_dim, 64, "fp8")
    indexer = (args.index_head_dim, 32, "fp4")
    linears = [(args.dim, 128, "fp8")] * 4  # wq_a, wkv; w1, w3 of the shared expert
    linears += [(args.q_lora_rank, 128, "fp8"), (args.o_groups * args.o_lora_rank, 128, "fp8")]
    linears += [(args.moe_inter_dim, 128, "fp8")]  # wq_b, wo_b; w2
    found = {}
    for block in model.layers[:3]:
        points.clear()
        block(X, random_tokens(1, 130), plan)
        found[block.attn.ratio] = sorted(points)
    assert found[0] == sorted([*linears, keys])
    assert found[128] == sorted([*linears, keys, keys])  # of the window; entries
    index_queries = (args.q_lora_rank, 128, "fp8")
    assert found[4] == sorted([*linears, keys, keys, index_queries, indexer, indexer])


def test_router_scores_equal_the_published_values():
    model = Transformer(small())
    gate = model.layers[3].ffn.gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = torch.tensor([-3.0, -1, 0, 1, 3, -9, -9, -9])
        gate.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 9, 9, 0]))
        x = F.pad(torch.ones(1, 1), (0, model.args.dim - 1))
        chosen, weight, _ = gate(x, torch.zeros(1, dtype=torch.int64))
        assert set(chosen[0].tolist()) == {5, 6}  # the bias selects
        # And does not weigh.
        assert torch.allclose(weight, torch.full((1, 2), model.args.route_scale / 2))
        gate.bias.zero_()
        chosen, weight, _ = gate(x, torch.zeros(1, dtype=torch.int64))
    score = {3: 1.1459763, 4: 1.7460204}
    for e, w in zip(chosen[0].tolist(), weight[0].tolist(), strict=True):
        expected = model.args.route_scale * score[e] / sum(score.values())
        assert abs(w / expected - 1) < 1e-6


def test_bf16_model_keeps_the_fp32_islands():
    """Casting leaves RoPE frequencies exact, bf16 logits near fp32 ones where nothing is chosen."""
    model = random_model(small(n_hash_layers=4, index_topk=512), seed=2)
    tokens = prompt("flash-like", 200)
    with torch.no_grad():
        expected = model(tokens)
        freqs = model.freqs.clone()
        low = model.to(torch.bfloat16)
        assert torch.equal(low.freqs, freqs) and low.freqs.dtype == torch.float32
        logits = low(tokens)
    assert logits.dtype == torch.float32 and 1e-4 < rms(logits, expected) < 0.1
