"""The optimizers of a training: AdamW over every parameter, or Muon over the matrices of the blocks and AdamW over the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from schemas.errors import InputError
from selection_ops.model import causal_model
from selection_ops.sites import search


class JoinedOptimizer:
    """Optimizers for some of the parameters each, as one: their groups in a row, their states by parameter, steps one after another."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        self.state = _States(self.parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups themselves: what is written into one is what its optimizer reads."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """One step of every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of every parameter."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)


class _States:
    """States by parameter, each with the optimizer that the parameter belongs to."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = parts

    def _of(self, parameter: Tensor) -> torch.optim.Optimizer:
        part = self._found(parameter)
        if part is None:
            raise KeyError("a parameter of no part")
        return part

    def _found(self, parameter: Tensor) -> torch.optim.Optimizer | None:
        for part in self._parts:
            for group in part.param_groups:
                if any(held is parameter for held in group["params"]):
                    return part
        return None

    def get(self, parameter: Tensor) -> Any:
        """The state of a parameter; None where it has none, as one that is not trained."""
        part = self._found(parameter)
        return None if part is None else part.state.get(parameter)

    def __getitem__(self, parameter: Tensor) -> Any:
        return self._of(parameter).state[parameter]

    def __setitem__(self, parameter: Tensor, state: dict[str, Any]) -> None:
        self._of(parameter).state[parameter] = state

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for part in self._parts for parameter in part.state)

    def __len__(self) -> int:
        return sum(len(part.state) for part in self._parts)


AnyOptimizer = torch.optim.Optimizer | JoinedOptimizer


def adamw_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Vectors (norms, biases) are not decayed."""
    decayed = [p for p in parameters if p.dim() >= 2]
    plain = [p for p in parameters if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module, *, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> torch.optim.AdamW:
    """AdamW over every trainable parameter."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(adamw_groups(trained, weight_decay), lr=lr, betas=(beta1, beta2), eps=eps)


def muon(
    model: nn.Module, *, lr: float, weight_decay: float, beta1: float, beta2: float, eps: float
) -> JoinedOptimizer:
    """torch.optim.Muon over the two-dimensional matrices of the blocks, AdamW over every other trainable parameter.

    Muon's steps are scaled to the root mean square of AdamW's (`match_rms_adamw`), so that one learning rate serves both.
    """
    names = {site.parameter for site in search(model).matrices if site.blocks}
    named = dict(causal_model(model).named_parameters())
    inside = {id(named[name]) for name in names if named[name].dim() == 2}
    hidden = [p for p in model.parameters() if p.requires_grad and id(p) in inside]
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
    if not hidden:
        raise InputError(
            f"{type(model).__name__} trains no two-dimensional matrix of its blocks, which Muon is for; use optimizer adamw"
        )
    parts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    ]
    if rest:
        parts.append(torch.optim.AdamW(adamw_groups(rest, weight_decay), lr=lr, betas=(beta1, beta2), eps=eps))
    return JoinedOptimizer(parts)
