"""Caps on outliers: samples whose loss or gradient is unlike what the pool has are left out, each with its reason.

Shape legend: N candidates, n samples of the pool.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from selection_ops.selectors.base import CandidateSet
from selection_ops.selectors.settings import SelectorSettings


def loss_per_token(candidates: CandidateSet) -> np.ndarray:
    """Mean loss per loss token, nats; nan without loss tokens. float64 [N]."""
    return _over(candidates.loss_N, candidates.loss_tokens_N.astype(np.float64))


def grad_norm_per_root_token(candidates: CandidateSet) -> np.ndarray:
    """Norm of the sum-loss gradient over the root of the loss tokens; nan without loss tokens. float64 [N].

    A sum of n token gradients that point their own ways grows as the root of n: over n, short samples would be the outliers,
    and over 1, long ones. Source: direct.md section 3, and the slope of log norm over log n of real samples, about 1/2.
    """
    return _over(candidates.grad_norm_N, np.sqrt(candidates.loss_tokens_N.astype(np.float64)))


def find_outliers(
    candidates: CandidateSet, pool_n: np.ndarray, settings: SelectorSettings
) -> tuple[np.ndarray, dict[str, dict[str, Any]]]:
    """Why each pool sample is left out (empty where it is not), and what each cap was and left out.

    A cap is the value at its quantile of the pool, a value that occurs; what lies above it is left out, so at most a share of
    1 - quantile is, and equal values are treated alike. A sample beyond both caps counts with the first. Without caps, nothing.
    """
    reason_n = np.full(len(pool_n), "", dtype=object)
    caps: dict[str, dict[str, Any]] = {}
    for reason, quantile, measure in (
        ("loss_outlier", settings.max_loss_quantile, loss_per_token),
        ("grad_norm_outlier", settings.max_grad_norm_quantile, grad_norm_per_root_token),
    ):
        if quantile is None:
            continue
        value_n = measure(candidates)[pool_n]
        known_n = value_n[~np.isnan(value_n)]
        cap = float(np.quantile(known_n, quantile, method="inverted_cdf")) if known_n.size else float("inf")
        beyond_n = (value_n > cap) & (reason_n == "")
        reason_n[beyond_n] = reason
        caps[reason] = {
            "quantile": quantile,
            "cap": cap if known_n.size else None,
            "left_out": int(beyond_n.sum()),
        }
    return reason_n, caps


def _over(value_N: np.ndarray, size_N: np.ndarray) -> np.ndarray:
    value_N = value_N.astype(np.float64)
    return np.divide(value_N, size_N, out=np.full(len(value_N), np.nan), where=size_N > 0)
