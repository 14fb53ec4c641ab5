"""Curvature of the target loss, as seen by the sketches of the target's samples.

Shape legend: M target samples, K sketch dimension, N candidates, J eigenvalues above the floor, B rows of a block.

Two spectra are always kept side by side. `empirical` is the uncentred Fisher (1/M) sum z z^T of arXiv 2605.31175, whose top
directions contain the mean gradient itself. `centred` is the same without the mean, (1/M) sum (z - g)(z - g)^T. A third,
`gauss-newton`, is the mean of s s^T over sketches s of gradients at labels sampled from the model itself (`sampling.py`): their
mean is zero by construction, so nothing is taken off. Which of them the columns are computed with is the target's choice
(`curvature`, centred by default); a column whose name says `empirical` is always that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import torch

from schemas.errors import InputError
from selection_ops.spectrum import CurvatureKind, Spectrum, damped_inverse, make_spectrum

BLOCK_ROWS = 512
CURVATURE_COLUMNS = (
    "alignment",
    "influence",
    "quad",
    "stiff_cost",
    "flat_energy",
    "null_energy",
    "stiff_cost_empirical",
)
FEW_TARGETS = 50
"""Below this many target samples the elbow and the stiff limit are noise."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetGeometry:
    """What selection needs to know about a target under one scoring."""

    target_MK: torch.Tensor
    """Full sketches of the target samples (sum-loss gradients), float64."""
    mean_K: torch.Tensor
    """Mean target gradient, float64."""
    centred: Spectrum
    """Spectrum of the centred Fisher."""
    empirical: Spectrum
    """Spectrum of the uncentred empirical Fisher: the published one."""
    damping: float
    """delta of (C + delta I): the mean eigenvalue above the floor times `damping_factor`, or 1 where none is above it."""
    share_stiff: float
    """Share of the squared norm of the mean gradient inside the stiff directions."""
    share_flat: float
    """The same inside the flat directions."""
    share_null: float
    """The same in the null space."""
    energy: float = 0.945
    """Share of the trace at which the elbow is put."""
    floor: float = 1e-6
    """Eigenvalues below floor x the largest count as null."""
    warnings: tuple[str, ...] = ()
    """Reasons not to trust the spectrum, in words."""
    swapped_mean_K: torch.Tensor | None = field(default=None)
    """Mean gradient of the target with answers swapped between its rows; only for `contrast = swap`."""
    sampled: Spectrum | None = field(default=None)
    """Spectrum of the Monte-Carlo Gauss-Newton matrix, where the target was described with it."""
    curvature: CurvatureKind = "centred"
    """Which spectrum is C: of every column, of the damped inverse, of the stiff limit."""
    damping_factor: float = 1.0
    """`damping` over the mean eigenvalue."""

    @property
    def spectrum(self) -> Spectrum:
        """The spectrum that `curvature` names."""
        if self.curvature == "gauss-newton" and self.sampled is not None:
            return self.sampled
        return self.empirical if self.curvature == "empirical" else self.centred

    @property
    def sample_count(self) -> int:
        """M, the number of target samples."""
        return int(self.target_MK.shape[0])

    @property
    def dimension(self) -> int:
        """k, the sketch dimension."""
        return int(self.target_MK.shape[1])

    @property
    def null_dimension(self) -> int:
        """Directions in which C is below the floor."""
        return self.dimension - int(self.spectrum.values_J.shape[0])

    def damped(self, vector_K: torch.Tensor) -> torch.Tensor:
        """(C + delta I)^-1 vector; float64 [K]."""
        return self.damped_at(vector_K, self.damping)

    def damped_at(self, vector_K: torch.Tensor, damping: float) -> torch.Tensor:
        """(C + damping I)^-1 vector; float64 [K]."""
        return damped_inverse(vector_K, self.spectrum.values_J, self.spectrum.vectors_JK, damping)

    def of_rows(self, z_MK: torch.Tensor) -> TargetGeometry:
        """The geometry of some of the target's rows, described as this one is.

        The Gauss-Newton matrix stays that of the whole target: it holds no gradient of any target sample's own labels.
        """
        kind: CurvatureKind = "centred" if self.curvature == "gauss-newton" else self.curvature
        made = describe_target(
            z_MK, energy=self.energy, floor=self.floor, swapped_mean_K=self.swapped_mean_K, curvature=kind,
            damping_factor=self.damping_factor,
        )  # fmt: skip
        if self.sampled is None:
            return made
        return rebuild_target(
            z_MK, centred=made.centred, empirical=made.empirical, energy=self.energy, floor=self.floor,
            swapped_mean_K=self.swapped_mean_K, sampled=self.sampled, curvature=self.curvature,
            damping_factor=self.damping_factor,
        )  # fmt: skip

    def summary(self) -> dict[str, float | int | str | list[str] | None]:
        """The numbers that are printed and stored beside every selection; JSON-able."""
        return {
            "target_samples": self.sample_count,
            "sketch_dimension": self.dimension,
            "curvature": self.curvature,
            "k_star": self.spectrum.k_star,
            "k_star_empirical": self.empirical.k_star,
            "null_dimension": self.null_dimension,
            "damping": self.damping,
            "share_stiff": self.share_stiff,
            "share_flat": self.share_flat,
            "share_null": self.share_null,
            "stiff_cost_heldout_unit": _finite(self.spectrum.heldout_cost_unit),
            "stiff_cost_in_sample_unit": _finite(self.spectrum.in_sample_cost_unit),
            "warnings": list(self.warnings),
        }


def describe_target(
    z_MK: torch.Tensor,
    *,
    energy: float = 0.945,
    floor: float = 1e-6,
    swapped_mean_K: torch.Tensor | None = None,
    curvature: CurvatureKind = "centred",
    sampled_MDK: torch.Tensor | None = None,
    damping_factor: float = 1.0,
) -> TargetGeometry:
    """Spectra, elbow, parts and stiff costs of a target from the full sketches of its samples.

    z_MK: sum-loss gradient sketches [M, K]. `energy` in (0, 1] puts the elbow, `floor` in [0, 1) separates null. Works on
    the M x M Gram where M < K. The held-out stiff cost splits the rows by the parity of their index. `sampled_MDK` holds, for
    every row, D sketches at sampled labels; the curvature `gauss-newton` needs them.
    Raises InputError for an empty, zero or non-finite target. Source: arXiv 2605.31175 section 3, with the mean removed.
    """
    z_MK = _checked_target(z_MK, energy, floor)
    centred = make_spectrum("centred", z_MK, energy, floor)
    empirical = make_spectrum("empirical", z_MK, energy, floor)
    sampled = None
    if sampled_MDK is not None:
        sampled = make_spectrum("gauss-newton", z_MK, energy, floor, _checked_draws(sampled_MDK, z_MK))
    return rebuild_target(
        z_MK, centred=centred, empirical=empirical, energy=energy, floor=floor, swapped_mean_K=swapped_mean_K,
        sampled=sampled, curvature=curvature, damping_factor=damping_factor,
    )  # fmt: skip


def rebuild_target(
    z_MK: torch.Tensor,
    *,
    centred: Spectrum,
    empirical: Spectrum,
    energy: float = 0.945,
    floor: float = 1e-6,
    swapped_mean_K: torch.Tensor | None = None,
    sampled: Spectrum | None = None,
    curvature: CurvatureKind = "centred",
    damping_factor: float = 1.0,
) -> TargetGeometry:
    """The geometry of a target from stored parts: its full sketches [M, K] and its spectra; no decomposition."""
    z_MK = _checked_target(z_MK, energy, floor)
    if curvature not in get_args(CurvatureKind):
        raise InputError(f"unknown curvature {curvature!r}: choose one of {', '.join(get_args(CurvatureKind))}")
    if curvature == "gauss-newton" and sampled is None:
        raise InputError("curvature gauss-newton needs sketches at sampled labels; describe the target with it")
    if not damping_factor > 0:
        raise InputError(f"damping must be a positive multiple of the mean eigenvalue, not {damping_factor}")
    for spectrum in (centred, empirical, *((sampled,) if sampled else ())):
        if spectrum.vectors_JK.shape != (spectrum.values_J.shape[0], z_MK.shape[1]):
            raise InputError(
                f"the {spectrum.kind} spectrum has vectors of shape {tuple(spectrum.vectors_JK.shape)} for "
                f"{spectrum.values_J.shape[0]} eigenvalues and sketch dimension {z_MK.shape[1]}; "
                "describe the target again under this scoring"
            )
    mean_K = z_MK.mean(dim=0)
    energy_total = float(mean_K @ mean_K)
    if energy_total == 0.0:
        raise InputError(
            f"the mean gradient of the {z_MK.shape[0]} target samples is zero, so no direction can be followed; "
            "check that the target has loss tokens and is not its own negative"
        )
    chosen = {"centred": centred, "empirical": empirical, "gauss-newton": sampled or centred}[curvature]
    share_stiff = float((chosen.stiff_vectors @ mean_K).square().sum()) / energy_total
    share_flat = float((chosen.flat_vectors @ mean_K).square().sum()) / energy_total
    damping = damping_factor * float(chosen.values_J.mean()) if chosen.values_J.numel() else 1.0
    share_null = max(0.0, 1.0 - share_stiff - share_flat)
    return TargetGeometry(
        target_MK=z_MK,
        mean_K=mean_K,
        centred=centred,
        empirical=empirical,
        damping=damping,
        share_stiff=share_stiff,
        share_flat=share_flat,
        share_null=share_null,
        energy=energy,
        floor=floor,
        warnings=tuple(_warnings(z_MK.shape[0], z_MK.shape[1], chosen, share_null)),
        swapped_mean_K=None if swapped_mean_K is None else swapped_mean_K.to(torch.float64),
        sampled=sampled,
        curvature=curvature,
        damping_factor=damping_factor,
    )


def curvature_columns(
    unit_NK: torch.Tensor, norm_N: np.ndarray | torch.Tensor, geometry: TargetGeometry
) -> dict[str, np.ndarray]:
    """The stored curvature columns, each float32 [N] and about the unit row as stored.

    alignment: <u, g> / ||g||. influence: u^T (C + delta I)^-1 g. quad: u^T (C + delta I)^-1 u. stiff_cost: sum over the
    stiff j of lambda_j k <u, v_j>^2 (arXiv 2605.31175, g_ij = sqrt(k) z^T v_j). flat_energy, null_energy: shares of
    ||u||^2. stiff_cost_empirical: as stiff_cost with the uncentred Fisher. Multiply by the norm, or its square, for the
    full sketch. A row's values depend on that row alone, to float32 rounding. A row that is not finite, or whose norm is
    not, gets nan in every column; a zero row gets zeros.
    """
    n_rows, dimension = unit_NK.shape
    if dimension != geometry.dimension:
        raise InputError(
            f"candidate sketches have dimension {dimension}, the target's have {geometry.dimension}; "
            "score both under the same feature spec"
        )
    norm_N = torch.tensor(np.asarray(norm_N, np.float64))
    chosen, empirical = geometry.spectrum, geometry.empirical
    n_chosen, n_empirical = chosen.values_J.shape[0], empirical.k_star
    unit_mean_K = geometry.mean_K / geometry.mean_K.norm()
    basis_PK = torch.cat(
        [
            chosen.vectors_JK,
            empirical.stiff_vectors,
            unit_mean_K[None],
            geometry.damped(geometry.mean_K)[None],
        ]
    ).to(torch.float32)
    basis_KP = basis_PK.T.contiguous()
    # Weights on the squared coordinates; every sum is of non-negative terms, so float32 loses nothing to cancellation.
    weights_J3 = torch.zeros(n_chosen, 3, dtype=torch.float64)
    weights_J3[: chosen.k_star, 0] = chosen.stiff_values * dimension
    weights_J3[chosen.k_star :, 1] = 1.0
    weights_J3[:, 2] = 1.0 / (chosen.values_J + geometry.damping)
    weights_J3 = weights_J3.to(torch.float32)
    empirical_J = (empirical.stiff_values * dimension).to(torch.float32)

    block = min(BLOCK_ROWS, max(n_rows, 1))
    row_BK = torch.empty(block, dimension)
    coordinate_BP = torch.empty(block, basis_KP.shape[1])
    square_B = torch.empty(block)
    out = {name: np.empty(n_rows, dtype=np.float32) for name in CURVATURE_COLUMNS}
    for start in range(0, n_rows, block):
        stop = min(start + block, n_rows)
        count = stop - start
        row = row_BK[:count].copy_(unit_NK[start:stop])
        coordinate = torch.mm(row, basis_KP, out=coordinate_BP[:count])
        alignment, influence = coordinate[:, -2].clone(), coordinate[:, -1].clone()
        # nan and inf propagate into the squared norm, which therefore doubles as the finiteness test.
        square = torch.sum(row.square_(), dim=1, out=square_B[:count])
        coordinate.square_()
        stiff, flat, inverse = (coordinate[:, :n_chosen] @ weights_J3).T
        inside = coordinate[:, :n_chosen].sum(dim=1)
        outside = (square - inside).clamp_min_(0.0) if n_chosen < dimension else torch.zeros_like(square)
        scale = torch.where(square > 0, square, torch.ones_like(square))
        values = {
            "alignment": alignment,
            "influence": influence,
            "quad": inverse + outside / geometry.damping,
            "stiff_cost": stiff,
            "flat_energy": flat / scale,
            "null_energy": outside / scale,
            "stiff_cost_empirical": coordinate[:, n_chosen : n_chosen + n_empirical] @ empirical_J,
        }
        bad = ~(torch.isfinite(square) & torch.isfinite(norm_N[start:stop]))
        for name, value in values.items():
            out[name][start:stop] = value.masked_fill_(bad, float("nan")).numpy()
    return out


def _checked_target(z_MK: torch.Tensor, energy: float, floor: float) -> torch.Tensor:
    if z_MK.ndim != 2 or z_MK.shape[0] == 0 or z_MK.shape[1] == 0:
        raise InputError(f"the target needs at least one sketch; got an array of shape {tuple(z_MK.shape)}")
    if not 0.0 < energy <= 1.0:
        raise InputError(f"energy must lie in (0, 1], got {energy}")
    if not 0.0 <= floor < 1.0:
        raise InputError(f"floor must lie in [0, 1), got {floor}")
    z_MK = z_MK.to(torch.float64)
    bad_m = torch.nonzero(~torch.isfinite(z_MK).all(dim=1)).flatten().tolist()
    if bad_m:
        raise InputError(
            f"{len(bad_m)} target sketches are not finite, the first at row {bad_m[0]}; leave these samples out of the target"
        )
    if not bool(z_MK.any()):
        raise InputError("every target sketch is zero; check that the target has loss tokens")
    return z_MK


def _checked_draws(sampled_MDK: torch.Tensor, z_MK: torch.Tensor) -> torch.Tensor:
    if sampled_MDK.ndim != 3 or (sampled_MDK.shape[0], sampled_MDK.shape[2]) != tuple(z_MK.shape):
        raise InputError(
            f"sketches at sampled labels have shape {tuple(sampled_MDK.shape)}, not draws of {tuple(z_MK.shape)}"
        )
    if not bool(torch.isfinite(sampled_MDK).all()) or not bool(sampled_MDK.any()):
        raise InputError("sketches at sampled labels are not finite, or all zero: is the model sound?")
    return sampled_MDK.to(torch.float64)


def _warnings(n_rows: int, dimension: int, chosen: Spectrum, share_null: float) -> list[str]:
    found = []
    directions = chosen.values_J.numel()
    name = "Gauss-Newton matrix" if chosen.kind == "gauss-newton" else f"{chosen.kind} Fisher"
    if directions == 0:
        found.append(f"the {name} is zero: there is no stiff direction, and influence is the plain dot product")
    if n_rows < dimension:
        found.append(
            f"M < k ({n_rows} target samples, sketch dimension {dimension}): the {name} has {directions} directions, "
            f"and {share_null:.2f} of the squared mean gradient lies in its null space"
        )
    if n_rows < FEW_TARGETS:
        found.append(f"M = {n_rows} < {FEW_TARGETS} target samples: the elbow and the stiff limit are noise")
    if n_rows < 4:
        found.append(f"M = {n_rows} < 4 target samples: no held-out stiff cost, so no limit of kind 'target'")
    heldout = chosen.heldout_cost_unit
    if np.isfinite(heldout) and heldout > 0 and chosen.in_sample_cost_unit > 1.5 * heldout:
        found.append(
            f"in-sample stiff cost is {chosen.in_sample_cost_unit / heldout:.1f} times the held-out one: "
            "the stiff directions are fitted to the target samples"
        )
    return found


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
