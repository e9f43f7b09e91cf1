"""Contracts of train_step.py: it learns, accumulates, resumes and saves, from the command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import generate
import train_step as S
from bench.dense import Dense, active_parameters, dense_loss
from checkpoint import load, open_folder, save
from compile_config import PRESETS, CompileConfig, compile_train_step
from model import Aux, ModelArgs, Transformer
from parallel import Ranks
from testing import randomize, small
from tokenizer import load_tokenizer
from tools import torch_private
from tools.compile_cache import JOURNAL
from tools.compile_count import CompileCount
from training import dataset as D
from training import resume
from training.flags import ROOT
from training.losses import LossWeights
from training.optim import Optimizer
from training.resume import Checkpoints
from training.stages import learning_rate

TEXT = (ROOT / "data" / "shakespeare.txt").read_text()


def test_the_rate_warms_up_and_decays():
    rates = [learning_rate(i, 200, 1.0) for i in range(200)]
    assert (
        rates[0] == 0.1
        and rates[9] == 1 == rates[100]
        and abs(rates[150] - 0.55) < 0.02
        and 0.1 <= rates[-1] < 0.101
    )
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def bytes_of(text: str) -> np.ndarray:
    return np.concatenate(list(D.tokenize(text, load_tokenizer(D.BYTES))))


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_200_steps_learn_more_than_a_dense_transformer(seed):
    """The debug model on bytes, against a plain dense transformer of its active size."""
    dim = 64
    layers = 4
    active = active_parameters(Transformer(ModelArgs.debug()))
    inter = -(-(active - 256 * dim - dim * (1 + layers * (2 + 4 * dim))) // (3 * dim * layers))
    rows, losses = D.Rows(bytes_of(TEXT[:1_000_000]), 96, 0, seed), {}
    for name, build, loss in (
        ("ours", lambda: Transformer(ModelArgs.debug()), None),
        ("dense", lambda: Dense(256, dim, layers, 4, inter), dense_loss),
    ):
        torch.manual_seed(seed)
        model, found = build(), []
        step = compile_train_step(model, Optimizer(model, clip=1.0), PRESETS["eager"], loss)
        S.train(
            step,
            rows,
            torch.device("cpu"),
            steps=200,
            batch=4,
            rate=lambda i: learning_rate(i, 200, 6e-3),
            every=1,
            log=lambda metrics: found.append(metrics["loss"]),
        )
        losses[name] = np.mean(found[-20:])
    assert losses["ours"] < losses["dense"] < 3.0, losses


def test_one_batch_can_be_learnt_by_heart():
    torch.manual_seed(0)
    model = Transformer(ModelArgs.debug())
    step = compile_train_step(model, Optimizer(model, decay=0.0), PRESETS["eager"])
    batch = D.Rows(bytes_of(TEXT[:20_000]), 64, 0, 0)(range(2))
    for i in range(150):
        metrics = step(*batch, torch.tensor(learning_rate(i, 150, 1e-2)))
        if metrics["loss"] < 0.05:
            return
    assert metrics["loss"] < 0.05


def test_accumulated_gradients_are_those_of_the_whole_step():
    """Rows in parts of two, the last of one; their documents and valid targets differ."""
    rows = D.Rows(bytes_of(TEXT[:100_000] + D.GAP + TEXT[200_000:203_000]), 64, 0, 0)
    tokens, targets, docs = rows(range(5))
    targets[0, :40], targets[4, 3] = -1, -1
    found = []
    for micro_batch in (None, 2):
        model = randomize(Transformer(ModelArgs.debug()), seed=1)
        step = compile_train_step(
            model, Optimizer(model, "adamw", eps=1e-3), PRESETS["eager"], micro_batch=micro_batch
        )
        metrics = step(tokens, targets, docs, torch.tensor(1e-2))
        found.append((metrics, [p.detach() for p in model.parameters()]))
    (whole, p), (parts, q) = found
    assert whole.keys() == parts.keys() == {"loss", "mtp_loss", "balance", "grad_norm"}
    assert all(abs(float(whole[key] / parts[key]) - 1) < 1e-5 for key in whole)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(p, q, strict=True))


def test_held_out_loss_scores_every_token_of_whole_rows():
    model = randomize(Transformer(ModelArgs.debug()), seed=1)
    ids = np.random.default_rng(0).integers(2, 256, 5 * 33 + 9).astype(np.uint32)
    got = S.held_out_loss(model, ids, length=32, batch=2, bos=0)
    rows = torch.from_numpy(ids[: 5 * 33].astype(np.int64)).view(5, 33)
    expected = torch.nn.functional.cross_entropy(
        model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
    )
    assert abs(got - expected.item()) < 1e-5 and model.training


COMMAND = ["--steps", "4", "--batch", "2", "--seq-len", "48", "--compile", "eager"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with text.txt, 60 kB."""
    (tmp_path / "text.txt").write_text(TEXT[:60_000])
    return tmp_path


def command(folder: Path, *more: str) -> list[str]:
    return [*COMMAND, "--data", str(folder / "text.txt"), "--cache", str(folder / "cache"), *more]


def test_layers_compiled_for_training_do_not_meet_the_evaluation(capsys, monkeypatch, folder):
    """The last batch of the evaluation is smaller: nothing is recompiled for it."""
    monkeypatch.setitem(PRESETS, "regional", CompileConfig(backend="eager", region="layer"))
    torch._dynamo.reset()
    count = CompileCount()
    assert S.main(command(folder, "--compile", "regional", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["held_out_loss"] > 0
    assert (
        count.graphs == 5 + 5
    )  # four kinds of layers and the MTP block; targets, two starts, losses, optimizer


def test_the_command_line_trains_saves_and_reports(capsys, folder):
    places = ["--out", str(folder / "out"), "--plot", str(folder / "loss.png")]
    places += ["--metrics", str(folder / "metrics.jsonl")]
    assert S.main(command(folder, *places, "--qat", "fp4", "--json")) == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert report["steps"] == 4 and report["tokens"] == 4 * 2 * 48
    assert 3 < report["held_out_nats_per_char"] < 7 and report["memory_bytes"] > 0
    assert report["sample"].startswith("KING RICHARD.")
    assert report["sample"].splitlines()[-1] in err
    assert "% of peak" in err and "min left" in err
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 4] and lines[-1]["loss"] == report["loss"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load(folder / "out", dtype=torch.float32).args.act_quant
    assert not list(folder.glob("*.tmp"))


def test_a_saved_model_of_bytes_continues_text(capsys, folder):
    """--out and --checkpoints carry what generate.py needs."""
    places = ["--out", str(folder / "out"), "--checkpoints", str(folder / "run")]
    assert S.main(command(folder, *places)) == 0
    for saved in (folder / "out", folder / "run" / "step-000004"):
        capsys.readouterr()
        argv = ["--checkpoint", str(saved), "--no-compile", "--prompt", "naïve", "--ignore-eos"]
        assert generate.main([*argv, "--max-new-tokens", "3", "--json"]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert report["prompt_tokens"] == 1 + len("naïve".encode())
        assert len(report["tokens"]) == 3 and isinstance(report["text"], str)


def checkpoints_in(folder: str | Path, keep: int = 3) -> Checkpoints:
    return Checkpoints(str(folder), keep, Ranks("cpu", 1))


def test_a_saved_state_can_be_read_by_every_version(folder):
    """Names of the tensors and of the metadata, which runs saved long ago rely on."""
    assert S.main(command(folder, "--steps", "1", "--checkpoints", str(folder / "run"))) == 0
    with safe_open(folder / "run" / "step-000001" / "state.safetensors", "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert metadata["step"] == "1" and set(json.loads(metadata["facts"])) == {
        *("config", "data", "batch", "seq_len", "seed", "optimizer", "dtype", "qat"),
        *("index_warmup", "index_loss"),
    }
    assert {"optimizer.count", "weight.embed.weight", "weight.layers.0.ffn.gate.tid2eid"} <= names
    assert {"optimizer.embed.weight.first", "optimizer.embed.weight.second"} <= names
    assert "optimizer.layers.1.ffn.experts.w13.first" in names
    assert all(name.startswith(("weight.", "optimizer.")) for name in names)


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"step-{step:06d}" / "state.safetensors")


@pytest.mark.parametrize(
    "more",
    (
        (),
        ("--dtype", "bfloat16", "--optimizer", "adamw"),
        ("--index-warmup", "2", "--index-loss", "1"),
    ),
)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(capsys, folder, more):
    """Also across the end of the indexers' warm-up, after step 2, and within it."""
    total = 4 + 2 * ("--index-warmup" in more)
    whole, parts = folder / "whole", folder / "parts"
    assert S.main(command(folder, "--checkpoints", str(whole), *more)) == 0
    for stop in range(1, total + 1):
        argv = command(folder, "--checkpoints", str(parts), "--stop-after", str(stop), *more)
        assert S.main(argv) == 0
    assert capsys.readouterr().out.count("going on from") == total - 1
    a, b = state_of(whole, total), state_of(parts, total)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    model = f"step-{total:06d}/model.safetensors"
    assert (whole / model).read_bytes() == (parts / model).read_bytes()

    def read_metrics(path: Path) -> list[dict]:
        lines = (path / "metrics.jsonl").read_text().splitlines()
        return [{key: json.loads(line)[key] for key in ("step", "loss", "lr")} for line in lines]

    expected, found = read_metrics(whole), read_metrics(parts)
    assert [line for line in found if line in expected] == expected and len(found) == total
    assert load(parts / f"step-{total:06d}").args.n_layers == 4  # the released layout


def test_the_newest_checkpoints_are_kept(folder):
    kept = folder / "kept"
    assert (
        S.main(command(folder, "--checkpoints", str(kept), "--save-every", "1", "--keep", "2")) == 0
    )
    assert sorted(path.name for path in kept.iterdir()) == [
        "metrics.jsonl",
        "step-000003",
        "step-000004",
    ]


class Killed(BaseException):
    """Ends the program as a kill does: no `except` and no `finally` of it touches files."""


@pytest.mark.parametrize("keep", (1, 2))
def test_a_save_that_is_killed_anywhere_leaves_what_was_saved(tmp_path, monkeypatch, keep):
    """At every one of its changes to the disk, deletions half done."""
    torch.manual_seed(0)
    model = Transformer(small(n_layers=1, n_hash_layers=0, compress_ratios=(0, 0)))
    run_config = {"a": 1}
    optimizer, saved = Optimizer(model), checkpoints_in(tmp_path / "run", keep)
    left, dead = -1, False  # calls until the kill, and whether it has come

    def dying(function, dies):
        def call(*args, **kw):
            nonlocal left, dead
            left -= 1
            dead = dead or left == 0
            if dead:
                if left == 0:
                    dies(*args)
                raise Killed
            return function(*args, **kw)

        return call

    for step in (1, 2):
        saved.save(model, optimizer, step, run_config)
    remove, write = shutil.rmtree, resume.save_file
    monkeypatch.setattr(
        shutil, "rmtree", dying(remove, lambda path, *rest: next(Path(path).iterdir()).unlink())
    )
    monkeypatch.setattr(
        resume,
        "save_file",
        dying(write, lambda tensors, path, *rest: Path(path).write_bytes(b"torn")),
    )
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, dying(getattr(os, name), lambda *args: None))
    for calls in range(1, 100):
        newest = saved.steps()[-1]
        left = calls
        dead = False
        with contextlib.suppress(Killed):
            saved.save(model, optimizer, newest + 1, run_config)
        found = saved.steps()
        assert found[-1] in (newest, newest + 1) and len(found) >= keep
        for step in found:
            assert load(saved.path(step), dtype=torch.float32).args.n_layers == 1 and state_of(
                saved.folder, step
            )
        left, alive = -1, not dead
        dead = False
        if alive:
            break
    assert 5 < calls < 99 and not list(
        saved.folder.glob(".step-*")
    )  # a save that ends well leaves nothing else
    assert (
        saved.load(model, optimizer, run_config) == saved.steps()[-1] and len(saved.steps()) == keep
    )


SCRIPT = """
import sys, train_step as S
from training import stages
before = stages.learning_rate
stages.learning_rate = lambda i, *rest: (print("STEP", i, flush=True), before(i, *rest))[1]
sys.exit(S.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="torch has huge pages on Linux only")
@pytest.mark.parametrize("wish, pages", ((None, True), ("0", False)))
def test_command_lines_ask_for_huge_pages_unless_told_otherwise(wish, pages):
    """Torch reads the wish when it first allocates, and lets such memory begin with a page."""
    script = (
        "import generate, train_step, torch; from tools import cli; "
        "cli.main('', lambda _: print(torch.empty(1 << 20).data_ptr() % 4096), None)"
    )
    env = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"} | (
        {"THP_MEM_ALLOC_ENABLE": wish} if wish else {}
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert (int(out) == 0) == pages


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM, signal.SIGKILL))
def test_an_interrupted_run_saves_and_a_killed_one_loses_nothing_saved(folder, number):
    """Stopped at its third step, with a save after each; a run goes on from the checkpoint."""
    argv = command(
        folder, "--checkpoints", str(folder / "run"), "--save-every", "1", "--steps", "500"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        for line in run.stdout:
            if line.startswith("STEP 3"):
                run.send_signal(number)
                break
        rest = run.stdout.read()
    saved = checkpoints_in(folder / "run")
    assert 3 <= saved.steps()[-1] < 500
    if number == signal.SIGKILL:
        assert run.returncode == -number
    else:
        assert run.returncode == 130 and f"saved {saved.path(saved.steps()[-1])}" in rest
    last = saved.steps()[-1]
    assert S.main([*argv, "--stop-after", str(last + 1)]) == 0
    assert saved.steps()[-1] == last + 1 and not list((folder / "run").glob(".step-*"))


def interrupt_when_logging(monkeypatch) -> None:
    """Ctrl-C at the first line of metrics."""
    log = S.MetricsLog.__call__

    def interrupted(self, metrics):
        log(self, metrics)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(S.MetricsLog, "__call__", interrupted)


def test_a_run_without_checkpoints_is_saved_when_interrupted(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    interrupt_when_logging(monkeypatch)
    for name in ("interrupted", "interrupted-2"):  # another run's state is not mixed with it
        assert S.main(command(folder)) == 130
        assert f"{name}/step-000001" in capsys.readouterr().out
        assert checkpoints_in("interrupted").steps() == [1]


def test_a_signal_that_ends_the_compiler_too_is_an_interruption(folder, monkeypatch, capsys):
    """No traceback, checkpoints stay, and no torn library counts as compiled.

    A terminal sends its signal to the whole process group.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    (torn := folder / "inductor" / "ab" / "torn.so").parent.mkdir(parents=True)
    argv = command(
        folder, "--index-warmup", "2", "--checkpoints", str(folder / "run"), "--save-every", "100"
    )
    make, stages = S.compile_train_step, []

    def compiled(*args, **kw):
        def fail(*batch):
            with JOURNAL.compiling():
                torn.touch()
                signal.raise_signal(signal.SIGTERM)
                raise RuntimeError("C++ compile error")

        stages.append(len(stages))
        return fail if stages[1:] else make(*args, **kw)

    monkeypatch.setattr(S, "compile_train_step", compiled)
    assert S.main(argv) == 130
    assert "Traceback" not in capsys.readouterr().err
    assert checkpoints_in(folder / "run").steps() == [2]
    assert not torn.exists()
    monkeypatch.setattr(
        S, "compile_train_step", lambda *args, **kw: lambda *batch: torch.ones(2) @ torch.ones(3)
    )
    with pytest.raises(
        RuntimeError, match="size"
    ):  # without a signal it is an error like any other
        S.main(argv)


def test_a_finished_run_still_gives_its_model(folder):
    """When --out is added after the last step, or the run was interrupted at it."""
    argv = command(folder, "--checkpoints", str(folder / "run"))
    assert S.main(argv) == 0
    assert S.main([*argv, "--out", str(folder / "out")]) == 0
    ours, theirs = (
        load(path).state_dict() for path in (folder / "out", folder / "run" / "step-000004")
    )
    assert all(torch.equal(t, theirs[name]) for name, t in ours.items())


@pytest.mark.parametrize("interrupted", (False, True))
def test_a_full_disk_is_said_in_one_line(folder, monkeypatch, capsys, interrupted):
    def full(*args):
        raise resume.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(resume, "save_file", full)
    if interrupted:
        interrupt_when_logging(monkeypatch)
    assert S.main(command(folder, "--checkpoints", str(folder / "run"))) == 2
    error = capsys.readouterr().err
    assert (
        "No space left" in error
        and len(error.strip().splitlines()) == 1
        and not list((folder / "run").glob("*step-*"))
    )


@pytest.mark.parametrize("where", ("held_out_loss", "save"))
def test_what_was_trained_is_saved_before_it_is_judged(folder, monkeypatch, capsys, where):
    """Interrupted when training has ended, a run still saves --out."""
    owner = S.Ranks if where == "save" else S
    function = getattr(owner, where)

    def interrupted(*args, **kw):
        signal.raise_signal(signal.SIGINT)
        return function(*args, **kw)

    monkeypatch.setattr(owner, where, interrupted)
    ignored = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # where tests run in the background, it is ignored
    try:
        assert S.main(command(folder, "--out", str(folder / "out"))) == 130
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert "saved" in capsys.readouterr().out and load(folder / "out").args.n_layers == 4


@pytest.mark.parametrize("key", ("loss", "grad_norm"))
def test_what_is_not_finite_is_never_saved(folder, monkeypatch, capsys, key):
    make = S.compile_train_step

    def diverging(*args, **kw):
        step, done = make(*args, **kw), []
        return lambda *inputs: (
            step(*inputs)
            | ({key: torch.tensor(float("nan"))} if (done.append(1), len(done) == 3)[1] else {})
        )

    monkeypatch.setattr(S, "compile_train_step", diverging)
    assert (
        S.main(
            command(
                folder, "--checkpoints", str(folder / "run"), "--save-every", "1", "--steps", "30"
            )
        )
        == 2
    )
    assert f"the {key} is nan at step 3: choose a lower --lr" in capsys.readouterr().err
    assert checkpoints_in(folder / "run").steps() == [1, 2]


def test_a_gpu_that_is_too_small_is_told_the_remedy(folder, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError("a page of numbers\nand another")

    monkeypatch.setattr(S, "compile_train_step", lambda *args, **kw: full)
    assert S.main(command(folder)) == 2
    error = capsys.readouterr().err
    assert "--micro-batch" in error and len(error.strip().splitlines()) == 1


def test_flags_reach_what_they_are_about(folder, monkeypatch):
    """What the command line gives to the optimizer and the step, in both stages of a run."""
    optimizers = []
    steps = []
    make = S.compile_train_step

    def optimizer(ranks, model, *args, **kw):
        optimizers.append((*args, kw))
        return Optimizer(model, *args, **kw)

    monkeypatch.setattr(S.Ranks, "optimizer", optimizer)

    def compile_train_step(model, optimizer, cfg, **options):
        steps.append((model.args.expert_qat, cfg, options))
        return make(model, optimizer, cfg, **options)

    monkeypatch.setattr(S, "compile_train_step", compile_train_step)
    flags = "--optimizer adamw --clip 0.25 --micro-batch 1 --recompute full --qat fp8 "
    flags += "--index-warmup 1 --index-loss 0.5 --steps 1"
    assert S.main(command(folder, *flags.split())) == 0
    assert optimizers == [("adamw", {"clip": 0.25})] * 2
    for dense, (qat, cfg, options) in zip((True, False), steps, strict=True):
        assert qat == "fp8" and cfg == PRESETS["eager"]
        assert options["weights"] == LossWeights(mtp=0.3, balance=1e-4, index=0.5)
        assert options["aux"] == Aux(index_loss=True, dense=dense)
        assert options["micro_batch"] == 1 and options["recompute"] == "full"


def test_a_step_moves_router_biases_by_their_rate():
    model = Transformer(small())
    biases = [
        layer.ffn.gate.bias
        for layer in (*model.layers, *model.mtp)
        if layer.ffn.gate.bias is not None
    ]
    tokens = torch.randint(256, (2, 40))
    compile_train_step(model, Optimizer(model), PRESETS["eager"])(
        tokens, tokens.roll(-1, 1), torch.zeros_like(tokens), torch.tensor(1e-3)
    )
    assert biases and all((bias.abs() - 1e-3 < 1e-9).all() and bias.any() for bias in biases)


def test_a_model_that_reads_bytes_is_trained_on(folder):
    assert S.main(command(folder, "--out", str(folder / "one"))) == 0
    assert S.main(command(folder, "--init", str(folder / "one"), "--out", str(folder / "two"))) == 0


def test_a_torn_line_of_metrics_is_left_out_and_a_foreign_one_refused(folder, capsys):
    run = folder / "run"
    argv = command(folder, "--checkpoints", str(run), "--stop-after")
    assert S.main([*argv, "1"]) == 0
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + whole[:10])
    assert S.main([*argv, "2"]) == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]
    for line in ('{"a": 1}', "[1]", "what", '{"step": "x"}'):
        metrics.write_text(content := whole + line + "\n" + whole)
        assert S.main([*argv, "3"]) == 2
        error = capsys.readouterr().err
        assert (
            f"{metrics}: line 2" in error
            and len(error.strip().splitlines()) == 1
            and metrics.read_text() == content
        )
    assert S.main([*argv, "3", "--batch", "4"]) == 2
    assert (
        "batch 2, not 4" in capsys.readouterr().err and metrics.read_text() == content
    )  # a refused run changes nothing


LAUNCHER = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("left", [*LAUNCHER, "all but the port"])
def test_variables_left_by_another_launcher_start_no_group_and_silence_nothing(
    folder, monkeypatch, capsys, left
):
    for name in LAUNCHER if left not in LAUNCHER else [left]:
        monkeypatch.setenv(name, "1" if name == "RANK" else LAUNCHER[name])
    assert S.main(command(folder, "--steps", "1")) == 0
    assert "step 1/1" in capsys.readouterr().out
    assert S.main(["--batch", "no"]) == 2
    assert "--batch" in capsys.readouterr().err


def test_a_launcher_need_not_say_how_many_processes_a_machine_has(folder, monkeypatch, capsys):
    """As srun does; torchrun says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {**LAUNCHER, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    assert S.main(command(folder, "--steps", "1")) == 0
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert S.main(command(folder)) == 2
    assert "WORLD_SIZE='two'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, value",
    (("RANK", "abc"), ("RANK", "1"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", ""), ("MASTER_PORT", "x")),
)
def test_a_launchers_numbers_are_checked(folder, monkeypatch, capsys, name, value):
    """One line that names the variable, not silence, no hanging."""
    for key, usual in {**LAUNCHER, "MASTER_PORT": "1", name: value}.items():
        monkeypatch.setenv(key, usual)
    assert S.main(command(folder)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line


def test_two_runs_do_not_save_in_one_folder(folder, capsys):
    run = str(folder / "run")
    with resume.exclusive(run):
        assert S.main(command(folder, "--checkpoints", run)) == 2
        assert "run: another run saves here" in capsys.readouterr().err
        assert os.listdir(run) == [".lock"]
    assert not os.path.exists(run)
    for steps in ("2", "4"):
        assert S.main(command(folder, "--steps", steps, "--checkpoints", run)) == 0
    assert checkpoints_in(run).steps() == [2, 4] and ".lock" not in os.listdir(run)


def test_of_runs_that_come_and_go_one_at_a_time_saves_in_a_folder(tmp_path):
    """Also where one takes the lock's file that another is about to delete."""
    run, within, most, entered = str(tmp_path / "run"), 0, 0, 0

    def come_and_go(_):
        nonlocal within, most, entered
        for _ in range(300):
            with contextlib.suppress(ValueError), resume.exclusive(run):
                within += 1
                entered += 1
                time.sleep(0)
                most = max(most, within)
                within -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(8)))
    assert most == 1 < entered and not os.path.exists(run)


def test_metrics_follow_a_link(folder):
    (folder / "link").symlink_to(folder / "target")
    assert S.main(command(folder, "--steps", "1", "--metrics", str(folder / "link"))) == 0
    assert (folder / "link").is_symlink() and json.loads((folder / "target").read_text())[
        "step"
    ] == 1


def test_only_what_is_written_must_be_writable(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != Path.cwd())
    elsewhere = ["--cache", str(tmp_path / "cache")]
    assert S.parse(elsewhere).out is None
    with pytest.raises(ValueError, match="--out out: may not be written to"):
        S.parse([*elsewhere, "--out", "out"])
    with pytest.raises(ValueError, match="--cache here: may not be written to"):
        S.parse(["--cache", "here"])


@pytest.mark.parametrize("more", ((), ("--checkpoints", "{}/run")))
def test_without_a_compiler_it_trains_eagerly_and_says_so(folder, monkeypatch, capsys, more):
    """Another process finds out; a preset that was asked for is refused."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    monkeypatch.setenv("CXX", "false")
    argv = [a for a in command(folder, "--steps", "1") if a not in ("--compile", "eager")]
    assert S.main([*argv, *(text.format(folder) for text in more)]) == 0
    assert capsys.readouterr().err.count("a C++ compiler") == 1
    monkeypatch.setattr(torch_private, "missing_cpu_toolchain", lambda: "a C++ compiler")
    assert S.main([*argv, "--compile", "regional"]) == 2
    assert "a C++ compiler" in capsys.readouterr().err


def test_a_compiled_run_resumes_to_the_bit(folder, capsys, monkeypatch):
    """Preset auto waits for compiled code, so that all steps are compiled ones; on two threads,
    whose sums have no order of their own.
    """
    threads = torch.get_num_threads()
    monkeypatch.setattr(S, "choose_threads", lambda size: torch.set_num_threads(2))
    layer = dict(n_layers=1, n_hash_layers=0, compress_ratios=(4,), n_mtp_layers=0)
    (folder / "config.json").write_text(json.dumps(small(**layer).to_hf()))
    more = ["--config", str(folder / "config.json"), "--compile", "auto"]
    for name, stops in (("whole", (4,)), ("parts", (1, 3, 4))):
        for stop in stops:
            saved = ["--checkpoints", str(folder / name), "--stop-after", str(stop)]
            assert S.main(command(folder, *more, *saved, "--json")) == 0
            report = json.loads(capsys.readouterr().out)
            assert report["eager_steps"] == 0 < report["compiled_steps"]
    torch.set_num_threads(threads)
    assert not torch.are_deterministic_algorithms_enabled()
    a, b = state_of(folder / "whole", 4), state_of(folder / "parts", 4)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_that_is_torn_or_anothers_is_refused(folder, capsys):
    run = str(folder / "run")
    assert S.main(command(folder, "--checkpoints", run)) == 0
    for more, says in (
        (("--steps", "9", "--seed", "1"), "seed 0, not 1"),
        (("--steps", "9", "--optimizer", "adamw"), "optimizer 'muon', not 'adamw'"),
        (("--steps", "9", "--qat", "fp8"), "qat None, not 'fp8'"),
        (("--steps", "9", "--index-loss", "1"), "index_loss 0.0, not 1.0"),
        ((), "already at step 4"),
    ):
        assert S.main(command(folder, "--checkpoints", run, *more)) == 2
        assert says in capsys.readouterr().err
    state = folder / "run" / "step-000004" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    assert S.main(command(folder, "--checkpoints", run, "--steps", "9")) == 2
    error = capsys.readouterr().err
    assert "state.safetensors: cannot be read" in error and len(error.strip().splitlines()) == 1
    state.unlink()
    assert (
        S.main(command(folder, "--checkpoints", run, "--steps", "9")) == 2
        and "torchrun" in capsys.readouterr().err
    )


def test_a_released_folder_is_trained_on(capsys, folder):
    """Their weights become masters; saved are the same layout, other weights, the tokenizer."""
    tiny, out = ROOT / "assets" / "tiny", folder / "out"
    flags = "--dtype bfloat16 --steps 1 --experts fp4 --linears fp8 --json"
    assert S.main(command(folder, "--init", str(tiny), "--out", str(out), *flags.split())) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["loss"] < 5  # per token of a vocabulary of 1024: it has been trained before
    old, new = open_folder(tiny)[0], open_folder(out)[0]
    assert dict(old.tensors) == dict(new.tensors)
    name = "layers.2.attn.wq_a.weight"
    assert not torch.equal(old.get(name).view(torch.uint8), new.get(name).view(torch.uint8))
    assert (out / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("fmt", ("fp4", "fp8"))
def test_experts_are_trained_as_they_will_be_stored(tmp_path, fmt):
    """A model under --qat equals itself saved and loaded; gradients pass straight through."""
    args = small(dim=128, moe_inter_dim=64, expert_qat=fmt)
    model = randomize(Transformer(args), seed=1)
    save(model, tmp_path, experts=fmt, linears="bf16", dtype=torch.float32)
    loaded = load(tmp_path, dtype=torch.float32, act_quant=False)
    x, idx = torch.randn(7, 128), torch.arange(14).view(7, 2) % 8
    experts, weight = model.layers[0].ffn.experts, torch.rand(7, 2)
    y = experts(x, idx, weight)
    assert torch.equal(y, loaded.layers[0].ffn.experts(x, idx, weight))
    args.expert_qat = None
    assert (experts(x, idx, weight) - y).norm() > 1e-3 * y.norm()
    y.sum().backward()
    got = experts.w13.grad.clone()
    loaded.layers[0].ffn.experts.requires_grad_(True)(x, idx, weight).sum().backward()
    assert torch.allclose(got, loaded.layers[0].ffn.experts.w13.grad)


def test_flops_match_those_of_the_report():
    """Flash at 4096 and 16384 tokens: 85.6 and 88.4 GF per token, and 5.2 for MTP."""
    with torch.device("meta"):
        model = Transformer(ModelArgs.flash())
    for length, expected in ((4096, 85.6), (16384, 88.4)):
        assert abs(S.flops_per_token(model, length) / 1e9 / (expected + 5.2) - 1) < 0.02


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--data", "/nowhere.txt"], "/nowhere.txt"),
        (["--data", "EMPTY"], "no text"),
        (["--data", "SHORT"], "--seq-len"),
        (["--steps", "0"], "--steps"),
        (["--lr", "-1"], "--lr"),
        (["--clip", "0"], "--clip"),
        (["--config", "/nowhere.json"], "/nowhere.json"),
        (["--init", "/nowhere"], "/nowhere"),
        (["--compile", "cudagraphs"], "cudagraphs"),
        (["--steps", "many"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--index-loss", "-1"], "--index-loss"),
        (["--out", "/nowhere/at/all"], "--out"),
        (["--checkpoints", "/nowhere/at/all"], "--checkpoints"),
        (["--plot", "."], "--plot"),
        (["--out", "SHORT"], "--out"),
        (["--checkpoints", "SHORT"], "--checkpoints"),
        (["--seed", str(1 << 64)], "--seed"),
        (["--config", "SHORT"], "--config"),
        (["--config", "tiny", "--init", "."], "--init"),
        (["--config", "tiny", "--data", "SMALL"], "vocabulary"),
        (["--data", ""], "--data"),
        (["--metrics", "PIPE"], "device"),
        (["--metrics", "both.png", "--plot", "both.png"], "--metrics"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, argv, says):
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "SHORT").write_text("Too short.\n")
    (tmp_path / "SMALL").write_text("So few words. " * 300)
    os.mkfifo(tmp_path / "PIPE")
    argv = [str(tmp_path / a) if a in ("EMPTY", "SHORT", "SMALL", "PIPE") else a for a in argv]
    assert S.main([*argv, "--cache", str(tmp_path / "cache")]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1 and says in captured.err and not captured.out
