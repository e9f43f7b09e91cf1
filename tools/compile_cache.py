"""Inductor's cache of compiled code, carried to an equal machine as one .tar.gz file."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import tarfile
import zlib
from pathlib import Path

import torch

from tools.torch_private import cache_dir

ROOT = Path(__file__).parent.parent
SOURCE_FOLDERS = ("ops", "training", "generation")  # beside the modules at the top
SOURCE_SUFFIXES = {".py", ".cpp", ".h"}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _source_digest() -> str:
    """Of all files that decide about a captured graph or a kernel."""
    files = [*ROOT.glob("*.py")]
    for folder in SOURCE_FOLDERS:
        files += [file for file in (ROOT / folder).rglob("*") if file.suffix in SOURCE_SUFFIXES]
    named = (str(file.relative_to(ROOT)).encode() + file.read_bytes() for file in sorted(files))
    return _digest(b"".join(named))


def _cpu_digest() -> str:
    """Of the CPU's instruction set extensions, which vectorised code depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    if not flags:
        return platform.processor()
    return _digest(" ".join(sorted(flags[1].split())).encode())


def cache_key() -> dict[str, str]:
    """Everything that compiled code depends on. A cache only loads where all of it is equal."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "CPU flags": _cpu_digest(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "source": _source_digest(),
    }


def _is_cached_code(file: Path) -> bool:
    temporary = "locks" in file.parts or file.name.endswith((".lock", ".tmp"))
    return file.is_file() and not temporary


def save_cache(path: str) -> int:
    """Pack Inductor's cache folder into a .tar.gz -> number of files; not empty, or ValueError."""
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise ValueError(f"{path}: cannot be written; name a file in a folder that exists")
    folder = Path(cache_dir())
    files = [file for file in sorted(folder.rglob("*")) if _is_cached_code(file)]
    if not files:
        raise ValueError(f"{folder}: holds no compiled code yet; run generate.py first")
    temporary = f"{path}.tmp"
    try:
        with tarfile.open(temporary, "w:gz", compresslevel=1) as tar:
            key = json.dumps(cache_key()).encode()
            head = tarfile.TarInfo("key.json")
            head.size = len(key)
            tar.addfile(head, io.BytesIO(key))
            for file in files:
                tar.add(file, f"cache/{file.relative_to(folder)}")
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return len(files)


def load_cache(path: str) -> int:
    """Unpack a file of `save_cache` into Inductor's cache folder -> number of files.

    Code that is there already stays. A ValueError says why a file is refused: it is damaged, or was
    saved under another key.
    """
    try:
        _check_gzip(path)
        with tarfile.open(path, "r:gz") as tar:
            _check_key(path, tar)
            return sum(_unpack(tar, entry, Path(cache_dir())) for entry in tar)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: is damaged, or is not a cache that `compile_config.py cache save` wrote "
            f"({error}): save or copy it anew"
        ) from None


def _check_gzip(path: str) -> None:
    """Read to the checksum at the file's end, before anything is unpacked."""
    with gzip.open(path) as file:
        while file.read(1 << 20):
            pass


def _check_key(path: str, tar: tarfile.TarFile) -> None:
    """A ValueError that names the first part of the key that differs from this machine's."""
    first = tar.next()
    if first is None or first.name != "key.json" or not first.isfile():
        raise tarfile.TarError("no key.json")
    try:
        saved = json.load(tar.extractfile(first))
    except ValueError:
        saved = None
    if not isinstance(saved, dict):
        raise tarfile.TarError("key.json is no object")
    for key, value in cache_key().items():
        if saved.get(key) != value:
            raise ValueError(
                f"{path}: was saved for {key} {saved.get(key)}, here it is {value}: "
                "compile anew and save that"
            )


def _unpack(tar: tarfile.TarFile, entry: tarfile.TarInfo, folder: Path) -> bool:
    """Write one entry below `folder`, unless it exists or points elsewhere -> whether it did."""
    target = folder / entry.name.removeprefix("cache/")
    inside = target.resolve().is_relative_to(folder.resolve())
    if not entry.isfile() or not entry.name.startswith("cache/") or not inside or target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        with open(temporary, "wb") as out:
            shutil.copyfileobj(tar.extractfile(entry), out)
        os.chmod(temporary, entry.mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def discard_unfinished() -> None:
    """Delete the empty libraries that a killed linker leaves in the cache folder, where they would
    count as compiled."""
    for file in Path(cache_dir()).glob("*/*.so"):
        if not file.stat().st_size:
            file.unlink()
