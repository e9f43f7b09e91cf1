"""`python -m tests [pytest options]`: all tests, in two lanes side by side, one for each core.

The first lane shows its output as it comes. The second runs the kernels in Triton's interpreter, in
a process of its own (TRITON_INTERPRET=1), then its share of the other tests, and shows its output
at the end. The exit status is 0 if every process passed or had no test to run. Options such as
-m full go to every process; OMP_NUM_THREADS is 1 unless it is set.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
INTERPRETER = {"TRITON_INTERPRET": "1"}
SOAK = "tests/cli/test_soak.py"
FIRST = ("tests/model", "tests/compile")
SECOND = ("tests/ops", "tests/kernels", "tests/cli")  # after the interpreter
NO_TESTS = 5  # pytest's exit status


def start(environment: dict[str, str], arguments: list[str], output=None) -> subprocess.Popen:
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.Popen(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env=os.environ | threads | environment,
        stdout=output,
        stderr=output and subprocess.STDOUT,
    )


def lanes(options: list[str]) -> tuple[list[str], list[str]]:
    """Paths of both. The soak is in the lane that has less to do: of the full tier the second."""
    if "full" in options:
        return [*FIRST], [*SECOND]
    return [*FIRST, SOAK], [*SECOND, f"--ignore={SOAK}"]


def main(options: list[str]) -> int:
    first, others = lanes(options)
    with tempfile.TemporaryFile("w+") as second:
        lane = start({}, [*first, *options])
        statuses = [start(INTERPRETER, options, second).wait()]
        statuses.append(start({}, [*others, *options], second).wait())
        statuses.append(lane.wait())
        second.seek(0)
        sys.stdout.write(second.read())
    failed = [status for status in statuses if status not in (0, NO_TESTS)]
    return failed[0] if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
