"""Compile the kernels ahead of time for GPUs that are not there, and read what they need of them.

    python -m bench.offline [--arch sm_90,gfx942] [--op sparse_attn] [--record [--new]]

Every opaque op that the graphs of Flash and Pro call (cases.py) is launched with fake tensors of
those shapes, and each kernel compiled with Triton's own assembler: registers, spills, shared
memory, matrix instructions. Compilers differ: put another Triton first in PYTHONPATH to see its
figures. --record writes results/kernels_triton<version>.json; with --new only kernels that are not
in there, or whose source has changed, are compiled, and those that no call launches any more are
dropped.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import triton  # before ops: kernels are defined by it without a GPU, too
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from bench import cases
from bench.record import RESULTS, record
from ops.launch import Launch
from ops.registry import require
from tools import cli

TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")},
}
SHARED = {  # KiB of shared memory that a program may have
    "sm_80": 163,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx950": 160,
}
# NVIDIA's matrix instructions; AMD's are v_mfma_* and the like
MATRIX = ("HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "HMMA", "QMMA", "IMMA", "DMMA")
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class Resources(NamedTuple):
    """The needs of a compiled kernel."""

    registers: int
    spills: int  # in instructions (NVIDIA) or registers (AMD)
    spilling: float  # share of the instructions in loops that store or load spilled values
    shared: int  # bytes of shared memory
    matrix: dict[str, int]  # matrix instructions by kind
    instructions: int
    # matrix products in the source, inlined and unrolled; not fp32's, which may do without matrix
    # instructions
    dots: int


class Kernel(NamedTuple):
    """The part of a launch that is compiled; another process, with another Triton, may do it."""

    module: str
    name: str
    specialization: tuple

    @property
    def function(self) -> JITFunction:
        return getattr(importlib.import_module(self.module), self.name)


def kernel_of(launch: Launch) -> Kernel:
    return Kernel(launch.kernel.fn.__module__, launch.name, launch.specialization())


def compile_launch(launch: Launch | Kernel, arch: str) -> Resources:
    """Resources of one launch on one architecture. Raises what the compiler raises."""
    wanted = launch if isinstance(launch, Kernel) else kernel_of(launch)
    types, constants, aligned, options = wanted.specialization
    kernel = wanted.function
    names = kernel.arg_names
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    return (_nvidia if "cubin" in compiled.asm else _amd)(compiled)


@functools.cache
def source_checksum(kernel: JITFunction) -> str:
    """Of the code of a kernel and of all Triton functions and constants that it names.

    With the specialisation it says all that Triton compiles. Comments, docstrings and line numbers
    do not count.
    """
    found: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop()
        tree = ast.parse(textwrap.dedent(function.src))
        (definition,) = tree.body
        if ast.get_docstring(definition) is not None:
            del definition.body[0]
        found[function.fn.__qualname__] = ast.unparse(tree)
        for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}:
            value = function.fn.__globals__.get(name)
            if isinstance(value, JITFunction) and value.fn.__qualname__ not in found:
                waiting.append(value)
            elif isinstance(value, tl.constexpr):
                found[name] = str(value.value)
    return f"{zlib.crc32(str(sorted(found.items())).encode()):08x}"


def _cuobjdump(flag: str, path: str) -> str:
    return subprocess.run(
        [CUOBJDUMP, flag, path], capture_output=True, text=True, check=True
    ).stdout


def _dots(ttir: str) -> int:
    """Matrix products, but of fp32."""
    operands = re.findall(r"tt\.dot .*: tensor<[0-9x]*x(\w+)>", ttir)
    return sum(operand != "f32" for operand in operands)


class Instruction(NamedTuple):
    place: str  # its address or label, "" for none
    name: str  # "" for a label alone
    target: str | None  # the place that it jumps to


def _spilling(code: list[Instruction], spills: Callable[[str], bool]) -> float:
    """Share of the instructions in loops that store or load spilled values; a jump back closes a
    loop.
    """
    index: dict[str, int] = {}  # of the first instruction at a place
    for i, instruction in enumerate(code):
        index.setdefault(instruction.place, i)
    loops = [
        (index[instruction.target], i)
        for i, instruction in enumerate(code)
        if index.get(instruction.target, i + 1) <= i
    ]
    inside = [
        instruction.name
        for i, instruction in enumerate(code)
        if instruction.name and any(first <= i <= last for first, last in loops)
    ]
    return sum(map(spills, inside)) / max(len(inside), 1)


SASS = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;\n]*)", re.M)
AMDGCN = re.compile(r"^(?:(\.\w+):.*|\t([a-z]\w+)[ \t]*([^;\n]*))$", re.M)


def _nvidia(compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, text = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)

    def target(operands: str) -> str:
        """The address that a jump names, written as the instructions' own."""
        addresses = re.findall(r"0x([0-9a-f]+)", operands)
        return (addresses or ["?"])[-1].rjust(4, "0")

    def spills(name: str) -> bool:
        return name in ("LDL", "STL")

    code = [
        Instruction(place, name, target(operands) if name == "BRA" else None)
        for place, name, operands in SASS.findall(text)
    ]
    names = [instruction.name for instruction in code]
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sum(map(spills, names)),
        spilling=_spilling(code, spills),
        shared=compiled.metadata.shared,
        matrix={kind: names.count(kind) for kind in MATRIX if kind in names},
        instructions=len(names),
        dots=_dots(compiled.asm["ttir"]),
    )


def _amd(compiled) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    def spills(name: str) -> bool:
        return name.startswith("scratch_")

    code = [
        Instruction(place, name, operands.strip() if "branch" in name else None)
        for place, name, operands in AMDGCN.findall(text)
    ]
    matrix = re.findall(r"\b(v_mfma|v_smfmac|v_wmma)_\w+", text)
    return Resources(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        spilling=_spilling(code, spills),
        shared=compiled.metadata.shared,
        matrix={kind: matrix.count(kind) for kind in sorted(set(matrix))},
        instructions=sum(bool(instruction.name) for instruction in code),
        dots=_dots(compiled.asm["ttir"]),
    )


# --------------------------------------------------------------------------------------------------
# All kernels of all cases


def name_of(launch: Launch) -> str:
    """A kernel's specialisation: its constants for the reader, a checksum for dtypes, alignment."""
    constants = " ".join(f"{k}={v}" for k, v in launch.meta.items() if v is not None)
    return f"{launch.name} {constants} #{zlib.crc32(str(launch.specialization()).encode()):08x}"


def launches(calls: list[cases.Call], arch: str) -> dict[str, Launch]:
    """The different kernels that the calls launch on an architecture, by name."""
    return {name_of(launch): launch for call in calls for launch in call.launches(arch)}


def reason(error: Exception) -> str:
    """The line of a compiler's message that says what is wrong."""
    lines = str(error).strip().splitlines() or [""]
    telling = (line for line in lines if "error" in line.lower() or "fatal" in line)
    return next(telling, lines[-1])[:200]


def compile_quietly(launch: Launch | Kernel, arch: str) -> dict:
    """Resources as a dict, or {"error": reason}; compilers that fail print pages."""
    with (
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stderr(quiet),
        contextlib.redirect_stdout(quiet),
    ):
        try:
            return compile_launch(launch, arch)._asdict()
        except Exception as error:  # whatever the compiler raises is the finding
            return {"error": reason(error)}


def _compile(wanted: tuple[tuple[str, str], Kernel]) -> tuple[str, str, dict]:
    (arch, name), kernel = wanted
    return arch, name, compile_quietly(kernel, arch)


def all_kernels(calls: list[cases.Call], archs: list[str]) -> dict[tuple[str, str], Kernel]:
    """By architecture and name."""
    return {
        (arch, name): kernel_of(launch)
        for arch in archs
        for name, launch in launches(calls, arch).items()
    }


def changed(wanted: dict[tuple[str, str], Kernel], known: dict) -> dict[tuple[str, str], Kernel]:
    """The kernels that a record lacks, or whose source is not the recorded one."""
    return {
        (arch, name): kernel
        for (arch, name), kernel in wanted.items()
        if arch not in known["kernels"].get(name, {})
        or known["sources"].get(kernel.name) != source_checksum(kernel.function)
    }


def compile_all(
    wanted: dict[tuple[str, str], Kernel], processes: int | None = None
) -> Iterator[tuple[str, str, dict]]:
    """Yields (architecture, kernel, resources or {"error": ..}) as the compilations end."""
    with multiprocessing.get_context("fork").Pool(processes or os.cpu_count()) as pool:
        yield from pool.imap_unordered(_compile, wanted.items())


def check_archs(archs: list[str]) -> None:
    for arch in archs:
        require(arch in TARGETS, f"--arch {arch}: choose from {', '.join(TARGETS)}")


def all_calls(op: str | None) -> list[cases.Call]:
    """The different calls of all phases, or those of one op and its backward."""
    calls = {}
    for phase in cases.PHASES:
        print(f"capturing {phase} ...", file=sys.stderr, flush=True)
        calls.update({call.key: call for call in cases.calls(phase)})
    return [
        call for call in calls.values() if op is None or call.op.removesuffix("_backward") == op
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m bench.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(TARGETS), help="architectures, comma-separated")
    parser.add_argument("--op", help="only this op (and its backward)")
    parser.add_argument(
        "--record", action="store_true", help="write bench/results/kernels_triton<version>.json"
    )
    parser.add_argument(
        "--new", action="store_true", help="only those that are not in it as they are"
    )
    args = parser.parse_args(argv)
    args.arch = args.arch.split(",")
    check_archs(args.arch)
    return args


def run(argv: list[str] | None) -> None:
    args, name = parse(argv), f"kernels_triton{triton.__version__}"
    wanted = all_kernels(all_calls(args.op), args.arch)
    missing = wanted
    table: dict = {}
    if args.new:
        known = json.loads((RESULTS / f"{name}.json").read_text())
        missing = changed(wanted, known)
        for arch, kernel in wanted.keys() - missing.keys():
            table.setdefault(kernel, {})[arch] = known["kernels"][kernel][arch]
    for arch, kernel, result in compile_all(missing):
        table.setdefault(kernel, {})[arch] = result
        too_much = result.get("shared", 0) > SHARED[arch] * 1024
        found = " ".join(f"{key} {value}" for key, value in result.items())
        warning = "  TOO MUCH SHARED MEMORY" if too_much else ""
        print(f"{arch:7} {found}{warning}  {kernel}", flush=True)
    if args.record:
        functions = {kernel.name: kernel.function for kernel in wanted.values()}
        sources = {name: source_checksum(functions[name]) for name in sorted(functions)}
        kernels = {
            kernel: {arch: table[kernel][arch] for arch in TARGETS if arch in table[kernel]}
            for kernel in sorted(table)
        }
        record(name, {"sources": sources, "kernels": kernels})


if __name__ == "__main__":
    sys.exit(cli.main("bench.offline", run, None, outlives_reader=True))
