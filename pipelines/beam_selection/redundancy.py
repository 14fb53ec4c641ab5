"""`direct-signed` with a price on redundancy in a distributed selection. As `selection_ops.selectors.redundancy.choose_penalised`.

Shape legend: n rows of a unit that may be chosen, K sketch dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import PCollection
from apache_beam.utils.shared import Shared

from pipelines.beam_selection.decide import Decision, Limit, Totals, Vertex
from pipelines.beam_selection.greedy import Gather, Gathered, GreedySet, Likely, greedy_set, likely_of
from pipelines.beam_selection.passes import Chosen, Passing, at_vertex, best_vertex, certificate_of, frank_wolfe
from pipelines.beam_selection.rows import SelectionTask, TaskStep, UnitRows
from pipelines.beam_selection.search import View, added, one
from pipelines.beam_selection.sums import SetSum, meets, sums_of
from selection_ops.selectors.redundancy import TOLERANCE, PenalisedGain
from selection_ops.selectors.relaxed import MIN_WEIGHT
from selection_ops.selectors.search import Terms


def penalised(
    rows: PCollection,
    total: PCollection,
    terms: PCollection,
    limit: PCollection,
    plain: PCollection,
    task: SelectionTask,
    shared: Shared,
) -> Chosen:
    """terms: of the linear subproblem, with its limit; plain: its `Vertex` without the price."""
    walked = rows | "Walked" >> beam.Map(_walked) | "StartWeights" >> beam.Map(at_vertex, one(plain))
    start = sums_of(walked, _weigh_present, total, task, shared, "Start")
    state = start | "Begin" >> beam.ParDo(_Begin(task, shared), one(plain))
    passed, state = frank_wolfe(walked, state, total, terms, limit, task, shared, "Relaxed")
    kept = sums_of(passed, _weigh_kept, total, task, shared, "Kept")
    likely = added(passed | "Likely" >> beam.Map(likely_of, task), "Likeliest")
    greedy = (
        passed
        | "Gathered" >> beam.ParDo(_GatherLikely(task, shared), one(likely), one(state))
        | "GroupGathered" >> beam.GroupByKey()
        | "Greedy" >> beam.ParDo(_Greedy(task, shared), one(terms), one(limit), one(state))
    )
    greedy_sum = sums_of(rows, _weigh_greedy, total, task, shared, "Greedy", one(greedy))
    spent = terms | "Spent" >> beam.Map(_spent, one(kept), task)
    view = View(kind="nearest", unit=task.budget.unit)
    nearest = best_vertex(passed, spent, limit, view, "Nearest", task.rounds)
    nearest_sum = sums_of(passed, _weigh_whole, total, task, shared, "Nearest", one(nearest))
    plain_sum = sums_of(rows, _weigh_whole, total, task, shared, "Plain", one(plain))
    decision = greedy | "Decide" >> beam.ParDo(
        _Decide(task, shared), one(total), one(terms), one(limit), one(plain), one(nearest), one(start), one(state),
        one(kept), one(greedy_sum), one(nearest_sum), one(plain_sum),
    )  # fmt: skip
    return Chosen(rows=rows, decision=decision, passed=passed)


def _walked(element: tuple[int, UnitRows]) -> tuple[int, UnitRows]:
    rows = element[1].lean()
    return element[0], dataclasses.replace(rows, alpha_n=rows.gain_n)


def _weigh_present(rows: UnitRows, task: SelectionTask) -> tuple[np.ndarray, dict[str, float]]:
    assert rows.weight_n is not None
    return rows.weight_n, {}


def _weigh_kept(rows: UnitRows, task: SelectionTask) -> tuple[np.ndarray, dict[str, float]]:
    """Weights that count where they are what is wanted, and sums over all of them."""
    weight_n, size_n = rows.weight_n, rows.scalars(task.budget.unit).size_n
    assert weight_n is not None and rows.alpha_n is not None
    kept_n = np.where(weight_n >= MIN_WEIGHT, weight_n, 0.0) if task.settings.fractional else np.zeros(len(rows))
    return kept_n, {
        "between": float(((weight_n > 0.0) & (weight_n < 1.0)).sum()),
        "all_weight": float(weight_n.sum()),
        "all_size": float(weight_n @ size_n),
        "all_cost": 0.0 if rows.cost_n is None else float(rows.cost_n @ weight_n),
        "without_gain": float(((kept_n > 0.0) & (rows.alpha_n <= 0.0)).sum()),
    }


def _weigh_whole(rows: UnitRows, task: SelectionTask, vertex: Vertex) -> tuple[np.ndarray, dict[str, float]]:
    return _whole(rows, vertex.weights(rows)[1])


def _weigh_greedy(rows: UnitRows, task: SelectionTask, greedy: GreedySet) -> tuple[np.ndarray, dict[str, float]]:
    return _whole(rows, greedy.inside(rows))


def _whole(rows: UnitRows, whole_n: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    alpha_n = rows.gain_n if rows.alpha_n is None else rows.alpha_n
    return whole_n, {"without_gain": float(((whole_n > 0.0) & (alpha_n <= 0.0)).sum())}


def _spent(terms: Terms, kept: SetSum, task: SelectionTask) -> Terms:
    """What whole samples near the relaxed weights may spend: what the weights do."""
    if task.equality:
        return terms
    return dataclasses.replace(terms, budget=min(terms.budget, kept.number("all_size")))


class _Begin(TaskStep):
    """The state at the optimum without the price, which says what the price is."""

    def process(self, element: SetSum, plain: Vertex) -> Iterator[Passing]:
        direction_K, sum_K = self._context.direction_K, element.sum_K
        gain, square = float(sum_K @ direction_K), float(sum_K @ sum_K)
        # Without a gain there is nothing that a price could be measured by.
        rho = self._task.settings.redundancy * gain / square if gain > 0.0 else 0.0
        objective = PenalisedGain(direction_K=direction_K, rho=rho, tolerance=TOLERANCE * max(gain, 0.0))
        yield Passing(objective=objective, sum_K=sum_K, values=(objective.value(sum_K),), mu=plain.mu, nu=plain.nu)


class _GatherLikely(Gather):
    """The likeliest rows, whose gain is less the price of their stiff cost."""

    def process(self, element: tuple[int, UnitRows], likely: Likely, state: Passing) -> Iterator[tuple[None, Gathered]]:
        rows = element[1]
        assert rows.alpha_n is not None
        gain_n = rows.alpha_n if rows.cost_n is None else rows.alpha_n - state.mu * rows.cost_n
        yield from self.gathered(rows, likely.of_unit(rows.index), gain_n)


class _Greedy(TaskStep):
    def process(
        self, element: tuple[None, Iterable[Gathered]], terms: Terms, limit: Limit, state: Passing
    ) -> Iterator[GreedySet]:
        task = self._task
        cut = not task.equality and not task.domains
        yield greedy_set(element[1], state.objective, terms, limit.value, task, blocks=False, cut_at_peak=cut)


class _Decide(TaskStep):
    """The set of largest penalised gain that is allowed."""

    def process(
        self,
        greedy: GreedySet,
        total: Totals,
        terms: Terms,
        limit: Limit,
        plain: Vertex,
        nearest: Vertex,
        start: SetSum,
        state: Passing,
        kept: SetSum,
        *proposed: SetSum,
    ) -> Iterator[Decision]:
        task, objective = self._task, state.objective
        assert isinstance(objective, PenalisedGain)
        sums = dict(zip(("greedy", "nearest to the relaxed weights", "without redundancy"), proposed, strict=True))
        values = {name: objective.value(held.sum_K) for name, held in sums.items()}
        valid = [name for name, held in sums.items() if meets(held, total, terms, limit, task)]
        # A floor and a limit can leave every rounding short of the budget; what the selector returns without the price stands.
        name = max(valid, key=values.__getitem__, default="without redundancy")
        held = sums[name]
        if name == "greedy":
            decision = Decision(certificate={}, kind="listed", taken=greedy.taken, order=greedy.order)
        else:
            decision = Decision(certificate={}, kind="whole", vertex=plain if name == "without redundancy" else nearest)
        if task.settings.fractional:
            name, decision = "relaxed weights", Decision(certificate={}, kind="passed")
            held = kept
        gap = max(0.0, state.bound - state.values[-1])
        gain = float(start.sum_K @ objective.direction_K)
        certificate: dict[str, Any] = (
            limit.certificate
            | certificate_of(state)
            | {
                "fractional": int(kept.number("between")),
                "weight_sum": kept.number("all_weight"),
                "cost": None if limit.value is None else held.number("cost"),
                "cost_fractional": kept.number("all_cost"),
                "redundancy_rho": objective.rho,
                "objective": objective.value(held.sum_K),
                "objective_without_redundancy": values["without redundancy"],
                "bound": state.bound,
                "frank_wolfe_gap": gap,
                "frank_wolfe_gap_share": gap / gain if gain > 0.0 else None,
                "gain": float(held.sum_K @ objective.direction_K),
                "sum_norm": float(held.sum_K.norm()),
                "sum_norm_relaxed": float(state.sum_K.norm()),
                "chosen_by": name,
                "filled_without_gain": int(held.number("without_gain")),
            }
        )
        yield dataclasses.replace(decision, certificate=certificate, mu=state.mu)
