"""Greedy order, a block at a time, of rows that are all taken: where the set is decided and only its order is not.

Shape legend: n rows to be ordered, K sketch dimension.
"""

from __future__ import annotations

import numpy as np
import torch

from selection_ops.selectors import rows
from selection_ops.selectors.greedy import Path
from selection_ops.selectors.relaxed import SetObjective
from selection_ops.selectors.rounding import meets
from selection_ops.selectors.seconds import spent
from selection_ops.selectors.threshold import FeasibleSet

FIRST_BLOCK = 16
BLOCK_SHARE = 0.1
"""A block over the rows taken before it: the more is summed already, the less a block turns the sum."""
_SUMMED_ROWS = 256


def all_fit(feasible: FeasibleSet) -> bool:
    """Whether every row can be taken at once, so that nothing is left to decide but the order."""
    count = len(feasible.size_n)
    if float(feasible.size_n.sum()) > feasible.budget + 1e-9:
        return False
    if feasible.group_n is not None and feasible.caps_D is not None:
        held_D = np.bincount(feasible.group_n, feasible.size_n, minlength=len(feasible.caps_D))
        if np.any(held_D > feasible.caps_D + 1e-9):
            return False
    return meets(np.arange(count), feasible)


@spent("greedy")
def in_blocks(
    unit_NK: torch.Tensor,
    index_n: np.ndarray,
    scale_n: np.ndarray,
    alpha_n: np.ndarray,
    square_n: np.ndarray,
    objective: SetObjective,
) -> Path:
    """All rows, each block the best for what the blocks before it sum up to; ties go to the smaller position.

    unit_NK[index_n]: unit rows; scale_n: z = scale * row; alpha_n: <z, g>; square_n: ||row||^2. A block takes one product of
    the rows that are left with the sum, so n rows take about log n of them instead of n.
    """
    left_n = np.arange(len(index_n))
    sum_K = torch.zeros(unit_NK.shape[1], dtype=torch.float64)
    norm_sq_n = square_n * scale_n**2
    order: list[np.ndarray] = []
    squares: list[np.ndarray] = []
    total, size = 0.0, FIRST_BLOCK
    while left_n.size:
        norm = float(sum_K.norm())
        cross_n = np.zeros(len(left_n))
        if norm > 0.0:
            cross_n = rows.dot_chosen(unit_NK, index_n[left_n], sum_K / norm) * scale_n[left_n] * norm
        value_n = np.empty(len(left_n))
        objective.values(total + alpha_n[left_n], norm**2 + 2.0 * cross_n + norm_sq_n[left_n], out=value_n)
        ranked = np.argsort(-value_n, kind="stable")
        taken_n = left_n[ranked[:size]]
        for start in range(0, len(taken_n), _SUMMED_ROWS):
            some_n = taken_n[start : start + _SUMMED_ROWS]
            z_nK = rows.gather_rows(unit_NK, index_n[some_n]).double().mul_(torch.from_numpy(scale_n[some_n])[:, None])
            z_nK[0] += sum_K
            z_nK.cumsum_(dim=0)
            sum_K = z_nK[-1].clone()
            squares.append(torch.linalg.vecdot(z_nK, z_nK).numpy())
        order.append(taken_n)
        total += float(alpha_n[taken_n].sum())
        left_n = np.setdiff1d(left_n, taken_n, assume_unique=True)
        size = max(FIRST_BLOCK, int(BLOCK_SHARE * (len(index_n) - len(left_n))))
    order_n, square_m = np.concatenate(order), np.concatenate(squares)
    reached = np.empty(len(order_n))
    objective.values(np.cumsum(alpha_n[order_n]), square_m, out=reached)
    return Path(order_m=order_n, objective=reached.tolist(), square_m=square_m)
