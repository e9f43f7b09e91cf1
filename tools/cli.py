"""Shared by the command lines: a mistake ends in one line that says what to do, and exit code 2."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO


class Parser(argparse.ArgumentParser):
    """Mistaken flags are ValueErrors like any other bad input."""

    def error(self, message: str):
        raise ValueError(message)


class Progress:
    """Messages on standard error: lines; on a terminal a note that the next one wipes out."""

    def __init__(self):
        self.shown = 0

    def __call__(self, message: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\b" * self.shown + " " * self.shown + "\b" * self.shown + message)
            self.shown = len(message)
        elif message:
            sys.stderr.write(message.strip() + "\n")
        sys.stderr.flush()


class LastingStream(io.TextIOBase):
    """A stream that goes on to another one, or to nowhere, when it cannot be written any more."""

    def __init__(self, stream: TextIO, then: TextIO | None = None):
        self.stream = stream
        self.then = then

    def write(self, text: str) -> int:
        return self._try("write", text)

    def flush(self) -> None:
        self._try("flush")

    def fileno(self) -> int:
        return self.stream.fileno()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def _try(self, method: str, *args):
        try:
            return getattr(self.stream, method)(*args)
        except OSError:  # nobody reads, the terminal has gone, the disk is full
            _redirect_to_nowhere(self.stream)  # it holds text that Python flushes at the end
            if self.then is not None:
                self.stream, self.then = self.then, None
            return self._try(method, *args)


def _redirect_to_nowhere(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_standard_streams() -> None:
    """Open those that were closed (`>&-`), before a file takes their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def lacking_resource(error: BaseException) -> str | None:
    """The resource that the machine ran out of, and the remedy; None if the error is another one.

    Memory of Python, of torch on a GPU (torch.OutOfMemoryError) or on CPU; at the end of a chain of
    errors, room on the disk, as compilers say it, or a compiler that works.
    """
    of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or of_torch:
        return "out of memory: take a shorter context or fewer rows"
    cause: BaseException | None = error
    while cause is not None:
        if "No space left on device" in str(cause):
            return "the disk is full: free some room, or set TORCHINDUCTOR_CACHE_DIR and TMPDIR"
        if type(cause).__name__ == "CppCompileError":
            reason = next((x for x in str(cause).splitlines() if "error:" in x), "see TORCH_LOGS")
            return f"the C++ compiler fails ({reason.strip()}): mend it, or use --compile eager"
        cause = cause.__cause__ or cause.__context__
    return None


def main(
    program: str,
    run: Callable[[list[str] | None], int | None],
    argv: list[str] | None,
    outlives_reader: bool = False,
) -> int:
    """Exit code: of run(argv), None being 0; 2 after a one-line message on bad input; 130 when
    interrupted.

    outlives_reader   work on when nobody reads standard output any more, whose lines then go to
                      standard error; else end, exit code 0
    """
    # Huge pages for tensors on CPU: training is faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as commands set it while they load
        signal.signal(signal.SIGINT, signal.default_int_handler)
    open_standard_streams()
    standard = sys.stdout, sys.stderr
    for stream in standard:
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack a character
            stream.reconfigure(errors="replace")
    if outlives_reader:
        sys.stderr = LastingStream(sys.stderr)
        sys.stdout = LastingStream(sys.stdout, then=sys.stderr)
    try:
        status = run(argv) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough
        _redirect_to_nowhere(sys.stdout)
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        lacks = lacking_resource(error)
        if lacks is None:
            raise
        print(f"{program}: {lacks}", file=sys.stderr)
        return 2
    finally:
        sys.stdout, sys.stderr = standard
