"""Inductor's cache of compiled code: carried to an equal machine as one .tar.gz file, and kept free
of files that a stopped compiler left unfinished.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import stat
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tools.torch_private import cache_dir, default_cache_dir

ROOT = Path(__file__).parent.parent
SOURCE_FOLDERS = ("ops", "training", "generation", "tools")  # beside the modules at the top
SOURCE_SUFFIXES = {".py", ".cpp", ".h"}
AHEAD = "ahead"  # the cache's folder of parts that were compiled ahead of time, whole or not there
WORK_PREFIX = "making-"  # of folders in it where they are being made


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def is_project_function(function: Callable) -> bool:
    """Whether another process can import a function, from the files that the key covers."""
    code = getattr(function, "__code__", None)
    if code is None or "<" in function.__qualname__:  # <lambda>, <locals>
        return False
    file, root = Path(code.co_filename).resolve(), ROOT.resolve()
    return file.parent == root or any(root / name in file.parents for name in SOURCE_FOLDERS)


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
    in_work = f"/{AHEAD}/{WORK_PREFIX}" in file.as_posix()
    return file.is_file() and not temporary and not in_work


def save_cache(path: str) -> int:
    """Pack Inductor's cache folder into a .tar.gz -> number of files; not empty, or ValueError."""
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise ValueError(f"{path}: cannot be written; name a file in a folder that exists")
    folder = cache_dir()
    discard_unfinished()
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
        discard_unfinished()
        with tarfile.open(path, "r:gz") as tar:
            _check_key(path, tar)
            return sum(_unpack(tar, entry, cache_dir()) for entry in tar)
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


# --------------------------------------------------------------------------------------------------
# Compilers that were stopped

# Files that compilers write in place; Inductor renames the others when they are whole
WRITTEN_IN_PLACE = {".so", ".o", ".a", ".gch", ".pch"}
MARKERS = "unfinished"  # a folder in each of these:
LOCK_TIMEOUT = 600  # seconds that Inductor waits for another process (torch/_inductor/codecache.py)


def _folders() -> list[Path]:
    """Where compilers write: the cache, and precompiled headers if they lie elsewhere."""
    cache = cache_dir()
    headers = default_cache_dir() / "precompiled_headers"  # torch/_inductor/codecache.py line 3542
    return [cache] if headers.is_relative_to(cache) else [cache, headers]


def discard_unfinished() -> None:
    """Delete the unfinished files of processes that died while they compiled, or lost power.

    They would count as compiled: Inductor looks for a file's name only. Files that are younger
    than the marker of a process that still compiles stay: it may be writing them. So do those that
    are younger than a lock that Inductor holds: other programs compile into this folder, too.
    """
    for folder in _folders():
        _discard_unfinished(folder)


def _discard_unfinished(folder: Path) -> None:
    dead_since, live_since = _compiling_since(folder / MARKERS)
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # others may delete it, too
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode) or not _is_cached_code(file):
                continue
            if file.is_relative_to(folder / AHEAD):  # renamed when whole
                continue
            if status.st_mtime >= live_since:
                continue
            in_place = file.suffix in WRITTEN_IN_PLACE
            suspect = in_place and status.st_mtime >= dead_since
            if suspect or status.st_size == 0 or in_place and not _is_whole(file, status.st_size):
                file.unlink()


def _compiling_since(folder: Path) -> tuple[float, float]:
    """When the first process began that died while it compiled, and the first that still compiles;
    infinity if there is none. Without a live one the markers of the dead are taken away.
    """
    dead_since = live_since = math.inf
    markers = list(folder.glob("*.lock"))
    for marker in markers:
        with contextlib.suppress(FileNotFoundError), open(marker, "a") as file:
            begun = os.fstat(file.fileno()).st_mtime
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                dead_since = min(dead_since, begun)
            except BlockingIOError:
                live_since = min(live_since, begun)
    longest = time.time() - LOCK_TIMEOUT
    for lock in (folder.parent / "locks").glob("*.lock"):
        with contextlib.suppress(OSError), open(lock, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                live_since = min(live_since, max(os.fstat(file.fileno()).st_mtime, longest))
    for marker in markers if live_since == math.inf else ():
        marker.unlink(missing_ok=True)
    return dead_since, live_since


def _is_whole(file: Path, size: int) -> bool:
    """Whether an ELF file reaches to the end of its section table, which linkers write last.

    True of files of other kinds.
    """
    with open(file, "rb") as opened:
        header = opened.read(64)
    if file.suffix != ".so" or header.startswith(b"\xcf\xfa\xed\xfe"):  # macOS's Mach-O
        return True
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False
    (table,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    return 0 < table <= size - entry_size * entries


class CompileJournal:
    """Keeps a locked marker in the cache folder while this process compiles.

    Whoever can lock a marker knows that its process died, and since when its files are suspect. A
    compilation that ends with an exception (a full disk, Ctrl-C) is cleaned up after at once.
    """

    def __init__(self):
        self._depth = 0
        self._markers: list[tuple[Path, int]] = []  # and their file descriptors
        self._cleaned: set[Path] = set()  # cache folders

    def begin(self, *args) -> None:
        """Compiling begins. In a folder that cannot be written the compiler itself complains."""
        self._depth += 1
        if self._depth > 1:
            return
        with contextlib.suppress(OSError):
            folder = cache_dir()
            if folder not in self._cleaned:
                self._cleaned.add(folder)
                discard_unfinished()
            for folder in _folders():
                self._markers.append(_locked_marker(folder / MARKERS))

    def end(self, *args) -> None:
        """Compiling ends, well or with the exception that is being handled."""
        self._depth -= 1
        if self._depth or not self._markers:
            return
        failed = sys.exc_info()[0] is not None
        for path, descriptor in self._markers:
            if not failed:
                path.unlink(missing_ok=True)
            os.close(descriptor)  # unlocks it
        self._markers.clear()
        if failed:
            discard_unfinished()

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        self.begin()
        try:
            yield
        finally:
            self.end()


def _locked_marker(folder: Path) -> tuple[Path, int]:
    """-> a new locked file, its descriptor."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        path = folder / f"{os.getpid()}-{time.monotonic_ns()}.lock"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():  # else another process took it for a dead one's
            return path, descriptor
        os.close(descriptor)


JOURNAL = CompileJournal()
