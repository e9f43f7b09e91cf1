"""Running the forms of an op, recording what they call, comparing their results."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ops
from cases import Case
from contracts import CONTRACTS
from ops.cpp import KERNELS
from ops.swiglu import HAS_KERNELS
from testing import rms

OPS = ops.OPS | ops.INTERNAL
with_kernels_of_moe = pytest.mark.skipif(
    not HAS_KERNELS, reason="ops/swiglu.py: the experts' activation has no kernels"
)

# --------------------------------------------------------------------------------------------------
# Arguments


def tensors(change: Callable, args: tuple, dtypes=(torch.float32, torch.bfloat16)) -> tuple:
    return tree_map_only(torch.Tensor, lambda t: change(t) if t.dtype in dtypes else t, args)


def detached(args: tuple) -> tuple:
    return tree_map_only(torch.Tensor, torch.Tensor.detach, args)


def low(case: Case) -> tuple:
    """The arguments as in a bf16 model."""
    args = list(case.args())
    for i in CONTRACTS[case.op].low:
        args[i] = tensors(torch.Tensor.bfloat16, args[i])
    return tuple(torch.bfloat16 if a is torch.float32 else a for a in args)


def differentiable(case: Case, args: tuple) -> list[int]:
    """Positions of the arguments that have a gradient: packed weights have none."""
    given = (i for i in CONTRACTS[case.op].grad if args[i] is not None)
    return [i for i in given if args[i].dtype.itemsize > 1]


def with_gradients(case: Case, args: tuple) -> list:
    """The arguments, of which those that have a gradient ask for it."""
    leaves = differentiable(case, args)
    return [a.requires_grad_() if i in leaves else a for i, a in enumerate(args)]


# --------------------------------------------------------------------------------------------------
# Running


def run(form: Callable, case: Case, args: tuple) -> tuple[list, list]:
    """-> outputs, and the gradients of a fixed random combination of them."""
    leaves = differentiable(case, args)
    args = [a.detach().requires_grad_() if i in leaves else a for i, a in enumerate(args)]
    out = form(*args)
    out = [out] if isinstance(out, torch.Tensor) else list(out)
    if not leaves:
        return out, []
    torch.manual_seed(1)
    weights = [torch.randn(o.shape).bfloat16() for o in out]
    products = (o.double() * w.double() for o, w in zip(out, weights, strict=True))
    loss = sum(p.sum() for p in products)
    return out, list(torch.autograd.grad(loss, [args[i] for i in leaves]))


def build_cpp(*names: str) -> None:
    """Build C++ kernels: from here on the opaque ops of these names run them."""
    assert all(KERNELS[name].build() for name in names)


class Recorder(TorchDispatchMode):
    """The calls to our ops, with their arguments, and the elements of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace == ops.NAMESPACE:
            self.calls.append((op, args))
        made = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        sizes = (t.untyped_storage().nbytes() // t.itemsize for t in made)
        self.largest = max(self.largest, *sizes, 0)
        return out

    @property
    def names(self) -> list[str]:
        return [op.name().split("::")[1] for op, _ in self.calls]


def record(case: Case, args: tuple | None = None) -> Recorder:
    """Forward and backward of the opaque form."""
    with Recorder() as recorder:
        run(OPS[case.op].opaque, case, case.args() if args is None else args)
    return recorder


def called(call: Callable, *args) -> list[str]:
    """Our ops that an eager call runs."""
    with Recorder() as recorder:
        call(*args)
    return recorder.names


def compiled(form: Callable, args: tuple, grad: bool) -> tuple[list[str], object]:
    """Our nodes in the graph of form(*args), and its result."""
    torch._dynamo.reset()
    names = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.set_grad_enabled(grad):
        got = torch.compile(lambda *args: form(*args), backend=backend, fullgraph=True)(*args)
    return [name.split(".")[1] for name in names if name.startswith("dsv4.")], got


# --------------------------------------------------------------------------------------------------
# Comparing


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float):
    """Equal choices for integers, else relative RMS; a constant reference is compared by itself."""
    assert a.shape == b.shape
    if not b.is_floating_point():
        assert torch.equal(a.sort(-1).values, b.sort(-1).values)
    elif b.numel() < 2 or b.std() == 0:
        assert ((a - b).abs() <= tolerance * (1 + b.abs())).all()
    else:
        assert rms(a, b) <= tolerance


def same(results: tuple, expected: tuple, tolerance: float):
    """Two results of `run`, outputs and gradients alike."""
    for a, b in zip(itertools.chain(*results), itertools.chain(*expected), strict=True):
        close(a, b, tolerance)
