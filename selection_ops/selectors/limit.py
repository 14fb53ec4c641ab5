"""The stiff limit: what a selection may spend along the stiff directions of the target, and what to do if nothing can.

Shape legend: n samples of the pool.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from schemas.errors import InfeasibleError, InputError
from selection_ops.curvature import FEW_TARGETS, Spectrum, TargetGeometry
from selection_ops.selectors.problem import Problem
from selection_ops.selectors.settings import Budget, SelectorSettings
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold


def limited(problem: Problem, *, published: bool = False) -> tuple[FeasibleSet, dict[str, Any]]:
    """The feasible set under the settings' stiff limit, and its part of the certificate.

    `published` takes costs from the uncentred Fisher. The limit is r x mean cost x K for samples and r x mean cost x
    T / (mean tokens of the pool) for tokens. Infeasible: InfeasibleError with the smallest feasible limit, or, by the
    policy `raise`, that limit and the factor. Source: direct.md sections 2 and 4.
    """
    settings, budget = problem.settings, problem.budget
    if settings.stiff_limit is None:
        return problem.feasible(), {"limit": None}
    column = "stiff_cost_empirical" if published else "stiff_cost"
    cost_n = problem.column(column) * problem.scale_n**2
    samples = float(budget.amount)
    if budget.unit == "tokens":
        samples /= float(problem.tokens_n.mean())
    if settings.stiff_limit_kind == "absolute":
        limit, mean_cost = float(settings.stiff_limit), None
    else:
        mean_cost = float(cost_n.mean())
        if settings.stiff_limit_kind == "target":
            spectrum = problem.geometry.empirical if published else problem.geometry.spectrum
            mean_cost = target_cost(settings.rows, spectrum, problem.geometry.sample_count)
        limit = settings.stiff_limit * mean_cost * samples
    feasible = problem.feasible(cost_n, limit)
    certificate: dict[str, Any] = {
        "limit": limit,
        "limit_kind": settings.stiff_limit_kind,
        "limit_mean_cost": mean_cost,
        "limit_raised_by": None,
    }
    cheapest = solve_threshold(np.zeros(len(cost_n)), feasible)
    certificate["smallest_feasible_limit"] = cheapest.smallest_limit
    if not cheapest.feasible:
        smallest = cheapest.smallest_limit
        if settings.if_infeasible == "error":
            raise infeasible(budget, limit, smallest)
        certificate["limit_raised_by"] = smallest / limit if limit > 0 else None
        certificate["limit"] = smallest
        feasible = replace(feasible, limit=smallest)
    return feasible, certificate


def infeasible(budget: Budget, limit: float, smallest: float) -> InfeasibleError:
    """The error that names the limit, the smallest feasible one, and the ways out."""
    return InfeasibleError(
        f"no {budget.amount} {budget.unit} have a stiff cost within the limit {limit:.6g}; the smallest feasible "
        f"limit is {smallest:.6g}. Raise stiff_limit by a factor of {_factor(smallest, limit)}, give a smaller "
        "budget, or set if_infeasible to raise"
    )


def refuse_few_targets(selector: str, geometry: TargetGeometry, settings: SelectorSettings) -> None:
    """Stop the direct modes where the elbow and the limit would be noise."""
    count = geometry.sample_count
    if count < FEW_TARGETS and not settings.few_targets:
        raise InputError(
            f"selector {selector!r} needs at least {FEW_TARGETS} target samples, and this target has {count}: "
            "its elbow and its stiff limit would be noise. Add target samples, use selector 'match', or insist with few_targets"
        )


def target_cost(rows: str | None, spectrum: Spectrum, count: int) -> float:
    """Held-out stiff cost of a target's samples, of full or of unit rows; InputError where there were too few to hold out."""
    cost = spectrum.heldout_cost_sum if rows == "sum" else spectrum.heldout_cost_unit
    if not np.isfinite(cost):
        raise InputError(
            f"a stiff limit of kind 'target' needs at least 4 target samples to hold some out, and this target has "
            f"{count}; use kind 'absolute' or 'pool'"
        )
    return float(cost)


def _factor(smallest: float, limit: float) -> str:
    return f"{smallest / limit:.4g}" if limit > 0 else "infinity"
