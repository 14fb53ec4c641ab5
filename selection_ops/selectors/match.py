"""The default selector: the set whose summed gradient points most exactly along the target's.

Shape legend: n samples of the pool, m rows of the shortlist, K sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from selection_ops.selectors import rows
from selection_ops.selectors.base import Choice, Selector, selector
from selection_ops.selectors.limit import limited
from selection_ops.selectors.problem import Problem, gain_cosine, target_direction
from selection_ops.selectors.relaxed import Relaxed, bound_near, cosine_of, relaxed_optimum
from selection_ops.selectors.rounding import fill_ranked, within_limit
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold

COLUMN_BATCH = 32
"""Gram columns computed at once: reading the shortlist's rows costs as much for one column as for these."""
COLUMN_BYTES = 1 << 29
"""Gram columns kept for later additions; the oldest go first."""
MIN_WEIGHT = 1e-3
"""Relaxed weights below this are dropped."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Path:
    """A greedy run over rows of a shortlist."""

    order_m: np.ndarray
    """Rows in the order of addition."""
    objective: list[float]
    """Set cosine after each addition."""
    square_m: np.ndarray
    """||s||^2 after each addition."""


def greedy(
    unit_mK: torch.Tensor,
    scale_m: np.ndarray,
    gain_m: np.ndarray,
    feasible: FeasibleSet,
    *,
    cut_at_peak: bool = False,
) -> Path:
    """Add, one at a time, the row that makes the set cosine largest, while the feasible set allows one.

        argmax_j (<s, g> + <z_j, g>) / sqrt(||s||^2 + 2 <s, z_j> + ||z_j||^2)

    unit_mK: float32 rows; scale_m: z = scale * row; gain_m: <row, g> for the unit direction g. Ties go to the smaller
    row. <s, z_j> is kept for every row in float64 and updated by one Gram column an addition; columns are computed for
    the likeliest next rows together. `cut_at_peak` keeps the path up to its largest objective. Source: selection.md section 2.
    """
    count = len(scale_m)
    norm_sq_m = torch.linalg.vecdot(unit_mK, unit_mK).numpy().astype(np.float64) * scale_m**2
    alpha_m = gain_m * scale_m
    cross_m = np.zeros(count)
    guard = _Guard(feasible, count)
    columns: dict[int, np.ndarray] = {}
    total, square = 0.0, 0.0
    order: list[int] = []
    objective: list[float] = []
    squares: list[float] = []
    up, down, value_m = np.empty(count), np.empty(count), np.empty(count)
    while True:
        open_m = guard.open()
        if not open_m.any():
            break
        np.add(alpha_m, total, out=up)
        np.multiply(cross_m, 2.0, out=down)
        np.add(down, norm_sq_m, out=down)
        np.add(down, square, out=down)
        # A sum that cancels, or a zero row first, has no direction: cosine 0.
        value_m[:] = 0.0
        np.sqrt(down, out=value_m, where=down > 0.0)
        np.divide(up, value_m, out=value_m, where=value_m > 0.0)
        value_m[~open_m] = -np.inf
        best = int(value_m.argmax())
        if best not in columns:
            likely = np.argpartition(-value_m, min(COLUMN_BATCH, count - 1))[:COLUMN_BATCH]
            wanted = [best] + [int(j) for j in likely if open_m[j] and j != best and int(j) not in columns]
            wanted = wanted[:COLUMN_BATCH]
            for j, column in zip(wanted, (unit_mK[wanted] @ unit_mK.T).numpy(), strict=True):
                columns[j] = column.copy()
            while len(columns) * count * 4 > COLUMN_BYTES and next(iter(columns)) != best:
                columns.pop(next(iter(columns)))
        cross_m += (columns.pop(best).astype(np.float64) * scale_m) * scale_m[best]
        total, square = float(up[best]), float(down[best])
        order.append(best)
        objective.append(float(value_m[best]))
        squares.append(square)
        guard.take(best)
    kept = int(np.argmax(objective)) + 1 if cut_at_peak and order else len(order)
    order, objective, squares = order[:kept], objective[:kept], squares[:kept]
    return Path(order_m=np.array(order, dtype=np.int64), objective=objective, square_m=np.array(squares))


class _Guard:
    """Which rows may still be added, so that the rest of the budget can always be spent within the limit."""

    def __init__(self, feasible: FeasibleSet, count: int) -> None:
        self.feasible = feasible
        self.left = feasible.budget
        self.free = np.ones(count, dtype=bool)
        self.spent = 0.0
        self.cost_order: np.ndarray | None = None
        if feasible.cost_n is not None and feasible.limit is not None:
            self.cost_order = np.argsort(feasible.cost_n, kind="stable")
        self.used_D = None if feasible.caps_D is None else np.zeros(len(feasible.caps_D))

    def open(self) -> np.ndarray:
        """Rows that fit."""
        feasible = self.feasible
        open_m = self.free & (feasible.size_n <= self.left + 1e-9)
        if self.used_D is not None and feasible.caps_D is not None and feasible.floors_D is not None:
            group = feasible.group_n
            assert group is not None
            open_m &= (self.used_D[group] + feasible.size_n) <= feasible.caps_D[group] + 1e-9
            owed_D = np.maximum(feasible.floors_D - self.used_D, 0.0)
            if owed_D.sum() > 0.0:
                # What a row takes beyond what its own domain is owed may not eat into what the others are.
                beyond_m = np.maximum(feasible.size_n - owed_D[group], 0.0)
                kept_m = open_m & (beyond_m <= self.left - owed_D.sum() + 1e-9)
                owed_m = open_m & (owed_D[group] > 0.0)
                open_m = kept_m if kept_m.any() else owed_m if owed_m.any() else open_m
        if self.cost_order is not None and feasible.cost_n is not None and feasible.limit is not None:
            open_m &= self._affordable()
        return open_m

    def _affordable(self) -> np.ndarray:
        feasible, order = self.feasible, self.cost_order
        assert feasible.cost_n is not None and feasible.limit is not None and order is not None
        room = feasible.limit - self.spent
        cost_m = feasible.cost_n
        rest = round(self.left) - 1 if feasible.equality else 0
        if rest <= 0:
            return cost_m <= room
        # The cheapest way to fill the rest. A row that belongs to it is always affordable, and counting it twice gives
        # at most what the row after them would cost, so it is not refused either.
        cheap = order[self.free[order]][:rest]
        with_rest = cost_m + float(cost_m[cheap].sum())
        # Equal sums in another order differ by roundings; the last word has `within_limit`.
        return with_rest <= room + 1e-12 * feasible.limit

    def take(self, row: int) -> None:
        """Spend a row."""
        feasible = self.feasible
        self.free[row] = False
        self.left -= float(feasible.size_n[row])
        if feasible.cost_n is not None:
            self.spent += float(feasible.cost_n[row])
        if self.used_D is not None and feasible.group_n is not None:
            self.used_D[feasible.group_n[row]] += float(feasible.size_n[row])


@selector("match")
class Match(Selector):
    """Greedy set cosine inside a shortlist; Frank-Wolfe first where the shortlist is too long for exact greedy.

    The set returned never has a smaller set cosine than the top of the pool by cosine under the same budget (where that
    top meets the stiff limit), and never a larger one than `bound`. A token budget is spent until no row fits; the bound
    then holds for all sets that spend at least as much as the set returned.
    """

    needs_sketches = True

    def choose(self, problem: Problem) -> Choice:
        """See the class."""
        settings = problem.settings
        feasible, certificate = limited(problem)
        direction_K, gain_n, scale_n = target_direction(problem), gain_cosine(problem), problem.scale_n
        short_n = _shortlist(gain_n, feasible, settings.shortlist)
        long = len(short_n) > settings.greedy_rows
        relaxed: Relaxed | None = None
        if long or settings.bound or settings.fractional:
            spend = replace(feasible, equality=True, budget=min(feasible.budget, float(feasible.size_n.sum())))
            spend = spend if solve_threshold(gain_n, spend).feasible else feasible
            relaxed = relaxed_optimum(problem, spend, direction_K, gain_n, scale_n, passes=settings.max_iterations)
        greedy_n = short_n
        if long and relaxed is not None:
            greedy_n = _proposed(relaxed, feasible, settings.greedy_rows)
        path = greedy(
            rows.gather_rows(problem.unit_NK, problem.pool_n[greedy_n]),
            scale_n[greedy_n],
            gain_n[greedy_n],
            _restricted(feasible, greedy_n),
            cut_at_peak=settings.allow_short,
        )
        order_n = greedy_n[path.order_m]
        order_n, chosen_by, top = self._best_of(problem, feasible, direction_K, gain_n, scale_n, order_n)
        weights_n = np.ones(len(order_n))
        if settings.fractional and relaxed is not None:
            order_n, weights_n = _fractional(relaxed)
        sum_K = problem.sum(order_n, weights_n, scale_n)
        objective = cosine_of(sum_K, direction_K)
        certificate |= {
            "objective": objective,
            "objective_top_cosine": top,
            "chosen_by": chosen_by if not settings.fractional else "relaxed weights",
            "shortlist": len(short_n),
            "shortlist_of": len(gain_n),
            "greedy_rows": len(greedy_n),
            "greedy_steps": len(path.order_m),
        }
        if relaxed is not None:
            certificate |= {
                "objective_per_iteration": relaxed.objective,
                "objective_relaxed": relaxed.objective[-1],
                "fractional": int(((relaxed.weights_n > 0) & (relaxed.weights_n < 1)).sum()),
                "mu": relaxed.mu,
                "nu": relaxed.nu if np.isfinite(relaxed.nu) else None,
                "bound": _bound(
                    problem, feasible, relaxed, direction_K, gain_n, scale_n, order_n, weights_n, objective
                ),
            }
        if settings.fractional:
            certificate["weight_sum"] = float(weights_n.sum())
            certificate["size_sum"] = float(weights_n @ feasible.size_n[order_n])
        if feasible.cost_n is not None:
            certificate["cost"] = float(feasible.cost_n[order_n] @ weights_n)
        outside_n = np.ones(len(gain_n), dtype=bool)
        outside_n[short_n] = False
        scores = {"score": gain_n, "gain": gain_n * scale_n}
        if relaxed is not None:
            scores["relaxed_weight"] = relaxed.weights_n
        if feasible.cost_n is not None:
            scores["stiff_cost"] = feasible.cost_n
        return Choice(
            order_n=order_n,
            weights_n=weights_n,
            scores=scores,
            certificate=certificate,
            outside_n=outside_n,
            path_n=greedy_n[path.order_m],
            path_square_n=path.square_m,
        )

    def _best_of(
        self,
        problem: Problem,
        feasible: FeasibleSet,
        direction_K: torch.Tensor,
        gain_n: np.ndarray,
        scale_n: np.ndarray,
        greedy_n: np.ndarray,
    ) -> tuple[np.ndarray, str, float]:
        """The greedy set, unless the top by cosine has a larger set cosine, or greedy could not fill the budget."""
        top_n = fill_ranked(_ranked(gain_n), feasible)
        proposals = [
            (cosine, name, order_n)
            for name, order_n in (("greedy", greedy_n), ("top by cosine", top_n))
            for cosine in [cosine_of(problem.sum(order_n, np.ones(len(order_n)), scale_n), direction_K)]
        ]
        valid = [proposal for proposal in proposals if _meets(proposal[2], feasible)]
        if valid:
            _, name, order_n = max(valid, key=lambda proposal: proposal[0])
            return order_n, name, proposals[1][0]
        cheaper_n = np.flatnonzero(solve_threshold(gain_n, feasible).cheaper_n == 1.0)
        cheaper_n = cheaper_n[np.argsort(-gain_n[cheaper_n], kind="stable")]
        return cheaper_n, "linear subproblem by cosine", proposals[1][0]


def _meets(order_n: np.ndarray, feasible: FeasibleSet) -> bool:
    """Whether whole samples spend the budget as they must and stay within the limit."""
    chosen_n = np.zeros(len(feasible.size_n), dtype=bool)
    chosen_n[order_n] = True
    full = not feasible.equality or len(order_n) == int(feasible.budget)
    return full and within_limit(chosen_n, feasible)


def _ranked(gain_n: np.ndarray) -> np.ndarray:
    return np.argsort(-gain_n, kind="stable")


def _shortlist(gain_n: np.ndarray, feasible: FeasibleSet, multiple: float) -> np.ndarray:
    """Positions of the best by cosine, in pool order: as many as `multiple` budgets hold, and more where a limit, a cap
    or a floor could not be met among them."""
    count = len(gain_n)
    if multiple == 0.0:
        return np.arange(count)
    ranked_n = _ranked(gain_n)
    taken = int(np.searchsorted(np.cumsum(feasible.size_n[ranked_n]), multiple * feasible.budget, side="right"))
    taken = max(1, taken)
    while taken < count:
        short_n = np.sort(ranked_n[:taken])
        if solve_threshold(gain_n[short_n], _restricted(feasible, short_n)).feasible:
            return short_n
        taken = min(count, 2 * taken)
    return np.arange(count)


def _restricted(feasible: FeasibleSet, index_n: np.ndarray) -> FeasibleSet:
    return replace(
        feasible,
        size_n=feasible.size_n[index_n],
        cost_n=None if feasible.cost_n is None else feasible.cost_n[index_n],
        group_n=None if feasible.group_n is None else feasible.group_n[index_n],
    )


def _proposed(relaxed: Relaxed, feasible: FeasibleSet, most: int) -> np.ndarray:
    """The rows that exact greedy decides among: three budgets of the largest weights, then of the largest prices."""
    ranked_n = np.lexsort((-relaxed.price_n, -relaxed.weights_n))
    sizes = np.cumsum(feasible.size_n[ranked_n])
    one, three = (int(np.searchsorted(sizes, times * feasible.budget, side="right")) for times in (1.0, 3.0))
    return np.sort(ranked_n[: max(1, one, min(three, most))])


def _fractional(relaxed: Relaxed) -> tuple[np.ndarray, np.ndarray]:
    position_n = np.flatnonzero(relaxed.weights_n >= MIN_WEIGHT)
    position_n = position_n[np.lexsort((-relaxed.price_n[position_n], -relaxed.weights_n[position_n]))]
    return position_n, relaxed.weights_n[position_n]


def _bound(
    problem: Problem,
    feasible: FeasibleSet,
    relaxed: Relaxed,
    direction_K: torch.Tensor,
    gain_n: np.ndarray,
    scale_n: np.ndarray,
    order_n: np.ndarray,
    weights_n: np.ndarray,
    objective: float,
) -> float:
    """The relaxed bound, over all sets that spend at least what the chosen one spends."""
    spent: Any = float(weights_n @ feasible.size_n[order_n])
    if feasible.equality and spent == feasible.budget:
        return relaxed.bound
    at_most = feasible.scaled(min(spent, feasible.budget))
    return bound_near(problem, at_most, direction_K, gain_n, scale_n, relaxed.sum_K, at_least=max(objective, 0.0))
