"""Is one way of training better than another? Paired differences over seeds, an interval of their mean, a verdict by a stated rule.

Three intervals. `percentile`: quantiles of the means of resampled seeds. `bca`: the same with bias correction and acceleration (Efron, JASA 82, 1987,
eq. 6.4 and 7.4). `student`: mean ± t s / sqrt(n), which assumes normal differences. With few seeds the bootstrap is too narrow: its ends cannot leave the range
of the differences, so three seeds of one sign exclude zero, which chance alone brings in one of four comparisons. `student` holds its level there: of
comparisons without a difference (normal, level 0.95) 25, 15, 11, 9 % of percentile intervals exclude zero with 3, 5, 8, 10 seeds, of BCa
27, 17, 12, 10 %, of Student's 5 %.

Legend: n seeds, R resamples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from schemas.errors import InputError

IntervalKind = Literal["percentile", "bca", "student"]
INTERVALS: tuple[IntervalKind, ...] = ("percentile", "bca", "student")
Verdict = Literal["adopt", "reject", "inconclusive"]
RESAMPLES = 10_000
LEAST_SEEDS = 3
_NORMAL = NormalDist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and where it lies."""

    mean: float
    low: float
    high: float


def mean_interval(
    difference_n: Sequence[float], kind: IntervalKind = "student", *, level: float = 0.95, resamples: int = RESAMPLES
) -> Interval:
    """Interval of the mean of paired differences; the resamples are always the same ones, so equal differences give equal intervals.

    Raises `InputError` for fewer than three differences, for one that is not finite, and for an unknown kind or level.
    """
    if kind not in INTERVALS:
        raise InputError(f"unknown interval {kind!r}: choose one of {', '.join(INTERVALS)}")
    if not 0 < level < 1:
        raise InputError(f"the level of an interval must lie between 0 and 1, not {level}")
    values_n = np.asarray(difference_n, dtype=np.float64)
    if len(values_n) < LEAST_SEEDS:
        raise InputError(f"{len(values_n)} seeds give no interval; take at least {LEAST_SEEDS}")
    if not np.isfinite(values_n).all():
        raise InputError(f"a difference is not finite: {values_n.tolist()}")
    mean = float(values_n.mean())
    if np.ptp(values_n) == 0:
        return Interval(mean=mean, low=mean, high=mean)
    tail = (1 - level) / 2
    if kind == "student":
        half = student_quantile(1 - tail, len(values_n) - 1) * float(values_n.std(ddof=1)) / math.sqrt(len(values_n))
        return Interval(mean=mean, low=mean - half, high=mean + half)
    drawn_Rn = np.random.default_rng(0).integers(0, len(values_n), (resamples, len(values_n)))
    mean_R = values_n[drawn_Rn].mean(axis=1)
    low, high = (tail, 1 - tail) if kind == "percentile" else _accelerated(values_n, mean_R, tail)
    return Interval(mean=mean, low=float(np.quantile(mean_R, low)), high=float(np.quantile(mean_R, high)))


def _accelerated(values_n: np.ndarray, mean_R: np.ndarray, tail: float) -> tuple[float, float]:
    """Which quantiles of the resampled means BCa takes for those of `tail` and 1 - `tail`."""
    mean = values_n.mean()
    rounding = 1e-12 * np.abs(values_n).max()  # a resample of the same mean counts half, whatever the order of its sum
    below = (np.count_nonzero(mean_R < mean - rounding) + np.count_nonzero(mean_R <= mean + rounding)) / (
        2 * len(mean_R)
    )
    bias = _NORMAL.inv_cdf(below)
    apart_n = (values_n - mean) / (len(values_n) - 1)  # mean of the jackknife means minus each of them
    acceleration = float((apart_n**3).sum() / (6 * (apart_n**2).sum() ** 1.5))

    def moved(probability: float) -> float:
        shifted = bias + _NORMAL.inv_cdf(probability)
        return _NORMAL.cdf(bias + shifted / (1 - acceleration * shifted))

    return moved(tail), moved(1 - tail)


def _student_cdf(t: float, freedom: int) -> float:
    """Student's distribution function for whole degrees of freedom, as a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, cosine if freedom > 1 else 0.0) if odd else (1.0, 1.0)
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    area = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + area / 2


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's distribution, by bisection to rounding; `probability` at least one half."""
    low, high = 0.0, 1.0
    while _student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _student_cdf(middle, freedom) < probability else (low, middle)
    return high


def judge(target: Interval, guard: Interval | None, *, margin: float, tolerance: float) -> tuple[Verdict, str]:
    """Verdict on an arm and why; intervals are of loss minus the control's, in nats per token, so below zero is better.

    `adopt`: the whole interval of the target lies below -margin, and that of the guard not above `tolerance`. `reject`: the target's lies
    above `margin`, or the guard's above `tolerance`. Everything else is `inconclusive`.
    """
    if guard is not None and guard.low > tolerance:
        return "reject", f"the guard loss rises by more than {tolerance:g}"
    if target.low > margin:
        return "reject", f"the held-out loss is higher by more than {margin:g}"
    if not target.high < -margin:
        return "inconclusive", f"the interval of the held-out loss does not lie below {-margin or 0:g}"
    if guard is not None and guard.high > tolerance:
        return "inconclusive", f"the guard loss may rise by more than {tolerance:g}"
    return "adopt", f"the held-out loss is lower by more than {margin:g}" + (
        "" if guard is None else f", and the guard loss rises by less than {tolerance:g}"
    )
