"""One selection problem: the pool that may be chosen, its columns, its feasible set.

Shape legend: N candidates, n samples of the pool in the order of sample_id, K sketch dimension, D domains. Every array of
the pool is in the order of sample_id, so that a tie always goes to the smaller position and rows may come in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from schemas.errors import InfeasibleError, InputError
from selection_ops.curvature import CURVATURE_COLUMNS, TargetGeometry, curvature_columns
from selection_ops.selectors import rows
from selection_ops.selectors.base import CandidateSet, Selector
from selection_ops.selectors.ordering import as_text, first_equal, text_codes, text_order
from selection_ops.selectors.outliers import find_outliers
from selection_ops.selectors.seconds import spent
from selection_ops.selectors.settings import Budget, SelectorSettings
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold


class NothingToChoose(InputError):
    """None of the candidates may be chosen; `reason_N` says why, for each."""

    reason_N: np.ndarray

    @classmethod
    def of(cls, reason_N: np.ndarray) -> NothingToChoose:
        """With the reasons of all candidates."""
        reasons = ", ".join(sorted({reason.split(" ")[0] for reason in reason_N}))
        error = cls(f"none of the {len(reason_N)} candidates may be chosen ({reasons})")
        error.reason_N = reason_N
        return error


class Problem:
    """Candidates, target, budget and settings, with the columns that selectors ask for, computed once."""

    def __init__(
        self,
        candidates: CandidateSet,
        geometry: TargetGeometry | None,
        budget: Budget,
        settings: SelectorSettings,
        selector: Selector,
    ) -> None:
        self.candidates = candidates
        self.geometry_or_none = geometry
        self.budget = budget
        self.selector = selector
        self.settings = replace(
            settings,
            rows=settings.rows or selector.default_rows,  # type: ignore[arg-type]
            stiff_limit=selector.default_stiff_limit if settings.stiff_limit is None else settings.stiff_limit,
            stiff_limit_kind=settings.stiff_limit_kind or selector.default_stiff_limit_kind,  # type: ignore[arg-type]
        )
        self._columns: dict[str, np.ndarray] = {}
        if len(candidates) == 0:
            raise InputError("there are no candidates to select from; check that scoring has finished")
        if selector.needs_target and geometry is None:
            raise InputError(f"selector {selector.name!r} needs a target; name one, or use selector 'random'")
        if selector.needs_sketches and candidates.unit_NK is None:
            raise InputError(
                f"selector {selector.name!r} reads sketches, and only scalar columns were kept; "
                "score again with sketches under another --scoring, or use a ranking such as 'target-cosine'"
            )
        unit_NK = candidates.unit_NK
        if geometry is not None and unit_NK is not None and unit_NK.shape[1] != geometry.dimension:
            raise InputError(
                f"candidate sketches have dimension {unit_NK.shape[1]}, the target's have {geometry.dimension}; "
                "score both under the same feature spec"
            )
        self._find_pool()

    @spent("pool")
    def _find_pool(self) -> None:
        candidates = self.candidates
        sample_id = as_text(candidates.sample_id)
        content_id = as_text(candidates.content_id)
        order_N, repeats_N = text_order(sample_id)
        if repeats_N.any():
            twice = sample_id[order_N[int(repeats_N.argmax())]]
            raise InputError(f"sample id {np.str_(twice.astype(str))} occurs more than once; ids must be unique")
        reason_N = np.full(len(candidates), "", dtype=object)
        # Beside the reasons, whose comparison is slow.
        free_N = np.ones(len(candidates), dtype=bool)

        def leave_out(hit_N: np.ndarray, reason: str) -> None:
            reason_N[free_N & hit_N] = reason
            free_N[hit_N] = False

        if candidates.excluded_N is not None:
            excluded_N = np.asarray(candidates.excluded_N, dtype=object)
            for index in np.flatnonzero(excluded_N):
                reason_N[index] = str(excluded_N[index])
                free_N[index] = False
        finite_N = np.ones(len(candidates), dtype=bool)
        for name in ("norm_N", "loss_N", "grad_norm_N", *CURVATURE_COLUMNS):
            column = getattr(candidates, name)
            if column is not None:
                finite_N &= np.isfinite(np.asarray(column, dtype=np.float64))
        self.square_N: np.ndarray | None = None
        if candidates.unit_NK is not None:
            self.square_N = rows.square_rows(candidates.unit_NK)
            finite_N &= np.isfinite(self.square_N)
        leave_out(~finite_N, "non_finite")
        if self.budget.unit == "tokens":
            leave_out(candidates.tokens_N < 1, "no_tokens")
        free_n = order_N[free_N[order_N]]
        # Pool order is id order, so the first of equal contents is the representative.
        representative_n = first_equal(content_id[free_n])
        copies_n = np.flatnonzero(representative_n != np.arange(len(free_n)))
        copies_n = copies_n[np.char.str_len(content_id[free_n[copies_n]]) > 0]
        originals = sample_id[free_n[representative_n[copies_n]]].astype(str)
        for index, original in zip(free_n[copies_n], originals):
            reason_N[index] = f"duplicate_of {original}"
        self.duplicates = len(copies_n)
        self._sample_id = sample_id
        self.reason_N = reason_N
        pool_n = np.delete(free_n, copies_n)
        # After the duplicates, so that copies do not move a quantile.
        outlier_n, self.outlier_caps = find_outliers(candidates, pool_n, self.settings)
        if self.outlier_caps:
            reason_N[pool_n] = outlier_n
            pool_n = pool_n[outlier_n == ""]
        self.pool_n: np.ndarray = pool_n
        if not self.pool_n.size:
            raise NothingToChoose.of(reason_N)

    def with_geometry(self, geometry: TargetGeometry, settings: SelectorSettings) -> Problem:
        """The same pool against another target; columns of the old one are dropped and computed anew when asked for."""
        other = object.__new__(Problem)
        other.__dict__.update(self.__dict__)
        other.geometry_or_none = geometry
        other.settings = settings
        other._columns = {"__fresh__": np.empty(0)}
        return other

    @property
    def sample_id(self) -> np.ndarray:
        """Ids of all candidates, as texts."""
        return self._sample_id.astype(str, copy=False)

    @property
    def geometry(self) -> TargetGeometry:
        """The target."""
        if self.geometry_or_none is None:
            raise InputError(f"selector {self.selector.name!r} needs a target with these settings; name one")
        return self.geometry_or_none

    @property
    def unit_NK(self) -> torch.Tensor:
        """Unit sketches of all candidates."""
        if self.candidates.unit_NK is None:
            raise InputError(
                "these settings read sketches, and only scalar columns were kept; score again with sketches under another --scoring"
            )
        return self.candidates.unit_NK

    @property
    def norm_n(self) -> np.ndarray:
        """sketch_norm of the pool, float64."""
        return self.candidates.norm_N[self.pool_n].astype(np.float64)

    @property
    def square_n(self) -> np.ndarray:
        """Squared norm of the unit rows of the pool as stored."""
        if self.square_N is None:
            raise InputError("squared norms of sketches were asked for, and only scalar columns were kept")
        return self.square_N[self.pool_n]

    @property
    def scale_n(self) -> np.ndarray:
        """What a unit row is multiplied by: its norm, or 1 where rows are unit."""
        return self.norm_n if self.settings.rows == "sum" else np.ones(len(self.pool_n))

    @property
    def tokens_n(self) -> np.ndarray:
        """Tokens of the pool, float64."""
        return self.candidates.tokens_N[self.pool_n].astype(np.float64)

    @property
    def size_n(self) -> np.ndarray:
        """What a sample takes of the budget."""
        return self.tokens_n if self.budget.unit == "tokens" else np.ones(len(self.pool_n))

    def column(self, name: str) -> np.ndarray:
        """A curvature column over the pool, float64: the stored one, or computed from the sketches."""
        fresh = "__fresh__" in self._columns
        if name not in self._columns:
            stored = None if fresh else getattr(self.candidates, name)
            if stored is not None:
                self._columns[name] = np.asarray(stored, dtype=np.float64)[self.pool_n]
            elif name == "alignment":
                unit_mean_K = self.geometry.mean_K / self.geometry.mean_K.norm()
                self._columns[name] = self.dots(unit_mean_K[None])[:, 0]
            elif self.candidates.unit_NK is None:
                raise InputError(
                    f"the column {name!r} was not kept and there are no sketches to compute it from; "
                    "make the curvature columns of this target first"
                )
            else:
                computed = curvature_columns(self.unit_NK, self.candidates.norm_N, self.geometry)
                for key, values in computed.items():
                    self._columns.setdefault(key, values[self.pool_n].astype(np.float64))
        return self._columns[name]

    def dots(self, vectors_PK: torch.Tensor) -> np.ndarray:
        """<unit row, vector> over the pool; float64 [n, P]."""
        return rows.dot_rows(self.unit_NK, vectors_PK)[self.pool_n]

    def sum(self, position_n: np.ndarray, weights_n: np.ndarray, scale_n: np.ndarray) -> torch.Tensor:
        """sum_i weight_i scale_i u_i over pool positions, in their order, so that equal sets have equal sums; float64 [K]."""
        by = np.argsort(position_n, kind="stable")
        position_n, weights_n = position_n[by], weights_n[by]
        return rows.sum_rows(self.unit_NK, self.pool_n[position_n], weights_n * scale_n[position_n])

    def feasible(self, cost_n: np.ndarray | None = None, limit: float | None = None) -> FeasibleSet:
        """The weights allowed by budget, quotas and limit; InfeasibleError where budget and quotas alone allow none."""
        equality = self.budget.unit == "samples" and not self.settings.allow_short
        group_n = caps_D = floors_D = None
        if self.settings.quotas or self.settings.floors:
            group_n, caps_D, floors_D = self._quotas()
        found = FeasibleSet(
            size_n=self.size_n,
            budget=float(self.budget.amount),
            equality=equality,
            cost_n=cost_n,
            limit=limit,
            group_n=group_n,
            caps_D=caps_D,
            floors_D=floors_D,
        )
        if equality and self.budget.amount > len(self.pool_n):
            raise InfeasibleError(
                f"the budget is {self.budget.amount} samples, but only {len(self.pool_n)} of {len(self.candidates)} "
                "candidates may be chosen; lower the budget or allow a short selection"
            )
        if not solve_threshold(np.zeros(len(self.pool_n)), replace(found, cost_n=None, limit=None)).feasible:
            raise InfeasibleError(
                f"quotas {self.settings.quotas} and floors {self.settings.floors} cannot be met together with a budget of "
                f"{self.budget.amount} {self.budget.unit}; loosen one of them or allow a short selection"
            )
        return found

    def _quotas(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        names, group_n = text_codes(self.candidates.domain[self.pool_n])
        budget = self.budget.amount
        caps_D, floors_D = np.full(len(names), np.inf), np.zeros(len(names))
        for domain in _in_order(self.settings.quotas, self.settings.floors):
            found = np.flatnonzero(names == domain)
            if not found.size:
                raise InputError(f"no candidate has domain {domain!r}; known: {', '.join(names[:20])}")
            code = int(found[0])
            if domain in self.settings.quotas:
                caps_D[code] = np.floor(self.settings.quotas[domain] * budget + 1e-9)
            if domain in self.settings.floors:
                floors_D[code] = np.ceil(self.settings.floors[domain] * budget - 1e-9)
        return group_n, caps_D, floors_D

    def over_candidates(self, scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Pool scores spread over all candidates, nan elsewhere."""
        spread: dict[str, np.ndarray] = {}
        for name, values in scores.items():
            full = np.full(len(self.candidates), np.nan)
            full[self.pool_n] = values
            spread[name] = full
        return spread


def target_direction(problem: Problem) -> torch.Tensor:
    """See `direction_of`."""
    return direction_of(problem.geometry, problem.settings)


def direction_of(geometry: TargetGeometry, settings: SelectorSettings) -> torch.Tensor:
    """The unit direction whose gain is sought: settings `gain` and `contrast` applied to the mean target gradient; [K].

    Projections are orthogonal, so <P z, P g> = <z, P g> and only the target's side needs projecting.
    """
    gain_K = geometry.mean_K
    if settings.gain == "flat+null":
        stiff_JK = geometry.spectrum.stiff_vectors
        gain_K = gain_K - stiff_JK.T @ (stiff_JK @ gain_K)
    elif settings.gain == "flat":
        flat_JK = geometry.spectrum.flat_vectors
        gain_K = flat_JK.T @ (flat_JK @ gain_K)
    elif settings.gain == "damped":
        gain_K = geometry.damped(gain_K)
    gain_K = _unit(gain_K, float(geometry.mean_K.norm()), f"gain {settings.gain!r}")
    if settings.contrast == "swap":
        if geometry.swapped_mean_K is None:
            raise InputError(
                "contrast 'swap' needs the target scored a second time with swapped answers, and this target holds no such "
                "gradient; describe it with one, or use contrast 'none'"
            )
        contrast_K = geometry.mean_K - geometry.swapped_mean_K
        contrast_K = _unit(contrast_K, float(geometry.mean_K.norm()), "the contrast")
        gain_K = _unit(gain_K + settings.contrast_weight * contrast_K, 1.0, "the gain with its contrast")
    return gain_K


def plain_target(settings: SelectorSettings) -> bool:
    """Whether the gain is the mean target gradient itself, so that the column `alignment` is its cosine."""
    return settings.gain == "target" and settings.contrast == "none"


def gain_cosine(problem: Problem) -> np.ndarray:
    """<unit row, direction> over the pool: from stored columns where the direction has one, else one pass."""
    if plain_target(problem.settings):
        return problem.column("alignment")
    return problem.dots(target_direction(problem)[None])[:, 0]


def _unit(vector_K: torch.Tensor, reference: float, what: str) -> torch.Tensor:
    norm = float(vector_K.norm())
    if not norm > 1e-12 * reference:
        raise InputError(f"{what} is zero for this target, so nothing can be ranked by it; use gain 'target'")
    return vector_K / norm


def _in_order(*names: Iterable[str]) -> list[Any]:
    return sorted({name for group in names for name in group})
