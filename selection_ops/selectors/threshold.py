"""The exact linear subproblem that every selector with a budget comes down to.

    maximise c.w   subject to   w in [0, 1]^n,   size.w = budget (or <= budget),   cost.w <= limit,
                                floor_d <= sum over domain d of size_i w_i <= cap_d

Its optimum is w_i = 1[c_i - mu cost_i > nu size_i] with two multipliers and, without domains, at most two fractional
entries. For one mu the problem is a fractional knapsack, solved by sorting; mu is the minimiser of a convex piecewise
linear dual, found by intersecting the two lines that bracket it, which ends exactly. A few sorts of two scalars a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from selection_ops.selectors.seconds import spent

_MAX_CUTS = 200
_TIGHT = 1e-13
"""Relative gap of the dual at which two brackets count as one optimum: a few hundred float64 roundings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeasibleSet:
    """The weights that a selection may take. Positions are in the order in which ties are broken."""

    size_n: np.ndarray
    """What a whole sample takes of the budget: 1, or its tokens; positive, float64."""
    budget: float
    """Samples or tokens."""
    equality: bool = True
    """Whether the budget must be spent whole."""
    cost_n: np.ndarray | None = None
    """Stiff cost of a whole sample, non-negative; None without a stiff limit."""
    limit: float | None = None
    """Largest cost.w."""
    group_n: np.ndarray | None = None
    """Domain code of each sample; None without quotas."""
    caps_D: np.ndarray | None = None
    """Largest size of each domain, infinity where free."""
    floors_D: np.ndarray | None = None
    """Smallest size of each domain, 0 where free."""

    @cached_property
    def counts_samples(self) -> bool:
        """Whether a whole number of samples is to be chosen and nothing else matters, so that no order need be sorted out."""
        return self.group_n is None and self.budget == int(self.budget) and bool(np.all(self.size_n == 1.0))

    def scaled(self, budget: float) -> FeasibleSet:
        """The set spent to exactly `budget` (at most the present one), without floors.

        Any weights here that spend at least `budget` can be scaled down into the result, so a bound over the result on a
        function that ignores scale holds for all of those.
        """
        floors_D = None if self.floors_D is None else np.zeros_like(self.floors_D)
        return replace(self, budget=budget, equality=True, floors_D=floors_D)

    def restricted(self, index_n: np.ndarray) -> FeasibleSet:
        """The set of those weights that are zero outside the given positions, over these positions."""
        return replace(
            self,
            size_n=self.size_n[index_n],
            cost_n=None if self.cost_n is None else self.cost_n[index_n],
            group_n=None if self.group_n is None else self.group_n[index_n],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ThresholdSolution:
    """An optimum of the linear subproblem; `feasible` is False, and the weights are the cheapest, where there is none."""

    weights_n: np.ndarray
    """Optimal weights, float64."""
    cheaper_n: np.ndarray
    """The optimal vertex of the relaxed problem on the feasible side of the limit; integral apart from token remainders."""
    feasible: bool
    """Whether any weights meet the limit, the budget and the quotas together."""
    smallest_limit: float
    """The smallest limit for which there is a solution; 0 where no cost was given."""
    mu: float
    """Price of stiff cost."""
    nu: float
    """Price of the budget: gains at or below it, per unit of size, are not bought whole."""
    value: float
    """c.w"""
    cost: float
    """cost.w; 0 where no cost was given."""

    @property
    def fractional(self) -> np.ndarray:
        """Positions with a weight strictly between 0 and 1."""
        return np.flatnonzero((self.weights_n > 0.0) & (self.weights_n < 1.0))


@spent("threshold")
def solve_threshold(c_n: np.ndarray, feasible: FeasibleSet) -> ThresholdSolution:
    """The exact optimum for gains `c_n`; ties go to the smaller position. Source: direct.md section 2, LP duality.

    Never raises for an infeasible problem: the caller holds the policy. An equality budget larger than everything, a
    floor larger than its domain, or caps below the budget, are infeasible with `smallest_limit` infinite.
    """
    c_n = np.asarray(c_n, dtype=np.float64)
    size_n = feasible.size_n
    if not _can_spend(feasible):
        zeros = np.zeros_like(c_n)
        return ThresholdSolution(
            weights_n=zeros,
            cheaper_n=zeros,
            feasible=False,
            smallest_limit=float("inf"),
            mu=0.0,
            nu=0.0,
            value=0.0,
            cost=0.0,
        )
    best = _fill(c_n, feasible)
    cost_n, limit = feasible.cost_n, feasible.limit
    if cost_n is None or limit is None:
        return _solution(c_n, feasible, best, best, mu=0.0, smallest=0.0)
    cheap = _fill_cheapest(c_n, feasible)
    smallest = float(cost_n @ cheap)
    if smallest > limit:
        return replace(_solution(c_n, feasible, cheap, cheap, mu=0.0, smallest=smallest), feasible=False)
    if float(cost_n @ best) <= limit:
        return _solution(c_n, feasible, best, best, mu=0.0, smallest=smallest)

    # Invariant: `high` is dear (cost above the limit), `low` is cheap; both maximise c - mu cost for some mu.

    def measured(vertex_n: np.ndarray) -> tuple[float, float, float]:
        taken_n = np.flatnonzero(vertex_n)
        share_n, gain_n = vertex_n[taken_n], c_n[taken_n]
        return float(gain_n @ share_n), float(cost_n[taken_n] @ share_n), float(np.abs(gain_n) @ share_n)

    high, low, mu = best, cheap, 0.0
    at_high, at_low = measured(high), measured(low)
    price_n = np.empty_like(c_n)
    for _ in range(_MAX_CUTS):
        mu = max(0.0, (at_high[0] - at_low[0]) / (at_high[1] - at_low[1]))
        np.multiply(cost_n, -mu, out=price_n)
        price_n += c_n
        trial = _fill(price_n, feasible)
        at_trial = measured(trial)
        gap = (at_trial[0] - mu * at_trial[1]) - (at_high[0] - mu * at_high[1])
        if gap <= _TIGHT * (at_high[2] + at_low[2] + mu * (at_high[1] + at_low[1])):
            break
        if at_trial[1] > limit:
            high, at_high = trial, at_trial
        else:
            low, at_low = trial, at_trial
    if feasible.group_n is None:
        weights = _between(low, high, size_n, cost_n, limit)
    else:
        cost_low, cost_high = float(cost_n @ low), float(cost_n @ high)
        share = (limit - cost_low) / (cost_high - cost_low)
        weights = low + share * (high - low)
    return _solution(c_n, feasible, _snapped(weights), low, mu=mu, smallest=smallest)


def _solution(
    c_n: np.ndarray, feasible: FeasibleSet, weights_n: np.ndarray, low_n: np.ndarray, *, mu: float, smallest: float
) -> ThresholdSolution:
    cost_n = feasible.cost_n
    price_n = c_n if cost_n is None else c_n - mu * cost_n
    outside = weights_n < 1.0
    nu = float((price_n[outside] / feasible.size_n[outside]).max()) if outside.any() else -np.inf
    return ThresholdSolution(
        weights_n=weights_n,
        cheaper_n=low_n,
        feasible=True,
        smallest_limit=smallest,
        mu=mu,
        nu=nu if feasible.equality else max(nu, 0.0),
        value=float(c_n @ weights_n),
        cost=0.0 if cost_n is None else float(cost_n @ weights_n),
    )


def _can_spend(feasible: FeasibleSet) -> bool:
    size_n, budget = feasible.size_n, feasible.budget
    slack = 1e-9 * max(budget, 1.0)
    if feasible.group_n is None or feasible.caps_D is None or feasible.floors_D is None:
        return not feasible.equality or float(size_n.sum()) >= budget - slack
    held_D = np.bincount(feasible.group_n, weights=size_n, minlength=len(feasible.caps_D))
    most_D = np.minimum(held_D, feasible.caps_D)
    if np.any(feasible.floors_D > most_D + slack) or feasible.floors_D.sum() > budget + slack:
        return False
    return not feasible.equality or float(most_D.sum()) >= budget - slack


def _fill(price_n: np.ndarray, feasible: FeasibleSet) -> np.ndarray:
    """The fractional knapsack for one price: best price per unit of size first, floors before all, caps respected."""
    size_n, budget = feasible.size_n, feasible.budget
    if feasible.counts_samples:
        return _top(price_n, int(budget), positive=not feasible.equality)
    key_n = price_n / size_n
    wanted_n = np.ones(len(key_n), dtype=bool) if feasible.equality else key_n > 0.0
    return _fill_in_order(np.argsort(-key_n, kind="stable"), wanted_n, feasible)


def _fill_cheapest(c_n: np.ndarray, feasible: FeasibleSet) -> np.ndarray:
    """The weights of smallest cost, and among those of largest gain."""
    assert feasible.cost_n is not None
    if feasible.equality and feasible.counts_samples:
        return _cheapest(feasible.cost_n, c_n, int(feasible.budget))
    unit_cost_n, unit_gain_n = feasible.cost_n / feasible.size_n, c_n / feasible.size_n
    order = np.lexsort((-unit_gain_n, unit_cost_n))
    wanted_n = np.ones(len(c_n), dtype=bool) if feasible.equality else (feasible.cost_n == 0.0) & (unit_gain_n > 0.0)
    return _fill_in_order(order, wanted_n, feasible)


def _top(price_n: np.ndarray, count: int, *, positive: bool) -> np.ndarray:
    """1 at the `count` largest prices (only the positive ones on request), ties to the smaller position."""
    weights_n = np.zeros(len(price_n))
    if count >= len(price_n):
        weights_n[:] = 1.0
    elif count > 0:
        edge = -np.partition(-price_n, count - 1)[count - 1]
        above = price_n > edge
        weights_n[above] = 1.0
        ties = np.flatnonzero(price_n == edge)[: count - int(above.sum())]
        weights_n[ties] = 1.0
    if positive:
        weights_n[price_n <= 0.0] = 0.0
    return weights_n


def _cheapest(cost_n: np.ndarray, c_n: np.ndarray, count: int) -> np.ndarray:
    """1 at the `count` smallest costs; among equal ones at the largest gains, then at the smallest positions."""
    weights_n = np.zeros(len(cost_n))
    if count >= len(cost_n):
        weights_n[:] = 1.0
    elif count > 0:
        edge = np.partition(cost_n, count - 1)[count - 1]
        below = cost_n < edge
        weights_n[below] = 1.0
        ties = np.flatnonzero(cost_n == edge)
        ties = ties[np.argsort(-c_n[ties], kind="stable")]
        weights_n[ties[: count - int(below.sum())]] = 1.0
    return weights_n


def _fill_in_order(order: np.ndarray, wanted_n: np.ndarray, feasible: FeasibleSet) -> np.ndarray:
    size_n, left = feasible.size_n, feasible.budget
    taken_n = np.zeros(len(size_n))
    allowed_n = np.where(wanted_n, size_n, 0.0)
    if feasible.group_n is not None and feasible.caps_D is not None and feasible.floors_D is not None:
        for code in range(len(feasible.caps_D)):
            members = order[feasible.group_n[order] == code]
            floor, cap = feasible.floors_D[code], feasible.caps_D[code]
            taken_n[members] = _pour(size_n[members], floor)
            rest = np.where(wanted_n[members], size_n[members] - taken_n[members], 0.0)
            allowed_n[members] = _pour(rest, cap - taken_n[members].sum())
        left = left - taken_n.sum()
    taken_n[order] += _pour(allowed_n[order], left)
    # The quotient of a size by itself is exactly 1, but a sum of two pours need not be.
    return _snapped(taken_n / size_n)


def _pour(room: np.ndarray, amount: float) -> np.ndarray:
    """Fill vessels in order until `amount` is used up."""
    before = np.cumsum(room) - room
    return np.clip(amount - before, 0.0, room)


def _snapped(weights_n: np.ndarray) -> np.ndarray:
    weights_n = np.clip(weights_n, 0.0, 1.0)
    weights_n[weights_n < 1e-12] = 0.0
    weights_n[weights_n > 1.0 - 1e-12] = 1.0
    return weights_n


def _between(low: np.ndarray, high: np.ndarray, size_n: np.ndarray, cost_n: np.ndarray, limit: float) -> np.ndarray:
    """Weights of cost exactly `limit` between two optima of the same price, with at most two fractional entries.

    Where the optima differ, every sample is tied at the price, so any weights there with the same totals are optimal.
    Laid side by side by cost per size, a window that slides from the cheap end to the dear end passes continuously
    through every cost between them and cuts at most the two samples at its ends.
    """
    free = np.flatnonzero((low != high) | ((low > 0.0) & (low < 1.0)) | ((high > 0.0) & (high < 1.0)))
    free = free[np.argsort(cost_n[free] / size_n[free], kind="stable")]
    size, density = size_n[free], cost_n[free] / size_n[free]
    edges = np.concatenate([[0.0], np.cumsum(size)])
    dense = np.concatenate([[0.0], np.cumsum(size * density)])
    total = edges[-1]
    mass_low, mass_high = float(size @ low[free]), float(size @ high[free])
    fixed = np.ones(len(low), dtype=bool)
    fixed[free] = False
    target = limit - float(cost_n[fixed] @ low[fixed])

    def window(step: float) -> tuple[float, float]:
        return step * (total - mass_high), mass_low + step * (total - mass_low)

    def cost_at(step: float) -> float:
        begin, end = window(step)
        return float(np.interp(end, edges, dense) - np.interp(begin, edges, dense))

    # Both ends move linearly, so the cost is linear between the steps at which an end crosses an edge.
    steps = [np.array([0.0, 1.0])]
    if total > mass_high:
        steps.append(edges / (total - mass_high))
    if total > mass_low:
        steps.append((edges - mass_low) / (total - mass_low))
    grid = np.unique(np.clip(np.concatenate(steps), 0.0, 1.0))
    begin, end = grid * (total - mass_high), mass_low + grid * (total - mass_low)
    costs = np.interp(end, edges, dense) - np.interp(begin, edges, dense)
    above = np.flatnonzero(costs >= target)
    if not above.size:
        step = 1.0
    elif above[0] == 0:
        step = 0.0
    else:
        right = int(above[0])
        rise = costs[right] - costs[right - 1]
        part = (target - costs[right - 1]) / rise if rise > 0.0 else 0.0
        step = float(grid[right - 1] + part * (grid[right] - grid[right - 1]))
    begin_at, end_at = window(step)
    weights = low.copy()
    weights[free] = np.clip(np.minimum(end_at, edges[1:]) - np.maximum(begin_at, edges[:-1]), 0.0, size) / size
    return weights
