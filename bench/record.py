"""Results as JSON files that name the machine, the versions and the load at the time."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def environment() -> dict:
    """Date, machine, versions and load average."""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "transformers")},
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


def replace(path: Path, text: str) -> None:
    """Write a file; an old one is replaced only when the new one is complete."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def record(name: str, result: dict) -> Path:
    """Write bench/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    replace(path, json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    print(f"recorded {path}", flush=True)
    return path
