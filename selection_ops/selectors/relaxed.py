"""The relaxed set problem: weights in [0, 1] that maximise the cosine of the summed gradient with the target.

    maximise f(w) = <s, g> / ||s||,   s = sum_i w_i z_i,   w in a feasible set,   ||g|| = 1

Where <s, g> > 0, {f >= t} is a convex cone, so f is quasi-concave and Frank-Wolfe ends in the optimum. Its state between
two passes is s, a k-vector. For any unit vector u with <s, u> > 0, f(w) <= <s, g> / <s, u>, so the largest ratio of two
linear functions bounds every set: found exactly by Dinkelbach's iteration on two scalars a sample.

Shape legend: n samples of the pool, K sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from selection_ops.selectors.problem import Problem
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold

_DOT_ROUNDING = 2.0**-24
"""Half a unit in the last place of float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Relaxed:
    """Where Frank-Wolfe ended."""

    weights_n: np.ndarray
    """Weights over the pool, float64."""
    sum_K: torch.Tensor
    """s, float64."""
    price_n: np.ndarray
    """Gain of each sample in the last linear subproblem: <z_i, g - f s / ||s||>."""
    objective: list[float]
    """f before each pass and at the end."""
    bound: float
    """No weights in the feasible set have a larger f."""
    mu: float
    """Price of stiff cost in the last linear subproblem."""
    nu: float
    """Price of the budget in the last linear subproblem."""


def cosine_of(sum_K: torch.Tensor, direction_K: torch.Tensor) -> float:
    """Cosine of a summed gradient with a unit direction; 0 for a zero sum."""
    norm = float(sum_K.norm())
    return float(sum_K @ direction_K) / norm if norm > 0.0 else 0.0


def relaxed_optimum(
    problem: Problem,
    feasible: FeasibleSet,
    direction_K: torch.Tensor,
    gain_n: np.ndarray,
    scale_n: np.ndarray,
    *,
    passes: int,
    tolerance: float = 1e-6,
) -> Relaxed:
    """Frank-Wolfe with the exact step from the best by cosine; stops when the bound is within `tolerance` of f.

    gain_n: <unit row, direction> over the pool. scale_n: what unit rows are multiplied by. Each pass reads the pool's
    sketches once for <z, s> and the rows of one vertex. Source: selection.md section 2.
    """
    alpha_n = gain_n * scale_n
    start = solve_threshold(gain_n, feasible)
    weights_n = start.weights_n.copy()
    sum_K = problem.sum(*_support(weights_n), scale_n)
    objective = [cosine_of(sum_K, direction_K)]
    bound, price_n, mu, nu = 1.0, gain_n, start.mu, start.nu
    rounding = _rounding(problem, direction_K)
    for _ in range(passes):
        f = objective[-1]
        if not float(sum_K.norm()) > 0.0:
            break
        beta_n = problem.dots((sum_K / sum_K.norm())[None])[:, 0] * scale_n
        price_n = alpha_n - max(f, 0.0) * beta_n
        vertex = solve_threshold(price_n, feasible)
        mu, nu = vertex.mu, vertex.nu
        bound = min(bound, ratio_bound(alpha_n, beta_n, scale_n, feasible, at_least=f, rounding=rounding))
        if bound - f <= tolerance:
            break
        vertex_K = problem.sum(*_support(vertex.weights_n), scale_n)
        step = exact_step(sum_K, vertex_K - sum_K, direction_K)
        if step <= 0.0:
            break
        weights_n = weights_n + step * (vertex.weights_n - weights_n)
        sum_K = sum_K + step * (vertex_K - sum_K)
        objective.append(cosine_of(sum_K, direction_K))
    return Relaxed(weights_n=weights_n, sum_K=sum_K, price_n=price_n, objective=objective, bound=bound, mu=mu, nu=nu)


def bound_near(
    problem: Problem,
    feasible: FeasibleSet,
    direction_K: torch.Tensor,
    gain_n: np.ndarray,
    scale_n: np.ndarray,
    sum_K: torch.Tensor,
    *,
    at_least: float,
) -> float:
    """The bound over a feasible set that a given summed gradient proves; one pass over the sketches."""
    if not float(sum_K.norm()) > 0.0:
        return 1.0
    beta_n = problem.dots((sum_K / sum_K.norm())[None])[:, 0] * scale_n
    rounding = _rounding(problem, direction_K)
    return ratio_bound(gain_n * scale_n, beta_n, scale_n, feasible, at_least=at_least, rounding=rounding)


def exact_step(sum_K: torch.Tensor, move_K: torch.Tensor, direction_K: torch.Tensor) -> float:
    """argmax over gamma in [0, 1] of the cosine of s + gamma d with the direction."""
    n0, n1 = float(sum_K @ direction_K), float(move_K @ direction_K)
    q0, q1, q2 = float(sum_K @ sum_K), float(sum_K @ move_K), float(move_K @ move_K)
    rise, fall = n1 * q0 - n0 * q1, n0 * q2 - n1 * q1
    if rise <= 0.0:
        return 0.0
    return min(1.0, rise / fall) if fall > 0.0 else 1.0


def ratio_bound(
    alpha_n: np.ndarray,
    beta_n: np.ndarray,
    scale_n: np.ndarray,
    feasible: FeasibleSet,
    *,
    at_least: float,
    rounding: float,
) -> float:
    """max over the feasible set of sum w alpha / sum w beta, plus what float32 dot products may be off; at most 1.

    The ratio t is raised until max sum w (alpha - t beta) is zero. Weights with a positive numerator and no positive
    denominator prove nothing, and 1 is returned.
    """
    # Any start gives a valid bound; one below what is known to be reached gives the tight one.
    ratio = 0.9 * max(0.0, at_least)
    for _ in range(60):
        best = solve_threshold(alpha_n - ratio * beta_n, feasible)
        weights_n = best.weights_n
        up, down = float(weights_n @ alpha_n), float(weights_n @ beta_n)
        size = float(weights_n @ scale_n)
        if best.value <= 1e-12 * size:
            down = abs(down) if down != 0.0 else size
            return min(1.0, ratio + rounding * size / max(down, 1e-300)) if size > 0.0 else 0.0
        if down <= 0.0:
            return 1.0
        raised = up / down
        if not ratio < raised < 1.0:
            return 1.0
        ratio = raised
    return 1.0


def _rounding(problem: Problem, direction_K: torch.Tensor) -> float:
    # A dot of k products in float32 has a rounding of about sqrt(k) half-ulps of the product of norms; both alpha and
    # t beta carry one, and the vectors are rounded to float32 once.
    return 2.0 * _DOT_ROUNDING * (1.0 + float(np.sqrt(direction_K.shape[0])))


def _support(weights_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    position_n = np.flatnonzero(weights_n)
    return position_n, weights_n[position_n]
