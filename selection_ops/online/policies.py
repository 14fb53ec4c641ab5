"""Policies: what a step does with the candidates it is offered. One interface of one method, one file each.

A policy is a module `selection_ops/online/policy_<name>.py` that decorates a class with `register`; nothing else has to
change. Legend: N candidates, S survivors.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from schemas.errors import InputError
from selection_ops.online.filters import SCORES
from selection_ops.online.metrics import Diagnostics, Geometry, get_metric
from selection_ops.online.options import PolicyOptions
from selection_ops.online.weights import SCHEMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidates of one step, as a policy sees them. `geometry` is there for policies that ask for sketches."""

    step: int
    seed: int
    sample_ids: Sequence[str]
    tokens_N: Sequence[int]
    token_limit: int | None = None
    """Tokens that may still be trained on; None where there is no budget."""
    geometry: Geometry | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What is trained on. `kept` are indices of candidates in the order of candidates, `weight_S` their weights of mean 1.

    The rest explains: one reason a candidate, the filter's score where there was one, and figures for the journal.
    """

    kept: tuple[int, ...]
    weight_S: Tensor
    reasons: tuple[str, ...]
    score_N: Tensor | None = None
    alpha: float | None = None
    diagnostics: Diagnostics | None = None
    fallback: str = ""
    limited: bool = False
    """Whether the token budget kept something out that would have been trained on."""


class Policy(Protocol):
    """A rule from candidates to a decision."""

    needs_sketches: bool

    def choose(self, candidates: Candidates) -> Decision:
        """What to do with the candidates of one step; a pure function of its argument."""
        ...


_REGISTRY: dict[str, Callable[[PolicyOptions], Policy]] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator: the policy is known as `name`; the class is built from `PolicyOptions`."""

    def keep(cls: type) -> type:
        _REGISTRY[name] = cls
        return cls

    return keep


def _discover() -> None:
    import selection_ops.online as package

    for module in sorted(found.name for found in pkgutil.iter_modules(package.__path__)):
        if module.startswith("policy_"):
            importlib.import_module(f"{package.__name__}.{module}")


def policy_names() -> list[str]:
    """Every policy there is."""
    _discover()
    return sorted(_REGISTRY)


def make_policy(name: str, options: PolicyOptions) -> Policy:
    """The policy called `name`. Raises `InputError` listing the known names where it, or one in its options, is unknown."""
    if name not in policy_names():
        raise InputError(f"unknown policy {name!r}: choose one of {', '.join(policy_names())}")
    get_metric(options.metric)
    for kind, value, known in (
        ("filter score", options.filter_score, tuple(SCORES)),
        ("weights", options.weights, SCHEMES),
    ):
        if value not in known:
            raise InputError(f"unknown {kind} {value!r}: choose one of {', '.join(known)}")
    return _REGISTRY[name](options)


OVER_BUDGET = "over the token budget"


def within_budget(order: Sequence[int], tokens_N: Sequence[int], token_limit: int | None) -> tuple[int, ...]:
    """Those of `order`, in order, whose tokens together stay within the limit; one that does not fit is passed over."""
    if token_limit is None:
        return tuple(order)
    left, fitting = token_limit, []
    for index in order:
        if tokens_N[index] <= left:
            fitting.append(index)
            left -= tokens_N[index]
    return tuple(fitting)
