"""Reading a ranked stream: any order, any place, exact resume.

The order is a pure function of (seed, rows, epoch): position -> rank. A cursor is therefore one number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from schemas.disk_cache import DiskCache
from schemas.errors import InputError
from schemas.patience import Patience
from schemas.shards import RankedSample, StreamIndex, read_index, read_shard
from schemas.storage import join
from trainer.order import shuffled_ranks
from trainer.positioned import Offered, Positioned
from trainer.reader import ShardReader

__all__ = ["Offered", "RankedStream", "StreamReading", "read_beside", "shuffled_ranks", "stream_url"]

_BESIDE = {"target": "target", "evaluation": "eval"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamReading:
    """How a stream is read; nothing of it changes what is read."""

    cache_bytes: int = 256 << 20
    """Memory for whole shards. A stream of at most this size is read in whole shards whose SHA-256 is checked, a larger one sample
    by sample, by ranges whose content hash is checked."""
    cache_dir: str = ""
    """Folder on a local disk in which shards are kept, shared by any number of processes; empty keeps none."""
    cache_disk_bytes: int = 16 << 30
    """Bound of that folder; the least recently used shards go first."""
    read_attempts: int = 4
    """Tries of a read that times out or whose connection breaks."""
    read_limit_s: float = 120.0
    """Seconds that a try may take, per 8 MiB."""
    sleep: Callable[[float], None] | None = None
    """What waits between tries, in place of a wait that `close` ends."""


class RankedStream(Positioned):
    """The samples of one stream generation, in shuffled or ranked order, over `epochs` passes.

    Iterating yields `Offered` from the cursor on and moves it; `state_dict` and `load_state_dict` save and restore it. With
    `prefetch`, a thread reads that many samples ahead; `close` ends it. In a job of several `processes` sample i behind the
    cursor goes to process i modulo their number, and all get equally many; workers of a data loader share a process's samples in turns of
    `worker_block` (the loader's batch size gives the order of a loader without workers). `first` is the number of the first
    position: where an earlier generation was left.
    """

    def __init__(
        self,
        url: str,
        *,
        order: Literal["shuffled", "ranked"] = "shuffled",
        seed: int = 0,
        epochs: int = 1,
        first: int = 0,
        process: int = 0,
        processes: int = 1,
        worker_block: int = 1,
        prefetch: int = 0,
        reading: StreamReading | None = None,
        **changes: Any,
    ) -> None:
        """`changes` are fields of `reading`. Raises `InputError` for a folder without a finished stream and impossible options."""
        if order not in ("shuffled", "ranked"):
            raise InputError(f"unknown order {order!r}: choose one of shuffled, ranked")
        if epochs < 1:
            raise InputError(f"epochs must be at least 1, not {epochs}")
        self._first = first
        super().__init__(process=process, processes=processes, worker_block=worker_block, prefetch=prefetch)
        self.url, self.order, self.seed, self.epochs = url, order, seed, epochs
        self.reading = dataclasses.replace(reading or StreamReading(), **changes)
        self.index: StreamIndex = read_index(url)
        if not self.index.rows:
            raise InputError(f"the stream at {url} holds no samples; select and export some")
        self._pass = 0
        self._epoch_order: tuple[int, np.ndarray] | None = None
        self.reader = self._reader()

    @property
    def first(self) -> int:
        """The first position."""
        return self._first

    @property
    def end(self) -> int:
        """One past the last position."""
        return self._first + self.index.rows * self.epochs

    @property
    def name(self) -> str:
        """Name of the stream."""
        return self.index.stream

    def rank_at(self, position: int) -> int:
        """Rank of the sample at a position of the order."""
        epoch, place = divmod(position - self._first, self.index.rows)
        if self.order == "ranked":
            return place
        epoch += self._pass * self.epochs
        known = self._epoch_order  # one look: the thread that reads ahead may be at another epoch
        if known is None or known[0] != epoch:
            known = self._epoch_order = (epoch, shuffled_ranks(self.seed, self.index.rows, epoch))
        return int(known[1][place])

    def at(self, positions: Sequence[int]) -> list[Offered]:
        """The samples at positions of the order; the cursor stays where it is."""
        ranks = [self.rank_at(position) for position in positions]
        samples, index = self.reader.read(ranks), self.index
        return [
            Offered(position=position, ranked=samples[rank], stream=index.stream, generation=index.generation)
            for position, rank in zip(positions, ranks)
        ]

    def start_epoch(self, epoch: int) -> None:
        """Put the cursor on the first position, of pass number `epoch` over the whole: with every pass another order."""
        self._restore_cursor(self._first, {})
        self._pass = epoch

    def identity(self) -> dict[str, Any]:
        """What positions are positions of."""
        return {
            "stream": self.index.fingerprint,
            "order": self.order,
            "seed": self.seed,
            "epochs": self.epochs,
            "first": self._first,
        }

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it is a cursor of."""
        where = {"position": self.position, "pass": self._pass, "generation": self.index.generation}
        return {**where, **self.identity(), **self._cursor()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises `InputError` naming what differs where it is of another stream or order."""
        refuse_other(self.identity(), state)
        self._pass = int(state.get("pass", 0))
        self._restore_cursor(state["position"], state)

    def _reader(self) -> ShardReader:
        reading, ranked = self.reading, self.order == "ranked"
        sleep = reading.sleep or self._pause
        return ShardReader(
            self.url,
            self.index,
            whole=ranked or sum(shard.bytes for shard in self.index.shards) <= reading.cache_bytes,
            in_turn=ranked,
            cache_bytes=reading.cache_bytes,
            disk=DiskCache(reading.cache_dir, reading.cache_disk_bytes) if reading.cache_dir else None,
            patience=Patience(attempts=reading.read_attempts, limit_s=reading.read_limit_s, sleep=sleep),
        )

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned gets a copy without threads and caches.
        return {**self.__dict__, "_ahead": None, "_closing": None, "reader": None, "_epoch_order": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._renew()
        self.reader = self._reader()


def refuse_other(mine: dict[str, Any], state: dict[str, Any], what: str = "this stream") -> None:
    """Raise `InputError` naming the first thing in which a cursor differs from what it should be a cursor of."""
    for name, value in mine.items():
        found = state.get(name, 0 if name == "first" else None)  # 0: a cursor from before streams could be followed
        if found != value:
            raise InputError(
                f"the cursor was taken with {name} = {found!r}, {what} has {value!r}; it cannot be continued"
            )


def read_beside(url: str, index: StreamIndex, part: Literal["target", "evaluation"]) -> list[RankedSample]:
    """The target or evaluation samples that stand beside the shards of a stream; empty where there are none."""
    folder = join(url, _BESIDE[part])
    return [ranked for shard in getattr(index, part) for ranked in read_shard(folder, shard)]


def stream_url(run_url: str, stream: str, generation: int, finished: dict[str, list[int]]) -> str:
    """URL of a stream generation. `finished` lists the run's generations by stream name.

    A `stream` with a slash is taken as a path or URL. Raises `InputError` listing what there is.
    """
    if "/" in stream:
        return stream.rstrip("/")
    known = finished.get(stream, [])
    if not known:
        there = ", ".join(sorted(finished)) or "none"
        raise InputError(f"{run_url} has no finished stream {stream!r} (finished: {there}); run `lehr export` first")
    if generation and generation not in known:
        raise InputError(f"stream {stream!r} has no generation {generation}; it has {', '.join(map(str, known))}")
    return join(run_url, "streams", stream, f"gen-{generation or known[-1]:06d}")
