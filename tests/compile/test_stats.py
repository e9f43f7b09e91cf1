"""Contracts of tools/stats.py: threads and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from tools import stats

ROOT = Path(__file__).resolve().parent.parent.parent


def test_threads_follow_the_environment_and_the_size(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert stats.choose_threads(1 << 20) == 1
        assert stats.choose_threads(1 << 40) == len(os.sched_getaffinity(0))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        assert stats.choose_threads(1 << 40) == 1
    finally:
        torch.set_num_threads(before)


def test_peak_memory_is_this_processes_own():
    """Not what the parent held when it started this one."""
    held = b"\1" * (1 << 29)
    script = "import torch, tools.stats as s; print(s.peak_memory(torch.device('cpu')))"
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert 0 < int(out.stdout) < len(held) + (1 << 28)
