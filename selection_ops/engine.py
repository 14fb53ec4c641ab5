"""The gradient engine: low-rank projected per-sample gradients by one forward and one backward without weight gradients.

For a site y = W a, the gradient of a sample's loss with respect to W is the sum over its tokens of d a^T, d being the gradient
of y. Its sketch P_out (sum d a^T) P_in^T = sum (P_out d)(P_in a)^T is formed in backward from factors of R numbers each
(LoGra, arXiv 2405.13954, section 3). The weight gradients themselves, 2 of the 6 FLOPs per parameter and token, are never formed.

Where the time goes (one core with AVX-512 bf16, random Llamas of 35M and 135M, `benchmarks/scoring.py`): of a plain forward + backward
in float32, a forward with a backward that only reaches the inputs is 0.69 and 0.63; projecting, contracting and folding add 0.03. bfloat16
takes a third of the time of float32, and the same share of its own plain pass. So the engine stands at its bound, and what is left
to gain lies in the arithmetic, the attention backward (`model.default_attention`) and padding, not here.

Legend: B samples, T tokens, I inputs and O outputs of a site, R projection rank, S all sites' R x R sketches side by side,
K sketch dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn

from schemas.errors import InputError
from schemas.spec import PROJECTION_VERSION, FeatureSpec, InputGroup, LossKind
from selection_ops.batching import Batch
from selection_ops.losses import HeadRoute
from selection_ops.model import evaluating
from selection_ops.projections import Fold, ProjectionSpec, input_signs, output_signs
from selection_ops.sites import find_sites, layout_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFeatures:
    """Features of a batch, in its order.

    loss_B: sum (or mean) of token losses, nats, float64. loss_tokens_B: tokens that carry loss. sketch_BK: the full sketch, not
    normalised, float32 (float64 for float64 models). grad_norm_B: norm of the sketch before the fold.
    """

    loss_B: torch.Tensor
    loss_tokens_B: torch.Tensor
    sketch_BK: torch.Tensor
    grad_norm_B: torch.Tensor


class _SiteFunction(torch.autograd.Function):
    """y = W x + b; backward returns the gradient of x and records the sum over tokens of (P_out d)(P_in a)^T per sample."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTI: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        projected_BTR: torch.Tensor,
        site: _Site,
        engine: GradientEngine,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight_OI, projected_BTR)
        ctx.site, ctx.engine = site, engine
        return nn.functional.linear(x_BTI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, delta_BTO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        weight_OI, projected_BTR = ctx.saved_tensors
        # Under autocast the output, and so its gradient, is narrower than the weights; and autocast must not narrow the
        # contraction over tokens.
        with torch.autocast(delta_BTO.device.type, enabled=False):
            ctx.engine._record(ctx.site, delta_BTO @ ctx.site.out_signs_OR.to(delta_BTO.dtype), projected_BTR)
            grad_BTI = delta_BTO @ weight_OI.to(delta_BTO.dtype) if ctx.needs_input_grad[0] else None
        return grad_BTI, None, None, None, None, None


@dataclasses.dataclass(eq=False)
class _Site:
    """A site and its projections; signs are kept as +-1, exact in bfloat16, and sketches are scaled by 1/R at the end."""

    name: str
    group: str
    index: int
    module: Any
    layout: Any
    in_signs_IR: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    out_signs_OR: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))

    @property
    def in_IR(self) -> torch.Tensor:
        """P_in^T."""
        return self.in_signs_IR / self.in_signs_IR.shape[1] ** 0.5

    @property
    def out_OR(self) -> torch.Tensor:
        """P_out^T."""
        return self.out_signs_OR / self.out_signs_OR.shape[1] ** 0.5


class GradientEngine:
    """A context in which `features` computes per-sample sketches of a model's gradients.

    Inside, parameters are frozen, modules are in eval mode, the embedding output carries gradient, and the sites' forwards are
    replaced on the instances; on exit, also after an error, everything is as it was. Projections are made once, weights are read
    live: entering and leaving between optimizer steps is cheap.

    `input_groups` are the sites to attribute (all that `find_sites` finds where none are given); `k` 0 keeps every site's sketch side
    by side. Raises `InputError` where the model lacks a site.
    """

    def __init__(
        self,
        model: Any,
        input_groups: tuple[InputGroup, ...] | None = None,
        *,
        proj_rank: int,
        k: int,
        seed: int,
        version: int = PROJECTION_VERSION,
        loss: LossKind = "sum",
    ) -> None:
        self.model = model
        self.loss = loss
        self.input_groups = find_sites(model).input_groups if input_groups is None else input_groups
        self._rank = proj_rank
        self._spec = ProjectionSpec(proj_rank=proj_rank, seed=seed, version=version, k=k)
        modules = dict(model.named_modules())
        self._sites: list[_Site] = []
        for group in self.input_groups:
            for name in group.sites:
                layout = layout_of(modules[name]) if name in modules else None
                if layout is None:
                    raise InputError(
                        f"{type(model).__name__} has no site {name!r}; the scoring was declared for another architecture"
                    )
                self._sites.append(_Site(name, group.name, len(self._sites), modules[name], layout))
        self._made_for: tuple[torch.device, torch.dtype] | None = None
        self._make_projections()
        self._route = HeadRoute(model)
        self._projected: dict[str, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}
        self._records_SBRR = torch.empty(0)
        self._open: contextlib.ExitStack | None = None

    @classmethod
    def from_spec(cls, model: Any, spec: FeatureSpec) -> GradientEngine:
        """The engine of a feature spec."""
        return cls(
            model, spec.input_groups, proj_rank=spec.proj_rank, k=spec.k, seed=spec.seed,
            version=spec.projection_version, loss=spec.loss,
        )  # fmt: skip

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order of their sketches."""
        return tuple(site.name for site in self._sites)

    def _make_projections(self) -> None:
        """Projections where the parameters are, in their arithmetic; made again only when the model has moved."""
        parameter = next(self.model.parameters())
        place = parameter.device, parameter.dtype
        if place == self._made_for:
            return
        self._wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        shared: dict[str, torch.Tensor] = {}
        for site in self._sites:
            outputs, inputs = site.layout.sizes(site.module)
            if site.group not in shared:
                signs_RI = input_signs(self._spec, site.group, inputs, parameter.device)
                shared[site.group] = signs_RI.T.to(parameter.dtype).contiguous()
            site.in_signs_IR = shared[site.group]
            site.out_signs_OR = (
                output_signs(self._spec, site.name, outputs, parameter.device).T.to(parameter.dtype).contiguous()
            )
        self._fold = Fold(self._spec, self.input_groups, parameter.device, self._wide)
        self._made_for = place

    def __enter__(self) -> GradientEngine:
        if self._open is not None:
            raise RuntimeError("this engine has been entered already")
        self._make_projections()
        with contextlib.ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            for parameter in self.model.parameters():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(False)
            embedding = self.model.get_input_embeddings()
            handle = embedding.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_())
            stack.callback(handle.remove)
            for site in self._sites:
                stack.callback(_restore_forward, site.module, dict(site.module.__dict__))
                site.module.__dict__["forward"] = self._forward_of(site)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._open = self._open, None
        self._projected.clear()
        self._records_SBRR = torch.empty(0)
        if stack is not None:
            stack.close()

    def _forward_of(self, site: _Site) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x_BTI: torch.Tensor) -> torch.Tensor:
            held = self._projected.get(site.group)
            # A weak reference: what is kept until backward is the projected input, not the input.
            if held is None or held[0]() is not x_BTI:
                held = weakref.ref(x_BTI), x_BTI.detach() @ site.in_signs_IR
                self._projected[site.group] = held
            return _SiteFunction.apply(x_BTI, site.layout.matrix(site.module), site.module.bias, held[1], site, self)

        return forward

    def _record(self, site: _Site, delta_BTR: torch.Tensor, projected_BTR: torch.Tensor) -> None:
        # bfloat16 factors are widened here: the sum over tokens is where rounding would pile up. Added, not set: a module
        # may be used more than once in a forward pass.
        product_BRR = delta_BTR.to(self._wide).transpose(1, 2) @ projected_BTR.to(self._wide)
        self._records_SBRR[site.index] += product_BRR

    def features(self, batch: Batch) -> SampleFeatures:
        """Losses, sketches and gradient norms of a batch; only inside the context.

        A sample whose numbers overflow has non-finite features, the others of the batch are as without it.
        """
        if self._open is None:
            raise RuntimeError("features() is only there inside `with engine:`")
        size = len(batch.ids_BT)
        self._records_SBRR = torch.zeros(
            len(self._sites), size, self._rank, self._rank, dtype=self._wide, device=batch.ids_BT.device
        )
        try:
            with torch.enable_grad():
                loss_B = self._route.sample_losses(batch)
                loss_B.sum().backward()
        finally:
            self._projected.clear()
        flat_BS = self._records_SBRR.transpose(0, 1).reshape(size, -1) / self._rank
        loss_B = loss_B.detach().double()
        loss_tokens_B = batch.loss_BT[:, 1:].sum(1)
        if self.loss == "mean":
            flat_BS = flat_BS / loss_tokens_B[:, None]
            loss_B = loss_B / loss_tokens_B
        return SampleFeatures(
            loss_B=loss_B, loss_tokens_B=loss_tokens_B, sketch_BK=self._fold(flat_BS), grad_norm_B=flat_BS.norm(dim=1)
        )

    def project_dense(self, site: str, gradient_OI: torch.Tensor) -> torch.Tensor:
        """Sketch [R, R] of a dense gradient of one site's weight, given as [O, I] (`sites.LinearMap.matrix` turns it so).

        The same projections as of the samples: with k = 0, the concatenation over `sites` is comparable with `sketch_BK`.
        """
        found = next((known for known in self._sites if known.name == site), None)
        if found is None:
            raise InputError(
                f"no site {site!r} among the {len(self._sites)} attributed: {', '.join(self.sites[:4])}, ..."
            )
        left_RI = found.out_signs_OR.T.to(self._wide) @ gradient_OI.to(self._wide)
        return left_RI @ found.in_signs_IR.to(self._wide) / self._rank


def _restore_forward(module: nn.Module, before: dict[str, Any]) -> None:
    """Give the instance the forward of its own that it had, or none."""
    if "forward" in before:
        module.__dict__["forward"] = before["forward"]
    else:
        module.__dict__.pop("forward", None)
