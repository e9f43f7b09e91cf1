"""The C++ forms of ops on CPU: their values, what they refuse, when they are built."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import ops
from cases import CASES, case_of, moe_decode
from harness import OPS, build_cpp, close, compiled, run, same, with_kernels_of_moe
from ops import cpp
from ops.cpp import KERNELS
from ops.swiglu import HAS_KERNELS

# --------------------------------------------------------------------------------------------------
# Values


@pytest.fixture
def threads():
    """Sets how many threads torch uses, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", [case for case in CASES if case.op in KERNELS], ids=str)
def test_cpp_kernels_equal_their_references(case, threads):
    """Outputs and gradients, on one thread and on three."""
    args, op = case.args(), OPS[case.op]
    build_cpp(*(name for name in KERNELS if name.removesuffix("_backward") == case.op))
    expected = run(op.reference, case, args)
    for count in (1, 3):
        threads(count)
        got = run(op.opaque, case, args)
        same(got, expected, 5e-6)
    threads(1)
    if args[0].numel() > 1:
        strided = tuple(
            a.mT.contiguous().mT if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in args
        )
        same(run(op.opaque, case, strided), got, 1e-6)


@with_kernels_of_moe
def test_cpp_kernels_round_small_values_to_the_scale_of_their_block():
    """Each value meets a weight that undoes its size: its own rounding shows in the result."""
    n, size = 20, torch.exp2(-torch.arange(20.0))
    x, w2 = (1.37 * size)[None], torch.eye(n)[None]
    gate, up = torch.zeros(n, n).index_fill_(1, torch.tensor(0), 1.0), torch.diag(1 / size)
    w13 = torch.cat((gate, up))[None]
    idx, weight = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    args = (x, w13, w2, idx, weight, 1e9, True)
    build_cpp("moe_decode")
    op = ops.INTERNAL["moe_decode"]
    close(op.opaque(*args), op.reference(*args), 1e-6)


@with_kernels_of_moe
def test_cpp_kernels_use_every_thread_they_are_given(threads):
    args = case_of(moe_decode, 3, 2, 2, 1030, 514, False).args()
    build_cpp("moe_decode")
    one = ops.INTERNAL["moe_decode"].opaque(*args)
    threads(2)
    assert torch.equal(ops.INTERNAL["moe_decode"].opaque(*args), one)


# --------------------------------------------------------------------------------------------------
# Refusals


@with_kernels_of_moe
def test_cpp_kernels_refuse_other_dtypes_in_one_line():
    x, *rest = case_of(moe_decode, 5, 4, 2, 10, 6, False).args()
    build_cpp("moe_decode", "sinkhorn")
    for call in (
        lambda: torch.ops.dsv4.moe_decode(x.double(), *rest),
        lambda: torch.ops.dsv4.sinkhorn(x[:4, :4].double(), 1e-6, 2),
    ):
        with pytest.raises(RuntimeError, match="takes float32 values and int64 indices"):
            call()


@with_kernels_of_moe
def test_an_expert_that_does_not_exist_is_refused():
    x, w13, w2, idx, *rest = case_of(moe_decode, 5, 4, 2, 10, 6, False).args()
    build_cpp("moe_decode")
    for wrong in (-1, 4):
        bad = idx.clone().index_fill_(0, torch.tensor(3), wrong)
        with pytest.raises(RuntimeError, match=f"no expert {wrong}"):
            ops.INTERNAL["moe_decode"].opaque(x, w13, w2, bad, *rest)


# --------------------------------------------------------------------------------------------------
# Builds


def test_an_op_whose_cpp_does_not_compile_keeps_its_python(tmp_path, monkeypatch):
    (tmp_path / "common.h").write_text("")
    (tmp_path / "broken.cpp").write_text('#include "common.h"\nno such language')
    monkeypatch.setattr(cpp, "FOLDER", tmp_path)
    double = ops.register(
        "test_double(Tensor x) -> Tensor", impl=lambda x: 2 * x, fake=torch.empty_like, cpp="broken"
    )
    assert KERNELS["test_double"].built is None and double(torch.ones(1)) == 2
    assert not KERNELS["test_double"].build() and double(torch.ones(1)) == 2
    del KERNELS["test_double"]


def test_tracing_builds_no_cpp():
    double = ops.register(
        "test_pure(Tensor x) -> Tensor", impl=lambda x: 2 * x, fake=torch.empty_like, cpp="sinkhorn"
    )
    with FakeTensorMode() as mode:
        assert double(mode.from_tensor(torch.ones(3))).shape == (3,)
    assert KERNELS.pop("test_pure").built is None


@pytest.mark.parametrize(
    "modes, phase, expected",
    [
        ({}, "decode", {"sinkhorn", "moe_decode"}),
        ({}, "prefill", {"sinkhorn", "sparse_attn", "moe_decode", "moe"}),
        ({}, "train", {"hc_pre", "hc_post", "hc_post_pre", "sparse_attn", "moe"}),
        ({"moe": "reference", "hc_pre": "opaque"}, "decode", {"hc_pre", "sinkhorn"}),
        ({name: "opaque" for name in ops.OPS}, "decode", set(KERNELS) & set(ops.OPS)),
        ({name: "reference" for name in ops.OPS}, "train", set()),
    ],
    ids=str,
)
def test_the_cpp_that_a_table_runs_is_built(modes, phase, expected, monkeypatch):
    built = []
    monkeypatch.setattr(cpp.CppKernel, "build", lambda kernel: built.append(kernel.name))
    without_moe = {name for name in expected if not name.startswith("moe")}
    ops.build_cpu_kernels(ops.Table(modes), phase)
    assert set(built) == (expected if HAS_KERNELS else without_moe)
    with cpp.disabled("moe", "moe_decode"):
        built.clear()
        ops.build_cpu_kernels(ops.Table(modes), phase)
    assert set(built) == without_moe


# --------------------------------------------------------------------------------------------------
# Switched off

DECODED = (5, 4, 2, 10, 6, "float", False)


@pytest.mark.parametrize(
    "op, options, grad, node",
    [
        ("hc_pre", (2, 3, 4, 5, 20), True, "hc_pre"),
        ("hc_pre", (2, 3, 4, 5, 20), False, "sinkhorn"),
        ("hc_post", (2, 3, 4, 5), True, "hc_post"),
        ("hc_post_pre", (2, 3, 4, 5, 20), True, "hc_post_pre"),
        ("sparse_attn", (2, 9, 8, "idx"), True, "sparse_attn"),
        pytest.param("moe", DECODED, False, "moe_decode", marks=with_kernels_of_moe),
    ],
    ids=str,
)
def test_a_disabled_kernel_leaves_the_form_that_an_op_has_without_it(op, options, grad, node):
    args = getattr(cases, op)(*options)
    assert node in compiled(ops.OPS[op].cpu, args, grad)[0]
    with cpp.disabled(node):
        without = compiled(ops.OPS[op].cpu, args, grad)[0]
    assert without == {"hc_post_pre": ["hc_pre"]}.get(node, [])
