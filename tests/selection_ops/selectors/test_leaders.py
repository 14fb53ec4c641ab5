"""First-fit filling from a sure prefix and the leaders beyond it, against filling from everything."""

from __future__ import annotations

import numpy as np
import pytest

from selection_ops.selectors import guesses
from selection_ops.selectors.leaders import leading, room_of
from selection_ops.selectors.rounding import fill_ranked
from selection_ops.selectors.search import ScalarRows, Terms, classify, remaining
from selection_ops.selectors.threshold import FeasibleSet
from tests.selection_ops.selectors.test_search import rounds_of


@pytest.mark.parametrize("block", range(4))
def test_scattered_rankings_are_filled_alike(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(guesses, "SAMPLE_ROWS", 64)
    monkeypatch.setattr(guesses, "EDGES", 12)
    saved = 0
    for seed in range(block * 100, block * 100 + 100):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(1, 500))
        gain = rng.standard_normal(n) if seed % 3 else rng.integers(-2, 3, n).astype(float)
        size = rng.integers(1, 40, n) if seed % 2 else np.ones(n, np.int64)
        group = rng.integers(0, 3, n)
        budget = int(max(1, rng.random() * size.sum()))
        held = np.bincount(group, size, minlength=3)
        caps, floors = np.full(3, np.inf), np.zeros(3)
        if seed % 5:
            caps[1] = np.floor(rng.random() * budget)
            floors[2] = min(np.ceil(rng.choice([0.0, 0.3, 0.6]) * budget), held[2], budget)
        feasible = FeasibleSet(
            size_n=size.astype(float), budget=float(budget), group_n=group, caps_D=caps, floors_D=floors
        )
        expected = fill_ranked(np.argsort(-gain, kind="stable"), feasible)
        rows = ScalarRows(gain_n=gain, size_n=size, group_n=group)
        terms = Terms(
            budget=budget, size_D=held.astype(np.int64), caps_D=caps, floors_D=floors, per_size=False, positive=False
        )
        for bracket, _ in rounds_of(rows, terms, 2, seed):
            state = classify(rows, bracket, terms)
            sure = np.flatnonzero(state == 1)
            sure_D = np.bincount(group[sure], size[sure], minlength=3)
            rest = np.flatnonzero(state != 1)
            rest = rest[leading(rows.at(rest), room_of(terms, sure_D))]
            saved += int((state != 1).sum()) - len(rest)
            left = remaining(terms, sure_D, 0.0, rows.at(rest))
            left = FeasibleSet(
                size_n=left.size_n,
                budget=left.budget,
                group_n=group[rest],
                caps_D=caps - sure_D,
                floors_D=left.floors_D,
            )
            taken = rest[fill_ranked(np.argsort(-gain[rest], kind="stable"), left)]
            assert sorted([*sure, *taken]) == sorted(expected), seed
    assert saved > 1_000


def test_the_row_at_which_a_floor_ends_is_kept() -> None:
    """A floor of 5 is served by the first row of 3 alone, because the second one does not fit; the last row must not slip in."""
    gain, size, group = np.array([10.0, 9.0, 8.0, 100.0]), np.array([3, 3, 2, 2]), np.array([1, 1, 1, 0])
    rows = ScalarRows(gain_n=gain, size_n=size, group_n=group)
    floors = np.array([0.0, 5.0])
    terms = Terms(
        budget=5, size_D=np.array([2, 8]), caps_D=np.full(2, np.inf), floors_D=floors, per_size=False, positive=False
    )
    kept = leading(rows, room_of(terms, np.zeros(2, np.int64)))
    feasible = remaining(terms, np.zeros(2, np.int64), 0.0, rows.at(kept))
    taken = kept[fill_ranked(np.argsort(-gain[kept], kind="stable"), feasible)]
    assert sorted(taken) == [0, 3]
