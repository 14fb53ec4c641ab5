"""Learning rate as a function of progress, from 0 before the first step to 1 at the end of the budget.

A warm-up rises on top of it, over steps; a stable phase holds the peak until `decay_from`; then the shape takes the rate to its end.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence

from schemas.errors import InputError

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda decayed: 1.0 - decayed,
    "sqrt": lambda decayed: 1.0 - math.sqrt(decayed),
    "cosine": lambda decayed: 0.5 * (1.0 + math.cos(math.pi * decayed)),
    "rex": lambda decayed: (1.0 - decayed) / (0.5 + 0.5 * (1.0 - decayed)),
}
"""Shapes that fall from 1 to 0. 1 - sqrt: Haegele et al., arXiv 2405.18392; REX: Chen et al., arXiv 2107.04197."""

SCHEDULES = (*_SHAPES, "exponential", "refined", "constant")
NORMS = ("l1", "l2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of every step of a training."""

    name: str = "linear"
    peak: float = 1.0
    final: float = 0.0
    """Share of the peak at the end; `exponential` stays above it."""
    decay_from: float = 0.0
    """Progress until which the peak is held."""
    half_life: float = 0.25
    """Share of the decay in which `exponential` halves the rate."""
    warmup_steps: int = 0
    warmup_from: float = 0.0
    """Share of the rate that the warm-up starts from."""
    refined: Refined | None = None

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise InputError(f"unknown schedule {self.name!r}: choose one of {', '.join(SCHEDULES)}")
        if not 0 <= self.final <= 1:
            raise InputError(f"final_lr is a share of the peak in [0, 1], not {self.final}")
        if not 0 <= self.decay_from < 1:
            raise InputError(f"decay_from is a share of the training in [0, 1), not {self.decay_from}")
        if self.half_life <= 0:
            raise InputError(f"half_life must be positive, not {self.half_life}")
        if not 0 <= self.warmup_from <= 1:
            raise InputError(f"the warm-up starts from a share of the peak in [0, 1], not {self.warmup_from}")
        if self.name == "constant" and (self.final or self.decay_from):
            raise InputError(
                "schedule constant never decays: leave final_lr and decay_from out, or choose another schedule"
            )
        if self.warmup_from and not self.warmup_steps:
            raise InputError("a warm-up that starts above zero needs warmup_steps")

    def rate(self, *, progress: float, step: int) -> float:
        """Learning rate of step `step` (from 1), `progress` being the share of the budget spent before it.

        `linear` is peak * (1 - t/T) with t from 0, as in transformers' linear schedule; its warm-up multiplies by
        (step - 1) / warmup_steps, also as there.
        """
        rise = min(1.0, (step - 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.peak * (self.warmup_from + (1 - self.warmup_from) * rise) * self._share(progress)

    def _share(self, progress: float) -> float:
        if self.name == "constant" or progress < self.decay_from:
            return 1.0
        decayed = min((progress - self.decay_from) / (1 - self.decay_from), 1.0)
        if self.name == "exponential":
            return max(self.final, 0.5 ** (decayed / self.half_life))
        if self.name == "refined":
            if self.refined is None:
                raise InputError(
                    "schedule refined needs the gradient norms of an earlier training: name it with schedule_from"
                )
            shape = self.refined.at(decayed)
        else:
            shape = _SHAPES[self.name](decayed)
        return self.final + (1 - self.final) * shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refined:
    """A schedule from gradient norms: values in [0, 1] at shares of the training, straight lines between them, 0 at the end."""

    starts: tuple[float, ...]
    """Share of the training spent before each step, ascending from 0."""
    values: tuple[float, ...]

    def at(self, progress: float) -> float:
        """Value at a share of the training."""
        index = max(bisect_right(self.starts, progress) - 1, 0)
        start, value = self.starts[index], self.values[index]
        last = index + 1 == len(self.starts)
        end, after = (1.0, 0.0) if last else (self.starts[index + 1], self.values[index + 1])
        return value + (after - value) * min(max((progress - start) / (end - start), 0.0), 1.0)


def refine(
    norms: Sequence[float], *, power: float, smoothing: float = 0.1, starts: Sequence[float] | None = None
) -> Refined:
    """The schedule refined from the gradient norms of an earlier training (Defazio et al., arXiv 2310.07831, theorem 3 and section 3).

    With w_t = g_t^-power of the median-filtered norms, eta_t = w_t * sum_{p>t} w_p / sum_p w_p, scaled to a largest value of 1.
    Power 2 is for L2 norms, under SGD; 1 for L1 norms, under Adam. The filter's window is `smoothing` times the steps, reflected
    at both ends. A training of T steps has T + 1 iterates, and no norm at the last: w_{T+1} is taken as w_T, so that equal norms give
    the linear schedule exactly. `starts`: share of the training before each step, equal shares if left out.

    Raises `InputError` for norms that are not positive.
    """
    bad = next((index for index, norm in enumerate(norms) if not 0 < norm < math.inf), None)
    if not norms or bad is not None:
        what = "no gradient norms" if not norms else f"a gradient norm of {norms[bad or 0]} at step {(bad or 0) + 1}"
        raise InputError(f"a schedule cannot be refined from {what}")
    # Relative to the least norm, so that no power overflows or vanishes.
    smooth = median_filter(norms, 2 * int(smoothing * len(norms) / 2) + 1)
    least = min(smooth)
    weights = [(least / norm) ** power for norm in smooth]
    values, left = [0.0] * len(weights), weights[-1]
    for index in range(len(weights) - 1, -1, -1):
        values[index] = weights[index] * left
        left += weights[index]
    largest = max(values)
    count = len(norms)
    return Refined(
        starts=tuple(starts) if starts is not None else tuple(index / count for index in range(count)),
        values=tuple(value / largest for value in values),
    )


def median_filter(values: Sequence[float], window: int) -> list[float]:
    """Medians of the `window` (odd) values around each, the sequence reflected at its ends: c b a | a b c | c b a."""
    count, half = len(values), window // 2
    if window > 2 * count:
        raise InputError(f"a median over {window} values needs at least {half} of them, not {count}")

    def value(index: int) -> float:
        return values[-1 - index if index < 0 else 2 * count - 1 - index if index >= count else index]

    inside = sorted(value(index) for index in range(-half, half + 1))
    medians = [inside[half]]
    for index in range(1, count):
        del inside[bisect_left(inside, value(index - half - 1))]
        insort(inside, value(index + half))
        medians.append(inside[half])
    return medians
