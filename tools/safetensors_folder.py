"""A folder of safetensors files: headers, one tensor at a time in and out, all files or none.

Knows nothing of the model. Files are `model.safetensors`, or shards named by `INDEX`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {  # safetensors' names
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; one line naming the file, the tensor and the remedy."""


class TensorInfo(NamedTuple):
    """A tensor's entry in a safetensors header."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Folder:
    """A checkpoint on disk. Opening it reads the headers only, and checks them against the index.

    tensors  name -> TensorInfo      files  name -> the file that holds it
    note     one line that the user should know about a sound folder, or empty

    Other tools' spellings are read as ours: `weight_scale_inv` for `scale`, and the bytes of e8m0
    scales and of packed FP4 weights as U8.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.files: dict[str, Path] = {}
        self.note = ""
        self._stored_names: dict[str, str] = {}
        self._handles = {}
        index = self.path / INDEX
        if not index.exists():
            self._read_header(self.path / "model.safetensors")
            return
        weight_map = read_weight_map(index)
        for file in sorted(set(weight_map.values())):
            self._read_header(self.path / file)
        held = {self._stored_names[name]: file.name for name, file in self.files.items()}
        if held != weight_map:
            name = min(held.items() ^ weight_map.items())[0]
            raise CheckpointError(
                f"{index}: '{name}' should be in {weight_map.get(name)}, "
                f"but is in {held.get(name)}; download both"
            )

    def _read_header(self, file: Path) -> None:
        try:
            # "pread" reads into plain memory. With "mmap" resident memory would grow by the pages
            # of the whole checkpoint.
            handle = self._handles[file] = safe_open(file, "pt", backend="pread")
            headers = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CheckpointError(f"{file}: missing; is the download complete?") from None
        except (SafetensorError, OSError) as error:
            if is_lfs_pointer(file):
                raise CheckpointError(
                    f"{file}: is a Git LFS pointer, not the file itself; run git lfs pull in its "
                    "folder, or hf download"
                ) from None
            raise CheckpointError(
                f"{file}: damaged or incomplete ({error}); download it again"
            ) from None
        for stored, header in headers.items():
            name = stored
            if stored.endswith(".weight_scale_inv"):
                name = stored.removesuffix("weight_scale_inv") + "scale"
            dtype = header.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{file}: tensor '{stored}' is {dtype}, which no V4 release uses; convert it"
                )
            if name in self.tensors:
                raise CheckpointError(f"{file}: tensor '{name}' is there twice; keep one")
            self.tensors[name] = TensorInfo(_true_dtype(name, dtype), tuple(header.get_shape()))
            self.files[name] = file
            self._stored_names[name] = stored

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor into host memory."""
        stored = self._handles[self.files[name]].get_tensor(self._stored_names[name])
        return stored.view(self.tensors[name].dtype)


def _true_dtype(name: str, stored: str) -> torch.dtype:
    """Of the values that a file has as dtype `stored`."""
    if stored == "U8" and name.endswith(".scale"):
        return torch.float8_e8m0fnu
    if stored == "U8" and name.endswith(".weight"):
        return torch.int8  # two FP4 codes
    return DTYPES[stored]


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file holds the few lines by which Git LFS stands in for a large one."""
    with open(file, "rb") as opened:
        return opened.read(24) == b"version https://git-lfs."


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) for file in weight_map.values()):
            return weight_map
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    raise CheckpointError(
        f"{index}: not a JSON object with a weight_map of tensors to files; download it"
    )


def progress(sizes: dict[str, int], activity: str) -> Iterator[str]:
    """Yield the names; on a terminal, rewrite a line on stderr about the bytes that are done."""
    done, total = 0, sum(sizes.values())
    for name, size in sizes.items():
        yield name
        done += size
        if sys.stderr.isatty():
            line = f"\r{activity}: {done / 1e9:.1f} of {total / 1e9:.1f} GB"
            print(line, end="" if done < total else "\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Callable[[str], Path]]:
    """Gives temporary paths for files of a folder, renamed together at the end, in order.

    On an error they are removed, and the old files stay.
    """
    names = []

    def temporary(name: str) -> Path:
        names.append(name)
        return folder / f".{name}.tmp"

    try:
        yield temporary
        for name in names:
            os.replace(folder / f".{name}.tmp", folder / name)
    finally:
        for name in names:
            (folder / f".{name}.tmp").unlink(missing_ok=True)


def write_safetensors(
    path: Path, infos: dict[str, TensorInfo], get: Callable[[str], torch.Tensor]
) -> None:
    """A safetensors file of these tensors, in their order, holding one at a time."""
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, info in infos.items():
        end = start + info.nbytes
        dtype = DTYPE_NAMES[info.dtype]
        header[name] = {"dtype": dtype, "shape": info.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    sizes = {name: info.nbytes for name, info in infos.items()}
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in progress(sizes, "saving " + path.stem[1:]):
            tensor = get(name).contiguous().cpu()
            assert infos[name] == (tensor.dtype, tensor.shape), name
            file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
            del tensor  # before the next one is made
        file.flush()
        os.fsync(file.fileno())


def split_shards(infos: dict[str, TensorInfo], limit: int) -> dict[str, dict[str, TensorInfo]]:
    """File name -> its tensors, of at most `limit` bytes together, or a single one."""
    shards, room = [{}], limit
    for name, info in infos.items():
        if info.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = info
        room -= info.nbytes
    # Wide elements first, so that readers which map the file find every tensor aligned. The sort is
    # stable: a packed matrix stays next to its scale.
    shards = [
        dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize)) for shard in shards
    ]
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    n = len(shards)
    return {f"model-{i:05}-of-{n:05}.safetensors": shard for i, shard in enumerate(shards, 1)}
