"""A disk that fills in the middle of a stage."""

from __future__ import annotations

import os

from tests.disks import can_mount, resize, small_disk
from tests.faults.trial import Trial

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
