"""What a distributed selection knows of a work unit: scalars of the rows that may be chosen, read from its parts.

Shape legend: N rows of a unit, n of them that may be chosen, in the order of sample_id, K sketch dimension.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import torch
from apache_beam.utils.shared import Shared

from pipelines.candidates import candidate_set, with_curvature
from pipelines.geometry import TargetData, read_target
from schemas.parquet import Part, decode_table, decode_vectors, part_buffer, read_columns
from schemas.run import Run
from schemas.spec import FeatureSpec
from schemas.tables import MEASURE_COLUMNS, PLACE_COLUMNS
from selection_ops.curvature import TargetGeometry
from selection_ops.selectors import Budget, SelectorSettings, get_selector
from selection_ops.selectors.base import CandidateSet
from selection_ops.selectors.baselines import Ranking
from selection_ops.selectors.guesses import tags
from selection_ops.selectors.outliers import grad_norm_per_root_token, loss_per_token
from selection_ops.selectors.problem import NothingToChoose, Problem, direction_of, gain_cosine, plain_target
from selection_ops.selectors.search import ScalarRows

MEASURES = {"loss_outlier": loss_per_token, "grad_norm_outlier": grad_norm_per_root_token}
SCALARS = (
    "sample_id",
    "content_id",
    "domain",
    "tokens",
    "loss_tokens",
    "loss",
    "grad_norm",
    "sketch_norm",
)
"""Columns of the features that decide."""
SKETCH_BYTES = 1 << 29
"""Decoded sketches that a process keeps between passes: the first units that it reads, as far as they fit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitParts:
    """Where the scores of a work unit stand."""

    index: int
    """Position among the units, from 0."""
    features: Part
    """Scores and sketches."""
    curvature: Part | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionTask:
    """What is selected from what; the same in every worker."""

    run_url: str
    name: str
    scoring: str
    target: str
    budget: Budget
    settings: SelectorSettings
    keep_overlapping: bool = False
    columns_only: bool = False
    rounds: int = 3
    """Rounds of every search."""
    samples: int = 0
    """Rows of all units together."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains with a quota or a floor; group d + 1 is that of the d-th."""
        return tuple(sorted({*self.settings.quotas, *self.settings.floors}))

    @property
    def stiff_limit(self) -> float | None:
        """Factor of the limit on stiff cost; None without one."""
        selector, asked = get_selector(self.settings.selector), self.settings.stiff_limit
        if isinstance(selector, Ranking):
            return None
        return selector.default_stiff_limit if asked is None else asked

    @property
    def constrained(self) -> bool:
        """Whether a budget alone does not say what may be chosen."""
        return bool(self.domains) or self.stiff_limit is not None

    @property
    def equality(self) -> bool:
        """Whether the budget must be spent whole."""
        return self.budget.unit == "samples" and not self.settings.allow_short


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UnitRows:
    """The scalars of a unit. Arrays over n shrink as rows are left out; `reason_N` says why."""

    unit: UnitParts
    reason_N: np.ndarray
    """Why a row may not be chosen, objects; empty where it may."""
    position_n: np.ndarray
    """Row of the unit."""
    sample_id_n: np.ndarray
    tag_n: np.ndarray
    """A hash of the id."""
    gain_n: np.ndarray
    """What the selector ranks or gains by."""
    scale_n: np.ndarray
    """What a unit row is multiplied by."""
    tokens_n: np.ndarray
    group_n: np.ndarray
    cost_n: np.ndarray | None
    """Stiff cost."""
    measures: Mapping[str, np.ndarray]
    """What caps on outliers look at, by reason; over n."""
    content_id_n: np.ndarray | None
    """Dropped once duplicates are known."""
    domain_tokens: Mapping[str, tuple[int, int]]
    """(rows, tokens) of all N rows, by domain."""
    alpha_n: np.ndarray | None = None
    """Over passes, where `gain_n` is the price of the present subproblem: <z_i, g>."""
    weight_n: np.ndarray | None = None
    """Over passes: the present weights."""
    whole_n: np.ndarray | None = None
    """Over rounds of `direct`: whole samples of the present weights."""
    level_n: np.ndarray | None = None
    """Of a shortlist that may have to be longer: how many times it must double to hold a row."""

    def __len__(self) -> int:
        return len(self.position_n)

    @property
    def index(self) -> int:
        """Of the unit."""
        return self.unit.index

    def kept(self, kept_n: np.ndarray, reasons: Mapping[int, str] | str) -> UnitRows:
        """Without the other rows, of which each has a reason, or all one."""
        reason_N = self.reason_N.copy()
        for at in np.flatnonzero(~kept_n):
            reason_N[self.position_n[at]] = reasons if isinstance(reasons, str) else reasons[int(at)]
        arrays: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_n") and value is not None:
                arrays[field.name] = value[kept_n]
        measures = {name: value_n[kept_n] for name, value_n in self.measures.items()}
        return dataclasses.replace(self, **arrays, reason_N=reason_N, measures=measures)

    def lean(self) -> UnitRows:
        """Without what no pass needs, in few bytes: a pass writes down what it leaves to the next one."""
        sample_id_n = self.sample_id_n
        with contextlib.suppress(UnicodeEncodeError):
            sample_id_n = sample_id_n.astype("S")
        return dataclasses.replace(
            self,
            reason_N=np.zeros(0, dtype=object),
            measures={},
            domain_tokens={},
            sample_id_n=sample_id_n,
            position_n=self.position_n.astype(np.int32),
            tokens_n=self.tokens_n.astype(np.int32),
            group_n=self.group_n.astype(np.int16),
        )

    def scalars(self, budget_unit: str) -> ScalarRows:
        """What a search reads."""
        return ScalarRows(
            gain_n=self.gain_n,
            size_n=self.tokens_n if budget_unit == "tokens" else np.ones(len(self), np.int64),
            group_n=self.group_n,
            cost_n=self.cost_n,
        )


class SelectionContext:
    """What a worker holds: the run, the target, the selector."""

    def __init__(self, task: SelectionTask) -> None:
        self.task = task
        self.run = Run.open(task.run_url)
        self.spec: FeatureSpec = self.run.scoring(task.scoring)
        self.selector = get_selector(task.settings.selector)
        self.target: TargetData | None = None
        if task.target:
            self.target = read_target(self.run, task.target, task.scoring, self.spec)
        # Scalars are read here; what needs sketches is computed where they are.
        self._kept: dict[int, torch.Tensor] = {}
        self._kept_bytes = 0
        self._narrow = copy.copy(self.selector)
        self._narrow.needs_sketches = False  # type: ignore[misc]
        self._settings = dataclasses.replace(
            task.settings, max_loss_quantile=None, max_grad_norm_quantile=None, quotas={}, floors={}
        )

    @property
    def limited(self) -> bool:
        """Whether there is a limit on stiff cost."""
        return self.task.stiff_limit is not None

    @property
    def geometry(self) -> TargetGeometry:
        """Of the target, which selectors that ask for it have."""
        assert self.target is not None
        return self.target.geometry

    @property
    def direction_K(self) -> torch.Tensor:
        """The unit direction whose gain is sought."""
        return direction_of(self.geometry, self.task.settings)

    def table(self, unit: UnitParts, *, everything: bool = False) -> pa.Table:
        """The unit's features but for the sketches, with its curvature columns; all of them or those that decide."""
        names = SCALARS
        if everything:
            names = (*PLACE_COLUMNS, *MEASURE_COLUMNS)
        features = read_columns(self.run.url, unit.features, names, schema="features", spec=self.spec.fingerprint)
        if unit.curvature is None:
            return features
        url = self.run.path(unit.curvature.path)
        data = part_buffer(self.run.url, unit.curvature)
        return with_curvature(features, decode_table(data, url, schema="curvature", spec=self.spec.fingerprint)[0])

    def sketches(self, unit: UnitParts) -> torch.Tensor:
        """Unit sketches of all rows of the unit, float16 [N, K]; the hash of the part is verified when it is read."""
        if unit.index in self._kept:
            return self._kept[unit.index]
        width = self.spec.sketch_size
        stored_NK = np.empty((unit.features.rows, width), np.float16)

        def store(row: int, numbers: pa.Array) -> None:
            rows = numbers.to_numpy().reshape(-1, width)
            stored_NK[row : row + len(rows)] = rows

        decode_vectors(
            part_buffer(self.run.url, unit.features), self.run.path(unit.features.path), "sketch", store,
            schema="features", spec=self.spec.fingerprint, rows=unit.features.rows, width=width,
        )  # fmt: skip
        sketches_NK = torch.from_numpy(stored_NK)
        if self._kept_bytes + stored_NK.nbytes <= SKETCH_BYTES:
            self._kept[unit.index] = sketches_NK
            self._kept_bytes += stored_NK.nbytes
        return sketches_NK

    def candidates(self, table: pa.Table, unit_NK: torch.Tensor | None = None) -> CandidateSet:
        """Candidates of some rows, as the in-memory path sees them."""
        return candidate_set(table, loss=self.spec.loss, keep_overlapping=self.task.keep_overlapping, unit_NK=unit_NK)

    def read(self, unit: UnitParts) -> UnitRows:
        """The scalars of a unit; its sketches are read only where the gain is no stored column."""
        task = self.task
        table = self.table(unit)
        published = self.selector.name == "direct"
        targeted = isinstance(self.selector, Ranking) or published or plain_target(task.settings)
        candidates = self.candidates(table, None if targeted or not len(table) else self.sketches(unit))
        content_id = np.asarray(candidates.content_id)
        counted = _by_domain(candidates)
        # Copies are found among all units, later.
        candidates = dataclasses.replace(candidates, content_id=np.full(len(candidates), ""))
        nothing: dict[str, Any] = {
            "unit": unit,
            "domain_tokens": counted,
            "cost_n": np.zeros(0) if self.limited else None,
        }
        if not len(candidates):
            return _none(nothing, np.zeros(0, dtype=object))
        geometry = None if self.target is None else self.target.geometry
        try:
            problem = Problem(candidates, geometry, task.budget, self._settings, self._narrow)
        except NothingToChoose as error:
            return _none(nothing, error.reason_N)
        pool_n = problem.pool_n
        cost_n: np.ndarray | None = None
        if isinstance(self.selector, Ranking):
            gain_n, scale_n = self.selector.score(problem), np.ones(len(pool_n))
        else:
            scale_n = problem.scale_n
            # The published problem has no gains but those of its rounds.
            gain_n = np.zeros(len(pool_n)) if published else gain_cosine(problem)
            if self.selector.name != "match":
                gain_n = gain_n * scale_n
            if self.limited:
                cost_n = problem.column("stiff_cost_empirical" if published else "stiff_cost") * scale_n**2
        domain_n = np.asarray(candidates.domain)[pool_n]
        group_n = np.zeros(len(pool_n), np.int64)
        for code, domain in enumerate(task.domains):
            group_n[domain_n == domain] = code + 1
        sample_id_n = problem.sample_id[pool_n]
        asked = {
            "loss_outlier": task.settings.max_loss_quantile,
            "grad_norm_outlier": task.settings.max_grad_norm_quantile,
        }
        return UnitRows(
            unit=unit,
            reason_N=problem.reason_N,
            position_n=pool_n,
            sample_id_n=sample_id_n,
            tag_n=tags(sample_id_n),
            gain_n=np.asarray(gain_n, np.float64),
            scale_n=scale_n,
            tokens_n=candidates.tokens_N[pool_n].astype(np.int64),
            group_n=group_n,
            cost_n=cost_n,
            measures={name: MEASURES[name](candidates)[pool_n] for name, q in asked.items() if q is not None},
            content_id_n=content_id[pool_n],
            domain_tokens=counted,
        )


class TaskStep(beam.DoFn):
    """A step that needs the run, the target and the selector."""

    def __init__(self, task: SelectionTask, shared: Shared) -> None:
        self._task, self._shared = task, shared

    def setup(self) -> None:
        torch.set_num_threads(1)
        task = self._task
        self._context: SelectionContext = self._shared.acquire(lambda: SelectionContext(task))


def _none(known: Mapping[str, Any], reason_N: np.ndarray) -> UnitRows:
    empty = np.zeros(0, np.int64)
    return UnitRows(
        **known, reason_N=reason_N, position_n=empty, sample_id_n=np.zeros(0, "U1"), tag_n=np.zeros(0, np.uint64),
        gain_n=np.zeros(0), scale_n=np.zeros(0), tokens_n=empty, group_n=empty, measures={},
        content_id_n=np.zeros(0, "U1"),
    )  # fmt: skip


def _by_domain(candidates: CandidateSet) -> dict[str, tuple[int, int]]:
    names, code_N = np.unique(np.asarray(candidates.domain).astype(str), return_inverse=True)
    rows = np.bincount(code_N, minlength=len(names))
    tokens = np.zeros(len(names), np.int64)
    np.add.at(tokens, code_N, candidates.tokens_N)
    return {str(name): (int(rows[d]), int(tokens[d])) for d, name in enumerate(names)}
