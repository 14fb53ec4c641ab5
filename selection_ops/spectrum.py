"""Eigenvalues and vectors of the sketched curvature of a target, and what is computed from them alone.

Shape legend: M target samples, D draws of labels for each, K sketch dimension, J eigenvalues above the floor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

CurvatureKind = Literal["centred", "empirical", "gauss-newton"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """Eigenvalues and vectors of one sketched Fisher of the target; float64."""

    kind: str
    """`centred`, `empirical` or `gauss-newton`."""
    values_J: torch.Tensor
    """Eigenvalues above the floor, descending; squared gradient norms (nats^2 per squared parameter unit)."""
    vectors_JK: torch.Tensor
    """Orthonormal eigenvectors in rows; the entry of largest magnitude of each is positive."""
    k_star: int
    """The elbow: the first `k_star` directions are stiff, the other J - k_star are flat."""
    heldout_cost_sum: float
    """Mean stiff cost of target samples outside the half that gave the basis (two-fold), full sketches; nan if M < 4."""
    heldout_cost_unit: float
    """The same for unit rows."""
    in_sample_cost_sum: float
    """Mean stiff cost of the samples that gave the basis, full sketches; too large when M < k, never a limit."""
    in_sample_cost_unit: float
    """The same for unit rows."""

    @property
    def stiff_values(self) -> torch.Tensor:
        """Eigenvalues of the stiff directions, [k_star]."""
        return self.values_J[: self.k_star]

    @property
    def stiff_vectors(self) -> torch.Tensor:
        """Stiff eigenvectors in rows, [k_star, K]."""
        return self.vectors_JK[: self.k_star]

    @property
    def flat_vectors(self) -> torch.Tensor:
        """Flat eigenvectors in rows, [J - k_star, K]."""
        return self.vectors_JK[self.k_star :]


def damped_inverse(
    vector_K: torch.Tensor, values_J: torch.Tensor, vectors_JK: torch.Tensor, damping: float
) -> torch.Tensor:
    """(C + damping I)^-1 vector with C = V' diag(values) V; float64 [K]."""
    vector_K = vector_K.to(torch.float64)
    inverse_J = 1.0 / (values_J + damping) - 1.0 / damping
    return vector_K / damping + (inverse_J * (vectors_JK @ vector_K)) @ vectors_JK


def stiff_cost(rows_NK: torch.Tensor, values_J: torch.Tensor, vectors_JK: torch.Tensor) -> torch.Tensor:
    """sum_j lambda_j k <z, v_j>^2 for every row; [N], in the rows' precision."""
    return (rows_NK @ vectors_JK.T).square() @ (values_J * rows_NK.shape[1])


def decompose(kind: str, z_MK: torch.Tensor, energy: float, floor: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Eigenvalues above the floor, eigenvectors in rows, elbow; of the Gram where there are fewer rows than dimensions."""
    n_rows, dimension = z_MK.shape
    rows_MK = z_MK - z_MK.mean(dim=0) if kind == "centred" else z_MK
    if n_rows < dimension:
        values, left = torch.linalg.eigh(rows_MK @ rows_MK.T / n_rows)
    else:
        values, left = torch.linalg.eigh(rows_MK.T @ rows_MK / n_rows)
    values, left = values.flip(0), left.flip(1)
    # Centring equal rows leaves rounding dust; it is judged against the uncentred scale, where zero means zero.
    dust = 1e-14 * float(z_MK.square().sum()) / n_rows
    trace = float(values.clamp_min(0.0).sum())
    keep = (values > dust) & (values > floor * values[0])
    values_J = values[keep]
    if n_rows < dimension:
        vectors_JK = (rows_MK.T @ left[:, keep] / (values_J * n_rows).sqrt()).T
    else:
        vectors_JK = left[:, keep].T
    vectors_JK = vectors_JK.contiguous()
    if values_J.numel() == 0:
        return values_J, vectors_JK, 0
    largest_J = vectors_JK.abs().argmax(dim=1, keepdim=True)
    vectors_JK = vectors_JK * vectors_JK.gather(1, largest_J).sign()
    reached = torch.nonzero(values_J.cumsum(0) >= energy * trace).flatten()
    k_star = int(reached[0]) + 1 if reached.numel() else int(values_J.numel())
    return values_J, vectors_JK, k_star


def make_spectrum(
    kind: str, z_MK: torch.Tensor, energy: float, floor: float, rows_MDK: torch.Tensor | None = None
) -> Spectrum:
    """Spectrum of the rows' curvature, of `rows_MDK` where given, with stiff costs of the target's own gradients `z_MK`."""
    n_rows = z_MK.shape[0]
    rows_MDK = z_MK[:, None] if rows_MDK is None else rows_MDK
    unit_MK = torch.nn.functional.normalize(z_MK, dim=1)
    values_J, vectors_JK, k_star = decompose(kind, rows_MDK.flatten(0, 1), energy, floor)
    heldout_sum = heldout_unit = float("nan")
    if n_rows >= 4:  # a half needs two rows to have a centred spectrum
        heldout_sum = heldout_unit = 0.0
        for basis, others in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            half_values, half_vectors, half_star = decompose(kind, rows_MDK[basis].flatten(0, 1), energy, floor)
            stiff = half_values[:half_star], half_vectors[:half_star]
            heldout_sum += float(stiff_cost(z_MK[others], *stiff).sum()) / n_rows
            heldout_unit += float(stiff_cost(unit_MK[others], *stiff).sum()) / n_rows
    stiff = values_J[:k_star], vectors_JK[:k_star]
    return Spectrum(
        kind=kind,
        values_J=values_J,
        vectors_JK=vectors_JK,
        k_star=k_star,
        heldout_cost_sum=heldout_sum,
        heldout_cost_unit=heldout_unit,
        in_sample_cost_sum=float(stiff_cost(z_MK, *stiff).mean()),
        in_sample_cost_unit=float(stiff_cost(unit_MK, *stiff).mean()),
    )
