"""A selection as one Beam job: scalars of the units, copies and outliers, the search, the decision, ranks, parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsSingleton, PCollection
from apache_beam.utils.shared import Shared

from pipelines.beam_selection.choice import UnitChoice, choice_of
from pipelines.beam_selection.decide import (
    Decision,
    Limit,
    Totals,
    asked_limit,
    decide_linear,
    decide_ranking,
    met_limit,
    ranked_view,
    spendable,
    totals,
)
from pipelines.beam_selection.direct import ascents
from pipelines.beam_selection.match import match
from pipelines.beam_selection.passes import Chosen, best_vertex
from pipelines.beam_selection.pool import COPY_ROWS, without_copies, without_outliers
from pipelines.beam_selection.redundancy import penalised
from pipelines.beam_selection.rows import SelectionTask, TaskStep, UnitParts, UnitRows
from pipelines.beam_selection.search import View, added, leaders_of, one, search, sure_of, undecided_of
from pipelines.beam_selection.shortlist import Short
from pipelines.beam_selection.write import WriteUnit, part_records, ranks_of, sketch_records
from pipelines.results import GatherResults
from selection_ops.selectors import get_selector
from selection_ops.selectors.baselines import Ranking
from selection_ops.selectors.search import Terms


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
        rows = without_copies(rows, max(1, task.samples // COPY_ROWS))
        rows, caps = without_outliers(pipeline, rows, task)
        total = added(rows | "Totals" >> beam.Map(totals, task), "AddTotals")
        if isinstance(selector, Ranking):
            chosen = self._ranking(rows, total)
        else:
            chosen = self._priced(rows, total, shared)
        decision = chosen.decision
        choices = self._choices(chosen, shared)
        ranks, counts = ranks_of(choices)
        written = (
            {"choice": choices, "ranks": ranks}
            | "WithRanks" >> beam.CoGroupByKey()
            | "Write" >> beam.ParDo(WriteUnit(task, shared, self.footer_spec, self.score), AsSingleton(counts))
        )
        solution = decision | "Solution" >> beam.Map(_solution_record, AsSingleton(total), AsSingleton(caps))
        records = (part_records(written), solution, *sketch_records(written, task, shared))
        _ = records | "Records" >> beam.Flatten() | "Gather" >> GatherResults(self.results_url)

    def _ranking(self, rows: PCollection, total: PCollection) -> Chosen:
        task = self.task
        view = ranked_view(task)
        terms = total | "Terms" >> beam.Map(spendable, task, per_size=False)
        known = search(rows, terms, view, "", task.rounds)
        sure = sure_of(rows, known, view, "")
        rest = leaders_of(rows, known, sure, view, "")
        decision = rest | "Decide" >> beam.Map(decide_ranking, one(known), one(sure), one(total), task)
        return Chosen(rows=rows, decision=decision)

    def _priced(self, rows: PCollection, total: PCollection, shared: Shared) -> Chosen:
        """The selectors whose subproblem has prices of budget and limit."""
        task = self.task
        name = task.settings.selector
        base = total | "Terms" >> beam.Map(spendable, task, per_size=name != "match")
        limit = total | "Limit" >> beam.ParDo(_Limit(task, shared))
        if task.stiff_limit is not None:
            cheap = View(kind="cheapest", unit=task.budget.unit)
            priced = base | "CheapestTerms" >> beam.Map(_per_size, task)
            cheapest = search(rows, priced, cheap, "Cheapest", task.rounds)
            sure = sure_of(rows, cheapest, cheap, "Cheapest")
            rest = undecided_of(rows, cheapest, cheap, "Cheapest")
            limit = rest | "MetLimit" >> beam.Map(met_limit, one(cheapest), one(sure), one(limit), task)
        if name == "match":
            return match(rows, total, base, limit, task, shared)
        terms = base | "WithLimit" >> beam.Map(_with_limit, one(limit))
        if name == "direct":
            passed, decision = ascents(rows | "Lean" >> beam.Map(_lean), total, terms, limit, task, shared)
            return Chosen(rows=rows, decision=decision, passed=passed)
        vertex = best_vertex(rows, terms, limit, View(kind="linear", unit=task.budget.unit), "", task.rounds)
        if task.settings.redundancy > 0.0:
            return penalised(rows, total, terms, limit, vertex, task, shared)
        return Chosen(rows=rows, decision=vertex | "Decide" >> beam.Map(decide_linear, one(limit), task))

    def _choices(self, chosen: Chosen, shared: Shared) -> PCollection:
        """Pairs of unit and its choice."""
        joined = {"rows": chosen.rows}
        if chosen.passed is not None:
            joined["passed"] = chosen.passed
        short = None if chosen.short is None else one(chosen.short)
        return (
            joined
            | "WithPassed" >> beam.CoGroupByKey()
            | "Choose" >> beam.ParDo(_Choose(self.task, shared), one(chosen.decision), short)
        )


class _Read(TaskStep):
    def process(self, element: UnitParts) -> Iterator[tuple[int, UnitRows]]:
        yield element.index, self._context.read(element)


class _Choose(TaskStep):
    def process(
        self, element: tuple[int, dict[str, Any]], decision: Decision, short: Short | None
    ) -> Iterator[tuple[int, UnitChoice]]:
        index, grouped = element
        (rows,), passed = grouped["rows"], list(grouped.get("passed", ()))
        inside_n = None if short is None else short.inside(rows)
        yield index, choice_of(rows, passed[0] if passed else None, decision, inside_n, self._context)


class _Limit(TaskStep):
    def process(self, element: Totals) -> Iterator[Limit]:
        yield asked_limit(element, self._context)


def _lean(element: tuple[int, UnitRows]) -> tuple[int, UnitRows]:
    return element[0], element[1].lean()


def _per_size(terms: Terms, task: SelectionTask) -> Terms:
    return dataclasses.replace(terms, per_size=True, positive=not task.equality)


def _with_limit(terms: Terms, limit: Limit) -> Terms:
    return dataclasses.replace(terms, limit=limit.value)


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
