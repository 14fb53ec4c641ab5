"""Learning rate as a function of progress, from 0 before the first step to 1 at the end of the budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from schemas.errors import InputError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}


def get_schedule(name: str) -> Callable[[float], float]:
    """The schedule called `name`; raises `InputError` listing the known ones."""
    if name not in SCHEDULES:
        raise InputError(f"unknown schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def learning_rate(peak: float, schedule: str, *, progress: float, step: int, warmup_steps: int = 0) -> float:
    """Learning rate of step `step` (from 1), `progress` being the share of the budget spent before it.

    `linear` is peak * (1 - t/T) with t from 0, as in transformers' linear schedule. Warm-up multiplies by
    (step - 1) / warmup_steps, also as there.
    """
    rise = min(1.0, (step - 1) / warmup_steps) if warmup_steps else 1.0
    return peak * rise * get_schedule(schedule)(min(max(progress, 0.0), 1.0))
