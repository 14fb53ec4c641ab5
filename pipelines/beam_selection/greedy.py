"""The end of passes in a distributed selection: the likeliest rows in one place, with their sketches, and exact greedy among them.

Shape legend: n rows of a unit that may be chosen, m rows gathered in one place, K sketch dimension.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from pipelines.beam_selection.passes import Objective
from pipelines.beam_selection.rows import SelectionTask, TaskStep, UnitRows
from pipelines.beam_selection.search import by_unit, find, placed
from selection_ops.selectors.blocks import all_fit, in_blocks
from selection_ops.selectors.greedy import Path, greedy
from selection_ops.selectors.leaders import PlacedRows, in_order
from selection_ops.selectors.ordering import text_order
from selection_ops.selectors.rows import gather_rows, square_rows
from selection_ops.selectors.search import Terms
from selection_ops.selectors.threshold import FeasibleSet

_KEPT_ROWS = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Likely:
    """The rows that greedy decides among: three budgets of the largest weights, then of the largest prices. Adds up.

    What does not belong to the likeliest of some rows does not belong to those of more. As `Relaxed.likeliest`.
    """

    pieces: tuple[PlacedRows, ...]
    """Their gains are prices."""
    weights: tuple[np.ndarray, ...]
    budget: int
    most: int

    def __add__(self, other: Likely) -> Likely:
        both = dataclasses.replace(self, pieces=self.pieces + other.pieces, weights=self.weights + other.weights)
        return both.settled() if sum(len(piece) for piece in both.pieces) > 2 * _KEPT_ROWS else both

    def settled(self) -> Likely:
        """Only the rows that count, in the order of ids."""
        weight_m = np.concatenate(self.weights)
        rows = in_order(self.pieces)
        weight_m = weight_m[text_order(np.concatenate([piece.sample_id_n for piece in self.pieces]))[0]]
        ranked = np.lexsort((-rows.rows.gain_n, -weight_m))
        sizes = np.cumsum(rows.rows.size_n[ranked])
        one, three = (int(np.searchsorted(sizes, times * self.budget, side="right")) for times in (1.0, 3.0))
        kept = np.sort(ranked[: max(1, one, min(three, self.most))])
        return dataclasses.replace(self, pieces=(rows.at(kept),), weights=(weight_m[kept],))

    def of_unit(self, index: int) -> np.ndarray:
        """Rows of a unit, ascending."""
        return self._by_unit.get(index, np.zeros(0, np.int64))

    @functools.cached_property
    def _by_unit(self) -> dict[int, np.ndarray]:
        (rows,) = self.settled().pieces
        return by_unit(rows.place_n, rows.position_n)


def likely_of(element: tuple[int, UnitRows], task: SelectionTask) -> Likely:
    """Of one unit, after passes."""
    rows = element[1]
    assert rows.weight_n is not None
    piece = placed(rows, np.arange(len(rows)), dataclasses.replace(rows.scalars(task.budget.unit), cost_n=None))
    found = Likely(pieces=(piece,), weights=(rows.weight_n,), budget=task.budget.amount, most=task.settings.greedy_rows)
    return found.settled() if len(rows) else found


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Gathered:
    """Rows of one unit in the one place, with their sketches."""

    rows: PlacedRows
    """Their gains are what greedy gains by: <z, g>, or less what else a row costs."""
    scale_m: np.ndarray
    sketch_mK: np.ndarray
    """Unit sketches as stored."""


class Gather(TaskStep):
    """Chosen rows of a unit with their sketches; nothing where there are none."""

    def gathered(self, rows: UnitRows, position_n: np.ndarray, gain_n: np.ndarray) -> Iterator[tuple[None, Gathered]]:
        """position_n: rows of the unit; gain_n: gains of greedy, of the n."""
        if not len(position_n):
            return
        at = find(rows, position_n)
        scalars = dataclasses.replace(rows.scalars(self._task.budget.unit), gain_n=gain_n)
        sketch_mK = self._context.sketches(rows.unit)[torch.from_numpy(position_n)].numpy()
        piece = placed(rows, at, scalars.at(at))
        yield None, Gathered(rows=piece, scale_m=rows.scale_n[at], sketch_mK=sketch_mK)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GreedySet:
    """What greedy chose."""

    taken: Mapping[int, np.ndarray]
    """By unit: rows of the unit, ascending."""
    order: Mapping[int, np.ndarray]
    """Their ranks."""
    rows: int
    considered: int

    def inside(self, rows: UnitRows) -> np.ndarray:
        """1 for the chosen ones of the n, 0 for the others."""
        weight_n = np.zeros(len(rows))
        if rows.index in self.taken:
            weight_n[find(rows, self.taken[rows.index])] = 1.0
        return weight_n


def greedy_set(
    pieces: Iterable[Gathered],
    objective: Objective,
    terms: Terms,
    limit: float | None,
    task: SelectionTask,
    *,
    blocks: bool,
    cut_at_peak: bool,
) -> GreedySet:
    """Exact greedy among gathered rows, or their order in blocks where all of very many are taken; as in memory.

    terms: budget, caps and floors; blocks: whether blocks are allowed.
    """
    pieces = list(pieces)
    ids = np.concatenate([piece.rows.sample_id_n for piece in pieces])
    order = text_order(ids)[0]
    placed_m = in_order([piece.rows for piece in pieces])
    scale_m = np.concatenate([piece.scale_m for piece in pieces])[order]
    unit_mK = torch.from_numpy(np.concatenate([piece.sketch_mK for piece in pieces])[order])
    every, rows = np.arange(len(order)), placed_m.rows
    feasible = allowed(rows, terms, limit, task)
    path: Path
    if blocks and len(every) > task.settings.greedy_rows and all_fit(feasible):
        path = in_blocks(unit_mK, every, scale_m, rows.gain_n, square_rows(unit_mK), objective)
    else:
        path = greedy(gather_rows(unit_mK, every), scale_m, rows.gain_n, feasible, objective, cut_at_peak=cut_at_peak)
    chosen = path.order_m
    taken: dict[int, np.ndarray] = {}
    ranks: dict[int, np.ndarray] = {}
    for place in np.unique(placed_m.place_n[chosen]):
        rank = np.flatnonzero(placed_m.place_n[chosen] == place)
        rank = rank[np.argsort(placed_m.position_n[chosen[rank]])]
        taken[int(place)], ranks[int(place)] = placed_m.position_n[chosen[rank]], rank
    return GreedySet(
        taken=taken,
        order=ranks,
        rows=len(chosen),
        considered=len(every),
    )


def allowed(rows: Any, terms: Terms, limit: float | None, task: SelectionTask) -> FeasibleSet:
    """The weights that the whole selection may take, zero outside of these rows."""
    grouped = bool(task.domains)
    return FeasibleSet(
        size_n=rows.size_n.astype(np.float64),
        budget=float(task.budget.amount),
        equality=task.equality,
        cost_n=None if limit is None else rows.cost_n,
        limit=limit,
        group_n=rows.group_n if grouped else None,
        caps_D=terms.caps_D if grouped else None,
        floors_D=terms.floors_D if grouped else None,
    )
