"""Options of a policy; no torch here, so that help texts are quick."""

from __future__ import annotations

import dataclasses

from schemas.errors import InputError

GRANULARITIES = ("sample", "token-mean", "token-mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """How a policy chooses and weights; part of the training's spec."""

    n_keep: int = 8
    """Candidates trained on at a step, at most; `full` and the filters `threshold` and `none` are not bound by it."""
    metric: str = "target"
    """What candidates and target are compared in: `target` (the target's gradient through the live preconditioner), `sgd` (as it is)."""
    preconditioner: str = "auto"
    """What the metric takes for the preconditioner of the live optimizer: `auto` (what the optimizer does), or one of its other forms."""
    filter: str = "greedy"
    """Filter: `greedy`, `omp`, `boltzmann`, `set-cosine`, `top-k`, `cosine`, `threshold`, `random` or `none`."""
    filter_score: str = "decrease"
    """Score of the filters `greedy`, `omp` and `boltzmann`: `decrease`, `residual` or `normalised`."""
    filter_temperature: float = 0.9
    """Temperature of the filter `boltzmann`, in standard deviations of the scores."""
    weights: str = "nnls"
    """Weights of the survivors: `nnls` (bounded least squares), `uniform`, `simplex`, `unbounded` or `signed`."""
    ridge: float = 1e-3
    """Ridge of weights and of the filter `omp`, as a share of the mean self-interaction."""
    weight_bound: float = 3.0
    """Upper bound of a weight of `nnls`, in units of the best uniform one."""
    granularity: str = "sample"
    """What of a candidate is compared, weighted and trained on: `sample` (the sum over its loss tokens), `token-mean` (their mean, so that
    length does not count), `token-mask` (as `sample`, then tokens of the kept that point away from the target carry no loss)."""

    def __post_init__(self) -> None:
        if self.n_keep < 1:
            raise InputError(f"n_keep must be at least 1, not {self.n_keep}")
        if self.ridge <= 0:
            raise InputError(f"ridge must be positive, not {self.ridge}: equal candidates have singular interactions")
        if self.weight_bound <= 0:
            raise InputError(f"weight_bound must be positive, not {self.weight_bound}")
        if self.filter_temperature <= 0:
            raise InputError(f"filter_temperature must be positive, not {self.filter_temperature}")
        if self.granularity not in GRANULARITIES:
            raise InputError(f"unknown granularity {self.granularity!r}: choose one of {', '.join(GRANULARITIES)}")
