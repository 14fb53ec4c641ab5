"""A selection as one Beam job: scalars of the units, copies and outliers, the search, the decision, ranks, parts.

Shape legend: N rows of a unit, n of them that may be chosen, m rows gathered in one place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import torch
from apache_beam.pvalue import AsSingleton, PCollection
from apache_beam.utils.shared import Shared

from pipelines.results import GatherResults
from pipelines.selection_decide import (
    Decision,
    Limit,
    Totals,
    UnitChoice,
    asked_limit,
    choice_of,
    decide_linear,
    decide_ranking,
    met_limit,
    spendable,
    totals,
)
from pipelines.selection_rows import SelectionContext, SelectionTask, UnitParts, UnitRows
from pipelines.selection_search import Known, Rest, Sure, View, added, leaders_of, search, sure_of, undecided_of
from pipelines.selection_write import WriteUnit, part_records, ranks_of, sketch_records
from schemas.errors import InputError
from selection_ops.selectors import get_selector
from selection_ops.selectors.base import Selector
from selection_ops.selectors.baselines import Ranking
from selection_ops.selectors.guesses import tags
from selection_ops.selectors.ordering import as_text, text_order
from selection_ops.selectors.problem import Problem
from selection_ops.selectors.rounding import fill_ranked
from selection_ops.selectors.search import Terms, classify, remaining

COPY_ROWS = 500_000
"""Rows whose copies are looked for in one place."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionJob:
    """The selection pipeline."""

    task: SelectionTask
    units: tuple[UnitParts, ...]
    footer_spec: str
    score: str
    """Fingerprint of the scores."""
    results_url: str

    def build(self, pipeline: beam.Pipeline) -> None:
        """Add the transforms."""
        task, shared = self.task, Shared()
        selector = get_selector(task.settings.selector)
        rows = pipeline | "Units" >> beam.Create(list(self.units)) | "Read" >> beam.ParDo(_Read(task, shared))
        rows = _without_copies(rows, max(1, task.samples // COPY_ROWS))
        rows, caps = _without_outliers(pipeline, rows, task)
        total = added(rows | "Totals" >> beam.Map(totals, task), "AddTotals")
        if isinstance(selector, Ranking):
            known, decision = self._ranking(rows, total, shared)
        elif selector.name == "match":
            known, decision = self._match(rows, total, shared)
        else:
            known, decision = self._linear(rows, total, shared, selector)
        choices = rows | "Choose" >> beam.ParDo(_Choose(task, shared), AsSingleton(known), AsSingleton(decision))
        ranks, counts = ranks_of(choices)
        written = (
            {"choice": choices, "ranks": ranks}
            | "WithRanks" >> beam.CoGroupByKey()
            | "Write" >> beam.ParDo(WriteUnit(task, shared, self.footer_spec, self.score), AsSingleton(counts))
        )
        solution = decision | "Solution" >> beam.Map(_solution_record, AsSingleton(total), AsSingleton(caps))
        records = (part_records(written), solution, *sketch_records(written, task, shared))
        _ = records | "Records" >> beam.Flatten() | "Gather" >> GatherResults(self.results_url)

    def _ranking(self, rows: PCollection, total: PCollection, shared: Shared) -> tuple[PCollection, PCollection]:
        task = self.task
        selector = get_selector(task.settings.selector)
        positive = bool(getattr(selector, "signed", False)) and task.settings.allow_short
        view = View(kind="ranked", unit=task.budget.unit, positive=positive)
        terms = total | "Terms" >> beam.Map(spendable, task, per_size=False)
        known = search(rows, terms, view, "", task.rounds)
        sure = sure_of(rows, known, view, "")
        rest = leaders_of(rows, known, sure, view, "")
        decision = rest | "Decide" >> beam.Map(
            _decide_ranking, AsSingleton(known), AsSingleton(sure), AsSingleton(total), task
        )
        return known, decision

    def _linear(
        self, rows: PCollection, total: PCollection, shared: Shared, selector: Selector
    ) -> tuple[PCollection, PCollection]:
        task, settings = self.task, self.task.settings
        view = View(kind="linear", unit=task.budget.unit)
        factor = selector.default_stiff_limit if settings.stiff_limit is None else settings.stiff_limit
        base = total | "Terms" >> beam.Map(spendable, task, per_size=True)
        limit = total | "Limit" >> beam.ParDo(_Limit(task, shared, factor))
        if factor is not None:
            cheap = View(kind="cheapest", unit=task.budget.unit)
            cheapest = search(rows, base, cheap, "Cheapest", task.rounds)
            sure = sure_of(rows, cheapest, cheap, "Cheapest")
            rest = undecided_of(rows, cheapest, cheap, "Cheapest")
            limit = rest | "MetLimit" >> beam.Map(
                _met_limit, AsSingleton(cheapest), AsSingleton(sure), AsSingleton(limit), task
            )
        terms = base | "WithLimit" >> beam.Map(_with_limit, AsSingleton(limit))
        known = search(rows, terms, view, "", task.rounds)
        sure = sure_of(rows, known, view, "")
        rest = undecided_of(rows, known, view, "")
        decision = rest | "Decide" >> beam.Map(
            _decide_linear, AsSingleton(known), AsSingleton(sure), AsSingleton(limit), task
        )
        return known, decision

    def _match(self, rows: PCollection, total: PCollection, shared: Shared) -> tuple[PCollection, PCollection]:
        task = self.task
        view = View(kind="ranked", unit=task.budget.unit)
        base = total | "Terms" >> beam.Map(spendable, task, per_size=False)
        found = []
        # What the shortlist holds, and what the ranking alone would take, which passes over rows under a budget of tokens.
        for label, multiple in (("Shortlist", task.settings.shortlist), ("Top", 1.0)):
            terms = base | f"{label}Terms" >> beam.Map(_multiplied, multiple)
            known = search(rows, terms, view, label, task.rounds)
            sure = sure_of(rows, known, view, label)
            rest = leaders_of(rows, known, sure, view, label)
            listed = rest | f"{label}List" >> beam.Map(
                _listed, AsSingleton(known), AsSingleton(sure), passing=label == "Top"
            )
            found += [known, listed]
        gathered = (
            rows
            | "Gathered" >> beam.ParDo(_GatherRows(task, shared), *(AsSingleton(one) for one in found))
            | "GroupGathered" >> beam.GroupByKey()
        )
        decision = gathered | "Decide" >> beam.ParDo(_DecideMatch(task, shared), AsSingleton(total))
        return found[0], decision


class _Task(beam.DoFn):
    """A step that needs the run, the target and the selector."""

    def __init__(self, task: SelectionTask, shared: Shared) -> None:
        self._task, self._shared = task, shared

    def setup(self) -> None:
        torch.set_num_threads(1)
        task = self._task
        self._context = self._shared.acquire(lambda: SelectionContext(task))


class _Read(_Task):
    def process(self, element: UnitParts) -> Iterator[tuple[int, UnitRows]]:
        yield element.index, self._context.read(element)


class _Choose(_Task):
    def process(
        self, element: tuple[int, UnitRows], known: Known, decision: Decision
    ) -> Iterator[tuple[int, UnitChoice]]:
        yield element[0], choice_of(element, known, decision, self._context)


class _Limit(_Task):
    def __init__(self, task: SelectionTask, shared: Shared, factor: float | None) -> None:
        super().__init__(task, shared)
        self._factor = factor

    def process(self, element: Totals) -> Iterator[Limit]:
        selector, settings = self._context.selector, self._task.settings
        kind = settings.stiff_limit_kind or selector.default_stiff_limit_kind
        yield asked_limit(element, self._context, self._factor, kind, settings.rows or selector.default_rows)


def _without_copies(rows: PCollection, places: int) -> PCollection:
    """Rows but for exact copies of a row of smaller id."""
    copies = (
        rows
        | "Contents" >> beam.FlatMap(_contents, places)
        | "GroupContents" >> beam.GroupByKey()
        | "Copies" >> beam.FlatMap(_copies)
    )
    return {"rows": rows, "copies": copies} | "WithCopies" >> beam.CoGroupByKey() | "Uncopied" >> beam.Map(_uncopied)


def _contents(
    element: tuple[int, UnitRows], places: int
) -> Iterator[tuple[int, tuple[int, np.ndarray, np.ndarray, np.ndarray]]]:
    index, rows = element
    assert rows.content_id_n is not None
    content_n = as_text(rows.content_id_n)
    held = np.flatnonzero(np.char.str_len(content_n) > 0)
    # Of the text, whichever way numpy holds it here.
    place = (tags(content_n[held].astype("U")) if places > 1 else np.zeros(len(held), np.uint64)) % np.uint64(places)
    for number in np.unique(place):
        own = held[place == number]
        yield int(number), (index, own, content_n[own].astype("U"), rows.sample_id_n[own])


def _copies(
    element: tuple[int, Iterable[tuple[int, np.ndarray, np.ndarray, np.ndarray]]],
) -> Iterator[tuple[int, tuple[np.ndarray, list[str]]]]:
    pieces = sorted(element[1], key=lambda piece: piece[0])
    index = np.concatenate([np.full(len(piece[1]), piece[0]) for piece in pieces])
    own, content, sample_id = (np.concatenate([piece[field] for piece in pieces]) for field in (1, 2, 3))
    by_id, repeats = text_order(sample_id)
    if repeats.any():
        twice = str(sample_id[by_id[int(repeats.argmax())]])
        raise InputError(f"sample id {twice} occurs more than once; ids must be unique")
    order, repeats = text_order(content[by_id])
    order = by_id[order]
    first = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
    copy, original = order[repeats], order[first[repeats]]
    for unit in np.unique(index[copy]):
        mine = index[copy] == unit
        yield int(unit), (own[copy[mine]], [str(name) for name in sample_id[original[mine]]])


def _uncopied(element: tuple[int, dict[str, Any]]) -> tuple[int, UnitRows]:
    index, grouped = element
    (rows,) = grouped["rows"]
    reasons = {
        int(at): f"duplicate_of {original}"
        for own, originals in grouped["copies"]
        for at, original in zip(own, originals)
    }
    kept_n = np.ones(len(rows), dtype=bool)
    kept_n[list(reasons)] = False
    return index, dataclasses.replace(rows.kept(kept_n, reasons), content_id_n=None)


def _without_outliers(
    pipeline: beam.Pipeline, rows: PCollection, task: SelectionTask
) -> tuple[PCollection, PCollection]:
    """Rows within the caps, and one dictionary of caps by reason."""
    caps: PCollection = pipeline | "NoCaps" >> beam.Create([{}])
    whole, quantiles = rows, (task.settings.max_loss_quantile, task.settings.max_grad_norm_quantile)
    for reason, quantile in zip(("loss_outlier", "grad_norm_outlier"), quantiles):
        if quantile is None:
            continue
        view = View(kind=reason)
        measured = added(whole | f"{reason}Measured" >> beam.Map(_measured, reason), f"{reason}Sum")
        terms = measured | f"{reason}Terms" >> beam.Map(_quantile_terms, quantile)
        known = search(whole, terms, view, reason, task.rounds)
        sure = sure_of(whole, known, view, reason)
        rest = leaders_of(whole, known, sure, view, reason)
        caps = rest | f"{reason}Cap" >> beam.Map(
            _cap, AsSingleton(known), AsSingleton(sure), AsSingleton(caps), reason, quantile
        )
    if task.settings.max_loss_quantile is None and task.settings.max_grad_norm_quantile is None:
        return rows, caps
    return whole | "Uncapped" >> beam.Map(_within_caps, AsSingleton(caps)), caps


def _measured(element: tuple[int, UnitRows], reason: str) -> int:
    return len(View(kind=reason)(element[1])[0])


def _quantile_terms(count: int, quantile: float) -> Terms:
    # numpy's `inverted_cdf`: the value at position ceil(count quantile - 1) of the ascending order.
    smallest = min(count, max(0, math.ceil(count * quantile - 1)) + 1)
    return Terms(
        budget=smallest, size_D=np.array([count]), caps_D=np.array([math.inf]), floors_D=np.zeros(1), per_size=False
    )


def _cap(rest: Rest, known: Known, sure: Sure, caps: dict[str, Any], reason: str, quantile: float) -> dict[str, Any]:
    rows = rest.ordered().rows
    order = fill_ranked(np.argsort(-rows.gain_n, kind="stable"), remaining(known.terms, sure.size_D, 0.0, rows))
    lowest = min(sure.lowest, float(rows.gain_n[order].min(initial=math.inf)))
    return caps | {reason: {"quantile": quantile, "cap": -lowest if known.terms.budget else None}}


def _within_caps(element: tuple[int, UnitRows], caps: dict[str, Any]) -> tuple[int, UnitRows]:
    index, rows = element
    for reason in ("loss_outlier", "grad_norm_outlier"):
        if reason in caps and caps[reason]["cap"] is not None and len(rows):
            rows = rows.kept(~(rows.measures[reason] > caps[reason]["cap"]), reason)
    return index, rows


def _decide_ranking(rest: Rest, known: Known, sure: Sure, total: Totals, task: SelectionTask) -> Decision:
    return decide_ranking(known, sure, rest, total, task)


def _decide_linear(rest: Rest, known: Known, sure: Sure, limit: Limit, task: SelectionTask) -> Decision:
    return decide_linear(known, sure, rest, limit, task)


def _met_limit(rest: Rest, cheapest: Known, sure: Sure, limit: Limit, task: SelectionTask) -> Limit:
    return met_limit(cheapest, sure, rest, limit, task)


def _with_limit(terms: Terms, limit: Limit) -> Terms:
    return dataclasses.replace(terms, limit=limit.value)


def _multiplied(terms: Terms, multiple: float) -> Terms:
    return dataclasses.replace(terms, budget=int(multiple * terms.budget))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Listed:
    """Rows of a shortlist beyond the surely listed ones."""

    rows: dict[int, np.ndarray]
    """By unit."""


def _listed(rest: Rest, known: Known, sure: Sure, *, passing: bool) -> _Listed:
    """What a ranking takes, and the first row that it does not: it ends the shortlist as it does in the whole pool."""
    leaders = rest.ordered()
    rows = leaders.rows
    ranked = np.argsort(-rows.gain_n, kind="stable")
    feasible = remaining(known.terms, sure.size_D, 0.0, rows)
    if passing:
        taken = fill_ranked(ranked, feasible)
    else:
        fit = int(np.searchsorted(np.cumsum(rows.size_n[ranked]), feasible.budget, side="right"))
        taken = ranked[: fit + 1]
    found = {}
    for place in np.unique(leaders.place_n[taken]):
        own = taken[leaders.place_n[taken] == place]
        found[int(place)] = np.sort(leaders.position_n[own])
    return _Listed(rows=found)


class _GatherRows(_Task):
    """Rows of the shortlist with their sketches."""

    def process(
        self,
        element: tuple[int, UnitRows],
        short: Known,
        short_list: _Listed,
        top: Known,
        top_list: _Listed,
    ) -> Iterator[tuple[None, tuple[int, np.ndarray, pa.Table, np.ndarray]]]:
        index, rows = element
        view = View(kind="ranked", unit=self._task.budget.unit)
        position, scalars = view(rows)
        wanted: set[int] = set()
        for known, listed in ((short, short_list), (top, top_list)):
            sure = position[classify(scalars, known.bracket, known.terms) == 1]
            wanted.update(rows.position_n[sure].tolist())
            wanted.update(listed.rows.get(index, np.zeros(0, np.int64)).tolist())
        if wanted:
            at = np.array(sorted(wanted))
            table = self._context.table(rows.unit).take(at)
            yield None, (index, at, table, self._context.sketches(rows.unit)[torch.from_numpy(at)].numpy())


class _DecideMatch(_Task):
    """The shortlist in one place: the selector of the in-memory path chooses."""

    def process(
        self, element: tuple[None, Iterable[tuple[int, np.ndarray, pa.Table, np.ndarray]]], total: Totals
    ) -> Iterator[Decision]:
        context, task = self._context, self._task
        pieces = sorted(element[1], key=lambda piece: piece[0])
        place_m = np.concatenate([np.full(len(piece[1]), piece[0]) for piece in pieces])
        position_m = np.concatenate([piece[1] for piece in pieces])
        unit_mK = torch.from_numpy(np.concatenate([piece[3] for piece in pieces]))
        candidates = context.candidates(pa.concat_tables([piece[2] for piece in pieces]), unit_mK)
        settings = dataclasses.replace(
            task.settings, bound=False, two_fold=False, max_loss_quantile=None, max_grad_norm_quantile=None
        )
        geometry = None if context.target is None else context.target.geometry
        refuse_long_shortlist(len(candidates), settings.greedy_rows)
        problem = Problem(candidates, geometry, task.budget, settings, context.selector)
        choice = context.selector.choose(problem)
        chosen_m = problem.pool_n[choice.order_n]
        inside_m = problem.pool_n
        if choice.outside_n is not None:
            inside_m = problem.pool_n[~choice.outside_n]
        taken: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        order: dict[int, np.ndarray] = {}
        inside: dict[int, np.ndarray] = {}
        for place in np.unique(place_m):
            rank = np.flatnonzero(place_m[chosen_m] == place)
            rank = rank[np.argsort(position_m[chosen_m[rank]])]
            taken[int(place)] = (position_m[chosen_m[rank]], choice.weights_n[rank])
            order[int(place)] = rank
            inside[int(place)] = np.sort(position_m[inside_m[place_m[inside_m] == place]])
        certificate = choice.certificate | {"shortlist_of": total.pool}
        yield Decision(taken=taken, order=order, inside=inside, certificate=certificate, surely=False)


def refuse_long_shortlist(rows: int, greedy_rows: int) -> None:
    """Stop where the in-memory path would turn to passes over the whole pool."""
    if rows > greedy_rows:
        raise InputError(
            f"the shortlist of 'match' holds {rows} candidates, more than greedy_rows = {greedy_rows}, which takes passes over the whole pool; "
            "raise --greedy-rows, lower --shortlist or the budget, or select by --engine memory"
        )


def _solution_record(decision: Decision, total: Totals, caps: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": "solution",
        "certificate": decision.certificate,
        "candidates": total.candidates,
        "pool": total.pool,
        "reasons": dict(total.reasons),
        "domains": {name: list(held) for name, held in sorted(total.domain_tokens.items())},
        "caps": {reason: cap | {"left_out": total.reasons.get(reason, 0)} for reason, cap in caps.items()},
    }
