"""Learning rates, against the schedules of transformers and torch, and formulas written out anew."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter as scipy_median
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from schemas.errors import InputError
from trainer.schedules import SCHEDULES, Schedule, median_filter, refine

PEAK = 0.5
FLAT = refine([3.0] * 40, power=2)


def rates(name: str, total: int, **changes: Any) -> list[float]:
    refined = FLAT if name == "refined" else None
    schedule = Schedule(name=name, peak=PEAK, **{"refined": refined, **changes})
    return [schedule.rate(progress=(step - 1) / total, step=step) for step in range(1, total + 1)]


def theirs(make: Callable[[Any], Any], total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=PEAK)
    schedule, found = make(optimizer), []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


THEIRS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "linear": (lambda o: get_linear_schedule_with_warmup(o, 0, 20), {"name": "linear"}),
    "linear to a share": (
        lambda o: get_polynomial_decay_schedule_with_warmup(o, 0, 20, lr_end=0.1, power=1.0),
        {"name": "linear", "final": 0.2},
    ),
    "cosine": (lambda o: get_cosine_schedule_with_warmup(o, 0, 20), {"name": "cosine"}),
    "cosine to a share": (
        lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 0, 20, min_lr_rate=0.2),
        {"name": "cosine", "final": 0.2},
    ),
    "constant after a warm-up": (
        lambda o: get_constant_schedule_with_warmup(o, 5),
        {"name": "constant", "warmup_steps": 5},
    ),
    "stable, then linear": (
        lambda o: get_wsd_schedule(o, 4, 8, num_stable_steps=8, decay_type="linear", min_lr_ratio=0.1),
        {"name": "linear", "final": 0.1, "decay_from": 0.6, "warmup_steps": 4, "warmup_from": 0.1},
    ),
    "stable, then 1 - sqrt": (
        lambda o: get_wsd_schedule(o, 4, 8, num_stable_steps=8, decay_type="1-sqrt", min_lr_ratio=0.1),
        {"name": "sqrt", "final": 0.1, "decay_from": 0.6, "warmup_steps": 4, "warmup_from": 0.1},
    ),
    "stable, then cosine": (
        lambda o: get_wsd_schedule(o, 4, 8, num_stable_steps=8, decay_type="cosine"),
        {"name": "cosine", "decay_from": 0.6, "warmup_steps": 4},
    ),
    "exponential": (
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5 ** (1 / 6)),
        {"name": "exponential", "half_life": 0.3},
    ),
}


@pytest.mark.parametrize("case", sorted(THEIRS))
def test_as_in_transformers_and_torch(case: str) -> None:
    make, mine = THEIRS[case]
    # A few float64 operations; theirs multiplies the exponential's rate step by step.
    assert rates(total=20, **mine) == pytest.approx(theirs(make, 20), rel=1e-12)


def test_formulas() -> None:
    """The rest of them in closed form, at t of 10 steps."""
    shares = np.arange(10) / 10
    closed = {
        "constant": np.ones(10),
        "sqrt": 1 - shares**0.5,
        "rex": (1 - shares) / (0.5 + 0.5 * (1 - shares)),
        "exponential": 2.0 ** (-shares / 0.25),
        "refined": 1 - shares,  # equal norms
    }
    for name, expected in closed.items():
        assert rates(name, 10) == pytest.approx(PEAK * expected, rel=1e-14), name


@pytest.mark.parametrize("name", SCHEDULES)
def test_from_the_peak_down_to_the_final_share(name: str) -> None:
    found = rates(name, 20)
    assert found[0] == PEAK
    assert found == sorted(found, reverse=True)
    refined = FLAT if name == "refined" else None
    if name == "constant":
        return
    end = Schedule(name=name, peak=PEAK, refined=refined).rate(progress=1.0, step=21)
    assert end == pytest.approx(PEAK / 16 if name == "exponential" else 0, abs=1e-16)
    share = Schedule(name=name, peak=PEAK, refined=refined, final=0.3).rate(progress=1.0, step=21)
    assert share == pytest.approx(0.3 * PEAK, rel=1e-14)
    held = rates(name, 20, decay_from=0.5)
    assert held[:11] == [PEAK] * 11
    assert held[10:] == pytest.approx(rates(name, 10), rel=1e-12)


def test_warmup_rises_on_top_from_zero_or_from_a_share() -> None:
    bare, warm = rates("linear", 10), rates("linear", 10, warmup_steps=4)
    assert warm == pytest.approx([b * f for b, f in zip(bare, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1])], rel=1e-15)
    again = rates("constant", 6, warmup_steps=4, warmup_from=0.2)
    assert again == pytest.approx([PEAK * f for f in (0.2, 0.4, 0.6, 0.8, 1, 1)], rel=1e-15)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_refined_is_the_formula(power: float) -> None:
    """Sums of the published formula, written out quadratically; scipy's median filter."""
    rng = random.Random(3)
    norms = [math.exp(rng.gauss(0, 1)) * (1 + 4 * math.exp(-t / 5)) for t in range(50)]
    smooth = scipy_median(np.array(norms), size=11, mode="reflect")
    weight = np.append(smooth, smooth[-1]) ** -power
    eta = np.array([weight[t] * sum(weight[p] for p in range(t + 1, 51)) / weight.sum() for t in range(50)])
    found = refine(norms, power=power, smoothing=0.2)
    assert found.values == pytest.approx(eta / eta.max(), rel=1e-12)
    schedule = Schedule(name="refined", peak=PEAK, refined=found)
    # The same length gives the values themselves, half a step further the mean of two, and the end is zero.
    assert [schedule.rate(progress=t / 50, step=t + 1) for t in range(50)] == pytest.approx(PEAK * eta / eta.max())
    assert found.at(0.03) == pytest.approx((found.values[1] + found.values[2]) / 2, rel=1e-12)
    assert found.at(1.0) == 0


def test_refined_warms_up_where_early_gradients_are_large() -> None:
    values = refine([10.0] * 10 + [1.0] * 30, power=1, smoothing=0.0).values
    assert values[0] < 0.2
    assert max(values) == values[10] == 1


def test_refined_follows_the_tokens_where_steps_differ_in_them() -> None:
    found = refine([1.0] * 4, power=1, starts=[0, 0.1, 0.2, 0.6])
    assert [found.at(start) for start in (0, 0.1, 0.2, 0.6, 0.8)] == pytest.approx([1, 0.75, 0.5, 0.25, 0.125])


@pytest.mark.parametrize("window", [1, 3, 7, 15])
def test_median_filter_is_that_of_scipy(window: int) -> None:
    rng = random.Random(window)
    values = [rng.choice([rng.random(), 0.5]) for _ in range(16)]
    assert median_filter(values, window) == scipy_median(np.array(values), size=window, mode="reflect").tolist()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"name": "exp"}, "linear, sqrt, cosine, rex, exponential, refined, constant"),
        ({"final": 1.5}, "final_lr is a share"),
        ({"decay_from": 1.0}, r"in \[0, 1\), not 1.0"),
        ({"half_life": 0.0}, "half_life must be positive"),
        ({"warmup_from": 2.0}, "share of the peak"),
        ({"warmup_from": 0.1}, "needs warmup_steps"),
        ({"name": "constant", "final": 0.1}, "never decays"),
        ({"name": "constant", "decay_from": 0.1}, "never decays"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule(**changes)


def test_norms_that_cannot_be_inverted_are_refused() -> None:
    with pytest.raises(InputError, match=r"norm of 0\.0 at step 2"):
        refine([1.0, 0.0], power=1)
    with pytest.raises(InputError, match="no gradient norms"):
        refine([], power=1)
    with pytest.raises(InputError, match="needs the gradient norms"):
        Schedule(name="refined").rate(progress=0.5, step=1)
