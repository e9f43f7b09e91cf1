"""Compiled once: layers of a kind share a graph; a second process or machine compiles nothing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compile_config as C
from model import Transformer
from tools.capture import kinds
from tools.compile_count import CompileCount
from tools.report import MEASURE, args_of

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.compile


def test_deep_models_make_as_many_graphs_as_shallow_ones():
    """12 and 43 layers of the embedded width: one graph per kind, one before and one after."""
    made = {}
    for depth in (12, 43):
        torch._dynamo.reset()
        args = args_of(f"tiny:{depth}")
        model, count = Transformer(args).eval(), CompileCount()
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
        self.folder = folder
        self.log = folder / "compiled.log"
        tools = folder / "bin"
        tools.mkdir(parents=True)
        for name in ("g++", "clang++", "c++"):
            if real := shutil.which(name):
                tool = tools / name
                tool.write_text(
                    f"""#!/bin/sh
case " $* " in *" -E "*) ;; *" -o "*) echo "$@" >> {self.log};; esac
exec {real} "$@"
"""
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
        """Compile and run decode of the debug model -> measures, starts of the C++ compiler."""
        self.log.unlink(missing_ok=True)
        done = self.run("-c", MEASURE, "debug", "decode", "default")
        assert done.returncode == 0, done.stderr
        starts = self.log.read_text().splitlines() if self.log.exists() else []
        return json.loads(done.stdout.splitlines()[-1]), len(starts)


@pytest.fixture(scope="module")
def machine(tmp_path_factory) -> Machine:
    """One that has compiled decode."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    machine.cold = machine.decode()
    return machine


def test_the_first_process_compiles(machine):
    result, compiled = machine.cold
    assert result["cache_misses"] > 0 and compiled > 0
    assert result["recompiles"] == result["run_breaks"] == 0


def test_a_second_process_compiles_nothing(machine):
    result, compiled = machine.decode()
    assert result["cache_misses"] == compiled == 0
    assert result["recompiles"] == result["run_breaks"] == 0


def test_a_carried_cache_compiles_nothing_on_an_equal_machine(machine, tmp_path):
    packed, other = tmp_path / "cache.tar.gz", Machine(tmp_path / "other")
    assert machine.run("compile_config.py", "cache", "save", str(packed)).returncode == 0
    loaded = other.run("compile_config.py", "cache", "load", str(packed))
    assert loaded.returncode == 0 and "unpacked" in loaded.stdout, loaded.stderr
    result, compiled = other.decode()
    assert (result["cache_misses"], compiled) == (0, 0)
