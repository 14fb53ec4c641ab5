"""The one-step oracle's arithmetic: what was predicted of a choice, and how predictions order what really happened.

Legend: N candidates, D choices (the one made and random ones); K = gram_NN, b = align_N.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from selection_ops.online.metrics import Geometry
from selection_ops.quality import spearman


@dataclasses.dataclass(frozen=True, kw_only=True)
class OracleReport:
    """The real drop of the target batch's loss after one optimizer step on the choice that was made, and on random ones of its size."""

    drop: float
    """Of the choice that was made, nats per token."""
    random_drop: float
    """Mean over the random ones, nats per token."""
    beaten: float
    """Share of the random ones whose drop is smaller; equal ones count half."""
    correlation: float | None
    """Rank correlation of predicted and real drops over all of them; None where nothing was predicted or all are alike."""


def predicted_drops(space: Geometry, weight_DN: Tensor) -> Tensor:
    """b'w - w'Kw / 2 of every row, in float64, in units of the metric.

    A step's gradient is that of the mean over loss tokens, so rows come as shares of it, and the scale that the metric leaves open is
    one for all: the line search of the first row, under which its own prediction is largest. Where that one points away from the
    target there is no such scale, and b'w alone is returned.
    """
    weight_DN = weight_DN.to(torch.float64)
    slope_D = weight_DN @ space.align_N
    curvature_D = ((weight_DN @ space.gram_NN) * weight_DN).sum(1)
    first, bend = float(slope_D[0]), float(curvature_D[0])
    if not (first > 0 and bend > 0):
        return slope_D
    scale = first / bend
    return scale * slope_D - scale * scale * curvature_D / 2


def judge(drops: Sequence[float], predicted_D: Tensor | None) -> OracleReport:
    """Report of real drops, that of the choice made first."""
    chosen, *others = drops
    correlation = None
    if predicted_D is not None:
        found = spearman(predicted_D, torch.tensor(drops, dtype=torch.float64))
        correlation = found if math.isfinite(found) else None
    return OracleReport(
        drop=chosen,
        random_drop=sum(others) / len(others),
        beaten=sum((chosen > other) + 0.5 * (chosen == other) for other in others) / len(others),
        correlation=correlation,
    )
