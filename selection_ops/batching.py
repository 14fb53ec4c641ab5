"""Batches of bounded size from samples sorted by length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from schemas.errors import InputError
from selection_ops.encoding import Encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded samples. ids_BT int64; attention_BT and loss_BT bool: real tokens, and tokens that carry loss.

    labels_BT: what the loss tokens are taken to be, where that is not what the model reads (labels sampled from a model).
    """

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    loss_BT: torch.Tensor
    labels_BT: torch.Tensor | None = None

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
    """Right-pad samples to the longest; padding carries no attention and no loss.

    Padding repeats the sample's own first token: whatever the weights hold (a NaN in some token's embedding), nothing that is
    not the sample's enters its row. Raises `InputError` for an empty list or a sample without tokens.
    """
    if not encoded or not all(item.ids for item in encoded):
        raise InputError("a batch needs at least one sample, and every sample at least one token")
    longest = max(len(item.ids) for item in encoded)
    ids_BT = torch.tensor([item.ids + item.ids[:1] * (longest - len(item.ids)) for item in encoded], dtype=torch.int64)
    loss_BT = torch.tensor([item.loss_mask + [False] * (longest - len(item.ids)) for item in encoded], dtype=torch.bool)
    lengths_B = torch.tensor([len(item.ids) for item in encoded])
    attention_BT = torch.arange(longest)[None] < lengths_B[:, None]
    return Batch(ids_BT=ids_BT.to(device), attention_BT=attention_BT.to(device), loss_BT=loss_BT.to(device))
