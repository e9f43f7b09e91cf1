"""The registry: which form of an op runs, and what a table of choices promises."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import ops
from cases import FEW, by_public_op
from harness import called, record


@by_public_op
def test_use_chooses_the_form_within_its_block(case):
    op, args = getattr(ops, case.op), case.args()
    default = [case.op] * (case.op == "indexer_loss")
    assert called(op, *args) == default  # else the reference on CPU, for these few tokens
    with ops.use({case.op: "opaque"}):
        assert called(op, *args) == [case.op]
        with ops.use({case.op: "reference"}):
            assert called(op, *args) == []
        assert called(op, *args) == [case.op]
    with pytest.raises(KeyError), ops.use({case.op: "reference"}):
        raise KeyError
    assert called(op, *args) == default


def test_a_table_tells_the_mode_of_every_op_on_a_device():
    table = ops.Table({"moe": "reference", "rope": "cpu"})
    on_cpu, elsewhere = table.modes_on("cpu"), table.modes_on("cuda")
    assert set(on_cpu) == set(elsewhere) == set(ops.OPS)
    assert on_cpu["moe"] == elsewhere["moe"] == "reference" and elsewhere["rope"] == "cpu"
    assert on_cpu["sparse_attn"] == "cpu" and on_cpu["compress"] == "reference"
    assert elsewhere["sparse_attn"] == elsewhere["compress"] == "opaque"


@by_public_op
def test_a_table_keeps_its_choice(case):
    args = case.args()
    with ops.use({case.op: "opaque"}):
        default, given = ops.Table(), ops.Table({case.op: "reference"})
    with ops.use({case.op: "reference"}):
        assert called(getattr(default, case.op), *args) == [case.op]
        assert default.modes == {case.op: "opaque"}
    with ops.use({case.op: "opaque"}):
        assert called(getattr(given, case.op), *args) == []
        assert given.modes == {case.op: "reference"}


def test_a_table_is_immutable():
    table = ops.Table({"moe": "opaque"})
    with pytest.raises(AttributeError, match="immutable"):
        table.moe = None
    with pytest.raises(TypeError):
        table.modes["moe"] = "reference"
    assert copy.deepcopy(table) is table and pickle.loads(pickle.dumps(table)).modes == table.modes


@pytest.mark.parametrize(
    "choose", [ops.Table, lambda modes: ops.use(modes).__enter__()], ids=["Table", "use"]
)
def test_unknown_ops_and_modes_are_named(choose):
    with pytest.raises(ValueError, match="unknown op 'attention': choose from .*sparse_attn"):
        choose({"attention": "opaque"})
    with pytest.raises(ValueError, match="op 'moe': mode 'fast' is none of reference, opaque, cpu"):
        choose({"moe": "fast"})
    assert ops.Table().modes == {}


def test_every_op_runs_on_both_devices():
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for case in FEW[::3]:
        for name in set(record(case).names):
            assert all(has_kernel(f"{ops.NAMESPACE}::{name}", key) for key in ("CPU", "CUDA"))
