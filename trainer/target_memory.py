"""The target's direction over steps: kept for some of them, averaged over those in which it was taken, of one target or of several.

What survives a step is tensors by name, which a checkpoint holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from schemas.errors import InputError
from selection_ops.encoding import Encoded
from selection_ops.online.metrics import Metric
from trainer.batches import StepBatches
from trainer.target_direction import TargetDirection

Targets = Sequence[Encoded] | Mapping[str, Sequence[Encoded]]
"""Samples of one target, or of several by name."""
Several = Literal["together", "mean", "max"]
Take = Callable[[Metric, Sequence[Encoded], StepBatches, int], TargetDirection]
_TAKEN, _COUNT, _SKETCH, _WHOLE, _SQUARE = "taken", "count", "sketch", "whole", "square"


def all_samples(target: Targets) -> list[Encoded]:
    """Samples of every target in a row."""
    return [item for part in target.values() for item in part] if isinstance(target, Mapping) else list(target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Directions:
    """What the candidates of a step are compared with."""

    parts: tuple[TargetDirection, ...]
    """One direction, or one of each of several targets, the nearest of which counts."""
    loss: float | None
    """Loss of the target batch, nats per token, the mean over several targets; None where the direction was kept from an earlier step."""


class TargetMemory:
    """Takes directions by `take`, and remembers them as long as it is told to."""

    def __init__(self, take: Take, *, refresh: int = 1, decay: float = 0.0, several: Several = "together") -> None:
        """A direction is taken anew every `refresh` steps. With a `decay` it is averaged with those taken before."""
        if refresh < 1:
            raise InputError(f"target_refresh must be at least 1, not {refresh}")
        if not 0 <= decay < 1:
            raise InputError(f"target_decay must lie in [0, 1), not {decay}")
        if several not in ("together", "mean", "max"):
            raise InputError(f"unknown value {several!r} of targets: choose one of together, mean, max")
        self._take, self._refresh, self._decay, self._several = take, refresh, decay, several
        self._metric = ""
        self._taken = self._count = 0
        self._held: dict[str, TargetDirection] = {}
        """What was taken last, or the running sum of an average."""

    def __call__(self, metric: Metric, target: Targets, batches: StepBatches, number: int) -> Directions:
        """What the candidates of step `number` are compared with.

        Another metric than before (the end of its warm-up) starts anew: its directions have another scale. Raises `InputError` where
        several targets are wanted and one is given.
        """
        loss = None
        if metric.name != self._metric:
            self._held, self._count = {}, 0
        if not self._held or number - self._taken >= self._refresh:
            found = {name: self._take(metric, part, batches, number) for name, part in self._split(target).items()}
            loss = sum(part.loss for part in found.values()) / len(found)
            self._held = self._averaged(found) if self._decay else found
            self._metric, self._taken, self._count = metric.name, number, self._count + 1
        parts = tuple(self._acting(part) for _, part in sorted(self._held.items()))
        if self._several == "mean":
            sketches = [part.sketch_K for part in parts if part.sketch_K is not None]
            parts = (dataclasses.replace(parts[0], sketch_K=torch.stack(sketches).mean(0)),)
        return Directions(parts=parts, loss=loss)

    def _split(self, target: Targets) -> Mapping[str, Sequence[Encoded]]:
        if self._several == "together":
            return {"": all_samples(target)}
        if not isinstance(target, Mapping):
            raise InputError(
                f"targets {self._several} compares with several targets: give a step their samples by name"
            )
        return target

    def _averaged(self, found: dict[str, TargetDirection]) -> dict[str, TargetDirection]:
        """decay * sum + (1 - decay) * what was found, from a sum of zero."""
        if self._held and self._held.keys() != found.keys():
            raise InputError(
                f"the targets were {', '.join(sorted(self._held))}, and are now {', '.join(sorted(found))}"
            )
        averaged = {}
        for name, part in found.items():
            if part.sketch_K is None:
                raise InputError("an average of directions is one of sketches; use alignment sketched")
            before = self._held[name].sketch_K if self._held else None
            sum_K = (1 - self._decay) * part.sketch_K
            averaged[name] = dataclasses.replace(
                part, sketch_K=sum_K if before is None else sum_K + self._decay * before
            )
        return averaged

    def _acting(self, part: TargetDirection) -> TargetDirection:
        """The weighted mean: the sum over 1 - decay^count, what its weights add up to."""
        if not self._decay or part.sketch_K is None:
            return part
        return dataclasses.replace(part, sketch_K=part.sketch_K / (1 - self._decay**self._count))

    def state(self) -> dict[str, Tensor]:
        """What the next steps need, by name, on the CPU; empty where every step takes its direction anew."""
        if not self._held or (self._refresh == 1 and not self._decay):
            return {}
        tensors = {f"{_TAKEN}:{self._metric}": torch.tensor(self._taken), _COUNT: torch.tensor(self._count)}
        for name, part in self._held.items():
            if part.sketch_K is not None:
                tensors[f"{_SKETCH}:{name}"] = part.sketch_K.detach().cpu().clone()
            for site, matrix in (part.whole or {}).items():
                tensors[f"{_WHOLE}:{site}:{name}"] = matrix.detach().cpu().clone()
            if part.square is not None:
                tensors[f"{_SQUARE}:{name}"] = torch.tensor(part.square, dtype=torch.float64)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from a `state`; of an empty one, from nothing."""
        self._held, self._metric, self._taken, self._count = {}, "", 0, 0
        sketches: dict[str, Tensor] = {}
        squares: dict[str, float] = {}
        wholes: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(":")
            if kind == _TAKEN:
                self._metric, self._taken = name, int(tensor)
            elif kind == _COUNT:
                self._count = int(tensor)
            elif kind == _SKETCH:
                sketches[name] = tensor.to(device)
            elif kind == _SQUARE:
                squares[name] = float(tensor)
            else:
                site, _, target = name.partition(":")
                wholes.setdefault(target, {})[site] = tensor.to(device)
        for name in {**sketches, **wholes}:
            self._held[name] = TargetDirection(
                loss=float("nan"),
                sketch_K=sketches.get(name),
                whole=wholes.get(name),
                square=squares.get(name),
                formed=name in wholes,
            )
