"""Passes over all sketches of a distributed selection: Frank-Wolfe towards the relaxed optimum of a set objective.

A pass is a map (the price of every row, from its sketch and the sum so far), the search for the optimum of the linear subproblem on
prices alone, a combine (the sum of that optimum), and the exact step towards it. Passes are unrolled in the job; the state between two
of them is one small record. After the last step that moves, rows go straight to the end, and what is left of the passes has nothing
to do.

Shape legend: n rows of a unit that may be chosen, K sketch dimension.
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

from pipelines.beam_selection.decide import Vertex, decide_vertex
from pipelines.beam_selection.rows import SelectionTask, TaskStep, UnitRows
from pipelines.beam_selection.search import View, one, search, sure_of, undecided_of
from pipelines.beam_selection.sums import SetSum, sums_of
from selection_ops.selectors.redundancy import PenalisedGain
from selection_ops.selectors.relaxed import SetCosine
from selection_ops.selectors.rows import dot_rows

Objective = SetCosine | PenalisedGain


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Passing:
    """Where the passes are."""

    objective: Objective
    sum_K: torch.Tensor
    """s, float64."""
    values: tuple[float, ...]
    """The objective before each pass and now."""
    bound: float = math.inf
    """No weights have a larger objective; infinite where it was not computed."""
    mu: float = 0.0
    nu: float | None = None
    """Prices of the last subproblem."""
    step: float = 0.0
    """How far the weights move towards the optimum of the last subproblem."""
    done: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """What a selector with passes leaves for the end of the job."""

    rows: PCollection
    decision: PCollection
    passed: PCollection | None = None
    """Rows after passes, where there were any."""
    short: PCollection | None = None


def best_vertex(
    rows: PCollection, terms: PCollection, limit: PCollection, view: View, label: str, rounds: int
) -> PCollection:
    """The `Vertex` of the linear subproblem over rows; nothing where there are none."""
    known = search(rows, terms, view, label, rounds)
    sure = sure_of(rows, known, view, label)
    rest = undecided_of(rows, known, view, label)
    return rest | f"{label}Vertex" >> beam.Map(decide_vertex, one(known), one(sure), one(limit), view)


def at_vertex(element: tuple[int, UnitRows], vertex: Vertex) -> tuple[int, UnitRows]:
    """The rows with the weights of a vertex. No price is known yet but what a row gains."""
    index, rows = element
    assert rows.alpha_n is not None
    return index, dataclasses.replace(rows, weight_n=vertex.weights(rows)[0], gain_n=rows.alpha_n)


def frank_wolfe(
    rows: PCollection,
    state: PCollection,
    total: PCollection,
    terms: PCollection,
    limit: PCollection,
    task: SelectionTask,
    shared: Shared,
    label: str,
) -> tuple[PCollection, PCollection]:
    """As `relaxed_optimum`. rows: with `alpha_n`, and the start in `weight_n`; state: one `Passing` there; terms: what is to be spent.

    Rows at the end hold the weights, and in `gain_n` the prices of the last subproblem; beside them the last `Passing`.
    """
    view = View(kind="linear", unit=task.budget.unit)
    ended: list[PCollection] = []
    before = None
    for number in range(1, task.settings.max_iterations + 1):
        name = f"{label}Pass{number}"
        ended.append(rows | f"{name}Ended" >> beam.FlatMap(_ended, one(state), before, False))
        rows = rows | f"{name}Price" >> beam.ParDo(_Price(task, shared), one(state), before)
        vertex = best_vertex(rows, terms, limit, view, name, task.rounds)
        before = one(vertex)
        held = sums_of(rows, _weigh_pass, total, task, shared, name, before)
        state = state | f"{name}Step" >> beam.Map(_step, one(held), one(vertex))
    ended.append(rows | f"{label}Ended" >> beam.FlatMap(_ended, one(state), before, True))
    return ended | f"{label}AllEnded" >> beam.Flatten(), state


class _Price(TaskStep):
    """Rows with the prices of the next subproblem; none where there is none."""

    def process(
        self, element: tuple[int, UnitRows], state: Passing, vertex: Vertex | None
    ) -> Iterator[tuple[int, UnitRows]]:
        index, rows = element
        if state.done:
            return
        rows = _moved(rows, state, vertex)
        assert rows.alpha_n is not None
        beta_n, norm = np.zeros(len(rows)), state.sum_K.norm()
        if float(norm) > 0.0 and len(rows):
            unit_NK = self._context.sketches(rows.unit)
            beta_n = dot_rows(unit_NK, (state.sum_K / norm)[None])[rows.position_n, 0] * rows.scale_n
        price_n = rows.alpha_n - state.objective.slope(state.sum_K) * beta_n
        yield index, dataclasses.replace(rows, gain_n=price_n)


def _moved(rows: UnitRows, state: Passing, vertex: Vertex | None) -> UnitRows:
    """Rows, whose prices `vertex` is the optimum for, after the step."""
    if state.step <= 0.0 or vertex is None:
        return rows
    assert rows.weight_n is not None
    return dataclasses.replace(rows, weight_n=rows.weight_n + state.step * (vertex.weights(rows)[0] - rows.weight_n))


def _ended(
    element: tuple[int, UnitRows], state: Passing, vertex: Vertex | None, last: bool
) -> Iterator[tuple[int, UnitRows]]:
    if state.done or last:
        yield element[0], _moved(element[1], state, vertex)


def _weigh_pass(rows: UnitRows, task: SelectionTask, vertex: Vertex) -> tuple[np.ndarray, dict[str, float]]:
    vertex_n, weight_n = vertex.weights(rows)[0], rows.weight_n
    assert weight_n is not None
    return vertex_n, {
        "gap": math.fsum(rows.gain_n * (vertex_n - weight_n)),
        "norms": math.fsum(rows.scale_n * (vertex_n + weight_n)),
    }


def _step(state: Passing, held: SetSum | None, vertex: Vertex | None) -> Passing:
    if state.done or held is None or vertex is None:
        return state
    objective, sum_K = state.objective, state.sum_K
    state = dataclasses.replace(state, mu=vertex.mu, nu=vertex.nu)
    if isinstance(objective, PenalisedGain):
        bound = objective.bound_of(sum_K, gap=held.number("gap"), size=held.number("norms"))
        state = dataclasses.replace(state, bound=min(state.bound, bound))
        if state.bound - state.values[-1] <= objective.tolerance:
            return dataclasses.replace(state, step=0.0, done=True)
    move_K = held.sum_K - sum_K
    step = objective.step(sum_K, move_K)
    if step <= 0.0:
        return dataclasses.replace(state, step=0.0, done=True)
    sum_K = sum_K + step * move_K
    return dataclasses.replace(state, sum_K=sum_K, step=step, values=(*state.values, objective.value(sum_K)))


def certificate_of(state: Passing) -> dict[str, Any]:
    """What a certificate says of the passes."""
    return {
        "mu": state.mu,
        "nu": state.nu,
        "objective_per_iteration": list(state.values),
        "objective_relaxed": state.values[-1],
    }
