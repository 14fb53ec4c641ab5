"""SIGKILL from outside, at a random time, to a training in another process; the same command again gives the same bytes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
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


def start(run: Run, model: Path, processes: int = 0) -> subprocess.Popen[bytes]:
    """The command by itself, or by torchrun in some processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [
        sys.executable, *torchrun, "-m", "trainer", run.url, "--model", str(model), "--name", "t", "--policy", "filter-then-weight",
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


def workers(torchrun: subprocess.Popen[bytes]) -> list[int]:
    """Processes of the training that torchrun has started."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == torchrun.pid:
                    found.append(int(folder.name))
    return sorted(found)


@pytest.mark.slow
def test_invariant_7_torchrun_with_a_process_killed_at_any_step_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """Torchrun ends the others and says which was lost, and where it is killed itself they end by themselves; two processes again give
    the bytes of two that nobody disturbed."""
    whole = make_run(tmp_path / "whole", samples=96)
    undisturbed = start(*whole, processes=2)
    text, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, text.decode()
    expected = results(whole[0], "t")
    rng = random.Random(29)
    place = make_run(tmp_path / "killed", samples=96)
    for victim in ("worker", "torchrun", "worker"):
        process = start(*place, processes=2)
        assert process.stdout is not None
        lines, after = b"", rng.randint(1, 12)
        while lines.count(b"\nstep ") < after:
            line = process.stdout.readline()
            assert line, lines.decode()
            lines += b"\n" + line
        os.kill(rng.choice(workers(process)) if victim == "worker" else process.pid, signal.SIGKILL)
        begun = time.monotonic()
        # To the end of what they print: until the last of them has ended.
        rest, _ = process.communicate(timeout=60)
        assert time.monotonic() - begun < 30
        assert process.returncode != 0
        assert (b"Signal 9 (SIGKILL)" if victim == "worker" else b"torchrun, which started it, is gone") in rest
        assert b"done: " not in rest
    assert not finished(place)
    again = start(*place, processes=2)
    text, _ = again.communicate(timeout=300)
    assert again.returncode == 0, text.decode()
    found = results(place[0], "t")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
