"""Exact greedy: add the row that raises a set objective most, one at a time, as far as a feasible set allows.

Shape legend: m rows that are decided among, K sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from selection_ops.selectors.relaxed import SetObjective
from selection_ops.selectors.seconds import spent
from selection_ops.selectors.threshold import FeasibleSet

COLUMN_BATCH = 128
"""Gram columns computed at once: reading the rows costs as much for one column as for these."""
COLUMN_BYTES = 3 << 29
"""Gram columns kept for later additions; the oldest go first."""


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
    count = len(scale_m)
    norm_sq_m = torch.linalg.vecdot(unit_mK, unit_mK).numpy().astype(np.float64) * scale_m**2
    cross_m = np.zeros(count)
    guard = _Guard(feasible, count)
    columns: dict[int, np.ndarray] = {}
    total, square = 0.0, 0.0
    order: list[int] = []
    reached: list[float] = []
    squares: list[float] = []
    up, down, value_m, rank_m = np.empty(count), np.empty(count), np.empty(count), np.empty(count)
    while True:
        open_m = guard.open()
        if not open_m.any():
            break
        np.add(alpha_m, total, out=up)
        np.multiply(cross_m, 2.0, out=down)
        np.add(down, norm_sq_m, out=down)
        np.add(down, square, out=down)
        objective.values(up, down, out=value_m)
        np.copyto(rank_m, value_m)
        if objective.per_size:
            rank_m -= reached[-1] if reached else 0.0
            rank_m /= feasible.size_n
        rank_m[~open_m] = -np.inf
        best = int(rank_m.argmax())
        if best not in columns:
            # Only rows without a column, so that every batch is a full one: the product reads all rows for one as for many.
            rank_m[list(columns)] = -np.inf
            likely = np.argpartition(-rank_m, min(COLUMN_BATCH, count - 1))[:COLUMN_BATCH]
            wanted = [best] + [int(j) for j in likely if open_m[j] and j != best and int(j) not in columns]
            wanted = wanted[:COLUMN_BATCH]
            for j, column in zip(wanted, (unit_mK[wanted] @ unit_mK.T).numpy(), strict=True):
                columns[j] = column.copy()
            while len(columns) * count * 4 > COLUMN_BYTES and next(iter(columns)) != best:
                columns.pop(next(iter(columns)))
        cross_m += (columns.pop(best).astype(np.float64) * scale_m) * scale_m[best]
        total, square = float(up[best]), float(down[best])
        order.append(best)
        reached.append(float(value_m[best]))
        squares.append(square)
        guard.take(best)
    kept = int(np.argmax(reached)) + 1 if cut_at_peak and order else len(order)
    order, reached, squares = order[:kept], reached[:kept], squares[:kept]
    return Path(order_m=np.array(order, dtype=np.int64), objective=reached, square_m=np.array(squares))


class _Guard:
    """Which rows may still be added, so that the rest of the budget can always be spent within the limit."""

    def __init__(self, feasible: FeasibleSet, count: int) -> None:
        self.feasible = feasible
        self.left = feasible.budget
        self.free = np.ones(count, dtype=bool)
        self.spent = 0.0
        self.cost_order: np.ndarray | None = None
        if feasible.cost_n is not None and feasible.limit is not None:
            self.cost_order = np.argsort(feasible.cost_n, kind="stable")
        self.used_D = None if feasible.caps_D is None else np.zeros(len(feasible.caps_D))

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
