"""Launches of Flash's layers and bytes that they move, lowered for a GPU that is not there.

After a change that was meant, this rewrites tests/compile/snapshots/launches.json:
`python -m pytest tests/compile/test_launches.py -m "full or not full" --update-snapshots`
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from model import ModelArgs
from tools.capture import REST, Shape
from tools.launches import Lowered, figures, lower_layers

SNAPSHOT = Path(__file__).parent / "snapshots" / "launches.json"
MINOR = ".".join(torch.__version__.split(".")[:2])
MILLION = 1 << 20
CASES = {  # rows, tokens of each, context
    "decode": Shape(1, 1, MILLION),
    "decode, 8 rows": Shape(8, 1, 4096),
    "verify": Shape(1, 4, MILLION),
    "prefill": Shape(1, 8192, 8192),
    "train": Shape(1, 4096, 4096),
}
SLACK = 1  # a launch: Inductor fuses by what the process has lowered before, too
pytestmark = pytest.mark.compile


@functools.cache
def lowered(case: str, weights: str) -> dict[str, Lowered]:
    return lower_layers(ModelArgs.flash(), case.split(",")[0], CASES[case], weights)


def known() -> dict:
    return json.loads(SNAPSHOT.read_text()) if SNAPSHOT.exists() else {}


def numbers(case: str, weights: str) -> dict[str, list]:
    return {
        kind: [layer.launches, round(layer.moved / layer.needed, 3)]
        for kind, layer in lowered(case, weights).items()
    }


COMBINATIONS = [
    (case, weights)
    for case in CASES
    for weights in ("bf16", "fp4")
    if (case, weights) != ("train", "fp4")  # packed weights are frozen
]


@pytest.mark.parametrize("case, weights", COMBINATIONS)
def test_launches_and_bytes_stay_under_their_ceilings(case, weights, request, tell):
    """The recorded ones; more need --update-snapshots, with a reason in the commit."""
    now, snapshot = numbers(case, weights), known()
    key = f"{case}, {weights}"
    if request.config.getoption("--update-snapshots"):
        snapshot.setdefault(MINOR, {})[key] = now
        SNAPSHOT.write_text(json.dumps(snapshot, indent=1, sort_keys=True) + "\n")
    recorded = snapshot.get(MINOR, {}).get(key)
    if recorded is None:
        pytest.skip(f"no launch counts for torch {MINOR}; --update-snapshots records them")
    launches = ", ".join(f"{kind} {n}" for kind, (n, _) in now.items())
    tell(f"launches per layer, {key}: {launches}")
    assert now.keys() == recorded.keys()
    for kind, (count, share) in now.items():
        before, share_before = recorded[kind]
        assert 0 < count <= before + SLACK, (
            f"{key}, {kind}: {count} launches, {before} when recorded"
        )
        assert 0.99 < share <= 1.02 * share_before, (
            f"{key}, {kind}: {share} of the bytes needed, {share_before} when recorded"
        )


@pytest.mark.parametrize("case, weights", COMBINATIONS)
def test_no_weight_is_copied(case, weights):
    for kind, layer in lowered(case, weights).items():
        copies = [row for row in layer.rows if row.copies]
        assert not copies, f"{case}, {weights}, {kind}: {copies}"


def test_a_weight_that_is_copied_is_found():
    """What `weight.float()` in the graph does: the router's, the compressors', the head's."""
    modes = {"linear_fp32": "reference"}
    found = lower_layers(ModelArgs.flash(), "decode", CASES["decode"], modes=modes)
    shapes = {kind: {s for row in layer.rows for s in row.copies} for kind, layer in found.items()}
    assert shapes["sliding, hash"] == {(256, 4096)} and shapes[REST] == {(129280, 4096)}
    assert {(1024, 4096), (256, 4096)} == shapes["CSA, score"]
    assert found["CSA, score"].moved > 1.1 * lowered("decode", "bf16")["CSA, score"].moved


def test_figures_are_of_the_weights_that_a_phase_can_have():
    """Packed weights are frozen: training has none, and still is reported."""
    found = figures(ModelArgs.flash(), "train", CASES["train"])
    assert {tuple(weights) for kinds in found.values() for weights in kinds.values()} == {("bf16",)}


def test_our_ops_count_as_what_they_launch():
    """One token: hyper-connections and experts take two kernels each, rope one."""
    rows = lowered("decode", "bf16")["sliding, hash"].rows
    ours = {row.name: row for row in rows if row.sort == "ours"}
    counts = {name: row.launches for name, row in ours.items()}
    expected = {"hc_pre": 2, "rope": 1, "sparse_attn": 2, "hc_post_pre": 2, "moe": 2, "hc_post": 1}
    assert counts == {**expected, "linear_fp32": 1}
    results = 4096 * 2 + (4 + 16) * 4  # y, post, comb; beside them what one kernel leaves the other
    assert results < ours["hc_pre"].written < 2 * results
    experts = 6 * 3 * 4096 * 2048 * 2  # bytes of the chosen ones
    assert experts < ours["moe"].read < 1.01 * experts
