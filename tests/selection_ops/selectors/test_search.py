"""The search over scattered rows against the exact solver over all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from selection_ops.selectors import guesses
from selection_ops.selectors.search import (
    Bracket,
    Grid,
    ScalarRows,
    Terms,
    classify,
    cost_shift,
    count,
    first_bracket,
    keys,
    narrow,
    remaining,
)
from selection_ops.selectors.threshold import FeasibleSet, ThresholdSolution, solve_threshold


def instance(seed: int, rows: int = 0) -> tuple[ScalarRows, Terms, FeasibleSet]:
    """A random problem: ties, heavy tails, zero costs, sizes of tokens, quotas and floors, limits that bind or not."""
    rng = np.random.default_rng(seed)
    n = rows or int(rng.integers(1, 400))
    kind = rng.integers(4)
    gain = rng.standard_normal(n)
    if kind == 1:
        gain = rng.standard_cauchy(n) ** 3
    elif kind == 2:
        gain = rng.integers(-3, 4, n).astype(float)
    elif kind == 3:
        gain = np.float32(rng.standard_normal(n)).astype(float) * 1e-20
    cost = rng.exponential(size=n) ** rng.choice([1.0, 5.0]) * rng.choice([1e-9, 1.0, 1e6])
    if rng.random() < 0.3:
        cost = rng.integers(0, 4, n).astype(float)
    tokens = bool(rng.random() < 0.5)
    size = rng.integers(1, 60, n) if tokens else np.ones(n, np.int64)
    groups = int(rng.choice([1, 1, 3]))
    group = rng.integers(0, groups, n)
    equality = not tokens and bool(rng.random() < 0.7)
    budget = int(max(1, rng.random() ** 2 * size.sum()))
    caps, floors = np.full(groups, np.inf), np.zeros(groups)
    held = np.bincount(group, size, minlength=groups)
    if groups > 1:
        caps[1] = np.floor(rng.choice([0.3, 0.7]) * budget)
        floors[2] = min(np.ceil(rng.choice([0.0, 0.2, 0.5]) * budget), held[2])
        if equality:
            budget = int(min(budget, np.minimum(held, caps).sum()))
            caps[1] = max(caps[1], 0)
        floors[2] = min(floors[2], budget)
    limit = None
    feasible = FeasibleSet(
        size_n=size.astype(float),
        budget=float(budget),
        equality=equality,
        group_n=group if groups > 1 else None,
        caps_D=caps if groups > 1 else None,
        floors_D=floors if groups > 1 else None,
    )
    if rng.random() < 0.75:
        free = solve_threshold(gain, FeasibleSet(**{**feasible.__dict__, "cost_n": cost, "limit": math.inf}))
        smallest = solve_threshold(np.zeros(n), FeasibleSet(**{**feasible.__dict__, "cost_n": cost, "limit": -1.0}))
        low = smallest.smallest_limit
        if math.isfinite(low) and free.feasible:
            share = rng.choice([0.02, 0.3, 0.8, 1.5])
            limit = float(low + share * (free.cost - low))
            if not limit > low * (1 + 1e-9):
                limit = None
    feasible = FeasibleSet(
        **{**feasible.__dict__, "cost_n": None if limit is None else cost, "limit": limit},
    )
    terms = Terms(
        budget=budget,
        size_D=held.astype(np.int64),
        caps_D=caps,
        floors_D=floors,
        limit=limit,
        shift=cost_shift(float(cost.sum()), n),
        positive=not equality,
    )
    rows_ = ScalarRows(gain_n=gain, size_n=size, group_n=group, cost_n=None if limit is None else cost)
    return rows_, terms, feasible


def limited(rows: int) -> tuple[ScalarRows, Terms, FeasibleSet]:
    """The first instance with a limit."""
    return next(found for found in (instance(seed, rows) for seed in range(30)) if found[1].limit is not None)


def split(rows: ScalarRows, seed: int) -> list[np.ndarray]:
    """Positions of the rows of each place, in ascending order as `at` keeps them; some places are empty."""
    place = np.random.default_rng(seed).integers(0, 5, len(rows))
    return [np.flatnonzero(place == number) for number in range(6)]


def rounds_of(rows: ScalarRows, terms: Terms, rounds: int, seed: int) -> list[tuple[Bracket, Grid | None]]:
    """The brackets of a search over several places, first to last."""
    places = split(rows, seed)
    names = np.array([f"id-{position:05d}" for position in range(len(rows))])
    tag_n = guesses.tags(names)
    bracket = first_bracket(terms)
    found: list[tuple[Bracket, Grid | None]] = [(bracket, None)]
    for _ in range(rounds):
        samples = [guesses.draw(rows.at(place), tag_n[place], bracket, terms) for place in places]
        grid = guesses.lay_grid(sum(samples[1:], samples[0]), bracket, terms)
        parts = [count(rows.at(place), bracket, grid, terms) for place in places]
        bracket = narrow(bracket, grid, sum(parts[1:], parts[0]), terms)
        found.append((bracket, grid))
    return found


def solved(rows: ScalarRows, terms: Terms, bracket: Bracket) -> tuple[np.ndarray, ThresholdSolution, int]:
    """Weights over all rows, the solution of the rest, and how many rows it decided."""
    state = classify(rows, bracket, terms)
    undecided = np.flatnonzero(state == 0)
    sure = rows.at(state == 1)
    sure_D = np.bincount(sure.group_n, sure.size_n, minlength=terms.groups)
    sure_cost = 0.0 if sure.cost_n is None else math.fsum(sure.cost_n)
    weights = (state == 1).astype(float)
    rest = rows.at(undecided)
    solution = solve_threshold(rest.gain_n, remaining(terms, sure_D, sure_cost, rest))
    weights[undecided] = solution.weights_n
    return weights, solution, len(undecided)


@pytest.fixture
def few_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples and histograms so coarse that a search over hundreds of rows needs its rounds."""
    monkeypatch.setattr(guesses, "SAMPLE_ROWS", 64)
    monkeypatch.setattr(guesses, "EDGES", 12)


@pytest.mark.usefixtures("few_edges")
@pytest.mark.parametrize("block", [*range(3), *(pytest.param(block, marks=pytest.mark.slow) for block in range(3, 12))])
def test_scattered_rows_have_the_same_optimum(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        rows, terms, feasible = instance(seed)
        whole = solve_threshold(rows.gain_n, feasible)
        if not whole.feasible:
            continue
        for bracket, _ in rounds_of(rows, terms, 3, seed):
            weights, rest, _ = solved(rows, terms, bracket)
            assert rest.feasible, seed
            # Both are optima; sums of n terms in another order differ by n roundings of the terms' size.
            scale = float(np.abs(rows.gain_n) @ np.maximum(weights, whole.weights_n)) + 1e-300
            assert float(rows.gain_n @ weights) == pytest.approx(whole.value, abs=1e-9 * scale), seed
            if not terms.positive:
                assert float(rows.size_n @ weights) == pytest.approx(terms.budget, abs=1e-6), seed
            unique = len(np.unique(rows.gain_n)) == len(rows) and (
                rows.cost_n is None or len(np.unique(rows.cost_n)) == len(rows)
            )
            differ = np.abs(weights - whole.weights_n) > 1e-6
            if terms.groups == 1:
                # Only rows that neither price decides: the solver ends at a gap of 1e-13 of all gains and costs.
                edge_n = keys(rows, whole.mu, per_size=True) * rows.size_n - whole.nu * rows.size_n
                spread = float(np.abs(rows.gain_n).sum())
                spread += 0.0 if rows.cost_n is None else whole.mu * float(rows.cost_n.sum())
                assert np.all(np.abs(edge_n[differ]) <= 1e-12 * spread), seed
            if terms.limit is None or (unique and np.ptp(rows.gain_n) < 1e6):
                assert not differ.any(), seed


@pytest.mark.usefixtures("few_edges")
def test_what_is_sure_is_so_in_the_optimum_of_the_whole() -> None:
    decided = 0
    for seed in range(2000, 2080):
        rows, terms, feasible = instance(seed)
        whole = solve_threshold(rows.gain_n, feasible)
        if not whole.feasible or len(np.unique(rows.gain_n)) < len(rows):
            continue
        for bracket, _ in rounds_of(rows, terms, 2, seed)[1:]:
            state = classify(rows, bracket, terms)
            assert np.all(whole.weights_n[state == 1] == 1.0), seed
            assert np.all(whole.weights_n[state == -1] == 0.0), seed
            if terms.limit is not None and whole.fractional.size == 2:
                # The price itself is a quotient of sums, each good to some hundred roundings.
                assert bracket.mu_low <= whole.mu * (1 + 1e-9) and whole.mu <= bracket.mu_high * (1 + 1e-9), seed
            decided += int((state != 0).sum())
    assert decided > 3_000


def test_three_rounds_leave_a_handful_of_many_rows() -> None:
    seen = 0
    for seed in range(30):
        rows, terms, _ = instance(seed, 60_000)
        if terms.limit is None or len(np.unique(rows.gain_n)) < 50_000:
            continue
        seen += 1
        if seen > 3:
            break
        left = [int((classify(rows, bracket, terms) == 0).sum()) for bracket, _ in rounds_of(rows, terms, 3, seed)]
        # A sample of 2^15 misses a threshold by about 1 / sqrt(2^15), or 0.6 % of the rows, and a price by as much.
        assert left[1] < 60_000 / 20 and left[3] < 60_000 / 100, left
    assert seen > 3


@pytest.mark.usefixtures("few_edges")
def test_histograms_and_samples_do_not_depend_on_the_order_of_places() -> None:
    rows, terms, _ = limited(5_000)
    names = np.array([f"id-{position:05d}" for position in range(len(rows))])
    tag_n = guesses.tags(names)
    bracket = first_bracket(terms)
    places = split(rows, 1)
    forward = [guesses.draw(rows.at(place), tag_n[place], bracket, terms) for place in places]
    one = sum(forward[1:], forward[0])
    other = sum(forward[-2::-1], forward[-1])
    grids = [guesses.lay_grid(sample, bracket, terms) for sample in (one, other)]
    assert np.array_equal(grids[0].mu_G, grids[1].mu_G) and np.array_equal(grids[0].edges_GDB, grids[1].edges_GDB)
    parts = [count(rows.at(place), bracket, grids[0], terms) for place in places]
    sums = [sum(parts[1:], parts[0]), sum(parts[-2::-1], parts[-1])]
    assert np.array_equal(sums[0].cost_GDB, sums[1].cost_GDB) and np.array_equal(sums[0].size_GDB, sums[1].size_GDB)
    # Every row is counted once at every price.
    assert np.all(sums[0].size_GDB.sum(axis=(1, 2)) == rows.size_n.sum())


def test_keys_are_those_of_the_solver_and_fall_with_the_price() -> None:
    rows, _, _ = limited(2_000)
    assert rows.cost_n is not None
    prices = np.sort(np.random.default_rng(0).exponential(size=20))
    table = np.stack([keys(rows, float(mu), per_size=True) for mu in prices])
    assert np.all(np.diff(table, axis=0) <= 0.0)
    assert np.array_equal(table[3], (rows.gain_n + rows.cost_n * -prices[3]) / rows.size_n)
