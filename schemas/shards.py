"""Ranked WebDataset shards: the tar bytes and the stream index.

One `.json` member a sample, its key the zero-padded rank. The tar is written with fixed times, owners and modes, so equal
samples give equal bytes; every offset stands in the index, so that a sample can be read by one ranged request.
"""

from __future__ import annotations

import dataclasses
import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from schemas.errors import CorruptFile, InputError
from schemas.fingerprint import fingerprint, plain, pretty_json
from schemas.sample import Sample, counting, sample_from_dict, sample_to_dict
from schemas.storage import read_bytes, sha256

STREAM_VERSION = 1
KEY_DIGITS = 12
_BLOCK = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankedSample:
    """A sample with its place in the stream."""

    sample: Sample
    rank: int
    selection_weight: float = 1.0
    tokens: int = 0
    loss_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One shard as the index lists it; ranks are first and last, both inclusive."""

    name: str
    rows: int
    tokens: int
    rank_first: int
    rank_last: int
    domains: dict[str, int]
    bytes: int
    sha256: str
    offsets: tuple[tuple[int, int], ...]
    """(offset, size) of every member's JSON, in rank order, in bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamIndex:
    """Everything a reader needs to know about one generation of a stream."""

    stream: str
    generation: int
    selection: str
    encoding: dict[str, Any]
    """The encoding spec the samples were cut with."""
    tokenizer: str
    """Fingerprint of the tokenizer the samples were cut with."""
    shards: tuple[ShardEntry, ...]
    target: tuple[ShardEntry, ...] = ()
    evaluation: tuple[ShardEntry, ...] = ()
    version: int = STREAM_VERSION

    @property
    def rows(self) -> int:
        """Samples in the stream."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in the stream."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the generation's content."""
        return fingerprint(self)


def encode_record(ranked: RankedSample) -> bytes:
    """JSON of one member."""
    record = {
        **sample_to_dict(ranked.sample),
        "rank": ranked.rank,
        "selection_weight": ranked.selection_weight,
        "tokens": ranked.tokens,
        "loss_tokens": ranked.loss_tokens,
    }
    return orjson.dumps(record, option=orjson.OPT_SORT_KEYS)


def decode_record(data: bytes, where: str) -> RankedSample:
    """Inverse of `encode_record`; never anything but JSON. Raises `CorruptFile` naming `where`."""
    try:
        record = orjson.loads(data)
        if not isinstance(record, dict):
            raise ValueError("not a JSON object")
        weight = record["selection_weight"]
        # A text such as "NaN" is a number to float().
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"selection_weight is {weight!r:.50}, not a finite number of at least 0")
        return RankedSample(
            sample=sample_from_dict(record, where),
            rank=counting(record["rank"], "rank"),
            selection_weight=float(weight),
            tokens=counting(record["tokens"], "tokens"),
            loss_tokens=counting(record["loss_tokens"], "loss_tokens"),
        )
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CorruptFile(f"{where}: not a sample of a ranked stream ({error})") from error


def encode_shard(
    name: str, members: Sequence[tuple[int, bytes]], domains: dict[str, int], tokens: int
) -> tuple[bytes, ShardEntry]:
    """Tar bytes of (rank, JSON) members, already in rank order, and the shard's index entry."""
    buffer = io.BytesIO()
    offsets = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for rank, data in members:
            info = tarfile.TarInfo(f"{rank:0{KEY_DIGITS}d}.json")
            info.size = len(data)
            info.mode = 0o644
            offsets.append((buffer.tell() + _BLOCK, len(data)))
            tar.addfile(info, io.BytesIO(data))
    body = buffer.getvalue()
    entry = ShardEntry(
        name=name,
        rows=len(members),
        tokens=tokens,
        rank_first=members[0][0],
        rank_last=members[-1][0],
        domains=dict(sorted(domains.items())),
        bytes=len(body),
        sha256=sha256(body),
        offsets=tuple(offsets),
    )
    return body, entry


def index_bytes(index: StreamIndex) -> bytes:
    """`index.json`."""
    return pretty_json({**plain(index), "fingerprint": index.fingerprint})


def _shards(records: list[dict[str, Any]]) -> tuple[ShardEntry, ...]:
    return tuple(
        ShardEntry(**{**record, "offsets": tuple((int(a), int(b)) for a, b in record["offsets"])}) for record in records
    )


def read_index(url: str) -> StreamIndex:
    """The index of the stream generation at folder `url`, checked against its own fingerprint."""
    try:
        record = orjson.loads(read_bytes(f"{url}/index.json"))
    except FileNotFoundError as error:
        raise InputError(f"{url} has no index.json, so it is not a finished stream; run `lehr export`") from error
    except ValueError as error:
        raise CorruptFile(f"{url}/index.json is not JSON ({error})") from error
    try:
        stored = record.pop("fingerprint")
        index = StreamIndex(
            **{**record, **{name: _shards(record[name]) for name in ("shards", "target", "evaluation")}}
        )
        found = index.fingerprint
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CorruptFile(f"{url}/index.json is damaged ({error})") from error
    if index.version != STREAM_VERSION:
        raise InputError(f"{url}/index.json has version {index.version}; this Lehr reads {STREAM_VERSION}")
    if found != stored:
        raise CorruptFile(f"{url}/index.json does not match its fingerprint {stored}; it was edited or damaged")
    return index


def missing_shard(where: str, index: StreamIndex | None = None) -> CorruptFile:
    """The error of a shard that does not stand where its index says."""
    whose = f"generation {index.generation} of stream {index.stream!r}" if index is not None else "the stream"
    return CorruptFile(
        f"{where} is listed in the index but missing: {whose} no longer stands whole. Run `lehr export` again, or choose another "
        "generation with --generation"
    )


def check_shard(body: bytes, entry: ShardEntry, where: str) -> bytes:
    """The bytes of a shard if they are those that the index lists; raises `CorruptFile` otherwise."""
    if sha256(body) != entry.sha256:
        raise CorruptFile(
            f"{where} differs from the index ({len(body)} bytes, {entry.bytes} listed); it is truncated or damaged. Run `lehr export` again"
        )
    return body


def decode_shard(body: bytes, entry: ShardEntry, where: str) -> Iterator[RankedSample]:
    """Every sample of a whole shard, in rank order, after its hash was checked."""
    check_shard(body, entry, where)
    for number, (offset, size) in enumerate(entry.offsets):
        yield decode_record(body[offset : offset + size], f"{where} member {number}")


def read_shard(url: str, entry: ShardEntry) -> Iterator[RankedSample]:
    """Every sample of the shard in folder `url`, in rank order, after its hash was checked against the index."""
    where = f"{url}/{entry.name}"
    try:
        body = read_bytes(where)
    except FileNotFoundError as error:
        raise missing_shard(where) from error
    yield from decode_shard(body, entry, where)
