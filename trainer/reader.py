"""Samples of one stream generation by rank: from memory, a local disk, or the store, checked wherever they come from."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

from schemas.disk_cache import DiskCache
from schemas.errors import CorruptFile
from schemas.ids import content_id
from schemas.patience import Patience
from schemas.shards import (
    RankedSample,
    ShardEntry,
    StreamIndex,
    check_shard,
    decode_record,
    decode_shard,
    missing_shard,
)
from schemas.storage import join

log = logging.getLogger(__name__)


class ShardReader:
    """Reads samples by rank.

    With `whole`, shards are read whole, their SHA-256 is checked and they are held decoded, the `cache_bytes` used last;
    without, every sample by a range, and its content hash is checked. With a `disk`, shards are taken from there: all of
    them in turn where they are read `in_turn`; otherwise the first that fit into it together, and the rest as without a
    disk, because shards that displace each other would be fetched whole for every sample.
    """

    def __init__(
        self,
        url: str,
        index: StreamIndex,
        *,
        whole: bool,
        in_turn: bool,
        cache_bytes: int,
        disk: DiskCache | None,
        patience: Patience,
    ) -> None:
        self.url, self.index, self.whole = url, index, whole
        self._cache_bytes, self._disk, self._patience = cache_bytes, disk, patience
        self._firsts = [shard.rank_first for shard in index.shards]
        self._held: OrderedDict[str, tuple[int, list[RankedSample]]] = OrderedDict()
        self._on_disk: set[str] = set()
        if disk is not None:
            together = 0
            for shard in index.shards:
                together += shard.bytes
                if in_turn or together <= disk.limit_bytes:
                    self._on_disk.add(shard.name)

    def read(self, ranks: Sequence[int]) -> dict[int, RankedSample]:
        """The samples of these ranks. Raises `CorruptFile` naming a shard that is damaged or gone."""
        by_shard: dict[int, list[int]] = {}
        for rank in ranks:
            by_shard.setdefault(bisect_right(self._firsts, rank) - 1, []).append(rank)
        found: dict[int, RankedSample] = {}
        for number, wanted in sorted(by_shard.items()):
            shard = self.index.shards[number]
            if self.whole:
                samples = self._samples(shard)
                found.update({rank: samples[rank - shard.rank_first] for rank in wanted})
            else:
                found.update(self._ranges(shard, wanted))
        return found

    def _samples(self, shard: ShardEntry) -> list[RankedSample]:
        if shard.name in self._held:
            self._held.move_to_end(shard.name)
            return self._held[shard.name][1]
        where = join(self.url, shard.name)
        samples = list(decode_shard(self._body(shard), shard, where))
        if [ranked.rank for ranked in samples] != list(range(shard.rank_first, shard.rank_last + 1)):
            raise CorruptFile(
                f"{where} does not hold ranks {shard.rank_first} to {shard.rank_last}; run `lehr export` again"
            )
        self._held[shard.name] = (shard.bytes, samples)
        while len(self._held) > 1 and sum(size for size, _ in self._held.values()) > self._cache_bytes:
            self._held.popitem(last=False)
        return samples

    def _body(self, shard: ShardEntry) -> bytes:
        if self._disk is not None and shard.name in self._on_disk:
            handle = self._disk.open(shard.sha256, shard.bytes, lambda: self._fetch(shard))
            if handle is not None:
                with handle:
                    return handle.read()
        return self._fetch(shard)

    def _fetch(self, shard: ShardEntry) -> bytes:
        where = join(self.url, shard.name)
        try:
            return check_shard(self._patience.whole(where, shard.bytes), shard, where)
        except FileNotFoundError as error:
            raise missing_shard(where, self.index) from error

    def _ranges(self, shard: ShardEntry, ranks: list[int]) -> dict[int, RankedSample]:
        where = join(self.url, shard.name)
        spans = [shard.offsets[rank - shard.rank_first] for rank in ranks]
        local = self._local_ranges(shard, spans)
        if local is not None:
            assert self._disk is not None
            try:
                return _checked(local, ranks, f"the cached copy of {where}")
            except CorruptFile as error:
                log.warning("%s; it is read again", error)
                self._disk.forget(shard.sha256)
        try:
            bodies = self._patience.ranges(where, spans)
        except FileNotFoundError as error:
            raise missing_shard(where, self.index) from error
        return _checked(bodies, ranks, where)

    def _local_ranges(self, shard: ShardEntry, spans: list[tuple[int, int]]) -> list[bytes] | None:
        if self._disk is None or shard.name not in self._on_disk:
            return None
        handle = self._disk.open(shard.sha256, shard.bytes, lambda: self._fetch(shard))
        if handle is None:
            return None
        bodies = []
        with handle:
            for start, size in spans:
                handle.seek(start)
                bodies.append(handle.read(size))
        return bodies


def _checked(bodies: list[bytes], ranks: list[int], where: str) -> dict[int, RankedSample]:
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
