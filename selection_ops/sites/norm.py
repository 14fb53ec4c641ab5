"""Normalisations, y = w * x^ + b or (1 + w) * x^ + b with x^ the normalised input: of w the gradient is the sum over tokens of
(gradient of y) * x^.

Every model family brings a class of its own, so a module is known by what it computes: on random numbers, with random weights.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from selection_ops.sites.base import Forward, Parameter, SiteType, SmallParameter, Tape, first_argument, site_type

_EPSILON = ("eps", "variance_epsilon", "epsilon", "layer_norm_epsilon", "norm_eps")


@site_type()
class Norm(SiteType):
    """LayerNorm and RMSNorm, any class that is one in substance."""

    @staticmethod
    def matches(module: Any) -> bool:
        return _kind(module) is not None

    @staticmethod
    def parameters(module: Any) -> tuple[Parameter, ...]:
        return tuple(SmallParameter(name=name, size=p.numel()) for name, p in module.named_parameters(recurse=False))

    @staticmethod
    def forward(module: Any, call: Forward, tape: Tape) -> Forward:
        centred, epsilon = _kind(module) or (False, 0.0)

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = call(*args, **kwargs)
            if tape.wants("weight"):
                held_BtI = tape.by_sample(first_argument(args, kwargs).detach())
                tape.small("weight", output, lambda delta_BtI: _weight_gradient(delta_BtI, held_BtI, centred, epsilon))
            tape.small("bias", output, lambda delta_BtI: delta_BtI.sum(1))
            return output

        return forward


def _weight_gradient(delta_BtI: torch.Tensor, x_BtI: torch.Tensor, centred: bool, epsilon: float) -> torch.Tensor:
    """Sum over tokens of delta * x^ [B, I]; the division by the norm is folded into the sum."""
    x_BtI = x_BtI.to(delta_BtI.dtype)
    if centred:
        x_BtI = x_BtI - x_BtI.mean(-1, keepdim=True)
    scale_B1t = torch.rsqrt((x_BtI * x_BtI).mean(-1) + epsilon)[:, None]
    return (scale_B1t @ (delta_BtI * x_BtI))[:, 0]


def _normalised(x: torch.Tensor, centred: bool, epsilon: float) -> torch.Tensor:
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + epsilon)


@torch.no_grad()
def _kind(module: Any) -> tuple[bool, float] | None:
    """(centred, epsilon) of a normalisation over the last dimension; None for any other module."""
    own = dict(module.named_parameters(recurse=False))
    if next(module.children(), None) is not None or "weight" not in own or own.keys() - {"weight", "bias"}:
        return None
    size = own["weight"].numel()
    if len(inspect.signature(type(module).forward).parameters) != 2:  # a gate, or more
        return None
    if any(p.shape != (size,) for p in own.values()) or size < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(2, size, generator=generator)
    # Small enough that epsilon shows, whatever the model's.
    x = torch.randn(3, size, generator=generator) * torch.tensor([[1.0], [1e-2], [1e-4]])
    given = {"weight": weight, "bias": bias}
    values = {name: given[name].to(p.device, torch.float32) for name, p in own.items()}
    x = x.to(own["weight"].device)
    try:
        # The class's own forward: an instance may carry another for the time being.
        with _holding(module, values):
            found = type(module).forward(module, x)
    except (TypeError, RuntimeError, ValueError, AttributeError):
        return None
    if not isinstance(found, torch.Tensor) or found.shape != x.shape:
        return None
    for name in _EPSILON:
        epsilon = getattr(module, name, None)
        if not isinstance(epsilon, float):
            continue
        for centred in (False, True):
            plain = _normalised(x, centred, epsilon)
            for offset in (0.0, 1.0):
                wanted = (values["weight"] + offset) * plain + values.get("bias", torch.zeros(()).to(x))
                # float32, one rounding a step; another epsilon, centring or offset is off by percents in some row.
                if torch.allclose(found.float(), wanted, rtol=1e-4, atol=1e-5):
                    return centred, epsilon
    return None


class _holding:
    """A module with other tensors in the place of its parameters."""

    def __init__(self, module: nn.Module, values: dict[str, torch.Tensor]) -> None:
        self._module, self._values = module, values

    def __enter__(self) -> None:
        self._own = dict(self._module._parameters)
        self._module._parameters.update(self._values)  # type: ignore[arg-type]

    def __exit__(self, *_: object) -> None:
        self._module._parameters.update(self._own)
