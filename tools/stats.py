"""Measures of this process and machine that the command lines print: memory, threads, speeds."""

from __future__ import annotations

import math
import os
import platform
import re
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_IMPORTED = time.time()
ONE_THREAD_BYTES = 1 << 28  # models that read less than this per token run on one thread


def process_start() -> float:
    """Start of this process in seconds of time.time(); without /proc, import of this module."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return _IMPORTED


def versions() -> dict[str, str | None]:
    """Versions of Python, torch and Triton; None for a package that is not installed."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {"python": platform.python_version(), "torch": torch.__version__, "triton": triton}


def device_sync(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_threads(active_bytes: int) -> int:
    """Set torch's number of CPU threads for a model that reads active_bytes per token; return it.

    OMP_NUM_THREADS decides if it is set. Otherwise small models run on one thread, where starting a
    parallel region costs more than it saves and two programs that share the cores stall each other;
    larger ones use every core at hand.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        else:
            cores = os.cpu_count() or 1
        torch.set_num_threads(1 if active_bytes < ONE_THREAD_BYTES else cores)
    return torch.get_num_threads()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, otherwise the most that the process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include what the parent held when it forked
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: torch.device) -> float:
    """Bytes that a load can take on a device; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
        if available:
            return int(available[1]) * 1024
    return math.inf


def read_bandwidth(nbytes: int, device: torch.device) -> float:
    """Memory bandwidth in bytes/s, measured by a sum over this many bytes (at most 1 GB)."""
    x = torch.ones(min(nbytes, 1 << 30) // 4, device=device)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - start))
    return best


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product of random data here: the peak of "share of peak"."""
    n = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        device_sync(device)
        start = time.perf_counter()
        a @ b
        device_sync(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
