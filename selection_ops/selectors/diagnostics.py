"""What selections are judged by before training, computed alike for every selector.

Shape legend: N candidates, n samples of the pool, M target samples, K sketch dimension.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from schemas.errors import LehrError
from selection_ops.curvature import TargetGeometry
from selection_ops.selectors import rows
from selection_ops.selectors.base import Choice
from selection_ops.selectors.ordering import text_codes
from selection_ops.selectors.problem import Problem, plain_target
from selection_ops.selectors.relaxed import SetCosine, cosine_of, relaxed_optimum
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold

RANK_ROWS = 2048
"""Chosen rows that the effective rank is computed from, spread evenly over the ranking."""
FAR_PAST_SUPPLY = 1.5
"""Budget over supply peak from which a warning is given."""


def set_cosine(
    unit_NK: torch.Tensor,
    norm_N: np.ndarray,
    indices: np.ndarray,
    weights: np.ndarray,
    g_K: torch.Tensor,
) -> float:
    """Cosine of the weighted sum of full sketches with a gradient; 0 for an empty or zero sum.

    unit_NK, norm_N: all candidates; indices, weights: the chosen ones. This is the cosine between the step that training
    on the set takes first and the target's descent direction.
    """
    index_n = np.asarray(indices, dtype=np.int64)
    factor_n = np.asarray(weights, dtype=np.float64) * np.asarray(norm_N)[index_n].astype(np.float64)
    g_K = torch.as_tensor(g_K).to(torch.float64)
    norm = float(g_K.norm())
    return cosine_of(rows.sum_rows(unit_NK, index_n, factor_n), g_K / norm) if norm > 0.0 else 0.0


def effective_rank(unit_nK: torch.Tensor) -> float:
    """(tr G)^2 / ||G||_F^2 of the Gram of the rows: n for orthogonal rows of equal norm, 1 for parallel ones, 0 for none."""
    if unit_nK.shape[0] == 0:
        return 0.0
    gram = unit_nK @ unit_nK.T if unit_nK.shape[0] <= unit_nK.shape[1] else unit_nK.T @ unit_nK
    gram = gram.to(torch.float64)
    spread = float(gram.square().sum())
    return float(gram.trace()) ** 2 / spread if spread > 0.0 else 0.0


def describe_selection(problem: Problem, choice: Choice) -> dict[str, Any]:
    """All diagnostics of a selection; JSON-able, with what could not be computed as None and a word in `warnings`."""
    candidates, settings = problem.candidates, problem.settings
    warnings: list[str] = []
    index_n = problem.pool_n[choice.order_n]
    report: dict[str, Any] = {
        "candidates": len(candidates),
        "pool": len(problem.pool_n),
        "selected": len(index_n),
        "selected_tokens": int(candidates.tokens_N[index_n].sum()),
        "weight_sum": float(choice.weights_n.sum()),
        "duplicates_dropped": problem.duplicates,
        "non_finite": int((problem.reason_N == "non_finite").sum()),
        "domains": _domain_shares(problem, index_n),
    }
    if problem.outlier_caps:
        report["outlier_caps"] = problem.outlier_caps
    if not len(index_n):
        warnings.append(f"nothing fits a budget of {problem.budget.amount} {problem.budget.unit}")
    if settings.fractional and report["selected_tokens"] > problem.budget.amount and problem.budget.unit == "tokens":
        warnings.append(
            f"the weights meet the budget, but the {len(index_n)} samples that carry them hold "
            f"{report['selected_tokens']} tokens; it is these that training reads"
        )
    geometry = problem.geometry_or_none
    if geometry is not None:
        report["target"] = geometry.summary()
        report["share_stiff"], report["share_flat"] = geometry.share_stiff, geometry.share_flat
        report["share_null"] = geometry.share_null
        warnings += [
            warning for warning in geometry.warnings if "influence" not in warning or "influence" in settings.selector
        ]
    if candidates.unit_NK is None:
        warnings.append("set cosines and effective rank need sketches, and only scalar columns were kept")
    else:
        spread = np.unique(np.linspace(0, max(len(index_n) - 1, 0), min(RANK_ROWS, len(index_n))).astype(np.int64))
        report["effective_rank"] = effective_rank(rows.gather_rows(candidates.unit_NK, index_n[spread]))
        report["effective_rank_rows"] = len(spread)
        if geometry is not None:
            report |= _against_target(problem, geometry, choice, warnings)
    raised = choice.certificate.get("limit_raised_by")
    if raised is not None:
        warnings.append(f"the stiff limit was infeasible and was raised by a factor of {raised:.4g}")
    if choice.certificate.get("redundancy_rho") == 0.0:
        warnings.append("redundancy weighed nothing: the selection without it has no gain to measure it by")
    unhelpful = choice.certificate.get("filled_without_gain")
    if unhelpful:
        warnings.append(f"{unhelpful} samples without gain were needed to fill the budget; allow_short leaves them out")
    return report | {"warnings": warnings}


def _against_target(problem: Problem, geometry: TargetGeometry, choice: Choice, warnings: list[str]) -> dict[str, Any]:
    norm_n = problem.norm_n
    direction_K = geometry.mean_K / geometry.mean_K.norm()
    sum_K = problem.sum(choice.order_n, choice.weights_n, norm_n)
    found: dict[str, Any] = {"set_cosine": cosine_of(sum_K, direction_K)}
    if problem.settings.bound:
        found["set_cosine_bound"] = _bound(problem, choice, direction_K, norm_n)
    if problem.settings.two_fold:
        found |= _two_fold(problem, geometry, warnings)
    return found


def _bound(
    problem: Problem,
    choice: Choice,
    direction_K: torch.Tensor,
    norm_n: np.ndarray,
) -> float | None:
    """The relaxed bound of the plain `match` problem on what the selection spends; limits and quotas are not counted."""
    settings = problem.settings
    plain = plain_target(settings) and settings.rows == "sum" and not settings.quotas and not settings.floors
    if "bound" in choice.certificate and settings.selector == "match" and plain and settings.stiff_limit is None:
        return float(choice.certificate["bound"])
    spent = float(choice.weights_n @ problem.size_n[choice.order_n])
    if spent <= 0.0:
        return None
    feasible = FeasibleSet(size_n=problem.size_n, budget=spent, equality=True)
    cosine_n = problem.column("alignment")
    start = solve_threshold(cosine_n, feasible)
    return relaxed_optimum(
        problem, feasible, SetCosine(direction_K), cosine_n * norm_n, norm_n, start, passes=settings.max_iterations
    ).bound


def _two_fold(problem: Problem, geometry: TargetGeometry, warnings: list[str]) -> dict[str, Any]:
    """Select against each half of the target's rows (by parity of their index), judge by the mean of the other half."""
    missing: dict[str, Any] = {"set_cosine_heldout": None, "set_cosine_heldout_folds": None}
    if geometry.sample_count < 2:
        warnings.append("one target sample cannot be split, so there is no held-out set cosine")
        return missing
    settings = replace(problem.settings, few_targets=True, if_infeasible="raise", bound=False, two_fold=False)
    halves = geometry.target_MK[0::2], geometry.target_MK[1::2]
    cosines: list[float] = []
    curves: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    try:
        for own_MK, other_MK in (halves, halves[::-1]):
            half = geometry.of_rows(own_MK)
            again = problem.with_geometry(half, settings)
            choice = problem.selector.choose(again)
            other_K = other_MK.mean(dim=0)
            other_K = other_K / other_K.norm().clamp_min(torch.finfo(torch.float64).tiny)
            cosines.append(cosine_of(problem.sum(choice.order_n, choice.weights_n, problem.norm_n), other_K))
            if choice.path_n is not None and choice.path_square_n is not None and len(choice.path_n):
                curves.append(_path_cosines(again, choice, other_K))
                tokens.append(np.cumsum(problem.tokens_n[choice.path_n]))
    except LehrError as error:
        warnings.append(f"no held-out set cosine: against half of the target, {error}")
        return missing
    found: dict[str, Any] = {"set_cosine_heldout": float(np.mean(cosines)), "set_cosine_heldout_folds": cosines}
    if len(curves) == 2:
        found |= _supply(problem, curves, tokens, warnings)
    return found


def _path_cosines(problem: Problem, choice: Choice, other_K: torch.Tensor) -> np.ndarray:
    """Cosine with a held-out mean after each greedy addition, in the rows that greedy summed."""
    assert choice.path_n is not None and choice.path_square_n is not None
    unit_dot_n = rows.dot_chosen(problem.unit_NK, problem.pool_n[choice.path_n], other_K)
    up_n = np.cumsum(unit_dot_n * problem.scale_n[choice.path_n])
    down_n = np.sqrt(np.maximum(choice.path_square_n, 0.0))
    return np.divide(up_n, down_n, out=np.zeros(len(up_n)), where=down_n > 0.0)


def _supply(
    problem: Problem, curves: list[np.ndarray], tokens: list[np.ndarray], warnings: list[str]
) -> dict[str, Any]:
    """Where the held-out set cosine peaks along the greedy path: about as many samples as the pool has of use."""
    length = min(len(curve) for curve in curves)
    curve_n = (curves[0][:length] + curves[1][:length]) / 2.0
    peak = int(curve_n.argmax())
    in_tokens = float(np.mean([count[peak] for count in tokens]))
    spent = (
        float(length) if problem.budget.unit == "samples" else float(np.mean([count[length - 1] for count in tokens]))
    )
    reached = float(peak + 1) if problem.budget.unit == "samples" else in_tokens
    if spent > FAR_PAST_SUPPLY * reached:
        warnings.append(
            f"the budget lies far past the supply: the held-out set cosine peaks at {reached:.0f} {problem.budget.unit} "
            f"({curve_n[peak]:.4f}) and has fallen to {curve_n[-1]:.4f} at {spent:.0f}; a smaller budget is likely better"
        )
    shown = np.unique(np.geomspace(1, length, min(length, 64)).round().astype(np.int64)) - 1
    return {
        "supply_peak": peak + 1,
        "supply_peak_tokens": in_tokens,
        "supply_peak_cosine": float(curve_n[peak]),
        "supply_curve": [[int(at) + 1, float(curve_n[at])] for at in shown],
    }


def _domain_shares(problem: Problem, index_n: np.ndarray) -> dict[str, dict[str, float]]:
    """Shares by domain of all candidates and of the chosen ones, in samples and in tokens."""
    candidates = problem.candidates
    names, code_N = text_codes(candidates.domain)
    tokens_N = candidates.tokens_N.astype(np.float64)

    def shares(index: np.ndarray, weights: np.ndarray) -> np.ndarray:
        held_D = np.bincount(code_N[index], weights=weights, minlength=len(names))
        return held_D / max(held_D.sum(), 1e-300)

    every = np.arange(len(candidates))
    before, after = shares(every, np.ones(len(every))), shares(index_n, np.ones(len(index_n)))
    before_tokens, after_tokens = shares(every, tokens_N), shares(index_n, tokens_N[index_n])
    return {
        str(name): {
            "before": float(before[d]),
            "after": float(after[d]),
            "before_tokens": float(before_tokens[d]),
            "after_tokens": float(after_tokens[d]),
        }
        for d, name in enumerate(names)
    }
