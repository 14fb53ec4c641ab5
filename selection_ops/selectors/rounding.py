"""From fractional weights to whole samples, without ever exceeding a limit.

Shape legend: n samples of the pool.
"""

from __future__ import annotations

import numpy as np

from selection_ops.selectors.threshold import FeasibleSet, ThresholdSolution


def round_solution(solution: ThresholdSolution, feasible: FeasibleSet) -> np.ndarray:
    """Whole samples near an optimum of the linear subproblem; bool [n], within budget, limit and caps.

    Equal sizes and a budget to be spent whole: the two fractional entries add up to one, and the one of smaller cost is
    kept. Otherwise (tokens, or a budget that may be left over) both are dropped. With quotas, or where rounding of
    floating point would still break the limit, the whole samples of the cheaper optimal vertex are taken.
    """
    weights_n = solution.weights_n
    chosen_n = weights_n == 1.0
    fractional = solution.fractional
    sample_budget = bool(np.all(feasible.size_n == 1.0))
    if feasible.group_n is not None and fractional.size:
        chosen_n = solution.cheaper_n == 1.0
    elif sample_budget and feasible.equality and fractional.size:
        missing = round(feasible.budget) - int(chosen_n.sum())
        cost = np.zeros(len(weights_n)) if feasible.cost_n is None else feasible.cost_n
        chosen_n[fractional[np.argsort(cost[fractional], kind="stable")][:missing]] = True
    if not within_limit(chosen_n, feasible):
        chosen_n = solution.cheaper_n == 1.0
    return chosen_n


def within_limit(chosen_n: np.ndarray, feasible: FeasibleSet) -> bool:
    """Whether whole samples meet the stiff limit."""
    if feasible.cost_n is None or feasible.limit is None:
        return True
    return float(feasible.cost_n @ chosen_n.astype(np.float64)) <= feasible.limit


def meets(order_n: np.ndarray, feasible: FeasibleSet) -> bool:
    """Whether whole samples spend the budget as they must, stay within the limit and reach the floors to within a sample."""
    chosen_n = np.zeros(len(feasible.size_n), dtype=bool)
    chosen_n[order_n] = True
    full = not feasible.equality or len(order_n) == int(feasible.budget)
    return full and within_limit(chosen_n, feasible) and _reaches_floors(order_n, feasible)


def _reaches_floors(order_n: np.ndarray, feasible: FeasibleSet) -> bool:
    if feasible.group_n is None or feasible.floors_D is None:
        return True
    held_D = np.bincount(feasible.group_n[order_n], feasible.size_n[order_n], minlength=len(feasible.floors_D))
    largest_D = np.zeros(len(held_D))
    np.maximum.at(largest_D, feasible.group_n, feasible.size_n)
    return bool(np.all((feasible.floors_D <= held_D) | (feasible.floors_D - held_D < largest_D)))


def fill_ranked(order_n: np.ndarray, feasible: FeasibleSet) -> np.ndarray:
    """Positions taken in the order given while they fit the budget and the caps; floors are served first.

    A sample that no longer fits is passed over, so that a token budget is spent as far as the ranking allows.
    """
    size_n = feasible.size_n
    if feasible.group_n is None or feasible.caps_D is None or feasible.floors_D is None:
        return _first_fit(order_n, size_n, feasible.budget)
    group = feasible.group_n[order_n]
    reserved = np.zeros(len(size_n), dtype=bool)
    for code in np.flatnonzero(feasible.floors_D > 0.0):
        members = order_n[group == code]
        reserved[members[: int(np.searchsorted(np.cumsum(size_n[members]), feasible.floors_D[code], side="right"))]] = (
            True
        )
    left = feasible.budget - float(size_n[reserved].sum())
    room_D = feasible.caps_D - np.bincount(feasible.group_n[reserved], size_n[reserved], minlength=len(feasible.caps_D))
    taken = reserved.copy()
    for position in order_n:
        if left <= 0.0:
            break
        code = feasible.group_n[position]
        if not taken[position] and size_n[position] <= min(left, room_D[code]):
            taken[position] = True
            left -= size_n[position]
            room_D[code] -= size_n[position]
    return order_n[taken[order_n]]


def _first_fit(order_n: np.ndarray, size_n: np.ndarray, budget: float) -> np.ndarray:
    taken: list[np.ndarray] = []
    rest, left = order_n, budget
    while rest.size and left > 0.0:
        rest = rest[size_n[rest] <= left]
        count = int(np.searchsorted(np.cumsum(size_n[rest]), left, side="right"))
        if count == 0:
            break
        taken.append(rest[:count])
        left -= float(size_n[rest[:count]].sum())
        rest = rest[count:]
    return np.concatenate(taken) if taken else order_n[:0]
