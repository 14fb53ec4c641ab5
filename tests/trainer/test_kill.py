"""SIGKILL from outside, at a random time, to a training in another process; the same command again gives the same bytes."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schemas.run import Run
from tests.killing import ROOT, kill_unfinished
from tests.trainer.streams import make_run
from tests.trainer.test_loop import results

Place = tuple[Run, Path]
"""A run directory and its model."""


def start(run: Run, model: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "trainer", run.url, "--model", str(model), "--name", "t", "--policy", "filter-then-weight",
        "--candidates", "8", "--n-keep", "4", "--lr", "0.01", "--dtype", "float32", "--epochs", "4", "--proj-rank", "4",
        "--checkpoint-every", "3", "--eval-every", "5", "--warmup-select", "2", "--order", "shuffled", "--seed", "3",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finished(place: Place) -> bool:
    run = place[0]
    return Path(run.path(run.manifest_path("train", "t"))).exists()


@pytest.mark.slow
def test_invariant_7_killed_at_any_time_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    run, model = make_run(tmp_path / "whole", samples=96)
    begun = time.monotonic()
    whole = start(run, model)
    assert whole.stdout is not None
    # Most attempts are killed after their first step: one that is still importing would test nothing of ours.
    whole.stdout.readline()
    first = time.monotonic() - begun
    output = whole.stdout.read()
    assert whole.wait() == 0, output.decode()
    duration = time.monotonic() - begun
    expected = results(run, "t")

    rng = random.Random(17)
    for kill in range(4):

        def prepare(number: int, kill: int = kill) -> Place:
            return make_run(tmp_path / f"kill-{kill}-{number}", samples=96)

        def wait(process: subprocess.Popen[bytes], place: Place, number: int, kill: int = kill) -> None:
            if kill == 3:
                time.sleep(rng.uniform(0, first))
                return
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(rng.uniform(0, duration - first))

        run, model = kill_unfinished(prepare, lambda place: start(*place), wait, finished)[0]
        again = start(run, model)
        text, _ = again.communicate()
        assert again.returncode == 0, text.decode()
        found = results(run, "t")
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
