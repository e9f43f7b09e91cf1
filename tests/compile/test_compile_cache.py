"""Contracts of `compile_config.py cache`: loaded whole, where it fits, into its folder, or not."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

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
