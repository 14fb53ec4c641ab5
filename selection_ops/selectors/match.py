"""The default selector: the set whose summed gradient points most exactly along the target's.

Shape legend: n samples of the pool, K sketch dimension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from selection_ops.selectors import rows
from selection_ops.selectors.base import Choice, Selector, selector
from selection_ops.selectors.blocks import all_fit, in_blocks
from selection_ops.selectors.greedy import greedy
from selection_ops.selectors.limit import limited
from selection_ops.selectors.ordering import best_first
from selection_ops.selectors.problem import Problem, gain_cosine, target_direction
from selection_ops.selectors.relaxed import Relaxed, SetCosine, best_set, bound_near, relaxed_optimum
from selection_ops.selectors.rounding import fill_ranked
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold


@selector("match")
class Match(Selector):
    """Greedy set cosine inside a shortlist; Frank-Wolfe first where the shortlist is too long for exact greedy.

    The set returned never has a smaller set cosine than the top of the pool by cosine under the same budget (where that
    top meets the stiff limit), and never a larger one than `bound`. A token budget is spent until no row fits; the bound
    then holds for all sets that spend at least as much as the set returned. Where the relaxed optimum alone fills the budget with
    more than `greedy_rows` rows, greedy only orders them, a block at a time.
    """

    needs_sketches = True

    def choose(self, problem: Problem) -> Choice:
        """See the class."""
        settings = problem.settings
        feasible, certificate = limited(problem)
        direction_K, gain_n, scale_n = target_direction(problem), gain_cosine(problem), problem.scale_n
        objective = SetCosine(direction_K)
        short_n = _shortlist(gain_n, feasible, settings.shortlist)
        long = len(short_n) > settings.greedy_rows
        relaxed: Relaxed | None = None
        if long or settings.bound or settings.fractional:
            spend = replace(feasible, equality=True, budget=min(feasible.budget, float(feasible.size_n.sum())))
            start = solve_threshold(gain_n, spend)
            if not start.feasible:
                spend, start = feasible, solve_threshold(gain_n, feasible)
            relaxed = relaxed_optimum(
                problem, spend, objective, gain_n * scale_n, scale_n, start, passes=settings.max_iterations
            )
        greedy_n = short_n
        if long and relaxed is not None:
            greedy_n = relaxed.likeliest(feasible, settings.greedy_rows)
        allowed = feasible.restricted(greedy_n)
        if len(greedy_n) > settings.greedy_rows and not settings.allow_short and all_fit(allowed):
            path = in_blocks(
                problem.unit_NK,
                problem.pool_n[greedy_n],
                scale_n[greedy_n],
                (gain_n * scale_n)[greedy_n],
                problem.square_n[greedy_n],
                objective,
            )
        else:
            path = greedy(
                rows.gather_rows(problem.unit_NK, problem.pool_n[greedy_n]),
                scale_n[greedy_n],
                (gain_n * scale_n)[greedy_n],
                allowed,
                objective,
                cut_at_peak=settings.allow_short,
            )
        order_n = greedy_n[path.order_m]
        order_n, chosen_by, top = self._best_of(problem, feasible, objective, gain_n, scale_n, order_n)
        weights_n = np.ones(len(order_n))
        if settings.fractional and relaxed is not None:
            order_n, weights_n = relaxed.fractional()
        reached = objective.value(problem.sum(order_n, weights_n, scale_n))
        certificate |= {
            "objective": reached,
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
                "bound": _bound(problem, feasible, relaxed, objective, gain_n, scale_n, order_n, weights_n, reached),
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
        objective: SetCosine,
        gain_n: np.ndarray,
        scale_n: np.ndarray,
        greedy_n: np.ndarray,
    ) -> tuple[np.ndarray, str, float]:
        """The greedy set, unless the top by cosine has a larger set cosine, or greedy could not fill the budget."""
        most = int(feasible.budget) if feasible.counts_samples else len(gain_n)
        top_n = fill_ranked(best_first(gain_n, most), feasible)
        proposals = {"greedy": greedy_n, "top by cosine": top_n}
        values, name = best_set(problem, feasible, objective, scale_n, proposals)
        if name is not None:
            return proposals[name], name, values["top by cosine"]
        cheaper_n = np.flatnonzero(solve_threshold(gain_n, feasible).cheaper_n == 1.0)
        cheaper_n = cheaper_n[np.argsort(-gain_n[cheaper_n], kind="stable")]
        return cheaper_n, "linear subproblem by cosine", values["top by cosine"]


def _shortlist(gain_n: np.ndarray, feasible: FeasibleSet, multiple: float) -> np.ndarray:
    """Positions of the best by cosine, in pool order: as many as `multiple` budgets hold, and more where a limit, a cap
    or a floor could not be met among them."""
    count = len(gain_n)
    if multiple == 0.0:
        return np.arange(count)
    if feasible.counts_samples:
        taken = int(multiple * feasible.budget)
    else:
        ranked_n = best_first(gain_n, count)
        taken = int(np.searchsorted(np.cumsum(feasible.size_n[ranked_n]), multiple * feasible.budget, side="right"))
    taken = max(1, taken)
    while taken < count:
        short_n = np.sort(best_first(gain_n, taken))
        if solve_threshold(gain_n[short_n], feasible.restricted(short_n)).feasible:
            return short_n
        taken = min(count, 2 * taken)
    return np.arange(count)


def _bound(
    problem: Problem,
    feasible: FeasibleSet,
    relaxed: Relaxed,
    objective: SetCosine,
    gain_n: np.ndarray,
    scale_n: np.ndarray,
    order_n: np.ndarray,
    weights_n: np.ndarray,
    reached: float,
) -> float:
    """The relaxed bound, over all sets that spend at least what the chosen one spends."""
    spent: Any = float(weights_n @ feasible.size_n[order_n])
    if feasible.equality and spent == feasible.budget:
        return relaxed.bound
    at_most = feasible.scaled(min(spent, feasible.budget))
    return bound_near(problem, at_most, objective, gain_n * scale_n, scale_n, relaxed.sum_K, at_least=max(reached, 0.0))
