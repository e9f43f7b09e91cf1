"""A sample of every long proof: `python -m bench.soak NAME` runs it at length, and its record is
committed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from bench.record import RESULTS
from bench.soak import PROOFS, ROOT, Session, main

SAMPLES = {  # kills, tokens, packings or seeds
    "train_kills": 6,
    "save_kills": 20,
    "cache_kills": 20,
    "compile_kills": 1,
    "command_kills": 3,
    "decode": 200,
    "packing": 10,
    "learning": 1,
}


@pytest.mark.full
@pytest.mark.parametrize("name", PROOFS)
def test_a_sample_of_a_long_proof_holds(name):
    """In a process of its own: proofs by kills fork, which other tests' threads would disturb."""
    script = f"from bench import soak; soak.prove({name!r}, {SAMPLES[name]}, seed=1)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PROOFS)
def test_a_recorded_proof_is_of_full_length_and_says_what_it_proves(name):
    (proof, count), path = PROOFS[name], RESULTS / f"soak_{name}.json"
    if not path.exists():
        pytest.skip(f"not recorded: python -m bench.soak {name}")
    record = json.loads(path.read_text())
    assert record["proved"] == " ".join(proof.__doc__.split())
    assert record["count"] >= count


def test_a_killed_process_is_told_from_one_that_has_ended():
    """In a process without threads, for it forks."""
    script = (
        "import time; from bench.soak import kill\n"
        "assert kill(lambda: time.sleep(60), 0.1) and not kill(lambda: None, 2.0)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_a_session_stays_within_what_caches_allow():
    """No rewind deeper than allowed below the highest position, no call beyond the context."""
    session, highest = Session(2, 100, 8, random.Random(0)), [0, 0]
    for i in range(2000):
        T = (1, 4, 30)[i % 3]
        positions, lengths = (t.tolist() for t in session.next_call(T))
        for row, (position, n) in enumerate(zip(positions, lengths, strict=True)):
            assert 0 <= n <= T and position + T <= 100
            highest[row] = 0 if position == 0 else highest[row]
            assert position >= highest[row] - 8
            highest[row] = max(highest[row], position + n)
    assert session.rewinds > 100 and session.conversations > 10


def test_an_unknown_proof_is_refused(capsys):
    assert main(["nonsense"]) == 2 and "nonsense" in capsys.readouterr().err
