"""What is compiled is compiled once: layers of a kind share a graph, a second process compiles nothing, nor does an equal machine."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import compile_config as C
from model import Transformer
from tools.report import args_of, kinds

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.compile


def test_deep_models_make_as_many_graphs_as_shallow_ones():
    """12 and 43 layers of the embedded width: one graph per kind, one before the layers and one after."""
    made = {}
    for depth in (12, 43):
        torch._dynamo.reset()
        args = args_of(f"tiny:{depth}")
        model, count = Transformer(args).eval(), C.CompileCount()
        model.setup_caches(1, 256)
        run = C.compile_decode(model, C.CompileConfig(backend="eager", region="layer"))
        run(torch.ones(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
        made[depth] = count.graphs
        assert made[depth] == len(kinds(args)) - 1 + 2  # the MTP block is not part of decode
    assert made[12] == made[43]


class Machine:
    """Processes with a compile cache of their own, and a C++ compiler that counts what it compiles.

    Inductor preprocesses one header (-E) in every process, to name its cache by what is in it.
    """

    def __init__(self, folder: Path):
        self.folder, self.log, tools = folder, folder / "compiled.log", folder / "bin"
        tools.mkdir(parents=True)
        for name in ("g++", "clang++", "c++"):
            if real := shutil.which(name):
                tool = tools / name
                tool.write_text(
                    f'#!/bin/sh\ncase " $* " in *" -E "*) ;; *" -o "*) echo "$@" >> {self.log};; esac\nexec {real} "$@"\n'
                )
                tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
        self.env = os.environ | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
        }

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=self.env, cwd=ROOT
        )

    def decode(self) -> tuple[dict, int]:
        """Compile and run decode of the debug model -> what was measured, and how often the C++ compiler was started."""
        self.log.unlink(missing_ok=True)
        done = self.run(
            "-c",
            "import json; from tools import report; print(json.dumps(report.measure('debug', 'decode', 'default')))",
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), len(
            self.log.read_text().splitlines()
        ) if self.log.exists() else 0


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    """One that has compiled decode."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    machine.cold = machine.decode()
    return machine


def test_the_first_process_compiles(machine):
    result, compiled = machine.cold
    assert (
        result["cache_misses"] > 0
        and compiled > 0
        and result["recompiles"] == result["run_breaks"] == 0
    )


def test_a_second_process_compiles_nothing(machine):
    result, compiled = machine.decode()
    assert (result["cache_misses"], compiled, result["recompiles"], result["run_breaks"]) == (
        0,
        0,
        0,
        0,
    )


def test_a_carried_cache_compiles_nothing_on_an_equal_machine(machine, tmp_path):
    packed, other = tmp_path / "cache.tar.gz", Machine(tmp_path / "other")
    assert machine.run("compile_config.py", "cache", "save", str(packed)).returncode == 0
    loaded = other.run("compile_config.py", "cache", "load", str(packed))
    assert loaded.returncode == 0 and "unpacked" in loaded.stdout, loaded.stderr
    result, compiled = other.decode()
    assert (result["cache_misses"], compiled) == (0, 0)


def pack(path: Path, key: dict, *names: str) -> None:
    (path.parent / "key.json").write_text(json.dumps(key))
    with tarfile.open(path, "w:gz") as tar:
        tar.add(path.parent / "key.json", "key.json")
        for name in names:
            tar.add(path.parent / "key.json", name)


def refused(capsys, *argv: str) -> str:
    assert C.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.quick
def test_caches_that_do_not_fit_are_refused_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "a.tar.gz"
    for key in C.cache_key():
        pack(file, C.cache_key() | {key: "another"}, "cache/x")
        assert f"saved for {key} another" in refused(capsys, "cache", "load", str(file))
    assert not (tmp_path / "cache" / "x").exists()
    pack(file, {}, "cache/x")
    assert "saved for torch None" in refused(capsys, "cache", "load", str(file))
    for key in ([1], "torch", None):
        pack(file, key, "cache/x")
        assert (
            "a.tar.gz" in (line := refused(capsys, "cache", "load", str(file)))
            and "is not a cache" in line
        )
    with tarfile.open(file, "w:gz") as tar:
        tar.add(tmp_path, "key.json", recursive=False)
    assert "is not a cache" in refused(capsys, "cache", "load", str(file))
    assert (
        "no/such" in (line := refused(capsys, "cache", "save", "no/such/x.tar.gz"))
        and ".tmp" not in line
    )
    file.write_bytes(b"not a tar")
    assert "is not a cache" in refused(capsys, "cache", "load", str(file))
    assert "no/such" in refused(capsys, "cache", "load", "no/such/file")
    assert "holds no compiled code" in refused(capsys, "cache", "save", str(file))
    assert file.read_bytes() == b"not a tar"  # nothing half-written


@pytest.mark.quick
def test_a_cache_unpacks_only_into_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    file = tmp_path / "a.tar.gz"
    pack(file, C.cache_key(), "cache/a/x", "cache/../../escaped", "/absolute/escaped")
    assert C.load_cache(str(file)) == 1 and (tmp_path / "deep" / "cache" / "a" / "x").exists()
    assert (
        not (tmp_path / "escaped").exists()
        and not (tmp_path / "deep" / "escaped").exists()
        and not Path("/absolute").exists()
    )


@pytest.mark.quick
@pytest.mark.parametrize("damage", ("cut off", "a wrong byte"))
def test_a_damaged_cache_is_refused_and_leaves_nothing_half_written(
    capsys, tmp_path, monkeypatch, damage
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    file, big = tmp_path / "a.tar.gz", tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20))
    with tarfile.open(file, "w:gz") as tar:
        (tmp_path / "key.json").write_text(json.dumps(C.cache_key()))
        tar.add(tmp_path / "key.json", "key.json")
        tar.add(big, "cache/a/big")
    packed = bytearray(file.read_bytes())
    if damage == "cut off":
        del packed[len(packed) // 2 :]
    else:
        packed[len(packed) // 2] ^= 1
    file.write_bytes(packed)
    line = refused(capsys, "cache", "load", str(file))
    assert (
        str(file) in line
        and "anew" in line
        and not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    )


@pytest.mark.quick
def test_the_key_changes_with_the_source(tmp_path, monkeypatch):
    before = C.cache_key()
    (tmp_path / "ops").mkdir()
    for name in ("model.py", "ops/moe.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(C, "ROOT", tmp_path)
    one = C.cache_key()["source"]
    (tmp_path / "ops" / "moe.py").write_text("# changed")
    assert len({before["source"], one, C.cache_key()["source"]}) == 3
