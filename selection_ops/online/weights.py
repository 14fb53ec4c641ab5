"""Weights of the survivors: least-squares problems under bounds, solved to their optimality conditions.

Legend: S survivors; K = gram_SS, b = align_S.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from schemas.errors import InputError, LehrError

SCHEMES = ("nnls", "uniform", "simplex", "unbounded", "signed")
_TOLERANCE = 1e-10
_SWEEPS = 100_000
_POLISH_EVERY = 8


def kkt_residual(gram_SS: Tensor, align_S: Tensor, weight_S: Tensor, upper: float) -> float:
    """How far weights are from optimal for min over 0 <= w <= upper of w'Kw / 2 - b'w: the largest |projected gradient|.

    0 exactly at a solution. Units of b.
    """
    descent_S = align_S - gram_SS @ weight_S
    at_zero, at_upper = weight_S <= 0, weight_S >= upper
    descent_S = torch.where(at_zero, descent_S.clamp(min=0), descent_S)
    descent_S = torch.where(at_upper & ~at_zero, descent_S.clamp(max=0), descent_S)
    return float(descent_S.abs().max()) if len(descent_S) else 0.0


def bounded_nnls(gram_SS: Tensor, align_S: Tensor, *, upper: float) -> Tensor:
    """Minimiser of w'Kw / 2 - b'w over 0 <= w <= upper by cyclic projected coordinate descent, in float64.

    Every few sweeps the weights strictly inside the box are solved for exactly; the result stands once its KKT residual is
    at most 1e-10 of |b|'s largest entry. K is positive definite (add the ridge first). Raises `LehrError` where that takes
    more than 100,000 sweeps.
    """
    size = len(align_S)
    if not size or upper <= 0:
        return torch.zeros(size, dtype=torch.float64)
    gram_SS, align_S = gram_SS.to(torch.float64), align_S.to(torch.float64)
    # Plain floats: at most some hundred survivors, where tensor calls would cost a thousand times the arithmetic.
    gram, residual, weight = gram_SS.tolist(), align_S.tolist(), [0.0] * size
    tolerance = _TOLERANCE * float(align_S.abs().max())
    for sweep in range(1, _SWEEPS + 1):
        for i in range(size):
            moved = min(max(weight[i] + residual[i] / gram[i][i], 0.0), upper) - weight[i]
            if moved:
                weight[i] += moved
                row = gram[i]
                for j in range(size):
                    residual[j] -= row[j] * moved
        if sweep % _POLISH_EVERY == 0 or size == 1:
            weight_S = torch.tensor(weight, dtype=torch.float64)
            for candidate_S in (weight_S, _solve_free(gram_SS, align_S, weight_S, upper)):
                if kkt_residual(gram_SS, align_S, candidate_S, upper) <= tolerance:
                    return candidate_S
    raise LehrError(
        f"the weights of a step did not converge in {_SWEEPS} sweeps over {size} survivors: their interactions are singular; "
        "raise the ridge"
    )


def _solve_free(gram_SS: Tensor, align_S: Tensor, weight_S: Tensor, upper: float) -> Tensor:
    """Weights inside the box solved for exactly, the others held; clamped, so that the KKT residual says whether it holds."""
    free = torch.nonzero((weight_S > 0) & (weight_S < upper)).flatten()
    if not len(free):
        return weight_S
    held_S = weight_S.clone()
    held_S[free] = 0.0
    solved = weight_S.clone()
    inside, failed = torch.linalg.solve_ex(gram_SS[free][:, free], (align_S - gram_SS @ held_S)[free])
    if int(failed):
        return weight_S
    solved[free] = inside.clamp(0.0, upper)
    return solved


def simplex_least_squares(gram_SS: Tensor, align_S: Tensor, *, total: float) -> Tensor:
    """Minimiser of w'Kw / 2 - b'w over w >= 0 with sum w = total, by a primal active set, in float64.

    K is positive definite. Every iterate is feasible; at the solution b - Kw equals one multiplier on the support and is at most that
    outside. Raises `LehrError` where it does not end, which takes singular interactions.
    """
    size = len(align_S)
    gram_SS, align_S = gram_SS.to(torch.float64), align_S.to(torch.float64)
    if not size or total <= 0:
        return torch.zeros(size, dtype=torch.float64)
    weight_S = torch.full((size,), total / size, dtype=torch.float64)
    free_S = torch.ones(size, dtype=torch.bool)
    tolerance = _TOLERANCE * float((align_S.abs() + gram_SS.abs().sum(1) * total).max())
    for _ in range(100 * (size + 1)):
        aim_S, multiplier = _on_plane(gram_SS, align_S, free_S, total)
        low_S = free_S & (aim_S < 0)
        if bool(low_S.any()):
            # As far towards the minimum on the face as every weight stays non-negative; what reaches zero leaves the face.
            ratio_S = torch.where(low_S, weight_S / (weight_S - aim_S), torch.full_like(weight_S, math.inf))
            leaving = int(ratio_S.argmin())
            weight_S = weight_S + float(ratio_S[leaving]) * (aim_S - weight_S)
            weight_S[leaving] = 0.0
            free_S[leaving] = False
            continue
        weight_S = aim_S
        slack_S = torch.where(free_S, torch.full_like(weight_S, -math.inf), align_S - gram_SS @ weight_S - multiplier)
        entering = int(slack_S.argmax())
        if float(slack_S[entering]) <= tolerance:
            return weight_S
        free_S[entering] = True
    raise LehrError(
        f"the simplex weights of {size} survivors did not converge: their interactions are singular; raise the ridge"
    )


def _on_plane(gram_SS: Tensor, align_S: Tensor, free_S: Tensor, total: float) -> tuple[Tensor, float]:
    """Minimiser over the free weights with their sum alone held, zero elsewhere, and the multiplier of that sum."""
    free = torch.nonzero(free_S).flatten()
    ones = torch.ones(len(free), dtype=torch.float64)
    solved = torch.linalg.solve(gram_SS[free][:, free], torch.stack([align_S[free], ones], dim=1))
    multiplier = (float(solved[:, 0].sum()) - total) / float(solved[:, 1].sum())
    weight_S = torch.zeros_like(align_S)
    weight_S[free] = solved[:, 0] - multiplier * solved[:, 1]
    return weight_S, multiplier


def regularised(gram_SS: Tensor, ridge: float) -> Tensor:
    """K + lambda I with lambda = ridge * mean diagonal of K."""
    lift = ridge * float(gram_SS.diagonal().mean())
    return gram_SS + lift * torch.eye(len(gram_SS), dtype=gram_SS.dtype)


def solve_weights(
    gram_SS: Tensor,
    align_S: Tensor,
    alpha: float,
    *,
    scheme: str = "nnls",
    ridge: float = 1e-3,
    bound: float = 3.0,
) -> Tensor:
    """Raw weights of the survivors, in units of the line search coefficient `alpha`.

    With f(w) = w'(K + lambda I)w / 2 - b'w and lambda = ridge * mean diagonal of K: `nnls` minimises f over
    0 <= w <= bound * alpha; `uniform` is alpha for each; `simplex` minimises f over w >= 0 with the sum that `uniform` has;
    `unbounded` over w >= 0; `signed` over all w. The first three are zero where alpha is 0, the others do not look at it.
    """
    if scheme not in SCHEMES:
        raise InputError(f"unknown weight scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")
    size = len(align_S)
    if not size or (alpha <= 0 and scheme in ("nnls", "uniform", "simplex")):
        return torch.zeros(size, dtype=torch.float64)
    if scheme == "uniform":
        return torch.full((size,), alpha, dtype=torch.float64)
    if not float(gram_SS.diagonal().mean()) > 0:
        return torch.zeros(size, dtype=torch.float64)
    regular_SS = regularised(gram_SS, ridge)
    if scheme == "signed":
        return torch.linalg.solve(regular_SS, align_S)
    if scheme == "simplex":
        return simplex_least_squares(regular_SS, align_S, total=alpha * size)
    return bounded_nnls(regular_SS, align_S, upper=bound * alpha if scheme == "nnls" else math.inf)


def normalise(weight_S: Tensor) -> Tensor:
    """Weights whose sizes have mean 1 over their support; zeros stay zero. All-zero weights come back unchanged.

    Only `signed` weights are ever negative. They are scaled by their sizes: their sum can be zero, or turn the gradient around.
    """
    support = int((weight_S != 0).sum())
    return weight_S * (support / float(weight_S.abs().sum())) if support else weight_S


def effective_sample_size(weight_S: Tensor) -> float:
    """(sum |w|)^2 / sum w^2; 0 for an empty or all-zero set."""
    square = float(weight_S.square().sum())
    return float(weight_S.abs().sum()) ** 2 / square if square else 0.0
