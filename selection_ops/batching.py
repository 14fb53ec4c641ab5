"""Batches of bounded size from samples sorted by length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from schemas.errors import InputError
from schemas.spec import BatchLayout
from selection_ops.encoding import Encoded


class Segments:
    """Where samples lie that stand one behind another in one row of tokens."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        lengths_B = torch.tensor(list(lengths))
        start_B = lengths_B.cumsum(0) - lengths_B
        place_L = torch.arange(int(lengths_B.max()))
        inside_BL = place_L < lengths_B[:, None]
        self.lengths = tuple(lengths)
        self.sample_T = torch.repeat_interleave(lengths_B).to(device)
        """Sample of every token."""
        self.position_T = (torch.arange(len(self.sample_T)) - start_B.repeat_interleave(lengths_B)).to(device)
        """Place of every token in its sample."""
        self._starts: list[int] = start_B.tolist()
        self._token_BL = (start_B[:, None] + place_L * inside_BL).to(device)
        self._outside_BL = (~inside_BL).to(device)

    def rows(self, sample: int) -> slice:
        """The tokens of a sample."""
        return slice(self._starts[sample], self._starts[sample] + self.lengths[sample])

    def split(self, tensor: torch.Tensor, axis: int, *, zero: bool) -> torch.Tensor:
        """A tensor [T, .], [1, T, .] or [1, ., T, .] of the row's tokens, which lie along `axis`, as [B, t, .], a sample a row.

        Shorter samples are filled up with zeros, or else with their own first token, so that nothing of another sample (a NaN) enters
        a row. Raises `ValueError` where T is not the size of the axis.
        """
        if axis < 0 or tensor.shape[axis] != len(self.sample_T) or (axis and tensor.shape[0] != 1):
            raise ValueError(f"{list(tensor.shape)} has no axis of the row's {len(self.sample_T)} tokens")
        if axis:
            tensor = tensor[0].movedim(axis - 1, 0)
        split_BL = tensor[self._token_BL]
        if zero:
            split_BL = split_BL.masked_fill(
                self._outside_BL.reshape(*self._outside_BL.shape, *[1] * (tensor.dim() - 1)), 0
            )
        return split_BL.reshape(len(split_BL), -1, tensor.shape[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded samples, a row each, or packed samples, one behind another in one row.

    ids_BT int64; attention_BT and loss_BT bool: real tokens, and tokens that carry loss (never the first of a sample, which nothing
    of its sample predicts). labels_BT: what the loss tokens are taken to be, where that is not what the model reads (labels sampled
    from a model). segments: where packed samples lie in the row.
    """

    ids_BT: torch.Tensor
    attention_BT: torch.Tensor
    loss_BT: torch.Tensor
    labels_BT: torch.Tensor | None = None
    segments: Segments | None = None

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.attention_BT.sum())

    @property
    def samples(self) -> int:
        """Samples."""
        return len(self.ids_BT) if self.segments is None else len(self.segments.lengths)

    def sum_by_sample(self, values_BT: torch.Tensor) -> torch.Tensor:
        """Sums [B] of numbers of the tokens behind the first of every row [., T - 1]."""
        if self.segments is None:
            return values_BT.sum(1)
        row_T1 = nn.functional.pad(values_BT[0], (1, 0))[:, None]
        return self.segments.split(row_T1, 0, zero=True)[..., 0].sum(1)

    def sample_of_loss(self) -> torch.Tensor:
        """Samples of the loss tokens, in the order of rows."""
        row_t, token_t = torch.nonzero(self.loss_BT[:, 1:], as_tuple=True)
        return row_t if self.segments is None else self.segments.sample_T[1:][token_t]


def length_batches(lengths: Sequence[int], batch_tokens: int, layout: BatchLayout = "padded") -> list[list[int]]:
    """Indices in batches whose longest x count stays within `batch_tokens`, or their sum where they are packed; a single longer
    sample stands alone.

    Sorted by descending length, ties by index: the largest batch comes first, so that memory shows itself at once.
    """
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be positive, not {batch_tokens}")
    batches: list[list[int]] = []
    longest = filled = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        packed, padded = filled + lengths[index], longest * (len(batches[-1]) + 1) if batches else 0
        if batches and (packed if layout == "packed" else padded) <= batch_tokens:
            batches[-1].append(index)
            filled += lengths[index]
        else:
            batches.append([index])
            longest = filled = lengths[index]
    return batches


def collate(
    encoded: Sequence[Encoded],
    *,
    device: torch.device | str = "cpu",
    labels: Sequence[Sequence[int]] | None = None,
    layout: BatchLayout = "padded",
) -> Batch:
    """A batch of samples: right-padded to the longest, or one behind another. Padding carries no attention and no loss.

    `labels` are the tokens that the loss is taken of, where they are not the samples' own. Padding repeats the sample's own first
    token: whatever the weights hold (a NaN in some token's embedding), nothing that is not the sample's enters its row. Raises `InputError` for an empty list or a sample without tokens.
    """
    if not encoded or not all(item.ids for item in encoded):
        raise InputError("a batch needs at least one sample, and every sample at least one token")
    lengths = [len(item.ids) for item in encoded]
    masks = [[False, *item.loss_mask[1:]] for item in encoded]
    ids_BT = _laid([item.ids for item in encoded], layout)
    loss_BT = _laid(masks, layout, fill=False).bool()
    labels_BT = None if labels is None else _laid(labels, layout).to(device)
    if layout == "packed":
        attention_BT, segments = torch.ones_like(loss_BT), Segments(lengths, device)
    else:
        attention_BT, segments = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None], None
    return Batch(
        ids_BT=ids_BT.to(device), attention_BT=attention_BT.to(device), loss_BT=loss_BT.to(device), labels_BT=labels_BT,
        segments=segments,
    )  # fmt: skip


def _laid(rows: Sequence[Sequence[int]], layout: BatchLayout, fill: int | None = None) -> torch.Tensor:
    """Numbers of the samples' tokens as they lie in a batch, int64; padding repeats a sample's first, or is `fill`."""
    if layout == "packed":
        return torch.tensor([[value for row in rows for value in row]], dtype=torch.int64)
    longest = max(len(row) for row in rows)
    padded = [[*row, *[row[0] if fill is None else fill] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of a forward or backward says that memory, of a device or of the process, ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
