"""Weights of the survivors: a bounded non-negative least-squares problem, solved to its optimality conditions.

Legend: S survivors; K = gram_SS, b = align_S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.errors import InputError, LehrError

SCHEMES = ("nnls", "uniform")
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

    `nnls`: min over 0 <= w <= bound * alpha of w'(K + lambda I)w / 2 - b'w with lambda = ridge * mean diagonal of K;
    `uniform`: alpha for each. All zero where alpha is 0.
    """
    if scheme not in SCHEMES:
        raise InputError(f"unknown weight scheme {scheme!r}: choose one of {', '.join(SCHEMES)}")
    if scheme == "uniform" or alpha <= 0:
        return torch.full((len(align_S),), max(alpha, 0.0), dtype=torch.float64)
    lift = ridge * float(gram_SS.diagonal().mean())
    regular_SS = gram_SS + lift * torch.eye(len(align_S), dtype=gram_SS.dtype)
    return bounded_nnls(regular_SS, align_S, upper=bound * alpha)


def normalise(weight_S: Tensor) -> Tensor:
    """Weights of mean 1 over their support; zeros stay zero. All-zero weights come back unchanged."""
    support = int((weight_S > 0).sum())
    return weight_S * (support / float(weight_S.sum())) if support else weight_S


def effective_sample_size(weight_S: Tensor) -> float:
    """(sum w)^2 / sum w^2; 0 for an empty or all-zero set."""
    square = float(weight_S.square().sum())
    return float(weight_S.sum()) ** 2 / square if square else 0.0
