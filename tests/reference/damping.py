"""Damping figures from dense matrices, by their definitions; float64."""

from __future__ import annotations

import numpy as np


def curvature(rows: np.ndarray, centred: bool) -> np.ndarray:
    rows = rows - rows.mean(axis=0) if centred else rows
    return rows.T @ rows / len(rows)


def figures(z: np.ndarray, rows: np.ndarray, damping: float, centred: bool) -> dict[str, float]:
    """`z` [M, K] are the target's gradients; curvature is of `rows` [M, D, K] (the same with D = 1 but for Gauss-Newton)."""
    k = z.shape[1]
    whole = curvature(rows.reshape(-1, k), centred)
    inverse = np.linalg.inv(whole + damping * np.eye(k))
    mean = z.mean(axis=0)
    out = {
        "effective_dimension": float(np.trace(whole @ inverse)),
        "share_passed": float(np.sum((damping * inverse @ mean) ** 2) / np.sum(mean**2)),
    }
    names = ("gain_in", "gain_out", "cost_in", "cost_out", "signal_in", "signal_out")
    total = dict.fromkeys(names, 0.0)
    for own, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        own_c, other_c = (curvature(rows[half].reshape(-1, k), centred) for half in (own, other))
        inverse = np.linalg.inv(own_c + damping * np.eye(k))
        direction = inverse @ z[own].mean(axis=0)
        for suffix, half, c in (("in", own, own_c), ("out", other, other_c)):
            gain = float(z[half].mean(axis=0) @ direction)
            total[f"gain_{suffix}"] += gain / 2
            total[f"cost_{suffix}"] += float(np.trace(c @ inverse)) / 2
            total[f"signal_{suffix}"] += gain / float(np.std(z[half] @ direction)) / 2
    out["gain_ratio"] = total["gain_out"] / total["gain_in"]
    out["cost_ratio"] = total["cost_out"] / total["cost_in"]
    out["signal_heldout"], out["signal_in_sample"] = total["signal_out"], total["signal_in"]
    return out
