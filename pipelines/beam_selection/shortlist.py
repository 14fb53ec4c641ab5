"""The shortlist of `match` in a distributed selection: the best of the pool by cosine, and more of it where that does not suffice.

Shape legend: n rows of a unit that may be chosen, D groups, L times that the shortlist may have to double.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import PCollection

from pipelines.beam_selection.choice import UnitChoice
from pipelines.beam_selection.decide import Limit, Totals, can_spend, smallest_cost
from pipelines.beam_selection.rows import SelectionTask, UnitRows
from pipelines.beam_selection.search import (
    Known,
    Many,
    Rest,
    Sure,
    View,
    added,
    by_unit,
    find,
    leaders_of,
    one,
    search,
    sure_of,
    undecided_of,
)
from pipelines.beam_selection.write import ranks_of
from selection_ops.selectors.rounding import fill_ranked
from selection_ops.selectors.search import Terms, classify, remaining


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Listed:
    """Rows from the top of a ranking."""

    known: Known
    """Its search: the surely listed rows."""
    rows: Mapping[int, np.ndarray]
    """By unit: the others, ascending."""
    count: int

    def inside(self, rows: UnitRows) -> np.ndarray:
        """Which of the n are listed; bool."""
        inside_n = np.zeros(len(rows), dtype=bool)
        position, scalars = View(kind="ranked")(rows)
        inside_n[position[classify(scalars, self.known.bracket, self.known.terms) == 1]] = True
        if rows.index in self.rows:
            inside_n[find(rows, self.rows[rows.index])] = True
        return inside_n


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Short:
    """The shortlist."""

    count: int
    """Its rows."""
    listed: Listed | None = None
    """Which they are; None where levels say it, or where it is the whole pool."""
    level: int | None = None

    def inside(self, rows: UnitRows) -> np.ndarray:
        """Which of the n belong to it; bool."""
        if self.listed is not None:
            return self.listed.inside(rows)
        if self.level is None:
            return np.ones(len(rows), dtype=bool)
        assert rows.level_n is not None
        return rows.level_n <= self.level


def top(rows: PCollection, base: PCollection, task: SelectionTask) -> PCollection:
    """One `Listed` of what the ranking by cosine alone takes: in its order whatever fits budget, caps and floors."""
    return _listed(rows, base, task, "Top", passing=True)


def shortlist(
    rows: PCollection, total: PCollection, base: PCollection, limit: PCollection, task: SelectionTask
) -> tuple[PCollection, PCollection]:
    """Rows, with their levels where there are any, and one `Short`. base: budget, caps and floors, keys not per size."""
    if task.settings.shortlist == 0.0:
        return rows, total | "WholePool" >> beam.Map(lambda found: Short(count=found.pool))
    terms = base | "ShortlistTerms" >> beam.Map(_multiplied, task.settings.shortlist)
    listed = _listed(rows, terms, task, "Shortlist", passing=False)
    if not task.constrained:
        return rows, listed | "Short" >> beam.Map(lambda found: Short(count=found.count, listed=found))
    ranks, _ = ranks_of(rows | "RankPool" >> beam.Map(_every), "Pool")
    rows = (
        {"rows": rows, "ranks": ranks}
        | "WithPoolRanks" >> beam.CoGroupByKey()
        | "Levels" >> beam.Map(_levelled, one(listed), one(total))
    )
    sizes = added(rows | "LevelSizes" >> beam.Map(_level_sizes, one(listed), one(total), task), "LevelSize")
    if task.stiff_limit is None:
        return rows, sizes | "Short" >> beam.Map(
            _first_level, one(listed), one(total), one(base), one(limit), task, None, None, None
        )
    view = View(kind="cheapest", unit=task.budget.unit)
    many = base | "LevelTerms" >> beam.Map(_level_terms, one(listed), one(total), task)
    known = search(rows, many, view, "Level", task.rounds)
    sure = sure_of(rows, known, view, "Level")
    rest = undecided_of(rows, known, view, "Level")
    short = sizes | "Short" >> beam.Map(
        _first_level, one(listed), one(total), one(base), one(limit), task, one(rest), one(known), one(sure)
    )
    return rows, short


def _listed(rows: PCollection, terms: PCollection, task: SelectionTask, label: str, *, passing: bool) -> PCollection:
    view = View(kind="ranked", unit=task.budget.unit)
    known = search(rows, terms, view, label, task.rounds)
    sure = sure_of(rows, known, view, label)
    rest = leaders_of(rows, known, sure, view, label)
    return rest | f"{label}List" >> beam.Map(_list, one(known), one(sure), passing)


def _multiplied(terms: Terms, multiple: float) -> Terms:
    free = np.full(terms.groups, np.inf)
    return dataclasses.replace(terms, budget=int(multiple * terms.budget), caps_D=free, floors_D=np.zeros(terms.groups))


def _list(rest: Rest, known: Known, sure: Sure, passing: bool) -> Listed:
    """What a ranking takes: whatever fits, or as many as come before the first that does not, and one at least."""
    leaders = rest.ordered()
    rows = leaders.rows
    ranked = np.argsort(-rows.gain_n, kind="stable")
    feasible = remaining(known.terms, sure.size_D, 0.0, rows)
    if passing:
        taken = fill_ranked(ranked, feasible)
    else:
        fit = int(np.searchsorted(np.cumsum(rows.size_n[ranked]), feasible.budget, side="right"))
        taken = ranked[: fit if sure.rows else max(1, fit)]
    return Listed(
        known=known,
        rows=by_unit(leaders.place_n[taken], leaders.position_n[taken]),
        count=sure.rows + len(taken),
    )


def _every(element: tuple[int, UnitRows]) -> tuple[int, UnitChoice]:
    index, rows = element
    every = np.arange(len(rows))
    rows = rows.lean()
    return index, UnitChoice(
        rows=rows, chosen_n=every, weight_n=np.ones(len(rows)), key_n=rows.gain_n, outside_n=None, scores={}
    )


def _cuts(listed: Listed, total: Totals) -> np.ndarray:
    """Rows of the shortlist each time that it has doubled; the last is the whole pool."""
    cuts = [min(listed.count, total.pool)]
    while cuts[-1] < total.pool:
        cuts.append(min(total.pool, 2 * cuts[-1]))
    return np.array(cuts)


def _levelled(element: tuple[int, dict[str, Any]], listed: Listed, total: Totals) -> tuple[int, UnitRows]:
    index, grouped = element
    (rows,) = grouped["rows"]
    rank_n = np.zeros(len(rows), np.int64)
    for slot_n, own in grouped["ranks"]:
        rank_n[slot_n] = own
    return index, dataclasses.replace(rows, level_n=np.searchsorted(_cuts(listed, total), rank_n, side="right"))


def _level_sizes(element: tuple[int, UnitRows], listed: Listed, total: Totals, task: SelectionTask) -> np.ndarray:
    """Sizes by level and group; int64 [L, D]."""
    rows = element[1]
    size_LD = np.zeros((len(_cuts(listed, total)), len(task.domains) + 1), np.int64)
    assert rows.level_n is not None
    np.add.at(size_LD, (rows.level_n, rows.group_n), rows.scalars(task.budget.unit).size_n)
    return size_LD


def _level_terms(terms: Terms, listed: Listed, total: Totals, task: SelectionTask) -> Many:
    terms = dataclasses.replace(terms, per_size=True, positive=not task.equality)
    return Many(tuple(terms for _ in _cuts(listed, total)[:-1]))


def _first_level(
    size_LD: np.ndarray,
    listed: Listed,
    total: Totals,
    terms: Terms,
    limit: Limit,
    task: SelectionTask,
    rest: Many | None,
    known: Many | None,
    sure: Many | None,
) -> Short:
    """The first time that budget, caps, floors and limit can be met inside; at the latest, the whole pool."""
    inside_LD, cuts = np.cumsum(size_LD, axis=0), _cuts(listed, total)
    for level in range(len(cuts) - 1):
        held_D = inside_LD[level]
        if not can_spend(held_D, float(task.budget.amount), task.equality, terms.caps_D, terms.floors_D):
            continue
        cost = 0.0
        if rest is not None and known is not None and sure is not None:
            cost = smallest_cost(rest.items[level], known.items[level], sure.items[level])
        if limit.value is not None and cost > limit.value:
            continue
        return Short(count=int(cuts[level]), level=level)
    return Short(count=total.pool)
