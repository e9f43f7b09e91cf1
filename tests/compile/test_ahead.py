"""Contracts of preset "auto": compiled ahead of time by another process, eager until then."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import compile_config as C
from generation.engine import Engine
from generation.sampling import sample_decode
from model import Transformer
from ops import cpp
from testing import random_tokens, randomize, small
from tools import ahead, ahead_compiler, ahead_worker
from tools.ahead_compiler import AheadCompiler, finish
from tools.compile_cache import WORK_PREFIX

ROOT = Path(__file__).resolve().parent.parent.parent
LAYERS = dict(n_layers=2, n_hash_layers=0, n_mtp_layers=0, compress_ratios=(4, 4))  # one kind
ROWS = (1, 4)


def build(**changes) -> Transformer:
    return randomize(Transformer(small(**LAYERS, **changes)), seed=1).eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A compile cache without anything in it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --------------------------------------------------------------------------------------------------
# Keys and the folder


def key_of(model: Transformer, width: int = 1, *rest, rows: int = 1, context: int = 64) -> str:
    model.setup_caches(rows, context)
    specs = ahead.tensor_specs(model, ("mtp.",))
    return ahead.phase_key(model, ("decode",), [torch.zeros(rows, width), *rest], specs)


def test_the_key_changes_with_all_that_code_depends_on(model, monkeypatch):
    keys = [key_of(model), key_of(model, rows=2), key_of(model, 2), key_of(model, 1, True)]
    keys.append(key_of(model, context=63))  # with caches of the same shapes
    keys.append(key_of(copy.deepcopy(model).bfloat16()))
    keys += [key_of(build(act_quant=True)), key_of(build(norm_eps=1e-5)), key_of(build(dim=96))]
    keys.append(key_of(Transformer(small(**LAYERS), ops={"rope": "opaque"}).eval()))
    with cpp.disabled("moe"):
        keys.append(key_of(model))
    monkeypatch.setattr(ahead, "cache_key", lambda: {"source": "edited"})
    keys.append(key_of(model))
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key_of(model))
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")
    keys.append(key_of(model))
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    keys.append(key_of(model))
    torch.use_deterministic_algorithms(False)
    assert len(set(keys)) == len(keys)
    assert key_of(build()) == keys[0], "the same model again"


def make(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def test_a_part_is_kept_whole_or_not_at_all(cache, tmp_path):
    ahead.keep(make(tmp_path / "a", code_so="first", code_json="{}"), "key", "part")
    ahead.keep(make(tmp_path / "b", code_so="second"), "key", "part")  # the first one stays
    folder = ahead.checked("key", "part")
    assert (folder / "code.so").read_text() == "first" and ahead.is_kept("key", "part")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def cut(file: Path) -> None:
    data = file.read_bytes()[:-1]
    file.unlink()  # a process may have it loaded
    file.write_bytes(data)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ("code.so", "code.json", "checksums.json"))
@pytest.mark.parametrize("damage", (Path.unlink, cut, flip, lambda file: file.write_bytes(b"")))
def test_a_damaged_part_is_refused_and_removed(cache, tmp_path, name, damage):
    ahead.keep(make(tmp_path / "a", code_so="library", code_json="{}"), "key", "part")
    damage(ahead.store() / "key" / "part" / name)
    with pytest.raises(ValueError, match="damaged"):
        ahead.checked("key", "part")
    assert not ahead.is_kept("key", "part")


def test_a_library_that_does_not_load_is_refused_and_removed(cache, tmp_path):
    """Its checksums are right: it is another machine's, or none."""
    ahead.keep(make(tmp_path / "a", code_so="text"), "key", "part")
    with pytest.raises(ValueError, match="does not load.*compiled anew"):
        ahead.open_library(ahead.checked("key", "part"))
    assert not ahead.is_kept("key", "part")


def test_a_file_in_the_place_of_a_part_makes_room(cache, tmp_path):
    (ahead.store() / "key").mkdir(parents=True)
    (ahead.store() / "key" / "part").write_text("foreign")
    ahead.keep(make(tmp_path / "a", code_so="library"), "key", "part")
    assert ahead.checked("key", "part").is_dir()


def test_a_library_of_kernels_is_keyed_by_its_text_and_flags(monkeypatch):
    keys = [ahead.library_key("text"), ahead.library_key("other")]
    monkeypatch.setattr(ahead, "FLAGS", ("-ffast-math",))
    assert len({*keys, ahead.library_key("text")}) == 3


@pytest.mark.parametrize("text", ("[]", "3", '{"decode": "long"}', "{"))
def test_a_foreign_record_of_seconds_is_none(cache, text):
    ahead.store().mkdir(parents=True)
    (ahead.store() / "seconds.json").write_text(text)
    assert ahead_worker.expected_seconds() == {}


def test_kernels_in_use_are_not_pruned(cache, tmp_path, monkeypatch):
    """They are of many phases; what loads them notes the use."""
    key = ahead.library_key(cpp.source("moe"))
    ahead.keep(make(tmp_path / "made", code_so="x"), key, "kernels")
    for i in range(ahead.MOST_KEPT):
        ahead.keep(make(tmp_path / "made", code_so="x"), f"{i}", "part")
    os.utime(ahead.store() / key, (0, 0))
    for kernel in cpp.kernels_of("moe"):
        monkeypatch.setattr(kernel, "built", None)
    monkeypatch.setattr(ahead, "register_library", lambda library, load: None)
    ahead.load_kernels("moe")
    ahead.prune()
    assert ahead.is_kept(key, "kernels")


def test_leftovers_of_killed_compilers_go_when_code_is_loaded(cache, tmp_path):
    left = ahead.store() / f"{WORK_PREFIX}1"
    left.mkdir(parents=True)
    (left / "lock").touch()
    ahead.keep(make(tmp_path / "a", code_so="x"), "key", "part")
    ahead.load("key", ["part"], [])
    assert not left.exists()


def test_only_the_phases_used_last_are_kept(cache, tmp_path):
    for i in range(ahead.MOST_KEPT + 3):
        ahead.keep(make(tmp_path / "made", code_so="x"), f"{i}", "part")
        os.utime(ahead.store() / f"{i}", (i, i))
    ahead.prune()
    kept = {path.name for path in ahead.store().iterdir()}
    assert kept == {f"{i}" for i in range(3, ahead.MOST_KEPT + 3)}


# --------------------------------------------------------------------------------------------------
# Without a compiler that works


class Broken(AheadCompiler):
    """Starts a program that is no compiler."""

    def __init__(self, script: str):
        super().__init__()
        self.script = script

    def _start(self):
        popen = subprocess.Popen

        def other(command, **options):
            return popen([sys.executable, "-c", self.script], **options)

        ahead_compiler.subprocess.Popen = other
        try:
            super()._start()
        finally:
            ahead_compiler.subprocess.Popen = popen


def tokens_of(engine: Engine, rows: int, **changes) -> list[list[int]]:
    """Continuations of prompts of different lengths."""
    prompts = [random_tokens(5 + 3 * row, seed=row).tolist() for row in range(rows)]
    found = [[] for _ in prompts]
    for row, token in engine.stream(prompts, **{"max_new_tokens": 12, **changes}):
        found[row].append(token)
    return found


def engine_of(model: Transformer, config="auto", rows: int = 1) -> Engine:
    return Engine(copy.deepcopy(model), config, max_batch_size=rows, max_seq_len=64)


@pytest.mark.parametrize(
    "script, says",
    (
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ('print(\'{"error": "it lacks g++"}\'); exit(1)', "it lacks g++"),
    ),
)
def test_text_comes_eagerly_when_the_compiler_fails(model, cache, script, says):
    engine, eager = engine_of(model), engine_of(model, "eager")
    compiler = engine._decode_phase.compiler = engine._prefill_phase.compiler = Broken(script)
    assert tokens_of(engine, 1) == tokens_of(eager, 1)
    compiler.wait()
    assert says in compiler.error and not compiler.busy
    assert engine.stats["eager_tokens"] == 12 and engine.stats["switched_at"] is None


def test_a_model_that_is_not_that_of_model_py_runs_eagerly(model, cache):
    class Other(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight = norm.weight

        def forward(self, x):
            return 2 * torch.nn.functional.rms_norm(x, (len(self.weight),), self.weight)

    other = copy.deepcopy(model)
    other.norm = Other(other.norm)
    engine = engine_of(other)
    assert tokens_of(engine, 1) == tokens_of(engine_of(other, "eager"), 1)
    engine.compiler.wait()
    assert "model.py" in engine.compiler.error


def foreign(logits, *rest):
    """An epilogue whose source the key does not cover."""
    return logits


def test_what_another_process_cannot_know_is_compiled_in_this_one(model):
    hooked, auto = copy.deepcopy(model), C.AUTO
    phase = C.compile_decode(hooked, auto)
    assert phase.compiles_ahead
    nameless = eval(compile("lambda logits, *rest: logits", str(ROOT / "model.py"), "eval"))
    for epilogue in (foreign, nameless, torch.argmax):
        assert not C.compile_decode(hooked, auto, epilogue).compiles_ahead
    assert C.compile_decode(hooked, auto, sample_decode).compiles_ahead
    hooked.layers[0].register_forward_hook(lambda module, args, output: output)
    assert not phase.compiles_ahead


# --------------------------------------------------------------------------------------------------
# The end of a run


class FakeCompiler:
    """Stands for AheadCompiler."""

    error, waited = None, 0

    def __init__(self, busy: bool = True, interrupt: bool = False):
        self.busy, self.interrupt = busy, interrupt
        self.all_cores = self.stopped = False

    def use_all_cores(self):
        self.all_cores = True

    def seconds_left(self):
        return 41.4

    def wait(self, tick=None):
        if self.interrupt:
            raise KeyboardInterrupt
        self.waited += 1

    def stop(self):
        self.stopped = True


def test_the_end_waits_for_the_compiler_and_says_so(capsys):
    finish(compiler := FakeCompiler(), no_wait=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert "41 s" in line and compiler.waited and compiler.all_cores and compiler.stopped


@pytest.mark.parametrize("options, no_wait", ((dict(), True), (dict(busy=False), False)))
def test_nothing_is_waited_for(capsys, options, no_wait):
    finish(compiler := FakeCompiler(**options), no_wait)
    assert not compiler.waited and compiler.stopped and not capsys.readouterr().err


def test_an_interrupt_of_the_wait_is_no_error():
    finish(compiler := FakeCompiler(interrupt=True), no_wait=False)
    assert compiler.stopped


# --------------------------------------------------------------------------------------------------
# The compiling process, with tasks that compile nothing

TASKS = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from tools import ahead_worker as w

def make(folder: Path) -> None:
    (folder / "code.so").write_text("x")

def sleep(folder: Path) -> None:
    time.sleep(600)

def fail(folder: Path) -> None:
    raise ValueError("no such thing")

build = dict(make=make, sleep=sleep, fail=fail)[sys.argv[1]]
jobs = [SimpleNamespace(key=key, libraries=[], parts=["1", "2"]) for key in "ab"]
tasks = [w.Task(job.key + part, job.key, part, build) for job in jobs for part in job.parts]
w.missing_cpu_toolchain, w.import_inductor = lambda folder: None, lambda: None
w.pickle = SimpleNamespace(load=lambda file: jobs)
w.os.sched_getaffinity = lambda process: range(4)
for job in jobs:
    job.source, job.threads, job.deterministic = w.cache_key()["source"], 1, False
w.tasks_of = lambda job: [task for task in tasks if task.key == job.key]
sys.exit(w.main(w.os.open("/dev/null", 0)))
"""


@contextlib.contextmanager
def worker(name: str):
    """The compiling process with tasks of one kind; killed if a test fails while it runs."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", TASKS, name]
    options = dict(cwd=ROOT, stdin=pipe, stdout=pipe, text=True, start_new_session=True)
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
            process.stdin.close()
            process.wait(100)
        except BaseException:
            os.killpg(process.pid, 9)
            raise


def left() -> list[Path]:
    return list(ahead.store().glob(f"{WORK_PREFIX}*"))


def test_a_phase_is_ready_when_its_parts_are_not_when_all_are(cache):
    with worker("make") as process:
        events = [json.loads(line) for line in process.stdout]
    said = [f"{key} {value}" for event in events for key, value in event.items()]
    assert said.index("ready a") < said.index("done b2") < said.index("ready b")
    assert said.index("done a1") < said.index("ready a") and process.returncode == 0
    assert ahead.is_kept("b", "2") and not left()


def test_a_core_is_left_free_until_all_are_offered(cache):
    """Of four: three parts at once, then the fourth."""
    with worker("sleep") as process:
        begun = [json.loads(process.stdout.readline()) for _ in range(1 + 3)]
        assert [event.get("begun") for event in begun[1:]] == ["a1", "a2", "b1"]
        assert not select.select([process.stdout], [], [], 1.0)[0]
        process.stdin.write("all cores\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"begun": "b2"}


def test_a_part_that_does_not_compile_is_said_in_one_line(cache):
    with worker("fail") as process:
        events = [json.loads(line) for line in process.stdout]
    assert events[-1] == {"error": "a1: ValueError: no such thing"} and process.returncode == 1
    assert not ahead.is_kept("a", "1") and not left()


@pytest.mark.parametrize("end", ("its input ends", "it is killed"))
def test_the_compiling_process_leaves_no_process_and_no_file(cache, end):
    """Killed, it leaves a folder to the next one."""
    with worker("sleep") as process:
        while "begun" not in process.stdout.readline():
            pass
        process.stdin.close() if end == "its input ends" else process.kill()
        process.wait(100)
    for _ in range(100):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
            continue
        break
    else:
        raise AssertionError("a process of its group still lives")
    if end == "it is killed":
        with worker("make") as process:
            process.stdout.read()
    assert not left()


# --------------------------------------------------------------------------------------------------
# Compiled code


@pytest.fixture(scope="module")
def compiled(model):
    """Both phases for both batches, in the folder of the tests' compile cache."""
    compiler = AheadCompiler()
    for rows in ROWS:
        engine = engine_of(model, rows=rows)
        engine._decode_phase.compiler = engine._prefill_phase.compiler = compiler
        tokens_of(engine, rows, max_new_tokens=1)
    compiler.use_all_cores()
    compiler.wait()
    assert compiler.error is None


class Late(AheadCompiler):
    """Says after n questions that a phase is ready."""

    def __init__(self, n: int):
        super().__init__()
        self.questions = n

    def request(self, job):
        pass

    def is_ready(self, key):
        self.questions -= 1
        return self.questions < 0


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("temperature", (0.0, 0.9))
def test_tokens_do_not_depend_on_when_compiled_code_takes_over(
    model, compiled, monkeypatch, rows, temperature
):
    sampling = dict(temperature=temperature, seed=7)
    expected = tokens_of(engine_of(model, "eager", rows), rows, **sampling)
    all_compiled = engine_of(model, rows=rows)
    assert tokens_of(all_compiled, rows, **sampling) == expected
    assert all_compiled.stats["compiled_tokens"] == 12 * rows
    monkeypatch.setattr(ahead, "missing", lambda *args: True)
    rng = random.Random(rows)
    for _ in range(20):
        engine = engine_of(model, rows=rows)
        late = Late(rng.randrange(13))
        engine._decode_phase.compiler = engine._prefill_phase.compiler = late
        assert tokens_of(engine, rows, **sampling) == expected
        stats = engine.stats
        assert stats["eager_tokens"] + stats["compiled_tokens"] == 12 * rows
        assert (stats["switched_at"] is not None) == (0 < stats["eager_tokens"] < 12 * rows)


SCRIPT = """
import sys, json
sys.path[:0] = [{root!r}, {root!r} + "/tests", {root!r} + "/tests/compile"]
for name in ("torch._dynamo", "torch._inductor"):
    sys.modules[name] = None  # importing it fails
import torch
torch.set_num_threads({threads})
from test_ahead import build, engine_of, tokens_of
engine = engine_of(build(), rows=4)
tokens = tokens_of(engine, 4)
print(json.dumps([tokens, engine.stats]))
"""


def test_a_precompiled_process_compiles_nothing(model, compiled):
    """Not even the import of the compiler is possible in it."""
    script = SCRIPT.format(root=str(ROOT), threads=torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tokens, stats = json.loads(done.stdout.splitlines()[-1])
    assert tokens == tokens_of(engine_of(model, "eager", 4), 4)
    assert stats["compiled_tokens"] == 48 and stats["compile_s"] == stats["breaks"] == 0
    # prefill and decode: embedding, one kind of layer, head
    assert stats["graphs"] == stats["graphs_loaded"] == 2 * 3 and stats["recompiles"] == 0


def test_a_damaged_library_is_said_in_one_line_and_made_anew(model, compiled, capsys, monkeypatch):
    engine = engine_of(model)
    tokens_of(engine, 1)
    (run,) = engine._decode_phase.built.values()
    assert run.compiled
    folder = ahead.store() / run.job.key / "head"
    before = (folder / ahead.CODE).read_bytes()
    cut(folder / ahead.CODE)
    engine = engine_of(model)
    assert tokens_of(engine, 1) == tokens_of(engine_of(model, "eager"), 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "damaged" in line and "head" in line
    engine.compiler.wait()
    assert engine.compiler.error is None
    assert len((folder / ahead.CODE).read_bytes()) == len(before)
    assert tokens_of(engine, 1, seed=1) and engine.stats["compiled_tokens"] == 12
    assert engine.stats["compile_s"] == engine.compiler.seconds > 1


def test_inputs_are_of_the_shapes_that_code_was_compiled_for(model, compiled):
    """AOTInductor's own checks, in a process where they are on."""
    script = SCRIPT.format(root=str(ROOT), threads=torch.get_num_threads())
    env = os.environ | {"AOTI_RUNTIME_CHECK_INPUTS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
