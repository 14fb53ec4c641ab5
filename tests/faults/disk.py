"""A disk that fills in the middle of a stage."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults.trial import Trial


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system in memory of so many bytes, mounted at a new folder."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "lehr-test", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: str) -> None:
    """Give a mounted small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@functools.cache
def can_mount() -> bool:
    """Whether this process may make a real small disk."""
    try:
        with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder) / "disk", "1m"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


_REASONS = ("No space left", "File too large")


def disk_full(trial: Trial) -> None:
    """A stage runs out of space at a random byte: a message that says so, and after tidying the same command finishes.

    Where mounting is not permitted, files are limited to a random length instead, which the kernel refuses in mid-write alike.
    """
    stage = trial.rng.choice(["plan", "target", "score", "score", "select", "export"])
    grown = {"plan": 24, "target": 120, "score": 400, "select": 60, "export": 160}[stage] << 10
    if not can_mount():
        trial.copy(stage)
        limit = int(trial.rng.uniform(0, 8 << 10))
        ended = trial.start(stage, arms=[("small_files", {"limit": limit})]).wait()
        _resume(trial, stage, ended)
        return
    with small_disk(trial.folder / "disk", "64m"):
        trial.run = trial.folder / "disk" / "run"
        trial.copy(stage)
        state = os.statvfs(trial.run.parent)
        used = (state.f_blocks - state.f_bfree) * state.f_frsize
        resize(trial.run.parent, str(used + 4096 + int(trial.rng.random() ** 2 * grown)))
        ended = trial.start(stage).wait()
        resize(trial.run.parent, "64m")
        _resume(trial, stage, ended)


def _resume(trial: Trial, stage: str, ended: object) -> None:
    from tests.faults.zygote import Ended

    assert isinstance(ended, Ended)
    trial.verdict.injected = int(ended.status != 0)
    trial.check_unfinished(stage)
    trial.resume(stage, ended=ended, naming=_REASONS)
    trial.judge(stage)
