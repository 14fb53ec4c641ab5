"""Exact per-sample gradients by plain autograd, a few sites at a time: what sketches are measured against.

Nothing of the gradient engine is used: the loss is the model's own logits in a plain cross entropy, the gradients are those of the
parameters themselves. A model of 135M parameters has 425 MB of them a sample, so they never stand whole: a pass keeps those of
as many input groups as `memory_bytes` holds for all samples, and every pass runs every sample forward and backward once.

Legend: N samples, O outputs and I inputs of a site.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from schemas.errors import InputError
from schemas.spec import InputGroup, LossKind
from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.model import evaluating
from selection_ops.sites import MatrixParameter, Site, search


@dataclasses.dataclass(frozen=True)
class _Attributed:
    """Where a site's numbers lie in the model."""

    parameter: nn.Parameter
    site: Site

    def of(self, gradient: torch.Tensor) -> torch.Tensor:
        """The site's gradient, [O, I] where it is a matrix and flat where not, from that of the whole parameter."""
        shape = self.site.shape
        return shape.matrix(gradient) if isinstance(shape, MatrixParameter) else gradient.reshape(-1)


def _find(model: Any, names: Sequence[str]) -> dict[str, _Attributed]:
    found = search(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    known = {site.name: site for site in (*found.matrices, *found.small)}
    for name in names:
        if name not in known:
            raise InputError(
                f"{type(model).__name__} has no site {name!r}; the scoring was declared for another architecture"
            )
    return {name: _Attributed(parameters[known[name].parameter], known[name]) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DensePlan:
    """In how many passes the exact gradients are made, and of how many numbers."""

    passes: tuple[tuple[InputGroup, ...], ...]
    numbers: int
    """Numbers in one sample's gradient."""
    largest_pass: int
    """Bytes of the gradients that stand at once."""


def plan_dense(model: Any, input_groups: Sequence[InputGroup], samples: int, memory_bytes: int) -> DensePlan:
    """Input groups, in order, in as few passes as the memory allows.

    Raises `InputError` where one group of all samples does not fit, with the number of samples that would.
    """
    passes: list[list[InputGroup]] = []
    numbers = largest = held = 0
    sites = _find(model, [site for group in input_groups for site in group.sites])
    for group in input_groups:
        found = [sites[site] for site in group.sites]
        one = sum(held.site.numbers * held.parameter.element_size() for held in found)
        numbers += sum(held.site.numbers for held in found)
        if one * samples > memory_bytes:
            raise InputError(
                f"the exact gradients of {samples} samples at {group.name} alone take {one * samples / 1e9:.1f} GB, more than the "
                f"{memory_bytes / 1e9:.1f} GB allowed; give more memory or at most {memory_bytes // one} samples in all"
            )
        if not passes or held + one * samples > memory_bytes:
            passes.append([])
            held = 0
        passes[-1].append(group)
        held += one * samples
        largest = max(largest, held)
    return DensePlan(passes=tuple(tuple(groups) for groups in passes), numbers=numbers, largest_pass=largest)


def dense_gradients(
    model: Any,
    encoded: Sequence[Encoded],
    plan: DensePlan,
    *,
    loss: LossKind = "sum",
    tick: Callable[[int], None] = lambda tokens: None,
) -> Iterator[tuple[InputGroup, dict[str, torch.Tensor]]]:
    """Input groups with the gradients of their sites, [N, O, I] (or [N, n] for a vector), in the width of the parameters.

    The tensors belong to the caller until the next group is asked for. `tick` is told the tokens of every sample run.
    """
    device = next(model.parameters()).device
    every = _find(model, [site for groups in plan.passes for group in groups for site in group.sites])
    for groups in plan.passes:
        sites = {site: every[site] for group in groups for site in group.sites}
        # Two sites may be parts of one packed parameter: its gradient is asked for once.
        wanted = list({id(site.parameter): site.parameter for site in sites.values()}.values())
        place = {id(parameter): index for index, parameter in enumerate(wanted)}
        out = {
            name: torch.zeros(len(encoded), *site.of(site.parameter).shape, dtype=site.parameter.dtype, device=device)
            for name, site in sites.items()
        }
        with _only(model, wanted), evaluating(model), torch.enable_grad():
            for row, item in enumerate(encoded):
                gradients = torch.autograd.grad(_sample_loss(model, item, loss, device), wanted, allow_unused=True)
                for name, site in sites.items():
                    gradient = gradients[place[id(site.parameter)]]
                    if gradient is not None:
                        out[name][row] = site.of(gradient)
                tick(len(item.ids))
        for group in groups:
            yield group, {name: out.pop(name) for name in group.sites}


def _sample_loss(model: Any, item: Encoded, loss: LossKind, device: torch.device) -> torch.Tensor:
    batch = collate([item], device=device)
    logits_TV = model(input_ids=batch.ids_BT, use_cache=False).logits[0, :-1][batch.loss_BT[0, 1:]]
    labels_T = batch.ids_BT[0, 1:][batch.loss_BT[0, 1:]]
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return nn.functional.cross_entropy(logits_TV.to(wide), labels_T, reduction=loss)


class _only:
    """Within, only the given parameters require gradients."""

    def __init__(self, model: Any, wanted: Sequence[nn.Parameter]) -> None:
        self._all = list(model.parameters())
        self._wanted = {id(parameter) for parameter in wanted}

    def __enter__(self) -> None:
        self._before = [parameter.requires_grad for parameter in self._all]
        for parameter in self._all:
            parameter.requires_grad_(id(parameter) in self._wanted)

    def __exit__(self, *error: object) -> None:
        for parameter, before in zip(self._all, self._before):
            parameter.requires_grad_(before)
