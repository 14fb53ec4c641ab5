"""`match` in a distributed selection: shortlist, passes where they are needed, exact greedy in one place, and the best proposal.

Shape legend: n rows of a unit that may be chosen, m rows gathered in one place, K sketch dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import torch
from apache_beam.pvalue import PCollection
from apache_beam.utils.shared import Shared

from pipelines.beam_selection.decide import Decision, Limit, Totals, Vertex, can_spend, smallest_cost
from pipelines.beam_selection.greedy import Gather, Gathered, GreedySet, greedy_set, likely_of
from pipelines.beam_selection.passes import Chosen, Passing, at_vertex, best_vertex, certificate_of, frank_wolfe
from pipelines.beam_selection.rows import SelectionTask, TaskStep, UnitRows
from pipelines.beam_selection.search import Known, Rest, Sure, View, added, one, search, sure_of, undecided_of
from pipelines.beam_selection.shortlist import Listed, Short, shortlist, top
from pipelines.beam_selection.sums import SetSum, meets, sums_of
from selection_ops.selectors.relaxed import MIN_WEIGHT, SetCosine
from selection_ops.selectors.search import Terms


def match(
    rows: PCollection, total: PCollection, base: PCollection, limit: PCollection, task: SelectionTask, shared: Shared
) -> Chosen:
    """As `Match.choose`. base: budget, caps and floors, keys not per size; limit: after the question whether anything meets it."""
    rows, short = shortlist(rows, total, base, limit, task)
    priced = base | "PerSize" >> beam.Map(_per_size, one(limit), task)
    passed = state = likely = kept = None
    if task.settings.fractional or _may_be_long(task):
        passed, state = _relaxed(rows, total, priced, limit, short, task, shared)
        likely = added(passed | "Likely" >> beam.FlatMap(_likely, one(short), task), "Likeliest")
        kept = sums_of(passed, _weigh_kept, total, task, shared, "Kept")
    gathered = rows | "Gathered" >> beam.ParDo(_GatherShort(task, shared), one(short), _optional(likely))
    greedy = (
        gathered
        | "GroupGathered" >> beam.GroupByKey()
        | "Greedy" >> beam.ParDo(_Greedy(task, shared), one(base), one(limit))
    )
    greedy_sum = sums_of(rows, _weigh_greedy, total, task, shared, "Greedy", one(greedy))
    listed = top(rows, base, task)
    top_sum = sums_of(rows, _weigh_listed, total, task, shared, "Top", one(listed))
    cheaper = cheaper_sum = None
    if task.constrained:
        cheaper = best_vertex(rows, priced, limit, View(kind="linear", unit=task.budget.unit), "Cheaper", task.rounds)
        cheaper_sum = sums_of(rows, _weigh_cheaper, total, task, shared, "Cheaper", one(cheaper))
    decision = greedy | "Decide" >> beam.ParDo(
        _Decide(task, shared), one(total), one(base), one(limit), one(short), one(listed), one(greedy_sum), one(top_sum),
        *(_optional(record) for record in (cheaper, cheaper_sum, state, kept)),
    )  # fmt: skip
    return Chosen(rows=rows, decision=decision, passed=passed, short=short)


def _may_be_long(task: SelectionTask) -> bool:
    """Whether the shortlist may hold more rows than exact greedy takes; only the job knows where tokens or limits decide."""
    multiple, most = task.settings.shortlist, task.settings.greedy_rows
    if multiple > 0.0 and task.budget.unit == "samples" and not task.constrained:
        return min(int(multiple * task.budget.amount), task.samples) > most
    return task.samples > most


def _optional(records: PCollection | None) -> Any:
    return None if records is None else one(records)


def _per_size(terms: Terms, limit: Limit, task: SelectionTask) -> Terms:
    return dataclasses.replace(terms, per_size=True, positive=not task.equality, limit=limit.value)


def _relaxed(
    rows: PCollection,
    total: PCollection,
    priced: PCollection,
    limit: PCollection,
    short: PCollection,
    task: SelectionTask,
    shared: Shared,
) -> tuple[PCollection, PCollection]:
    """Rows after Frank-Wolfe, and its end; no rows where the shortlist is not too long."""
    view = View(kind="linear", unit=task.budget.unit)
    walked = rows | "Walked" >> beam.FlatMap(_walked, one(short), task)
    whole = priced | "WholeBudget" >> beam.Map(_whole_budget, one(total))
    spend = priced | "Spend" >> beam.Map(_spend, one(whole), one(limit), task, None, None, None)
    if task.stiff_limit is not None and not task.equality:
        cheap = View(kind="cheapest", unit=task.budget.unit)
        found = whole | "WholeCheapest" >> beam.Map(lambda terms: dataclasses.replace(terms, limit=None))
        known = search(walked, found, cheap, "Whole", task.rounds)
        sure = sure_of(walked, known, cheap, "Whole")
        rest = undecided_of(walked, known, cheap, "Whole")
        spend = priced | "SpendWithin" >> beam.Map(
            _spend, one(whole), one(limit), task, one(rest), one(known), one(sure)
        )
    start = best_vertex(walked, spend, limit, view, "Start", task.rounds)
    walked = walked | "StartWeights" >> beam.Map(at_vertex, one(start))
    held = sums_of(walked, _weigh_present, total, task, shared, "Start")
    state = total | "Begin" >> beam.ParDo(_Begin(task, shared), one(held), one(start))
    return frank_wolfe(walked, state, total, spend, limit, task, shared, "Relaxed")


def _walked(element: tuple[int, UnitRows], short: Short, task: SelectionTask) -> Iterator[tuple[int, UnitRows]]:
    if task.settings.fractional or short.count > task.settings.greedy_rows:
        rows = element[1].lean()
        yield element[0], dataclasses.replace(rows, alpha_n=rows.gain_n * rows.scale_n)


def _whole_budget(terms: Terms, total: Totals) -> Terms:
    """What is to be spent to the end."""
    return dataclasses.replace(terms, budget=min(terms.budget, int(total.size_D.sum())), positive=False)


def _spend(
    terms: Terms,
    whole: Terms,
    limit: Limit,
    task: SelectionTask,
    rest: Rest | None,
    cheapest: Known | None,
    sure: Sure | None,
) -> Terms:
    """The budget to the end where that can be; `cheapest`: the search for the cheapest way to do it."""
    if not can_spend(whole.size_D, float(whole.budget), True, whole.caps_D, whole.floors_D):
        return terms
    if limit.value is None or rest is None or cheapest is None or sure is None:
        return whole
    return whole if smallest_cost(rest, cheapest, sure) <= limit.value else terms


def _weigh_present(rows: UnitRows, task: SelectionTask) -> tuple[np.ndarray, dict[str, float]]:
    assert rows.weight_n is not None
    return rows.weight_n, {}


def _weigh_kept(rows: UnitRows, task: SelectionTask) -> tuple[np.ndarray, dict[str, float]]:
    """Weights that count, where they are what is wanted."""
    weight_n = rows.weight_n
    assert weight_n is not None
    between = float(((weight_n > 0.0) & (weight_n < 1.0)).sum())
    kept_n = np.where(weight_n >= MIN_WEIGHT, weight_n, 0.0) if task.settings.fractional else np.zeros(len(rows))
    return kept_n, {"between": between}


def _weigh_listed(rows: UnitRows, task: SelectionTask, listed: Listed) -> tuple[np.ndarray, dict[str, float]]:
    return listed.inside(rows).astype(np.float64), {}


def _weigh_greedy(rows: UnitRows, task: SelectionTask, greedy: GreedySet) -> tuple[np.ndarray, dict[str, float]]:
    return greedy.inside(rows), {}


def _weigh_cheaper(rows: UnitRows, task: SelectionTask, vertex: Vertex) -> tuple[np.ndarray, dict[str, float]]:
    return vertex.weights(rows)[2], {}


class _Begin(TaskStep):
    """The state at the start vertex; done at once where there are no rows to pass over."""

    def process(self, element: Totals, held: SetSum | None, start: Vertex | None) -> Iterator[Passing]:
        objective = SetCosine(self._context.direction_K)
        if held is None or start is None:
            yield Passing(objective=objective, sum_K=torch.zeros(0), values=(), done=True)
            return
        sum_K = held.sum_K
        yield Passing(objective=objective, sum_K=sum_K, values=(objective.value(sum_K),), mu=start.mu, nu=start.nu)


def _likely(element: tuple[int, UnitRows], short: Short, task: SelectionTask) -> Iterator[Any]:
    if short.count > task.settings.greedy_rows:
        yield likely_of(element, task)


class _GatherShort(Gather):
    """The likeliest rows after passes, or those of the shortlist."""

    def process(self, element: tuple[int, UnitRows], short: Short, likely: Any) -> Iterator[tuple[None, Gathered]]:
        rows = element[1]
        if likely is not None:
            position_n = likely.of_unit(rows.index)
        else:
            position_n = np.sort(rows.position_n[short.inside(rows)])
        yield from self.gathered(rows, position_n, rows.gain_n * rows.scale_n)


class _Greedy(TaskStep):
    def process(self, element: tuple[None, Iterable[Gathered]], terms: Terms, limit: Limit) -> Iterator[GreedySet]:
        settings = self._task.settings
        yield greedy_set(
            element[1], SetCosine(self._context.direction_K), terms, limit.value, self._task,
            blocks=not settings.allow_short, cut_at_peak=settings.allow_short,
        )  # fmt: skip


class _Decide(TaskStep):
    """The best set that is allowed: of greedy, the top by cosine, and, where those are not, the cheaper vertex by cosine."""

    def process(
        self,
        greedy: GreedySet,
        total: Totals,
        terms: Terms,
        limit: Limit,
        short: Short,
        listed: Listed,
        greedy_sum: SetSum,
        top_sum: SetSum,
        cheaper: Vertex | None,
        cheaper_sum: SetSum | None,
        state: Passing | None,
        kept: SetSum | None,
    ) -> Iterator[Decision]:
        task, objective = self._task, SetCosine(self._context.direction_K)
        sums = {"greedy": greedy_sum, "top by cosine": top_sum}
        values = {name: objective.value(held.sum_K) for name, held in sums.items()}
        valid = [name for name, held in sums.items() if meets(held, total, terms, limit, task)]
        name = max(valid, key=values.__getitem__, default="linear subproblem by cosine")
        if name == "greedy":
            decision = Decision(certificate={}, kind="listed", taken=greedy.taken, order=greedy.order)
        elif name == "top by cosine":
            decision = Decision(certificate={}, kind="listed", taken=listed.rows, known=listed.known)
        else:
            assert cheaper is not None and cheaper_sum is not None
            decision = Decision(certificate={}, kind="cheaper", vertex=cheaper)
            sums[name] = cheaper_sum
        held = sums[name]
        certificate: dict[str, Any] = {}
        if task.settings.fractional:
            assert kept is not None
            name, decision = "relaxed weights", Decision(certificate={}, kind="passed")
            held = kept
            certificate |= {"weight_sum": kept.number("weight"), "size_sum": kept.number("size")}
        certificate |= limit.certificate | {
            "objective": objective.value(held.sum_K),
            "objective_top_cosine": values["top by cosine"],
            "chosen_by": name,
            "shortlist": short.count,
            "shortlist_of": total.pool,
            "greedy_rows": greedy.considered,
            "greedy_steps": greedy.rows,
        }
        if state is not None and kept is not None and state.values:
            certificate |= certificate_of(state) | {"fractional": int(kept.number("between"))}
        if limit.value is not None:
            certificate["cost"] = held.number("cost")
        yield dataclasses.replace(decision, certificate=certificate)
