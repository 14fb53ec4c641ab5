"""Rankings over rows that lie in many places: the few rows beyond a sure prefix that a first-fit filling can still take.

`fill_ranked` goes down a ranking and passes over what no longer fits. Of rows of one group and one size it takes the first ones:
when one no longer fits, no later one does. So where `room` is left beyond the surely taken rows, of each group and size only the first
room // size rows can be taken, and one more, at which a floor that is served in order ends.

Shape legend: n rows of one place, D groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selection_ops.selectors.ordering import text_order
from selection_ops.selectors.search import ScalarRows, Terms


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacedRows:
    """Rows gathered from many places, with their ids and where they come from."""

    rows: ScalarRows
    sample_id_n: np.ndarray
    place_n: np.ndarray
    """Which place, int64."""
    position_n: np.ndarray
    """Which row of it, int64."""

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, index: np.ndarray) -> PlacedRows:
        """Some of the rows."""
        return PlacedRows(
            rows=self.rows.at(index),
            sample_id_n=self.sample_id_n[index],
            place_n=self.place_n[index],
            position_n=self.position_n[index],
        )


def in_order(pieces: Sequence[PlacedRows]) -> PlacedRows:
    """All of them, in the order of ids: the order of ties."""
    costs = [piece.rows.cost_n for piece in pieces]
    both = PlacedRows(
        rows=ScalarRows(
            gain_n=np.concatenate([piece.rows.gain_n for piece in pieces]),
            size_n=np.concatenate([piece.rows.size_n for piece in pieces]),
            group_n=np.concatenate([piece.rows.group_n for piece in pieces]),
            cost_n=None if any(cost is None for cost in costs) else np.concatenate(costs),  # type: ignore[arg-type]
        ),
        sample_id_n=np.concatenate([piece.sample_id_n for piece in pieces]),
        place_n=np.concatenate([piece.place_n for piece in pieces]),
        position_n=np.concatenate([piece.position_n for piece in pieces]),
    )
    return both.at(text_order(both.sample_id_n)[0])


def room_of(terms: Terms, sure_D: np.ndarray) -> np.ndarray:
    """What may still be taken of each group beyond the surely taken rows; int64 [D]."""
    left = terms.budget - int(sure_D.sum())
    return np.maximum(np.minimum(terms.caps_D - sure_D, left), 0.0).astype(np.int64)


def leading(rows: ScalarRows, room_D: np.ndarray) -> np.ndarray:
    """Positions, ascending, of the rows that may matter; `rows` are in the order of ids, and so stand ties."""
    order = np.lexsort((-rows.gain_n, rows.size_n, rows.group_n))
    size_n, group_n = rows.size_n[order], rows.group_n[order]
    begins = np.concatenate([[True], (size_n[1:] != size_n[:-1]) | (group_n[1:] != group_n[:-1])])[: len(order)]
    start_n = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    return np.sort(order[np.arange(len(order)) - start_n <= room_D[group_n] // size_n])
