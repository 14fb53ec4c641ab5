"""What candidates are compared with: the sketch of the preconditioned gradient of the target batch's token mean.

Legend: K sketch dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import InputError, LehrError
from schemas.spec import PROJECTION_VERSION, PreconditionForm
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.losses import HeadRoute
from selection_ops.model import causal_model
from selection_ops.online.metrics import Metric, get_metric
from selection_ops.preconditioning import Preconditioner, fit_rank_one
from selection_ops.sites import MatrixParameter
from trainer.batches import StepBatches
from trainer.live_optimizer import LiveOptimizer
from trainer.parallel import OneProcess


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetDirection:
    """The target of one step."""

    metric: str
    """The metric that acts."""
    direction_K: Tensor
    """Sketch of the preconditioned gradient of the target's token mean."""
    loss: float
    """That mean, nats per token."""


class TargetPass:
    """Takes the target's direction with the projections of an engine of candidates, under the live weights."""

    def __init__(
        self,
        model: Any,
        engine: GradientEngine,
        metric: Metric,
        live: LiveOptimizer,
        *,
        precondition: PreconditionForm,
        warmup_select: int,
        proj_rank: int,
        seed: int,
        processes: OneProcess,
    ) -> None:
        self._processes = processes
        self._model, self._engine, self._metric, self._live = model, engine, metric, live
        self._warmup_select = warmup_select
        self._route = HeadRoute(model)
        self._sketching: GradientEngine | None = None
        if metric.needs_preconditioner and precondition == "rank-one":
            self._sketching = GradientEngine(
                model, engine.input_groups, proj_rank=proj_rank, k=0, seed=seed, version=PROJECTION_VERSION
            )
        self._weights: dict[str, nn.Parameter] = {
            site.parameter: causal_model(model).get_parameter(site.parameter) for site in engine.matrix_sites
        }

    def __call__(self, target: Sequence[Encoded], batches: StepBatches, number: int) -> TargetDirection:
        """The direction of step `number`. Raises `LehrError` where the target's loss is not finite."""
        if not target:
            raise InputError("this policy compares candidates with target samples; give the step some")
        acting = self._acting_metric()
        if self._sketching is not None and acting.needs_preconditioner:
            direction_K, loss = self._sketched(self._sketching, acting, target, batches)
        else:
            direction_K, loss = self._dense(acting, target, batches)
        # Preconditioning and projecting are linear: the sketch of a sum is the sum of the processes' sketches.
        direction_K = self._processes.sum(direction_K)
        loss = float(self._processes.sum(torch.tensor(loss, dtype=torch.float64)))
        if not math.isfinite(loss):
            raise LehrError(f"step {number}: the loss of the target batch is {loss}; nothing was updated")
        return TargetDirection(metric=acting.name, direction_K=direction_K, loss=loss)

    def _dense(self, metric: Metric, target: Sequence[Encoded], batches: StepBatches) -> tuple[Tensor, float]:
        """By way of the gradient itself, preconditioned elementwise."""
        weights = list(self._weights.values())
        sums: list[Tensor] = [torch.zeros_like(weight) for weight in weights]
        tokens, total = sum(sum(item.loss_mask) for item in target), 0.0
        self._model.eval()
        for _, batch in batches(target):
            with batches.arithmetic():
                loss = self._route.sample_losses(batch).sum() / tokens
            for held, gradient in zip(sums, torch.autograd.grad(loss, weights)):
                held += gradient
            total += float(loss.detach())
        gradients = dict(zip(self._weights, sums))
        if metric.needs_preconditioner and math.isfinite(total):
            for name, weight in self._weights.items():
                gradients[name] = metric.precondition_target(gradients[name], self._live.preconditioner(weight))
        sites = self._engine.matrix_sites
        pieces = [self._engine.project_dense(site.name, gradients[site.parameter]).flatten() for site in sites]
        return torch.cat(pieces), total

    def _sketched(
        self, engine: GradientEngine, metric: Metric, target: Sequence[Encoded], batches: StepBatches
    ) -> tuple[Tensor, float]:
        """Through the rank-one fit of the preconditioner: no gradient of the target is formed."""
        engine.precondition(self._fit(metric))
        tokens, total = sum(sum(item.loss_mask) for item in target), 0.0
        weight = next(iter(self._weights.values()))
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        direction_K = torch.zeros(engine.sketch_size, dtype=wide, device=weight.device)
        with engine:
            for places, batch in batches(target):
                with batches.arithmetic():
                    found = engine.features(batch)
                direction_K += found.sketch_BK[: len(places)].sum(0) / tokens
                total += float(found.loss_B[: len(places)].sum()) / tokens
        return direction_K, total

    def _fit(self, metric: Metric) -> Preconditioner:
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        shapes = {site.name: site for site in self._engine.matrix_sites}
        for group in self._engine.input_groups:
            exact = []
            for name in group.sites:
                site = shapes[name]
                assert isinstance(site.shape, MatrixParameter)
                held = self._live.preconditioner(self._weights[site.parameter]) ** metric.target_power
                exact.append(site.shape.matrix(held))
            fit = fit_rank_one(exact, measured=False)
            outputs.update(zip(group.sites, fit.outputs))
            inputs[group.name] = fit.inputs
        return Preconditioner(outputs=outputs, inputs=inputs)

    def _acting_metric(self) -> Metric:
        """The metric asked for, or `sgd` until the second moment has seen enough gradients."""
        if not self._metric.needs_preconditioner:
            return self._metric
        seen = min(self._live.seen(weight) for weight in self._weights.values())
        return self._metric if seen >= self._warmup_select else get_metric("sgd")
