"""Faults seeded into copies of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv", "__pycache__", ".pytest_cache", ".cache", "assets", "results")


def copy_project(folder: Path) -> Path:
    """Without what tests of faults do not need."""
    leave = shutil.ignore_patterns(*LEFT_OUT)
    return Path(shutil.copytree(ROOT, folder / "project", ignore=leave))


def occurrences(file: str, text: str) -> int:
    """How often a text stands in a file of the project."""
    return (ROOT / file).read_text().count(text)


def replace_once(project: Path, file: str, old: str, new: str) -> None:
    """`old` -> `new` in a copy of the project; AssertionError unless it stands there once."""
    path = project / file
    text = path.read_text()
    count = text.count(old)
    assert count == 1, f"{file} has changed: {old!r} stands in it {count} times"
    path.write_text(text.replace(old, new))


def run_test(project: Path, *tests: str) -> subprocess.CompletedProcess:
    """pytest on tests of a copy of the project, up to the first failure."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "pytest", "-x", "-m", "", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "--show-capture=no", *tests],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
    )
