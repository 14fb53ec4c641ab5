from typing import Any

import numpy as np
import pytest

from selection_ops.selectors.rounding import fill_ranked, round_solution, within_limit
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold
from tests.reference.selection import linear_program


def instance(rng: np.random.Generator) -> tuple[np.ndarray, Any]:
    """Random problems, with ties, zeros, single rows, tight and impossible limits among them."""
    n = int(rng.choice([1, 2, 3, 5, 12, 40, 90]))
    tokens = rng.random() < 0.5
    c = rng.normal(size=n)
    cost = rng.gamma(0.5, size=n)
    shape = rng.random()
    if shape < 0.25:  # many ties in both
        c, cost = rng.integers(-2, 3, n).astype(float), rng.integers(0, 3, n).astype(float)
    elif shape < 0.35:
        c = np.zeros(n)
    elif shape < 0.45:
        cost = np.zeros(n)
    elif shape < 0.55:  # gains are costs: every price near 1 ties everything
        c = cost.copy()
    size = rng.integers(1, 9, n).astype(float) if tokens else np.ones(n)
    budget = float(rng.integers(1, int(size.sum()) + 1))
    equality = bool(rng.random() < 0.6)
    limit = float(cost.sum() * rng.choice([0.0, 0.02, 0.1, 0.3, 0.6, 1.0]) * budget / size.sum())
    return c, FeasibleSet(size_n=size, budget=budget, equality=equality, cost_n=cost, limit=limit)


def test_agrees_with_a_linear_program_solver() -> None:
    rng = np.random.default_rng(0)
    seen = {"infeasible": 0, "binding": 0, "free": 0}
    for _ in range(800):
        c, feasible = instance(rng)
        found = solve_threshold(c, feasible)
        expected = linear_program(
            c, feasible.size_n, feasible.budget, equality=feasible.equality, cost=feasible.cost_n, limit=feasible.limit
        )
        if expected is None:
            assert not found.feasible and found.smallest_limit > feasible.limit
            seen["infeasible"] += 1
            continue
        if not found.feasible:
            # HiGHS forgives violations of 1e-7; the exact answer does not.
            assert found.smallest_limit <= feasible.limit + 1e-6
            continue
        seen["binding" if found.mu > 0 else "free"] += 1
        w = found.weights_n
        # Gains are of order 1 and n <= 90; HiGHS meets constraints to 1e-7.
        assert found.value == pytest.approx(expected, abs=1e-6)
        assert w.min() >= 0.0 and w.max() <= 1.0
        assert feasible.cost_n @ w <= feasible.limit + 1e-9
        spent = feasible.size_n @ w
        assert (
            spent == pytest.approx(feasible.budget, abs=1e-9) if feasible.equality else spent <= feasible.budget + 1e-9
        )
        assert found.fractional.size <= 2
    assert min(seen.values()) > 50, seen


def test_weights_are_a_threshold_on_price() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        c, feasible = instance(rng)
        found = solve_threshold(c, feasible)
        if not found.feasible or not np.isfinite(found.nu):
            continue
        price = c - found.mu * feasible.cost_n - found.nu * feasible.size_n
        slack = 1e-9 * (1.0 + abs(found.mu) + abs(found.nu))
        assert (price[found.weights_n == 0.0] <= slack).all()
        assert (price[found.weights_n == 1.0] >= -slack).all()
        assert np.abs(price[found.fractional]).max(initial=0.0) <= slack


def test_two_fractional_weights_of_a_sample_budget_add_up_to_one() -> None:
    rng = np.random.default_rng(2)
    seen = 0
    for _ in range(200):
        n = 30
        feasible = FeasibleSet(size_n=np.ones(n), budget=10.0, cost_n=rng.random(n), limit=3.5)
        found = solve_threshold(rng.normal(size=n), feasible)
        if found.fractional.size:
            seen += 1
            assert found.fractional.size == 2
            assert found.weights_n[found.fractional].sum() == pytest.approx(1.0, abs=1e-9)
    assert seen > 50


def test_rounding_never_exceeds_limit_or_budget() -> None:
    rng = np.random.default_rng(3)
    for _ in range(800):
        c, feasible = instance(rng)
        found = solve_threshold(c, feasible)
        if not found.feasible or (feasible.equality and not np.all(feasible.size_n == 1.0)):
            continue
        chosen = round_solution(found, feasible)
        assert within_limit(chosen, feasible)
        assert feasible.cost_n @ chosen <= feasible.limit
        assert feasible.size_n @ chosen <= feasible.budget
        if feasible.equality:
            assert chosen.sum() == feasible.budget
        # At most the two fractional samples are lost.
        loss = np.sort(np.abs(c))[-2:].sum()
        assert c @ chosen >= found.value - loss - 1e-9


def test_limit_equal_to_the_cheapest_is_feasible_and_gives_the_best_of_the_cheapest() -> None:
    cost = np.array([1.0, 1.0, 1.0, 2.0])
    feasible = FeasibleSet(size_n=np.ones(4), budget=2.0, cost_n=cost, limit=2.0)
    found = solve_threshold(np.array([1.0, 3.0, 2.0, 9.0]), feasible)
    assert found.feasible and found.weights_n.tolist() == [0.0, 1.0, 1.0, 0.0]
    below = solve_threshold(np.ones(4), FeasibleSet(size_n=np.ones(4), budget=2.0, cost_n=cost, limit=1.999))
    assert not below.feasible and below.smallest_limit == 2.0


def test_ties_go_to_the_smaller_position() -> None:
    found = solve_threshold(np.array([1.0, 1.0, 1.0, 0.0]), FeasibleSet(size_n=np.ones(4), budget=2.0))
    assert found.weights_n.tolist() == [1.0, 1.0, 0.0, 0.0]
    tokens = FeasibleSet(size_n=np.array([2.0, 2.0, 2.0]), budget=4.0)
    assert solve_threshold(np.array([1.0, 1.0, 1.0]), tokens).weights_n.tolist() == [1.0, 1.0, 0.0]


def test_quotas_agree_with_a_linear_program_solver() -> None:
    rng = np.random.default_rng(4)
    infeasible = binding = 0
    for _ in range(300):
        n = int(rng.choice([4, 12, 40]))
        group = rng.integers(0, 3, n)
        size = rng.integers(1, 5, n).astype(float) if rng.random() < 0.5 else np.ones(n)
        budget = float(rng.integers(1, int(size.sum()) + 1))
        caps = np.where(rng.random(3) < 0.5, np.inf, np.floor(rng.random(3) * budget * 1.5))
        floors = np.where(rng.random(3) < 0.6, 0.0, np.floor(rng.random(3) * budget * 0.4))
        cost = rng.random(n)
        limit = float(cost.sum() * budget / size.sum() * rng.choice([0.5, 0.8, 2.0]))
        feasible = FeasibleSet(
            size_n=size,
            budget=budget,
            equality=bool(rng.random() < 0.5),
            cost_n=cost,
            limit=limit,
            group_n=group,
            caps_D=caps,
            floors_D=floors,
        )
        c = rng.normal(size=n)
        found = solve_threshold(c, feasible)
        expected = linear_program(
            c, size, budget, equality=feasible.equality, cost=cost, limit=limit, group=group, caps=caps, floors=floors
        )
        assert found.feasible == (expected is not None)
        if expected is None:
            infeasible += 1
            continue
        binding += found.mu > 0
        assert found.value == pytest.approx(expected, abs=1e-6)  # as above
        assert within_limit(round_solution(found, feasible), feasible)
    assert infeasible > 20 and binding > 20


def test_ranked_filling_passes_over_what_no_longer_fits() -> None:
    feasible = FeasibleSet(size_n=np.array([5.0, 9.0, 3.0, 2.0, 1.0]), budget=10.0, equality=False)
    assert fill_ranked(np.array([0, 1, 2, 3, 4]), feasible).tolist() == [0, 2, 3]
    assert fill_ranked(np.array([1, 0, 2, 3, 4]), feasible).tolist() == [1, 4]


def test_ranked_filling_meets_caps_and_floors() -> None:
    feasible = FeasibleSet(
        size_n=np.ones(6),
        budget=4.0,
        group_n=np.array([0, 0, 0, 0, 1, 2]),
        caps_D=np.array([2.0, np.inf, np.inf]),
        floors_D=np.array([0.0, 0.0, 1.0]),
    )
    assert fill_ranked(np.arange(6), feasible).tolist() == [0, 1, 4, 5]


def test_large_problems_are_solved_in_a_few_sorts() -> None:
    rng = np.random.default_rng(5)
    n = 200_000
    c, cost = rng.normal(size=n), rng.gamma(0.5, size=n)
    feasible: Any = FeasibleSet(size_n=np.ones(n), budget=n / 10, cost_n=cost, limit=0.1 * cost.mean() * n / 10)
    found = solve_threshold(c, feasible)
    assert found.feasible and found.fractional.size <= 2
    # Duality: c.w = mu limit + nu K + sum of positive surpluses, to 1e-10 of the value.
    surplus = np.clip(c - found.mu * cost - found.nu, 0.0, None).sum()
    assert found.value == pytest.approx(found.mu * feasible.limit + found.nu * feasible.budget + surplus, rel=1e-10)
