"""Contracts of the kernels as compiled code, for GPUs that need not be there (bench/offline.py): each compiles, fits into
shared memory, spills no more than recorded, and keeps its matrix instructions.

The record is bench/results/kernels_triton<version>.json; `python -m bench.offline --record` rewrites it. Another Triton than
the pinned one is tested where TRITON_360 names a folder that holds it (pip install --no-deps --target FOLDER triton==3.6.0).
"""
from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, tune
from bench.offline import SHARED, TARGETS, compile_all, compile_launch, launches
from bench.record import RESULTS
import ops.launch as launch_module
from ops.launch import TUNED, Launch, asked, choose, jit, launch, record, tiles, tl

SLACK = 1.1  # spills may grow by this and a few before somebody must look
SOME = {"flash": ["sm_90", "sm_120", "gfx942"], "pro": []}  # the latter two have the least shared memory; the rest is slow


@functools.cache
def calls(model: str) -> list[cases.Call]:
    return list({call.key: call for phase in cases.PHASES if phase.model == model for call in cases.calls(phase)}.values())


def recorded(version: str) -> dict:
    path = RESULTS / f"kernels_triton{version}.json"
    if not path.exists():
        pytest.skip(f"no record of Triton {version}: python -m bench.offline --record")
    return json.loads(path.read_text())["kernels"]


def judge(results, table) -> list[str]:
    """What is wrong with (architecture, kernel, resources) triples, in words."""
    wrong = []
    for arch, name, now in results:
        was = table.get(name, {}).get(arch, {})
        if "error" in now:
            wrong.append(f"{arch} does not compile {name}: {now['error']}")
            continue
        if now["shared"] > SHARED[arch] * 1024:
            wrong.append(f"{arch} has {SHARED[arch]} KiB of shared memory, not {now['shared']} bytes: {name}")
        if not was:
            wrong.append(f"{arch} has no record of {name}: python -m bench.offline --record")
            continue
        if now["spills"] > was["spills"] * SLACK + 8:
            wrong.append(f"{arch} spills {now['spills']} times, {was['spills']} when recorded: {name}")
        if now["spilling"] > was["spilling"] + 0.02:
            wrong.append(f"{arch} spills in loops, {now['spilling']:.0%} of them, {was['spilling']:.0%} when recorded: {name}")
        if any(now["matrix"].get(kind, 0) * SLACK < n for kind, n in was["matrix"].items()) or now["dots"] and not now["matrix"]:
            wrong.append(f"{arch} has matrix instructions {now['matrix']}, recorded {was['matrix']}: {name}")
        for what, more in (("registers", 16), ("shared", 2048)):
            if now[what] > was[what] * SLACK + more:
                wrong.append(f"{arch} needs {now[what]} {what}, {was[what]} when recorded: {name}")
    return wrong


def cases_of(model: str, archs: list[str]):
    return [pytest.param(model, arch, marks=() if arch in archs else pytest.mark.slow) for arch in TARGETS]


@pytest.mark.parametrize("model, arch", cases_of("flash", SOME["flash"]) + cases_of("pro", SOME["pro"]))
def test_kernels_fit_the_gpu(model, arch, tell):
    import triton
    table = recorded(triton.__version__)
    results = list(compile_all(calls(model), [arch]))
    spills = sum(result.get("spills", 0) > 0 for _, _, result in results)
    tell(f"{model:6} {arch:7} {len(results):3} kernels, {spills} of them spill; "
         f"at most {max(r.get('shared', 0) for *_, r in results) >> 10} KiB shared and {max(r.get('registers', 0) for *_, r in results)} registers")
    wrong = judge(results, table)
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif("TRITON_360" not in os.environ, reason="TRITON_360 names no folder with another Triton")
def test_kernels_fit_the_h200_with_its_triton():
    code = ("import json; from bench import cases, offline; import triton\n"
            "calls = {c.key: c for p in cases.PHASES if p.model == 'flash' for c in cases.calls(p)}\n"
            "print(json.dumps([triton.__version__, list(offline.compile_all(list(calls.values()), ['sm_90']))]))")
    root = str(Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ["TRITON_360"], root])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr
    version, results = json.loads(done.stdout.splitlines()[-1])
    wrong = judge(results, recorded(version))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize("arch", TARGETS)
def test_every_tile_is_in_the_table_and_still_a_candidate(model, arch):
    table = json.loads(TUNED.read_text())
    for call in calls(model):
        with asked() as questions:
            call.launches(arch)
        for (name, key), candidates in questions.items():
            assert table.get(name, {}).get(arch, {}).get(key) in candidates, f"{arch} {name} {key}: python -m bench.tune --arch {arch}"


@jit
def greedy(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at)))


def launched(arch: str, programs: int = 1) -> list[Launch]:
    with record(arch) as found:
        x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
        launch(greedy, (programs,), x, x.float(), **tiles("greedy", "a key", CANDIDATES, x))
    return found


CANDIDATES = [dict(N=512, num_warps=4), dict(N=256, num_warps=4), dict(N=32, num_warps=4), dict(N=16, num_warps=4)]


def test_the_largest_tile_that_fits_is_chosen_and_written(tmp_path, monkeypatch):
    """512 does not fit, 256 spills, 32 is fine; the table keeps its other entries."""
    class Greedy:
        launches = staticmethod(lambda arch: launched(arch, 1000))

    table = tune.by_resources("sm_90", [Greedy])
    assert table == {("greedy", "a key"): CANDIDATES[2]}
    monkeypatch.setattr(tune, "TUNED", tmp_path / "tuned.json")
    tune.TUNED.write_text('{"other": {"sm_80": {"k": {"N": 1}}}, "greedy": {"sm_90": {"b": {"N": 2}, "a key": {"N": 3}}}}')
    tune.write({"sm_90": table})
    assert json.loads(tune.TUNED.read_text()) == {"other": {"sm_80": {"k": {"N": 1}}}, "greedy": {"sm_90": {"b": {"N": 2}, "a key": CANDIDATES[2]}}}


def test_a_tile_is_worse_the_more_it_spills_or_leaves_idle():
    fine = dict(shared=1, dots=1, matrix={"HMMA": 1}, spills=0, spilling=0.0, instructions=100)
    worse = lambda change={}, programs=132: tune.shortcoming({**fine, **change}, launched("sm_90", programs)[0], "sm_90", CANDIDATES[0])
    assert worse() == worse(dict(spills=4)) == worse(programs=200) == 0
    assert 0 < worse(dict(spills=6)) < worse(dict(spills=50)) < worse(dict(matrix={})) == worse(dict(shared=1 << 20)) == worse(dict(error="no"))
    assert 0 < worse(dict(spilling=0.1)) and 0 < worse(programs=100) < worse(programs=10)


def test_what_is_wrong_is_found():
    """A kernel that needs too much, one that lost its matrix instructions, and one that does not compile."""
    with choose({"greedy": CANDIDATES[1]}):
        result = compile_launch(launched("sm_90")[0], "sm_90")._asdict()
    assert result["matrix"] and result["spills"] > 0
    table = {"greedy": {"sm_90": {**result, "spills": 0, "matrix": {"DMMA": 1}}}}
    wrong = judge([("sm_90", "greedy", {**result, "shared": 1 << 20}), ("sm_90", "other", {"error": "no"}), ("sm_90", "new", result)], table)
    assert len(wrong) == 6
    for change in (dict(spills=result["spills"] * 2), dict(spilling=0.03), dict(registers=400), dict(shared=result["shared"] + 20000),
                   dict(matrix={kind: n // 2 for kind, n in result["matrix"].items()}), dict(matrix={})):
        assert len(judge([("sm_90", "greedy", {**result, **change})], {"greedy": {"sm_90": result}})) == 1, change
    assert len(judge([("sm_90", "greedy", {**result, "matrix": {}})], {"greedy": {"sm_90": {**result, "matrix": {}}}})) == 1
    assert judge([("sm_90", "greedy", result)], {"greedy": {"sm_90": result}}) == []


def test_the_nearest_load_in_the_table_is_taken(monkeypatch):
    table = {"k": {"sm_90": {"d4 rows~16 q": {"N": 1}, "d4 rows~256 q": {"N": 2}, "d4 pairs~8 q": {"N": 3}, "d8 rows~32 q": {"N": 4}}}}
    monkeypatch.setattr(launch_module, "_table", lambda: table)
    launch_module._tuned.cache_clear()
    found = [launch_module._tuned("k", "sm_90", f"d4 {load} q") for load in ("rows~2", "rows~32", "rows~128", "pairs~64", "other")]
    launch_module._tuned.cache_clear()
    assert found == [{"N": 1}, {"N": 1}, {"N": 2}, {"N": 3}, None]
