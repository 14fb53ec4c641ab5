"""Curvature of the target loss, as seen by the sketches of the target's samples.

Shape legend: M target samples, K sketch dimension, N candidates, J eigenvalues above the floor, B rows of a block.

Two spectra are kept side by side. `empirical` is the uncentred Fisher (1/M) sum z z^T of arXiv 2605.31175, whose top
directions contain the mean gradient itself. `centred` is the same without the mean, (1/M) sum (z - g)(z - g)^T; it is
what every column is computed with unless its name says `empirical`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from schemas.errors import InputError

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
class Spectrum:
    """Eigenvalues and vectors of one sketched Fisher of the target; float64."""

    kind: str
    """`centred` or `empirical`."""
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


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetGeometry:
    """What selection needs to know about a target under one scoring."""

    target_MK: torch.Tensor
    """Full sketches of the target samples (sum-loss gradients), float64."""
    mean_K: torch.Tensor
    """Mean target gradient, float64."""
    centred: Spectrum
    """Spectrum of the centred Fisher: the default."""
    empirical: Spectrum
    """Spectrum of the uncentred empirical Fisher: the published one."""
    damping: float
    """delta of (C + delta I): mean centred eigenvalue above the floor, or 1 where none is."""
    share_stiff: float
    """Share of the squared norm of the mean gradient inside the stiff directions."""
    share_flat: float
    """The same inside the flat directions."""
    share_null: float
    """The same in the null space of the centred Fisher."""
    energy: float = 0.945
    """Share of the trace at which the elbow is put."""
    floor: float = 1e-6
    """Eigenvalues below floor x the largest count as null."""
    warnings: tuple[str, ...] = ()
    """Reasons not to trust the spectrum, in words."""
    swapped_mean_K: torch.Tensor | None = field(default=None)
    """Mean gradient of the target with answers swapped between its rows; only for `contrast = swap`."""

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
        """Directions in which the centred Fisher is below the floor."""
        return self.dimension - int(self.centred.values_J.shape[0])

    def damped(self, vector_K: torch.Tensor) -> torch.Tensor:
        """(C + delta I)^-1 vector, with C the centred Fisher; float64 [K]."""
        vector_K = vector_K.to(torch.float64)
        coordinates_J = self.centred.vectors_JK @ vector_K
        inverse_J = 1.0 / (self.centred.values_J + self.damping) - 1.0 / self.damping
        return vector_K / self.damping + (inverse_J * coordinates_J) @ self.centred.vectors_JK

    def summary(self) -> dict[str, float | int | list[str] | None]:
        """The numbers that are printed and stored beside every selection; JSON-able."""
        return {
            "target_samples": self.sample_count,
            "sketch_dimension": self.dimension,
            "k_star": self.centred.k_star,
            "k_star_empirical": self.empirical.k_star,
            "null_dimension": self.null_dimension,
            "damping": self.damping,
            "share_stiff": self.share_stiff,
            "share_flat": self.share_flat,
            "share_null": self.share_null,
            "stiff_cost_heldout_unit": _finite(self.centred.heldout_cost_unit),
            "stiff_cost_in_sample_unit": _finite(self.centred.in_sample_cost_unit),
            "warnings": list(self.warnings),
        }


def describe_target(
    z_MK: torch.Tensor,
    *,
    energy: float = 0.945,
    floor: float = 1e-6,
    swapped_mean_K: torch.Tensor | None = None,
) -> TargetGeometry:
    """Spectra, elbow, parts and stiff costs of a target from the full sketches of its samples.

    z_MK: sum-loss gradient sketches [M, K]. `energy` in (0, 1] puts the elbow, `floor` in [0, 1) separates null. Works on
    the M x M Gram where M < K. The held-out stiff cost splits the rows by the parity of their index.
    Raises InputError for an empty, zero or non-finite target. Source: arXiv 2605.31175 section 3, with the mean removed.
    """
    z_MK = _checked_target(z_MK, energy, floor)
    centred = _spectrum("centred", z_MK, energy, floor)
    empirical = _spectrum("empirical", z_MK, energy, floor)
    return rebuild_target(
        z_MK, centred=centred, empirical=empirical, energy=energy, floor=floor, swapped_mean_K=swapped_mean_K
    )


def rebuild_target(
    z_MK: torch.Tensor,
    *,
    centred: Spectrum,
    empirical: Spectrum,
    energy: float = 0.945,
    floor: float = 1e-6,
    swapped_mean_K: torch.Tensor | None = None,
) -> TargetGeometry:
    """The geometry of a target from stored parts: its full sketches [M, K] and its two spectra; no decomposition."""
    z_MK = _checked_target(z_MK, energy, floor)
    for spectrum in (centred, empirical):
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
    share_stiff = float((centred.stiff_vectors @ mean_K).square().sum()) / energy_total
    share_flat = float((centred.flat_vectors @ mean_K).square().sum()) / energy_total
    damping = float(centred.values_J.mean()) if centred.values_J.numel() else 1.0
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
        warnings=tuple(_warnings(z_MK.shape[0], z_MK.shape[1], centred, share_null)),
        swapped_mean_K=None if swapped_mean_K is None else swapped_mean_K.to(torch.float64),
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
    centred, empirical = geometry.centred, geometry.empirical
    n_centred, n_empirical = centred.values_J.shape[0], empirical.k_star
    unit_mean_K = geometry.mean_K / geometry.mean_K.norm()
    basis_PK = torch.cat(
        [
            centred.vectors_JK,
            empirical.stiff_vectors,
            unit_mean_K[None],
            geometry.damped(geometry.mean_K)[None],
        ]
    ).to(torch.float32)
    basis_KP = basis_PK.T.contiguous()
    # Weights on the squared coordinates; every sum is of non-negative terms, so float32 loses nothing to cancellation.
    weights_J3 = torch.zeros(n_centred, 3, dtype=torch.float64)
    weights_J3[: centred.k_star, 0] = centred.stiff_values * dimension
    weights_J3[centred.k_star :, 1] = 1.0
    weights_J3[:, 2] = 1.0 / (centred.values_J + geometry.damping)
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
        stiff, flat, inverse = (coordinate[:, :n_centred] @ weights_J3).T
        inside = coordinate[:, :n_centred].sum(dim=1)
        outside = (square - inside).clamp_min_(0.0) if n_centred < dimension else torch.zeros_like(square)
        scale = torch.where(square > 0, square, torch.ones_like(square))
        values = {
            "alignment": alignment,
            "influence": influence,
            "quad": inverse + outside / geometry.damping,
            "stiff_cost": stiff,
            "flat_energy": flat / scale,
            "null_energy": outside / scale,
            "stiff_cost_empirical": coordinate[:, n_centred : n_centred + n_empirical] @ empirical_J,
        }
        bad = ~(torch.isfinite(square) & torch.isfinite(norm_N[start:stop]))
        for name, value in values.items():
            out[name][start:stop] = value.masked_fill_(bad, float("nan")).numpy()
    return out


def stiff_cost(rows_NK: torch.Tensor, values_J: torch.Tensor, vectors_JK: torch.Tensor) -> torch.Tensor:
    """sum_j lambda_j k <z, v_j>^2 for every row; [N], in the rows' precision."""
    return (rows_NK @ vectors_JK.T).square() @ (values_J * rows_NK.shape[1])


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


def _decompose(kind: str, z_MK: torch.Tensor, energy: float, floor: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Eigenvalues above the floor, eigenvectors in rows, elbow."""
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


def _spectrum(kind: str, z_MK: torch.Tensor, energy: float, floor: float) -> Spectrum:
    n_rows = z_MK.shape[0]
    unit_MK = torch.nn.functional.normalize(z_MK, dim=1)
    values_J, vectors_JK, k_star = _decompose(kind, z_MK, energy, floor)
    heldout_sum = heldout_unit = float("nan")
    if n_rows >= 4:  # a half needs two rows to have a centred spectrum
        heldout_sum = heldout_unit = 0.0
        for basis, others in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
            half_values, half_vectors, half_star = _decompose(kind, z_MK[basis], energy, floor)
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


def _warnings(n_rows: int, dimension: int, centred: Spectrum, share_null: float) -> list[str]:
    found = []
    if centred.values_J.numel() == 0:
        found.append("the centred Fisher is zero: there is no stiff direction, and influence is the plain dot product")
    if n_rows < dimension:
        found.append(
            f"M < k ({n_rows} target samples, sketch dimension {dimension}): the centred Fisher has at most "
            f"{n_rows - 1} directions, and {share_null:.2f} of the squared mean gradient lies in its null space"
        )
    if n_rows < FEW_TARGETS:
        found.append(f"M = {n_rows} < {FEW_TARGETS} target samples: the elbow and the stiff limit are noise")
    if n_rows < 4:
        found.append(f"M = {n_rows} < 4 target samples: no held-out stiff cost, so no limit of kind 'target'")
    heldout = centred.heldout_cost_unit
    if np.isfinite(heldout) and heldout > 0 and centred.in_sample_cost_unit > 1.5 * heldout:
        found.append(
            f"in-sample stiff cost is {centred.in_sample_cost_unit / heldout:.1f} times the held-out one: "
            "the stiff directions are fitted to the target samples"
        )
    return found


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
