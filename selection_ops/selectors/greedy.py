"""Exact greedy: add the row that raises a set objective most, one at a time, as far as a feasible set allows.

Shape legend: m rows that are decided among, K sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from selection_ops.selectors import rows
from selection_ops.selectors.relaxed import SetObjective
from selection_ops.selectors.seconds import spent
from selection_ops.selectors.threshold import FeasibleSet

COLUMN_BATCH = 96
"""Gram columns computed at once: reading the rows costs as much for one column as for these."""
COLUMN_BYTES = 3 << 29
"""Gram columns kept for later additions; the oldest go first."""
SHRINK_AT = 3 / 4
"""Share of the rows still free at which those that were added are left out of what is computed from then on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Path:
    """A greedy run over rows."""

    order_m: np.ndarray
    """Rows in the order of addition."""
    objective: list[float]
    """Value of the set objective after each addition."""
    square_m: np.ndarray
    """||s||^2 after each addition."""


@spent("greedy")
def greedy(
    unit_mK: torch.Tensor,
    scale_m: np.ndarray,
    alpha_m: np.ndarray,
    feasible: FeasibleSet,
    objective: SetObjective,
    *,
    cut_at_peak: bool = False,
) -> Path:
    """Add, one at a time, the row that the objective ranks first, while the feasible set allows one. For the set cosine:

        argmax_j (<s, g> + <z_j, g>) / sqrt(||s||^2 + 2 <s, z_j> + ||z_j||^2)

    unit_mK: float32 rows; scale_m: z = scale * row; alpha_m: <z, g> for the unit direction g, less what else a row costs.
    Ties go to the smaller row. <s, z_j> is kept for every row in float64 and updated by one Gram column an addition; columns are computed for
    the likeliest next rows together. `cut_at_peak` keeps the path up to its largest objective. Source: selection.md section 2.
    """
    live = _Live(unit_mK, scale_m, alpha_m)
    guard = _Guard(feasible, len(scale_m))
    columns: dict[int, np.ndarray] = {}
    total, square = 0.0, 0.0
    order: list[int] = []
    reached: list[float] = []
    squares: list[float] = []
    while True:
        open_m = guard.open()
        if not open_m.any():
            break
        up, down, value_m, rank_m = live.up_m, live.down_m, live.value_m, live.rank_m
        np.add(live.alpha_m, total, out=up)
        np.multiply(live.cross_m, 2.0, out=down)
        np.add(down, live.norm_sq_m, out=down)
        np.add(down, square, out=down)
        objective.values(up, down, out=value_m)
        np.copyto(rank_m, value_m)
        if objective.per_size:
            rank_m -= reached[-1] if reached else 0.0
            rank_m /= guard.feasible.size_n
        rank_m[~open_m] = -np.inf
        best = int(rank_m.argmax())
        row = int(live.row_m[best])
        if row not in columns:
            # Only rows without a column, so that every batch is a full one: the product reads all rows for one as for many.
            rank_m[np.searchsorted(live.row_m, np.fromiter(columns, dtype=np.int64))] = -np.inf
            likely = np.argpartition(-rank_m, min(COLUMN_BATCH, len(rank_m) - 1))[:COLUMN_BATCH]
            wanted = [best, *(int(at) for at in likely if at != best and rank_m[at] > -np.inf)][:COLUMN_BATCH]
            for at, column in zip(wanted, rows.gram_rows(live.unit_mK, np.array(wanted)), strict=True):
                columns[int(live.row_m[at])] = column.copy()
            while len(columns) * len(rank_m) * 4 > COLUMN_BYTES and next(iter(columns)) != row:
                columns.pop(next(iter(columns)))
        live.cross_m += (columns.pop(row).astype(np.float64) * live.scale_m) * live.scale_m[best]
        total, square = float(up[best]), float(down[best])
        order.append(row)
        reached.append(float(value_m[best]))
        squares.append(square)
        guard.take(best)
        free = np.count_nonzero(guard.free)
        if free <= SHRINK_AT * len(live.row_m):
            kept = np.flatnonzero(guard.free)
            guard.restrict(kept)
            live.restrict(kept)
            columns = {j: column[kept] for j, column in columns.items()}
    count = int(np.argmax(reached)) + 1 if cut_at_peak and order else len(order)
    order, reached, squares = order[:count], reached[:count], squares[:count]
    return Path(order_m=np.array(order, dtype=np.int64), objective=reached, square_m=np.array(squares))


class _Live:
    """What is known of the rows that may still be added, in their order; rows that were added need no more products."""

    def __init__(self, unit_mK: torch.Tensor, scale_m: np.ndarray, alpha_m: np.ndarray) -> None:
        self.row_m = np.arange(len(scale_m))
        self.unit_mK, self.scale_m, self.alpha_m = unit_mK, scale_m, alpha_m
        self.norm_sq_m = torch.linalg.vecdot(unit_mK, unit_mK).numpy().astype(np.float64) * scale_m**2
        self.cross_m = np.zeros(len(scale_m))
        self._make_buffers()

    def _make_buffers(self) -> None:
        self.up_m, self.down_m, self.value_m, self.rank_m = np.empty((4, len(self.row_m)))

    def restrict(self, kept: np.ndarray) -> None:
        """Leave all but these positions out."""
        self.unit_mK = self.unit_mK[torch.from_numpy(kept)]
        for name in ("row_m", "scale_m", "alpha_m", "norm_sq_m", "cross_m"):
            setattr(self, name, getattr(self, name)[kept])
        self._make_buffers()


class _Guard:
    """Which rows may still be added, so that the rest of the budget can always be spent within the limit."""

    def __init__(self, feasible: FeasibleSet, count: int) -> None:
        self.feasible = feasible
        self.left = feasible.budget
        self.free = np.ones(count, dtype=bool)
        self.spent = 0.0
        self.cost_order = self._by_cost()
        self.used_D = None if feasible.caps_D is None else np.zeros(len(feasible.caps_D))

    def _by_cost(self) -> np.ndarray | None:
        if self.feasible.cost_n is None or self.feasible.limit is None:
            return None
        return np.argsort(self.feasible.cost_n, kind="stable")

    def restrict(self, kept: np.ndarray) -> None:
        """Go on over these positions alone; the others must have been taken."""
        self.feasible = self.feasible.restricted(kept)
        self.free = self.free[kept]
        self.cost_order = self._by_cost()

    def open(self) -> np.ndarray:
        """Rows that fit."""
        feasible = self.feasible
        open_m = self.free & (feasible.size_n <= self.left + 1e-9)
        if self.used_D is not None and feasible.caps_D is not None and feasible.floors_D is not None:
            group = feasible.group_n
            assert group is not None
            open_m &= (self.used_D[group] + feasible.size_n) <= feasible.caps_D[group] + 1e-9
            owed_D = np.maximum(feasible.floors_D - self.used_D, 0.0)
            if owed_D.sum() > 0.0:
                # What a row takes beyond what its own domain is owed may not eat into what the others are.
                beyond_m = np.maximum(feasible.size_n - owed_D[group], 0.0)
                kept_m = open_m & (beyond_m <= self.left - owed_D.sum() + 1e-9)
                owed_m = open_m & (owed_D[group] > 0.0)
                open_m = kept_m if kept_m.any() else owed_m if owed_m.any() else open_m
        if self.cost_order is not None and feasible.cost_n is not None and feasible.limit is not None:
            open_m &= self._affordable()
        return open_m

    def _affordable(self) -> np.ndarray:
        feasible, order = self.feasible, self.cost_order
        assert feasible.cost_n is not None and feasible.limit is not None and order is not None
        # Equal sums in another order differ by roundings; the last word has `within_limit`.
        room = feasible.limit - self.spent + 1e-12 * feasible.limit
        cost_m = feasible.cost_n
        rest = round(self.left) - 1 if feasible.equality else 0
        if rest <= 0:
            return cost_m <= room
        # The cheapest way to fill the rest. A row that belongs to it is always affordable, and counting it twice gives
        # at most what the row after them would cost, so it is not refused either.
        cheap = order[self.free[order]][:rest]
        return cost_m + float(cost_m[cheap].sum()) <= room

    def take(self, row: int) -> None:
        """Spend a row."""
        feasible = self.feasible
        self.free[row] = False
        self.left -= float(feasible.size_n[row])
        if feasible.cost_n is not None:
            self.spent += float(feasible.cost_n[row])
        if self.used_D is not None and feasible.group_n is not None:
            self.used_D[feasible.group_n[row]] += float(feasible.size_n[row])
