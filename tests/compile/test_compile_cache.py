"""Contracts of `compile_config.py cache`: loaded whole, where it fits, into its folder, or not."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch
from torch.utils._filelock import FileLock

import compile_config
from tools import compile_cache as cache

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.compile


def pack(path: Path, key: dict, *names: str) -> None:
    (path.parent / "key.json").write_text(json.dumps(key))
    with tarfile.open(path, "w:gz") as tar:
        tar.add(path.parent / "key.json", "key.json")
        for name in names:
            tar.add(path.parent / "key.json", name)


def refused(capsys, *argv: str) -> str:
    assert compile_config.main(list(argv)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.quick
def test_caches_that_do_not_fit_are_refused_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "a.tar.gz"
    for key in cache.cache_key():
        pack(file, cache.cache_key() | {key: "another"}, "cache/x")
        assert f"saved for {key} another" in refused(capsys, "cache", "load", str(file))
    assert not (tmp_path / "cache" / "x").exists()
    pack(file, {}, "cache/x")
    assert "saved for torch None" in refused(capsys, "cache", "load", str(file))
    for key in ([1], "torch", None):
        pack(file, key, "cache/x")
        line = refused(capsys, "cache", "load", str(file))
        assert "a.tar.gz" in line and "is not a cache" in line
    with tarfile.open(file, "w:gz") as tar:
        tar.add(tmp_path, "key.json", recursive=False)
    assert "is not a cache" in refused(capsys, "cache", "load", str(file))
    line = refused(capsys, "cache", "save", "no/such/x.tar.gz")
    assert "no/such" in line and ".tmp" not in line
    file.write_bytes(b"not a tar")
    assert "is not a cache" in refused(capsys, "cache", "load", str(file))
    assert "no/such" in refused(capsys, "cache", "load", "no/such/file")
    assert "holds no compiled code" in refused(capsys, "cache", "save", str(file))
    assert file.read_bytes() == b"not a tar"  # nothing half-written


@pytest.mark.quick
def test_a_cache_unpacks_only_into_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    file = tmp_path / "a.tar.gz"
    pack(file, cache.cache_key(), "cache/a/x", "cache/../../escaped", "/absolute/escaped")
    deep = tmp_path / "deep"
    assert cache.load_cache(str(file)) == 1 and (deep / "cache" / "a" / "x").exists()
    for escaped in (tmp_path / "escaped", deep / "escaped", Path("/absolute")):
        assert not escaped.exists()


@pytest.mark.quick
@pytest.mark.parametrize("damage", ("cut off", "a wrong byte"))
def test_a_damaged_cache_is_refused_and_leaves_nothing_half_written(
    capsys, tmp_path, monkeypatch, damage
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    file, big = tmp_path / "a.tar.gz", tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20))
    with tarfile.open(file, "w:gz") as tar:
        (tmp_path / "key.json").write_text(json.dumps(cache.cache_key()))
        tar.add(tmp_path / "key.json", "key.json")
        tar.add(big, "cache/a/big")
    packed = bytearray(file.read_bytes())
    if damage == "cut off":
        del packed[len(packed) // 2 :]
    else:
        packed[len(packed) // 2] ^= 1
    file.write_bytes(packed)
    line = refused(capsys, "cache", "load", str(file))
    assert str(file) in line and "anew" in line
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.quick
def test_the_key_changes_with_the_source(tmp_path, monkeypatch):
    before = cache.cache_key()
    (tmp_path / "ops").mkdir()
    for name in ("model.py", "ops/moe.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(cache, "ROOT", tmp_path)
    one = cache.cache_key()["source"]
    (tmp_path / "ops" / "moe.py").write_text("# changed")
    assert len({before["source"], one, cache.cache_key()["source"]}) == 3


# A process that compiles: writes files, says so, and waits to be killed
COMPILES = """
import sys, time
from pathlib import Path
from tools.compile_cache import JOURNAL, cache_dir

with JOURNAL.compiling():
    for name in sys.argv[1:]:
        Path(cache_dir(), name).write_bytes(Path({library!r}).read_bytes())
    print("written", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A whole one."""
    path = tmp_path_factory.mktemp("library") / "whole.so"
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path]
    subprocess.run(command, input=b"int f() { return 0; }", check=True)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, library) -> Path:
    """A cache folder with a whole library, and files that no compiler leaves unfinished."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    shutil.copy(library, tmp_path / "ab" / "old.so")
    (tmp_path / "ab" / "old.py").write_text("pass")
    (tmp_path / "ab" / "empty.lock").touch()
    return tmp_path


@contextlib.contextmanager
def compiler(library: Path, *names: str):
    """A process that compiles, killed at the end."""
    command = [sys.executable, "-c", COMPILES.format(library=str(library)), *names]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "written\n"
            yield
        finally:
            process.kill()


def names(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def test_unfinished_files_are_discarded_by_what_they_hold(folder, library):
    kept = names(folder)
    for name in ("empty.so", "empty.py", "empty.cpp", "ab/empty.main.cpp"):
        (folder / name).touch()
    whole = library.read_bytes()
    for i, size in enumerate((1, 63, 64, 1000, len(whole) // 2, len(whole) - 1)):
        (folder / f"cut{i}.so").write_bytes(whole[:size])
    (folder / "hole.so").write_bytes(bytes(64) + whole[64:])  # the header comes last
    cache.discard_unfinished()
    assert names(folder) == kept


def test_files_of_a_killed_compiler_are_discarded_and_those_of_a_live_one_stay(folder, library):
    kept = names(folder)
    (folder / "cut.so").write_bytes(b"\x7fELF")
    os.utime(folder / "cut.so", (1, 1))
    with compiler(library, "ab/live.so"):
        with compiler(library, "ab/dead.so", "dead.gch", "dead.py"):
            (folder / "linking.so").touch()
        cache.discard_unfinished()  # nothing is suspect that a live process may be writing
        added = {name for name in names(folder) - kept if not name.startswith(cache.MARKERS)}
        assert added == {"ab/dead.so", "dead.gch", "dead.py", "ab/live.so", "linking.so"}
    cache.discard_unfinished()
    assert names(folder) == kept | {"dead.py"}  # which Inductor renames when it is whole


@pytest.mark.parametrize("suspect", (False, True))
def test_files_under_a_lock_of_inductor_stay(folder, suspect):
    """Those of a program that keeps no journal, even if another compiler died meanwhile."""
    (folder / "locks").mkdir()
    (folder / "locks" / "old.lock").touch()
    os.utime(folder / "locks" / "old.lock", (1, 1))
    (folder / "cut.so").write_bytes(b"\x7fELF")
    os.utime(folder / "cut.so", (2, 2))
    if suspect:
        (folder / cache.MARKERS).mkdir()
        (folder / cache.MARKERS / "dead.lock").touch()
        os.utime(folder / cache.MARKERS / "dead.lock", (1, 1))
    with FileLock(folder / "locks" / "old.lock"):
        for name in ("assembling.o", "linking.so"):
            (folder / name).touch()
        cache.discard_unfinished()
        assert {"assembling.o", "linking.so"} <= names(folder)
        assert "cut.so" not in names(folder)  # no compiler takes that long
    cache.discard_unfinished()
    assert not {"assembling.o", "linking.so"} & names(folder)


@pytest.mark.parametrize("error", (KeyboardInterrupt, OSError))
def test_a_failed_compilation_is_cleaned_up_after(folder, library, error):
    kept = names(folder)
    with pytest.raises(error), cache.JOURNAL.compiling():
        shutil.copyfile(library, folder / "new.so")
        raise error
    assert names(folder) == kept
    with cache.JOURNAL.compiling():
        shutil.copyfile(library, folder / "new.so")
    assert names(folder) == kept | {"new.so"}


def test_headers_outside_of_the_cache_are_cleaned_up_after(folder, monkeypatch, tmp_path_factory):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    headers = cache.default_cache_dir() / "precompiled_headers"
    with pytest.raises(KeyboardInterrupt), cache.JOURNAL.compiling():
        (headers / "new.h.gch").write_text("half")
        raise KeyboardInterrupt
    assert not names(headers)


def test_torch_compile_reports_to_the_journal(folder, library):
    """Also of a compilation that fails."""
    seen = []

    def look(x):
        return x + 1

    def backend(graph, inputs):
        seen.append(sum(name.startswith("unfinished/") for name in names(folder)))
        if len(seen) > 1:
            shutil.copyfile(library, folder / "new.so")
            raise KeyboardInterrupt
        return graph

    cfg = compile_config.CompileConfig(backend=backend)
    for outcome in (contextlib.nullcontext(), pytest.raises(KeyboardInterrupt)):
        with outcome:
            compile_config.compile_function(look, "look", cfg)(torch.ones(2))
        assert "new.so" not in names(folder) and "unfinished" not in str(names(folder))
    assert seen == [1, 1]
