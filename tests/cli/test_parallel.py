"""Contracts of parallel.py: several processes train as one does, and save and stop together."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_step as S
from checkpoint import load, save
from compile_config import CompileConfig, compile_train_step
from model import Transformer
from parallel import REPLICATED, Ranks
from testing import randomize, small
from tools.compile_count import CompileCount
from tools.released_layout import checkpoint_tensors, empty_model
from training import dataset as D
from training.evaluation import held_out_loss
from training.flags import ROOT
from training.losses import LossWeights
from training.resume import Checkpoints

STEPS, BATCH = 5, 4
LENGTH = 64


@dataclasses.dataclass
class Case:
    """How a run is divided, and what is particular about it."""

    ep: int
    kind: str = "muon"
    backend: str | None = None
    micro_batch: int | None = None
    changes: tuple = ()  # to the model

    def model(self) -> Transformer:
        return randomize(
            Transformer(
                small(
                    n_layers=2,
                    n_hash_layers=1,
                    compress_ratios=(0, 4, 0),
                    index_topk=8,
                    moe_inter_dim=16,
                    **{"n_routed_experts": 4, **dict(self.changes)},
                )
            ),
            seed=1,
        )


TWO = {
    "fsdp": Case(1, "adamw", micro_batch=1),
    "uneven": Case(1, "muon", "eager", changes=(("q_lora_rank", 31), ("n_routed_experts", 3))),
    "experts": Case(2),
    "experts, compiled": Case(2, "adamw", "watch"),
}
FOUR = {"both": Case(2)}


def rows(numbers: range) -> tuple[torch.Tensor, ...]:
    """Documents of random bytes. Rows of the second half have few targets, one of step 2 none."""
    found = []
    for number in numbers:
        random = torch.Generator().manual_seed(number)
        window = torch.randint(2, 256, (1, LENGTH + 1), generator=random)
        window[0, torch.randint(5, LENGTH - 5, (2,), generator=random)] = 0
        tokens, targets, docs = D.packed(window, 0)
        if number % BATCH >= BATCH // 2:
            targets[0, 10 * (number % 3) :] = -1
        if number // BATCH == 1 and number % BATCH == BATCH - 1:
            targets[:] = -1
        found.append((tokens, targets, docs))
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


rows.length = LENGTH


def trained(case: Case, ranks, steps: range = range(STEPS), checkpoints: Checkpoints | None = None):
    """Train a model over some steps -> the model, its optimizer, and the metrics of each step."""
    model = ranks.shard(case.model())
    for name, p in model.named_parameters():
        p.requires_grad_(not name.endswith("gate.bias"))
    optimizer = ranks.optimizer(model, case.kind, clip=0.5, eps=1e-3)
    rank_rows = ranks.rows(rows)
    if steps.start:
        assert checkpoints.load(model, optimizer, {"case": "this"}) == steps.start
    step = compile_train_step(
        model,
        optimizer,
        ranks.preset(CompileConfig(backend=case.backend)),
        weights=LossWeights(balance=0.1),
        micro_batch=case.micro_batch,
        all_reduce_sum=ranks.all_reduce_sum,
        wrap_block=ranks.wrap_block,
    )
    metrics = []
    for i in steps:
        batch = rank_rows(range(i * BATCH, (i + 1) * BATCH))
        found = step(*batch, torch.tensor(1e-2 / (i + 1)))
        metrics.append({name: value.item() for name, value in found.items()})
    return model, optimizer, metrics


@torch.no_grad()
def whole(model: Transformer, ranks=None) -> dict[str, torch.Tensor]:
    """All tensors by their released names."""
    views = checkpoint_tensors(empty_model(model.args) if ranks else model)
    get = ranks.gather_full(model) if ranks else lambda name: views[name][1]
    return {name: get(name).clone() for name in views}


def process(rank: int, size: int, port: int, folder: str, cases: dict[str, Case]) -> None:
    """One of `size`: runs the cases, and writes what it finds to a file."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    results, ranks = {}, None
    for name, case in cases.items():
        torch._dynamo.reset()
        graphs, count = [], CompileCount()
        if ranks is None:
            ranks = Ranks("cpu", BATCH, case.ep)
        ranks.ep = case.ep
        if case.backend == "watch":
            case = dataclasses.replace(case, backend=watching(graphs))
        model, optimizer, metrics = trained(case, ranks)
        results[name] = {
            "metrics": metrics,
            "parameters": whole(model, ranks),
            "graphs": graphs,
            "breaks": count.breaks,
            "count": count.graphs,
            "held": sum(
                p.to_local().numel() if hasattr(p, "to_local") else p.numel()
                for p in model.parameters()
            ),
        }
        if name in ("experts", "both"):
            ranks.save(model, f"{folder}/out", dtype=torch.float32)
            checkpoints = Checkpoints(f"{folder}/checkpoints", 2, ranks)
            _, _, before = kept = trained(case, ranks, range(3))
            checkpoints.save(kept[0], kept[1], 3, {"case": "this"})
            resumed, _, after = trained(case, ranks, range(3, STEPS), checkpoints)
            results[name] |= {"resumed": whole(resumed, ranks), "resumed metrics": before + after}
            try:
                checkpoints.load(kept[0], kept[1], {"case": "another"})
            except ValueError as error:
                results[name]["refused"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    ranks.__exit__()


def watching(graphs: list[list[str]]):
    """A backend that records the operators of the layers' graphs, forward and backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def note(graph, inputs):
        graphs.append(
            [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        )
        return make_boxed_func(graph.forward)

    layer = aot_autograd(fw_compiler=note, bw_compiler=note)
    return lambda graph, inputs: (
        layer(graph, inputs) if "dsv4.moe" in graph.print_readable(False) else graph.forward
    )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def spawned(size: int, folder: Path, cases: dict[str, Case]) -> list[dict]:
    torch.multiprocessing.spawn(process, (size, free_port(), str(folder), cases), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, spawned(2, folder, TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return folder, spawned(4, folder, FOUR)


@pytest.fixture(scope="module")
def alone():
    """What one process makes of a case; eager."""
    found = {}

    def run(case: Case):
        case = dataclasses.replace(case, ep=1, backend=None, micro_batch=None)
        key = repr(case)
        if key not in found:
            model, _, metrics = trained(case, Ranks("cpu", BATCH))
            found[key] = metrics, whole(model), whole(case.model())
        return found[key]

    return run


def assert_equal(results: list[dict], case: Case, alone) -> None:
    """Metrics of each step to 1e-5; parameters to 1e-4 of how far they moved, and a rounding.

    Every process has the same bits.

    Muon turns rounding noise into a direction of its own where a gradient has none: Sinkhorn's
    result does not change with some sums of the rows of hc_*_fn.
    """
    metrics, end, begin = alone(case)
    assert all(entry["grad_norm"] > 0.5 for entry in metrics)  # clipping is active
    for result in results:
        for ours, theirs in zip(result["metrics"], metrics, strict=True):
            assert ours.keys() == theirs.keys() == {"loss", "mtp_loss", "balance", "grad_norm"}
            for key, value in theirs.items():
                assert abs(ours[key] / value - 1) < 1e-5, (key, ours[key], value)
        assert result["parameters"].keys() == end.keys()
        for name, p in result["parameters"].items():
            assert torch.equal(p, results[0]["parameters"][name]), name
            moved, bound = (
                (end[name] - begin[name]).float().norm(),
                5e-2 if case.kind == "muon" and re.search(r"hc_(attn|ffn)_fn", name) else 1e-4,
            )
            assert (p - end[name]).float().norm() <= bound * moved + 2**-23 * end[
                name
            ].float().norm(), (name, float((p - end[name]).norm() / moved))


@pytest.mark.parametrize("name", TWO)
def test_two_processes_train_as_one_does(two, alone, name):
    assert_equal([result[name] for result in two[1]], TWO[name], alone)


@pytest.mark.parametrize("name", FOUR)
def test_four_processes_divide_experts_twice_and_train_as_one_does(four, alone, name):
    assert_equal([result[name] for result in four[1]], FOUR[name], alone)


def test_processes_hold_parts(two, four):
    """Of the matrices: what is whole everywhere is small only beside those of larger models."""
    whole_ = sum(
        p.numel()
        for name, p in Case(1).model().named_parameters()
        if p.dim() == 1 or REPLICATED.search(name)
    )
    total = sum(p.numel() for p in Case(1).model().parameters())
    for name, results, size in (("fsdp", two[1], 2), ("experts", two[1], 2), ("both", four[1], 4)):
        assert all(result[name]["held"] == whole_ + (total - whole_) // size for result in results)


def test_layers_are_full_graphs_that_hold_the_exchange(two):
    for result in two[1]:
        result = result["experts, compiled"]
        assert (
            result["breaks"] == 0 and result["count"] == 3 + 5
        )  # two layers and the MTP block; as one process has them
        calls = [
            graph.count("_c10d_functional.all_to_all_single.default") for graph in result["graphs"]
        ]
        assert calls == [3] * 6, calls  # tokens, pairs, results; three layers, forward and backward


@pytest.mark.parametrize("processes, name", (("two", "experts"), ("four", "both")))
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(request, processes, name):
    folder, results = request.getfixturevalue(processes)
    for result in results:
        result = result[name]
        assert result["metrics"] == result["resumed metrics"]
        assert all(
            torch.equal(p, result["resumed"][key]) for key, p in result["parameters"].items()
        )
        assert "case 'this', not 'another'" in result["refused"]
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-000003"]


@pytest.mark.parametrize("processes, name", (("two", "experts"), ("four", "both")))
def test_the_released_layout_is_that_of_one_process(request, tmp_path, processes, name):
    folder, results = request.getfixturevalue(processes)
    model = load(folder / "out", dtype=torch.float32)
    assert all(
        torch.equal(p, results[0][name]["parameters"][key])
        for key, (_, p) in checkpoint_tensors(model).items()
    )
    assert load(folder / "checkpoints" / "step-000003").args == model.args
    save(model, tmp_path / "one", dtype=torch.float32)
    assert sorted(os.listdir(folder / "out")) == sorted(os.listdir(tmp_path / "one"))
    assert all(
        (folder / "out" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
        for file in os.listdir(tmp_path / "one")
    )


# ----------------------------------------------------------------------------------------------
# The command line


def torchrun(folder: Path, *more: str, **options) -> subprocess.Popen:
    (folder / "text.txt").write_text((ROOT / "data" / "shakespeare.txt").read_text()[:60_000])
    argv = [
        "--batch",
        "2",
        "--seq-len",
        "48",
        "--compile",
        "eager",
        "--data",
        str(folder / "text.txt"),
        "--cache",
        str(folder / "cache"),
        *more,
    ]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
            str(ROOT / "train_step.py"),
            *argv,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_torchrun_trains_stops_together_and_goes_on(tmp_path):
    """Interrupted at its first step: both processes save the same one; the next run goes on."""
    keep = ("--checkpoints", str(tmp_path / "run"), "--index-loss", "1", "--recompute", "selective")
    with torchrun(tmp_path, *keep, "--steps", "500") as run:
        for line in run.stdout:
            if line.startswith("step 1/500"):
                run.send_signal(signal.SIGTERM)
                break
        rest = run.stdout.read()
    saved = Checkpoints(str(tmp_path / "run"), 3, Ranks("cpu", 1)).steps()
    assert (
        len(saved) == 1
        and f"saved {tmp_path}/run/step-{saved[0]:06d}" in rest
        and not list((tmp_path / "run").glob(".step-*"))
    )
    with torchrun(
        tmp_path,
        *keep,
        "--steps",
        "500",
        "--stop-after",
        str(saved[0] + 1),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ) as run:
        out, err = run.communicate()
    assert run.returncode == 0, err
    report = json.loads(out)  # of one process, and nothing else
    assert (
        report["steps"] == saved[0] + 1
        and report["sample"].startswith("KING RICHARD.")
        and err.count("going on from") == 1
    )
    model = load(tmp_path / "out", dtype=torch.float32)
    data = D.prepare((tmp_path / "text.txt").read_text(), tmp_path / "cache", 256)
    assert (
        abs(held_out_loss(model, data.held_out[:96], 48, 2, 0) / report["held_out_loss"] - 1) < 2e-3
    )  # out is bf16
    lines = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines == [1, saved[0] + 1]


@pytest.mark.parametrize(
    "argv, size, says",
    [
        (["--batch", "3"], 2, "--batch 3: 2 processes"),
        (["--ep", "3"], 1, "--ep 3: choose a divisor of 1 processes and of 8 experts"),
        (["--ep", "2"], None, "--ep 2: start the processes with torchrun"),
    ],
)
def test_bad_input_is_one_line_of_the_first_process(
    capsys, monkeypatch, tmp_path, argv, size, says
):
    for rank in (0, 1) if size == 2 else (0,):
        for name, value in dict(
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=size,
            LOCAL_WORLD_SIZE=size,
            MASTER_PORT=free_port(),
        ).items():
            monkeypatch.setenv(name, str(value)) if size else monkeypatch.delenv(
                name, raising=False
            )
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        assert S.main([*argv, "--cache", str(tmp_path)]) == 2
        captured = capsys.readouterr()
        assert not captured.out and (
            says in captured.err and len(captured.err.strip().splitlines()) == 1
            if rank == 0
            else not captured.err
        )
