"""Intervals of paired differences against scipy and by hand; verdicts by their rule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from schemas.errors import InputError
from selection_ops.paired import INTERVALS, Interval, judge, mean_interval, student_quantile

# Multiples of 1/1024: sums are exact, so resamples of equal means are equal for scipy too, which compares without rounding.
SAMPLES = {
    "three": [-31 / 1024, -12 / 1024, -44 / 1024],
    "five": [-20 / 1024, 10 / 1024, -35 / 1024, -8 / 1024, -51 / 1024],
    "skewed": [0.0, 1 / 1024, 2 / 1024, 1 / 1024, 90 / 1024, 3 / 1024, 0.0, 40 / 1024],
    "twelve": (np.round(np.random.default_rng(3).normal(10, 20, 12)) / 1024).tolist(),
}


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("method,kind", [("percentile", "percentile"), ("BCa", "bca")])
def test_bootstrap_intervals_are_scipys(name: str, method: str, kind: str, level: float) -> None:
    values = np.array(SAMPLES[name])
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, confidence_level=level, method=method, random_state=np.random.default_rng(0)
    ).confidence_interval  # fmt: skip
    ours = mean_interval(values.tolist(), kind, level=level)  # type: ignore[arg-type]
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-12)
    assert ours.mean == pytest.approx(values.mean(), rel=1e-12)


def test_percentile_is_the_exact_bootstrap_of_three() -> None:
    """All 27 resamples are equally likely; three equal ones, each end, come in 1 of 27, more than 2.5 %: the ends are the extremes."""
    values = SAMPLES["three"]
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=3))
    assert len(means) == 27
    found = mean_interval(values, "percentile")
    assert (found.low, found.high) == pytest.approx((means[0], means[-1]))
    assert (found.low, found.high) == pytest.approx((min(values), max(values)))
    inner = mean_interval(values, "percentile", level=0.9)
    assert found.low < inner.low < found.mean < inner.high < found.high


@pytest.mark.parametrize("name", SAMPLES)
def test_student_is_scipys(name: str) -> None:
    values = np.array(SAMPLES[name])
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_interval(values.tolist(), "student")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 30, 101])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.9995])
def test_student_quantile(freedom: int, probability: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9)


@pytest.mark.parametrize("kind", INTERVALS)
def test_intervals_follow_shift_and_scale(kind: str) -> None:
    values = np.array(SAMPLES["five"])
    base = mean_interval(values.tolist(), kind)  # type: ignore[arg-type]
    moved = mean_interval((3 * values + 1).tolist(), kind)  # type: ignore[arg-type]
    assert (moved.low, moved.mean, moved.high) == pytest.approx(
        (3 * base.low + 1, 3 * base.mean + 1, 3 * base.high + 1)
    )
    assert mean_interval(values.tolist(), kind) == base  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", INTERVALS)
def test_equal_differences_have_no_width(kind: str) -> None:
    assert mean_interval([0.5, 0.5, 0.5], kind) == Interval(mean=0.5, low=0.5, high=0.5)  # type: ignore[arg-type]


def test_what_gives_no_interval_is_refused() -> None:
    with pytest.raises(InputError, match="2 seeds give no interval; take at least 3"):
        mean_interval([0.1, 0.2])
    with pytest.raises(InputError, match="not finite"):
        mean_interval([0.1, float("nan"), 0.2])
    with pytest.raises(InputError, match="choose one of percentile, bca, student"):
        mean_interval([1, 2, 3], "normal")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="between 0 and 1"):
        mean_interval([1, 2, 3], level=95)


def at(low: float, high: float) -> Interval:
    return Interval(mean=(low + high) / 2, low=low, high=high)


@pytest.mark.parametrize(
    "target,guard,margin,verdict",
    [
        (at(-0.3, -0.1), None, 0.0, "adopt"),
        (at(-0.3, -0.1), None, 0.2, "inconclusive"),  # better, but not by the margin
        (at(-0.3, 0.0), None, 0.0, "inconclusive"),  # an interval that touches zero does not exclude it
        (at(-0.3, 0.1), None, 0.0, "inconclusive"),
        (at(0.1, 0.3), None, 0.0, "reject"),
        (at(0.1, 0.3), None, 0.2, "inconclusive"),
        (at(-0.3, -0.1), at(-0.02, 0.01), 0.0, "adopt"),
        (at(-0.3, -0.1), at(-0.02, 0.03), 0.0, "inconclusive"),  # the guard may be worse
        (at(-0.3, -0.1), at(0.03, 0.05), 0.0, "reject"),  # the guard is worse
        (at(-0.3, 0.1), at(0.03, 0.05), 0.0, "reject"),
        (at(-0.3, 0.1), at(-0.3, -0.1), 0.0, "inconclusive"),  # a better guard adopts nothing
    ],
)
def test_verdicts(target: Interval, guard: Interval | None, margin: float, verdict: str) -> None:
    found, why = judge(target, guard, margin=margin, tolerance=0.02)
    assert found == verdict
    assert why
