"""What an optimizer multiplies a gradient by, from its moments, entry by entry in numpy; and sketches of gradients multiplied so."""

from __future__ import annotations

import numpy as np


def adamw(second: np.ndarray, steps: int, beta1: float, beta2: float, eps: float) -> np.ndarray:
    """P of the step after `steps` steps, the root floored at a hundredth of its root mean square."""
    root = np.sqrt(second / (1 - beta2**steps))
    root = np.maximum(root, 0.01 * np.sqrt(np.mean(root**2)))
    return (1 - beta1) / (1 - beta1 ** (steps + 1)) / (root + eps)


def adafactor(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """1 / sqrt(V), V_oi = row_o column_i / mean(row) (Shazeer and Stern 2018, algorithm 4); leading dimensions are a batch."""
    out = np.empty((*row.shape, column.shape[-1]))
    for place in np.ndindex(*row.shape[:-1]):
        r, c = row[place], column[place]
        out[place] = 1 / np.sqrt(np.outer(r, c) / np.mean(r))
    return out


def log_rank_one(matrices: list[np.ndarray]) -> list[np.ndarray]:
    """exp(a_so + b_i) closest to matrices P_s in the logarithm: means of rows and columns; each scaled to least squares in P_s."""
    stacked = np.log(np.concatenate(matrices))
    fitted = np.exp(stacked.mean(1, keepdims=True) + stacked.mean(0) - stacked.mean())
    return _scaled(fitted, matrices)


def log_rank_one_by_solver(matrices: list[np.ndarray]) -> list[np.ndarray]:
    """The same by a dense least-squares solver with an unknown for every row and column."""
    stacked = np.log(np.concatenate(matrices))
    rows, columns = stacked.shape
    design = np.zeros((rows * columns, rows + columns))
    for o in range(rows):
        for i in range(columns):
            design[o * columns + i, o] = design[o * columns + i, rows + i] = 1
    found = np.linalg.lstsq(design, stacked.ravel(), rcond=None)[0]
    return _scaled(np.exp(found[:rows, None] + found[None, rows:]), matrices)


def _scaled(fitted: np.ndarray, matrices: list[np.ndarray]) -> list[np.ndarray]:
    out, start = [], 0
    for matrix in matrices:
        part = fitted[start : start + len(matrix)]
        out.append(part * np.sum(part * matrix) / np.sum(part * part))
        start += len(matrix)
    return out
