"""The gradient engine: low-rank projected per-sample gradients by one forward and one backward without weight gradients.

Legend: B samples, T tokens, I inputs and O outputs of a site, R projection rank, K sketch dimension.
"""

from __future__ import annotations

import dataclasses
from types import TracebackType
from typing import Any

import torch
from torch import nn

from schemas.errors import InputError
from schemas.spec import FeatureSpec, InputGroup
from selection_ops.batching import Batch
from selection_ops.losses import HeadRoute
from selection_ops.projections import Fold, ProjectionSpec, input_projection, output_projection
from selection_ops.sites import layout_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFeatures:
    """Features of a batch. loss_B in nats (float64); sketch_BK the full sketch; grad_norm_B its norm before the fold."""

    loss_B: torch.Tensor
    loss_tokens_B: torch.Tensor
    sketch_BK: torch.Tensor
    grad_norm_B: torch.Tensor


class _SiteFunction(torch.autograd.Function):
    """y = x W' + b; backward returns the gradient of x and records sum over tokens of (P_out d)(P_in a)' per sample."""

    @staticmethod
    def forward(ctx: Any, x_BTI, weight_OI, bias_O, projected_BTR, site: _Site, engine: GradientEngine):
        ctx.save_for_backward(weight_OI, projected_BTR)
        ctx.site, ctx.engine = site, engine
        return nn.functional.linear(x_BTI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, delta_BTO):
        weight_OI, projected_BTR = ctx.saved_tensors
        ctx.engine._record(ctx.site, delta_BTO @ ctx.site.out_OR, projected_BTR)
        return delta_BTO @ weight_OI, None, None, None, None, None


@dataclasses.dataclass(eq=False)
class _Site:
    name: str
    group: str
    index: int
    module: nn.Module
    layout: Any
    in_IR: torch.Tensor
    out_OR: torch.Tensor


class GradientEngine:
    """A context in which `features` computes per-sample sketches of a model's gradients.

    Inside, parameters are frozen, the embedding output carries gradient, and the sites' forwards are replaced on the
    instances; on exit, also after an error, everything is as it was. Enter and exit are cheap and may be repeated between
    optimizer steps. Source of the factorisation: LoGra, arXiv 2405.13954.
    """

    def __init__(
        self,
        model: Any,
        input_groups: tuple[InputGroup, ...],
        *,
        proj_rank: int,
        k: int,
        seed: int,
        version: int,
        loss: str = "sum",
    ) -> None:
        self.model = model
        self.loss = loss
        parameter = next(model.parameters())
        self._device = parameter.device
        self._wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        self._rank = proj_rank
        spec = ProjectionSpec(proj_rank=proj_rank, seed=seed, version=version, k=k)
        modules = dict(model.named_modules())
        self._sites: list[_Site] = []
        for group in input_groups:
            shared: torch.Tensor | None = None
            for name in group.sites:
                module = modules.get(name)
                layout = layout_of(module) if module is not None else None
                if module is None or layout is None:
                    raise InputError(
                        f"the model has no site {name!r}; the scoring was declared for another architecture"
                    )
                outputs, inputs = layout.sizes(module)
                if shared is None:
                    shared = input_projection(spec, group.name, inputs).T.contiguous().to(self._device, parameter.dtype)
                out_OR = output_projection(spec, name, outputs).T.contiguous().to(self._device, parameter.dtype)
                self._sites.append(_Site(name, group.name, len(self._sites), module, layout, shared, out_OR))
        self._fold = Fold(spec, input_groups, self._device, self._wide)
        self._route = HeadRoute(model)
        self._projected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._records_SBRR = torch.empty(0)
        self._restore: list[Any] = []

    @classmethod
    def from_spec(cls, model: Any, spec: FeatureSpec) -> GradientEngine:
        """The engine of a feature spec."""
        return cls(
            model, spec.input_groups, proj_rank=spec.proj_rank, k=spec.k, seed=spec.seed,
            version=spec.projection_version, loss=spec.loss,
        )  # fmt: skip

    def __enter__(self) -> GradientEngine:
        training, flags = self.model.training, [(p, p.requires_grad) for p in self.model.parameters()]
        self._restore.append(lambda: self.model.train(training))
        self._restore.append(lambda: [p.requires_grad_(flag) for p, flag in flags])
        self.model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        embedding = self.model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        self._restore.append(handle.remove)
        for site in self._sites:
            site.module.forward = self._forward_of(site)
            self._restore.append(lambda module=site.module: module.__dict__.pop("forward"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._restore:
            self._restore.pop()()
        self._projected.clear()
        self._records_SBRR = torch.empty(0)

    def _forward_of(self, site: _Site) -> Any:
        def forward(x_BTI: torch.Tensor) -> torch.Tensor:
            held = self._projected.get(site.group)
            if held is None or held[0] is not x_BTI:
                held = x_BTI, x_BTI.detach() @ site.in_IR
                self._projected[site.group] = held
            return _SiteFunction.apply(x_BTI, site.layout.matrix(site.module), site.module.bias, held[1], site, self)

        return forward

    def _record(self, site: _Site, delta_BTR: torch.Tensor, projected_BTR: torch.Tensor) -> None:
        # bfloat16 factors are widened here: the sum over tokens is where rounding would pile up.
        product_BRR = delta_BTR.to(self._wide).transpose(1, 2) @ projected_BTR.to(self._wide)
        self._records_SBRR[site.index] += product_BRR

    def features(self, batch: Batch) -> SampleFeatures:
        """Losses, sketches and gradient norms of a batch; only inside the context."""
        if not self._restore:
            raise RuntimeError("features() is only there inside `with engine:`")
        size = len(batch.ids_BT)
        self._records_SBRR = torch.zeros(
            len(self._sites), size, self._rank, self._rank, dtype=self._wide, device=self._device
        )
        with torch.enable_grad():
            loss_B = self._route.sample_losses(batch, frozen=True)
            loss_tokens_B = batch.loss_BT[:, 1:].sum(1)
            self._projected.clear()
            loss_B.sum().backward()
        flat_BS = self._records_SBRR.transpose(0, 1).reshape(size, -1)
        loss_B = loss_B.detach().double()
        if self.loss == "mean":
            flat_BS = flat_BS / loss_tokens_B[:, None]
            loss_B = loss_B / loss_tokens_B
        return SampleFeatures(
            loss_B=loss_B, loss_tokens_B=loss_tokens_B, sketch_BK=self._fold(flat_BS), grad_norm_B=flat_BS.norm(dim=1)
        )

    def project_dense(self, site_name: str, gradient_OI: torch.Tensor) -> torch.Tensor:
        """Sketch [R, R] of a dense gradient of one site's weight, given as [O, I]."""
        site = next(site for site in self._sites if site.name == site_name)
        left_RI = site.out_OR.T.to(self._wide) @ gradient_OI.to(self._wide)
        return left_RI @ site.in_IR.to(self._wide)
