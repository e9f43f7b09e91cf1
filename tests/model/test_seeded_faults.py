"""The default run catches plausible one-line faults: signs, indices, masks, axes, off by one.

Each is seeded into a copy of the project, where a test of the default run fails. What
torch.compile makes of faults is in tests/compile/test_compile_faults.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from seeding import ROOT, copy_project, occurrences, replace_once, run_test
from tiers import FULL


class Fault(NamedTuple):
    """In `file`, `old` becomes `new`; then `test` fails."""

    file: str
    old: str
    new: str
    test: str


CACHE, CONFIG, MTP, PACKING, PARITY, TRAINING = (
    f"tests/model/test_model_{name}.py::test_"
    for name in ("cache", "config", "mtp", "packing", "parity", "training")
)
CHECKPOINT, DATASET, GENERATE, OPTIM, PARALLEL, TRAIN_STEP = (
    f"tests/cli/test_{name}.py::test_"
    for name in ("checkpoint", "dataset", "generate", "optim", "parallel", "train_step")
)
SPEC = "tests/ops/test_contract.py::test_reference_matches_the_spec"
OPAQUE = "tests/ops/test_contract.py::test_opaque_equals_reference"
CPP = "tests/ops/test_cpp.py::test_cpp_kernels_equal_their_references"

MODEL = {
    "a window one key too long": Fault(
        "model.py",
        "window_len = (pos + 1).clamp(max=args.window_size)",
        "window_len = (pos + 2).clamp(max=args.window_size)",
        PARITY + "logits_equal_transformers[flash-like-5]",
    ),
    "an entry that is seen a token late": Fault(
        "model.py",
        "Windows(end + config.lookback(R), index, slot, pos % R, lo, lo + (pos + 1) // R, *angles)",
        "Windows(end + config.lookback(R), index, slot, pos % R, lo, lo + pos // R, *angles)",
        CACHE + "caches_set_up_in_inference_mode_serve_any_mode",
    ),
    "entries of the document before": Fault(
        "model.py",
        "lo = (col - pos + R - 1) // R",
        "lo = (col - pos) // R",
        PACKING + "packed_documents_equal_the_documents_alone[many-pad0-reference]",
    ),
    "a next token from the document after": Fault(
        "model.py",
        "F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (0, 1), value=True)",
        "F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (1, 0), value=True)",
        PACKING + "no_gradient_crosses_documents[reference]",
    ),
    "a ring that drops the first token of a call": Fault(
        "model.py",
        "slot = torch.where(col >= 0, (pos + col) % slots, slots)",
        "slot = torch.where(col > 0, (pos + col) % slots, slots)",
        CACHE + "caches_set_up_in_inference_mode_serve_any_mode",
    ),
    "a router's bias with the wrong sign": Fault(
        "model.py",
        "biased = score.detach() + self.bias.float()",
        "biased = score.detach() - self.bias.float()",
        PARITY + "logits_equal_transformers[flash-like-5]",
    ),
    "rotated dims of keys that are quantised, and no others": Fault(
        "model.py",
        'return torch.cat([ops.act_quant(nope, 64, "fp8"), rope], -1)',
        'return torch.cat([nope, ops.act_quant(rope, 64, "fp8")], -1)',
        PARITY + "keys_are_quantised_but_for_their_rotated_dims",
    ),
    "index queries rotated backwards": Fault(
        "model.py",
        "q = self.ops.rope(q, *plan.rope[True], False)",
        "q = self.ops.rope(q, *plan.rope[True], True)",
        PARITY + "logits_equal_transformers[flash-like-127]",
    ),
    "an index loss that reaches the model": Fault(
        "model.py",
        "index = self.indexer(x.detach(), qr.detach(), plan)",
        "index = self.indexer(x, qr.detach(), plan)",
        TRAINING + "the_indexers_objective_moves_the_indexers_alone",
    ),
    "logits of the token after the last": Fault(
        "model.py",
        "return X[plan.row, (plan.lengths[:, None] - 1).clamp(min=0)]",
        "return X[plan.row, plan.lengths[:, None].clamp(max=X.shape[1] - 1)]",
        CACHE + "logits_last_none_and_hidden",
    ),
}
CHECKPOINTS = {
    "a slice that takes the ratio of the wrong MTP block": Fault(
        "checkpoint.py",
        "compress_ratios=ratios[:kept] + ratios[total : total + n_mtp],",
        "compress_ratios=ratios[: kept + n_mtp],",
        CHECKPOINT + "layers_takes_the_first_layers_and_the_mtp_block",
    ),
    "W3 stored as W1": Fault(
        "tools/released_layout.py",
        "w1, w3 = matrix.chunk(2)",
        "w3, w1 = matrix.chunk(2)",
        CHECKPOINT + "bytes_mean_what_the_specification_says[dequant]",
    ),
    "the first scales for all rows": Fault(
        "checkpoint.py",
        "scale_row = scale[start // BLOCK : start // BLOCK + 1]",
        "scale_row = scale[:1]",
        CHECKPOINT + "quantised_round_trip_is_the_quantiser_exactly[dtype0-fp8-fp8-partial blocks]",
    ),
    "one MTP block too few": Fault(
        "config.py",
        'fields.setdefault("n_mtp_layers", len(ratios) - n_layers)',
        'fields.setdefault("n_mtp_layers", len(ratios) - n_layers - 1)',
        CONFIG + "released_configs_are_read[config2-expected2]",
    ),
    "shards without a limit": Fault(
        "tools/safetensors_folder.py",
        "room -= info.nbytes",
        "room -= 0",
        CHECKPOINT + "files_can_be_mapped_and_shards_keep_to_their_size",
    ),
}
GENERATION = {
    "a prompt whose last token is not fed": Fault(
        "generation/engine.py",
        "pairs = zip(cached, prompt[:-1], strict=False)",
        "pairs = zip(cached, prompt, strict=False)",
        GENERATE + "a_stream_starts_with_its_first_token",
    ),
    "a high-water mark that falls": Fault(
        "generation/engine.py",
        "self.high_water[row] = max(self.high_water[row], min(end, self.max_seq_len))",
        "self.high_water[row] = min(end, self.max_seq_len)",
        GENERATE + "rewinding_again_and_again_stays_within_what_the_caches_hold",
    ),
    "top-p that leaves out the token which reaches p": Fault(
        "generation/sampling.py",
        "above = p.cumsum(-1) - p",
        "above = p.cumsum(-1)",
        GENERATE + "sampling_follows_the_softmax[1.0-None-0.7]",
    ),
    "noise that is one of prompt and position together": Fault(
        "generation/sampling.py",
        "h = _mix(_mix(h ^ prompt) ^ pos)",
        "h = _mix(_mix(h ^ prompt ^ pos))",
        GENERATE + "noise_depends_on_seed_prompt_and_position",
    ),
    "a context that ends a token late": Fault(
        "generation/session.py",
        "elif len(self.prompts[row]) + len(tokens) == self.engine.max_seq_len:",
        "elif len(self.prompts[row]) + len(tokens) > self.engine.max_seq_len:",
        GENERATE + "the_context_ends_generation",
    ),
    "the share of experts that no token chooses": Fault(
        "generate.py",
        "chosen = 1 - (1 - args.n_activated_experts / args.n_routed_experts) ** rows",
        "chosen = (1 - args.n_activated_experts / args.n_routed_experts) ** rows",
        GENERATE + "a_step_reads_the_experts_that_its_tokens_choose",
    ),
}
TRAINING_RUN = {
    "an MTP label where the row ends": Fault(
        "training/losses.py",
        "mtp_labels = F.pad(labels[:, 1:], (0, 1), value=-1)",
        "mtp_labels = F.pad(labels[:, 1:], (0, 1), value=0)",
        TRAINING + "targets_are_shifted_and_counted",
    ),
    "an MTP loss divided by the count of another": Fault(
        "training/losses.py",
        'parts["mtp_loss"] = mtp_loss / counts[1]',
        'parts["mtp_loss"] = mtp_loss / counts[0]',
        TRAINING + "losses_are_means_over_their_own_labels",
    ),
    "a router's bias that follows the load": Fault(
        "training/optim.py",
        "(row.mean() - row).sign()",
        "(row - row.mean()).sign()",
        OPTIM + "router_biases_follow_the_load",
    ),
    "a document that begins a token early": Fault(
        "training/dataset.py",
        "(tokens == bos).cumsum(1)",
        "(targets == bos).cumsum(1)",
        DATASET + "documents_are_set_apart_and_their_ends_have_no_target",
    ),
    "an epoch of a row too many": Fault(
        "training/dataset.py",
        "self.per_epoch = (len(ids) - length) // length",
        "self.per_epoch = len(ids) // length",
        DATASET + "an_epoch_takes_every_row_once[1000-33]",
    ),
    "a rate that begins to fall at once": Fault(
        "training/stages.py",
        "math.cos(math.pi * max(0.0, 2 * done - 1))",
        "math.cos(math.pi * max(0.0, done))",
        TRAIN_STEP + "the_rate_warms_up_and_decays",
    ),
}
OPERATORS = {
    "a window that reaches one key further back": Fault(
        "ops/sparse_attn_reference.py",
        "(j <= own[:, None] - chunk.window_len[..., None])",
        "(j < own[:, None] - chunk.window_len[..., None])",
        SPEC + "[sparse_attn-3-5-8-window]",
    ),
    "a sink's gradient with the wrong sign": Fault(
        "ops/sparse_attn_reference.py",
        "return -((sink.float() - lse).exp() * delta)",
        "return ((sink.float() - lse).exp() * delta)",
        OPAQUE + "[sparse_attn-3-5-8-window]",
    ),
    "a row before the first window that is pooled": Fault(
        "ops/compress.py",
        "absent = (index == 0)[..., None] & (age >= ratio)",
        "absent = (index == 0)[..., None] & (age > ratio)",
        SPEC + "[compress-3-5-4-6-4]",
    ),
    "an entry that is not visible yet": Fault(
        "ops/indexer_topk.py",
        "(e >= hi[:, tokens, None])",
        "(e > hi[:, tokens, None])",
        SPEC + "[indexer_topk-3-5-33-7]",
    ),
    "a gradient through a value that was clamped": Fault(
        "ops/swiglu.py",
        "g_up = g * weight * act * (up.abs() <= limit)",
        "g_up = g * weight * act * (up <= limit)",
        OPAQUE + "[moe-5-4-2-10-6-float-True]",
    ),
    "a norm's gradient of the wrong power": Fault(
        "ops/hc_pre.py",
        "(g_m * u).sum(-1, keepdim=True) * r**3 * v / v.shape[-1]",
        "(g_m * u).sum(-1, keepdim=True) * r**2 * v / v.shape[-1]",
        OPAQUE + "[hc_pre-2-5-4-7-20]",
    ),
    "rows where columns come first": Fault(
        "ops/sinkhorn.py",
        "return [-2] + [-1, -2] * (iters - 1)",
        "return [-1] + [-2, -1] * (iters - 1)",
        SPEC + "[sinkhorn-1-7-3-3-1]",
    ),
    "a label 0 that is ignored in the backward": Fault(
        "ops/linear_cross_entropy.py",
        "p *= torch.where(t < 0, 0.0, g[rows])[:, None]",
        "p *= torch.where(t <= 0, 0.0, g[rows])[:, None]",
        OPAQUE + "[linear_cross_entropy-65-3]",
    ),
    "a token found by the number of experts": Fault(
        "ops/cpu/moe_decode.cpp",
        "x_rows[t] = xq.data() + pair[t] / K * d;",
        "x_rows[t] = xq.data() + pair[t] % N * d;",
        CPP + "[moe_decode-5-4-2-150-131-True]",
    ),
    "a Sinkhorn step too many": Fault(
        "ops/cpu/sinkhorn.cpp",
        "step < 2 * iters - 1",
        "step < 2 * iters",
        CPP + "[sinkhorn-1-7-3-3-1]",
    ),
}
COMPILE = {
    "a prefill that keeps the padding's logits": Fault(
        "compile_config.py",
        '"prefill", "last"',
        '"prefill", "all"',
        GENERATE + "greedy_tokens_equal_transformers[37]",
    ),
    "metrics of the last part of a step": Fault(
        "training/step.py",
        "metrics[name] + value if name in metrics else value",
        "value",
        TRAIN_STEP + "accumulated_gradients_are_those_of_the_whole_step",
    ),
}
LONG = {  # whose tests take minutes: not seeded here, caught when it was tried by hand
    "norms of parts that are added, not their squares": Fault(
        "training/sharded_optim.py",
        'squares = functional.all_reduce(grad_norm(parts).square(), "sum", self.group)',
        'squares = functional.all_reduce(grad_norm(parts), "sum", self.group)',
        PARALLEL + "two_processes_train_as_one_does[fsdp]",
    )
}
FAULTS = MODEL | CHECKPOINTS | GENERATION | TRAINING_RUN | OPERATORS | COMPILE


def test_each_seeded_text_occurs_exactly_once():
    counts = {name: occurrences(f.file, f.old) for name, f in (FAULTS | LONG).items()}
    assert not {name: count for name, count in counts.items() if count != 1}


def test_each_fault_names_a_test_of_the_default_run():
    for name, fault in (FAULTS | LONG).items():
        file, function = fault.test.split("[")[0].split("::")
        assert occurrences(file, f"def {function}(") == 1, name
        assert not any(re.search(pattern, fault.test) for pattern in FULL), name
        source = (ROOT / file).read_text(encoding="utf-8")
        assert "pytest.mark.full" not in source.split(f"def {function}(")[0].rpartition("\n\n\n")[2]


@pytest.mark.full
def test_without_a_fault_the_tests_pass(tmp_path):
    """In a copy too, which lacks some folders: a test that fails there fails for its fault."""
    tests = sorted({fault.test for fault in FAULTS.values()})
    done = run_test(copy_project(tmp_path), *tests)
    assert done.returncode == 0 and f"{len(tests)} passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.full
@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_caught(name, tmp_path):
    fault = FAULTS[name]
    project = copy_project(tmp_path)
    replace_once(project, fault.file, fault.old, fault.new)
    done = run_test(project, fault.test)
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout[-3000:]
