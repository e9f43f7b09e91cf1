"""Shared by all tests: imports from the repository root, one thread, quiet Transformers.

Kernels are tested in a process of their own, in Triton's interpreter (TRITON_INTERPRET=1), or on
the GPU where there is one: the tests of KERNELS then build their tensors there.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import triton  # noqa: F401, before ops: kernels are defined by it without a GPU, too

LINES = pytest.StashKey[list[str]]()
QUICK = {
    f"test_{name}.py"
    for name in (
        "assets",
        "bench",
        "formats",
        "model_config",
        "model_mtp",
        "model_parity",
        "tokenizer",
    )
}

# Contracts of any architecture, not of V4's formulas: for those who change the model
ARCHITECTURE = {
    f"test_{name}.py"
    for name in (
        "compile_capture",
        "compile_config",
        "compile_sessions",
        "model_cache",
        "model_memory",
        "model_mtp",
        "model_packing",
    )
}

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# One process compiles the same functions for hundreds of tests, all of which count together.
torch._dynamo.config.accumulated_recompile_limit = 1 << 16
sys.path[:0] = [
    str(Path(__file__).parent.parent),
    str(Path(__file__).parent),
    str(Path(__file__).parent / "ops"),
]

from tiers import FULL, FULL_INTERPRETED

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = {path.name for path in Path(__file__).parent.glob("kernels/test_kernel_*.py")}
# Tests of ops, but for those of plain functions
OPS = {path.name for path in Path(__file__).parent.glob("ops/test_*.py")}
OPS -= {"test_formats.py", "test_routing.py", "test_swiglu.py"}
if INTERPRETING:
    import interpreter

    interpreter.install()


def pytest_ignore_collect(collection_path):
    name = collection_path.name
    if name == "test_interpreter.py":
        ignored = not INTERPRETING
    elif name in KERNELS:
        ignored = not (INTERPRETING or torch.cuda.is_available())
    else:
        ignored = INTERPRETING and name.startswith("test_") and name not in OPS
    return ignored or None  # None: others may have a say


@pytest.fixture(autouse=True)
def tensors_live_where_kernels_run(request):
    if request.path.name in KERNELS | OPS and torch.cuda.is_available():
        torch.set_default_device("cuda")
        yield
        torch.set_default_device(None)
    else:
        yield


def pytest_addoption(parser):
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="rewrite tests/compile/snapshots from what is measured now",
    )


def pytest_collection_modifyitems(items):
    if INTERPRETING:  # other tests of ops are about references, and would take long there
        items[:] = [
            item
            for item in items
            if item.path.name not in OPS or item.get_closest_marker("kernels")
        ]
    # C++ once built stays: before that, opaque ops run their Python
    items.sort(key=lambda item: item.path.name == "test_cpp.py")
    waiting = {**FULL, **(FULL_INTERPRETED if INTERPRETING else {})}
    for item in items:
        if item.path.name in QUICK:
            item.add_marker(pytest.mark.quick)
        formulas = item.name == "test_mtp_equals_a_plain_recomputation"
        if item.path.name in ARCHITECTURE and not formulas:
            item.add_marker(pytest.mark.architecture)
        if any(re.search(pattern, item.nodeid) for pattern in waiting):
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session")
def tell(request):
    """tell(line) shows a line when all tests are done: tables that people read."""
    return request.config.stash.setdefault(LINES, []).append


def pytest_terminal_summary(terminalreporter, config):
    """Lines from `tell`, and seconds per file: the place to look at when the suite grows slow."""
    for line in config.stash.get(LINES, []):
        terminalreporter.write_line(line)
    seconds = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                file = report.nodeid.split("::")[0]
                seconds[file] = seconds.get(file, 0.0) + report.duration
    terminalreporter.section("seconds per file")
    for file, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{spent:8.1f}  {file}")
