"""`select`: the one entry to every selector.

Shape legend: N candidates, n samples of the pool.
"""

from __future__ import annotations

import numpy as np

from selection_ops.curvature import TargetGeometry
from selection_ops.selectors import baselines as _baselines  # noqa: F401  registers the rankings
from selection_ops.selectors import direct as _direct  # noqa: F401  registers direct and direct-signed
from selection_ops.selectors import match as _match  # noqa: F401  registers match
from selection_ops.selectors.base import CandidateSet, Solution, get_selector, known_selectors
from selection_ops.selectors.diagnostics import describe_selection
from selection_ops.selectors.problem import Problem
from selection_ops.selectors.settings import Budget, SelectorSettings

__all__ = ["get_selector", "known_selectors", "select"]


def select(
    candidates: CandidateSet, geometry: TargetGeometry | None, budget: Budget, settings: SelectorSettings
) -> Solution:
    """Choose from the candidates for a target, under a budget; with reasons, a certificate and diagnostics.

    Left out before anything is solved: excluded samples, samples with any value that is not finite, exact duplicates of the
    sample of smallest id, and outliers beyond the caps that were asked for. The result does not depend on the order of rows, beyond the float32 rounding of dot
    products. `geometry` may be None for selectors that need no target. Raises InputError for what cannot be computed and
    InfeasibleError where budget, quotas and limit allow nothing.
    """
    selector = get_selector(settings.selector)
    problem = Problem(candidates, geometry, budget, settings, selector)
    choice = selector.choose(problem)
    reason_N = problem.reason_N.copy()
    reason_N[problem.pool_n] = "not_chosen"
    if choice.outside_n is not None:
        reason_N[problem.pool_n[choice.outside_n]] = "outside_shortlist"
    score = choice.scores.get("score")
    if score is not None:
        reason_N[problem.pool_n[~np.isfinite(score)]] = "non_finite"
    order_n = problem.pool_n[choice.order_n]
    reason_N[order_n] = "selected"
    return Solution(
        order_n=order_n,
        weights_n=choice.weights_n,
        scores=problem.over_candidates(choice.scores),
        reason_N=reason_N,
        certificate={"selector": settings.selector} | choice.certificate,
        diagnostics=describe_selection(problem, choice),
    )
