"""What Muon's next step multiplies a gradient by: the first Newton-Schulz polynomial at the momentum, from one side.

Muon moves a matrix by -learning_rate * NS(M), M a decaying mean of gradients in which the step's own has the share 1 - mu^2 (Nesterov) or
1 - mu. One iteration is X -> S X with S = aI + bA + cA^2, A = X X', X the momentum over its norm; with A held at what it is before the step
that is linear in the gradient: P(G) = (1 - mu^2) S G. On tall matrices torch iterates on the transpose, so that S stands right.
Source: the form used by OPUS (arXiv 2602.05400). The norm of the momentum is left out there, and here.

Legend: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.775, 2.0315)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SidedFactor:
    """A symmetric positive matrix that a gradient is multiplied by: from the left [O, O], or from the right [I, I]."""

    matrix: Tensor
    from_left: bool

    def apply(self, gradient_OI: Tensor) -> Tensor:
        """The product."""
        matrix = self.matrix.to(gradient_OI.dtype)
        return matrix @ gradient_OI if self.from_left else gradient_OI @ matrix


def muon_preconditioner(
    buffer_OI: Tensor,
    *,
    momentum: float,
    nesterov: bool = True,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    rate: float = 1.0,
    eps: float = 1e-7,
    power: float = 1.0,
) -> SidedFactor:
    """(rate * kappa * S)^power from the momentum buffer before the step; `rate` is the site's share of the learning rate.

    S is positive definite for Muon's own coefficients (the polynomial has no real root); fractional powers by its eigenvectors.
    """
    a, b, c = coefficients
    from_left = buffer_OI.shape[0] <= buffer_OI.shape[1]
    x = buffer_OI / buffer_OI.norm().clamp(min=eps)
    gram = x @ x.T if from_left else x.T @ x
    kappa = rate * ((1.0 - momentum**2) if nesterov else (1.0 - momentum))
    if power in (1.0, 2.0):
        square = kappa * (c * (gram @ gram) + b * gram)
        square.diagonal().add_(kappa * a)
        return SidedFactor(matrix=square if power == 1.0 else square @ square, from_left=from_left)
    value, vector = torch.linalg.eigh(gram.double())
    value = (kappa * (a + b * value + c * value.square())).clamp(min=0.0) ** power
    return SidedFactor(matrix=((vector * value) @ vector.T).to(buffer_OI.dtype), from_left=from_left)


def rate_share(rows: int, columns: int, adjust: str | None) -> float:
    """How torch.optim.Muon scales the learning rate of a matrix, by its `adjust_lr_fn`."""
    if adjust == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5
