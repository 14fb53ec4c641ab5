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


def muon(stored: np.ndarray, momentum: float, nesterov: bool = True) -> tuple[np.ndarray, bool]:
    """((1 - mu^2) S, whether it stands left) with S = aI + bA + cA^2 at the momentum over its norm, of a matrix as it is stored.

    Times what torch.optim.Muon multiplies the rate of such a matrix by.
    """
    left = stored.shape[0] <= stored.shape[1]
    x = stored / np.sqrt(np.sum(stored**2))
    a = x @ x.T if left else x.T @ x
    polynomial = 3.4445 * np.eye(len(a)) - 4.775 * a + 2.0315 * a @ a
    share = 1 - momentum**2 if nesterov else 1 - momentum
    return max(1.0, stored.shape[0] / stored.shape[1]) ** 0.5 * share * polynomial, left


def power(symmetric: np.ndarray, exponent: float) -> np.ndarray:
    """A power of a symmetric positive matrix, through its eigenvectors."""
    value, vector = np.linalg.eigh(symmetric)
    return (vector * value**exponent) @ vector.T


def less(
    gradient: np.ndarray, tokens: int, first: np.ndarray, second: np.ndarray, beta1: float, beta2: float, eps: float
) -> np.ndarray:
    """Adam's step for one sample's token mean, eps inside the root, no bias correction; times the tokens."""
    mean = gradient / tokens
    return tokens * (beta1 * first + (1 - beta1) * mean) / np.sqrt(beta2 * second + (1 - beta2) * mean**2 + eps)
