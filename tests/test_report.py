"""Contracts of `compile_config.py report`: true numbers, a readable table, a comparison that fails on regressions."""
from __future__ import annotations

import copy
import json

import pytest

import checkpoint
import compile_config as C
import report as R
from model import ModelArgs, Transformer
from oracle import randomize


@pytest.fixture(scope="module")
def debug() -> dict:
    return R.report("debug", ("decode", "train"), compiled=False)


def run(capsys, *argv: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert C.main(["report", *argv]) == code
    return capsys.readouterr()


def test_the_report_counts_what_is_in_the_graphs(debug):
    decode, train = debug["phases"]["decode"], debug["phases"]["train"]
    for phase in (decode, train):
        assert (phase["graphs"], phase["breaks"], phase["faults"]) == (1, 0, [])
        total = sum(layer["count"] * sum(sum(layer[group].values()) for group in ("opaque", "aten")) for layer in phase["layers"].values())
        assert total == phase["operators"]
    assert decode["opaque"]["dsv4.moe"] == 4 and train["opaque"]["dsv4.moe_backward"] == 5  # with the MTP block
    assert decode["saved_bytes"] is None and train["saved_bytes"] > 0
    assert debug["layers"] == {"sliding, hash": 1, "CSA, hash": 1, "HCA, score": 1, "CSA, score": 1, "MTP": 1}
    args = ModelArgs.debug()
    head = 2 * args.dim * args.vocab_size
    assert decode["flops"] > head and decode["flops_per_token"] == decode["flops"]


def test_flops_are_counted_by_hand_for_one_layer():
    """One sliding layer, one token: projections, attention over the window, experts, mixing, head."""
    args = ModelArgs(**{**vars(ModelArgs.debug()), "n_layers": 1, "n_hash_layers": 0, "n_mtp_layers": 0, "compress_ratios": (0,)})
    captured, _ = R.capture_fake(args, "decode", R.Shape(1, 1, 64))
    H, D, d, g, I = args.n_heads, args.head_dim, args.dim, args.o_groups, args.moe_inter_dim
    attention = d * args.q_lora_rank + args.q_lora_rank * H * D + d * D + H * D * args.o_lora_rank + g * args.o_lora_rank * d
    experts = 3 * d * I * (args.n_activated_experts + 1) + d * args.n_routed_experts
    mixing = 2 * 4 * d * 24 + 4 * d * 4
    expected = 2 * (attention + experts + mixing + d * args.vocab_size) + 4 * H * D * args.window_size
    assert sum(map(R.flops_of, captured.calls())) == expected


def test_the_table_and_the_json_say_the_same(capsys, debug):
    out, err = run(capsys, "--config", "debug", "--phase", "decode", "--no-run")
    assert "graphs captured" in out and "dsv4.sparse_attn" in out and "decode" in out
    out, err = run(capsys, "--config", "debug", "--phase", "decode", "--no-run", "--json")
    told = json.loads(out.splitlines()[-1])["phases"]["decode"]
    told.pop("capture_s")
    assert told == {key: value for key, value in debug["phases"]["decode"].items() if key != "capture_s"}
    assert "graphs captured" in err


def test_a_checkpoint_folder_is_reported_like_a_name(capsys, tmp_path, debug):
    checkpoint.save(randomize(Transformer(ModelArgs.debug()), seed=1), tmp_path / "v4")
    out, _ = run(capsys, "--config", str(tmp_path / "v4"), "--phase", "decode", "--no-run", "--json", "--trace", str(tmp_path / "graphs"))
    phase = json.loads(out.splitlines()[-1])["phases"]["decode"]
    assert phase["opaque"] == debug["phases"]["decode"]["opaque"] and phase["flops"] == debug["phases"]["decode"]["flops"]
    assert "torch.ops.dsv4.sparse_attn" in (tmp_path / "graphs" / "decode_forward.py").read_text()


def test_another_depth_goes_on_as_the_last_layers_alternate():
    assert R.args_of("tiny:9").compress_ratios == (0, 0, 4, 128, 4, 128, 4, 128, 4, 0)
    assert R.args_of("tiny:43").n_layers == 43 and R.kinds(R.args_of("tiny:43"))["CSA, score"] == 21
    with pytest.raises(ValueError, match="tiny:x"):
        R.args_of("tiny:x")


@pytest.mark.parametrize("path, value, line", [
    (("graphs",), 2, "decode: graphs 1 -> 2"), (("breaks",), 1, "decode: breaks 0 -> 1"),
    (("largest_bytes",), 1 << 40, "decode: largest_bytes"), (("flops",), 1 << 60, "decode: flops"),
    (("faults",), ["host sync aten.item"], "decode: host sync aten.item"), (("operators",), 10**6, "decode: operators"),
    (("layers", "CSA, hash", "opaque", "dsv4.moe"), 0, "decode: CSA, hash: dsv4.moe 1 -> 0")], ids=lambda value: str(value))
def test_a_regression_is_named(debug, path, value, line):
    worse = copy.deepcopy(debug)
    place = worse["phases"]["decode"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    moved, bad = R.compare(debug, worse)
    assert any(text.startswith(line) for text in bad), (moved, bad)
    assert R.compare(worse, worse)[1] == [] or path == ("faults",)


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


def test_compare_exits_1_on_a_regression_and_0_without(capsys, tmp_path, debug):
    old = copy.deepcopy(debug)
    (tmp_path / "same.json").write_text(json.dumps(old))
    old["phases"]["decode"]["flops"] -= 1
    (tmp_path / "better.json").write_text(json.dumps(old))
    out, _ = run(capsys, "--config", "debug", "--phase", "decode", "--no-run", "--compare", str(tmp_path / "same.json"))
    assert "WORSE" not in out
    out, _ = run(capsys, "--config", "debug", "--phase", "decode", "--no-run", "--compare", str(tmp_path / "better.json"), code=1)
    assert "WORSE  decode: flops" in out


@pytest.mark.quick
@pytest.mark.parametrize("argv, says", [
    (("report", "--phase", "decode,fly"), "fly"), (("report", "--config", "no/such"), "no/such"), (("report", "--preset", "fast"), "fast"),
    (("report", "--compare", "no/such.json"), "no/such.json"), (("report", "--compare", __file__), "test_report.py"), ((), "required"),
    (("report", "--config", "tiny:1"), "tiny:1"), (("repot",), "repot")])
def test_bad_flags_are_one_line_and_exit_code_2(capsys, argv, says):
    assert C.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
