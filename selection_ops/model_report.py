"""What of a model scoring would attribute: every parameter with its site or the reason it has none, and what it weighs.

A parameter weighs as much as its gradients do: the squared norm of a sample's gradient, as a share of that over all parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.losses import HeadRoute
from selection_ops.model import causal_model, evaluating
from selection_ops.sites import find_sites, search
from selection_ops.sites.find import outside_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterReport:
    """One parameter of a model."""

    name: str
    numbers: int
    shape: tuple[int, ...]
    site_type: str
    """Site type that attributes it; empty where there is none."""
    sites: int
    """Sites it holds: one, or one for every expert of a packed parameter."""
    blocks: bool
    """Whether it is attributed with `attribute` blocks."""
    adapter: bool
    """Whether it belongs to an adapter, and is attributed with `attribute` adapters."""
    reason: str
    """Why it cannot be attributed; empty where it can."""
    gradient_share: float
    """Share of the samples' squared gradient norm, their mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelReport:
    """A model before it is scored."""

    architecture: str
    parameters: tuple[ParameterReport, ...]
    input_groups: tuple[tuple[str, ...], ...]
    """Matrix sites that share an input, and so its projection."""
    samples: int
    tokens: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """Values of `attribute` that this model can be scored with."""
        return ("adapters", "blocks", "all") if any(p.adapter for p in self.parameters) else ("blocks", "all")

    def covered(self, attribute: str) -> tuple[float, float]:
        """(share of the numbers, share of the squared gradient norm) that a scoring of this kind attributes."""
        of_kind = {p.name for p in self.parameters if (p.adapter if attribute == "adapters" else p.blocks)}
        kept = [p for p in self.parameters if p.site_type and (attribute == "all" or p.name in of_kind)]
        total = sum(p.numbers for p in self.parameters)
        return sum(p.numbers for p in kept) / total, sum(p.gradient_share for p in kept)


def report_model(
    model: Any, encoded: Sequence[Encoded], tick: Callable[[], None] = lambda: None, *, adapters: Sequence[str] = ()
) -> ModelReport:
    """Sites of a model and the weight of each parameter on some samples; `tick` is called after each sample.

    `adapters` names the parameters that are an adapter's.
    """
    model = causal_model(model)
    found, blocks = search(model), find_sites(model)
    site_types: dict[str, str] = {}
    counts: dict[str, int] = {}
    for site in (*found.matrices, *found.small):
        names = [found.types[path].__name__ for path, _ in site.uses]
        site_types[site.parameter] = " + ".join(dict.fromkeys(names))
        counts[site.parameter] = counts.get(site.parameter, 0) + 1
    shares = gradient_shares(model, encoded, tick)
    outside = outside_blocks(model)
    parameters = tuple(
        ParameterReport(
            name=name,
            numbers=parameter.numel(),
            shape=tuple(parameter.shape),
            site_type=site_types.get(name, ""),
            sites=counts.get(name, 0),
            blocks=name not in blocks.unattributed and name not in outside,
            adapter=name in adapters,
            reason=found.reasons.get(name, ""),
            gradient_share=shares[name],
        )
        for name, parameter in model.named_parameters()
    )
    return ModelReport(
        architecture=type(model).__name__,
        parameters=parameters,
        input_groups=tuple(group.sites for group in found.groups),
        samples=len(encoded),
        tokens=sum(len(item.ids) for item in encoded),
    )


def gradient_shares(
    model: Any, encoded: Sequence[Encoded], tick: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Mean over samples of every parameter's share of the squared gradient norm, by plain autograd; 0 for frozen ones."""
    named = list(model.named_parameters())
    totals = dict.fromkeys((name for name, _ in named), 0.0)
    wanted = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    route, device = HeadRoute(model), named[0][1].device
    with evaluating(model):
        for item in encoded:
            loss, _ = route.weighted_loss(collate([item], device=device), torch.ones(1))
            gradients = torch.autograd.grad(loss, [parameter for _, parameter in wanted], allow_unused=True)
            squares = [0.0 if g is None else float(g.double().square().sum()) for g in gradients]
            total = sum(squares) or 1.0
            for (name, _), square in zip(wanted, squares):
                totals[name] += square / total / len(encoded)
            tick()
    return totals
