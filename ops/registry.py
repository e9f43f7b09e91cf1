"""How an op is registered and how a model chooses between its two forms.

Every heavy region of the model is an `Op` with two interchangeable forms of the same mathematics:

    reference   plain PyTorch, traced into the graph, differentiated by autograd
    opaque      one node `torch.ops.dsv4.<name>` in the graph, with a fake, a backward op and a FLOP formula;
                on CPU it runs the reference, on a GPU (or in Triton's interpreter) the kernel

A model holds a `Table`: its own immutable choice per op. `use({...})` sets the choices of tables made inside it.
"""

from __future__ import annotations

import contextlib
import types
from typing import Callable

import torch
from torch.utils.flop_counter import register_flop_formula

from .cpp import CppKernel
from .launch import INTERPRETING

NAMESPACE, CPP = "dsv4", "dsv4_cpp"
OPS: dict[str, "Op"] = {}
LAUNCHERS: dict[str, Callable] = {}  # what launches Triton for an opaque op, by the op's name
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_cpp_library = torch.library.Library(CPP, "FRAGMENT")  # C++ for some of an op's arguments
_modes: dict[
    str, str
] = {}  # the choices of `use`; a plain dict, so that compiled code can read and guard it


def register(
    schema: str,
    impl: Callable,
    fake: Callable,
    flops: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    cpp: str | None = None,
    kernel: Callable | None = None,
    takes: Callable | None = None,
):
    """Define `torch.ops.dsv4.<name>` and return its overload.

    schema          "name(Tensor x, ...) -> Tensor"
    impl            the reference, on real tensors; its outputs are fresh and contiguous
    fake            output shapes from input shapes
    flops           FLOPs from argument shapes, as torch.utils.flop_counter passes them
    setup_context, backward   as in torch.library.register_autograd; backward calls an op of its own
    cpp             C++ source of a CPU kernel, see cpp.py
    takes           whether the C++ takes these arguments; impl takes the others. None: it takes all
    kernel          as impl, by Triton: runs instead of it on a GPU, and on CPU in Triton's interpreter
    """
    name = schema.split("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel or impl, "CUDA")
    if kernel:
        LAUNCHERS[name] = kernel
    if kernel and INTERPRETING:
        impl, cpp = kernel, None
    if cpp is None:
        _library.impl(name, impl, "CPU")
    else:
        native, shapes = CppKernel(NAMESPACE if takes is None else CPP, name, impl, cpp), fake
        if takes is not None:
            _cpp_library.define(schema)
            chosen = getattr(getattr(torch.ops, CPP), name).default
            _library.impl(name, lambda *args: (chosen if takes(*args) else impl)(*args), "CPU")

        def fake(x, *args):
            if x.device.type == "cpu" and (takes is None or takes(x, *args)):
                native.build()
            return shapes(x, *args)

    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_library
        )
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    return packet.default


class Op:
    """One op. Calling it validates the arguments (outside compiled code) and runs the form that suits the device.

    check(*args)    raises ValueError naming the argument at fault
    on_cpu(*args)   the form that is the default on CPU; None: the reference. Elsewhere it is the opaque one
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        opaque: Callable,
        check: Callable,
        on_cpu: Callable | None = None,
    ):
        self.name, self._check = name, check
        self.reference, self.opaque, self._on_cpu = (
            self._checked(form) for form in (reference, opaque, on_cpu or reference)
        )
        self.__doc__ = reference.__doc__
        OPS[name] = self

    def _checked(self, form: Callable) -> Callable:
        def call(*args):
            if not torch.compiler.is_compiling():
                self._check(*args)
            return form(*args)

        return call

    def bind(self, mode: str | None) -> Callable:
        """The form for mode "reference" or "opaque"; None chooses by the device of the first argument."""
        if mode is not None:
            return getattr(self, mode)
        opaque, on_cpu = self.opaque, self._on_cpu

        def default(*args):
            return (on_cpu if args[0].device.type == "cpu" else opaque)(*args)

        return default

    def __call__(self, *args):
        return self.bind(_modes.get(self.name))(*args)


class Table:
    """An immutable choice of form for every op: `table.sparse_attn(...)` calls the chosen one; `table.modes` tells.

    modes maps op names to "reference" or "opaque"; ops it does not name follow `use`, then the device.
    """

    def __init__(self, modes: dict[str, str] | None = None):
        modes = {**_modes, **validate(modes or {})}
        object.__setattr__(self, "modes", types.MappingProxyType(modes))
        for name, op in OPS.items():
            object.__setattr__(self, name, op.bind(modes.get(name)))

    def __setattr__(self, name, value):
        raise AttributeError("an op table is immutable: build the model with ops={...}")

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return Table, (dict(self.modes),)


def validate(modes: dict[str, str]) -> dict[str, str]:
    """`modes` itself, after checking that every op exists and every mode is "reference" or "opaque"."""
    for name, mode in modes.items():
        if name not in OPS:
            raise ValueError(f"unknown op {name!r}: choose from {', '.join(OPS)}")
        if mode not in ("reference", "opaque"):
            raise ValueError(f"op {name!r}: mode {mode!r} is neither 'reference' nor 'opaque'")
    return modes


@contextlib.contextmanager
def use(modes: dict[str, str]):
    """Within the block, models and calls take these forms by default: `with ops.use({"moe": "reference"}): ...`"""
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
