"""The kernels as compiled code, for GPUs that need not be there (bench/offline.py).

Each compiles, fits into shared memory, spills no more than recorded, and keeps its matrix
instructions. The record is bench/results/kernels_triton<version>.json; `python -m bench.offline
--record` rewrites it, --new adds to it. Compiled are, of every kernel on every architecture, the
shape that spills most, or takes most shared memory (of those with matrix instructions, where there
are any), and every shape of a kernel whose source is not the recorded one; with the Triton that is
installed, and with 3.6.0 where TRITON_360 names a folder that holds it.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton

import ops.launch as launch_module
from bench import cases, tune
from bench.offline import (
    SHARED,
    TARGETS,
    all_kernels,
    changed,
    compile_all,
    compile_launch,
    source_checksum,
)
from bench.record import RESULTS
from ops.launch import (
    TUNED,
    Launch,
    get_config,
    jit,
    launch,
    override_config,
    record,
    record_configs,
    tl,
)

SLACK = 1.1  # spills may grow by this and a few before somebody must look


@functools.cache
def calls(model: str) -> list[cases.Call]:
    """The different calls of all phases."""
    by_key = {}
    for phase in cases.PHASES:
        if phase.model == model:
            by_key.update({call.key: call for call in cases.calls(phase)})
    return list(by_key.values())


def recorded(version: str) -> dict:
    path = RESULTS / f"kernels_triton{version}.json"
    if not path.exists():
        pytest.skip(f"no record of Triton {version}: python -m bench.offline --record")
    return json.loads(path.read_text())


def complaints(results, table) -> list[str]:
    """One line for everything wrong with (architecture, kernel, resources) triples."""
    lines = []
    for arch, name, now in results:
        was = table.get(name, {}).get(arch)
        if "error" in now:
            lines.append(f"{arch} does not compile {name}: {now['error']}")
            continue
        if now["shared"] > SHARED[arch] * 1024:
            limit = f"{SHARED[arch]} KiB of shared memory"
            lines.append(f"{arch} has {limit}, not {now['shared']} bytes: {name}")
        if was:
            lines += [f"{arch} {complaint}: {name}" for complaint in regressions(now, was)]
        else:
            lines.append(f"{arch} has no record of {name}: python -m bench.offline --record")
    return lines


def regressions(now: dict, was: dict) -> Iterator[str]:
    """One line for each resource that a kernel needs more of than when it was recorded."""
    if now["spills"] > was["spills"] * SLACK + 8:
        yield f"spills {now['spills']} times, {was['spills']} when recorded"
    if now["spilling"] > was["spilling"] + 0.02:
        shares = f"{now['spilling']:.0%} of them, {was['spilling']:.0%} when recorded"
        yield f"spills in loops, {shares}"
    fewer = any(now["matrix"].get(kind, 0) * SLACK < n for kind, n in was["matrix"].items())
    if fewer or now["dots"] and not now["matrix"]:
        yield f"has matrix instructions {now['matrix']}, recorded {was['matrix']}"
    for resource, more in (("registers", 16), ("shared", 2048)):
        if now[resource] > was[resource] * SLACK + more:
            yield f"needs {now[resource]} {resource}, {was[resource]} when recorded"


@functools.cache
def kernels() -> dict:
    return all_kernels(calls("flash") + calls("pro"), list(TARGETS))


def heaviest(table) -> dict:
    """Of the recorded shapes of each kernel and architecture the one with most spills, then shared
    memory.

    fp32, whose products are no matrix instructions, only where a kernel has nothing else.
    """
    found = {}
    for arch, name in kernels():
        was = table.get(name, {}).get(arch, {})
        rank = bool(was.get("matrix")), was.get("spills", 0), was.get("shared", 0), name
        found[arch, name.split()[0]] = max(rank, found.get((arch, name.split()[0]), rank))
    return {(arch, name): kernels()[arch, name] for (arch, _), (*_, name) in found.items()}


def compiled_elsewhere(folder: str, wanted: dict, tmp_path: Path) -> list:
    """What compile_all gives with the Triton in a folder."""
    (tmp_path / "wanted").write_bytes(pickle.dumps(wanted))
    code = """if True:
        import json, pickle, sys
        from bench import offline

        wanted = pickle.load(sys.stdin.buffer)
        print(json.dumps(list(offline.compile_all(wanted))))
    """
    root = str(Path(__file__).parent.parent.parent)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, root])}
    command = [sys.executable, "-c", code]
    with open(tmp_path / "wanted", "rb") as file:
        done = subprocess.run(
            command, stdin=file, capture_output=True, text=True, env=env, cwd=root
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("shapes", ["heaviest", "changed"])
@pytest.mark.parametrize("version", ["installed", "3.6.0"])
def test_kernels_fit_the_gpu(version, shapes, tell, tmp_path):
    folder = os.environ.get("TRITON_360", "")
    if version == "3.6.0" and not folder:
        pytest.skip(
            "no kernel is compiled with Triton 3.6.0: set TRITON_360=FOLDER, "
            "after pip install --no-deps --target FOLDER triton==3.6.0"
        )
    known = recorded(triton.__version__ if version == "installed" else version)
    table = known["kernels"]
    wanted = heaviest(table) if shapes == "heaviest" else changed(kernels(), known)
    if version == "installed":
        results = list(compile_all(wanted))
    else:
        results = compiled_elsewhere(folder, wanted, tmp_path)
    assert {(arch, name) for arch, name, _ in results} == set(wanted)
    for arch in TARGETS:
        resources = [now for where, _, now in results if where == arch]
        if not resources:
            continue
        spilling = sum(r.get("spills", 0) > 0 for r in resources)
        shared = max(r.get("shared", 0) for r in resources) >> 10
        registers = max(r.get("registers", 0) for r in resources)
        tell(
            f"Triton {version:9} {arch:7} {len(resources):3} kernels, {spilling} of them spill; "
            f"at most {shared} KiB shared and {registers} registers"
        )
    wrong = complaints(results, table)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("version", [triton.__version__, "3.6.0"])
def test_every_kernel_is_in_the_record_and_fits_there(version):
    """All that the graphs launch and nothing else; each compiled and within the GPU's limits when
    it was recorded.
    """
    table = recorded(version)["kernels"]
    assert {(arch, name) for name, archs in table.items() for arch in archs} == set(kernels())
    wrong = complaints([(arch, name, table[name][arch]) for arch, name in kernels()], table)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize("arch", TARGETS)
def test_every_tile_is_in_the_table_and_still_a_candidate(model, arch):
    table = json.loads(TUNED.read_text())
    for call in calls(model):
        with record_configs() as questions:
            call.launches(arch)
        for (name, key), candidates in questions.items():
            assert table.get(name, {}).get(arch, {}).get(key) in candidates, (
                f"{arch} {name} {key}: python -m bench.tune --arch {arch}"
            )


@jit
def greedy(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    offsets = i[:, None] * N + i[None]
    tl.store(y + offsets, tl.dot(tl.load(x + offsets), tl.load(x + offsets)))


def launched(arch: str, programs: int = 1) -> list[Launch]:
    with record(arch) as found:
        x = torch.empty(256, 256, dtype=torch.bfloat16, device="meta")
        launch(greedy, (programs,), x, x.float(), **get_config("greedy", "a key", CANDIDATES, x))
    return found


CANDIDATES = [
    dict(N=512, num_warps=4),
    dict(N=256, num_warps=4),
    dict(N=32, num_warps=4),
    dict(N=16, num_warps=4),
]


SOURCE = """
import triton
import triton.language as tl

STEP = tl.constexpr(4)

@triton.jit
def helper(x):
    return x + 1

@triton.jit
def kernel(x, N: tl.constexpr):
    i = tl.arange(0, N) * STEP
    tl.store(x + i, helper(tl.load(x + i)))
"""


def test_a_checksum_follows_all_code_of_a_kernel_and_nothing_else(tmp_path):
    def checksum(name: str, *changes: tuple[str, str]) -> str:
        source = SOURCE
        for old, new in changes:
            assert source.count(old) == 1
            source = source.replace(old, new)
        path = tmp_path / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return source_checksum(module.kernel)

    one = checksum("one")
    assert one == checksum("comment", ("    i =", "    # of STEP\n    i ="))
    assert one == checksum("moved", ("STEP = tl", "\n\nSTEP = tl"))
    docstring = '(x):\n    """Next."""\n    return'
    assert one == checksum("docstring", ("(x):\n    return", docstring))
    changes = ("x + 1", "x + 2"), ("constexpr(4)", "constexpr(2)"), ("arange(0", "arange(1")
    assert one not in {checksum(f"change{i}", change) for i, change in enumerate(changes)}


def test_the_largest_tile_that_fits_is_chosen_and_written(tmp_path, monkeypatch):
    """512 does not fit, 256 spills, 32 is fine; the table keeps its other entries."""

    class Greedy:
        launches = staticmethod(lambda arch: launched(arch, 1000))

    table = tune.by_resources("sm_90", [Greedy])
    assert table == {("greedy", "a key"): CANDIDATES[2]}
    monkeypatch.setattr(tune, "TUNED", tmp_path / "tuned.json")
    before = {
        "other": {"sm_80": {"k": {"N": 1}}},
        "greedy": {"sm_90": {"b": {"N": 2}, "a key": {"N": 3}}},
    }
    tune.TUNED.write_text(json.dumps(before))
    tune.write({"sm_90": table})
    before["greedy"]["sm_90"]["a key"] = CANDIDATES[2]
    assert json.loads(tune.TUNED.read_text()) == before


def test_a_tile_is_worse_the_more_it_spills_or_leaves_idle():
    fine = dict(shared=1, dots=1, matrix={"HMMA": 1}, spills=0, spilling=0.0, instructions=100)

    def shortcoming(programs=132, **change):
        launch = launched("sm_90", programs)[0]
        return tune.shortcoming({**fine, **change}, launch, "sm_90", CANDIDATES[0])

    assert shortcoming() == shortcoming(spills=4) == shortcoming(programs=200) == 0
    unusable = shortcoming(matrix={})
    assert 0 < shortcoming(spills=6) < shortcoming(spills=50) < unusable
    assert shortcoming(shared=1 << 20) == shortcoming(error="no") == unusable
    assert shortcoming(spilling=0.1) > 0
    assert 0 < shortcoming(programs=100) < shortcoming(programs=10)


def test_regressions_are_found():
    """A kernel that needs too much, one without matrix instructions, one that does not compile."""
    with override_config({"greedy": CANDIDATES[1]}):
        result = compile_launch(launched("sm_90")[0], "sm_90")._asdict()
    assert result["matrix"] and result["spills"] > 0
    table = {"greedy": {"sm_90": {**result, "spills": 0, "matrix": {"DMMA": 1}}}}
    results = [
        ("sm_90", "greedy", {**result, "shared": 1 << 20}),
        ("sm_90", "other", {"error": "no"}),
        ("sm_90", "new", result),
    ]
    assert len(complaints(results, table)) == 6

    def count(now: dict, was: dict) -> int:
        return len(complaints([("sm_90", "greedy", now)], {"greedy": {"sm_90": was}}))

    assert count(result, result) == 0
    for change in (
        dict(spills=result["spills"] * 2),
        dict(spilling=0.03),
        dict(registers=400),
        dict(shared=result["shared"] + 20000),
        dict(matrix={kind: n // 2 for kind, n in result["matrix"].items()}),
        dict(matrix={}),
    ):
        assert count({**result, **change}, result) == 1, change
    without = {**result, "matrix": {}}
    assert count(without, without) == 1


def test_the_nearest_load_in_the_table_is_taken(monkeypatch):
    table = {
        "k": {
            "sm_90": {
                "d4 rows~16 q": {"N": 1},
                "d4 rows~256 q": {"N": 2},
                "d4 pairs~8 q": {"N": 3},
                "d8 rows~32 q": {"N": 4},
            }
        }
    }
    monkeypatch.setattr(launch_module, "_table", lambda: table)
    launch_module._tuned.cache_clear()
    found = [
        launch_module._tuned("k", "sm_90", f"d4 {load} q")
        for load in ("rows~2", "rows~32", "rows~128", "pairs~64", "other")
    ]
    launch_module._tuned.cache_clear()
    assert found == [{"N": 1}, {"N": 1}, {"N": 2}, {"N": 3}, None]
