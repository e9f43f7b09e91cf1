"""The command lines and their standard streams: readers that leave, streams that are closed,
terminals that lack characters, memory that runs out.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import cli

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = "train_step.py --steps 6 --batch 2 --seq-len 48 --compile eager --cache {0}/c --out {0}/o"
GENERATE = "generate.py --max-new-tokens 3 --no-compile"


def shell(line: str, folder: Path, **env: str) -> subprocess.CompletedProcess:
    """A line of shell in which `python` is this one; {0} is the folder."""
    line = line.format(folder).replace("python", sys.executable)
    return subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=os.environ | env, capture_output=True, text=True
    )


def test_training_outlives_the_reader_of_its_output(tmp_path):
    done = shell(f"python {TRAIN} | head -n 1; exit ${{{{PIPESTATUS[0]}}}}", tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert f"saved {tmp_path}/o" in done.stderr.splitlines()
    assert (tmp_path / "o" / "model.safetensors").exists()


def test_training_outlives_the_reader_of_both_streams(tmp_path):
    done = shell(f"python {TRAIN} 2>&1 | head -n 1; exit ${{{{PIPESTATUS[0]}}}}", tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert (tmp_path / "o" / "model.safetensors").exists()


def test_training_outlives_output_that_cannot_be_written(tmp_path):
    done = shell(f"python {TRAIN} > /dev/full", tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert "saved" in done.stderr and (tmp_path / "o" / "model.safetensors").exists()


@pytest.mark.parametrize("streams", (">&- 2>&-", "<&- >&- 2>&-"))
@pytest.mark.parametrize("line", (TRAIN, GENERATE), ids=("train", "generate"))
def test_closed_streams_are_nothing_to_stop_for(tmp_path, line, streams):
    done = shell(f"python {line} {streams}", tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
    assert line == GENERATE or (tmp_path / "o" / "model.safetensors").exists()


def test_text_ends_with_its_reader(tmp_path):
    line = f"python {GENERATE} --max-new-tokens 100 | head -n 1; exit ${{{{PIPESTATUS[0]}}}}"
    done = shell(line, tmp_path)
    assert done.returncode == 0 and done.stdout == "KING RICHARD.\n"
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr


@pytest.mark.parametrize("encoding", ("ascii", "latin-1"))
def test_a_terminal_without_a_character_shows_another(tmp_path, encoding):
    code = "import sys; from tools import cli; cli.main('', lambda _: print('a\u2603b'), None)"
    done = shell(f'python -c "{code}"', tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, "a?b\n")


def run_out(kind: str):
    if kind == "python":
        raise MemoryError
    if kind == "cuda":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
    torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ("python", "cuda", "cpu"))
def test_memory_that_runs_out_is_one_line(capsys, kind):
    assert cli.main("x.py", lambda _: run_out(kind), None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("x.py: out of memory: ")


@pytest.mark.parametrize("nested", (False, True))
def test_a_full_disk_is_one_line_whatever_wraps_the_error(capsys, nested):
    def fail(_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            if nested:
                raise RuntimeError("backend='inductor' raised") from error
            raise RuntimeError("C++ compile error: fatal: No space left on device") from None

    assert cli.main("x.py", fail, None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("x.py: the disk is full: ") and "TORCHINDUCTOR_CACHE_DIR" in line


def test_a_compiler_that_fails_is_one_line(capsys):
    """However deep in Inductor's errors."""

    class CppCompileError(RuntimeError):
        pass

    def fail(argv):
        try:
            raise CppCompileError("C++ compile error\nx.cpp:1: error: no such option\n")
        except CppCompileError as error:
            raise RuntimeError("Inductor failed") from error

    assert cli.main("x.py", fail, None) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such option" in line and "--compile eager" in line


def test_where_nothing_can_be_compiled_text_comes_eagerly(tmp_path):
    """By default; a preset that was asked for is refused in one line."""
    name = "TORCH_COMPILE_DISABLE"
    done = shell("python generate.py --max-new-tokens 3", tmp_path, **{name: "1"})
    lines = [line for line in done.stderr.splitlines() if line.startswith("running without")]
    assert done.returncode == 0 and len(lines) == 1 and name in lines[0]
    done = shell("python generate.py --max-new-tokens 3 --compile default", tmp_path, **{name: "1"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and name in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels need Triton")
def test_a_model_loads_without_the_import_of_a_compiler():
    script = """
import sys, generate
generate.load(generate.ROOT / "assets" / "tiny")
print([name for name in ("torch._dynamo", "torch._inductor", "triton", "sympy", "transformers")
       if name in sys.modules])"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize(
    "command, unit",
    (
        ("generate.py --max-new-tokens 3", "tokens"),
        ("train_step.py --steps 3 --batch 2 --seq-len 48 --cache {}", "steps"),
    ),
)
def test_a_first_run_begins_at_once_and_leaves_nothing_unfinished(tmp_path, command, unit):
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = shell(f"python {command.format(tmp_path)} --no-wait --json", tmp_path, **env)
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["switched_at"] is None
    assert (report[f"eager_{unit}"], report[f"compiled_{unit}"]) == (3, 0)
    assert (report["preset"], report["compiled_as"]) == ("auto", "eager")
    assert not [*tmp_path.glob("ahead/making-*"), *tmp_path.glob("unfinished/*")]


@pytest.mark.parametrize("folder", ("/proc/nowhere", "{}/text.txt/folder"))
def test_a_cache_folder_that_cannot_be_made_is_one_line(tmp_path, folder):
    """Text and training come eagerly; a preset that was asked for is refused."""
    (tmp_path / "text.txt").touch()
    folder = folder.format(tmp_path)
    env = {"TORCHINDUCTOR_CACHE_DIR": folder}
    done = shell("python generate.py --max-new-tokens 3", tmp_path, **env)
    assert done.returncode == 0 and "KING RICHARD" in done.stdout
    assert len([line for line in done.stderr.splitlines() if folder in line]) == 1
    for command in ("generate.py --max-new-tokens 3 --compile default", "train_step.py --steps 1"):
        done = shell(f"python {command}", tmp_path, **env)
        lines = done.stderr.splitlines()
        assert "Traceback" not in done.stderr
        assert folder in done.stderr and (done.returncode == 0 or len(lines) == 1)


@pytest.mark.parametrize(
    "command", ("generate.py", "train_step.py", "checkpoint.py", "compile_config.py")
)
def test_an_interrupt_while_modules_load_ends_without_a_traceback(command):
    with subprocess.Popen(
        [sys.executable, "-v", command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        seen = b""
        while b"import 'torch" not in seen:  # python -v says what it imports
            seen += process.stderr.readline()
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT and b"Traceback" not in errors + output


def test_other_errors_of_the_program_are_not_taken_for_it():
    def fail(_):
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="mistake of ours"):
        cli.main("x.py", fail, None)
