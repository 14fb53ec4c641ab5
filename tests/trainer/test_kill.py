"""SIGKILL from outside, at a random time, to a training in another process; the same command again gives the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import results

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.slow
def test_killed_at_any_time_resumes_to_the_same_bytes(tmp_path: Path) -> None:
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

    rng = random.Random(time.time_ns())
    killed = attempts = 0
    while killed < 4:
        attempts += 1
        assert attempts < 30, "every attempt finished before it was killed"
        run, model = make_run(tmp_path / f"attempt-{attempts}", samples=96)
        process = start(run, model)
        assert process.stdout is not None
        if attempts % 4 == 0:
            time.sleep(rng.uniform(0, first))
        else:
            process.stdout.readline()
            time.sleep(rng.uniform(0, duration - first))
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        process.stdout.close()
        if Path(run.path(run.manifest_path("train", "t"))).exists():
            continue  # it finished first: repeated, never counted
        assert code == -signal.SIGKILL
        killed += 1
        again = start(run, model)
        text, _ = again.communicate()
        assert again.returncode == 0, text.decode()
        found = results(run, "t")
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
