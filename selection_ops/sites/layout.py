"""How the samples of a batch lie in what a module is called with and returns, read off two small forwards.

`batch`: one row a sample, [B, ...]. `flat`: one row a token, [B T, ...], sample after sample. `shared`: the same for all samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree

from selection_ops.model import evaluating

SAMPLES, TOKENS = 2, 3


@dataclasses.dataclass(frozen=True)
class CallLayout:
    """Layouts of the leaves of a module's arguments and of its result, in the order of torch's pytrees; `` is no tensor."""

    arguments: tuple[str, ...]
    result: tuple[str, ...]
    axis: int = 1
    """Axis of the tokens in the first tensor among the arguments; -1 where there is none."""

    @property
    def flat(self) -> bool:
        """Whether every tensor has one row a token."""
        return {*self.arguments, *self.result} <= {"flat", ""}


@dataclasses.dataclass
class _Call:
    arguments: list[Any]
    result: list[Any]


class Probe:
    """What every module of a model is called with first in a forward of two samples of three tokens."""

    def __init__(self, model: Any) -> None:
        self._modules = dict(model.named_modules())
        base = getattr(model, "base_model", model)
        self._root = {name for name, module in self._modules.items() if module is model or module is base}
        # Padding, so that masks are formed; and a second sample of other tokens, to see which rows are its own.
        self._first = self._calls(model, (4, 5, 6))
        self._second = self._calls(model, (7, 8, 8))

    def _calls(self, model: Any, tokens: tuple[int, ...]) -> dict[str, _Call]:
        seen: dict[str, _Call] = {}
        device = next(model.parameters()).device
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids_BT = torch.tensor([[1, 2, 3], tokens], device=device) % vocabulary
        attention_BT = torch.tensor([[1, 1, 1], [1, 1, 0]], device=device)

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
                if name not in seen:
                    seen[name] = _Call(_pytree.tree_leaves((args, kwargs)), _pytree.tree_leaves(result))

            return hook

        handles = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in self._modules.items()]
        try:
            with torch.no_grad(), evaluating(model):
                model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def layout(self, path: str) -> CallLayout:
        """Layout of the first call of a module that ran."""
        first, second = self._first[path], self._second[path]
        return CallLayout(
            tuple(_layout(a, b) for a, b in zip(first.arguments, second.arguments)),
            tuple(_layout(a, b) for a, b in zip(first.result, second.result)),
            next((_axis(leaf) for leaf in first.arguments if isinstance(leaf, torch.Tensor)), -1),
        )

    def refusal(self, path: str, *, shared_arguments: bool = False) -> str:
        """Why the parameters of a module cannot be attributed where it runs; empty where they can."""
        if path not in self._first or path not in self._second:
            return "its module did not run as a module in a forward pass"
        call, found = self._first[path], self.layout(path)
        tensors = [place for place in found.arguments if place]
        if not tensors:
            return "its module is called without a tensor"
        own = tensors[0] in ("batch", "flat") or (shared_arguments and tensors[0] == "shared")
        given = next(leaf for leaf in call.arguments if isinstance(leaf, torch.Tensor))
        if not own or "mixed" in (*tensors, *found.result):
            shape = list(given.shape)
            return (
                f"its module is called with {shape} for {SAMPLES} samples of {TOKENS} tokens, in which samples do not keep "
                "rows of their own"
            )
        return ""

    def nearest_that_runs(self, parameter: str) -> str | None:
        """The innermost module around a parameter that runs with samples apart; None where only the whole model does."""
        path = parameter
        while path:
            path = path.rpartition(".")[0]
            if path in self._root:
                return None
            if not self.refusal(path):
                return path
        return None

    def first_input(self, path: str) -> int:
        """Identity of the tensor that a module was called with; the probe holds it, so no two share one."""
        return next((id(leaf) for leaf in self._first[path].arguments if isinstance(leaf, torch.Tensor)), 0)


def _layout(first: Any, second: Any) -> str:
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return ""
    if first.dim() and first.shape == second.shape:
        rows = first.shape[0]
        if rows == SAMPLES and _equal(first[:1], second[:1]):
            return "batch"
        if rows == SAMPLES * TOKENS and _equal(first[:TOKENS], second[:TOKENS]):
            return "flat"
    return "shared" if first.shape == second.shape and _equal(first, second) else "mixed"


def _axis(leaf: torch.Tensor) -> int:
    """Of [B T, .], [B, T], [B, T, .] and [B, ., T, .] the axis of the tokens; of as many heads as tokens the first one."""
    if leaf.dim() and leaf.shape[0] == SAMPLES * TOKENS:
        return 0
    inner = leaf.shape[1 : max(leaf.dim() - 1, 2)]
    return next((axis for axis, size in enumerate(inner, 1) if size == TOKENS), -1)


def _equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """The same but for rounding: other tokens beside it may change the order in which a row is added up, not what it says."""
    same = (first == second) | ((first != first) & (second != second))
    if same.all():
        return True
    if not first.is_floating_point():
        return False
    difference = (first.double() - second.double()).masked_fill(same, 0.0)
    return bool(difference.norm() <= 0.01 * first.double().nan_to_num().norm())
