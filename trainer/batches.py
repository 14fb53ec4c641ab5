"""Batches of bounded tokens that a step is computed in, and the one place where they are put together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from selection_ops.batching import Batch, collate, length_batches
from selection_ops.encoding import Encoded


class StepBatches:
    """Cuts the samples of a step into batches on the model's device, and counts the padding among the tokens that are computed."""

    def __init__(self, *, batch_tokens: int, dtype: str, device: torch.device) -> None:
        self._batch_tokens, self._device = batch_tokens, device
        self._autocast = dtype == "bfloat16"
        self._computed = self._real = 0

    def reset(self) -> None:
        """Count anew."""
        self._computed = self._real = 0

    @property
    def padding_share(self) -> float:
        """Padding among the tokens computed since the last reset."""
        return 1 - self._real / self._computed if self._computed else 0.0

    def __call__(self, items: Sequence[Encoded]) -> Iterator[tuple[list[int], Batch]]:
        """Batches of `items`, sorted by length, each with the places of its samples among them."""
        for indices in length_batches([len(item.ids) for item in items], self._batch_tokens):
            chosen = [items[index] for index in indices]
            batch = collate(chosen, device=self._device)
            self._computed += batch.ids_BT.numel()
            self._real += sum(len(item.ids) for item in chosen)
            yield indices, batch

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The arithmetic of forward and backward: bfloat16 is autocast over wider weights."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._autocast):
            yield
