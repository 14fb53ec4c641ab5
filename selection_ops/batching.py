"""Batches of bounded size from samples sorted by length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from schemas.errors import InputError
from selection_ops.encoding import Encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded samples. ids_BT int64; attention_BT and loss_BT bool: real tokens, and tokens that carry loss."""

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    loss_BT: torch.Tensor

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.attention_BT.sum())


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches whose longest x count stays within `batch_tokens`; a single longer sample stands alone.

    Sorted by descending length, ties by index: the largest batch comes first, so that memory shows itself at once.
    """
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be positive, not {batch_tokens}")
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and longest * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches


def collate(encoded: Sequence[Encoded], *, device: torch.device | str = "cpu") -> Batch:
    """Right-pad samples to the longest; padding carries id 0, no attention and no loss."""
    longest = max(len(item.ids) for item in encoded)
    ids_BT = torch.zeros(len(encoded), longest, dtype=torch.int64)
    attention_BT = torch.zeros(len(encoded), longest, dtype=torch.bool)
    loss_BT = torch.zeros(len(encoded), longest, dtype=torch.bool)
    for row, item in enumerate(encoded):
        size = len(item.ids)
        ids_BT[row, :size] = torch.tensor(item.ids, dtype=torch.int64)
        attention_BT[row, :size] = True
        loss_BT[row, :size] = torch.tensor(item.loss_mask, dtype=torch.bool)
    return Batch(ids_BT=ids_BT.to(device), attention_BT=attention_BT.to(device), loss_BT=loss_BT.to(device))
