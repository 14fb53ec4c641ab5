"""Two schedulers on one run, and clocks that go back."""

from __future__ import annotations

import re
import time

from tests.faults.trial import Trial


def two_schedulers(trial: Trial) -> None:
    """Two or three commands of one stage at once on one run: each ends well, and the bytes are those of one alone."""
    rng = trial.rng
    stage = rng.choice(["plan", "target", "score", "score", "select", "export"])
    trial.copy(stage)
    count = rng.choice([2, 2, 3])
    shares = stage == "score" and rng.random() < 0.3
    started = []
    for number in range(count):
        more = ["--units", f"{number + 1}/{count}"] if shares else []
        started.append(trial.start(stage, *more))
        time.sleep(rng.choice([0.0, 0.0, rng.uniform(0, trial.world.seconds[stage])]))
    trial.verdict.injected = 1
    for process in started:
        ended = process.wait()
        if ended.status:
            trial.check_error(ended)
            trial.verdict.unfinished += 1
            trial.note(f"one of {count} on stage {stage} ended with {ended.status}: {ended.output[-1500:]}")
    trial.check_unfinished(stage)
    trial.resume(stage)
    trial.judge(stage)


def clock_backwards(trial: Trial) -> None:
    """The wall clock jumps, mostly back, while a stage runs, is perhaps killed, and runs again with another wrong clock."""
    rng = trial.rng
    stage = rng.choice(["plan", "target", "score", "score", "select", "export"])
    trial.copy(stage)
    arms = [("wrong_clock", {"seed": rng.randrange(1 << 30)})]
    trial.verdict.injected = 1
    process = trial.start(stage, arms=arms)
    if rng.random() < 0.5 and not process.done(rng.uniform(0, 1.2 * trial.world.seconds[stage])):
        process.kill()
    if stage == "score":
        shown = trial.start("status", arms=[("wrong_clock", {"seed": rng.randrange(1 << 30)})]).wait()
        if shown.status or "Traceback" in shown.output or re.search(r"(?<![\w-])-\d", shown.output):
            trial.verdict.unclear_errors += 1
            trial.note(f"status: {shown.output}")
    ended = process.wait()
    trial.check_unfinished(stage)
    trial.resume(stage, ended=ended, arms=[("wrong_clock", {"seed": rng.randrange(1 << 30)})])
    trial.judge(stage)
