"""Preconditioners: what an optimizer's next step multiplies a gradient by, elementwise, and its rank-one fit.

AdamW moves a parameter by -learning_rate * (P * g + shift). With P_oi = u_o v_i a site's sketch of P * G, P_out (P * G) P_in^T, is
(P_out diag u) G (diag v P_in^T): the fit is folded into the projections and costs nothing per sample. Sites that read one input share
P_in, so v is fitted jointly over them. The exact P needs every sample's whole gradient, a matrix product as large as the backward's.

Legend: O outputs and I inputs of a site's matrix, n numbers of a small parameter. t is the number of the step about to be taken,
from 1; the second moment is the state before that step, so it has seen t - 1 gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from schemas.errors import InputError
from schemas.spec import InputGroup, SmallSite
from selection_ops.model import causal_model
from selection_ops.muon import SidedFactor
from selection_ops.optimizer_state import AdamNumbers, OptimizerState
from selection_ops.rank_one import fit_rank_one
from selection_ops.second_moment import FLOOR_SHARE, RootScale, multiply
from selection_ops.sites import MatrixParameter, search


def adamw_preconditioner(
    second_moment: Tensor, *, step: int, beta1: float, beta2: float, eps: float, floor_share: float = FLOOR_SHARE
) -> Tensor:
    """P of one site, same shape as `second_moment`: step `step` of AdamW moves it by -learning_rate * (P * g + shift).

    P = (1 - beta1) / (1 - beta1^t) / (sqrt(vhat) + eps) with vhat = v / (1 - beta2^(t - 1)), v frozen before the step and
    sqrt(vhat) floored at `floor_share` times its root mean square over the site. The shift (momentum, weight decay) does
    not depend on the batch. Raises `InputError` where v has seen no gradient (step < 2).
    """
    if step < 2:
        raise InputError(f"the second moment has seen no gradient before step {step}; the preconditioner needs one")
    root = (second_moment / (1.0 - beta2 ** (step - 1))).sqrt()
    # The mean over a site of 1e7 entries is taken in float64: a flat float32 sum loses three digits.
    floor = floor_share * root.to(torch.float64).square().mean().sqrt()
    return (1.0 - beta1) / (1.0 - beta1**step) / (root.clamp(min=float(floor)) + eps)


def preconditioner_of(state: OptimizerState, parameter: str, *, floor_share: float = FLOOR_SHARE) -> Tensor:
    """P of one parameter, in its shape. Adafactor's is 1 / sqrt(row col / mean(row)), its factors as they are.

    The scale that Adafactor further gives every parameter (its root mean square, clipping) is left out. Raises `InputError` where the
    state holds no second moment of it.
    """
    moments = state.tensors
    whole, row = moments.get(f"{parameter}:exp_avg_sq"), moments.get(f"{parameter}:exp_avg_sq_row")
    if row is not None:
        column = moments[f"{parameter}:exp_avg_sq_col"]
        row, column = (_floored(_wide(factor).sqrt(), floor_share).square() for factor in (row, column))
        return ((row / row.mean(-1, keepdim=True))[..., :, None] * column[..., None, :]).rsqrt()
    if whole is None and f"{parameter}:momentum_buffer" in moments:
        raise InputError(
            f"{state.where} holds Muon's momentum of {parameter}, which has no second moment to precondition with; "
            "score with metric sgd, or name a state of AdamW or Adafactor"
        )
    if whole is None:
        raise InputError(f"{state.where} holds no second moment of {parameter}; it belongs to another model")
    if state.optimizer == "adafactor":
        return 1.0 / _floored(_wide(whole).sqrt(), floor_share)
    numbers = state.numbers.get(parameter, AdamNumbers())
    steps = moments.get(f"{parameter}:step")
    if steps is None:
        raise InputError(f"{state.where} does not say how many steps {parameter} has seen (`{parameter}:step`)")
    return adamw_preconditioner(
        _wide(whole),
        step=int(steps) + 1,
        beta1=numbers.beta1,
        beta2=numbers.beta2,
        eps=numbers.eps,
        floor_share=floor_share,
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _floored(root: Tensor, share: float) -> Tensor:
    floor = float(share * root.double().square().mean().sqrt())
    # A parameter that has never had a gradient: every entry is alike.
    return root.clamp(min=floor) if floor > 0 else torch.ones_like(root)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LessForm:
    """Adam's step for one sample alone, as LESS takes it (arXiv 2402.04333, section 3.1): no bias correction, eps inside the root."""

    first_OI: Tensor
    second_OI: Tensor
    beta1: float
    beta2: float
    eps: float

    def apply(self, gradient_OI: Tensor, loss_tokens: float = 1.0) -> Tensor:
        """[beta1 m + (1 - beta1) g] / sqrt(beta2 v + (1 - beta2) g^2 + eps) at g = gradient / loss_tokens, times loss_tokens.

        The moments are of token means, so a summed loss is brought to its mean and back: a linear form would not notice.
        """
        gradient_OI = gradient_OI / loss_tokens
        first_OI, second_OI = self.first_OI.to(gradient_OI.dtype), self.second_OI.to(gradient_OI.dtype)
        top_OI = self.beta1 * first_OI + (1.0 - self.beta1) * gradient_OI
        root_OI = (self.beta2 * second_OI + (1.0 - self.beta2) * gradient_OI.square() + self.eps).sqrt()
        return top_OI / root_OI * loss_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteForm:
    """A power of P for one matrix, without a fit; one of its fields is set, or none for P = 1."""

    scalar: float = 1.0
    sided: SidedFactor | None = None
    less: LessForm | None = None
    second_OI: Tensor | None = None
    """AdamW's second moment; `scale` and `power` say how P comes from it."""
    scale: RootScale | None = None
    power: float = 0.0

    def apply(self, gradient_OI: Tensor, loss_tokens: int = 1) -> Tensor:
        """P^power of a gradient; may overwrite it."""
        if self.sided is not None:
            gradient_OI = self.sided.apply(gradient_OI)
        self.multiply(gradient_OI[None], slice(0, len(gradient_OI)), [loss_tokens])
        return gradient_OI

    def factors(self, left_tO: Tensor, right_tI: Tensor) -> tuple[Tensor, Tensor]:
        """Factors whose product is multiplied from one side."""
        if self.sided is None:
            return left_tO, right_tI
        matrix = self.sided.matrix.to(left_tO.dtype)
        return (left_tO @ matrix, right_tI) if self.sided.from_left else (left_tO, right_tI.to(matrix.dtype) @ matrix)

    def multiply(self, block_SoI: Tensor, rows: slice, loss_tokens: Sequence[int]) -> None:
        """Multiply rows of the gradients of some samples entry by entry, in place; not from a side."""
        if self.scalar != 1.0:
            block_SoI *= self.scalar
        if self.less is not None:
            part = dataclasses.replace(
                self.less, first_OI=self.less.first_OI[rows], second_OI=self.less.second_OI[rows]
            )
            for place, count in enumerate(loss_tokens):
                block_SoI[place] = part.apply(block_SoI[place], float(count))
        if self.second_OI is not None and self.scale is not None:
            multiply(block_SoI, self.second_OI[rows], self.scale, self.power)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preconditioner:
    """What gradients are multiplied by before they are projected: rank one by site, or exact; small parameters always exactly."""

    outputs: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """u_O by matrix site."""
    inputs: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """v_I by input group, or by site where a site has its own."""
    exact: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """P [O, I] by matrix site; empty for the rank-one form."""
    small: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """P [n] by small site."""
    sided: Mapping[str, SidedFactor] = dataclasses.field(default_factory=dict)
    """What multiplies a matrix site from one side (Muon); folded into its projection, as the rank-one form is."""
    less: Mapping[str, LessForm] = dataclasses.field(default_factory=dict)
    """The LESS form by matrix site; it is not linear, so it takes every sample's whole gradient."""

    def input_factor(self, site: str, group: str) -> Tensor:
        """v_I of a site."""
        return self.inputs.get(site, self.inputs[group])

    def dense(self, site: str, group: str) -> Tensor:
        """P of a site, [O, I] or [n], float64."""
        if site in self.small:
            return self.small[site].double()
        if site in self.exact:
            return self.exact[site].double()
        return self.outputs[site].double()[:, None] * self.input_factor(site, group).double()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedPreconditioner:
    """A rank-one preconditioner and its correlation with the exact one, by matrix site."""

    preconditioner: Preconditioner
    correlation: Mapping[str, float]


def fit_preconditioner(
    model: Any,
    state: OptimizerState,
    input_groups: Sequence[InputGroup],
    small_sites: Sequence[SmallSite] = (),
    *,
    power: float = 1.0,
) -> FittedPreconditioner:
    """The rank-one fit of P^power, joint over the sites of an input group; Adafactor's factors stay every site's own.

    Raises `InputError` where the state lacks a site or is of another shape.
    """
    sites = _Sites(model, state, power)
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    correlation: dict[str, float] = {}
    for group in input_groups:
        alone = state.optimizer == "adafactor"
        for names in [(name,) for name in group.sites] if alone else [group.sites]:
            fit = fit_rank_one([sites.exact(name) for name in names])
            outputs.update(zip(names, fit.outputs))
            correlation.update(zip(names, fit.correlation))
            inputs[names[0]] = fit.inputs
    small = {site.name: sites.exact(site.name) for site in small_sites}
    return FittedPreconditioner(
        preconditioner=Preconditioner(outputs=outputs, inputs=inputs, small=small), correlation=correlation
    )


def exact_preconditioner(
    model: Any,
    state: OptimizerState,
    input_groups: Sequence[InputGroup],
    small_sites: Sequence[SmallSite] = (),
    *,
    power: float = 1.0,
) -> Preconditioner:
    """P^power of every site, elementwise. Raises as `fit_preconditioner` does."""
    sites = _Sites(model, state, power)
    return Preconditioner(
        exact={name: sites.exact(name) for group in input_groups for name in group.sites},
        small={site.name: sites.exact(site.name) for site in small_sites},
    )


class _Sites:
    """P^power by site."""

    def __init__(self, model: Any, state: OptimizerState, power: float) -> None:
        model = causal_model(model)
        found = search(model)
        self._sites = {site.name: site for site in (*found.matrices, *found.small)}
        self._shapes = {name: value.shape for name, value in model.named_parameters(remove_duplicate=False)}
        self._state, self._power = state, power

    def exact(self, name: str) -> Tensor:
        """[O, I] of a matrix, [n] of a small parameter."""
        site = self._sites[name]
        held = self._parameter(site.parameter)
        shape = site.shape
        return shape.matrix(held) if isinstance(shape, MatrixParameter) else held.reshape(-1)

    def _parameter(self, name: str) -> Tensor:
        found = preconditioner_of(self._state, name) ** self._power
        if found.shape != self._shapes[name]:
            raise InputError(
                f"{self._state.where}: the second moment of {name} has shape {tuple(found.shape)}, the parameter "
                f"{tuple(self._shapes[name])}; it belongs to another model"
            )
        return found
