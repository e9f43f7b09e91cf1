"""Contracts of every op: its forms compute its formula, and are what torch relies on.

The formulas are in contracts.py, the cases in cases.py. What is special to an op is tested in
test_<op>.py, argument checks in test_checks.py, FLOPs and memory in test_costs.py.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

import ops
from cases import CASES, FEW, Case, by_case, by_few, by_public_op
from contracts import CONTRACTS
from harness import (
    OPS,
    close,
    detached,
    differentiable,
    low,
    record,
    run,
    same,
    tensors,
    with_gradients,
)
from testing import rms

# --------------------------------------------------------------------------------------------------
# Values and gradients


def test_every_op_has_a_contract_and_cases():
    """Forward and backward ops alike; rope_ and the optimizer's have tests elsewhere."""
    prefix = f"{ops.NAMESPACE}::"
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith(prefix)}
    elsewhere = {"rope_", "muon", "muon_direction", "grad_norm"}
    assert set(CONTRACTS) == set(OPS) == {case.op for case in FEW}
    assert {name for case in FEW for name in record(case).names} == registered - elsewhere


@by_case
def test_reference_matches_the_spec(case):
    args = case.args()
    expected = run(CONTRACTS[case.op].spec, case, tensors(torch.Tensor.double, args))
    same(run(OPS[case.op].reference, case, args), expected, 5e-6)


@pytest.mark.kernels
@by_case
def test_opaque_equals_reference(case):
    args = case.args()
    opaque = run(OPS[case.op].opaque, case, args)
    reference = run(OPS[case.op].reference, case, args)
    same(opaque, reference, 5e-6)
    for a, b in zip(itertools.chain(*opaque), itertools.chain(*reference), strict=True):
        assert a.dtype == b.dtype


@pytest.mark.parametrize("form", ["reference", "opaque"])
@pytest.mark.parametrize("case", [case for case in CASES if hasattr(case.module, "CHUNK")], ids=str)
def test_chunks_change_nothing(case, form, monkeypatch):
    """Everything at once, or in chunks of one token or a few, the last one shorter."""
    args, op = case.args(), getattr(OPS[case.op], form)
    expected = run(op, case, args)
    for chunk in (1, 997):
        monkeypatch.setattr(case.module, "CHUNK", chunk)
        same(run(op, case, args), expected, 5e-6)


def one_rounding(b: torch.Tensor) -> float:
    """Relative RMS of rounding to bf16 once, and a margin for ties."""
    return rms(b.bfloat16(), b) + 1e-6 if b.is_floating_point() and b.numel() > 1 else 4e-3


def error_of_fp32(op: str) -> float:
    """Allowed for fp32 outputs of bf16 inputs."""
    if op in ("moe", "hc_post_pre"):
        return 8e-3
    return 2e-5 if op == "hc_pre" else 5e-6  # hc_pre's kernel has 16 bits of fn


@pytest.mark.kernels
@by_case
def test_bf16_is_exact_up_to_rounding(case):
    """bf16 in, fp32 inside: fp32 outputs are exact, bf16 ones off by few roundings."""
    contract, args = CONTRACTS[case.op], low(case)
    expected, expected_grads = run(contract.spec, case, tensors(torch.Tensor.double, args))
    # A value rounded to bf16, then to fp8, may land on either side of a tie
    flips = 10 if case.op == "moe" and args[-1] else 1
    for form in ("reference", "opaque"):
        out, grads = run(getattr(OPS[case.op], form), case, args)
        for a, b, is_fp32 in zip(out, expected, contract.out, strict=True):
            floating = torch.float32 if is_fp32 else torch.bfloat16
            assert a.dtype == (torch.int64 if case.op == "indexer_topk" else floating)
            rounded = contract.rounding * one_rounding(b)
            close(a, b, error_of_fp32(case.op) * flips if is_fp32 else rounded)
        for i, a, b in zip(differentiable(case, args), grads, expected_grads, strict=True):
            assert a.dtype == args[i].dtype
            close(a, b, (2e-2 if a.dtype == torch.bfloat16 else 3e-2) * flips)


@pytest.mark.kernels
@by_few
def test_each_gradient_alone_is_the_same(case):
    args, leaves = case.args(), differentiable(case, case.args())
    _, grads = run(OPS[case.op].opaque, case, args)
    for form in ("reference", "opaque"):
        for i, expected in zip(leaves, grads, strict=True):
            inputs = list(args)
            for j in leaves:
                inputs[j] = args[j].detach().requires_grad_(i == j)
            torch.manual_seed(1)
            out = getattr(OPS[case.op], form)(*inputs)
            out = [out] if isinstance(out, torch.Tensor) else out
            sum((o * torch.randn(o.shape).bfloat16()).sum() for o in out).backward()
            close(inputs[i].grad, expected, 5e-6)


# --------------------------------------------------------------------------------------------------
# Registration: what torch relies on


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same values, with the strides of a transposed tensor."""
    if t.dim() > 1:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return t.repeat_interleave(2)[::2]


def expanded(t: torch.Tensor) -> torch.Tensor:
    """The first value along the last dim, repeated with stride 0, as the gradient of a sum is."""
    return t[..., :1].expand(t.shape)


def metadata(t: torch.Tensor) -> tuple:
    return t.shape, t.dtype, t.stride()


def memory(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


@pytest.mark.kernels
@pytest.mark.parametrize("arguments", [Case.args, low], ids=["fp32", "bf16"])
@by_case
def test_ops_are_pure_and_their_fakes_are_true(case, arguments):
    """For any strides: outputs as the fake says, contiguous and fresh; inputs untouched."""
    for op, args in record(case, arguments(case)).calls:
        args = tree_map_only(torch.Tensor, transposed, detached(args))
        before = copy.deepcopy(args)
        out = tree_leaves(op(*args))
        with FakeTensorMode() as mode:
            fakes = tree_leaves(op(*tree_map_only(torch.Tensor, mode.from_tensor, args)))
        inputs = [t for t in args if isinstance(t, torch.Tensor)]
        for real, fake in zip(out, fakes, strict=True):
            assert metadata(real) == metadata(fake) and real.is_contiguous()
            assert not real.numel() or memory(real) not in [memory(t) for t in inputs]
        for a, b in zip(inputs, [t for t in before if isinstance(t, torch.Tensor)], strict=True):
            assert a.tolist() == b.tolist()


@pytest.mark.kernels
@pytest.mark.parametrize(
    "layout", [torch.clone, transposed, expanded], ids=["contiguous", "transposed", "expanded"]
)
@by_few
def test_ops_pass_opcheck(case, layout):
    """Schema, autograd registration, fake and AOT dispatch, of the forward and the backward op."""
    for op, args in record(case).calls:
        args = tree_map_only(torch.Tensor, layout, detached(args))
        if op.name() == f"{ops.NAMESPACE}::{case.op}":
            args = with_gradients(case, args)
        tests = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"]
        dtypes = [a.dtype for a in args if isinstance(a, torch.Tensor)]
        if torch.float8_e4m3fn not in dtypes:  # the schema test cannot compare these
            tests.append("test_schema")
        torch.library.opcheck(op, tuple(args), test_utils=tests)


@pytest.mark.parametrize("form", ["reference", "opaque", "called"])
@by_public_op
def test_opaque_is_one_node_and_the_reference_none(case, form):
    """Forward and backward graphs under torch.compile(fullgraph=True); the numbers of eager."""
    nodes, op = [], OPS[case.op]

    def compiler(graph, inputs):
        nodes.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    def call(*args):
        return getattr(ops, case.op)(*args)

    torch._dynamo.reset()
    with ops.use({case.op: "opaque"}):
        compiled = torch.compile(
            call if form == "called" else getattr(op, form),
            fullgraph=True,
            backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler),
        )
        same(run(compiled, case, case.args()), run(op.opaque, case, case.args()), 5e-6)
    ours = [name for graph in nodes for name in graph if name.startswith(ops.NAMESPACE)]
    if form == "reference":
        assert ours == []
        return
    assert ours == [f"{ops.NAMESPACE}.{name}.default" for name in record(case).names]
    others = {name for name in nodes[0] if not name.startswith(ops.NAMESPACE)}
    # Nothing else but taking results apart
    assert others <= {"<built-in function getitem>", "aten.detach.default"}
