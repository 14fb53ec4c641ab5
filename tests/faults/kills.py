"""SIGKILL at random moments: to commands, to the supervisor and the workers below them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.faults.trial import Trial
from tests.faults.zygote import Ended, Process

_ATTEMPTS = 12


def _killed(trial: Trial, stage: str) -> Ended:
    """The stage's command, killed unfinished: at a moment, or at a step of one of its writes.

    An attempt that finished first is repeated with the moment drawn anew, and does not count.
    """
    rng, seconds, steps = trial.rng, trial.world.seconds[stage], trial.world.write_steps(stage)
    ended = Ended(stage, 0, "")
    for _ in range(_ATTEMPTS):
        trial.again()
        trial.copy(stage)
        if rng.random() < 0.5:
            # Half of them among the last, where the manifest is written.
            number = rng.randint(1, steps) if rng.random() < 0.5 else rng.randint(max(1, steps - 30), steps)
            arm = ("die_at_write", {"below": str(trial.run), "number": number})
            ended = trial.start(stage, arms=[arm]).wait()
        else:
            process = trial.start(stage)
            if not process.done(rng.uniform(0, seconds)):
                process.kill()
            ended = process.wait()
        if ended.status == -signal.SIGKILL:
            trial.verdict.injected = 1
            return ended
        if ended.status:
            trial.check_error(ended)
    trial.note("finished before each kill")
    return ended


def _resumed(trial: Trial, stage: str) -> None:
    ended = _killed(trial, stage)
    trial.check_unfinished(stage)
    trial.resume(stage, ended=ended)
    trial.judge(stage)


def kill_command(trial: Trial) -> None:
    """The process that plans, describes or scores; with one worker it is the worker too. Sometimes twice in a row."""
    _resumed(trial, trial.rng.choice(["plan", "target", "target", "score", "score", "score", "score"]))


def kill_select(trial: Trial) -> None:
    """The process that selects."""
    _resumed(trial, "select")


def kill_export(trial: Trial) -> None:
    """The process that exports."""
    _resumed(trial, "export")


def kill_worker(trial: Trial) -> None:
    """With two workers: one of them, their supervisor, or the command, at a random moment; the command ends well by itself
    unless it was the one that was killed."""
    rng = trial.rng
    victim = rng.choice(["worker", "worker", "supervisor", "command"])
    for _ in range(_ATTEMPTS):
        trial.again()
        trial.copy("score")
        command = trial.world.command("score", trial.run)
        command[command.index("--workers") + 1] = "2"
        process = trial.zygote.start(*command)
        wait_s = rng.uniform(0, 1.2 * trial.world.seconds["score"])
        if rng.random() < 0.5:
            _until_part(process, trial.run)
            wait_s = rng.uniform(0, 0.4 * trial.world.seconds["score"])
        if process.done(wait_s):
            trial.resume("score", ended=process.wait())
            continue
        family = process.family()
        if victim == "command":
            process.kill()
        elif family[victim]:
            os.kill(rng.choice(family[victim]), signal.SIGKILL)
        else:
            process.wait()
            continue
        trial.verdict.injected = 1
        ended = process.wait()
        trial.check_unfinished("score")
        if victim != "command" and ended.status:
            # A worker that is lost is replaced: nobody has to do anything.
            trial.verdict.unfinished += 1
            trial.note(f"status {ended.status} after the {victim} was killed: {ended.output[-1500:]}")
        # On a busy machine, what is in the middle of an import ends after it.
        end = time.monotonic() + 10
        while any(process.family().values()) and time.monotonic() < end:
            time.sleep(0.05)
        if any(process.family().values()):
            trial.verdict.orphans += 1
            trial.note("workers outlive the command")
        trial.resume("score", ended=ended)
        trial.judge("score")
        return


def _until_part(process: Process, run: Path) -> None:
    while not process.done(0.002) and not list((run / "features").glob("base/part-*")):
        pass
