"""The places of a distributed selection where everything comes together: what may be spent, and which rows are chosen.

Shape legend: n rows of a unit that may be chosen, m rows gathered in one place, D groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.beam_selection.rows import SelectionContext, SelectionTask, UnitRows
from pipelines.beam_selection.search import Known, Rest, Sure, View, by_unit, exact_parts, find
from schemas.errors import InfeasibleError, InputError
from selection_ops.selectors import get_selector
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
    scales: tuple[float, ...]
    """The same of the norms of its rows."""
    largest_D: np.ndarray
    """Largest size of a row of each group, int64."""

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
            scales=exact_parts(self.scales + other.scales),
            largest_D=np.maximum(self.largest_D, other.largest_D),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Limit:
    """The stiff limit before and after the question whether anything meets it."""

    value: float | None
    certificate: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vertex:
    """An optimum of the linear subproblem and its rounding; units find their own rows in it."""

    known: Known
    """The search: its surely chosen rows are taken whole."""
    view: View
    rows: Mapping[int, tuple[np.ndarray, np.ndarray]]
    """By unit: undecided rows of the unit, ascending, and float64 [3, n]: their weights, whether the rounding takes them, and whether
    the vertex of smaller cost does."""
    mu: float
    nu: float | None
    value: float
    """c.w"""
    whole_value: float
    """c.w of the rounding."""
    cost: float
    """cost.w"""
    whole_cost: float | None
    """Of the rounding; None without a limit."""
    fractional: int
    weight_sum: float
    without_gain: int
    """Rows of the rounding without gain."""

    def weights(self, rows: UnitRows) -> np.ndarray:
        """Weights, rounding, and vertex of smaller cost, of the rows of a unit; float64 [3, n]."""
        position, scalars = self.view(rows)
        found_n = np.zeros((3, len(rows)))
        found_n[:, position[classify(scalars, self.known.bracket, self.known.terms) == 1]] = 1.0
        if rows.index in self.rows:
            position_n, weights_n = self.rows[rows.index]
            found_n[:, find(rows, position_n)] = weights_n
        return found_n


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
    """What the one place decided; units find their own rows in it."""

    certificate: dict[str, Any]
    kind: str
    """`listed`: the rows in `taken`, and those that the search `known` takes surely; `whole`: the rounding of `vertex`; `cheaper`: its
    vertex of smaller cost; `vertex`: its weights; `passed`: the weights that passes ended with, but for tiny ones; `accepted`: the
    rounding that passes ended with; `accepted weights`: its weights."""
    taken: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    """By unit: rows of the unit, ascending."""
    order: Mapping[int, np.ndarray] | None = None
    """By unit: ranks of these rows, where no score gives them."""
    known: Known | None = None
    vertex: Vertex | None = None
    mu: float = 0.0
    """Price of stiff cost in the scores."""


def totals(element: tuple[int, UnitRows], task: SelectionTask) -> Totals:
    """Of one unit."""
    rows = element[1]
    size_n = rows.scalars(task.budget.unit).size_n
    size_D, largest_D = np.zeros(len(task.domains) + 1, np.int64), np.zeros(len(task.domains) + 1, np.int64)
    np.add.at(size_D, rows.group_n, size_n)
    np.maximum.at(largest_D, rows.group_n, size_n)
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
        scales=(math.fsum(rows.scale_n),),
        largest_D=largest_D,
    )


def spendable(total: Totals, task: SelectionTask, *, per_size: bool) -> Terms:
    """Budget, quotas and floors; InfeasibleError where they alone allow nothing, in the words of the in-memory path."""
    budget, settings = task.budget, task.settings
    if total.pool == 0:
        reasons = ", ".join(sorted(total.reasons))
        raise NothingToChoose(f"none of the {total.candidates} candidates may be chosen ({reasons})")
    equality = task.equality
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
    if not can_spend(total.size_D, float(budget.amount), equality, caps_D, floors_D):
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


def can_spend(size_D: np.ndarray, budget: float, equality: bool, caps_D: np.ndarray, floors_D: np.ndarray) -> bool:
    """Whether groups of these sizes can meet the budget, the caps and the floors together."""
    held = np.flatnonzero(size_D)
    whole = FeasibleSet(
        size_n=size_D[held].astype(np.float64),
        budget=budget,
        equality=equality,
        group_n=held,
        caps_D=caps_D,
        floors_D=floors_D,
    )
    return solve_threshold(np.zeros(len(held)), whole).feasible


def asked_limit(total: Totals, context: SelectionContext) -> Limit:
    """The limit that the settings ask for."""
    budget, settings, selector = context.task.budget, context.task.settings, context.selector
    factor = context.task.stiff_limit
    kind = settings.stiff_limit_kind or selector.default_stiff_limit_kind
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
            geometry = context.geometry
            spectrum = geometry.empirical if selector.name == "direct" else geometry.spectrum
            mean_cost = target_cost(settings.rows or selector.default_rows, spectrum, geometry.sample_count)
        limit = factor * mean_cost * samples
    return Limit(
        value=limit,
        certificate={"limit": limit, "limit_kind": kind, "limit_mean_cost": mean_cost, "limit_raised_by": None},
    )


def smallest_cost(rest: Rest, cheapest: Known, sure: Sure) -> float:
    """Of all selections that spend what they must; `cheapest` is the search for it."""
    undecided = rest.ordered()
    smallest = -sure.gain
    if len(undecided):
        feasible = remaining(cheapest.terms, sure.size_D, 0.0, undecided.rows)
        smallest -= solve_threshold(undecided.rows.gain_n, feasible).value
    return smallest


def met_limit(rest: Rest, cheapest: Known, sure: Sure, limit: Limit, task: SelectionTask) -> Limit:
    """The limit after the cheapest selection is known: as asked, or raised to it, or InfeasibleError, by the policy."""
    assert limit.value is not None
    smallest = smallest_cost(rest, cheapest, sure)
    certificate = limit.certificate | {"smallest_feasible_limit": smallest}
    if smallest <= limit.value:
        return Limit(value=limit.value, certificate=certificate)
    if task.settings.if_infeasible == "error":
        raise infeasible(task.budget, limit.value, smallest)
    certificate["limit_raised_by"] = smallest / limit.value if limit.value > 0 else None
    certificate["limit"] = smallest
    return Limit(value=smallest * (1.0 + _LIMIT_ROOM), certificate=certificate)


def decide_vertex(rest: Rest, known: Known, sure: Sure, limit: Limit, view: View) -> Vertex:
    """The optimum of the linear subproblem and its rounding, from the rows that a search left undecided."""
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
    weights = np.stack([solution.weights_n, chosen_m, solution.cheaper_n == 1.0]).astype(np.float64)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    held = np.flatnonzero(weights.any(axis=0))
    for place in np.unique(undecided.place_n[held]):
        member = held[undecided.place_n[held] == place]
        member = member[np.argsort(undecided.position_n[member])]
        found[int(place)] = (undecided.position_n[member], weights[:, member])
    return Vertex(
        known=known,
        view=view,
        rows=found,
        mu=solution.mu,
        nu=solution.nu if np.isfinite(solution.nu) else None,
        value=sure.gain + solution.value,
        whole_value=sure.gain + float(rows.gain_n @ chosen_m),
        cost=sure.cost + solution.cost,
        whole_cost=None if limit.value is None else sure.cost + float(_cost(rows.cost_n) @ chosen_m),
        fractional=int(solution.fractional.size),
        weight_sum=sure.rows + float(solution.weights_n.sum()),
        without_gain=sure.without_gain + int((chosen_m & (rows.gain_n <= 0.0)).sum()),
    )


def decide_linear(vertex: Vertex, limit: Limit, task: SelectionTask) -> Decision:
    """As `direct-signed` in memory."""
    certificate = (
        limit.certificate
        | solved(vertex, task)
        | {
            "objective_per_iteration": [vertex.value],
            "objective": vertex.whole_value,
            "bound": vertex.value,
            "filled_without_gain": vertex.without_gain,
        }
    )
    kind = "vertex" if task.settings.fractional else "whole"
    return Decision(certificate=certificate, kind=kind, vertex=vertex, mu=vertex.mu)


def solved(vertex: Vertex, task: SelectionTask) -> dict[str, Any]:
    """What a certificate says of the linear subproblem."""
    return {
        "mu": vertex.mu,
        "nu": vertex.nu,
        "fractional": vertex.fractional,
        "weight_sum": vertex.weight_sum,
        "cost": vertex.cost if task.settings.fractional else vertex.whole_cost,
        "cost_fractional": vertex.cost,
    }


def decide_ranking(rest: Rest, known: Known, sure: Sure, total: Totals, task: SelectionTask) -> Decision:
    """The rest of a ranking, filled in its order; as `Ranking` in memory."""
    leaders = rest.ordered()
    rows = leaders.rows
    feasible = remaining(known.terms, sure.size_D, 0.0, rows)
    order_m = fill_ranked(np.argsort(-rows.gain_n, kind="stable"), feasible)
    chosen = sure.rows + len(order_m)
    if task.equality and chosen < task.budget.amount:
        raise InfeasibleError(
            f"selector {task.settings.selector!r} has finite scores for {total.ranked} candidates, too few for a budget of "
            f"{task.budget.amount} samples; lower the budget or allow a short selection"
        )
    last = min(sure.lowest, float(rows.gain_n[order_m].min(initial=math.inf)))
    taken = by_unit(leaders.place_n[order_m], leaders.position_n[order_m])
    return Decision(certificate={"threshold": last if chosen else None}, kind="listed", taken=taken, known=known)


def ranked_view(task: SelectionTask) -> View:
    """The view of a ranking's search."""
    signed = bool(getattr(get_selector(task.settings.selector), "signed", False))
    return View(kind="ranked", unit=task.budget.unit, positive=signed and task.settings.allow_short)


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
