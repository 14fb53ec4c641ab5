"""What a selector is given, what it gives back, and where it is registered.

Shape legend: N candidates, n samples of the pool (those that may be chosen, in the order of sample_id), K sketch
dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from schemas.errors import InputError
from selection_ops.curvature import CURVATURE_COLUMNS, TargetGeometry

__all__ = [
    "CandidateSet",
    "Choice",
    "Selector",
    "Solution",
    "TargetGeometry",
    "get_selector",
    "known_selectors",
    "selector",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateSet:
    """The candidates, a column each; every array has one entry a sample, in any order."""

    sample_id: np.ndarray
    """Unique ids, as texts or as ASCII bytes; ties are broken by them."""
    content_id: np.ndarray
    """Equal for exact duplicates; an empty one is nobody's duplicate."""
    domain: np.ndarray
    """Names, for shares and quotas."""
    tokens_N: np.ndarray
    """Encoded length: what a token budget counts."""
    loss_tokens_N: np.ndarray
    """Tokens that the loss is summed over."""
    loss_N: np.ndarray
    """Sum of token losses, nats."""
    grad_norm_N: np.ndarray
    """Norm of the gradient of that sum, before sketching."""
    norm_N: np.ndarray
    """sketch_norm: the full sketch is the unit row times this."""
    unit_NK: torch.Tensor | None = None
    """Unit sketches, float16 or float32, possibly memory-mapped; None where only scalars were kept."""
    excluded_N: np.ndarray | None = None
    """Why a sample must not be chosen, such as `overlap`; empty where it may."""
    alignment: np.ndarray | None = None
    """Curvature column, see `curvature_columns`; likewise the following."""
    influence: np.ndarray | None = None
    """Curvature column."""
    quad: np.ndarray | None = None
    """Curvature column."""
    stiff_cost: np.ndarray | None = None
    """Curvature column."""
    flat_energy: np.ndarray | None = None
    """Curvature column."""
    null_energy: np.ndarray | None = None
    """Curvature column."""
    stiff_cost_empirical: np.ndarray | None = None
    """Curvature column."""

    def __post_init__(self) -> None:
        """Refuse columns of unequal length."""
        count = len(self.sample_id)
        columns = ("content_id", "domain", "tokens_N", "loss_tokens_N", "loss_N", "grad_norm_N", "norm_N", "unit_NK")
        for name in (*columns, "excluded_N", *CURVATURE_COLUMNS):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise InputError(f"candidates have {count} sample ids but {len(value)} values of {name}")
        if self.unit_NK is not None and self.unit_NK.ndim != 2:
            raise InputError(f"unit_NK must be a matrix with a row per sample, got shape {tuple(self.unit_NK.shape)}")

    def __len__(self) -> int:
        return len(self.sample_id)


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What a selector returns, in positions of the pool."""

    order_n: np.ndarray
    """Chosen positions, best first."""
    weights_n: np.ndarray
    """selection_weight of each chosen position, in that order."""
    scores: dict[str, np.ndarray]
    """Per pool sample, everything that decided; `score` is the main one."""
    certificate: dict[str, Any] = field(default_factory=dict)
    """What was solved and how well; JSON-able."""
    outside_n: np.ndarray | None = None
    """Pool samples that were outside the shortlist."""
    path_n: np.ndarray | None = None
    """Positions in the order greedy added them."""
    path_square_n: np.ndarray | None = None
    """Squared norm of the summed rows after each addition."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A selection, in candidates."""

    order_n: np.ndarray
    """Indices of the chosen candidates, best first."""
    weights_n: np.ndarray
    """selection_weight of each of them; 1 unless fractional weights were asked for."""
    scores: dict[str, np.ndarray]
    """Float arrays over all candidates, nan where not computed; `score` is what ranked them."""
    reason_N: np.ndarray
    """`selected`, `not_chosen`, `outside_shortlist`, `duplicate_of <sample_id>`, `non_finite`, `no_tokens`, `loss_outlier`,
    `grad_norm_outlier`, or the reason given for leaving the sample out."""
    certificate: dict[str, Any]
    """Objective per iteration, limit, bound, multipliers; JSON-able."""
    diagnostics: dict[str, Any]
    """What selections are judged by before training, with a list `warnings`; JSON-able."""


class Selector:
    """A rule for choosing. Subclass, set the flags, register with `@selector(name)`."""

    name: ClassVar[str] = ""
    needs_sketches: ClassVar[bool] = False
    """Whether the unit rows are read; otherwise scalar columns suffice."""
    needs_target: ClassVar[bool] = True
    """Whether a target geometry must be given."""
    default_rows: ClassVar[str] = "sum"
    """`rows` where the user says nothing."""
    default_stiff_limit: ClassVar[float | None] = None
    """`stiff_limit` where the user says nothing."""
    default_stiff_limit_kind: ClassVar[str] = "target"
    """`stiff_limit_kind` where the user says nothing."""

    def choose(self, problem: Any) -> Choice:
        """Choose from the pool of a `selection_ops.selectors.problem.Problem`."""
        raise NotImplementedError


_SELECTORS: dict[str, type[Selector]] = {}


def selector(name: str) -> Callable[[type[Selector]], type[Selector]]:
    """Register a selector class under a name; a name is given once."""

    def register(cls: type[Selector]) -> type[Selector]:
        if name in _SELECTORS:
            raise InputError(
                f"selector {name!r} is registered twice, by {_SELECTORS[name].__name__} and {cls.__name__}"
            )
        cls.name = name
        _SELECTORS[name] = cls
        return cls

    return register


def get_selector(name: str) -> Selector:
    """An instance of the selector of this name; an unknown name lists the known ones."""
    if name not in _SELECTORS:
        raise InputError(f"unknown selector {name!r}; known: {', '.join(known_selectors())}")
    return _SELECTORS[name]()


def known_selectors() -> list[str]:
    """Registered names, sorted."""
    return sorted(_SELECTORS)
