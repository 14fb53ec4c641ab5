"""Batches of bounded tokens that a step is computed in, and the one place where they are put together and shared out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from schemas.spec import BatchLayout
from selection_ops.batching import Batch, collate, length_batches
from selection_ops.encoding import Encoded
from trainer.parallel import OneProcess


class StepBatches:
    """Cuts this process's share of samples into batches on the model's device, and counts the padding among the tokens that are computed.

    With `even`, every process goes through as many batches as the one with most: those it lacks are of one sample that counts for nothing.
    """

    def __init__(
        self,
        *,
        batch_tokens: int,
        dtype: str,
        device: torch.device,
        processes: OneProcess | None = None,
        even: bool = False,
        layout: BatchLayout = "padded",
    ) -> None:
        self._batch_tokens, self.device, self._layout = batch_tokens, device, layout
        self._processes, self._even = processes or OneProcess(), even
        self._autocast = dtype == "bfloat16"
        self._computed = self._real = 0

    def reset(self) -> None:
        """Count anew."""
        self._computed = self._real = 0

    @property
    def padding_share(self) -> float:
        """Padding among the tokens that all processes computed since the last reset; asked for by all of them."""
        counted = self._processes.sum(torch.tensor([self._computed, self._real], dtype=torch.float64))
        computed, real = counted.tolist()
        return 1 - real / computed if computed else 0.0

    def __call__(self, items: Sequence[Encoded]) -> Iterator[tuple[list[int], Batch]]:
        """Batches of this process's share of `items`, sorted by length, each with the places of its samples among them.

        Samples of a batch beyond the places that come with it count for nothing.
        """
        lengths = [len(item.ids) for item in items]
        cut = [
            [
                [share[place] for place in places]
                for places in length_batches([lengths[i] for i in share], self._batch_tokens, self._layout)
            ]
            for share in self._processes.shares(lengths)
        ]
        own = cut[self._processes.index]
        for indices in own:
            chosen = [items[index] for index in indices]
            batch = collate(chosen, device=self.device, layout=self._layout)
            self._computed += batch.ids_BT.numel()
            self._real += sum(len(item.ids) for item in chosen)
            yield indices, batch
        missing = max(len(batches) for batches in cut) - len(own)
        if self._even and missing:
            filler = collate([min(items, key=lambda item: len(item.ids))], device=self.device, layout=self._layout)
            for _ in range(missing):
                self._computed += filler.ids_BT.numel()
                yield [], filler

    @contextlib.contextmanager
    def arithmetic(self) -> Iterator[None]:
        """The arithmetic of forward and backward: bfloat16 is autocast over wider weights."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
            yield
