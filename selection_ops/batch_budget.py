"""The token budget of a batch, found by trying: double it until memory or throughput says stop.

Legend: B samples in a batch, T tokens.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from schemas.spec import BatchLayout
from selection_ops.batching import Batch, collate, is_out_of_memory
from selection_ops.encoding import Encoded

log = logging.getLogger(__name__)

START_TOKENS = 512
"""The first budget tried."""
MOST_TOKENS = 65_536
"""The last budget tried: the tokens of a work unit, by default, which no batch crosses."""
LEAST_GROWTH = 0.03
"""A doubling that brings less throughput than this is not worth its memory."""
MEMORY_SHARE = 0.8
"""Share of the memory that a batch may be expected to reach; the rest is for fragmentation and for samples that differ from those tried."""
ROUNDS = 4
"""Repetitions of a batch, of which the fastest counts: the first also compiles kernels, and whatever else a machine does only slows one down."""

Stopped = Literal["throughput", "memory", "out_of_memory", "limit"]


class Memory(Protocol):
    """What a batch takes on the device that runs it, in bytes."""

    resident: int
    """Held before any batch: weights, projections, and whatever else the process has."""
    capacity: int
    """What this process can have in all."""

    def start(self) -> None:
        """Begin to watch for a peak."""

    def finish(self) -> int:
        """Wait until the device has done what it was given; the peak since `start`."""

    def release(self) -> None:
        """Give back what a failed batch left behind."""


class CudaMemory:
    """Memory of one CUDA device, as torch's allocator reserves it: what fragmentation takes is taken."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self.resident = torch.cuda.memory_reserved(device)
        free, _ = torch.cuda.mem_get_info(device)
        self.capacity = free + self.resident

    def start(self) -> None:
        """As in the protocol; blocks kept from the batch before would count as this one's."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def finish(self) -> int:
        """As in the protocol."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)

    def release(self) -> None:
        """As in the protocol. The failed batch's tensors may hang in reference cycles of its traceback."""
        gc.collect()
        torch.cuda.empty_cache()


class ProcessMemory:
    """Memory of this process on a CPU. Its peak never falls, so batches are to be tried in growing order."""

    def __init__(self) -> None:
        self.resident = self.finish()
        self.capacity = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def start(self) -> None:
        """Nothing to do: the kernel always watches."""

    def finish(self) -> int:
        """As in the protocol."""
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak

    def release(self) -> None:
        """As in the protocol."""
        gc.collect()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetTry:
    """One budget and what came of it."""

    batch_tokens: int
    tokens: int
    """Tokens of the batches that were timed, once each."""
    tokens_per_second: float | None
    """None where memory ran out."""
    peak_bytes: int | None
    """Most memory held at once, the model included; None where memory ran out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetSearch:
    """The budget found, what was tried, in order, and why it ended there."""

    batch_tokens: int
    tries: tuple[BudgetTry, ...]
    stopped: Stopped
    """`throughput`: the last doubling brought less than 3 % more tokens per second; `memory`: the next would be expected to pass 80 % of
    it; `out_of_memory`: the last did not fit; `limit`: the next is larger than a work unit."""

    def lines(self) -> list[str]:
        """The table as text, a line for each try and one for the result."""
        found = [
            f"{tried.batch_tokens:>7,} tokens: out of memory"
            if tried.tokens_per_second is None or tried.peak_bytes is None
            else f"{tried.batch_tokens:>7,} tokens: {tried.tokens_per_second:,.0f} tokens/s, peak {tried.peak_bytes / 1e9:.2f} GB"
            for tried in self.tries
        ]
        return [*found, f"batches of {self.batch_tokens:,} tokens; stopped by {self.stopped.replace('_', ' ')}"]


def find_batch_tokens(
    engine: Any,
    *,
    max_tokens: int,
    layout: BatchLayout = "padded",
    clock: Callable[[], float] = time.perf_counter,
    memory: Memory | None = None,
) -> BudgetSearch:
    """The smallest budget whose double is hardly faster, or the largest that memory allows.

    `engine` is a `GradientEngine`, not entered. Every budget is timed on two batches of random tokens, filled as sorted samples fill
    them: of samples of `max_tokens` (no more than the budget, or than the model has positions for) and of samples a quarter as long.
    Where even the first budget runs out of memory it is returned, and scoring will halve its batches. Times are the machine's, so another run may
    find another budget: it is found once, when a scoring is declared. Raises what the model raises other than for want of memory.
    """
    model = engine.model
    device = next(model.parameters()).device
    config = model.config.get_text_config()
    longest = min(max_tokens, getattr(config, "max_position_embeddings", None) or max_tokens)
    tries: list[BudgetTry] = []
    chosen = batch_tokens = START_TOKENS
    stopped: Stopped | None = None
    with engine:
        if memory is None:
            memory = CudaMemory(device) if device.type == "cuda" else ProcessMemory()
        while stopped is None:
            tried = _try(engine, batch_tokens, longest, layout, clock, memory)
            before = tries[-1].tokens_per_second if tries else None
            tries.append(tried)
            if tried.tokens_per_second is None or tried.peak_bytes is None:
                stopped = "out_of_memory"
            elif before is not None and tried.tokens_per_second < (1 + LEAST_GROWTH) * before:
                stopped = "throughput"
            else:
                chosen = batch_tokens
                if 2 * batch_tokens > MOST_TOKENS:
                    stopped = "limit"
                elif tried.peak_bytes + (tried.peak_bytes - memory.resident) > MEMORY_SHARE * memory.capacity:
                    stopped = "memory"  # what a batch adds to the resident memory doubles with it
            batch_tokens *= 2
    found = BudgetSearch(batch_tokens=chosen, tries=tuple(tries), stopped=stopped)
    for line in found.lines():
        log.info("%s", line)
    return found


def _try(
    engine: Any, batch_tokens: int, longest: int, layout: BatchLayout, clock: Callable[[], float], memory: Memory
) -> BudgetTry:
    lengths = sorted({max(2, min(batch_tokens, length)) for length in (longest, longest // 4)}, reverse=True)
    sizes = [(max(1, batch_tokens // length), length) for length in lengths]
    tokens = sum(count * length for count, length in sizes)
    rate: float | None = None
    peak: int | None = None
    try:
        memory.start()
        batches = [_random_batch(engine.model, count, length, layout) for count, length in sizes]
        rate = tokens / sum(_seconds(engine, batch, clock, memory) for batch in batches)
        peak = memory.finish()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    if peak is None:
        memory.release()  # out here, where no traceback holds the batch any more
        rate = None
    return BudgetTry(batch_tokens=batch_tokens, tokens=tokens, tokens_per_second=rate, peak_bytes=peak)


def _seconds(engine: Any, batch: Batch, clock: Callable[[], float], memory: Memory) -> float:
    """Of the fastest of a few rounds."""
    rounds = []
    for _ in range(ROUNDS):
        memory.finish()  # kernels still under way would be billed to this round
        start = clock()
        engine.features(batch)
        memory.finish()
        rounds.append(clock() - start)
    return min(rounds)


def _random_batch(model: Any, count: int, length: int, layout: BatchLayout) -> Batch:
    """`count` samples of `length` random tokens, loss on every token but the first."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids_BT = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    mask = [False] + [True] * (length - 1)
    samples = [Encoded(ids=ids, loss_mask=mask) for ids in ids_BT]
    return collate(samples, device=next(model.parameters()).device, layout=layout)
