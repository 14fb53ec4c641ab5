"""Sites: the places where parameters meet data and per-sample gradients factorise.

A site type says how a module class lays out its weight. Adding one is a subclass of `LinearMap` in one file, registered
with `@site_type(ModuleClass)`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from schemas.errors import InputError
from schemas.spec import InputGroup
from selection_ops.model import evaluating

log = logging.getLogger(__name__)


class LinearMap:
    """How a module computes y = x W' + b; the per-sample gradient of W [O, I] is sum over tokens of d a'."""

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """(outputs O, inputs I)."""
        return module.weight.shape[0], module.weight.shape[1]

    @staticmethod
    def matrix(module: Any) -> torch.Tensor:
        """Weight as [O, I]; a view."""
        return module.weight


_TYPES: dict[type[nn.Module], type[LinearMap]] = {}


def site_type(kind: type[nn.Module]) -> Callable[[type[LinearMap]], type[LinearMap]]:
    """Register the layout of a module class."""

    def register(layout: type[LinearMap]) -> type[LinearMap]:
        _TYPES[kind] = layout
        return layout

    return register


@site_type(nn.Linear)
class _Linear(LinearMap):
    """torch.nn.Linear: weight [O, I]."""


@site_type(Conv1D)
class _Conv1D(LinearMap):
    """transformers' Conv1D: weight [I, O]."""

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        return module.weight.shape[1], module.weight.shape[0]

    @staticmethod
    def matrix(module: Any) -> torch.Tensor:
        return module.weight.T


def layout_of(module: nn.Module) -> type[LinearMap] | None:
    """The registered layout of a module, exactly by class: a subclass may compute something else."""
    return _TYPES.get(type(module))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteReport:
    """Which parameters are attributed, and why the others are not."""

    input_groups: tuple[InputGroup, ...]
    parameters: int
    """Numbers in all parameters; tied ones count once."""
    attributed_parameters: int
    """Numbers in the weights of the sites."""
    unattributed: dict[str, str]
    """Name of every other parameter -> reason."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, group by group in model order."""
        return tuple(site for group in self.input_groups for site in group.sites)

    @property
    def coverage(self) -> float:
        """Share of the parameters that is attributed."""
        return self.attributed_parameters / self.parameters


def find_sites(model: Any) -> SiteReport:
    """Every linear map but the head, grouped by the input that they share, found by one forward of two samples of three tokens.

    Raises `InputError` where the model has none. What is not attributed is listed with the reason and logged.
    """
    head = model.get_output_embeddings()
    outside = {
        id(parameter)
        for module in (model.get_input_embeddings(), head)
        if module is not None
        for parameter in module.parameters()
    }
    candidates = {
        name: module
        for name, module in model.named_modules()
        if layout_of(module) and module is not head and id(module.weight) not in outside
    }
    inputs = _inputs_of(model, candidates)
    refused = _refused(candidates, inputs)
    groups = _groups([name for name in candidates if name not in refused], inputs)
    if not groups:
        known = ", ".join(kind.__name__ for kind in _TYPES)
        raise InputError(f"{type(model).__name__} has no linear map that Lehr can attribute (known: {known})")
    attributed = {id(candidates[site].weight) for group in groups for site in group.sites}
    unattributed: dict[str, str] = {}
    total = covered = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if id(parameter) in attributed:
            covered += parameter.numel()
        else:
            unattributed[name] = _reason(model, name, id(parameter) in outside, refused)
    report = SiteReport(input_groups=groups, parameters=total, attributed_parameters=covered, unattributed=unattributed)
    _log(model, report)
    return report


def _inputs_of(model: Any, modules: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensor that each module is called with first, by module name; modules that do not run are absent."""
    seen: dict[str, torch.Tensor] = {}
    handles = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = args[0] if args else next(iter(kwargs.values()))
            seen.setdefault(name, found)

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(note(name), with_kwargs=True))
        device = next(model.parameters()).device
        with torch.no_grad(), evaluating(model):
            model(input_ids=torch.zeros(2, 3, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _refused(modules: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, str]:
    """Modules that cannot be sites, with the reason."""
    refused: dict[str, str] = {}
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        holders.setdefault(id(module.weight), []).append(name)
        if name not in inputs:
            refused[name] = "its module did not run as a module in a forward pass"
        elif inputs[name].dim() != 3 or inputs[name].shape[:2] != (2, 3):
            shape = list(inputs[name].shape)
            refused[name] = f"its input is not [samples, tokens, inputs] but {shape} for 2 samples of 3 tokens"
    for names in holders.values():
        if len(names) > 1:
            refused |= dict.fromkeys(names, f"its weight is shared by {', '.join(names)}")
    return refused


def _groups(sites: list[str], inputs: dict[str, torch.Tensor]) -> tuple[InputGroup, ...]:
    """Sites called with the identical tensor, in the order of the model's modules."""
    groups: dict[int, list[str]] = {}
    for name in sites:
        # The tensors are held by `inputs`, so no two of them have had one identity.
        groups.setdefault(id(inputs[name]), []).append(name)
    return tuple(InputGroup(name=names[0], sites=tuple(names)) for names in groups.values())


def _reason(model: Any, name: str, outside: bool, refused: dict[str, str]) -> str:
    owner, _, kind = name.rpartition(".")
    if outside:
        return "embedding or head: not among the linear maps of the blocks"
    if owner in refused:
        return refused[owner]
    if kind == "bias":
        return "bias: not among the linear maps of the blocks"
    return f"{type(model.get_submodule(owner)).__name__}: no site type registered"


def _log(model: Any, report: SiteReport) -> None:
    reasons = Counter(report.unattributed.values())
    log.info(
        "%s: %d sites hold %.1f %% of %d parameters; not attributed: %s",
        type(model).__name__,
        len(report.sites),
        100 * report.coverage,
        report.parameters,
        "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "none",
    )
