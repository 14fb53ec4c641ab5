"""Choosing a set offline: `select` and what it takes and gives."""

from selection_ops.curvature import TargetGeometry
from selection_ops.selectors import baselines as _baselines  # noqa: F401  registers the rankings
from selection_ops.selectors import direct as _direct  # noqa: F401  registers direct and direct-signed
from selection_ops.selectors import match as _match  # noqa: F401  registers match
from selection_ops.selectors.base import CandidateSet, Selector, Solution, get_selector, known_selectors, selector
from selection_ops.selectors.diagnostics import effective_rank, set_cosine
from selection_ops.selectors.settings import Budget, SelectorSettings
from selection_ops.selectors.solve import select

__all__ = [
    "Budget",
    "CandidateSet",
    "Selector",
    "SelectorSettings",
    "Solution",
    "TargetGeometry",
    "effective_rank",
    "get_selector",
    "known_selectors",
    "select",
    "selector",
    "set_cosine",
]
