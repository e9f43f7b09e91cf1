"""Flash and Pro at production shapes, on fake tensors: one graph, our ops, memory, FLOPs.

Prefill and training of 8192 tokens, and decode in a context of 1M. One layer of each kind stands
for all of its kind; the full depth is traced for Flash's decode, and for the rest under `-m full`.
"""

from __future__ import annotations

import pytest

from model import ModelArgs
from tools.capture import MODEL_OPS, Shape, capture_fake, flops_of
from tools.report import NAMED, report_phase

pytestmark = pytest.mark.compile
MODELS, PHASES = ("flash", "pro"), ("prefill", "decode", "train")
CASES = [(model, phase) for model in MODELS for phase in PHASES]
# By hand, from docs/v4.md#dimensions: no MTP block, nothing computed again, causal averages
GFLOP_PER_TOKEN = {
    ("flash", "prefill"): 27.9,
    ("flash", "decode"): 141.4,
    ("flash", "train"): 86.8,
    ("pro", "prefill"): 104.7,
    ("pro", "decode"): 304.8,
    ("pro", "train"): 319.8,
}


@pytest.fixture(scope="module")
def reports() -> dict:
    return {case: report_phase(NAMED[case[0]](), case[1]) for case in CASES}


@pytest.mark.parametrize("model, phase", CASES)
def test_production_shapes_are_one_graph_of_exactly_our_ops(reports, model, phase):
    got, args = reports[model, phase], NAMED[model]()
    assert (got["graphs"], got["breaks"], got["faults"]) == (1, 0, [])
    ratios, train = args.compress_ratios, phase == "train"
    blocks = args.n_layers + train  # the MTP block is trained
    csa, compressed = ratios.count(4), sum(ratio > 0 for ratio in ratios)
    expected = {
        "sparse_attn": blocks,
        "hc_pre": blocks,
        "hc_post_pre": blocks,
        "hc_post": blocks,
        "moe": blocks,
        "compress": compressed + csa,
        "indexer_topk": csa,
        "rope": blocks + csa,
        # routers, both halves of the rows of compressors, and where there are logits the head
        "linear_fp32": blocks + 2 * (compressed + csa) + (not train),
    }
    if train:
        backward = {
            f"{name}_backward": expected[name]
            for name in ("sparse_attn", "hc_pre", "hc_post_pre", "hc_post", "moe")
        }
        # the language-model loss does not reach the indexer; rope is its own backward
        expected |= backward | {
            "compress_backward": compressed,
            "linear_fp32_backward": blocks + 2 * compressed,
            "linear_cross_entropy": 2,
            "linear_cross_entropy_backward": 2,
            "rope": 2 * blocks + csa,
        }
    assert got["opaque"] == {f"dsv4.{name}": n for name, n in sorted(expected.items())}


@pytest.mark.parametrize("model, phase", CASES)
def test_the_largest_value_is_bounded(reports, model, phase):
    """No query x key x dim, no scores of all heads."""
    got, args = reports[model, phase], NAMED[model]()
    bound = (
        args.index_n_heads * args.max_seq_len // 4 * 4
        if phase == "decode"
        else 1.1 * 8192 * args.n_heads * args.head_dim * 2
    )
    assert 0 < got["largest_bytes"] <= bound, got["largest"]


@pytest.mark.parametrize("model, phase", CASES)
def test_flops_are_those_of_the_roofline(reports, model, phase):
    got = reports[model, phase]
    needed, counted = got["needed_flops_per_token"] / 1e9, got["flops_per_token"] / 1e9
    assert abs(needed / GFLOP_PER_TOKEN[model, phase] - 1) < 0.02, needed
    if phase == "decode":  # the token at the end of a full cache sees all of it
        assert needed == counted
    else:
        assert needed < counted


def test_flops_of_opaque_ops_equal_those_of_their_traced_references():
    """One token that sees everything: nothing is masked, so that both count the same pairs.

    Each op alone is held to equality in tests/ops; here padding of the chosen entries makes up
    the rest.
    """
    args, count = ModelArgs.debug(), {}
    for form in ("opaque", "reference"):
        forms = {name: form for name in MODEL_OPS} | {"moe": "opaque"}
        captured, _ = capture_fake(args, "decode", Shape(1, 1, 256), forms)
        count[form] = sum(flops_of(node) for node in captured.calls())
    assert abs(count["opaque"] / count["reference"] - 1) < 0.02, count


def test_one_layer_of_each_kind_stands_for_all():
    """The embedded depth, traced in full and extrapolated, has the same operators and FLOPs."""
    args = ModelArgs.tiny()
    args.n_layers, args.compress_ratios = 14, (0, 0, *(4, 128) * 6, 0)
    args.__post_init__()
    full, part = (report_phase(args, "decode", full=full) for full in (True, False))
    assert part["captured_layers"] == 3 and full["captured_layers"] == 14
    part_train, full_train = (report_phase(args, "train", full=full) for full in (False, True))
    assert abs(part_train["saved_bytes"] / full_train["saved_bytes"] - 1) < 1e-3
    for key in ("opaque", "flops", "largest_bytes"):
        assert part[key] == full[key], key
    # Nodes that layers share are counted once.
    assert abs(part["operators"] / full["operators"] - 1) < 0.03


@pytest.mark.parametrize("model", MODELS)
def test_training_saves_no_more_than_it_must(reports, model):
    """8192 tokens. A block saves its streams twice, queries and outputs of all heads, and inputs of
    its linears and norms that come to three streams; before and after the blocks it is
    ten streams, the fp32 ones of the heads above all."""
    args, kept = NAMED[model](), reports[model, "train"]["saved_bytes"]
    streams = 8192 * args.hc_mult * args.dim * 2
    queries = 8192 * args.n_heads * args.head_dim * 2
    bound = (args.n_layers + args.n_mtp_layers) * (5.2 * streams + 2 * queries) + 10 * streams
    assert 0.9 * bound < kept <= bound, (kept / 1e9, bound / 1e9)


def full_depth(model: str, phase: str) -> None:
    args = NAMED[model]()
    got, part = report_phase(args, phase, full=True), report_phase(args, phase)
    assert (got["graphs"], got["breaks"], got["faults"], got["captured_layers"]) == (
        1,
        0,
        [],
        args.n_layers,
    )
    assert got["opaque"] == part["opaque"] and abs(got["flops"] / part["flops"] - 1) < 1e-3


def test_flash_decode_at_full_depth_is_one_graph():
    full_depth("flash", "decode")


@pytest.mark.slow
@pytest.mark.parametrize("model, phase", [case for case in CASES if case != ("flash", "decode")])
def test_full_depth_is_one_graph(model, phase):
    full_depth(model, phase)
