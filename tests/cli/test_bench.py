"""The published numbers are the recorded ones, and the benchmarks' own arithmetic is right."""

from __future__ import annotations

import json
import time
import xml.dom.minidom

import pytest
import torch

from bench import numbers, turns
from bench.cpu import cache, main, side_by_side, versus
from bench.plot import bars
from bench.record import RESULTS
from ops.cpp import KERNELS


def test_the_readme_and_the_numbers_page_show_the_recorded_numbers():
    text = numbers.README.read_text()
    assert numbers.updated(text) == text
    assert numbers.page() == numbers.NUMBERS.read_text()


def test_the_readme_shows_six_rows_of_the_record():
    table = numbers.cpu_table(numbers.recorded("cpu"), numbers.SHOWN)
    assert len(table.splitlines()) == 2 + 6


def test_a_readme_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="transcript"):
        numbers.updated("# A project\n")


def test_every_record_names_machine_versions_and_load():
    needed = ("date", "cpu", "cores", "python", "torch", "load_average")
    for path in RESULTS.glob("*.json"):
        environment = json.loads(path.read_text())["environment"]
        assert all(environment[key] for key in needed), path


def test_every_cpp_kernel_pays_for_itself_on_some_row():
    """In time of a step, or of compiling it; alone, or with the others of its library."""
    recorded = numbers.recorded("cpu_kernels")["kernels"]
    for name, kernel in KERNELS.items():
        alone = recorded.get(name.removesuffix("_backward"), {})
        cases = [*alone.values(), *recorded.get(kernel.library, {}).values()]
        gains = [max(case["times"], case.get("compile_times", 0)) for case in cases]
        assert max(gains) >= numbers.PAYS, name


def test_sides_take_turns_and_the_fastest_transformers_counts():
    calls = []

    def side(name):
        return lambda i: calls.append((i, name))

    result = side_by_side({name: side(name) for name in "ab"}, rounds=3)
    assert calls[2:] == [(i, name) for i in (1, 2, 3) for name in "ab"]
    assert set(result) == {"a", "b"}
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
    assert case["wall_ms"] >= 20
    assert (case["ms"] >= 20) == (threads > 1)
    assert case["contended"] == (threads == 1)


class FakeWorker:
    def __init__(self, calls: list, name: str, times: list[float]):
        self.calls = calls
        self.name = name
        self.times = times
        self.rounds = []

    def run(self):
        self.calls.append(self.name)
        ms = self.times[len(self.rounds)]
        self.rounds.append({"ms": ms, "wall_ms": ms})


def test_processes_take_turns_round_by_round():
    calls = []
    sides = {name: FakeWorker(calls, name, [1.0, 1.0]) for name in "ab"}
    assert turns.take_turns(sides, 2) == {name: sides[name].rounds for name in "ab"}
    assert calls == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    "mine, loses",
    (
        ([1.02, 1.02, 1.02], False),
        ([1.10, 1.10, 1.10], True),
        ([1.10, 1.25, 1.25], False),  # its rounds spread as far
        ([0.50, 0.50, 0.50], False),
    ),
)
def test_a_row_loses_only_beyond_five_percent_and_the_spread(mine, loses):
    rounds = [{"ms": ms, "wall_ms": ms} for ms in mine]
    base = [{"ms": 1.0, "wall_ms": 1.0}] * 3
    case = turns.ratio(rounds, base)
    assert case["ratio"] == pytest.approx(1 / min(mine))
    assert turns.loses(case) == loses


def test_flash_caches_a_seventh_of_v3():
    result = {}
    cache(result)
    case = result["cache at 128k, Flash"]
    assert case["v3_ratio"] > 7.0 and case["bytes_per_token"] == pytest.approx(6900, rel=0.05)


def test_the_plot_is_well_formed():
    svg = bars("a < b", {"x & y": 2.0, "z": 0.5})
    assert len(xml.dom.minidom.parseString(svg).getElementsByTagName("rect")) == 3


@pytest.mark.parametrize("argv", (["decode", "nonsense"], ["--against", "nonsense"]))
def test_unknown_cases_and_checkouts_are_refused(capsys, argv):
    assert main(argv) == 2 and "nonsense" in capsys.readouterr().err
