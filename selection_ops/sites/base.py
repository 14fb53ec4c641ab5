"""The contract of a site type: which parameters of a module are attributed, and how its forward reports their factors.

A new one is one file: subclass `SiteType` and decorate it with `@site_type(ModuleClass)` (or `@site_type()` where `matches` decides).
An installed package names the file among its entry points, group `lehr.site_types`; then every process of Lehr knows it. `parameters` names what is attributed. `forward` is what the module runs while
an engine is open: it computes what the module computes, and tells the tape what the gradients of its parameters are made of.

Legend: B samples, T tokens, O x I a matrix gradient, R projection rank, n numbers in a small parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatrixParameter:
    """A matrix whose gradient for a sample is a sum of outer products over tokens; it is projected from both sides."""

    name: str
    """Name in the module; of a packed parameter [E, ., .] with the index behind a dot, as `down_proj.3`."""
    outputs: int
    """Rows O of the gradient [O, I]."""
    inputs: int
    """Columns I of the gradient [O, I]."""
    transposed: bool = False
    """Whether the module holds it as [I, O]."""

    @property
    def attribute(self) -> str:
        """Name of the module's attribute that holds it."""
        return self.name.partition(".")[0]

    def matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """The matrix [O, I] as a view of the attribute's value, or of anything of its shape."""
        index = self.name.partition(".")[2]
        held = tensor[int(index)] if index else tensor
        return held.T if self.transposed else held


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallParameter:
    """A parameter whose gradient for a sample is taken as it is: a norm's weight, a bias, a convolution's kernel."""

    name: str
    """Name in the module."""
    size: int
    """Numbers in it."""


Parameter = MatrixParameter | SmallParameter
Forward = Callable[..., Any]


class Tape(Protocol):
    """What a module's forward reports to. Names are those of `parameters`; of one that is not attributed nothing is kept.

    Tensors of tokens may be [B, T, .], [B, ., T, .] or flat [B T, .], sample after sample. In a packed batch they are those of one
    sample, [1, T, .], [1, ., T, .] or [T, .], and the tape knows where samples begin.
    """

    def wants(self, name: str) -> bool:
        """Whether the parameter is attributed."""

    def outer(self, name: str, output: torch.Tensor, inputs: torch.Tensor) -> None:
        """The gradient is the sum over tokens of (gradient of `output`)(`inputs`)'."""

    def lookup(self, name: str, output: torch.Tensor, row_BT: torch.Tensor, scale_BT: torch.Tensor) -> None:
        """The gradient is the sum over tokens of `scale` e_row (gradient of `output`)': a token meets one row of the parameter."""

    def routed(self, name: str, output_nO: torch.Tensor, inputs_nI: torch.Tensor, token_n: torch.Tensor) -> None:
        """As `outer` for some of the flat tokens [B T], in any order: row i is token `token_n[i]`."""

    def small(self, name: str, output: torch.Tensor, gradient_Bn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """The gradient is `gradient_Bn(gradient of output)`; that comes as [B, t, .], the tokens of a sample in a row, and zero
        where `by_sample` repeats one."""

    def by_sample(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of tokens as [B, t, .], the tokens of a sample in a row, and where one has fewer of them, its first again."""

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of tokens in the form in which the batch lies; what all samples share is repeated for each."""

    def each_sample(self, module: nn.Module, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`call(*args, **kwargs)` sample by sample, each with parameters of its own, whose gradients are then the sample's."""


class SiteType:
    """How modules of one kind use their parameters."""

    blocks = False
    """Whether its matrices are among the linear maps of the blocks, which are attributed by default."""

    @staticmethod
    def matches(module: Any) -> bool:
        """Whether a module is of this kind; only asked where the type was registered without a class."""
        return False

    @staticmethod
    def parameters(module: Any) -> tuple[Parameter, ...]:
        """What can be attributed."""
        raise NotImplementedError

    @staticmethod
    def forward(module: Any, call: Forward, tape: Tape) -> Forward:
        """The forward to run instead of `call`, the module's own: the same numbers, reported to the tape."""
        raise NotImplementedError


ENTRY_POINTS = "lehr.site_types"
_BY_CLASS: dict[type[nn.Module], type[SiteType]] = {}
_BY_SUBSTANCE: list[type[SiteType]] = []


def site_type(kind: type[nn.Module] | None = None) -> Callable[[type[SiteType]], type[SiteType]]:
    """Register a site type for a module class, exactly: a subclass may compute something else. Without one, `matches` decides."""

    def register(found: type[SiteType]) -> type[SiteType]:
        if kind is None:
            _BY_SUBSTANCE.append(found)
        else:
            _BY_CLASS[kind] = found
        return found

    return register


def type_of(module: nn.Module) -> type[SiteType] | None:
    """The site type of a module: by its class, else the first that says it matches."""
    known = _BY_CLASS.get(type(module))
    return known or next((found for found in _BY_SUBSTANCE if found.matches(module)), None)


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called with first, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def known_types() -> tuple[str, ...]:
    """Names of what is registered."""
    return (*(kind.__name__ for kind in _BY_CLASS), *(kind.__name__ for kind in _BY_SUBSTANCE))
