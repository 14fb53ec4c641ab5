"""The preconditioner of a step: powers of what the live optimizer does, for the matrices that take part in choosing.

Legend: O outputs and I inputs of a matrix.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from schemas.errors import InputError
from selection_ops.engine import GradientEngine
from selection_ops.model import causal_model
from selection_ops.online.metrics import Metric, get_metric
from selection_ops.preconditioning import Preconditioner, SiteForm
from selection_ops.rank_one import fit_rank_one_adamw
from selection_ops.second_moment import RootScale
from selection_ops.sites import MatrixParameter, Site
from trainer.live_optimizer import Asked, LiveOptimizer

Form = Literal["auto", "exact", "rank-one"]


class LivePreconditioner:
    """Preconditions either side of a metric, under the state that the optimizer has now; `refresh` after every step."""

    def __init__(
        self, model: Any, engine: GradientEngine, optimizer: Any, metric: Metric, *, asked: Asked, form: Form
    ) -> None:
        self._groups = engine.input_groups
        self._sites = {site.name: site for site in engine.matrix_sites}
        self._weights: dict[str, nn.Parameter] = {
            name: causal_model(model).get_parameter(name)
            for name in {site.parameter: None for site in engine.matrix_sites}
        }
        self._metric, self._form = metric, form
        self._live = LiveOptimizer(optimizer, asked)
        self._kinds = {}
        if metric.needs_preconditioner:
            self._kinds = {name: self._live.kind(weight) for name, weight in self._weights.items()}
        self.is_less = "less" in self._kinds.values()
        if self.is_less and {metric.candidate_power, metric.target_power} - {0.0, 1.0}:
            raise InputError(
                f"metric {metric.name} takes a root of the preconditioner, which the LESS form does not have; use opus"
            )
        self._scales: dict[str, RootScale] = {}

    def acting(self, steps_taken: int, warmup_select: int) -> Metric:
        """The metric asked for; `sgd` where nothing is preconditioned, or until the state has seen enough gradients."""
        if not self._metric.needs_preconditioner or set(self._kinds.values()) == {"none"}:
            return self._metric if not self._metric.needs_preconditioner else get_metric("sgd")
        seen = [self._live.seen(weight, steps_taken) for weight in self._weights.values()]
        warm = all(count is None or count >= warmup_select for count in seen)
        return self._metric if warm else get_metric("sgd")

    def refresh(self) -> None:
        """Forget what was read from the state: the optimizer has stepped."""
        self._scales.clear()

    def folds(self, metric: Metric) -> bool:
        """Whether P folds into the projections, so that no whole gradient is formed for it; AdamW's does as a rank-one fit."""
        if self.is_less:
            return False
        if "adamw" not in self._kinds.values() or self._form == "rank-one":
            return True
        return self._form == "auto" and bool(metric.candidate_power)

    def of_power(self, power: float, *, folded: bool) -> Preconditioner | None:
        """P^power for an engine: folded into projections where that can be, else for whole gradients; None for power 0."""
        if not power:
            return None
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        exact: dict[str, Tensor] = {}
        sided, less = {}, {}
        for group in self._groups:
            kinds = {name: self._kinds[self._sites[name].parameter] for name in group.sites}
            fitted = [name for name, kind in kinds.items() if kind == "adamw" and folded]
            for name, kind in kinds.items():
                site, weight = self._sites[name], self._weights[self._sites[name].parameter]
                assert isinstance(site.shape, MatrixParameter)
                if kind == "muon":
                    sided[name] = self._live.sided(site, weight, power)
                elif kind == "less":
                    less[name] = self._live.less(site, weight)
                elif kind == "adamw" and not folded:
                    shape_OI = site.shape.outputs, site.shape.inputs
                    ones_OI = torch.ones(shape_OI, dtype=weight.dtype, device=weight.device)
                    exact[name] = self.form(site, power).apply(ones_OI)
                elif kind != "adamw":
                    factor = self._live.scalar(weight) ** power
                    outputs[name] = torch.full((site.shape.outputs,), factor, dtype=torch.float64)
                    inputs[name] = torch.ones(site.shape.inputs, dtype=torch.float64)
            if fitted:
                fit = fit_rank_one_adamw([self._second(self._sites[name]) for name in fitted], power)
                outputs.update(zip(fitted, fit.outputs))
                inputs.update(dict.fromkeys(fitted, fit.inputs))
            if (
                len(set(kinds.values())) == 1 and inputs.keys() & kinds.keys()
            ):  # one factor, one projection of the input
                inputs[group.name] = next(inputs.pop(name) for name in kinds)
                for name in kinds:
                    if name != group.name:
                        inputs.pop(name, None)
        return Preconditioner(outputs=outputs, inputs=inputs, exact=exact, sided=sided, less=less)

    def form(self, site: Site, power: float) -> SiteForm:
        """P^power of one site, without a fit."""
        kind, weight = self._kinds.get(site.parameter, "none"), self._weights[site.parameter]
        if not power or kind == "none":
            return SiteForm()
        if kind == "muon":
            return SiteForm(sided=self._live.sided(site, weight, power))
        if kind == "less":
            return SiteForm(less=self._live.less(site, weight))
        if kind == "scalar":
            return SiteForm(scalar=self._live.scalar(weight) ** power)
        second_OI, scale = self._second(site)
        return SiteForm(second_OI=second_OI, scale=scale, power=power)

    def _second(self, site: Site) -> tuple[Tensor, RootScale]:
        """The second moment of a site's matrix and how P comes from it; its floor is taken over the whole parameter."""
        weight = self._weights[site.parameter]
        if site.parameter not in self._scales:
            self._scales[site.parameter] = self._live.scale(weight)
        assert isinstance(site.shape, MatrixParameter)
        return site.shape.matrix(self._live.second_moment(weight)), self._scales[site.parameter]
