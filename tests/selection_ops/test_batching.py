"""Batches: bounded, complete, deterministic; padding that says nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.errors import InputError
from selection_ops.batching import collate, length_batches
from selection_ops.encoding import Encoded


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_batches_are_bounded_complete_and_sorted(lengths: list[int], batch_tokens: int) -> None:
    batches = length_batches(lengths, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    order = [lengths[index] for batch in batches for index in batch]
    assert order == sorted(lengths, reverse=True)
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or longest * len(batch) <= batch_tokens
    for batch in batches[:-1]:
        assert lengths[batch[0]] * (len(batch) + 1) > batch_tokens  # no batch stops before it is full


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
@example([3, 2, 2, 2, 1], 5)  # full to the last token
def test_packed_batches_are_bounded_by_their_sum(lengths: list[int], batch_tokens: int) -> None:
    batches = length_batches(lengths, batch_tokens, "packed")
    order = [lengths[index] for batch in batches for index in batch]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert order == sorted(lengths, reverse=True)
    sums = [sum(lengths[index] for index in batch) for batch in batches]
    assert all(len(batch) == 1 or total <= batch_tokens for batch, total in zip(batches, sums))
    for total, following in zip(sums, batches[1:]):
        assert total + lengths[following[0]] > batch_tokens  # no batch stops before it is full


def test_equal_lengths_keep_their_order() -> None:
    assert length_batches([5, 7, 5, 5], 10) == [[1], [0, 2], [3]]
    assert length_batches([], 10) == []


def test_batch_tokens_must_be_positive() -> None:
    with pytest.raises(InputError, match="not 0"):
        length_batches([1], 0)


def test_collate_pads_right_with_the_samples_own_token() -> None:
    batch = collate([Encoded(ids=[7, 8, 9], loss_mask=[False, False, True]), Encoded(ids=[5], loss_mask=[False])])
    assert batch.ids_BT.tolist() == [[7, 8, 9], [5, 5, 5]]
    assert batch.attention_BT.tolist() == [[True, True, True], [True, False, False]]
    assert batch.loss_BT.tolist() == [[False, False, True], [False, False, False]]
    assert batch.tokens == 4
    assert batch.ids_BT.dtype == torch.int64


@pytest.mark.parametrize("items", [[], [Encoded(ids=[], loss_mask=[])]])
def test_collate_refuses_nothing(items: list[Encoded]) -> None:
    with pytest.raises(InputError, match="at least one"):
        collate(items)
