"""What candidates are compared with: the preconditioned gradient of the target batch's token mean, as a sketch or whole.

Legend: K sketch dimension, O outputs and I inputs of a matrix.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from schemas.errors import InputError, LehrError
from schemas.spec import PROJECTION_VERSION
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.model import causal_model
from selection_ops.online.metrics import Metric
from selection_ops.sites import MatrixParameter
from trainer.batches import StepBatches
from trainer.live_preconditioner import LivePreconditioner
from trainer.sharding import WholeModel, whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetDirection:
    """The target of one step; v is the gradient of its token mean, and the metric multiplies it by P^t, candidates by P^c."""

    loss: float
    """That mean, nats per token."""
    sketch_K: Tensor | None = None
    """Sketch of P^t v; None where alignments are exact."""
    whole: Mapping[str, Tensor] | None = None
    """P^c P^t v [O, I] by site, with which the gradient of a candidate is aligned; None where alignments are sketched."""
    formed: bool = False
    """Whether the gradient was formed whole on the way."""
    square: float | None = None
    """|P^t v|^2 of the whole gradient, where it is formed for alignments."""


class TargetPass:
    """Takes the target's direction with the projections of an engine of candidates, under the live weights."""

    def __init__(
        self,
        layout: WholeModel,
        engine: GradientEngine,
        preconditioner: LivePreconditioner,
        *,
        exact: bool,
        proj_rank: int,
        seed: int,
    ) -> None:
        """With `exact` the direction is the whole gradient."""
        self._layout, self._engine, self._preconditioner, self._exact = layout, engine, preconditioner, exact
        self._processes = layout.processes
        # Made here: finding the sites runs the model, which a step must not do more often than it says.
        self._sketching = (
            None
            if exact
            else layout.engine(engine.input_groups, proj_rank=proj_rank, k=0, seed=seed, version=PROJECTION_VERSION)
        )
        self._weights: dict[str, nn.Parameter] = {
            site.parameter: causal_model(layout.model).get_parameter(site.parameter) for site in engine.matrix_sites
        }

    def __call__(self, metric: Metric, target: Sequence[Encoded], batches: StepBatches, number: int) -> TargetDirection:
        """The direction of step `number`. Raises `LehrError` where the target's loss is not finite."""
        if not target:
            raise InputError("this policy compares candidates with target samples; give the step some")
        if self._exact or (metric.target_power and not self._preconditioner.folds(metric)):
            found = self._whole(metric, target, batches)
        else:
            found = self._sketched(metric, target, batches)
        loss = float(self._processes.sum(torch.tensor(found.loss, dtype=torch.float64)))
        # Folding and projecting are linear: the sketch of a sum is the sum of the processes' sketches.
        sketch_K = None if found.sketch_K is None else self._processes.sum(found.sketch_K)
        found = dataclasses.replace(found, loss=loss, sketch_K=sketch_K)
        if not math.isfinite(found.loss):
            raise LehrError(f"step {number}: the loss of the target batch is {found.loss}; nothing was updated")
        return found

    def _whole(self, metric: Metric, target: Sequence[Encoded], batches: StepBatches) -> TargetDirection:
        """By way of the gradient itself, preconditioned exactly."""
        tokens, total = sum(sum(item.loss_mask) for item in target), 0.0
        self._layout.model.eval()

        def losses() -> Iterator[Tensor]:
            nonlocal total
            for places, batch in batches(target):
                with batches.arithmetic():
                    loss = self._layout.route.sample_losses(batch)[: len(places)].sum() / tokens
                total += float(loss.detach())
                yield loss

        sums = self._layout.gradients(losses(), list(self._weights.values()))
        summed = self._layout.sums_gradients
        if not summed and (self._exact or self._preconditioner.is_less):
            # What is not linear, or not projected, takes the whole sum.
            sums, summed = [self._processes.sum(held) for held in sums], True
        gradients, square = dict(zip(self._weights, sums)), 0.0
        pieces: list[Tensor] = []
        matrices: dict[str, Tensor] = {}
        for site in self._engine.matrix_sites:
            assert isinstance(site.shape, MatrixParameter)
            gradient_OI = site.shape.matrix(whole(gradients[site.parameter]))
            moved_OI = self._preconditioner.form(site, metric.target_power).apply(gradient_OI)
            if self._exact:
                square += float(moved_OI.square().sum(1).double().sum())
                matrices[site.name] = self._preconditioner.form(site, metric.candidate_power).apply(moved_OI)
            else:
                pieces.append(self._engine.project_matrix(site.name, moved_OI).flatten())
        if summed and not self._processes.leads:
            pieces = [torch.zeros_like(piece) for piece in pieces]  # every process has taken the whole one
        if self._exact:
            return TargetDirection(loss=total, whole=matrices, square=square, formed=True)
        return TargetDirection(loss=total, sketch_K=torch.cat(pieces), formed=True)

    def _sketched(self, metric: Metric, target: Sequence[Encoded], batches: StepBatches) -> TargetDirection:
        """Through projections that P is folded into: no gradient of the target is formed."""
        engine = self._sketching
        assert engine is not None
        engine.precondition(self._preconditioner.of_power(metric.target_power, folded=True))
        tokens, total = sum(sum(item.loss_mask) for item in target), 0.0
        weight = next(iter(self._weights.values()))
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        sketch_K = torch.zeros(engine.sketch_size, dtype=wide, device=weight.device)
        with engine:
            for places, batch in batches(target):
                with batches.arithmetic():
                    found = engine.features(batch)
                sketch_K += found.sketch_BK[: len(places)].sum(0) / tokens
                total += float(found.loss_B[: len(places)].sum()) / tokens
        return TargetDirection(loss=total, sketch_K=sketch_K)
