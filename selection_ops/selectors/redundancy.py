"""The gain of a set less a price on its redundancy, over whole samples.

    maximise  F(w) = <s, g> - (rho / 2) ||s||^2,   s = G w = sum_i w_i z_i,   w in a feasible set,   ||g|| = 1

z_i are the rows that the gain counts: unit sketches, or with `rows = sum` the unit sketch x sketch_norm. Samples that point
the same way add up in ||s||^2 and samples that complement each other do not, so what a set already has is bought again at a
lower price. F is concave: Frank-Wolfe ends in the optimum, and F(w) plus the gap max over v of <grad F(w), v - w> bounds
every set.

rho = redundancy x <s0, g> / ||s0||^2 with s0 the optimum without the price. This has no unit: neither longer sketches nor a larger
budget change what a redundancy means. At 1, more of s0 itself is worth nothing, and the price of a sample beside s0,
<z_i, g - f s0 / ||s0||> with f its cosine, is the one that `match` has there.

Shape legend: n samples of the pool, K sketch dimension. Source: direct.md section 4 (`-1/2 rho ||G w||^2`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from selection_ops.selectors import rows
from selection_ops.selectors.base import Choice
from selection_ops.selectors.greedy import greedy
from selection_ops.selectors.problem import Problem, target_direction
from selection_ops.selectors.relaxed import Pass, Relaxed, best_set, dot_rounding, relaxed_optimum
from selection_ops.selectors.rounding import round_solution
from selection_ops.selectors.threshold import FeasibleSet, ThresholdSolution, solve_threshold

TOLERANCE = 1e-4
"""Frank-Wolfe gap, over the gain of the optimum without the price, at which the relaxed optimum counts as found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PenalisedGain:
    """F(s) = <s, g> - (rho / 2) ||s||^2."""

    direction_K: torch.Tensor
    """g, of norm 1."""
    rho: float
    """Price of redundancy; not negative."""
    tolerance: float
    """Gap at which the optimum counts as found, in units of F."""
    per_size: bool = True

    def value(self, sum_K: torch.Tensor) -> float:
        """See the class."""
        return float(sum_K @ self.direction_K) - 0.5 * self.rho * float(sum_K @ sum_K)

    def values(self, gain_n: np.ndarray, square_n: np.ndarray, out: np.ndarray) -> None:
        """See the class."""
        np.multiply(square_n, -0.5 * self.rho, out=out)
        np.add(out, gain_n, out=out)

    def slope(self, sum_K: torch.Tensor) -> float:
        """rho ||s||: the gradient is g - rho s."""
        return self.rho * float(sum_K.norm())

    def step(self, sum_K: torch.Tensor, move_K: torch.Tensor) -> float:
        """The vertex of a parabola, clipped to [0, 1]."""
        rise = float(move_K @ self.direction_K) - self.rho * float(sum_K @ move_K)
        fall = self.rho * float(move_K @ move_K)
        if rise <= 0.0:
            return 0.0
        return min(1.0, rise / fall) if fall > 0.0 else 1.0

    def bound(self, at: Pass) -> float:
        """F plus the Frank-Wolfe gap, plus what float32 dot products may be off in both."""
        vertex_n = at.vertex.weights_n
        gap = float(at.price_n @ (vertex_n - at.weights_n))
        return self.bound_of(at.sum_K, gap=gap, size=float(at.scale_n @ (vertex_n + at.weights_n)))

    def bound_of(self, sum_K: torch.Tensor, *, gap: float, size: float) -> float:
        """The same from sums over the pool: price.(vertex - weights), and scale.(vertex + weights)."""
        rounding = dot_rounding(sum_K) * (1.0 + self.slope(sum_K)) * size
        return self.value(sum_K) + max(0.0, gap) + rounding


def choose_penalised(
    problem: Problem,
    feasible: FeasibleSet,
    plain: ThresholdSolution,
    plain_n: np.ndarray,
    alpha_n: np.ndarray,
    certificate: dict[str, Any],
) -> Choice:
    """The set of largest penalised gain among: greedy on the likeliest rows of the relaxed optimum, the whole samples
    nearest to it, and the optimum without the price. None exceeds the limit, and none falls below the last.

    plain: that optimum, and plain_n its whole samples (bool [n]); alpha_n: <z_i, g>. `certificate` holds what is known of the
    limit and gains the rest; `frank_wolfe_gap` is bound less relaxed objective, in units of the objective.
    """
    settings, scale_n = problem.settings, problem.scale_n
    position_n = np.flatnonzero(plain.weights_n)
    start_K = problem.sum(position_n, plain.weights_n[position_n], scale_n)
    objective = _objective(problem, start_K)
    relaxed = relaxed_optimum(problem, feasible, objective, alpha_n, scale_n, plain, passes=settings.max_iterations)
    cost_n = np.zeros(len(alpha_n)) if feasible.cost_n is None else feasible.cost_n
    score_n = (relaxed.price_n - relaxed.mu * cost_n) / feasible.size_n
    proposals = {
        "greedy": _greedy(problem, feasible, objective, relaxed, alpha_n - relaxed.mu * cost_n),
        "nearest to the relaxed weights": _ranked(nearest_samples(relaxed, feasible), score_n),
        "without redundancy": _ranked(plain_n, score_n),
    }
    values, name = best_set(problem, feasible, objective, scale_n, proposals)
    # A floor and a limit can leave every rounding short of the budget; what the selector returns without the price stands.
    name = name or "without redundancy"
    order_n, weights_n = proposals[name], np.ones(len(proposals[name]))
    if settings.fractional:
        name, (order_n, weights_n) = "relaxed weights", relaxed.fractional()
    sum_K = problem.sum(order_n, weights_n, scale_n)
    gap = max(0.0, relaxed.bound - relaxed.objective[-1])
    gain = float(start_K @ objective.direction_K)
    certificate |= {
        "mu": relaxed.mu,
        "nu": relaxed.nu if np.isfinite(relaxed.nu) else None,
        "fractional": int(((relaxed.weights_n > 0.0) & (relaxed.weights_n < 1.0)).sum()),
        "weight_sum": float(relaxed.weights_n.sum()),
        "cost": None if feasible.cost_n is None else float(cost_n[order_n] @ weights_n),
        "cost_fractional": float(cost_n @ relaxed.weights_n),
        "redundancy_rho": objective.rho,
        "objective_per_iteration": relaxed.objective,
        "objective_relaxed": relaxed.objective[-1],
        "objective": objective.value(sum_K),
        "objective_without_redundancy": values["without redundancy"],
        "bound": relaxed.bound,
        "frank_wolfe_gap": gap,
        "frank_wolfe_gap_share": gap / gain if gain > 0.0 else None,
        "gain": float(sum_K @ objective.direction_K),
        "sum_norm": float(sum_K.norm()),
        "sum_norm_relaxed": float(relaxed.sum_K.norm()),
        "chosen_by": name,
        "filled_without_gain": int((alpha_n[order_n] <= 0.0).sum()),
    }
    scores = {"score": score_n, "gain": alpha_n, "relaxed_weight": relaxed.weights_n}
    if feasible.cost_n is not None:
        scores["stiff_cost"] = cost_n
    return Choice(order_n=order_n, weights_n=weights_n, scores=scores, certificate=certificate)


def _objective(problem: Problem, start_K: torch.Tensor) -> PenalisedGain:
    direction_K = target_direction(problem)
    gain, square = float(start_K @ direction_K), float(start_K @ start_K)
    # Without a gain there is nothing that a price could be measured by.
    rho = problem.settings.redundancy * gain / square if gain > 0.0 else 0.0
    return PenalisedGain(direction_K=direction_K, rho=rho, tolerance=TOLERANCE * max(gain, 0.0))


def _greedy(
    problem: Problem, feasible: FeasibleSet, objective: PenalisedGain, relaxed: Relaxed, priced_n: np.ndarray
) -> np.ndarray:
    """Greedy on gains less the relaxed optimum's price of stiff cost, so that the limit is spent where it buys most."""
    likely_n = relaxed.likeliest(feasible, problem.settings.greedy_rows)
    path = greedy(
        rows.gather_rows(problem.unit_NK, problem.pool_n[likely_n]),
        problem.scale_n[likely_n],
        priced_n[likely_n],
        feasible.restricted(likely_n),
        objective,
        cut_at_peak=not feasible.equality and feasible.floors_D is None,
    )
    return likely_n[path.order_m]


def nearest_samples(relaxed: Relaxed, feasible: FeasibleSet) -> np.ndarray:
    """Whole samples in the order of their weights, by the linear subproblem with weights as gains: it keeps every limit."""
    spent = feasible
    if not feasible.equality:
        spent = replace(feasible, budget=min(feasible.budget, float(feasible.size_n @ relaxed.weights_n)))
    return round_solution(solve_threshold(relaxed.weights_n * feasible.size_n, spent), spent)


def _ranked(chosen_n: np.ndarray, score_n: np.ndarray) -> np.ndarray:
    position_n = np.flatnonzero(chosen_n)
    return position_n[np.argsort(-score_n[position_n], kind="stable")]
