"""What was decided, as the units of a distributed selection see it: weights, order and scores of their own rows.

Shape legend: n rows of a unit that may be chosen.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pipelines.beam_selection.decide import Decision, ranked_view
from pipelines.beam_selection.rows import SelectionContext, UnitRows
from pipelines.beam_selection.search import find
from selection_ops.selectors.baselines import Ranking
from selection_ops.selectors.relaxed import MIN_WEIGHT
from selection_ops.selectors.search import classify


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


def choice_of(
    rows: UnitRows, passed: UnitRows | None, decision: Decision, inside_n: np.ndarray | None, context: SelectionContext
) -> UnitChoice:
    """What was decided of one unit. passed: its rows after passes, where there were any; inside_n: whether rows are of the shortlist."""
    scores = _scores(rows, passed, decision, context)
    weight_n, key_n = _weights(rows, passed, decision, context), scores["score"].copy()
    if decision.kind == "passed" and passed is not None:
        key_n = passed.gain_n
    if decision.order is not None and rows.index in decision.order:
        key_n[find(rows, decision.taken[rows.index])] = -decision.order[rows.index]
    chosen_n = np.flatnonzero(weight_n)
    return UnitChoice(
        rows=rows,
        chosen_n=chosen_n,
        weight_n=weight_n[chosen_n],
        key_n=key_n[chosen_n],
        outside_n=None if inside_n is None else np.flatnonzero(~inside_n),
        scores=scores,
    )


def _weights(rows: UnitRows, passed: UnitRows | None, decision: Decision, context: SelectionContext) -> np.ndarray:
    if decision.kind == "listed":
        weight_n = np.zeros(len(rows))
        if decision.known is not None:
            position, scalars = ranked_view(context.task)(rows)
            weight_n[position[classify(scalars, decision.known.bracket, decision.known.terms) == 1]] = 1.0
        if rows.index in decision.taken:
            weight_n[find(rows, decision.taken[rows.index])] = 1.0
        return weight_n
    if decision.vertex is not None:
        viewed = passed if passed is not None and decision.vertex.view.kind == "nearest" else rows
        return decision.vertex.weights(viewed)[("vertex", "whole", "cheaper").index(decision.kind)]
    assert passed is not None and passed.weight_n is not None
    if decision.kind == "accepted":
        assert passed.whole_n is not None
        return passed.whole_n
    if decision.kind == "passed":
        return np.where(passed.weight_n >= MIN_WEIGHT, passed.weight_n, 0.0)
    return passed.weight_n


def _scores(
    rows: UnitRows, passed: UnitRows | None, decision: Decision, context: SelectionContext
) -> dict[str, np.ndarray]:
    task, selector = context.task, context.selector
    if isinstance(selector, Ranking):
        return {"score": rows.gain_n}
    if selector.name == "match":
        scores = {"score": rows.gain_n, "gain": rows.gain_n * rows.scale_n}
    else:
        price_n = rows.gain_n if passed is None else passed.gain_n
        score_n = price_n if rows.cost_n is None else price_n - decision.mu * rows.cost_n
        gain_n = price_n if selector.name == "direct" else rows.gain_n
        scores = {"score": score_n / rows.scalars(task.budget.unit).size_n, "gain": gain_n}
    if passed is not None and selector.name != "direct":
        assert passed.weight_n is not None
        scores["relaxed_weight"] = passed.weight_n
    if rows.cost_n is not None:
        scores["stiff_cost"] = rows.cost_n
    return scores
