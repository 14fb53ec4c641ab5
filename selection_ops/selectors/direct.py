"""Selection under a stiff limit: the published DiReCT and its corrected form.

Shape legend: n samples of the pool, K sketch dimension, J stiff directions.
Source: arXiv 2605.31175; the linear subproblem, its certificate and the corrections are those of direct.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selection_ops.selectors.base import Choice, Selector, selector
from selection_ops.selectors.limit import limited, refuse_few_targets
from selection_ops.selectors.problem import Problem, gain_cosine
from selection_ops.selectors.redundancy import choose_penalised
from selection_ops.selectors.rounding import round_solution
from selection_ops.selectors.threshold import FeasibleSet, ThresholdSolution, solve_threshold

CONVERGED = 1e-4
"""||change of w|| at which successive approximation stops; the published constant."""


def id_uniform(seed: int, sample_id: np.ndarray) -> np.ndarray:
    """A number in [0, 1) per sample that depends on (seed, sample_id) alone; float64."""
    digests = b"".join(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest() for name in sample_id)
    # 53 bits are what a float64 holds.
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True, kw_only=True, eq=False)
class _Ascent:
    solution: ThresholdSolution
    price_n: np.ndarray
    objective: list[float]
    converged: bool
    chosen_n: np.ndarray
    rounded: float


@selector("direct")
class Direct(Selector):
    """The published problem: maximise J(w) = k ||(I - V V^T) sum w_i z_i||^2, V the stiff directions of the uncentred
    Fisher, within a limit of 0.1 x the pool's mean stiff cost x budget. Successive convex approximation from w = K/N:
    each round is one exact linear subproblem, J never falls, and the end is a local optimum; restarts are an option."""

    needs_sketches = True
    default_stiff_limit = 0.1
    default_stiff_limit_kind = "pool"

    def choose(self, problem: Problem) -> Choice:
        """See the class."""
        refuse_few_targets(self.name, problem.geometry, problem.settings)
        settings = problem.settings
        feasible, certificate = limited(problem, published=True)
        count = len(feasible.size_n)
        share = min(1.0, feasible.budget / float(feasible.size_n.sum()))
        ascents = [self._ascend(problem, feasible, np.full(count, share))]
        names = problem.sample_id[problem.pool_n]
        for restart in range(settings.restarts):
            start_n = id_uniform(settings.seed * 1_000_003 + restart + 1, names)
            ascents.append(self._ascend(problem, feasible, start_n * share))
        best = max(range(len(ascents)), key=lambda index: ascents[index].rounded)
        found = ascents[best]
        certificate |= _solved(found.solution, found.chosen_n, feasible) | {
            "objective_per_iteration": found.objective,
            "objective": found.rounded,
            "converged": found.converged,
            "restart": best,
            "objective_of_starts": [ascent.rounded for ascent in ascents],
        }
        return _choice(problem, found.price_n, found.solution, found.chosen_n, feasible, certificate)

    def _ascend(self, problem: Problem, feasible: FeasibleSet, weights_n: np.ndarray) -> _Ascent:
        scale_n, stiff_JK = problem.scale_n, problem.geometry.empirical.stiff_vectors
        dimension = problem.geometry.dimension
        every = np.arange(len(weights_n))

        def flat_sum(weights: np.ndarray) -> torch.Tensor:
            position = every[weights > 0.0]
            sum_K = problem.sum(position, weights[position], scale_n)
            return sum_K - stiff_JK.T @ (stiff_JK @ sum_K)

        sum_K = flat_sum(weights_n)
        objective = [dimension * float(sum_K @ sum_K)]
        price_n = 2.0 * dimension * problem.dots(sum_K[None])[:, 0] * scale_n
        solution = solve_threshold(price_n, feasible)
        converged = False
        for _ in range(problem.settings.max_iterations):
            moved = float(np.linalg.norm(solution.weights_n - weights_n))
            next_K = flat_sum(solution.weights_n)
            reached = dimension * float(next_K @ next_K)
            # The start spends the budget but not the limit, so only rounds after the first compare feasible weights.
            if len(objective) > 1 and reached <= objective[-1]:
                converged = True
                break
            weights_n, sum_K, kept = solution.weights_n, next_K, solution
            objective.append(reached)
            if moved < CONVERGED:
                converged = True
                break
            price_n = 2.0 * dimension * problem.dots(sum_K[None])[:, 0] * scale_n
            solution = solve_threshold(price_n, feasible)
        chosen_n = round_solution(kept, feasible)
        whole_K = flat_sum(chosen_n.astype(np.float64))
        return _Ascent(
            solution=kept,
            price_n=price_n,
            objective=objective,
            converged=converged,
            chosen_n=chosen_n,
            rounded=dimension * float(whole_K @ whole_K),
        )


@selector("direct-signed")
class DirectSigned(Selector):
    """The corrected form: maximise <sum w_i z_i, g> within a limit of r x the held-out stiff cost of target samples,
    stiff directions from the centred Fisher, unit rows unless asked otherwise. One exact linear problem; with a price on
    redundancy, a concave one, see `selection_ops.selectors.redundancy`."""

    default_rows = "unit"
    default_stiff_limit = 1.0

    def choose(self, problem: Problem) -> Choice:
        """See the class."""
        refuse_few_targets(self.name, problem.geometry, problem.settings)
        feasible, certificate = limited(problem)
        gain_n = gain_cosine(problem) * problem.scale_n
        solution = solve_threshold(gain_n, feasible)
        chosen_n = round_solution(solution, feasible)
        if problem.settings.redundancy > 0.0:
            return choose_penalised(problem, feasible, solution, chosen_n, gain_n, certificate)
        certificate |= _solved(solution, chosen_n, feasible) | {
            "objective_per_iteration": [solution.value],
            "objective": float(gain_n @ chosen_n),
            "bound": solution.value,
            "filled_without_gain": int((chosen_n & (gain_n <= 0.0)).sum()),
        }
        return _choice(problem, gain_n, solution, chosen_n, feasible, certificate)


def _solved(solution: ThresholdSolution, chosen_n: np.ndarray, feasible: FeasibleSet) -> dict[str, Any]:
    whole_n = chosen_n.astype(np.float64)
    return {
        "mu": solution.mu,
        "nu": solution.nu if np.isfinite(solution.nu) else None,
        "fractional": int(solution.fractional.size),
        "weight_sum": float(solution.weights_n.sum()),
        "cost": None if feasible.cost_n is None else float(feasible.cost_n @ whole_n),
        "cost_fractional": solution.cost,
    }


def _choice(
    problem: Problem,
    gain_n: np.ndarray,
    solution: ThresholdSolution,
    chosen_n: np.ndarray,
    feasible: FeasibleSet,
    certificate: dict[str, Any],
) -> Choice:
    score_n = gain_n if feasible.cost_n is None else gain_n - solution.mu * feasible.cost_n
    score_n = score_n / feasible.size_n
    weights_n = chosen_n.astype(np.float64)
    if problem.settings.fractional:
        weights_n = solution.weights_n
    position_n = np.flatnonzero(weights_n)
    order_n = position_n[np.lexsort((-score_n[position_n], -weights_n[position_n]))]
    scores = {"score": score_n, "gain": gain_n}
    if feasible.cost_n is not None:
        scores["stiff_cost"] = feasible.cost_n
    if problem.settings.fractional:
        certificate["cost"] = solution.cost
    return Choice(order_n=order_n, weights_n=weights_n[order_n], scores=scores, certificate=certificate)
