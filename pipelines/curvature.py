"""Curvature columns of a work unit: a function of stored sketches, a target's spectrum, and (for overlap) the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from pipelines.geometry import TargetData, unit_sketches
from schemas.sample import Sample
from schemas.tables import table_schema
from selection_ops.curvature import curvature_columns
from selection_ops.overlap import OVERLAP_LIMIT, OverlapIndex


class CurvatureView:
    """One target, ready to be looked at from any number of units."""

    def __init__(self, target: TargetData) -> None:
        self.target = target
        self._overlap = OverlapIndex({name: target.samples[name] for name in ("reference", "evaluation")})

    def table(self, features: pa.Table, samples: Sequence[Sample]) -> pa.Table:
        """The `curvature` table of a features table; `samples` are the texts of its rows, in the same order."""
        unit = torch.from_numpy(unit_sketches(features))
        norms = features["sketch_norm"].to_numpy()
        columns: dict[str, object] = {"sample_id": features["sample_id"]}
        columns.update(curvature_columns(unit, norms, self.target.geometry))
        overlaps = [self._overlap.overlap(sample) for sample in samples]
        columns["overlap"] = np.array([share for share, _ in overlaps], np.float32)
        columns["overlap_with"] = [parts for _, parts in overlaps]
        columns["overlapping"] = [share > OVERLAP_LIMIT for share, _ in overlaps]
        return pa.table(columns, schema=table_schema("curvature"))
