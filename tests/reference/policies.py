"""Slow, literal implementations of the policies' formulas on whole vectors: no Gram matrix, nothing shared with the code under test.

z holds a candidate's sketch in every row, u the target's direction.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import nnls


def set_cosine(z: np.ndarray, u: np.ndarray, n_keep: int) -> list[int]:
    """`selection.md`, section 2: add the candidate that makes the cosine of the sum and the target largest."""
    chosen: list[int] = []
    while len(chosen) < min(n_keep, len(z)):
        cosines = {}
        for j in range(len(z)):
            if j not in chosen:
                s = z[[*chosen, j]].sum(0)
                cosines[j] = s @ u / np.linalg.norm(s) / np.linalg.norm(u)
        top = max(cosines.values())
        chosen.append(min(j for j, value in cosines.items() if value >= top - 1e-12))
    return chosen


def non_negative(z: np.ndarray, u: np.ndarray, ridge: float) -> np.ndarray:
    """argmin over w >= 0 of |Z'w - u|^2 + lambda |w|^2 with lambda = ridge * mean |z_i|^2, by Lawson and Hanson's active set."""
    lift = ridge * np.mean((z**2).sum(1))
    rows = np.concatenate([z.T, np.sqrt(lift) * np.eye(len(z))])
    return nnls(rows, np.concatenate([u, np.zeros(len(z))]))[0]


def pursuit(z: np.ndarray, u: np.ndarray, n_keep: int, score: str, ridge: float) -> list[int]:
    """Orthogonal matching pursuit with non-negative coefficients: what the fit leaves of u decides what enters next."""
    chosen: list[int] = []
    left = u
    while len(chosen) < min(n_keep, len(z)):
        best, best_score = None, 0.0
        for j in range(len(z)):
            if j in chosen:
                continue
            r, size = float(z[j] @ left), float(z[j] @ z[j])
            value = {"decrease": max(r, 0.0) ** 2 / (2 * size), "residual": r, "normalised": r / size**0.5}[score]
            if value > best_score:
                best, best_score = j, value
        if best is None:
            break
        chosen.append(best)
        left = u - non_negative(z[chosen], u, ridge) @ z[chosen]
    return chosen


def boltzmann_first(score: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities of a draw: softmax of scores of mean 0 and standard deviation 1, over the temperature."""
    standard = (score - score.mean()) / score.std()
    raised = np.exp(standard / temperature)
    return raised / raised.sum()


def simplex(gram: np.ndarray, align: np.ndarray, total: float) -> np.ndarray:
    """Exact minimiser of w'Kw/2 - b'w over w >= 0 with sum w = total, by trying every support."""
    n = len(align)
    best, best_value = np.zeros(n), np.inf
    for size in range(1, n + 1):
        for support in itertools.combinations(range(n), size):
            index = list(support)
            system = np.zeros((size + 1, size + 1))
            system[:size, :size] = gram[np.ix_(index, index)]
            system[:size, size] = system[size, :size] = 1.0
            solved = np.linalg.solve(system, np.append(align[index], total))[:size]
            if (solved < -1e-12).any():
                continue
            w = np.zeros(n)
            w[index] = solved
            value = 0.5 * w @ gram @ w - align @ w
            if value < best_value:
                best, best_value = w, value
    return best


def highest(scores: list[float], n_keep: int) -> list[int]:
    """Indices of the largest scores, one maximum after the other; the first of equals."""
    left = dict(enumerate(scores))
    chosen: list[int] = []
    while left and len(chosen) < n_keep:
        top = max(left.values())
        chosen.append(min(j for j, value in left.items() if value == top))
        del left[chosen[-1]]
    return chosen
