"""How an op is registered and how a model chooses between its forms.

Every heavy region of the model is an `Op` with interchangeable forms of the same mathematics, its
modes:

    reference   plain PyTorch, traced into the graph, differentiated by autograd
    opaque      one node `torch.ops.dsv4.<name>` in the graph, with a fake, a backward op and a FLOP
                formula; on CPU it runs the reference or C++ (cpp.py), on a GPU (or in Triton's
                interpreter) the kernel
    cpu         the fastest form on CPU (reference, opaque or a variant), selected by sizes, grad
                mode and whether it is being compiled

Without a choice, an op runs in mode "cpu" on CPU and in mode "opaque" elsewhere. A model holds a
`Table`: its own immutable choice per op. `use({...})` sets the choices of tables made inside it.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable

import torch

from .cpp import KERNELS, CppKernel, enabled
from .launch import INTERPRETING

NAMESPACE, CPP = "dsv4", "dsv4_cpp"
MODES = ("reference", "opaque", "cpu")
OPS: dict[str, Op] = {}
INTERNAL: dict[str, Op] = {}  # variants and parts of ops, which no table chooses
FLOPS: dict[Callable, Callable] = {}  # of ops that `register_flops` has not registered yet
LAUNCHERS: dict[str, Callable] = {}  # functions that launch an opaque op's Triton, by the op's name
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_cpp_library = torch.library.Library(CPP, "FRAGMENT")  # C++ for some of an op's arguments
# The choices of `use`; a plain dict, so that compiled code can read and guard it
_modes: dict[str, str] = {}


def register(
    schema: str,
    impl: Callable,
    fake: Callable,
    flops: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    # Implementations
    kernel: Callable | None = None,
    cpp: str | None = None,
    supports_cpp: Callable | None = None,
    native: bool = True,
):
    """Define `torch.ops.dsv4.<name>` and return its overload.

    schema          "name(Tensor x, ...) -> Tensor"
    impl            the reference, on real tensors; its outputs are fresh and contiguous
    fake            output shapes from input shapes
    flops           FLOPs from argument shapes, as torch.utils.flop_counter passes them
    setup_context, backward   as in torch.library.register_autograd; backward calls an op of its own
    kernel          as impl, by Triton: runs on a GPU, and on CPU in Triton's interpreter
    cpp             library of a C++ kernel for CPU: runs once `build_cpu_kernels` built it
    supports_cpp    whether the C++ takes these arguments; impl takes the others. None: it takes all
    native          False: kernel and cpp are left out, impl runs everywhere
    """
    name = schema.split("(")[0]
    if not native:
        kernel = cpp = None
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel or impl, "CUDA")
    if kernel:
        LAUNCHERS[name] = kernel
    if kernel and INTERPRETING:
        _library.impl(name, kernel, "CPU")
    elif cpp is None:
        _library.impl(name, impl, "CPU")
    elif supports_cpp is None:
        CppKernel(NAMESPACE, name, impl, cpp)
    else:
        _register_cpp(schema, impl, cpp, supports_cpp)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
        )
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    if flops is not None:
        FLOPS[packet] = flops
    return packet.default


def _register_cpp(schema: str, impl: Callable, library: str, supports_cpp: Callable) -> None:
    """On CPU: C++, an op of the same name in another namespace, for what it supports; else impl."""
    name = schema.split("(")[0]
    CppKernel(CPP, name, impl, library)
    _cpp_library.define(schema)
    native = getattr(getattr(torch.ops, CPP), name).default

    def on_cpu(*args):
        form = native if enabled(name) and supports_cpp(*args) else impl
        return form(*args)

    _library.impl(name, on_cpu, "CPU")


def register_flops() -> None:
    """Have torch.utils.flop_counter know the ops."""
    from torch.utils.flop_counter import register_flop_formula  # imports Triton

    for packet, formula in FLOPS.items():
        register_flop_formula(packet)(formula)
    FLOPS.clear()


class Op:
    """One op. A call checks the arguments (outside compiled code) and runs the form of the device.

    check(*args)      raises ValueError naming the argument at fault
    cpu(*args)        the form of mode "cpu"; None: the reference
    traced            set where the opaque form is the reference: a compiler does best with it
    cpp               of each phase, the ops whose C++ mode "cpu" runs: see build_cpu_kernels
    internal          a variant or part of another op, which has checked the arguments
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        opaque: Callable,
        check: Callable | None,
        # CPU
        cpu: Callable | None = None,
        cpp: dict[str, tuple[str, ...]] | None = None,
        internal: bool = False,
    ):
        self.name = name
        self.traced = opaque is reference
        self._check = check
        self.reference = self._checked(reference)
        self.opaque = self._checked(opaque)
        self.cpu = self.reference if cpu is None else self._checked(cpu)
        self.default_on_cpu = "reference" if cpu is None else "cpu"
        self._cpp = cpp or {}
        self.__doc__ = reference.__doc__
        (INTERNAL if internal else OPS)[name] = self

    def _checked(self, form: Callable) -> Callable:
        if self._check is None:
            return form

        def call(*args):
            if not torch.compiler.is_compiling():
                self._check(*args)
            return form(*args)

        return call

    def bind(self, mode: str | None) -> Callable:
        """The form of a mode; None chooses by the device of the first argument."""
        if mode is not None:
            return getattr(self, mode)
        cpu, opaque = self.cpu, self.opaque

        def default(*args):
            form = cpu if args[0].device.type == "cpu" else opaque
            return form(*args)

        return default

    def cpp_kernels(self, mode: str, phase: str) -> tuple[str, ...]:
        """The ops whose C++ this one runs on CPU in a mode and phase."""
        if mode == "opaque":
            return (self.name,)
        return self._cpp.get(phase, ()) if mode == "cpu" else ()

    def __call__(self, *args):
        return self.bind(_modes.get(self.name))(*args)


class Table:
    """An immutable choice of form for every op: `table.sparse_attn(...)` calls the chosen one.

    modes            the choices: op names to "reference", "opaque" or "cpu"; others: by device
    modes_on("cpu")  the mode of every op on a device
    """

    def __init__(self, modes: dict[str, str] | None = None):
        modes = {**_modes, **validate(modes or {})}
        object.__setattr__(self, "modes", types.MappingProxyType(modes))
        for name, op in OPS.items():
            object.__setattr__(self, name, op.bind(modes.get(name)))

    def modes_on(self, device: str) -> dict[str, str]:
        """The mode of every op for tensors on a device ("cpu", "cuda", ...)."""
        defaults = {
            name: op.default_on_cpu if device == "cpu" else "opaque" for name, op in OPS.items()
        }
        return defaults | self.modes

    def __setattr__(self, name, value):
        raise AttributeError("an op table is immutable: build the model with ops={...}")

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Table, (dict(self.modes),)


def build_cpu_kernels(table: Table, phase: str) -> None:
    """Compile the C++ that a table's forms run on CPU in fp32, once a machine, and register it.

    phase   "decode": few tokens; "prefill": many; both without gradients; "train": with gradients

    Tracing builds nothing: call this before compiling what shall use it, as compile_config.py does.
    Ops whose C++ cannot be compiled here keep their Python.
    """
    for kernel in cpu_kernels(table, phase):
        kernel.build()


def cpu_kernels(table: Table, phase: str) -> list[CppKernel]:
    """The C++ kernels that `build_cpu_kernels` builds."""
    modes = table.modes_on("cpu").items()
    names = [op for name, mode in modes for op in OPS[name].cpp_kernels(mode, phase)]
    return [KERNELS[op] for op in names if op in KERNELS and enabled(op)]


def validate(modes: dict[str, str]) -> dict[str, str]:
    """`modes` itself, after checking that every op and every mode exists."""
    for name, mode in modes.items():
        if name not in OPS:
            raise ValueError(f"unknown op {name!r}: choose from {', '.join(OPS)}")
        if mode not in MODES:
            raise ValueError(f"op {name!r}: mode {mode!r} is none of {', '.join(MODES)}")
    return modes


@contextlib.contextmanager
def use(modes: dict[str, str]):
    """Within the block models and calls take these forms: `with use({"moe": "opaque"}): ...`"""
    before = dict(_modes)
    _modes.update(validate(modes))
    try:
        yield
    finally:
        _modes.clear()
        _modes.update(before)


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless condition; the one-line form of an argument check."""
    if not condition:
        raise ValueError(message)
