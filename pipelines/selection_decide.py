"""The places of a distributed selection where everything comes together: what may be spent, and which rows are chosen.

Shape legend: n rows of a unit that may be chosen, m rows gathered in one place, D groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.selection_rows import SelectionContext, SelectionTask, UnitRows
from pipelines.selection_search import Known, Rest, Sure, View, exact_parts
from schemas.errors import InfeasibleError, InputError
from selection_ops.selectors.baselines import Ranking
from selection_ops.selectors.limit import infeasible, target_cost
from selection_ops.selectors.problem import NothingToChoose
from selection_ops.selectors.rounding import fill_ranked, round_solution
from selection_ops.selectors.search import Terms, classify, cost_shift, remaining
from selection_ops.selectors.threshold import FeasibleSet, ThresholdSolution, solve_threshold

_LIMIT_ROOM = 1e-12
"""A limit raised to the smallest feasible one, a sum over all rows, may be off by this share, some thousand roundings."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Totals:
    """What all units add up to."""

    candidates: int
    domain_tokens: Mapping[str, tuple[int, int]]
    reasons: Mapping[str, int]
    """Why rows may not be chosen, by first word."""
    pool: int
    tokens: int
    size_D: np.ndarray
    ranked: int
    """Rows with a score to rank by."""
    costs: tuple[float, ...]
    """Numbers whose exact sum the stiff costs of the pool are."""

    def __add__(self, other: Totals) -> Totals:
        domains = dict(self.domain_tokens)
        for name, (rows, tokens) in other.domain_tokens.items():
            before = domains.get(name, (0, 0))
            domains[name] = (before[0] + rows, before[1] + tokens)
        reasons = dict(self.reasons)
        for name, rows in other.reasons.items():
            reasons[name] = reasons.get(name, 0) + rows
        return Totals(
            candidates=self.candidates + other.candidates,
            domain_tokens=domains,
            reasons=reasons,
            pool=self.pool + other.pool,
            tokens=self.tokens + other.tokens,
            size_D=self.size_D + other.size_D,
            ranked=self.ranked + other.ranked,
            costs=exact_parts(self.costs + other.costs),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Limit:
    """The stiff limit before and after the question whether anything meets it."""

    value: float | None
    certificate: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What the one place decided; units find their own rows in it."""

    taken: dict[int, tuple[np.ndarray, np.ndarray]]
    """By unit: rows of the unit, ascending, and their weights."""
    certificate: dict[str, Any]
    mu: float = 0.0
    order: dict[int, np.ndarray] | None = None
    """By unit: ranks of these rows, where a ranking does not give them."""
    inside: dict[int, np.ndarray] | None = None
    """By unit: rows of the shortlist, where there is one."""
    surely: bool = True
    """Whether the surely chosen rows of the search are chosen too."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UnitChoice:
    """The chosen rows of a unit."""

    rows: UnitRows
    chosen_n: np.ndarray
    """Positions among the n."""
    weight_n: np.ndarray
    """Of the chosen ones."""
    key_n: np.ndarray
    """Rows of equal weight stand in descending order of it."""
    outside_n: np.ndarray | None
    """Positions outside the shortlist."""
    scores: dict[str, np.ndarray]
    """Over the n."""


def totals(element: tuple[int, UnitRows], task: SelectionTask) -> Totals:
    """Of one unit."""
    rows = element[1]
    size_D = np.zeros(len(task.domains) + 1, np.int64)
    np.add.at(size_D, rows.group_n, rows.scalars(task.budget.unit).size_n)
    reasons: dict[str, int] = {}
    for reason in rows.reason_N:
        if reason:
            word = reason.split(" ")[0]
            reasons[word] = reasons.get(word, 0) + 1
    return Totals(
        candidates=len(rows.reason_N),
        domain_tokens=rows.domain_tokens,
        reasons=reasons,
        pool=len(rows),
        tokens=int(rows.tokens_n.sum()),
        size_D=size_D,
        ranked=int(np.isfinite(rows.gain_n).sum()),
        costs=() if rows.cost_n is None else (math.fsum(rows.cost_n),),
    )


def spendable(total: Totals, task: SelectionTask, *, per_size: bool) -> Terms:
    """Budget, quotas and floors; InfeasibleError where they alone allow nothing, in the words of the in-memory path."""
    budget, settings = task.budget, task.settings
    if total.pool == 0:
        reasons = ", ".join(sorted(total.reasons))
        raise NothingToChoose(f"none of the {total.candidates} candidates may be chosen ({reasons})")
    equality = budget.unit == "samples" and not settings.allow_short
    caps_D, floors_D = np.full(len(total.size_D), np.inf), np.zeros(len(total.size_D))
    for code, domain in enumerate(task.domains, start=1):
        if not total.size_D[code]:
            known = ", ".join(sorted(total.domain_tokens)[:20])
            raise InputError(f"no candidate has domain {domain!r}; known: {known}")
        if domain in settings.quotas:
            caps_D[code] = np.floor(settings.quotas[domain] * budget.amount + 1e-9)
        if domain in settings.floors:
            floors_D[code] = np.ceil(settings.floors[domain] * budget.amount - 1e-9)
    if equality and budget.amount > total.pool:
        raise InfeasibleError(
            f"the budget is {budget.amount} samples, but only {total.pool} of {total.candidates} "
            "candidates may be chosen; lower the budget or allow a short selection"
        )
    held = np.flatnonzero(total.size_D)
    whole = FeasibleSet(
        size_n=total.size_D[held].astype(np.float64),
        budget=float(budget.amount),
        equality=equality,
        group_n=held,
        caps_D=caps_D,
        floors_D=floors_D,
    )
    if not solve_threshold(np.zeros(len(held)), whole).feasible:
        raise InfeasibleError(
            f"quotas {settings.quotas} and floors {settings.floors} cannot be met together with a budget of "
            f"{budget.amount} {budget.unit}; loosen one of them or allow a short selection"
        )
    return Terms(
        budget=budget.amount,
        size_D=total.size_D,
        caps_D=caps_D,
        floors_D=floors_D,
        shift=cost_shift(math.fsum(total.costs), total.pool),
        per_size=per_size,
        positive=per_size and not equality,
    )


def asked_limit(total: Totals, context: SelectionContext, factor: float | None, kind: str, rows: str) -> Limit:
    """The limit that the settings ask for."""
    budget = context.task.budget
    if factor is None:
        return Limit(value=None, certificate={"limit": None})
    samples = float(budget.amount)
    if budget.unit == "tokens":
        samples /= total.tokens / total.pool
    mean_cost: float | None = None
    limit = float(factor)
    if kind != "absolute":
        mean_cost = math.fsum(total.costs) / total.pool
        if kind == "target" and context.target is not None:
            geometry = context.target.geometry
            mean_cost = target_cost(rows, geometry.spectrum, geometry.sample_count)
        limit = factor * mean_cost * samples
    return Limit(
        value=limit,
        certificate={"limit": limit, "limit_kind": kind, "limit_mean_cost": mean_cost, "limit_raised_by": None},
    )


def met_limit(cheapest: Known, sure: Sure, rest: Rest, limit: Limit, task: SelectionTask) -> Limit:
    """The limit after the cheapest selection is known: as asked, or raised to it, or InfeasibleError, by the policy."""
    assert limit.value is not None
    undecided = rest.ordered()
    smallest = -sure.gain
    if len(undecided):
        feasible = remaining(cheapest.terms, sure.size_D, 0.0, undecided.rows)
        smallest -= solve_threshold(undecided.rows.gain_n, feasible).value
    certificate = limit.certificate | {"smallest_feasible_limit": smallest}
    if smallest <= limit.value:
        return Limit(value=limit.value, certificate=certificate)
    if task.settings.if_infeasible == "error":
        raise infeasible(task.budget, limit.value, smallest)
    certificate["limit_raised_by"] = smallest / limit.value if limit.value > 0 else None
    certificate["limit"] = smallest
    return Limit(value=smallest * (1.0 + _LIMIT_ROOM), certificate=certificate)


def decide_linear(known: Known, sure: Sure, rest: Rest, limit: Limit, task: SelectionTask) -> Decision:
    """The optimum of the linear subproblem and its rounding; as `direct-signed` in memory."""
    undecided = rest.ordered()
    rows = undecided.rows
    feasible = remaining(known.terms, sure.size_D, sure.cost, rows)
    if len(undecided):
        solution = solve_threshold(rows.gain_n, feasible)
        if limit.certificate.get("limit_raised_by") is not None:
            # The room given to roundings is no room for gains: the optimum at the smallest limit is the cheapest vertex.
            whole_m = solution.cheaper_n
            gain, cost = float(rows.gain_n @ whole_m), float(_cost(rows.cost_n) @ whole_m)
            solution = dataclasses.replace(solution, weights_n=whole_m, value=gain, cost=cost)
        chosen_m = round_solution(solution, feasible)
    else:
        solution, chosen_m = _nothing_left(known), np.zeros(0, dtype=bool)
    weights_m = solution.weights_n if task.settings.fractional else chosen_m.astype(np.float64)
    nu = solution.nu if np.isfinite(solution.nu) else None
    spent = None if limit.value is None else sure.cost + float(_cost(rows.cost_n) @ chosen_m)
    value = sure.gain + solution.value
    certificate = limit.certificate | {
        "mu": solution.mu,
        "nu": nu,
        "fractional": int(solution.fractional.size),
        "weight_sum": sure.rows + float(solution.weights_n.sum()),
        "cost": spent,
        "cost_fractional": sure.cost + solution.cost,
        "objective_per_iteration": [value],
        "objective": sure.gain + float(rows.gain_n @ chosen_m),
        "bound": value,
        "filled_without_gain": sure.without_gain + int((chosen_m & (rows.gain_n <= 0.0)).sum()),
    }
    if task.settings.fractional:
        certificate["cost"] = sure.cost + solution.cost
    taken = np.flatnonzero(weights_m)
    by_unit = _by_unit(undecided.place_n[taken], undecided.position_n[taken], weights_m[taken])
    return Decision(taken=by_unit, certificate=certificate, mu=solution.mu)


def decide_ranking(known: Known, sure: Sure, rest: Rest, total: Totals, task: SelectionTask) -> Decision:
    """The rest of a ranking, filled in its order; as `Ranking` in memory."""
    leaders = rest.ordered()
    rows = leaders.rows
    feasible = remaining(known.terms, sure.size_D, 0.0, rows)
    order_m = fill_ranked(np.argsort(-rows.gain_n, kind="stable"), feasible)
    chosen = sure.rows + len(order_m)
    equality = task.budget.unit == "samples" and not task.settings.allow_short
    if equality and chosen < task.budget.amount:
        raise InfeasibleError(
            f"selector {task.settings.selector!r} has finite scores for {total.ranked} candidates, too few for a budget of "
            f"{task.budget.amount} samples; lower the budget or allow a short selection"
        )
    last = min(sure.lowest, float(rows.gain_n[order_m].min(initial=math.inf)))
    by_unit = _by_unit(leaders.place_n[order_m], leaders.position_n[order_m], np.ones(len(order_m)))
    return Decision(taken=by_unit, certificate={"threshold": last if chosen else None})


def choice_of(element: tuple[int, UnitRows], known: Known, decision: Decision, context: SelectionContext) -> UnitChoice:
    """What was decided of one unit."""
    rows, task = element[1], context.task
    ranking = isinstance(context.selector, Ranking)
    scores = {"score": rows.gain_n}
    weight_n = np.zeros(len(rows))
    if not ranking:
        view = View(kind="linear", unit=task.budget.unit)
        scalars = view(rows)[1]
        score_n = rows.gain_n if rows.cost_n is None else rows.gain_n - decision.mu * rows.cost_n
        scores = {"score": score_n / scalars.size_n, "gain": rows.gain_n}
        if rows.cost_n is not None:
            scores["stiff_cost"] = rows.cost_n
    if decision.order is not None:
        scores = {"score": rows.gain_n, "gain": rows.gain_n * rows.scale_n}
    elif decision.surely:
        view = View(kind="ranked", unit=task.budget.unit, positive=_only_positive(context)) if ranking else view
        position, scalars = view(rows)
        weight_n[position[classify(scalars, known.bracket, known.terms) == 1]] = 1.0
    key_n = scores["score"].copy()
    if rows.index in decision.taken:
        position_n, weights = decision.taken[rows.index]
        at = _find(rows, position_n)
        weight_n[at] = weights
        if decision.order is not None:
            key_n[at] = -decision.order[rows.index]
    outside_n: np.ndarray | None = None
    if decision.inside is not None:
        outside = np.ones(len(rows), dtype=bool)
        if rows.index in decision.inside:
            outside[_find(rows, decision.inside[rows.index])] = False
        outside_n = np.flatnonzero(outside)
    chosen_n = np.flatnonzero(weight_n)
    return UnitChoice(
        rows=rows,
        chosen_n=chosen_n,
        weight_n=weight_n[chosen_n],
        key_n=key_n[chosen_n],
        outside_n=outside_n,
        scores=scores,
    )


def _only_positive(context: SelectionContext) -> bool:
    return isinstance(context.selector, Ranking) and context.selector.signed and context.task.settings.allow_short


def ranking_view(context: SelectionContext) -> View:
    """The view of a ranking's search."""
    return View(kind="ranked", unit=context.task.budget.unit, positive=_only_positive(context))


def _find(rows: UnitRows, position_n: np.ndarray) -> np.ndarray:
    """Where these rows of the unit stand among the n."""
    order = np.argsort(rows.position_n)
    return order[np.searchsorted(rows.position_n[order], position_n)]


def _by_unit(
    place_m: np.ndarray, position_m: np.ndarray, weight_m: np.ndarray
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for place in np.unique(place_m):
        member = np.flatnonzero(place_m == place)
        member = member[np.argsort(position_m[member])]
        found[int(place)] = (position_m[member], weight_m[member])
    return found


def _nothing_left(known: Known) -> ThresholdSolution:
    return ThresholdSolution(
        weights_n=np.zeros(0),
        cheaper_n=np.zeros(0),
        feasible=True,
        smallest_limit=0.0,
        mu=known.bracket.mu_low,
        nu=0.0 if known.terms.positive else -math.inf,
        value=0.0,
        cost=0.0,
    )


def _cost(cost_n: np.ndarray | None) -> np.ndarray:
    return np.zeros(0) if cost_n is None else cost_n
