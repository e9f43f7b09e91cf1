"""The GPU suite runs here at toy sizes: arguments, baselines, errors, records and the scoreboard.

Times mean nothing.
"""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from bench import gpu, gpu_scoreboard
from bench.gpu_measure import CASES, Bench, Side, Skipped, against
from bench.gpu_models import decode_bytes, flops, numbers
from model import ModelArgs, Transformer
from ops.registry import LAUNCHERS


@pytest.fixture(scope="module")
def results():
    return gpu.measure(["G1.1", "G1.3", "G1.11"], budget=460, toy=True)


def test_every_op_with_a_kernel_has_a_case_and_every_case_its_place():
    covered = {op.removesuffix("_backward") for case in CASES.values() for op in case.ops}
    assert {name.removesuffix("_backward") for name in LAUNCHERS} <= covered
    assert sorted(gpu.ORDER) == sorted(CASES)


def test_a_case_is_a_json_line_with_times_errors_and_ratios(results):
    assert set(results) == {"G1.1", "G1.3", "G1.11"}
    for case in results.values():
        assert json.loads(json.dumps(case)) == case and case["rows"] and "error" not in case["rows"]
        for row in case["rows"].values():
            ours, eager = (row["sides"][name] for name in ("ours", "eager"))
            assert ours["ms"] > 0 and ours["error"] < 1e-2 and eager["repetitions"] > 0
            assert row["ratio"]["eager"] > 0 and row["floor_ms"] > 0 and row["shapes"]


def test_the_scoreboard_scores_what_was_measured_and_leaves_the_rest_open(results):
    rows, text = gpu.scoreboard(results)
    reached = {row["headline"]: row for row in rows if row["reached"] is not None}
    assert "hc_post forward, times eager" in reached
    assert "indexer 8k, ms" not in reached and "CSA forward 4k, ms" in text
    line = gpu_scoreboard.less("x", "2", 2, 1, lambda cases: cases["a"])
    assert line.score({"a": 1.5}) == {
        "headline": "x",
        "published": "2",
        "match": 2,
        "beat": 1,
        "reached": 1.5,
        "matched": True,
        "beaten": False,
    }
    assert line.score({})["matched"] is None
    for row in gpu.scoreboard(results, toy=True)[0]:
        assert row["reached"] is None and row["matched"] is None


def test_sides_take_turns_and_one_that_fails_stops_nothing():
    bench, called = Bench(toy=True), []

    def side(name, error):
        return lambda x: called.append(name) or x + error

    def broken(x):
        raise RuntimeError("no such thing\nas this")

    def absent(x):
        importlib.import_module("no_such_library")

    def skipped(x):
        raise Skipped("not here")

    x = torch.ones(4)
    sides = {
        "ours": side("a", 1e-4),
        "worse": side("b", 1e-2),
        "broken": broken,
        "absent": absent,
        "skipped": skipped,
    }
    error_of = against(lambda: x)
    row = bench.compare("row", sides, [(x,)], moved=32, flops=8, error_of=error_of, note="kept")
    found = row["sides"]
    turns = [name for name in called[-8:-4]]  # then come the calls by the host's clock
    assert turns == ["a", "b", "a", "b"] and row["note"] == "kept"
    assert found["broken"] == {"failed": "RuntimeError: no such thing\nas this"}
    assert "no_such_library" in found["absent"]["absent"]
    assert "not here" in found["skipped"]["skipped"]
    assert set(row["ratio"]) == {"worse"}
    assert found["worse"]["less_accurate"] and not found["ours"]["less_accurate"]
    assert found["ours"]["error"] == pytest.approx(1e-4, rel=1e-2)


def test_the_budget_leaves_cases_and_rows_out():
    left = gpu.measure(["G2"], budget=0) if torch.cuda.is_available() else None
    assert left is None or "left_out" in left["G2"]
    bench = Bench(toy=True, deadline=0.0)
    assert "left_out" in bench.compare("row", {"ours": lambda x: x}, [(torch.ones(1),)])


def test_preparing_runs_what_is_compiled_and_nothing_else():
    bench, called = Bench(toy=True), []
    bench.prepare = True
    sides = {
        "ours": lambda x: called.append("ours"),
        "eager": lambda x: called.append("eager"),
        "compiled": Side(lambda x: called.append("compiled"), made=True),
    }
    bench.compare("row", sides, [(torch.ones(1),)])
    assert called == ["ours", "compiled"] and bench.rows == {"row": {"failed": {}}}


def test_work_and_bytes_agree_with_the_published_model():
    def of(*ratios, **more):
        with torch.device("meta"):
            args = ModelArgs(
                n_layers=len(ratios),
                n_hash_layers=0,
                n_mtp_layers=0,
                compress_ratios=ratios,
                **more,
            )
            return Transformer(args).to(torch.bfloat16)

    assert 3 * flops(of(0, 0, 4, 128), 12288) / 12288 == pytest.approx(10.64e9, rel=0.04)
    slice_ = of(4, 128, 4, 128)
    assert decode_bytes(slice_, 1, 4096) == pytest.approx(0.800e-3 * 4.3e12, rel=0.03)
    assert numbers(slice_)[0] > 10 * numbers(slice_)[1]


def test_without_a_gpu_one_line_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu.cli.main("bench.gpu", gpu.run, []) == 2
    assert "--toy" in capsys.readouterr().err
    assert gpu.cli.main("bench.gpu", gpu.run, ["--only", "G9", "--toy"]) == 2
    assert "G9" in capsys.readouterr().err
