"""What a launcher of several processes (torchrun, srun) leaves in the environment."""

from __future__ import annotations

import os

import torch.distributed as dist


def launched() -> bool:
    """Whether torchrun or another launcher started this process: it sets all of these."""
    names = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return names <= os.environ.keys()


def from_launcher(name: str) -> int:
    """A number that the launcher left in the environment; ValueError if it is none."""
    text = os.environ[name]
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r} in the environment is no number: unset it")
    return int(text)


def is_other_rank() -> bool:
    """Whether this is one of several processes, but not the first one."""
    if not launched():
        return False
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    return rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size)


def join_group(backend: str) -> None:
    """Meet the other processes; ValueError if that fails."""
    address = f"{os.environ['MASTER_ADDR']}:{from_launcher('MASTER_PORT')}"
    try:
        dist.init_process_group(backend)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"MASTER_ADDR, MASTER_PORT: processes cannot meet at {address} ({reason})"
        ) from None
