"""Resumable checkpoints; a resumed run is bit-identical to an uninterrupted one.

    folder/step-000123/  config.json, model*.safetensors, tokenizer: the released layout
                         state.safetensors: parameters, optimizer and run_config of one process
                         .metadata, *.distcp, facts.json: the same of several processes, in parts,
                         by torch.distributed.checkpoint

A checkpoint gets its name when it is complete, and only then the oldest is deleted, so that `keep`
of them remain. Folders whose names begin with a dot are incomplete, or being deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import Transformer
from parallel import Ranks
from training.optim import Optimizer

STATE = "state.safetensors"
RUN_CONFIG = "facts.json"


def strip_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def unused(folder: str) -> str:
    """The name, or the first of name-2, name-3, ... that no file has."""
    names = itertools.chain([folder], (f"{folder}-{i}" for i in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


@contextlib.contextmanager
def exclusive(folder: str | None) -> Iterator[None]:
    """Within it no other run may save its checkpoints in `folder`; None is no folder.

    ValueError if another run is within it.
    """
    if not folder:
        yield
        return
    path = Path(folder) / ".lock"
    lock = _lock_file(path)
    if lock is None:
        raise ValueError(
            f"--checkpoints {folder}: another run saves here; wait for it, or name another one"
        )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)
        with contextlib.suppress(OSError):  # it holds checkpoints
            os.rmdir(folder)


def _lock_file(path: Path) -> int | None:
    """-> descriptor of the file, locked; None if another process has locked it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = os.open(path, os.O_CREAT | os.O_WRONLY)
        except (FileExistsError, FileNotFoundError):  # a run that ended was deleting the folder
            if path.parent.is_file():
                raise
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # of a file that was deleted meanwhile


class Checkpoints:
    """The checkpoints of a run in `folder`, of which the newest `keep` remain.

    run_config is a dict of JSON values that must be equal for a run to go on from a checkpoint.
    """

    def __init__(self, folder: str, keep: int, ranks: Ranks):
        self.folder, self.keep = Path(folder), keep
        self.ranks = ranks

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        matches = [re.fullmatch(r"step-(\d{6,})", name) for name in names]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    @torch.no_grad()
    def save(
        self, model: Transformer, optimizer: Optimizer, step: int, run_config: dict, **layout
    ) -> Path:
        """Save after `step` steps -> the checkpoint's folder. layout: as in checkpoint.save. All
        processes call it together.

        ValueError when the disk is full.
        """
        temporary = self.folder / f".step-{step:06d}"
        if self.ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete_incomplete()
        self.ranks.barrier()
        write = self._write_parts if self.ranks.distributed else self._write_file
        try:
            self.ranks.save(model, temporary, **layout)
            write(temporary, model, optimizer, step, run_config)
        except (OSError, SafetensorError) as error:  # the disk is full
            shutil.rmtree(temporary, ignore_errors=True)
            raise ValueError(
                f"{self.path(step)}: cannot be written ({error}); "
                "free some room, or choose another folder"
            ) from None
        if self.ranks.is_main:
            os.rename(temporary, self.path(step))
            for old in self.steps()[: -self.keep]:
                os.rename(self.path(old), self.folder / f".step-{old:06d}")
            self._delete_incomplete()
        self.ranks.barrier()
        return self.path(step)

    @torch.no_grad()
    def load(self, model: Transformer, optimizer: Optimizer, run_config: dict) -> int:
        """Bring model and optimizer to the state of the newest checkpoint -> its step; 0 if there
        is none.

        ValueError if it is of another run_config or number of processes, or cannot be read.
        """
        if not self.steps():
            return 0
        path = self.path(self.steps()[-1])
        read = self._read_parts if self.ranks.distributed else self._read_file
        return read(path, model, optimizer, run_config)

    def _delete_incomplete(self) -> None:
        for folder in self.folder.glob(".step-*"):
            shutil.rmtree(folder)

    @staticmethod
    def _require_same(path: Path, saved: dict, run_config: dict) -> None:
        for key, value in run_config.items():
            if saved.get(key) != value:
                raise ValueError(
                    f"{path}: was trained with {key} {saved.get(key)!r}, not {value!r}: "
                    "name another folder"
                )

    # One process: a file

    def _write_file(
        self, folder: Path, model: Transformer, optimizer: Optimizer, step: int, run_config: dict
    ) -> None:
        masters = {name for name, state in optimizer.state.items() if "master" in state}
        tensors = {
            f"weight.{name}": t for name, t in model.state_dict().items() if name not in masters
        }
        tensors |= {f"optimizer.{name}": t for name, t in optimizer.state_dict().items()}
        tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
        metadata = {"step": str(step), "facts": json.dumps(run_config)}
        save_file(tensors, folder / STATE, metadata)

    def _read_file(
        self, folder: Path, model: Transformer, optimizer: Optimizer, run_config: dict
    ) -> int:
        path = folder / STATE
        if not path.exists():
            raise ValueError(
                f"{folder}: was not saved by one process: "
                "go on with torchrun as before, or name another folder"
            )
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
            step, saved = int(metadata["step"]), json.loads(metadata["facts"])
        except Exception as error:  # a torn or foreign file fails in as many ways
            raise ValueError(
                f"{path}: cannot be read ({str(error).splitlines()[0]}); remove {folder}"
            ) from None
        self._require_same(path, saved, run_config)
        optimizer.load_state_dict(strip_prefix("optimizer.", tensors))
        masters = {
            name: state["master"] for name, state in optimizer.state.items() if "master" in state
        }
        model.load_state_dict({**strip_prefix("weight.", tensors), **masters})
        return step

    # Several processes: each writes its part

    def _write_parts(
        self, folder: Path, model: Transformer, optimizer: Optimizer, step: int, run_config: dict
    ) -> None:
        import torch.distributed.checkpoint as dcp  # not needed by one process

        dcp.save(self.ranks.checkpoint_state(model, optimizer), checkpoint_id=folder)
        if self.ranks.is_main:
            about = {"step": step, "facts": run_config}
            (folder / RUN_CONFIG).write_text(json.dumps(about))

    def _read_parts(
        self, folder: Path, model: Transformer, optimizer: Optimizer, run_config: dict
    ) -> int:
        import torch.distributed.checkpoint as dcp  # not needed by one process

        try:
            about = json.loads((folder / RUN_CONFIG).read_text())
        except (OSError, ValueError):
            raise ValueError(
                f"{folder}: was not saved by several processes: name another folder"
            ) from None
        self._require_same(folder, about["facts"], run_config)
        try:
            dcp.load(self.ranks.checkpoint_state(model, optimizer), checkpoint_id=folder)
        except Exception as error:  # a torn checkpoint fails in as many ways
            raise ValueError(
                f"{folder}: cannot be read ({str(error).splitlines()[0]}); remove it"
            ) from None
        return about["step"]
