"""The published problem `direct` as passes of a distributed selection: successive convex approximation, unrolled.

Each round is a map (the gradient of the energy along flat directions, from sketches and the k-vector p of the round before), the
search for the two multipliers on scalars, and a combine (the next p). As `selection_ops.selectors.direct.Direct`.

Shape legend: n rows of a unit that may be chosen, K sketch dimension, J stiff directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import torch
from apache_beam.pvalue import PCollection
from apache_beam.utils.shared import Shared

from pipelines.beam_selection.decide import Decision, Limit, Totals, Vertex, solved
from pipelines.beam_selection.passes import best_vertex
from pipelines.beam_selection.rows import SelectionContext, SelectionTask, TaskStep, UnitRows
from pipelines.beam_selection.search import View, one
from pipelines.beam_selection.sums import SetSum, sums_of
from selection_ops.selectors.direct import CONVERGED, id_uniform
from selection_ops.selectors.rows import dot_rows


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rounds:
    """Where one ascent is."""

    flat_K: torch.Tensor
    """p: the sum of the accepted weights along flat and null directions, float64."""
    values: tuple[float, ...]
    """J of the start and of every accepted round."""
    accepted: Vertex | None = None
    take: bool = False
    """Whether the last optimum was accepted."""
    done: bool = False
    converged: bool = False
    reprice: bool = True
    """Whether the prices of the end are those of p, and not of the round before."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ascent:
    """The end of one ascent."""

    rounds: Rounds
    rounded: float
    """J of the whole samples."""


def ascents(
    rows: PCollection,
    total: PCollection,
    terms: PCollection,
    limit: PCollection,
    task: SelectionTask,
    shared: Shared,
) -> tuple[PCollection, PCollection]:
    """The rows after the best of all ascents, and one `Decision`. rows: lean."""
    ends, records = [], []
    for start in range(task.settings.restarts + 1):
        end, record = _ascend(rows, total, terms, limit, task, shared, start)
        ends.append(end)
        records.append(record | f"Start{start}" >> beam.Map(lambda found, number: (number, found), start))
    found = records | "Ascents" >> beam.Flatten() | "AllAscents" >> beam.combiners.ToList()
    decision = found | "Decide" >> beam.Map(_decide, one(limit), task)
    best = [end | f"Best{start}" >> beam.FlatMap(_if_best, one(decision), start) for start, end in enumerate(ends)]
    return best | "BestAscent" >> beam.Flatten(), decision


def _ascend(
    rows: PCollection,
    total: PCollection,
    terms: PCollection,
    limit: PCollection,
    task: SelectionTask,
    shared: Shared,
    start: int,
) -> tuple[PCollection, PCollection]:
    label, view = f"Ascent{start}", View(kind="linear", unit=task.budget.unit)
    rows = rows | f"{label}Start" >> beam.Map(_started, one(total), task, start)
    held = sums_of(rows, _weigh_start, total, task, shared, f"{label}Start")
    state = held | f"{label}Begin" >> beam.ParDo(_Begin(task, shared))
    ended: list[PCollection] = []
    before = None
    for number in range(1, task.settings.max_iterations + 1):
        name = f"{label}Round{number}"
        ended.append(rows | f"{name}Ended" >> beam.ParDo(_End(task, shared), one(state), before, False))
        rows = rows | f"{name}Price" >> beam.ParDo(_Price(task, shared), one(state), before)
        vertex = best_vertex(rows, terms, limit, view, name, task.rounds)
        before = one(vertex)
        held = sums_of(rows, _weigh_round, total, task, shared, name, before)
        state = state | f"{name}Accept" >> beam.ParDo(_Accept(task, shared), one(held), one(vertex))
    ended.append(rows | f"{label}Ended" >> beam.ParDo(_End(task, shared), one(state), before, True))
    rows = ended | f"{label}AllEnded" >> beam.Flatten()
    whole = sums_of(rows, _weigh_whole, total, task, shared, f"{label}Whole")
    return rows, whole | f"{label}Rounded" >> beam.ParDo(_Rounded(task, shared), one(state))


def _started(element: tuple[int, UnitRows], total: Totals, task: SelectionTask, start: int) -> tuple[int, UnitRows]:
    index, rows = element
    share = min(1.0, task.budget.amount / float(total.size_D.sum()))
    weight_n = np.full(len(rows), share)
    if start > 0:
        weight_n = id_uniform(task.settings.seed * 1_000_003 + start, rows.sample_id_n.astype(str)) * share
    return index, dataclasses.replace(rows, weight_n=weight_n, whole_n=np.zeros(len(rows)))


def _weigh_start(rows: UnitRows, task: SelectionTask) -> tuple[np.ndarray, dict[str, float]]:
    assert rows.weight_n is not None
    return rows.weight_n, {}


def _weigh_round(rows: UnitRows, task: SelectionTask, vertex: Vertex) -> tuple[np.ndarray, dict[str, float]]:
    assert rows.weight_n is not None
    vertex_n = vertex.weights(rows)[0]
    return vertex_n, {"moved": math.fsum((vertex_n - rows.weight_n) ** 2)}


def _weigh_whole(rows: UnitRows, task: SelectionTask) -> tuple[np.ndarray, dict[str, float]]:
    assert rows.whole_n is not None
    return rows.whole_n, {}


def _flat(sum_K: torch.Tensor, context: SelectionContext) -> torch.Tensor:
    stiff_JK = context.geometry.empirical.stiff_vectors
    return sum_K - stiff_JK.T @ (stiff_JK @ sum_K)


def _energy(flat_K: torch.Tensor, context: SelectionContext) -> float:
    return context.geometry.dimension * float(flat_K @ flat_K)


def _prices(rows: UnitRows, state: Rounds, context: SelectionContext) -> np.ndarray:
    if not len(rows):
        return np.zeros(0)
    dot_n = dot_rows(context.sketches(rows.unit), state.flat_K[None])[rows.position_n, 0]
    return 2.0 * context.geometry.dimension * dot_n * rows.scale_n


def _taken(rows: UnitRows, state: Rounds, vertex: Vertex | None) -> UnitRows:
    """Rows, whose prices `vertex` is the optimum for, after it was accepted or not."""
    if not state.take or vertex is None:
        return rows
    weight_n, whole_n, _ = vertex.weights(rows)
    return dataclasses.replace(rows, weight_n=weight_n, whole_n=whole_n)


class _Begin(TaskStep):
    def process(self, element: SetSum) -> Iterator[Rounds]:
        flat_K = _flat(element.sum_K, self._context)
        yield Rounds(flat_K=flat_K, values=(_energy(flat_K, self._context),))


class _Price(TaskStep):
    """Rows with the prices of the next round; none where there is none."""

    def process(
        self, element: tuple[int, UnitRows], state: Rounds, vertex: Vertex | None
    ) -> Iterator[tuple[int, UnitRows]]:
        if not state.done:
            rows = _taken(element[1], state, vertex)
            yield element[0], dataclasses.replace(rows, gain_n=_prices(rows, state, self._context))


class _Accept(TaskStep):
    """The state after a round."""

    def process(self, state: Rounds, held: SetSum | None, vertex: Vertex | None) -> Iterator[Rounds]:
        if state.done or held is None or vertex is None:
            yield state
            return
        flat_K = _flat(held.sum_K, self._context)
        reached = _energy(flat_K, self._context)
        # The start spends the budget but not the limit, so only rounds after the first compare feasible weights.
        if len(state.values) > 1 and reached <= state.values[-1]:
            yield dataclasses.replace(state, take=False, done=True, converged=True, reprice=False)
            return
        converged = math.sqrt(held.number("moved")) < CONVERGED
        yield Rounds(
            flat_K=flat_K,
            values=(*state.values, reached),
            accepted=vertex,
            take=True,
            done=converged,
            converged=converged,
            reprice=not converged,
        )


class _End(TaskStep):
    """Rows of an ascent that has ended, or that has no further rounds."""

    def process(
        self, element: tuple[int, UnitRows], state: Rounds, vertex: Vertex | None, last: bool
    ) -> Iterator[tuple[int, UnitRows]]:
        if not state.done and not last:
            return
        rows = _taken(element[1], state, vertex)
        if state.reprice:
            rows = dataclasses.replace(rows, gain_n=_prices(rows, state, self._context))
        yield element[0], rows


class _Rounded(TaskStep):
    def process(self, element: SetSum, state: Rounds) -> Iterator[Ascent]:
        rounded = _energy(_flat(element.sum_K, self._context), self._context)
        yield Ascent(rounds=state, rounded=rounded)


def _decide(found: list[tuple[int, Ascent]], limit: Limit, task: SelectionTask) -> Decision:
    ends = [ascent for _, ascent in sorted(found, key=lambda pair: pair[0])]
    best = max(range(len(ends)), key=lambda start: ends[start].rounded)
    end = ends[best]
    assert end.rounds.accepted is not None
    certificate: dict[str, Any] = (
        limit.certificate
        | solved(end.rounds.accepted, task)
        | {
            "objective_per_iteration": list(end.rounds.values),
            "objective": end.rounded,
            "converged": end.rounds.converged,
            "restart": best,
            "objective_of_starts": [ascent.rounded for ascent in ends],
        }
    )
    kind = "accepted weights" if task.settings.fractional else "accepted"
    return Decision(certificate=certificate, kind=kind, mu=end.rounds.accepted.mu)


def _if_best(element: tuple[int, UnitRows], decision: Decision, start: int) -> Iterator[tuple[int, UnitRows]]:
    if decision.certificate["restart"] == start:
        yield element
