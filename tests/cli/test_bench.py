"""The published numbers are the recorded ones, and the benchmarks' own arithmetic is right."""

from __future__ import annotations

import json
import time
import xml.dom.minidom

import pytest
import torch

from bench import readme
from bench.cpu import cache, main, side_by_side, versus
from bench.plot import bars
from bench.record import RESULTS


def test_the_readme_shows_the_recorded_numbers():
    text = readme.README.read_text()
    assert readme.updated(text) == text


def test_every_record_names_machine_versions_and_load():
    for path in RESULTS.glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert all(
            environment[key] for key in ("date", "cpu", "cores", "python", "torch", "load_average")
        ), path


def test_sides_take_turns_and_the_fastest_transformers_counts():
    calls = []
    result = side_by_side(
        {name: lambda i, name=name: calls.append((i, name)) for name in "ab"}, rounds=3
    )
    assert calls[2:] == [(i, name) for i in (1, 2, 3) for name in "ab"] and set(result) == {
        "a",
        "b",
    }
    case = {
        "transformers eager, x": {"ms": 8.0},
        "transformers eager, y": {"ms": 6.0},
        "ours compiled": {"ms": 2.0},
    }
    assert versus(case)["ratio"] == 3


@pytest.mark.parametrize("threads", (1, 2))
def test_one_thread_is_timed_by_its_work_and_several_by_the_clock(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = side_by_side({"asleep": lambda i: time.sleep(0.02)}, rounds=2)["asleep"]
    finally:
        torch.set_num_threads(before)
    assert (
        case["wall_ms"] >= 20
        and (case["ms"] >= 20) == (threads > 1)
        and case["contended"] == (threads == 1)
    )


def test_flash_caches_a_seventh_of_v3():
    result = {}
    cache(result)
    case = result["cache at 128k, Flash"]
    assert case["v3_ratio"] > 7.0 and case["bytes_per_token"] == pytest.approx(6900, rel=0.05)


def test_the_plot_is_well_formed():
    svg = bars("a < b", {"x & y": 2.0, "z": 0.5})
    assert len(xml.dom.minidom.parseString(svg).getElementsByTagName("rect")) == 3


def test_an_unknown_case_is_refused(capsys):
    assert main(["decode", "nonsense"]) == 2 and "nonsense" in capsys.readouterr().err
