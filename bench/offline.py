"""Compile recorded kernel launches ahead of time for GPUs that are not there, and read what they need of them.

    python -m bench.offline [--arch sm_90,gfx942] [--op sparse_attn] [--record]

Every opaque op that the graphs of Flash and Pro call is launched with fake tensors of those shapes (see cases.py), and
each kernel compiled with Triton's own assembler: registers, spills, shared memory, matrix instructions. Compiler
versions differ: run it again with another Triton first in PYTHONPATH.
"""
from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ops.launch import Launch

TARGETS = {**{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)},
           **{name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")}}
SHARED = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64, "gfx950": 160}  # KiB a program may have
MATRIX = ("HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "QMMA", "IMMA", "DMMA")  # NVIDIA's; AMD's: v_mfma_*
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class Resources(NamedTuple):
    """What a compiled kernel needs; spills in instructions (NVIDIA) or registers (AMD), shared memory in bytes."""

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]  # matrix instructions by kind
    instructions: int


def compile_launch(launch: Launch, arch: str) -> Resources:
    """Resources of one launch on one architecture. Raises what the compiler raises."""
    types, constants, aligned, options = launch.specialization()
    names = launch.kernel.arg_names
    source = ASTSource(launch.kernel, types, constexprs=constants,
                       attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned})
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    return (_nvidia if "cubin" in compiled.asm else _amd)(compiled)


def _cuobjdump(flag: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True).stdout


def _nvidia(compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code, re.M)
    return Resources(registers=int(re.search(r"REG:(\d+)", usage)[1]), spills=sum(name in ("LDL", "STL") for name in names),
                     shared=compiled.metadata.shared, matrix={kind: names.count(kind) for kind in MATRIX if kind in names},
                     instructions=len(names))


def _amd(compiled) -> Resources:
    code = compiled.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", code)[1])
    matrix = re.findall(r"\b(v_mfma|v_smfmac|v_wmma)_\w+", code)
    return Resources(registers=number("vgpr_count"), spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
                     shared=compiled.metadata.shared, matrix={kind: matrix.count(kind) for kind in set(matrix)},
                     instructions=len(re.findall(r"^\t[a-z]\w+ ", code, re.M)))
