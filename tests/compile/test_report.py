"""Contracts of `compile_config.py report`: true numbers, a readable table, named regressions."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch

import checkpoint
import compile_config as C
from bench.record import RESULTS
from model import ModelArgs, Transformer, make_plan
from testing import randomize, small
from tools import capture
from tools import report as R


@pytest.fixture(scope="module")
def debug() -> dict:
    return R.report("debug", ("decode", "train"), compiled=False)


def run(capsys, *argv: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert R.main([*argv]) == code
    return capsys.readouterr()


def test_the_report_counts_what_is_in_the_graphs(debug):
    decode, train = debug["phases"]["decode"], debug["phases"]["train"]
    for phase in (decode, train):
        assert (phase["graphs"], phase["breaks"], phase["faults"]) == (1, 0, [])
        total = sum(
            layer["count"] * sum(sum(layer[group].values()) for group in ("opaque", "aten"))
            for layer in phase["layers"].values()
        )
        assert total == phase["operators"]
    assert decode["opaque"]["dsv4.moe"] == 4
    assert train["opaque"]["dsv4.moe_backward"] == 5  # with the MTP block
    assert decode["saved_bytes"] is None
    streams = 4 * 256 * 4 * 64  # fp32, tokens, streams, dim: the input of each of the 5 blocks
    selective, full = train["saved_selective_bytes"], train["saved_full_bytes"]
    assert train["saved_bytes"] > selective > full >= 5 * streams
    assert debug["layers"] == {
        "sliding, hash": 1,
        "CSA, hash": 1,
        "HCA, score": 1,
        "CSA, score": 1,
        "MTP": 1,
    }
    args = ModelArgs.debug()
    head = 2 * args.dim * args.vocab_size
    assert decode["flops"] > head and decode["flops_per_token"] == decode["flops"]


def test_layers_that_repeat_add_up_to_the_whole(debug):
    """Layers of a kind may differ by a node, as the last one's gradients meet no other: their mean
    is reported."""
    told, alone = R.report_phase(R.args_of("debug:6"), "train"), debug["phases"]["train"]["layers"]
    layers = told["layers"]
    assert layers["CSA, score"]["count"] == layers["HCA, score"]["count"] == 2
    total = sum(
        layer["count"] * n
        for layer in layers.values()
        for group in ("opaque", "aten")
        for n in layer[group].values()
    )
    assert abs(total - told["operators"]) < 1e-6
    for kind in ("CSA, score", "HCA, score"):
        assert layers[kind]["opaque"] == alone[kind]["opaque"]
        differ = {
            op: n
            for op, n in layers[kind]["aten"].items()
            if abs(n - alone[kind]["aten"].get(op, 0)) > 2
        }
        assert not differ, (kind, differ)
    assert any(n % 1 for layer in layers.values() for n in layer["aten"].values())


@pytest.mark.parametrize(
    "phase, shape",
    [
        ("train", capture.Shape(1, 150, 150)),
        ("prefill", capture.Shape(1, 150, 150)),
        ("decode", capture.Shape(1, 1, 150)),
        ("verify", capture.Shape(1, 4, 150)),
        ("prefill", capture.Shape(1, 64, 512)),
    ],
    ids=str,
)
def test_needed_flops_count_the_pairs_that_the_plan_makes_visible(phase, shape):
    """Against the keys that every token of the model sees; the formulas count all of the cache."""
    args = small(n_layers=3, n_hash_layers=0, compress_ratios=(0, 4, 128, 0))
    input_pos = None
    if phase != "train":
        input_pos = torch.tensor([0 if phase == "prefill" else shape.context - shape.length])
    freqs = torch.ones(2, args.rope_head_dim // 2)
    tokens = torch.zeros(1, shape.length, dtype=torch.int64)
    plan = make_plan(args, freqs, tokens, {4, 128}, shape.context, input_pos)
    captured, model = capture.capture_fake(args, phase, shape)
    met = set()
    for node in captured.calls():
        name, layer = capture.name_of(node.target), capture.index_of(node, args)
        if not name.startswith(("dsv4.sparse_attn", "dsv4.indexer_topk")):
            continue
        ratio, indexer = args.compress_ratios[layer], name == "dsv4.indexer_topk"
        visible = 0 if indexer else plan.window_len.sum()
        if ratio:
            entries = plan.windows[ratio].hi - plan.windows[ratio].lo
            if ratio == 4 and not indexer:
                entries = entries.clamp(max=args.index_topk)
            visible = visible + entries.sum()
        size = 2 * args.n_heads * args.head_dim  # of a pair, in products and sums
        if indexer:
            size = args.index_n_heads * (args.index_head_dim + 1)
        backward = name.endswith("_backward")
        counted = 2 * size * capture.keys(args, ratio, shape, None, indexer)
        assert capture.flops_of(node) == (5 * counted // 2 if backward else counted)
        expected = 2 * size * int(visible) * (2 if backward else 1)
        if layer == args.n_layers:
            expected = 0
        needed = capture.needed(node, args, phase, shape) * capture.flops_of(node)
        assert needed == pytest.approx(expected)
        met.add((name, ratio))
    assert met >= {("dsv4.sparse_attn", ratio) for ratio in (0, 4, 128)}
    assert met >= {("dsv4.indexer_topk", 4)}


def test_the_table_says_what_its_flops_count(debug):
    for phase in debug["phases"].values():
        assert 0 < phase["needed_flops_per_token"] <= phase["flops_per_token"]
    assert "FLOP needed per token" in R.table(debug)
    assert "MTP" in R.NOTE and R.NOTE in R.table(debug)


def test_the_table_names_the_mode_of_every_op(debug):
    line = next(line for line in R.table(debug).splitlines() if line.startswith("modes of ops on"))
    assert all(name in line for name in capture.MODEL_OPS)
    old = {key: value for key, value in debug.items() if key != "modes"}  # as recorded before
    assert "modes of ops" not in R.table(old) and R.compare(old, debug) == ([], [])


def test_recompiles_are_counted_although_phases_drop_their_guards(monkeypatch):
    """A number that the model keeps in Python and changes at every call."""
    args = small(n_layers=1, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(0,))
    model, forward = Transformer(args), Transformer.forward
    assert [R.recompiles(model, phase, "regional") for phase in ("decode", "train")] == [0, 0]

    def counting(self, tokens, *args, **options):
        self.calls = getattr(self, "calls", 0) + 1
        return forward(self, tokens + 0 * self.calls, *args, **options)

    monkeypatch.setattr(Transformer, "forward", counting)
    assert R.recompiles(model, "decode", "default") > 9  # more than Dynamo's own limit


def test_flops_are_counted_by_hand_for_one_layer():
    """One sliding layer, one token: projections, attention, experts, hyper-connections, head."""
    args = ModelArgs(
        **{
            **vars(ModelArgs.debug()),
            "n_layers": 1,
            "n_hash_layers": 0,
            "n_mtp_layers": 0,
            "compress_ratios": (0,),
        }
    )
    captured, _ = capture.capture_fake(args, "decode", capture.Shape(1, 1, 64))
    H = args.n_heads
    D = args.head_dim
    d = args.dim
    g = args.o_groups
    I = args.moe_inter_dim
    attention = (
        d * args.q_lora_rank
        + args.q_lora_rank * H * D
        + d * D
        + H * D * args.o_lora_rank
        + g * args.o_lora_rank * d
    )
    experts = 3 * d * I * (args.n_activated_experts + 1) + d * args.n_routed_experts
    mixing = 2 * 4 * d * 24 + 4 * d * 4
    expected = (
        2 * (attention + experts + mixing + d * args.vocab_size) + 4 * H * D * args.window_size
    )
    assert sum(map(capture.flops_of, captured.calls())) == expected


def test_the_table_and_the_json_say_the_same(capsys, debug):
    out, err = run(capsys, "--config", "debug", "--phase", "decode", "--no-run")
    assert "graphs captured" in out and "dsv4.sparse_attn" in out and "decode" in out
    out, err = run(capsys, "--config", "debug", "--phase", "decode", "--no-run", "--json")
    decode = json.loads(out.splitlines()[-1])["phases"]["decode"]
    assert decode | {"capture_s": 0} == debug["phases"]["decode"] | {"capture_s": 0}
    assert "graphs captured" in err


def test_a_checkpoint_folder_is_reported_like_a_name(capsys, tmp_path, debug):
    checkpoint.save(randomize(Transformer(ModelArgs.debug()), seed=1), tmp_path / "v4")
    command = f"--config {tmp_path}/v4 --phase decode --no-run --json --trace {tmp_path}/graphs"
    out, _ = run(capsys, *command.split())
    phase, expected = (
        json.loads(out.splitlines()[-1])["phases"]["decode"],
        debug["phases"]["decode"],
    )
    assert phase["opaque"] == expected["opaque"] and phase["flops"] == expected["flops"]
    assert "torch.ops.dsv4.sparse_attn" in (tmp_path / "graphs" / "decode_forward.py").read_text()


def test_another_depth_goes_on_as_the_last_layers_alternate():
    assert R.args_of("tiny:9").compress_ratios == (0, 0, 4, 128, 4, 128, 4, 128, 4, 0)
    deep = R.args_of("tiny:43")
    assert deep.n_layers == 43 and capture.kinds(deep)["CSA, score"] == 21
    for config in ("tiny:x", "tiny:"):
        with pytest.raises(ValueError, match=config):
            R.args_of(config)


@pytest.mark.parametrize(
    "path, value, line",
    [
        (("graphs",), 2, "decode: graphs 1 -> 2"),
        (("breaks",), 1, "decode: breaks 0 -> 1"),
        (("run_breaks",), 5, "decode: run_breaks 0 -> 5"),
        (("warm_cache_misses",), 9, "decode: warm_cache_misses 0 -> 9"),
        (("recompiles",), 1, "decode: recompiles 0 -> 1"),
        *(((size,), 77, f"decode: {size} ") for size in R.SIZES),
        (("largest_bytes",), 1 << 40, "decode: largest_bytes"),
        (("flops",), 1 << 60, "decode: flops"),
        (("faults",), ["host sync aten.item"], "decode: host sync aten.item"),
        (("operators",), 10**6, "decode: operators"),
        (("layers", "CSA, hash", "opaque", "dsv4.moe"), 0, "decode: CSA, hash: dsv4.moe 1 -> 0"),
    ],
    ids=lambda value: str(value),
)
def test_a_regression_is_named(debug, path, value, line):
    debug, ran = copy.deepcopy(debug), {"run_breaks": 0, "warm_cache_misses": 0, "recompiles": 0}
    debug["phases"]["decode"] |= ran
    worse = copy.deepcopy(debug)
    place = worse["phases"]["decode"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    moved, bad = R.compare(debug, worse)
    assert any(text.startswith(line) for text in bad), (moved, bad)
    assert R.compare(worse, worse)[1] == [] or path == ("faults",)


LOWERED = {
    "batch": 2,
    "launches": {"CSA, score": {"bf16": 45, "fp4": 59}, "sliding, hash": {"bf16": 29, "fp4": 31}},
    "moved_bytes": {
        "CSA, score": {"bf16": 48 * 10**8, "fp4": 24 * 10**8},
        "sliding, hash": {"bf16": 48 * 10**7, "fp4": 24 * 10**7},
    },
    "head": {"launches": {"bf16": 5, "fp4": 5}, "moved_bytes": {"bf16": 48 * 10**6, "fp4": 0}},
}


def test_an_estimate_adds_bytes_and_launches_of_all_layers_and_the_head():
    """On an H200, 4.8 TB/s: a ms of a CSA layer's bytes, and 2.2 us a launch; two rows a step."""
    got = R.estimate(LOWERED, {"CSA, score": 3, "sliding, hash": 2}, "H200")
    launches = {"bf16": 3 * 45 + 2 * 29 + 5, "fp4": 3 * 59 + 2 * 31 + 5}
    moved = {"bf16": 3 + 2 * 0.1 + 0.01, "fp4": 3 * 0.5 + 2 * 0.05}
    for weights in ("bf16", "fp4"):
        seconds = moved[weights] * 1e-3 + launches[weights] * 2.2e-6
        assert abs(got[weights] * seconds / 2 - 1) < 1e-9
    assert R.estimate({}, {}, "H200") is None


def test_more_launches_are_a_regression_and_fewer_are_not(debug):
    before, now = copy.deepcopy(debug), copy.deepcopy(debug)
    before["phases"]["decode"]["launches"] = LOWERED["launches"]
    now["phases"]["decode"]["launches"] = {"CSA, score": {"bf16": 46, "fp4": 58}}
    moved, worse = R.compare(before, now)
    assert worse == ["decode: CSA, score: launches in bf16 45 -> 46"]
    assert set(moved) == {*worse, "decode: CSA, score: launches in fp4 59 -> 58"}


def test_what_only_moved_is_told_and_no_regression(debug):
    other = copy.deepcopy(debug)
    other["phases"]["decode"]["layers"]["rest"]["aten"]["aten.add.Tensor"] += 1
    other["phases"]["decode"] |= {"compile_cold_s": 50.0}
    before = copy.deepcopy(debug)
    before["phases"]["decode"] |= {"compile_cold_s": 10.0}
    moved, worse = R.compare(before, other)
    assert len(moved) == 2 and worse == []
    assert R.compare(debug, debug) == ([], [])
    del other["phases"]["train"]
    assert "train: not reported any more" in R.compare(debug, other)[0]
    other = copy.deepcopy(debug) | {
        "config": "/a/folder",
        "preset": "regional",
        "versions": {"torch": "3.0"},
    }
    other["phases"]["train"]["saved_bytes"] = None
    moved, worse = R.compare(debug, other)
    *settings, line = moved
    assert worse == [] and settings == [
        "config debug -> /a/folder",
        "preset default -> regional",
        f"torch {torch.__version__} -> 3.0",
    ]
    assert line.startswith("train: saved_bytes ") and line.endswith(" -> not measured")


def test_reports_of_different_models_are_not_compared_number_by_number():
    tiny, flash = (R.read(RESULTS / f"report_{name}.json") for name in ("tiny", "flash"))
    moved, (line,) = R.compare(tiny, flash)
    assert "another model" in line and "20 HCA" in line and "config tiny -> flash" in moved


def test_every_recorded_report_can_be_compared_with():
    for name in ("tiny", "flash", "pro"):
        report = R.read(RESULTS / f"report_{name}.json")
        assert R.compare(report, report) == ([], [])
        assert set(report["phases"]) == set(capture.PHASES)
        for phase in report["phases"].values():
            total = sum(
                layer["count"] * n
                for layer in phase["layers"].values()
                for group in ("opaque", "aten")
                for n in layer[group].values()
            )
            assert abs(total - phase["operators"]) < 1e-6
            assert phase["needed_flops_per_token"] <= phase["flops_per_token"]
        assert report["phases"]["train"]["saved_bytes"] > 0


def test_a_compilation_that_fails_ends_in_one_line_after_the_compilers_own(monkeypatch, capsys):

    def fail(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOops: no")

    monkeypatch.setattr(R, "report_phase", lambda *args: {})
    monkeypatch.setattr(R.subprocess, "run", fail)
    assert R.main(["--config", "debug", "--phase", "decode"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line == "compile_config.py: compiling decode of debug failed: Oops: no"


def test_folders_are_measured_from_wherever_the_report_is_started(monkeypatch, tmp_path):
    """The processes that compile start in the repository: they are given the folder's full name."""
    asked = []
    keys = ("run_graphs", "run_breaks", "recompiles", "kernels", "compile_s", "cache_misses")

    def run(command, **options):
        asked.append(command[3])
        return subprocess.CompletedProcess(command, 0, json.dumps(dict.fromkeys(keys, 0)), "")

    monkeypatch.setattr(R.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    for config in ("v4", "debug:5"):
        R.measured(config, "decode", "default", log=print)
    assert asked == [str(tmp_path / "v4")] * 2 + ["debug:5"] * 2


def test_compare_exits_1_on_a_regression_and_0_without(capsys, tmp_path, debug):
    old = copy.deepcopy(debug)
    (tmp_path / "same.json").write_text(json.dumps(old))
    old["phases"]["decode"]["flops"] -= 1
    (tmp_path / "better.json").write_text(json.dumps(old))
    out, _ = run(
        capsys,
        "--config",
        "debug",
        "--phase",
        "decode",
        "--no-run",
        "--compare",
        str(tmp_path / "same.json"),
    )
    assert "WORSE" not in out
    out, _ = run(
        capsys,
        "--config",
        "debug",
        "--phase",
        "decode",
        "--no-run",
        "--compare",
        str(tmp_path / "better.json"),
        code=1,
    )
    assert "WORSE  decode: flops" in out


@pytest.mark.quick
@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        "7",
        '{"phases": {}}',
        '{"layers": {}, "phases": []}',
        '{"layers": {}, "phases": {"decode": {}}}',
        '{"layers": {}, "phases": {"decode": []}}',
        '{"layers": {}, "phases": {"decode": {"layers": {"rest": 1}}}}',
        '{"layers": {}, "phases": {"decode": {"layers": {}, "flops": "x"}}}',
    ],
)
def test_what_cannot_be_compared_with_is_refused_before_the_report_runs(
    capsys, monkeypatch, tmp_path, content
):
    monkeypatch.setattr(R, "report", lambda *args: pytest.fail("the report ran"))
    (tmp_path / "old.json").write_text(content)
    assert R.main(["--config", "debug", "--compare", str(tmp_path / "old.json")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "old.json" in line and "not the JSON of an earlier report" in line


@pytest.mark.quick
def test_what_cannot_run_is_refused_before_anything_is_captured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(R, "report_phase", lambda *args: pytest.fail("captured"))
    (tmp_path / "config.json").write_text(json.dumps(ModelArgs.debug().to_hf()))
    (tmp_path / "file").write_text("")
    cases = [
        (("--config", str(tmp_path)), "model.safetensors"),
        (("--trace", str(tmp_path / "file")), "--trace"),
        (("--compare", str(RESULTS / "report_tiny.json")), "report_tiny.json"),
    ]
    for argv, says in cases + [(("--preset", "cudagraphs"), "CUDA")] * (
        not torch.cuda.is_available()
    ):
        assert R.main(["--config", "debug", "--phase", "decode", *argv]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert says in line


@pytest.mark.quick
@pytest.mark.parametrize(
    "argv, says",
    [
        (("--phase", "decode,fly"), "fly"),
        (("--config", "no/such"), "no/such"),
        (("--preset", "fast"), "fast"),
        (("--compare", "no/such.json"), "no/such.json"),
        (("--compare", __file__), "test_report.py"),
        (("--config", "tiny:1"), "tiny:1"),
        (("--config", "tiny:"), "tiny:"),
        (("--config", ""), "folder"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(capsys, argv, says):
    assert R.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line


@pytest.mark.quick
@pytest.mark.parametrize("argv, says", [((), "required"), (("repot",), "repot")])
def test_unknown_commands_are_one_line_and_exit_code_2(capsys, argv, says):
    assert C.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line


def test_the_command_line_of_compile_config_hands_over_to_the_report():
    done = subprocess.run(
        [sys.executable, "compile_config.py", "report", "--config", "debug:9", "--phase", "fly"],
        capture_output=True,
        text=True,
        cwd=C.__file__.rpartition("/")[0],
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("compile_config.py: --phase 'fly'")
