"""Policies: what a step does with the candidates it is offered. One interface of one method, one file each.

A policy is a module `selection_ops/online/policy_<name>.py` that registers a class; nothing else has to change. A policy that is
another one under fixed options registers that one's class with them. Legend: N candidates, S survivors.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from schemas.errors import InputError
from selection_ops.online.filters import get_filter, get_score, top_by_score
from selection_ops.online.metrics import Diagnostics, Geometry, get_metric
from selection_ops.online.options import PolicyOptions
from selection_ops.online.weights import SCHEMES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidates of one step, as a policy sees them. What its flags do not ask for may be missing."""

    step: int
    seed: int
    sample_ids: Sequence[str]
    tokens_N: Sequence[int]
    token_limit: int | None = None
    """Tokens that may still be trained on; None where there is no budget."""
    geometry: Geometry | None = None
    loss_tokens_N: Sequence[int] | None = None
    """Tokens that carry loss."""
    loss_N: Sequence[float | None] | None = None
    """Losses under the model that is trained, sums over the loss tokens, nats."""
    reference_loss_N: Sequence[float | None] | None = None
    """Losses under the reference model, as `loss_N`."""
    norm_N: Sequence[float] | None = None
    """Norms of the gradients of those losses, or of their token means where these are compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What is trained on. `kept` are indices of candidates in the order of choice, `weight_S` their weights of mean 1.

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
    """A rule from candidates to a decision, and what it has to be told; a class that derives from this one needs nothing by default."""

    needs_sketches: bool = False
    """`geometry`: sketches of the candidates and a target to compare them with."""
    needs_losses: bool = False
    """`loss_N`; where there are no sketches this costs a forward pass over the candidates."""
    needs_reference_losses: bool = False
    """`reference_loss_N`: a forward pass of the reference model over the candidates."""
    needs_norms: bool = False
    """`norm_N`: sketches of the candidates, without a target."""

    def choose(self, candidates: Candidates) -> Decision:
        """What to do with the candidates of one step; a pure function of its argument."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Registered:
    build: Callable[[PolicyOptions], Policy]
    fixed: Mapping[str, Any]


_REGISTRY: dict[str, _Registered] = {}
_FREE = PolicyOptions()


def register(name: str, **fixed: Any) -> Callable[[type], type]:
    """Class decorator: the policy is known as `name`; the class is built from `PolicyOptions`, those in `fixed` as they are there."""

    def keep(cls: type) -> type:
        _REGISTRY[name] = _Registered(build=cls, fixed=fixed)
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


def _registered(name: str) -> _Registered:
    if name not in policy_names():
        raise InputError(f"unknown policy {name!r}: choose one of {', '.join(policy_names())}")
    return _REGISTRY[name]


def resolve_options(name: str, options: PolicyOptions) -> PolicyOptions:
    """The options that policy `name` acts by: those given, with the ones it fixes.

    Raises `InputError` for an unknown policy, and where an option that it fixes was set to something else.
    """
    fixed = _registered(name).fixed
    for field, value in fixed.items():
        given = getattr(options, field)
        if given not in (value, getattr(_FREE, field)):
            raise InputError(
                f"policy {name} fixes {field} to {value}; it cannot be {given}: leave {field} out, or set it with policy "
                "filter-then-weight"
            )
    return dataclasses.replace(options, **fixed)


def make_policy(name: str, options: PolicyOptions) -> Policy:
    """The policy called `name`. Raises `InputError` listing the known names where it, or one in its options, is unknown."""
    resolved = resolve_options(name, options)
    for given in (options, resolved):
        get_metric(given.metric)
        get_filter(given.filter)
        get_score(given.filter_score)
        if given.weights not in SCHEMES:
            raise InputError(f"unknown weights {given.weights!r}: choose one of {', '.join(SCHEMES)}")
    policy = _registered(name).build(resolved)
    check_granularity(name, policy, resolved.granularity)
    return policy


def check_granularity(name: str, policy: Policy, granularity: str) -> None:
    """Raises `InputError` where tokens are to be scored against a target that the policy does not look at."""
    if granularity == "token-mask" and not policy.needs_sketches:
        raise InputError(
            f"granularity token-mask scores tokens against the target, and policy {name} looks at none: use granularity sample or "
            "token-mean, or a policy that compares candidates with the target"
        )


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


def keep_highest(candidates: Candidates, score_N: Sequence[float], n_keep: int) -> Decision:
    """The `n_keep` candidates of the highest scores, equally weighted, within the token budget.

    What is longer than all that is left of the budget takes no part, so that it cannot crowd out what fits.
    """
    count = len(candidates.sample_ids)
    scores = torch.tensor(score_N, dtype=torch.float64)
    wanted = top_by_score(scores, n_keep)
    chosen = within_budget(wanted, candidates.tokens_N, candidates.token_limit)
    limited = chosen != wanted
    fits = set(range(count))
    if limited:
        fits = {index for index in fits if candidates.tokens_N[index] <= (candidates.token_limit or 0)}
        wanted = tuple(index for index in top_by_score(scores, count) if index in fits)[:n_keep]
        chosen = within_budget(wanted, candidates.tokens_N, candidates.token_limit)
    reasons = ["scored lower" if index in fits else OVER_BUDGET for index in range(count)]
    for index in wanted:
        reasons[index] = OVER_BUDGET
    for index in chosen:
        reasons[index] = "kept"
    weight_S = torch.ones(len(chosen), dtype=torch.float64)
    return Decision(kept=chosen, weight_S=weight_S, reasons=tuple(reasons), score_N=scores, limited=limited)


def known_losses(
    policy: str, what: str, values_N: Sequence[float | None] | None, way_out: str, ids: Sequence[str]
) -> list[float]:
    """Losses that a policy needs, all of them. Raises `InputError` naming policy, samples and way out where one is missing."""
    if values_N is None:
        raise InputError(f"policy {policy} needs {what} of every candidate, and there is none: {way_out}")
    missing = [name for name, value in zip(ids, values_N, strict=True) if value is None or not math.isfinite(value)]
    if missing:
        raise InputError(
            f"policy {policy} needs {what} of every candidate, and there is none of {missing[0]} "
            f"({len(missing)} of {len(ids)}): {way_out}"
        )
    return [float(value) for value in values_N if value is not None]
