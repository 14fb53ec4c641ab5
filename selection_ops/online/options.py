"""Options of a policy; no torch here, so that help texts are quick."""

from __future__ import annotations

import dataclasses

from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """How a policy chooses and weights; part of the training's spec."""

    n_keep: int = 8
    """Candidates trained on at a step, at most; `full` trains on all that are offered."""
    metric: str = "target"
    """What candidates and target are compared in: `target` (the target's gradient through the live preconditioner), `sgd` (as it is)."""
    filter_score: str = "decrease"
    """Score of the greedy filter: `decrease`, `residual` or `normalised`."""
    weights: str = "nnls"
    """Weights of the survivors: `nnls` (bounded least squares) or `uniform`."""
    ridge: float = 1e-3
    """Ridge of the weights, as a share of the mean self-interaction."""
    weight_bound: float = 3.0
    """Upper bound of a weight, in units of the best uniform one."""

    def __post_init__(self) -> None:
        if self.n_keep < 1:
            raise InputError(f"n_keep must be at least 1, not {self.n_keep}")
        if self.ridge <= 0:
            raise InputError(f"ridge must be positive, not {self.ridge}: equal candidates have singular interactions")
        if self.weight_bound <= 0:
            raise InputError(f"weight_bound must be positive, not {self.weight_bound}")
