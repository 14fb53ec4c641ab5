"""Which damping of (C + lambda I)^-1 can be trusted: what it passes, and whether it holds on target samples that it has not seen.

For a damping lambda and a curvature C with eigenvalues l_j:

    effective dimension     tr(C (C + lambda I)^-1) = sum_j l_j / (l_j + lambda): directions that the inverse holds back
    share passed            |lambda (C + lambda I)^-1 g|^2 / |g|^2: energy of the mean gradient g that is not held back (1 for a large
                            lambda, the plain dot product; for a small one what lies in the null space)

By two-fold cross-validation over the target's samples (basis A and mean g_A from one half, everything else from the other, B; both
ways, by the parity of their index):

    gain ratio              <g_B, d> / <g_A, d>, d = (C_A + lambda I)^-1 g_A: what is left on unseen samples of the gain that the basis promises
    cost ratio              tr(C_B (C_A + lambda I)^-1) over tr(C_A (C_A + lambda I)^-1): how much more unseen samples cost
    signal                  <g_B, d> over the standard deviation of <z_b, d>: how far the whitened gain of unseen samples stands above their
                            spread

A damping is trusted where the gain ratio is at least one half and the cost ratio at most two. Recommended is, of those (of all, where
there is none), the one with the largest signal; of dampings within one per cent of it, the largest.

Shape legend: M target samples, D draws of labels, K sketch dimension, J eigenvalues.
"""

from __future__ import annotations

from typing import Any

import torch

from selection_ops.curvature import TargetGeometry
from selection_ops.spectrum import damped_inverse, decompose

FACTORS = (0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Multiples of the mean eigenvalue."""
QUANTILES = (0.1, 0.5, 0.9)
FEWEST = 8
"""Below this many samples a half has no spread to speak of."""


def damping_report(geometry: TargetGeometry, sampled_MDK: torch.Tensor | None = None) -> dict[str, Any]:
    """Rows over a grid of dampings, and the one recommended with the reason; JSON-able.

    `sampled_MDK` are the sketches at sampled labels that a geometry of curvature `gauss-newton` was made from.
    """
    values_J = geometry.spectrum.values_J
    if not values_J.numel():
        return {"rows": [], "recommended": None, "reason": "the curvature is zero: there is nothing to damp"}
    mean = float(values_J.mean())
    grid = {factor * mean: f"{factor:g} x mean" for factor in (*FACTORS, geometry.damping_factor)}
    for quantile in QUANTILES:
        grid.setdefault(float(values_J.quantile(quantile)), f"quantile {quantile:g}")
    folds = _folds(geometry, sampled_MDK) if geometry.sample_count >= FEWEST else []
    rows = [_row(geometry, damping, grid[damping], folds) for damping in sorted(grid)]
    return {"mean_eigenvalue": mean, "rows": rows, **_recommend(rows, geometry, mean)}


class _Fold:
    """One half as basis, the other as judge."""

    def __init__(self, geometry: TargetGeometry, basis: slice, others: slice, curvature_MDK: torch.Tensor) -> None:
        kind = geometry.spectrum.kind
        z_MK = geometry.target_MK
        self.values_J, self.vectors_JK, _ = decompose(kind, curvature_MDK[basis].flatten(0, 1), 1.0, geometry.floor)
        self.mean_K, self.other_mean_K = z_MK[basis].mean(0), z_MK[others].mean(0)
        self.z_MK, self.others_MK = z_MK[basis] - self.mean_K, z_MK[others] - self.other_mean_K
        rows_BK = curvature_MDK[others].flatten(0, 1)
        rows_BK = rows_BK - rows_BK.mean(0) if kind == "centred" else rows_BK
        self.square = float(rows_BK.square().sum(1).mean())
        self.coordinate_J = (rows_BK @ self.vectors_JK.T).square().mean(0)

    def measure(self, damping: float) -> dict[str, float]:
        """Gains, costs and signals of one damping, in sample and held out."""
        direction_K = damped_inverse(self.mean_K, self.values_J, self.vectors_JK, damping)
        inverse_J = 1.0 / (self.values_J + damping)
        gain_in, gain_out = float(self.mean_K @ direction_K), float(self.other_mean_K @ direction_K)
        return {
            "gain_in": gain_in,
            "gain_out": gain_out,
            "cost_in": float((self.values_J * inverse_J).sum()),
            "cost_out": self.square / damping + float((self.coordinate_J * (inverse_J - 1.0 / damping)).sum()),
            "signal_in": gain_in / float((self.z_MK @ direction_K).square().mean().sqrt()),
            "signal_out": gain_out / float((self.others_MK @ direction_K).square().mean().sqrt()),
        }


def _folds(geometry: TargetGeometry, sampled_MDK: torch.Tensor | None) -> list[_Fold]:
    curvature_MDK = geometry.target_MK[:, None]
    if geometry.curvature == "gauss-newton" and sampled_MDK is not None:
        curvature_MDK = sampled_MDK.to(torch.float64)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    return [_Fold(geometry, *halves, curvature_MDK) for halves in ((even, odd), (odd, even))]


def _row(geometry: TargetGeometry, damping: float, at: str, folds: list[_Fold]) -> dict[str, Any]:
    values_J = geometry.spectrum.values_J
    passed_K = damping * geometry.damped_at(geometry.mean_K, damping)
    row: dict[str, Any] = {
        "damping": damping,
        "at": at,
        "effective_dimension": float((values_J / (values_J + damping)).sum()),
        "share_passed": float(passed_K.square().sum() / geometry.mean_K.square().sum()),
        "gain_ratio": None,
        "cost_ratio": None,
        "signal_heldout": None,
        "signal_in_sample": None,
        "trusted": False,
    }
    usable = [fold for fold in folds if fold.values_J.numel()]
    if usable:
        both = [fold.measure(damping) for fold in usable]
        total = {name: sum(found[name] for found in both) / len(both) for name in both[0]}
        row["gain_ratio"] = total["gain_out"] / total["gain_in"]
        row["cost_ratio"] = total["cost_out"] / total["cost_in"]
        row["signal_heldout"], row["signal_in_sample"] = total["signal_out"], total["signal_in"]
        row["trusted"] = row["gain_ratio"] >= 0.5 and row["cost_ratio"] <= 2.0
    return row


def _recommend(rows: list[dict[str, Any]], geometry: TargetGeometry, mean: float) -> dict[str, Any]:
    if rows[0]["signal_heldout"] is None:
        reason = f"{geometry.sample_count} target samples are too few to be split: {FEWEST} are needed"
        return {"recommended": None, "recommended_factor": None, "reason": reason}
    trusted = [row for row in rows if row["trusted"]] or rows
    best = max(row["signal_heldout"] for row in trusted)
    if best <= 0:
        reason = "on unseen target samples no damping leaves a gain: the two halves of the target point apart"
        return {"recommended": None, "recommended_factor": None, "reason": reason}
    chosen = [row for row in trusted if row["signal_heldout"] >= 0.99 * best][-1]
    now = next(row for row in rows if row["damping"] == geometry.damping)
    reason = (
        f"whitened gain of unseen target samples over its spread is {chosen['signal_heldout']:.2f} there "
        f"({chosen['signal_in_sample']:.2f} in sample), {now['signal_heldout']:.2f} at the damping in use; "
        f"unseen samples keep {chosen['gain_ratio']:.0%} of the gain and cost {chosen['cost_ratio']:.1f} times as much"
    )
    if not chosen["trusted"]:
        reason += "; no damping is trusted: take more target samples"
    return {"recommended": chosen["damping"], "recommended_factor": chosen["damping"] / mean, "reason": reason}
