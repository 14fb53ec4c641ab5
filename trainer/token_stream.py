"""Streams as the dictionaries of token ids that other people's trainers take, and the batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

from schemas.errors import InputError
from schemas.spec import EncodingSpec
from selection_ops.encoding import Encoder
from trainer.mixing import MixedStream
from trainer.positioned import Offered
from trainer.stream import RankedStream

NO_LOSS = -100
"""Label of a token without loss, in torch's cross entropy and in transformers."""


class TokenStream(IterableDataset):
    """A stream for data loaders: every sample as `input_ids`, `attention_mask`, `labels` and where it comes from.

    `labels` are the ids themselves, `NO_LOSS` where a token carries no loss; models of transformers shift them. Beside them stand
    `selection_weight`, `tokens`, `sample_id`, `rank`, `position` and `stream`; `pad` leaves these out of a batch.

    Every iteration begins with the first sample, as datasets do, or after `load_state_dict` with the one that state was
    taken before. `set_epoch`, which transformers' Trainer calls, makes the next one pass number `epoch`, in another order.
    Raises `InputError` for a tokenizer without character offsets.
    """

    def __init__(self, stream: RankedStream | MixedStream, tokenizer: Any) -> None:
        super().__init__()
        self.stream = stream
        self._encoder = Encoder(tokenizer, EncodingSpec(**stream.index.encoding))
        self._epoch = 0
        self._resumed = False

    def __len__(self) -> int:
        """Samples of one iteration."""
        return len(self.stream)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._resumed:
            self.stream.start_epoch(self._epoch)
        self._resumed = False
        return map(self._dictionary, self.stream)

    def _dictionary(self, offered: Offered) -> dict[str, Any]:
        ranked = offered.ranked
        encoded = self._encoder.encode(ranked.sample.text, ranked.sample.loss_spans)
        pairs = zip(encoded.ids, encoded.loss_mask)
        return {
            "input_ids": encoded.ids,
            "attention_mask": [1] * len(encoded.ids),
            "labels": [token if loss else NO_LOSS for token, loss in pairs],
            "selection_weight": ranked.selection_weight,
            "tokens": len(encoded.ids),
            "sample_id": ranked.sample.sample_id,
            "rank": ranked.rank,
            "position": offered.position,
            "stream": offered.stream,
        }

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration pass number `epoch` over the stream; one that was restored goes on first."""
        self._epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration stands."""
        return {"epoch": self._epoch, "stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next iteration where `state` was taken."""
        self.stream.load_state_dict(state["stream"])
        self._epoch, self._resumed = int(state["epoch"]), True


def pad(samples: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """A batch of token dictionaries, padded on the right to the longest: `input_ids`, `attention_mask`, `labels`, int64 [B, T].

    Padding carries no attention and no loss, so that any id does.
    """
    if not samples:
        raise InputError("a batch needs at least one sample")
    longest = max(len(sample["input_ids"]) for sample in samples)
    filling = {"input_ids": pad_id, "attention_mask": 0, "labels": NO_LOSS}
    return {
        name: torch.tensor([[*sample[name], *[fill] * (longest - len(sample[name]))] for sample in samples])
        for name, fill in filling.items()
    }
