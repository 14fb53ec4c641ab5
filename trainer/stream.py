"""Reading a ranked stream: any order, any place, exact resume.

The order is a pure function of (seed, rows, epoch): position -> rank. A cursor is therefore one number.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from torch.utils.data import IterableDataset

from schemas.errors import CorruptFile, InputError
from schemas.ids import content_id
from schemas.shards import RankedSample, ShardEntry, StreamIndex, decode_record, read_index, read_shard
from schemas.storage import client_errors, filesystem, join

_BESIDE = {"target": "target", "evaluation": "eval"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offered:
    """A sample at its position in the order of the stream, from 0; positions run on over epochs."""

    position: int
    ranked: RankedSample


def _mix(value_N: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of 64-bit numbers, equal on every machine and in every numpy."""
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))


def shuffled_ranks(seed: int, rows: int, epoch: int) -> np.ndarray:
    """Permutation of 0..rows-1: the order of one epoch, int64, a pure function of its arguments."""
    with np.errstate(over="ignore"):
        start = _mix(np.array([seed & (2**64 - 1)], np.uint64))
        start = _mix(start + np.uint64(epoch) * np.uint64(0x9E3779B97F4A7C15))
        keys_N = _mix(start + np.arange(1, rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(keys_N, kind="stable")


class RankedStream(IterableDataset):
    """The samples of one stream generation, in shuffled or ranked order, over `epochs` passes.

    Iterating yields `Offered` from the cursor on and moves it; `state_dict` and `load_state_dict` save and restore it. A
    stream of at most `cache_bytes` is read in whole shards whose SHA-256 is checked; a larger one sample by sample, by
    ranged requests whose content hash is checked.
    """

    def __init__(
        self,
        url: str,
        *,
        order: Literal["shuffled", "ranked"] = "shuffled",
        seed: int = 0,
        epochs: int = 1,
        cache_bytes: int = 256 << 20,
    ) -> None:
        super().__init__()
        if order not in ("shuffled", "ranked"):
            raise InputError(f"unknown order {order!r}: choose one of shuffled, ranked")
        if epochs < 1:
            raise InputError(f"epochs must be at least 1, not {epochs}")
        self.url = url
        self.index: StreamIndex = read_index(url)
        if not self.index.rows:
            raise InputError(f"the stream at {url} holds no samples; select and export some")
        self.order, self.seed, self.epochs = order, seed, epochs
        self.position = 0
        self._cache_bytes = cache_bytes
        self._whole = sum(shard.bytes for shard in self.index.shards) <= cache_bytes or order == "ranked"
        self._firsts = [shard.rank_first for shard in self.index.shards]
        self._cache: OrderedDict[str, tuple[int, list[RankedSample]]] = OrderedDict()
        self._epoch_order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        """Samples over all epochs."""
        return self.index.rows * self.epochs

    def __iter__(self) -> Iterator[Offered]:
        while batch := self.take(1):
            yield batch[0]

    def rank_at(self, position: int) -> int:
        """Rank of the sample at a position of the order."""
        epoch, place = divmod(position, self.index.rows)
        if self.order == "ranked":
            return place
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = (epoch, shuffled_ranks(self.seed, self.index.rows, epoch))
        return int(self._epoch_order[1][place])

    def take(self, count: int) -> list[Offered]:
        """The next `count` samples, fewer at the end; moves the cursor behind them."""
        positions = range(self.position, min(self.position + count, len(self)))
        ranks = [self.rank_at(position) for position in positions]
        samples = self._read(ranks)
        self.position += len(positions)
        return [Offered(position=position, ranked=samples[rank]) for position, rank in zip(positions, ranks)]

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it is a cursor of."""
        return {
            "position": self.position,
            "stream": self.index.fingerprint,
            "order": self.order,
            "seed": self.seed,
            "epochs": self.epochs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises `InputError` naming what differs where it is of another stream or order."""
        mine = self.state_dict()
        for name in ("stream", "order", "seed", "epochs"):
            if state[name] != mine[name]:
                raise InputError(
                    f"the cursor was taken with {name} = {state[name]!r}, this stream has {mine[name]!r}; it cannot be continued"
                )
        self.position = int(state["position"])

    def _read(self, ranks: list[int]) -> dict[int, RankedSample]:
        by_shard: dict[int, list[int]] = {}
        for rank in ranks:
            by_shard.setdefault(bisect_right(self._firsts, rank) - 1, []).append(rank)
        found: dict[int, RankedSample] = {}
        for number, wanted in sorted(by_shard.items()):
            shard = self.index.shards[number]
            if self._whole:
                samples = self._shard(shard)
                found.update({rank: samples[rank - shard.rank_first] for rank in wanted})
            else:
                found.update(self._ranges(shard, wanted))
        return found

    def _shard(self, shard: ShardEntry) -> list[RankedSample]:
        if shard.name in self._cache:
            self._cache.move_to_end(shard.name)
            return self._cache[shard.name][1]
        samples = list(read_shard(self.url, shard))
        _check_ranks(join(self.url, shard.name), shard, samples)
        self._cache[shard.name] = (shard.bytes, samples)
        while len(self._cache) > 1 and sum(size for size, _ in self._cache.values()) > self._cache_bytes:
            self._cache.popitem(last=False)
        return samples

    def _ranges(self, shard: ShardEntry, ranks: list[int]) -> dict[int, RankedSample]:
        where = join(self.url, shard.name)
        fs, path = filesystem(where)
        spans = [shard.offsets[rank - shard.rank_first] for rank in ranks]
        starts, ends = [start for start, _ in spans], [start + size for start, size in spans]
        try:
            with client_errors("read", where):
                bodies = fs.cat_ranges([path] * len(spans), starts, ends, on_error="raise")
        except FileNotFoundError as error:
            raise CorruptFile(f"{where} is listed in the index but missing; run `lehr export` again") from error
        found = {}
        for rank, body in zip(ranks, bodies):
            ranked = decode_record(body, f"{where} rank {rank}")
            sample = ranked.sample
            if ranked.rank != rank or content_id(sample.text, sample.loss_spans) != sample.content_id:
                raise CorruptFile(
                    f"{where} rank {rank} differs from what was exported; it is damaged. Run `lehr export` again"
                )
            found[rank] = ranked
        return found


def _check_ranks(where: str, shard: ShardEntry, samples: list[RankedSample]) -> None:
    if [ranked.rank for ranked in samples] != list(range(shard.rank_first, shard.rank_last + 1)):
        raise CorruptFile(
            f"{where} does not hold ranks {shard.rank_first} to {shard.rank_last}; run `lehr export` again"
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
