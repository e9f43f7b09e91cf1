"""The parts of PyTorch without a stable API that compiling and running a model needs.

Paths and lines are those of PyTorch 2.13: https://github.com/pytorch/pytorch/blob/v2.13.0/.
What other imports would slow down, or belongs to one place, stands beside its use with its line:
`CppCodeCache` (ops/cpp.py), the state of FSDP2 (parallel.py), functional collectives
(training/expert_parallel.py, training/sharded_optim.py), joint graphs (tools/ahead_parts.py),
`_foreach_norm` (ops/muon.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import getpass
import inspect
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import torch

# Since torch 2.13: torch/__init__.py line 2620 (documented, but absent from 2.11)
ISOLATES_RECOMPILES = "isolate_recompiles" in inspect.signature(torch.compile).parameters


def cache_path() -> Path:
    """The folder of compiled code, which may not exist yet.

    As torch/_inductor/runtime/cache_dir_utils.py line 14, whose import would take a second.
    """
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()).absolute()


def cache_dir() -> Path:
    """The folder of compiled code, made if it can be: OSError."""
    folder = cache_path()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def default_cache_dir() -> Path:
    """The folder of compiled code if the environment names none; of precompiled headers, always."""
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def compile_isolated(function: Callable, name: str, **options) -> Callable:
    """torch.compile(function, **options) with compiled entries of its own.

    Another compile of the function does not count as its recompile, nor find its entries: it may
    drop its guards. It does find the entries of compiles that are not isolated: a function that is
    compiled without guards anywhere must be compiled here everywhere.
    """
    if ISOLATES_RECOMPILES:
        return torch.compile(function, isolate_recompiles=True, **options)
    return torch.compile(clone_function(function, name), **options)


def clone_function(function: Callable, name: str) -> Callable:
    """A copy with a code object of its own: torch 2.11 keeps compiled entries by code object."""
    if isinstance(function, types.MethodType):
        return types.MethodType(clone_function(function.__func__, name), function.__self__)
    code = function.__code__.replace(co_name=name)
    defaults, closure = function.__defaults__, function.__closure__
    return types.FunctionType(code, function.__globals__, name, defaults, closure)


def _skip_all_guards(guards) -> list[bool]:
    """For torch versions without torch.compiler.skip_all_guards_unsafe."""
    return [False] * len(guards)


# A guard_filter_fn: torch/compiler/__init__.py line 796
skip_all_guards = getattr(torch.compiler, "skip_all_guards_unsafe", _skip_all_guards)


def unlimited_compiles() -> contextlib.AbstractContextManager:
    """Lifts the limit on compiles of one function, all isolated ones together.

    torch/_dynamo/config.py line 124: 256, after which a compile of a full graph is an error.
    """
    return torch._dynamo.config.patch(accumulated_recompile_limit=sys.maxsize)


def on_compile(begin: Callable, end: Callable) -> None:
    """Call begin(*args) and end(*args) around every compilation from now on; once, if repeated.

    end runs, too, while an exception leaves the compiler. torch/_dynamo/callback.py line 60
    """
    handler = torch._dynamo.callback_handler  # torch._dynamo.reset() clears it
    if begin not in handler.start_callbacks:
        handler.register_start_callback(begin)
        handler.register_end_callback(end)


def hook_dicts(model: torch.nn.Module) -> list[dict]:
    """Where calls of a model's modules look for hooks: first those of all modules of all models.

    torch/nn/modules/module.py line 469
    """
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    shared = [vars(torch.nn.modules.module)[f"_global{name}"] for name in names]
    return shared + [vars(module)[name] for module in model.modules() for name in names]


def library_runner(path: str) -> Callable[[list[torch.Tensor]], list[torch.Tensor]]:
    """Load a library of AOTInductor for CPU -> its function of tensors.

    torch/_export/__init__.py line 150 (`aot_load`), whose import takes all of Inductor's.
    """
    return torch._C._aoti.AOTIModelContainerRunnerCpu(path, 1).run


def compile_counts() -> tuple[int, int]:
    """Graphs and graph breaks of this process so far."""
    # torch/_dynamo/utils.py line 177, as torch._dynamo.testing.CompileCounter has no breaks
    if sys.modules.get("torch._dynamo") is None:
        return 0, 0
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def missing_cpu_toolchain(folder: Path | None = None) -> str | None:
    """The part that this machine lacks to compile for CPU, in words; None if it has all.

    folder   where to try, below the cache folder
    """
    try:
        folder = folder or cache_dir()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:  # importing torch._dynamo would fail, too
        return unusable_folder(error)
    if torch._dynamo.config.disable:
        return "TORCH_COMPILE_DISABLE to be unset"
    # torch/_inductor/cpp_builder.py line 372; local, as it imports all of Inductor
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception:  # its class has moved between torch versions
        return "a C++ compiler (g++ or clang++)"
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        return f"Python's headers ({header})"
    return _fails_to_compile(compiler, folder)


def unusable_folder(error: OSError) -> str:
    """What a cache folder that cannot be used stands for, in words."""
    return (
        f"a folder for compiled code where files can be written and executed, not {cache_path()} "
        f"({error.strerror or error}): set TORCHINDUCTOR_CACHE_DIR"
    )


def _fails_to_compile(compiler: str, folder: Path) -> str | None:
    """Compile and load a library in a folder -> what that lacks, in words, or None."""
    command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o"]
    program = 'extern "C" int probe() { return 0; }'
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            library = os.path.join(place, "probe.so")
            done = subprocess.run(
                [*command, library], input=program, capture_output=True, text=True
            )
            works = done.returncode == 0 and os.path.exists(library)
            if works:
                ctypes.CDLL(library)
    except OSError as error:
        return unusable_folder(error)
    if not works:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return f"a C++ compiler that works ({compiler}: {reason})"
    return None
