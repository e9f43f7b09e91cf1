"""Each fault, seeded into a copy of the project, makes a named test fail that says why."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from seeding import ROOT, copy_project, occurrences, replace_once, run_test

pytestmark = pytest.mark.compile


class Fault(NamedTuple):
    """In `file`, `old` becomes `new`; then `test` fails, and its output matches `says`."""

    file: str
    old: str
    new: str
    test: str
    says: str


CAPTURE, CENSUS, SESSIONS, SHAPES = (
    f"tests/compile/test_compile_{name}.py::"
    for name in ("capture", "census", "sessions", "shapes")
)
REGISTER_FAKE = '    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)'
MAKE_PLAN = "        plan = make_plan(self.args, self.freqs, tokens, ratios, *positions, aux)"
EMBED = (
    "        tokens, plan, X = "
    "run_block(self.embed_inputs, tokens, input_pos, lengths, doc_ids, aux)"
)
MEMORY = (
    "tests/model/test_model_memory.py::test_no_intermediate_exceeds_the_bound[prefill-4-reference]"
)
DECODE = CAPTURE + "test_inference_is_one_graph[decode-opaque-False]"
DEFAULT = {  # of each run
    "an item() in the compressor": Fault(
        "model.py",
        "        score = self.ops.linear_fp32(x, self.wgate.weight)",
        "        x = x[:, : int(windows.offset.max().item()) + x.shape[1]]\n"
        "        score = self.ops.linear_fp32(x, self.wgate.weight)",
        DECODE,
        r"host sync aten\._local_scalar_dense.*model\.py.*in forward",
    ),
    "a Python-int position in the cache": Fault(
        "model.py",
        "        slots, pos = self.rows.shape[1] - 1, plan.input_pos[:, None]",
        "        self.at = getattr(self, 'at', -1) + 1\n"
        "        slots, pos = self.rows.shape[1] - 1, plan.input_pos[:, None] + 0 * self.at",
        SESSIONS + "test_a_session_compiles_once[every boundary]",
        r"RecompileError: Recompiling[\s\S]*'at'[\s\S]*model\.py",
    ),
    "a branch on data in the router": Fault(
        "model.py",
        "        weights = pick(score, chosen)",
        "        if score.max() > 1e9:\n            score = score / score.max()\n"
        "        weights = pick(score, chosen)",
        DECODE,
        r"[Dd]ata-dependent[\s\S]*model\.py",
    ),
    "expand and gather in sparse attention": Fault(
        "ops/sparse_attn_reference.py",
        "def forward_reference(",
        "def forward_reference(*args):\n"
        "    entries, idx = args[6], args[9]\n    if idx is not None:\n"
        "        B, T, K = idx.shape\n"
        "        index = idx.clamp(min=0)[..., None].expand(B, T, K, entries.shape[-1])\n"
        "        entries[:, None].expand(B, T, -1, -1).gather(2, index)\n"
        "    return _forward_reference(*args)\n\n\ndef _forward_reference(",
        MEMORY,
        r"MB: aten\.gather",
    ),
    "a dropped fake kernel": Fault(
        "ops/registry.py",
        REGISTER_FAKE,
        f'    if name != "rope":\n    {REGISTER_FAKE}',
        DECODE,
        r"dsv4.rope[\s\S]*(fake|[Mm]eta)",
    ),
    "a wrong fake shape": Fault(
        "ops/compress.py",
        "*end.shape, weight.shape[0], dtype=dtype",
        "*end.shape, weight.shape[0] + 1, dtype=dtype",
        "tests/ops/test_contract.py::test_ops_pass_opcheck[compress-3-5-4-6-4-contiguous]",
        r"compress[\s\S]*(shape|size)",
    ),
    "a whole cache copied in decode": Fault(
        "model.py",
        "        return self.entries[: x.shape[0], :-1]",
        "        return self.entries[: x.shape[0], :-1].clone() * 1.0000001",
        CENSUS + "test_no_cache_is_copied_whole_on_cuda",
        r"copies a whole cache",
    ),
    "an op that falls back to its traced form": Fault(
        "model.py",
        "        o = self.ops.sparse_attn(",
        "        import ops\n        o = ops.sparse_attn.reference(",
        CAPTURE + "test_each_opaque_op_is_one_node",
        r"'sparse_attn': 4",
    ),
}

FULL = {  # of -m full
    "a bincount of the experts' load": Fault(
        "model.py",
        "        weights = pick(score, chosen)",
        "        score = score + 0 * torch.cat(chosen).flatten().bincount().sum()\n"
        "        weights = pick(score, chosen)",
        DECODE,
        r"(host sync aten\.bincount|symbolic value in aten\.bincount).*model\.py",
    ),
    "tokens looked up by a mask": Fault(
        "model.py",
        MAKE_PLAN,
        "        tokens = tokens + 0 * tokens[tokens > 0].sum()\n" + MAKE_PLAN,
        DECODE,
        r"(host sync aten\.nonzero|symbolic value in aten\.index).*model\.py",
    ),
    "a call counter in the model": Fault(
        "model.py",
        EMBED,
        "        self.calls = getattr(self, 'calls', 0) + 1\n"
        "        tokens = tokens + 0 * self.calls\n" + EMBED,
        SESSIONS + "test_a_session_compiles_once[two conversations]",
        r"RecompileError: Recompiling[\s\S]*'calls'",
    ),
    "a step number that is a Python int": Fault(
        "training/optim.py",
        "        corrections = [1 - beta**self.count for beta in self.betas]",
        "        self.done = getattr(self, 'done', 0) + 1\n"
        "        corrections = [1 - beta**self.done for beta in self.betas]",
        SESSIONS + "test_the_optimizer_compiles_once",
        r"RecompileError: Recompiling[\s\S]*'done'",
    ),
    "a window skipped when none ends": Fault(
        "model.py",
        "        score = self.ops.linear_fp32(x, self.wgate.weight)",
        "        if (windows.slot < 0).all():\n            return self.entries[:, :-1]\n"
        "        score = self.ops.linear_fp32(x, self.wgate.weight)",
        DECODE,
        r"[Dd]ata-dependent[\s\S]*model\.py",
    ),
    "a check of token ids in the forward": Fault(
        "model.py",
        MAKE_PLAN,
        "        if tokens.max() >= self.args.vocab_size:\n"
        "            raise ValueError('no such token')\n" + MAKE_PLAN,
        DECODE,
        r"[Dd]ata-dependent[\s\S]*model\.py",
    ),
    "index scores of all heads at once": Fault(
        "ops/indexer_topk.py", "CHUNK = 1 << 24", "CHUNK = 1 << 62", MEMORY, r"MB: aten\."
    ),
    "logits of a whole prompt": Fault(
        "model.py",
        "selected = self.head_input(self.select(X, plan, logits))\n"
        "        return self.ops.linear_fp32(selected, self.head.weight)",
        "y = self.ops.linear_fp32(self.head_input(X), self.head.weight)\n"
        "        return self.select(y, plan, logits)",
        SHAPES + "test_the_largest_value_is_bounded[flash-prefill]",
        r"dsv4\.linear_fp32 \[1, 8192, 129280\]",
    ),
    "a backward op without a fake": Fault(
        "ops/registry.py",
        REGISTER_FAKE,
        f'    if name != "moe_backward":\n    {REGISTER_FAKE}',
        CAPTURE + "test_training_forward_and_backward_are_one_graph_each[opaque]",
        r"dsv4.moe_backward[\s\S]*(fake|[Mm]eta)",
    ),
    "another op without a fake": Fault(
        "ops/registry.py",
        REGISTER_FAKE,
        f'    if name != "hc_post":\n    {REGISTER_FAKE}',
        DECODE,
        r"dsv4.hc_post[\s\S]*(fake|[Mm]eta)",
    ),
    "a fake of another dtype": Fault(
        "ops/sparse_attn.py",
        "q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)",
        "q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float64)",
        "tests/ops/test_contract.py::test_ops_pass_opcheck[sparse_attn-3-5-8-window-contiguous]",
        r"sparse_attn[\s\S]*dtype",
    ),
    "a fake of other strides": Fault(
        "ops/rope.py",
        "fake=lambda x, cos, sin, inverse: x.new_empty(x.shape)",
        "fake=lambda x, cos, sin, inverse: x.new_empty(x.shape).mT.contiguous().mT",
        "tests/ops/test_contract.py::test_ops_pass_opcheck[rope-2-5-3-6-4-True-contiguous]",
        r"rope[\s\S]*[Ss]tride",
    ),
    "a ring rewritten at every step": Fault(
        "model.py",
        "        return rows\n\n\nclass Compressor",
        "        self.rows.copy_(self.rows.flip(1).flip(1) * 1.0000001)\n"
        "        return rows\n\n\nclass Compressor",
        CENSUS + "test_no_cache_is_computed_whole",
        r"computes a whole cache: .*model\.py",
    ),
    "entries made contiguous": Fault(
        "model.py",
        "        return self.entries[: x.shape[0], :-1]",
        "        return self.entries[: x.shape[0], :-1].contiguous()",
        CENSUS + "test_no_cache_is_computed_whole",
        r"computes a whole cache: .*model\.py",
    ),
    "one site's hc_post traced": Fault(
        "model.py",
        "        return ops.hc_post(y, X, post, comb), aux",
        "        from ops import hc_post\n        return hc_post.reference(y, X, post, comb), aux",
        CAPTURE + "test_each_opaque_op_is_one_node",
        r"'hc_post': 4",
    ),
    "a router's scores copied to the CPU and back": Fault(
        "model.py",
        "        weights = pick(score, chosen)",
        "        score = score.cpu().to(x.device)\n        weights = pick(score, chosen)",
        CENSUS + "test_nothing_leaves_the_device_and_the_default_form_there_is_opaque[decode]",
        r"score\.cpu\(\)[\s\S]*Cannot copy out of meta",
    ),
    "positions made on the CPU": Fault(
        "model.py",
        "    col = torch.arange(T, device=device)[None]",
        "    col = torch.arange(T, device='cpu')[None].to(device)",
        CENSUS + "test_nothing_leaves_the_device_and_the_default_form_there_is_opaque[prefill]",
        r"leaves the device or waits for it: aten[\s\S]*in make_plan",
    ),
    "the CPU's form of an op on every device": Fault(
        "ops/registry.py",
        'form = cpu if args[0].device.type == "cpu" else opaque',
        "form = cpu",
        CENSUS + "test_nothing_leaves_the_device_and_the_default_form_there_is_opaque[decode]",
        r"decode by default does not run the opaque ops",
    ),
    "an inverse in the router": Fault(
        "model.py",
        "        weights = pick(score, chosen)",
        "        score = score + 0 * torch.linalg.inv(torch.eye(2, device=x.device)).sum()\n"
        "        weights = pick(score, chosen)",
        CENSUS + "test_nothing_leaves_the_device_and_the_default_form_there_is_opaque[decode]",
        r"waits for it: aten\._linalg_check_errors[\s\S]*model\.py",
    ),
    "torch.cond on data in the router": Fault(
        "model.py",
        "        weights = pick(score, chosen)",
        "        branches = (lambda s: s * 0.5), (lambda s: s * 1.0)\n"
        "        score = torch.cond(score.amax() > 1e9, *branches, (score,))\n"
        "        weights = pick(score, chosen)",
        DECODE,
        r"branch on data cond.*model\.py",
    ),
    "a table that forgets an op": Fault(
        "ops/registry.py",
        "            object.__setattr__(self, name, op.bind(modes.get(name)))",
        "            mode = 'reference' if name == 'rope' else modes.get(name)\n"
        "            object.__setattr__(self, name, op.bind(mode))",
        CAPTURE + "test_each_opaque_op_is_one_node",
        r"'rope': 6",
    ),
}


FAULTS = DEFAULT | FULL


def test_each_seeded_text_occurs_exactly_once():
    """Or the fault cannot be seeded: adapt `old`, and the names in `new`, to the source."""
    rotted = {name: occurrences(f.file, f.old) for name, f in FAULTS.items()}
    rotted = {name: n for name, n in rotted.items() if n != 1}
    assert not rotted, f"occurrences of seeded texts, by fault: {rotted}"


def test_each_seeded_fault_is_python():
    for name, fault in FAULTS.items():
        text = (ROOT / fault.file).read_text().replace(fault.old, fault.new)
        compile(text, f"{fault.file} with {name}", "exec")


def test_each_named_test_exists():
    missing = []
    for name, fault in FAULTS.items():
        file, function = fault.test.split("[")[0].split("::")
        if f"def {function}(" not in (ROOT / file).read_text():
            missing.append(f"{name}: {file}::{function}")
    assert not missing, missing


@pytest.mark.parametrize(
    "name", [*DEFAULT, *(pytest.param(name, marks=pytest.mark.full) for name in FULL)]
)
def test_a_seeded_fault_fails_a_named_test_that_says_why(name, tmp_path):
    fault = FAULTS[name]
    project = copy_project(tmp_path)
    replace_once(project, fault.file, fault.old, fault.new)
    done = run_test(project, fault.test)
    output = done.stdout[-3000:] + done.stderr[-1000:]
    assert done.returncode == 1 and "1 failed" in done.stdout, output
    assert re.search(fault.says, done.stdout), done.stdout[-6000:]
