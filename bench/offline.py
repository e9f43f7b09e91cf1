"""Compile the kernels ahead of time for GPUs that are not there, and read what they need of them.

    python -m bench.offline [--arch sm_90,gfx942] [--op sparse_attn] [--record [--new]]

Every opaque op that the graphs of Flash and Pro call (cases.py) is launched with fake tensors of those shapes, and each
kernel compiled with Triton's own assembler: registers, spills, shared memory, matrix instructions. Compilers differ:
put another Triton first in PYTHONPATH to see its figures. --record writes results/kernels_triton<version>.json;
with --new only kernels that are not in there are compiled, and those that no call launches any more are dropped.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import zlib
from typing import Iterator, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import cases
from bench.record import RESULTS, record
from ops.launch import Launch
from ops.registry import require
from tools import cli

TARGETS = {
    **{f"sm_{n}": GPUTarget("cuda", n, 32) for n in (80, 90, 100, 120)},
    **{name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")},
}
SHARED = {
    "sm_80": 163,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx950": 160,
}  # KiB a program may have
MATRIX = (
    "HGMMA",
    "QGMMA",
    "IGMMA",
    "UTCHMMA",
    "UTCQMMA",
    "HMMA",
    "QMMA",
    "IMMA",
    "DMMA",
)  # NVIDIA's; AMD's: v_mfma_*
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


class Resources(NamedTuple):
    """What a compiled kernel needs; spills in instructions (NVIDIA) or registers (AMD), shared memory in bytes."""

    registers: int
    spills: int
    spilling: float  # share of the instructions in loops that spill or fetch what was spilled
    shared: int
    matrix: dict[str, int]  # matrix instructions by kind
    instructions: int
    dots: int  # matrix products in the source, after inlining and unrolling, but of fp32: those may be without such instructions


class Kernel(NamedTuple):
    """What is compiled of a launch; another process, with another Triton, may do it."""

    module: str
    name: str
    specialization: tuple


def kernel_of(launch: Launch) -> Kernel:
    return Kernel(launch.kernel.fn.__module__, launch.name, launch.specialization())


def compile_launch(launch: Launch | Kernel, arch: str) -> Resources:
    """Resources of one launch on one architecture. Raises what the compiler raises."""
    module, name, (types, constants, aligned, options) = (
        launch if isinstance(launch, Kernel) else kernel_of(launch)
    )
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        types,
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=TARGETS[arch], options=options)
    return (_nvidia if "cubin" in compiled.asm else _amd)(compiled)


def _cuobjdump(flag: str, path: str) -> str:
    return subprocess.run(
        [CUOBJDUMP, flag, path], capture_output=True, text=True, check=True
    ).stdout


def _dots(ttir: str) -> int:
    return sum(
        operand != "f32" for operand in re.findall(r"tt\.dot .*: tensor<[0-9x]*x(\w+)>", ttir)
    )


def _spilling(code: list[tuple[str, str, str | None]], spill) -> float:
    """code: (address or label, instruction, label that it jumps to); a jump back closes a loop."""
    at = {label: i for i, (label, *_) in reversed(list(enumerate(code)))}
    loops = [(at[target], i) for i, (*_, target) in enumerate(code) if at.get(target, i + 1) <= i]
    inside = [
        name
        for i, (_, name, _) in enumerate(code)
        if name and any(first <= i <= last for first, last in loops)
    ]
    return sum(map(spill, inside)) / max(len(inside), 1)


def _nvidia(compiled) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = _cuobjdump("-res-usage", file.name), _cuobjdump("-sass", file.name)
    lines = re.findall(
        r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;\n]*)", code, re.M
    )
    names, spill = [name for _, name, _ in lines], lambda name: name in ("LDL", "STL")
    target = lambda operands: (re.findall(r"0x([0-9a-f]+)", operands) or ["?"])[-1].rjust(4, "0")
    return Resources(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spills=sum(map(spill, names)),
        spilling=_spilling(
            [(at, name, target(rest) if name == "BRA" else None) for at, name, rest in lines], spill
        ),
        shared=compiled.metadata.shared,
        matrix={kind: names.count(kind) for kind in MATRIX if kind in names},
        instructions=len(names),
        dots=_dots(compiled.asm["ttir"]),
    )


def _amd(compiled) -> Resources:
    code = compiled.asm["amdgcn"]
    number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", code)[1])
    matrix = re.findall(r"\b(v_mfma|v_smfmac|v_wmma)_\w+", code)
    lines = [
        (label, name, rest.strip() if "branch" in name else None)
        for label, name, rest in re.findall(
            r"^(?:(\.\w+):.*|\t([a-z]\w+)[ \t]*([^;\n]*))$", code, re.M
        )
    ]
    return Resources(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        spilling=_spilling(lines, lambda name: name.startswith("scratch_")),
        shared=compiled.metadata.shared,
        matrix={kind: matrix.count(kind) for kind in sorted(set(matrix))},
        instructions=sum(bool(name) for _, name, _ in lines),
        dots=_dots(compiled.asm["ttir"]),
    )


# ---------------------------------------------------------------------------------------------------------------------
# All kernels of all cases


def name_of(launch: Launch) -> str:
    """A name for a kernel's specialisation: its constants for the reader, a checksum for dtypes and alignment."""
    constants = " ".join(f"{k}={v}" for k, v in launch.meta.items() if v is not None)
    return f"{launch.name} {constants} #{zlib.crc32(str(launch.specialization()).encode()):08x}"


def launches(calls: list[cases.Call], arch: str) -> dict[str, Launch]:
    """The different kernels that the calls launch on an architecture, by name."""
    return {name_of(launch): launch for call in calls for launch in call.launches(arch)}


def compile_quietly(launch: Launch | Kernel, arch: str) -> dict:
    """Resources as a dict, or {"error": why it does not compile}; compilers that fail print pages."""
    with (
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stderr(quiet),
        contextlib.redirect_stdout(quiet),
    ):
        try:
            return compile_launch(launch, arch)._asdict()
        except Exception as error:  # whatever the compiler raises is the finding
            lines = str(error).strip().splitlines() or [""]
            return {
                "error": next(
                    (line for line in lines if "error" in line.lower() or "fatal" in line),
                    lines[-1],
                )[:200]
            }


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


def run(argv: list[str] | None) -> None:
    parser = cli.Parser(prog="python -m bench.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default=",".join(TARGETS), help="architectures, comma-separated")
    parser.add_argument("--op", help="only this op (and its backward)")
    parser.add_argument(
        "--record", action="store_true", help="write bench/results/kernels_triton<version>.json"
    )
    parser.add_argument("--new", action="store_true", help="only kernels that it lacks")
    args = parser.parse_args(argv)
    archs = args.arch.split(",")
    check_archs(archs)
    wanted, name = all_kernels(all_calls(args.op), archs), f"kernels_triton{triton.__version__}"
    known = json.loads((RESULTS / f"{name}.json").read_text())["kernels"] if args.new else {}
    table: dict = {}
    for arch, kernel in wanted:
        if arch in known.get(kernel, {}):
            table.setdefault(kernel, {})[arch] = known[kernel][arch]
    for arch, kernel, result in compile_all(
        {key: kernel for key, kernel in wanted.items() if key[0] not in table.get(key[1], {})}
    ):
        table.setdefault(kernel, {})[arch] = result
        over = "" if result.get("shared", 0) <= SHARED[arch] * 1024 else "  TOO MUCH SHARED MEMORY"
        print(
            f"{arch:7} {' '.join(f'{k} {v}' for k, v in result.items())}{over}  {kernel}",
            flush=True,
        )
    if args.record:
        record(name, {"kernels": {kernel: table[kernel] for kernel in sorted(table)}})


if __name__ == "__main__":
    sys.exit(cli.main("bench.offline", run, None))
