"""Trying steps out: a model and its optimizer take a step, the target's loss is measured, and everything is put back bitwise."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from selection_ops.online.filters import Draw
from selection_ops.online.metrics import Geometry
from selection_ops.online.oracle import OracleReport, judge, predicted_drops


@contextlib.contextmanager
def untouched(model: Any, optimizer: Any) -> Iterator[None]:
    """Afterwards trained parameters, buffers, optimizer state, the mode of the model and the random state are bitwise what they were.

    Inside, the optimizer may step at will; gradients are dropped. Holds a copy of all of them.
    """
    held = [*(p for group in optimizer.param_groups for p in group["params"]), *model.buffers()]
    values = [tensor.detach().clone() for tensor in held]
    parts = getattr(optimizer, "parts", (optimizer,))
    states = [{parameter: _copied(state) for parameter, state in part.state.items()} for part in parts]
    training = [(module, module.training) for module in model.modules()]
    devices = sorted({tensor.device.index or 0 for tensor in held if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for tensor, value in zip(held, values, strict=True):
                    tensor.copy_(value)
            for part, known in zip(parts, states, strict=True):
                part.state.clear()
                part.state.update(known)
            for module, mode in training:
                module.training = mode


def _copied(state: Any) -> Any:
    return {
        key: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


def one_step_oracle(
    model: Any,
    optimizer: Any,
    *,
    chosen: tuple[Sequence[int], Tensor],
    draw: Draw,
    draws: int,
    loss_tokens_N: Sequence[int],
    weigh: Callable[[Sequence[int]], Tensor],
    update: Callable[[Sequence[int], Tensor], None],
    target_loss: Callable[[], float],
    space: Geometry | None,
) -> OracleReport:
    """Take the step on `chosen` (places and weights) and on `draws` random choices of as many candidates, each from the same state.

    `weigh` gives the weights of a random choice, `update` takes an optimizer step. Random choices are functions of `draw`; all have the
    same dropout.
    """
    kept, weight_S = chosen
    trials = [(tuple(kept), weight_S)]
    for number in range(draws):
        keys = draw.keys(b"oracle %d" % number)
        order = sorted(range(len(keys)), key=lambda place: (keys[place], place))
        some = tuple(sorted(order[: len(kept)]))
        trials.append((some, weigh(some)))
    drops = []
    share_DN = torch.zeros(len(trials), len(loss_tokens_N), dtype=torch.float64)
    with untouched(model, optimizer):
        before = target_loss()
    for row, (places, weights) in enumerate(trials):
        with untouched(model, optimizer):
            update(places, weights)
            drops.append(before - target_loss())
        for place, weight in zip(places, weights.tolist(), strict=True):
            share_DN[row, place] = weight
        share_DN[row] /= float((share_DN[row].abs() * torch.tensor(loss_tokens_N, dtype=torch.float64)).sum())
    return judge(drops, None if space is None else predicted_drops(space, share_DN))
