"""The relaxed set problem: weights in [0, 1] that are best for a function of the summed gradient, by Frank-Wolfe.

    maximise phi(s),   s = sum_i w_i z_i,   w in a feasible set,   phi a function of <s, g> and ||s|| alone,   ||g|| = 1

Each pass is one exact linear subproblem and the exact step towards its optimum; its state is s, a k-vector, so a pass reads
the pool's sketches once. The set cosine is the function of `match`:

    f(w) = <s, g> / ||s||

Where <s, g> > 0, {f >= t} is a convex cone, so f is quasi-concave and Frank-Wolfe ends in the optimum. For any unit vector u
with <s, u> > 0, f(w) <= <s, g> / <s, u>, so the largest ratio of two linear functions bounds every set: found exactly by
Dinkelbach's iteration on two scalars a sample.

Shape legend: n samples of the pool, K sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from selection_ops.selectors.problem import Problem
from selection_ops.selectors.rounding import meets
from selection_ops.selectors.threshold import FeasibleSet, ThresholdSolution, solve_threshold

MIN_WEIGHT = 1e-3
"""Relaxed weights below this are dropped."""
_DOT_ROUNDING = 2.0**-24
"""Half a unit in the last place of float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """A linear subproblem at weights w, and its optimum: what a bound is proved with."""

    alpha_n: np.ndarray
    """<z_i, g>."""
    beta_n: np.ndarray
    """<z_i, s / ||s||> at the present weights; 0 for a zero sum."""
    price_n: np.ndarray
    """Gradient of the objective: alpha - slope beta, up to a positive factor."""
    scale_n: np.ndarray
    """Norm of z_i, where rows are unit."""
    weights_n: np.ndarray
    """The present weights."""
    sum_K: torch.Tensor
    """Their sum."""
    vertex: ThresholdSolution
    """The optimum for these prices."""
    feasible: FeasibleSet
    """Where weights may lie."""


class SetObjective(Protocol):
    """A function of a summed gradient s through its gain <s, g> and its norm."""

    @property
    def per_size(self) -> bool:
        """Whether an addition is ranked by what it adds per unit of budget, or by the value it leads to."""

    @property
    def tolerance(self) -> float:
        """Distance of bound and value at which a solution counts as the optimum."""

    def value(self, sum_K: torch.Tensor) -> float:
        """phi(s)."""

    def values(self, gain_n: np.ndarray, square_n: np.ndarray, out: np.ndarray) -> None:
        """phi for many sums of gain <s, g> and squared norm ||s||^2, written into `out`."""

    def slope(self, sum_K: torch.Tensor) -> float:
        """t for which the gradient of phi points along g - t s / ||s||."""

    def step(self, sum_K: torch.Tensor, move_K: torch.Tensor) -> float:
        """argmax over gamma in [0, 1] of phi(s + gamma d)."""

    def bound(self, at: Pass) -> float:
        """No weights in the feasible set have a larger phi."""


@dataclass(frozen=True, eq=False)
class SetCosine:
    """f(w) = <s, g> / ||s||; 0 for a zero sum. Source: selection.md section 2."""

    direction_K: torch.Tensor
    """g, of norm 1."""
    tolerance: float = 1e-6
    per_size: bool = False

    def value(self, sum_K: torch.Tensor) -> float:
        """See the class."""
        return cosine_of(sum_K, self.direction_K)

    def values(self, gain_n: np.ndarray, square_n: np.ndarray, out: np.ndarray) -> None:
        """See the class."""
        # A sum that cancels, or a zero row first, has no direction: cosine 0.
        out[:] = 0.0
        np.sqrt(square_n, out=out, where=square_n > 0.0)
        np.divide(gain_n, out, out=out, where=out > 0.0)

    def slope(self, sum_K: torch.Tensor) -> float:
        """f, and never negative: where the sum points away from g, any way towards g is a better one."""
        return max(self.value(sum_K), 0.0)

    def step(self, sum_K: torch.Tensor, move_K: torch.Tensor) -> float:
        """See `exact_step`."""
        return exact_step(sum_K, move_K, self.direction_K)

    def bound(self, at: Pass) -> float:
        """See `ratio_bound`."""
        rounding = dot_rounding(at.sum_K)
        reached = self.value(at.sum_K)
        return ratio_bound(at.alpha_n, at.beta_n, at.scale_n, at.feasible, at_least=reached, rounding=rounding)


@dataclass(frozen=True, kw_only=True, eq=False)
class Relaxed:
    """Where Frank-Wolfe ended."""

    weights_n: np.ndarray
    """Weights over the pool, float64."""
    sum_K: torch.Tensor
    """s, float64."""
    price_n: np.ndarray
    """Gain of each sample in the last linear subproblem: <z_i, g - t s / ||s||>."""
    objective: list[float]
    """phi before each pass and at the end."""
    bound: float
    """No weights in the feasible set have a larger phi."""
    mu: float
    """Price of stiff cost in the last linear subproblem."""
    nu: float
    """Price of the budget in the last linear subproblem."""

    def likeliest(self, feasible: FeasibleSet, most: int) -> np.ndarray:
        """The rows that exact greedy decides among: three budgets of the largest weights, then of the largest prices."""
        ranked_n = np.lexsort((-self.price_n, -self.weights_n))
        sizes = np.cumsum(feasible.size_n[ranked_n])
        one, three = (int(np.searchsorted(sizes, times * feasible.budget, side="right")) for times in (1.0, 3.0))
        return np.sort(ranked_n[: max(1, one, min(three, most))])

    def fractional(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the weights that count, largest first, and these weights."""
        position_n = np.flatnonzero(self.weights_n >= MIN_WEIGHT)
        position_n = position_n[np.lexsort((-self.price_n[position_n], -self.weights_n[position_n]))]
        return position_n, self.weights_n[position_n]


def cosine_of(sum_K: torch.Tensor, direction_K: torch.Tensor) -> float:
    """Cosine of a summed gradient with a unit direction; 0 for a zero sum."""
    norm = float(sum_K.norm())
    return float(sum_K @ direction_K) / norm if norm > 0.0 else 0.0


def relaxed_optimum(
    problem: Problem,
    feasible: FeasibleSet,
    objective: SetObjective,
    alpha_n: np.ndarray,
    scale_n: np.ndarray,
    start: ThresholdSolution,
    *,
    passes: int,
) -> Relaxed:
    """Frank-Wolfe with the exact step from feasible weights; stops when the bound is within the objective's tolerance.

    alpha_n: <z_i, g> over the pool. scale_n: what unit rows are multiplied by. Each pass reads the pool's sketches once
    for <z, s> and the rows of one vertex. Source: selection.md section 2.
    """
    weights_n = start.weights_n.copy()
    sum_K = problem.sum(*_support(weights_n), scale_n)
    reached = [objective.value(sum_K)]
    bound, price_n, mu, nu = float("inf"), alpha_n, start.mu, start.nu
    for _ in range(passes):
        beta_n = _along(problem, sum_K, scale_n)
        price_n = alpha_n - objective.slope(sum_K) * beta_n
        vertex = solve_threshold(price_n, feasible)
        mu, nu = vertex.mu, vertex.nu
        at = Pass(
            alpha_n=alpha_n,
            beta_n=beta_n,
            price_n=price_n,
            scale_n=scale_n,
            weights_n=weights_n,
            sum_K=sum_K,
            vertex=vertex,
            feasible=feasible,
        )
        bound = min(bound, objective.bound(at))
        if bound - reached[-1] <= objective.tolerance:
            break
        vertex_K = problem.sum(*_support(vertex.weights_n), scale_n)
        step = objective.step(sum_K, vertex_K - sum_K)
        if step <= 0.0:
            break
        weights_n = weights_n + step * (vertex.weights_n - weights_n)
        sum_K = sum_K + step * (vertex_K - sum_K)
        reached.append(objective.value(sum_K))
    return Relaxed(weights_n=weights_n, sum_K=sum_K, price_n=price_n, objective=reached, bound=bound, mu=mu, nu=nu)


def best_set(
    problem: Problem,
    feasible: FeasibleSet,
    objective: SetObjective,
    scale_n: np.ndarray,
    proposals: dict[str, np.ndarray],
) -> tuple[dict[str, float], str | None]:
    """The objective of each proposed set of pool positions, and the name of the best that is feasible; the first of equals."""
    values = {
        name: objective.value(problem.sum(order_n, np.ones(len(order_n)), scale_n))
        for name, order_n in proposals.items()
    }
    valid = [name for name, order_n in proposals.items() if meets(order_n, feasible)]
    return values, max(valid, key=values.__getitem__, default=None)


def bound_near(
    problem: Problem,
    feasible: FeasibleSet,
    objective: SetCosine,
    alpha_n: np.ndarray,
    scale_n: np.ndarray,
    sum_K: torch.Tensor,
    *,
    at_least: float,
) -> float:
    """The bound over a feasible set that a given summed gradient proves; one pass over the sketches."""
    if not float(sum_K.norm()) > 0.0:
        return 1.0
    beta_n = _along(problem, sum_K, scale_n)
    return ratio_bound(alpha_n, beta_n, scale_n, feasible, at_least=at_least, rounding=dot_rounding(sum_K))


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


def dot_rounding(sum_K: torch.Tensor) -> float:
    """What float32 dot products with a unit row may be off, for a gain and a dot with a summed gradient together."""
    # A dot of k products in float32 has a rounding of about sqrt(k) half-ulps of the product of norms; both alpha and
    # t beta carry one, and the vectors are rounded to float32 once.
    return 2.0 * _DOT_ROUNDING * (1.0 + float(np.sqrt(sum_K.shape[0])))


def _along(problem: Problem, sum_K: torch.Tensor, scale_n: np.ndarray) -> np.ndarray:
    """<z_i, s / ||s||> over the pool; 0 for a zero sum."""
    norm = float(sum_K.norm())
    if not norm > 0.0:
        return np.zeros(len(scale_n))
    return problem.dots((sum_K / sum_K.norm())[None])[:, 0] * scale_n


def _support(weights_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    position_n = np.flatnonzero(weights_n)
    return position_n, weights_n[position_n]
