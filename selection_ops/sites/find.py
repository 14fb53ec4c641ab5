"""Finding the sites of a model: what runs, what shares an input, how samples lie in what modules are called with; what is left out, and why."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Collection
from typing import Any

from schemas.errors import InputError
from schemas.plugins import load_installed
from schemas.spec import Attribute, InputGroup, SmallSite
from selection_ops.model import causal_model
from selection_ops.sites.base import (
    ENTRY_POINTS,
    MatrixParameter,
    Parameter,
    SiteType,
    SmallParameter,
    known_types,
    type_of,
)
from selection_ops.sites.embedding import Embedding
from selection_ops.sites.expanded import MOST_NUMBERS, Expanded
from selection_ops.sites.layout import CallLayout, Probe

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """A parameter that can be attributed, or one matrix of a packed one."""

    name: str
    """Path of the module for its weight matrix, else path of the parameter."""
    parameter: str
    """Name of the parameter in the model."""
    shape: Parameter
    """What its gradient looks like, as seen by the first module that uses it."""
    blocks: bool
    """Whether it is one of the linear maps of the blocks."""
    uses: tuple[tuple[str, str], ...]
    """(module, name in the module's site type) of every use; their gradients add up."""

    @property
    def numbers(self) -> int:
        """Numbers in it."""
        shape = self.shape
        return shape.outputs * shape.inputs if isinstance(shape, MatrixParameter) else shape.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSites:
    """Everything in a model that can be attributed, and what cannot."""

    matrices: tuple[Site, ...]
    """In the order of input groups."""
    groups: tuple[InputGroup, ...]
    """The same sites by the input that they share, in model order."""
    small: tuple[Site, ...]
    """Parameters whose gradient is taken as it is, in model order."""
    types: dict[str, type[SiteType]]
    """Site type of every module that has sites."""
    layouts: dict[str, CallLayout]
    """How samples lie in what those modules are called with."""
    reasons: dict[str, str]
    """Name of every parameter without a site -> reason."""
    sizes: dict[str, int]
    """Numbers in every parameter of the model; tied ones once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteReport:
    """Which parameters are attributed, and why the others are not."""

    input_groups: tuple[InputGroup, ...]
    small: tuple[SmallSite, ...]
    parameters: int
    """Numbers in all parameters; tied ones count once."""
    attributed_parameters: int
    """Numbers in the parameters of the sites."""
    unattributed: dict[str, str]
    """Name of every other parameter -> reason."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the matrix sites, group by group in model order."""
        return tuple(site for group in self.input_groups for site in group.sites)

    @property
    def coverage(self) -> float:
        """Share of the parameters that is attributed."""
        return self.attributed_parameters / self.parameters


def find_sites(model: Any, attribute: Attribute = "blocks", *, adapters: Collection[str] | None = None) -> SiteReport:
    """The sites of a model: the linear maps of its blocks, everything that can be attributed, or its adapters.

    `adapters` names the parameters that are adapters'; left out, those that PEFT has left trainable, if it has wrapped the model.
    Raises `InputError` where the model has no site of the kind. What is not attributed is listed with the reason and logged.
    """
    model = causal_model(model)
    if attribute == "adapters":
        if adapters is None and hasattr(model, "peft_config"):
            adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not adapters:
            raise InputError(
                f"{type(model).__name__} has no adapters: attribute = 'adapters' needs a PEFT adapter folder; use 'blocks' or 'all'"
            )
    found = search(model)
    everything = attribute == "all"
    of_adapters = frozenset(adapters or ()) if attribute == "adapters" else None
    chosen = [
        site
        for site in (*found.matrices, *found.small)
        if everything or (site.blocks if of_adapters is None else site.parameter in of_adapters)
    ]
    names = {site.name for site in chosen}
    kept = [tuple(name for name in group.sites if name in names) for group in found.groups]
    groups = tuple(InputGroup(name=sites[0], sites=sites) for sites in kept if sites)
    if not groups and (of_adapters is None or not chosen):
        known = ", ".join(known_types())
        what = "adapter" if of_adapters else "linear map"
        raise InputError(
            f"{type(model).__name__} has no {what} that Lehr can attribute (known: {known}): {_why_none(model)}"
        )
    attributed = {site.parameter for site in chosen}
    reasons = dict(found.reasons)
    if of_adapters is not None:
        reasons |= {name: "not of the adapters" for name in found.sizes if name not in of_adapters}
    elif not everything:
        outside = outside_blocks(model)
        for site in (*found.matrices, *found.small):
            if site.parameter not in attributed:
                what = "embedding or head" if site.parameter in outside else _describe(model, found, site)
                reasons[site.parameter] = f"{what}: not among the linear maps of the blocks"
    report = SiteReport(
        input_groups=groups,
        small=tuple(SmallSite(name=site.name, size=site.numbers) for site in found.small if site.name in names),
        parameters=sum(found.sizes.values()),
        attributed_parameters=sum(found.sizes[name] for name in attributed),
        unattributed={name: reasons[name] for name in found.sizes if name not in attributed},
    )
    _log(model, report)
    return report


def _why_none(model: Any) -> str:
    """Whose matrices the blocks of a model without sites hold."""
    outside = outside_blocks(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2 and name not in outside]
    holders = sorted({type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in trained})
    if not holders:
        return "are its parameters frozen?"
    return f"the matrices of its blocks belong to {', '.join(holders)}; register a site type for that class (docs/concepts.md)"


def _describe(model: Any, found: ModelSites, site: Site) -> str:
    module, name = site.uses[0]
    return "bias" if name == "bias" else type(model.get_submodule(module)).__name__


def outside_blocks(model: Any) -> set[str]:
    """Names of the parameters of the input embedding and the head."""
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    held = {id(parameter) for module in ends for parameter in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in held}


def search(model: Any) -> ModelSites:
    """Every site of a model, found by two forwards of two samples of three tokens that differ in the second sample."""
    load_installed(ENTRY_POINTS, "site type")
    model = causal_model(model)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    probe = Probe(model)
    outside = outside_blocks(model)
    uses: dict[str, list[tuple[str, Parameter, type[SiteType]]]] = {}
    types: dict[str, type[SiteType]] = {}
    refused: dict[str, str] = {}
    for path, module in modules.items():
        kind = type_of(module)
        if kind is None:
            continue
        reason = probe.refusal(path, shared_arguments=kind is Embedding)
        own = [(part, _held(module, part)) for part in kind.parameters(module)]
        for part, parameter in own:
            name = names.get(id(parameter))
            if name is None or not parameter.requires_grad:
                continue
            if reason:
                refused.setdefault(name, reason)
            else:
                key = f"{name}.{part.name.partition('.')[2]}" if "." in part.name else name
                uses.setdefault(key, []).append((path, part, kind))
                types[path] = kind
    claimed = {names[id(_held(modules[path], part))] for found in uses.values() for path, part, _ in found}
    # A use that no site reports would be missing from the sum.
    for name in sorted(claimed & refused.keys()):
        for key in [key for key, found in uses.items() if _parameter(found, modules, names) == name]:
            del uses[key]
    reasons: dict[str, str] = {}
    layouts: dict[str, CallLayout] = {}
    claimed = {_parameter(found, modules, names) for found in uses.values()}
    for name, parameter in parameters.items():
        if name in claimed:
            continue
        if not parameter.requires_grad:
            reasons[name] = "frozen: its requires_grad is False"
            continue
        owner = probe.nearest_that_runs(name)
        why = refused.get(name) or f"{type(modules[name.rpartition('.')[0]]).__name__}: no site type registered"
        if owner is None or (types.get(owner) not in (None, Expanded)):
            reasons[name] = f"{why}; and it belongs to no module that runs sample by sample"
        elif parameter.numel() > MOST_NUMBERS:
            reasons[name] = f"{why}; and its {parameter.numel():,} numbers are too many to copy for every sample"
        else:
            local = name[len(owner) + 1 :]
            uses[name] = [(owner, SmallParameter(name=local, size=parameter.numel()), Expanded)]
            types[owner] = Expanded
    for path in types:
        layouts[path] = probe.layout(path)
    return _assembled(model, uses, types, layouts, reasons, outside, probe, modules, names)


def _held(module: Any, part: Parameter) -> Any:
    """The parameter of a module that a part is of."""
    return getattr(module, part.attribute if isinstance(part, MatrixParameter) else part.name)


def _parameter(
    found: list[tuple[str, Parameter, type[SiteType]]], modules: dict[str, Any], names: dict[int, str]
) -> str:
    path, part, kind = found[0]
    if kind is Expanded:
        return f"{path}.{part.name}"
    return names[id(_held(modules[path], part))]


def _assembled(
    model: Any,
    uses: dict[str, list[tuple[str, Parameter, type[SiteType]]]],
    types: dict[str, type[SiteType]],
    layouts: dict[str, CallLayout],
    reasons: dict[str, str],
    outside: set[str],
    probe: Probe,
    modules: dict[str, Any],
    names: dict[int, str],
) -> ModelSites:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matrices: dict[str, list[Site]] = {}
    small: list[Site] = []
    for key, found in uses.items():
        # Of a tied weight the head's use, an ordinary linear map, gives the shape and the name.
        found.sort(key=lambda use: use[2] is Embedding)
        path, part, kind = found[0]
        name = key
        if isinstance(part, MatrixParameter):
            name = path if part.name == "weight" else f"{path}.{part.name}"
        parameter = _parameter(found, modules, names)
        site = Site(
            name=name,
            parameter=parameter,
            shape=part,
            blocks=kind.blocks and isinstance(part, MatrixParameter) and parameter not in outside,
            uses=tuple((where, which.name) for where, which, _ in found),
        )
        if isinstance(part, MatrixParameter):
            packed = f"{path}.{part.attribute}" if "." in part.name else ""
            shared = packed or probe.first_input(path)
            matrices.setdefault(str(shared) if shared else name, []).append(site)
        else:
            small.append(site)
    order = {name: index for index, name in enumerate(sizes)}
    small.sort(key=lambda site: order[site.parameter])
    return ModelSites(
        matrices=tuple(site for sites in matrices.values() for site in sites),
        groups=tuple(
            InputGroup(name=sites[0].name, sites=tuple(site.name for site in sites)) for sites in matrices.values()
        ),
        small=tuple(small),
        types=types,
        layouts=layouts,
        reasons=reasons,
        sizes=sizes,
    )


def _log(model: Any, report: SiteReport) -> None:
    reasons = Counter(report.unattributed.values())
    log.info(
        "%s: %d sites hold %.1f %% of %d parameters; not attributed: %s",
        type(model).__name__,
        len(report.sites) + len(report.small),
        100 * report.coverage,
        report.parameters,
        "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "none",
    )
