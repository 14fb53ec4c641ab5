"""The search for a token budget: every reason to stop, on engines whose speed and memory are known functions of the batch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from selection_ops.batch_budget import MOST_TOKENS, ROUNDS, START_TOKENS, BudgetSearch, ProcessMemory, find_batch_tokens
from selection_ops.batching import Batch
from selection_ops.engine import GradientEngine
from selection_ops.sites import find_sites
from tests.tiny import tiny_gpt2

GIGABYTE = 10**9


class FakeModel(nn.Module):
    """Nothing but an embedding and the positions that the configuration has."""

    def __init__(self, positions: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 2)
        values = {} if positions is None else {"max_position_embeddings": positions}
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**values))

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


class FakeEngine:
    """An engine with a clock and a memory of its own: `seconds` and `bytes` are functions of the tokens of a batch."""

    def __init__(
        self,
        seconds: Callable[[int], float],
        bytes_: Callable[[int], float] = lambda tokens: 0,
        *,
        capacity: float = 100 * GIGABYTE,
        resident: int = 10 * GIGABYTE,
        positions: int | None = None,
        first_call: float = 0.0,
    ) -> None:
        self.model = FakeModel(positions)
        self.now, self._seconds, self._bytes = 0.0, seconds, bytes_
        self.resident, self.capacity = resident, int(capacity)
        self.batches: list[Batch] = []
        self.open = False
        self.released = 0
        self._peak = resident
        self._warm: set[tuple[int, ...]] = set()
        self._first_call = first_call

    def __enter__(self) -> FakeEngine:
        self.open = True
        return self

    def __exit__(self, *error: Any) -> None:
        self.open = False

    def features(self, batch: Batch) -> None:
        assert self.open
        self.batches.append(batch)
        needed = self.resident + int(self._bytes(batch.tokens))
        if needed > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self._peak = max(self._peak, needed)
        shape = tuple(batch.ids_BT.shape)
        self.now += self._seconds(batch.tokens) + (0.0 if shape in self._warm else self._first_call)
        self._warm.add(shape)

    # What the search asks of a memory.

    def start(self) -> None:
        self._peak = self.resident

    def finish(self) -> int:
        return self._peak

    def release(self) -> None:
        self.released += 1


def search(engine: FakeEngine, max_tokens: int = 256) -> BudgetSearch:
    found = find_batch_tokens(engine, max_tokens=max_tokens, clock=lambda: engine.now, memory=engine)
    assert not engine.open
    return found


def launch_bound(tokens: int) -> float:
    """A device that takes 1 s for up to 4096 tokens, and as long as there are tokens beyond."""
    return max(1.0, tokens / 4096)


def test_stops_where_a_doubling_brings_no_throughput_and_keeps_the_smaller() -> None:
    found = search(FakeEngine(launch_bound))
    assert (found.batch_tokens, found.stopped) == (4096, "throughput")
    assert [tried.batch_tokens for tried in found.tries] == [512, 1024, 2048, 4096, 8192]
    assert [tried.tokens_per_second for tried in found.tries] == [512, 1024, 2048, 4096, 4096]


def test_a_doubling_that_brings_more_than_three_per_cent_goes_on() -> None:
    """Throughput t^0.05 grows by 2^0.05 - 1 = 3.5 % with every doubling, t^0.04 by 2.8 %."""
    assert search(FakeEngine(lambda tokens: tokens**0.95)).stopped == "limit"
    slower = search(FakeEngine(lambda tokens: tokens**0.96))
    assert (slower.batch_tokens, slower.stopped) == (START_TOKENS, "throughput")


def test_first_calls_are_not_timed() -> None:
    assert search(FakeEngine(launch_bound, first_call=1000.0)) == search(FakeEngine(launch_bound))


def test_a_disturbed_round_does_not_count() -> None:
    engine = FakeEngine(launch_bound)
    plain = engine.features

    def disturbed(batch: Batch) -> None:
        plain(batch)
        engine.now += 50.0 if len(engine.batches) % ROUNDS == 0 else 0.0  # the last round of each

    engine.features = disturbed  # type: ignore[method-assign]
    assert search(engine) == search(FakeEngine(launch_bound))


def test_stops_at_out_of_memory_and_keeps_the_last_that_fitted() -> None:
    """10 GB are resident; batches of 512, 1024 and 2048 add 1, 8 and 64 GB, where the doubling made one expect 16."""
    engine = FakeEngine(lambda tokens: 1.0, lambda tokens: (tokens / 512) ** 3 * GIGABYTE, capacity=60 * GIGABYTE)
    found = search(engine)
    assert (found.batch_tokens, found.stopped) == (1024, "out_of_memory")
    last = found.tries[-1]
    assert (last.batch_tokens, last.tokens_per_second, last.peak_bytes) == (2048, None, None)
    assert engine.released == 1
    assert "out of memory" in found.lines()[-2]


def test_out_of_memory_at_once_leaves_the_first_budget() -> None:
    found = search(FakeEngine(lambda tokens: 1.0, lambda tokens: 200 * GIGABYTE))
    assert (found.batch_tokens, found.stopped, len(found.tries)) == (START_TOKENS, "out_of_memory", 1)


@pytest.mark.parametrize(("gigabytes", "wanted"), [(22.4, 2048), (22.6, 4096)])
def test_stops_before_memory_ends(gigabytes: float, wanted: int) -> None:
    """10 GB resident and 1 GB for every 512 tokens: the step to t tokens is taken while 10 + t / 512 <= 0.8 of the capacity; for
    4096 tokens that is from 22.5 GB on."""
    engine = FakeEngine(lambda tokens: 1.0, lambda tokens: tokens / 512 * GIGABYTE, capacity=gigabytes * GIGABYTE)
    found = search(engine)
    assert (found.batch_tokens, found.stopped) == (wanted, "memory")
    assert found.tries[-1].peak_bytes == (10 + wanted // 512) * GIGABYTE


def test_no_budget_exceeds_a_work_unit() -> None:
    found = search(FakeEngine(lambda tokens: 1.0))
    assert (found.batch_tokens, found.stopped) == (MOST_TOKENS, "limit")


def test_batches_are_long_and_short_samples_within_the_budget() -> None:
    engine = FakeEngine(launch_bound)
    search(engine, max_tokens=1000)
    shapes = list(dict.fromkeys(tuple(batch.ids_BT.shape) for batch in engine.batches))
    assert shapes[:4] == [(1, 512), (2, 250), (1, 1000), (4, 250)]
    assert shapes[-2:] == [(8, 1000), (32, 250)]
    for batch in engine.batches:
        assert batch.attention_BT.all()
        assert batch.loss_BT[:, 1:].all()
        assert not batch.loss_BT[:, 0].any()
        assert len(batch.ids_BT.unique()) > 20  # of 50


def test_packed_batches_are_timed_where_samples_will_be_packed() -> None:
    engine = FakeEngine(launch_bound)
    find_batch_tokens(engine, max_tokens=256, layout="packed", clock=lambda: engine.now, memory=engine)
    assert {batch.ids_BT.shape[0] for batch in engine.batches} == {1}
    assert {batch.samples for batch in engine.batches} >= {2, 8, 4, 16}


def test_no_sample_is_longer_than_the_model_has_positions() -> None:
    engine = FakeEngine(launch_bound, positions=128)
    search(engine, max_tokens=1000)
    assert {batch.ids_BT.shape[1] for batch in engine.batches} == {128, 32}


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    engine = FakeEngine(lambda tokens: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search(engine)


@pytest.mark.slow
def test_a_real_engine_on_the_cpu() -> None:
    """GPT-2 here has 512 positions: a longer sample would be an error."""
    model, before = tiny_gpt2(), ProcessMemory()
    engine = GradientEngine(model, find_sites(model).input_groups, proj_rank=4, k=64, seed=0)
    found = find_batch_tokens(engine, max_tokens=1024)
    assert found.batch_tokens in [tried.batch_tokens for tried in found.tries[-2:]]
    assert before.capacity > before.resident > 10**7
    assert all((tried.peak_bytes or 0) >= before.resident for tried in found.tries)
    assert all((tried.tokens_per_second or 0) > 0 for tried in found.tries)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
