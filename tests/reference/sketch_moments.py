"""Variances of sketched inner products from their definition: every outcome of the signs, weighed equally. float64.

One small input group: sites share P_in [R, I], each has its own P_out [R, O]; entries +-1/sqrt(R).
"""

from __future__ import annotations

import itertools

import numpy as np


def projected_products(gs: list[np.ndarray], hs: list[np.ndarray], rank: int) -> np.ndarray:
    """<sketch(G), sketch(H)> for every outcome of all signs."""
    outputs = [g.shape[0] for g in gs]
    size = gs[0].shape[1]
    bits = rank * (size + sum(outputs))
    found = np.empty(2**bits)
    for number, signs in enumerate(itertools.product((1.0, -1.0), repeat=bits)):
        values = np.array(signs) / np.sqrt(rank)
        p_in = values[: rank * size].reshape(rank, size)
        at, total = rank * size, 0.0
        for g, h, rows in zip(gs, hs, outputs):
            p_out = values[at : at + rank * rows].reshape(rank, rows)
            at += rank * rows
            total += float(((p_out @ g @ p_in.T) * (p_out @ h @ p_in.T)).sum())
        found[number] = total
    return found


def folded_products(x: np.ndarray, y: np.ndarray, k: int) -> np.ndarray:
    """<fold(x), fold(y)> for every outcome of buckets and signs."""
    found = []
    for places in itertools.product(range(k), repeat=len(x)):
        for signs in itertools.product((1.0, -1.0), repeat=len(x)):
            a, b = np.zeros(k), np.zeros(k)
            for value_x, value_y, place, sign in zip(x, y, places, signs):
                a[place] += sign * value_x
                b[place] += sign * value_y
            found.append(float(a @ b))
    return np.array(found)
