"""Choosing a set offline: `select` and what it takes and gives.

Names are loaded when first asked for, so that `selection_ops.selectors.settings` is read without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selection_ops.curvature import TargetGeometry
    from selection_ops.selectors.base import CandidateSet, Selector, Solution, get_selector, known_selectors, selector
    from selection_ops.selectors.diagnostics import effective_rank, set_cosine
    from selection_ops.selectors.settings import Budget, SelectorSettings
    from selection_ops.selectors.solve import select

_HOMES = {
    "Budget": "selection_ops.selectors.settings",
    "CandidateSet": "selection_ops.selectors.base",
    "Selector": "selection_ops.selectors.base",
    "SelectorSettings": "selection_ops.selectors.settings",
    "Solution": "selection_ops.selectors.base",
    "TargetGeometry": "selection_ops.curvature",
    "effective_rank": "selection_ops.selectors.diagnostics",
    "get_selector": "selection_ops.selectors.solve",
    "known_selectors": "selection_ops.selectors.solve",
    "select": "selection_ops.selectors.solve",
    "selector": "selection_ops.selectors.base",
    "set_cosine": "selection_ops.selectors.diagnostics",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
