"""Positions of an order, dealt to processes and workers: the cursor, taking, iterating, reading ahead.

Legend: P processes of a distributed job, W workers of a data loader in one of them, all of which read positions of one order.
"""

from __future__ import annotations

import abc
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

from torch.utils.data import IterableDataset, get_worker_info

from schemas.errors import InputError
from schemas.shards import RankedSample
from trainer.prefetch import Prefetcher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offered:
    """A sample at its position in the order that is read, from 0; positions run on over epochs and generations."""

    position: int
    ranked: RankedSample
    stream: str = ""
    """Name of the stream it comes from."""
    generation: int = 0
    """Generation of that stream."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dealing:
    """Which positions behind the cursor are whose: those of process p are p, p + P, p + 2P, ...; of these, workers take blocks in turn."""

    process: int = 0
    processes: int = 1
    worker: int = 0
    workers: int = 1
    block: int = 1

    def __post_init__(self) -> None:
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise InputError(f"process must lie in 0 ... processes - 1, not {self.process} of {self.processes}")
        if self.block < 1:
            raise InputError(f"worker_block must be at least 1, not {self.block}")

    def offset(self, number: int) -> int:
        """How far behind the cursor this reader's sample of that number lies."""
        turn, place = divmod(number, self.block)
        mine = turn * self.workers * self.block + self.worker * self.block + place
        return mine * self.processes + self.process

    def count(self, left: int) -> int:
        """Samples of this reader among `left` positions behind the cursor; processes get equally many."""
        turns, rest = divmod(left // self.processes, self.workers * self.block)
        return turns * self.block + min(max(rest - self.worker * self.block, 0), self.block)


class Positioned(IterableDataset, abc.ABC):
    """A dataset whose samples have positions, with a cursor that moves as they are taken.

    Iterating goes on at the cursor. In a worker of a data loader it yields the worker's samples alone.
    """

    def __init__(self, *, process: int, processes: int, worker_block: int, prefetch: int) -> None:
        super().__init__()
        if prefetch < 0:
            raise InputError(f"prefetch must be at least 0, not {prefetch}")
        self.position = self.first
        """Where the cursor stands: the positions before it have been dealt."""
        self._dealing = Dealing(process=process, processes=processes, block=worker_block)
        self._prefetch = prefetch
        self._taken = 0  # in a worker, whose cursor stays where the iteration began
        self._workers = 0  # that a cursor was saved in, 0 outside of workers
        self._renew()

    def _renew(self) -> None:
        """No thread yet: in the beginning, and in a copy."""
        self._start = 0
        self._ahead: Prefetcher | None = None
        self._closing = threading.Event()

    @property
    @abc.abstractmethod
    def end(self) -> int:
        """One past the last position."""

    @property
    def first(self) -> int:
        """The first position."""
        return 0

    @abc.abstractmethod
    def start_epoch(self, epoch: int) -> None:
        """Put the cursor on the first position, of pass number `epoch` over the whole: with every pass another order."""

    @abc.abstractmethod
    def at(self, positions: Sequence[int]) -> list[Offered]:
        """The samples at positions of the order; the cursor stays where it is."""

    @property
    def exhausted(self) -> bool:
        """Whether nothing is left behind the cursor."""
        return not self._dealing.count(self.end - self.position)

    def __len__(self) -> int:
        """Samples that this process is dealt from the first position to the last."""
        return (self.end - self.first) // self._dealing.processes

    def __iter__(self) -> Iterator[Offered]:
        self._enter_worker()  # now, not with the first sample: a loader may ask for the state before
        return self._walk()

    def _walk(self) -> Iterator[Offered]:
        try:
            while batch := self.take(1):
                yield batch[0]
        finally:
            self.close()

    def take(self, count: int) -> list[Offered]:
        """The next `count` samples, fewer at the end; moves the cursor behind them."""
        count = min(count, self._dealing.count(self.end - self.position) - self._taken)
        if count <= 0:
            return []
        if not self._prefetch:
            offered = self._numbered(range(self._taken, self._taken + count))
        else:
            offered = self._take_ahead(count)
        self._taken += count
        if self._dealing.workers == 1:
            self.position += count * self._dealing.processes
            self._taken = 0
        return offered

    def close(self) -> None:
        """End the thread that reads ahead, if there is one. The stream goes on from its cursor when it is asked again."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            self._closing.set()
            ahead.close()
            self._closing.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _numbered(self, numbers: Sequence[int]) -> list[Offered]:
        """Samples of this reader by number, counted from the cursor."""
        return self.at([self.position + self._dealing.offset(number) for number in numbers])

    def _read_on(self, places: Sequence[int]) -> list[Offered]:
        """As `_numbered`, counted from the start: what the thread calls while the cursor moves."""
        return self.at([self._start + self._dealing.offset(place) for place in places])

    def _take_ahead(self, count: int) -> list[Offered]:
        # The number of the next sample, counted from where the thread started: rounds of the cursor, or samples of a worker.
        if self._ahead is not None and self._ahead.alive:
            number = (self.position - self._start) // self._dealing.processes + self._taken
            if number != self._ahead.next:
                self.close()
        if self._ahead is None or not self._ahead.alive:
            self._start = self.position
            left = self._dealing.count(self.end - self.position)
            self._ahead = Prefetcher(self._read_on, self._taken, left, self._prefetch)
        try:
            return self._ahead.take(count)
        except BaseException:
            self.close()
            raise

    def _enter_worker(self) -> None:
        info = get_worker_info()
        workers = info.num_workers if info is not None else 0
        if self._workers and self._workers != workers:
            raise InputError(
                f"the cursor was taken in {self._workers} workers of a data loader, and there are {workers} now; use as many"
            )
        if info is not None:
            self._dealing = dataclasses.replace(self._dealing, worker=info.id, workers=info.num_workers)
            self._workers = workers if workers > 1 else 0

    def _cursor(self) -> dict[str, Any]:
        """What a state says of workers, where there are several."""
        if not self._workers:
            return {}
        return {"worker": {"workers": self._workers, "block": self._dealing.block, "taken": self._taken}}

    def _restore_cursor(self, position: int, state: dict[str, Any]) -> None:
        self.close()
        worker = state.get("worker")
        if worker and worker["block"] != self._dealing.block:
            raise InputError(
                f"the cursor was taken with worker_block = {worker['block']}, this stream has {self._dealing.block}; use the same"
            )
        self.position = int(position)
        self._workers = int(worker["workers"]) if worker else 0
        self._taken = int(worker["taken"]) if worker else 0

    def _pause(self, seconds: float) -> None:
        """The wait between two tries of a read; ends at once where nobody wants the sample any more."""
        if self._closing.wait(seconds):
            raise InterruptedError("reading ahead was ended")
