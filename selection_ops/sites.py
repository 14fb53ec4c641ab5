"""Sites: the places where parameters meet data and per-sample gradients factorise.

A site type says how a module class lays out its weight. Adding one is a subclass of `LinearMap` in one file, registered
with `@site_type(ModuleClass)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from schemas.errors import InputError
from schemas.spec import InputGroup


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
    attributed_parameters: int
    unattributed: dict[str, str]
    """Parameter name -> reason."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites in model order."""
        return tuple(site for group in self.input_groups for site in group.sites)


def find_sites(model: Any) -> SiteReport:
    """Every linear map of the blocks, grouped by the input they share, found by one forward of four tokens.

    Raises `InputError` where the model has none.
    """
    head = model.get_output_embeddings()
    modules = {name: module for name, module in model.named_modules() if layout_of(module) and module is not head}
    groups = _input_groups(model, modules)
    if not groups:
        known = ", ".join(kind.__name__ for kind in _TYPES)
        raise InputError(f"{type(model).__name__} has no linear map that Lehr can attribute (known: {known})")
    attributed = {f"{site}.weight" for group in groups for site in group.sites}
    unattributed = {}
    total = covered = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if name in attributed:
            covered += parameter.numel()
        else:
            unattributed[name] = _reason(model, name, modules)
    return SiteReport(input_groups=groups, parameters=total, attributed_parameters=covered, unattributed=unattributed)


def _input_groups(model: Any, modules: dict[str, nn.Module]) -> tuple[InputGroup, ...]:
    order: list[tuple[str, torch.Tensor]] = []
    handles = []

    def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda module, inputs: order.append((name, inputs[0]))

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(note(name)))
        device = next(model.parameters()).device
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[int, list[str]] = {}
    for name, tensor in order:
        # Tensors are held by `order`, so that no identity is given to two of them.
        members = groups.setdefault(id(tensor), [])
        if not any(name in others for others in groups.values()):
            members.append(name)
    return tuple(InputGroup(name=names[0], sites=tuple(names)) for names in groups.values() if names)


def _reason(model: Any, name: str, modules: dict[str, nn.Module]) -> str:
    owner, _, kind = name.rpartition(".")
    embeddings = {
        id(p) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e for p in e.parameters()
    }
    if id(model.get_parameter(name)) in embeddings:
        return "embedding or head: not among the linear maps of the blocks"
    if kind == "bias":
        return "bias: not among the linear maps of the blocks"
    if owner in modules:
        return "its module did not run in a forward pass"
    return f"{type(model.get_submodule(owner)).__name__}: no site type registered"
