"""Averages of the weights over the steps of a training: exponential, and uniform over its tail.

Sources: Polyak and Juditsky (1992) for the uniform mean; Izmailov et al., arXiv 1803.05407. Both are kept in the arithmetic of the weights
and where the weights are: one more copy of what is trained for each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from schemas.storage import join
from trainer.checkpoints import load_weights
from trainer.trainee import Trainee, trained_parameters


class WeightAverage:
    """An average of what is trained, of as many states of it as `count`."""

    def __init__(self, model: Any, *, decay: float | None) -> None:
        """With `decay`, a <- decay a + (1 - decay) w from the present weights on; without, the mean of what `update` saw."""
        self._parameters = list(trained_parameters(model).values())
        self._held = [parameter.detach().clone() for parameter in self._parameters]
        self._decay = decay
        self.count = 0

    @property
    def empty(self) -> bool:
        """Whether it is no average yet."""
        return self._decay is None and not self.count

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        self.count += 1
        share = 1 / self.count if self._decay is None else 1 - self._decay
        torch._foreach_lerp_(self._held, [parameter.data for parameter in self._parameters], share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the average stands in the model, and what is written to its weights is written to the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self._held[index] = self._held[index], parameter.data


class Averages:
    """The averages that a training was asked for, by name: `ema` and `tail`."""

    def __init__(self, trainee: Trainee, *, ema_decay: float, tail: float) -> None:
        """`ema_decay` and `tail` (share of the training) may be 0: no such average."""
        self._trainee, self._tail = trainee, tail
        self._all: dict[str, WeightAverage] = {}
        if ema_decay:
            self._all["ema"] = WeightAverage(trainee.model, decay=ema_decay)
        if tail:
            self._all["tail"] = WeightAverage(trainee.model, decay=None)

    def update(self, progress: float) -> None:
        """Take in the weights after a step, `progress` being the share of the training before it."""
        for name, average in self._all.items():
            # A share such as 1 - 0.9 is not 0.1 to the last bit.
            if name != "tail" or progress >= 1 - self._tail - 1e-12:
                average.update()

    def close(self) -> None:
        """The tail of a training that ended before its tail began is its last step."""
        for average in self._all.values():
            if average.empty:
                average.update()

    def evaluate(self, loss: Callable[[], float | None]) -> dict[str, float | None]:
        """`loss` of every average."""
        found = {}
        for name, average in self._all.items():
            with average.in_place():
                found[name] = loss()
        return found

    @property
    def counts(self) -> dict[str, int]:
        """Steps that each has taken in."""
        return {name: average.count for name, average in self._all.items()}

    def savers(self) -> dict[str, Callable[[Path], None]]:
        """What writes each average as a model folder, by the folder's name."""
        return {name: self._saver(average) for name, average in self._all.items() if not average.empty}

    def _saver(self, average: WeightAverage) -> Callable[[Path], None]:
        def save(folder: Path) -> None:
            with average.in_place():
                self._trainee.save(folder)

        return save

    def restore(self, url: str, counts: dict[str, int]) -> None:
        """Take up the averages that stand beside the weights of a checkpoint, bitwise."""
        for name, average in self._all.items():
            average.count = counts[name]
            if not average.empty:
                with average.in_place():
                    load_weights(self._trainee.model, join(url, name))
