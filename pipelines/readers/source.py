"""Ranged reads of one corpus file, local or on any fsspec file system.

Blocks of several MiB by explicit ranges: sequential small reads through `fsspec.open` are slow on object stores and, with
some prefetchers, never return.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from schemas.errors import InputError, SourceChanged
from schemas.fingerprint import fingerprint
from schemas.ids import unit_id
from schemas.ranged import SeekableRanges
from schemas.spec import PlanSpec
from schemas.storage import client_errors, filesystem, join
from schemas.units import WorkUnit

BLOCK_BYTES = 8 << 20
HELD_BYTES = 64 << 20
"""A range up to this size is read once and held; a larger one is read twice, to be checked and to be used."""
BYTES_PER_TOKEN = 4
"""What estimates of tokens assume: about right for English text and byte-level BPE, high for code and JSON syntax."""

WAY_OUT = "put the planned file back, or run `lehr plan RUN CORPUS --extend` to plan the changed files again"


class Source:
    """One file below a corpus root."""

    def __init__(self, root: str, path: str) -> None:
        self._fs, base = filesystem(root)
        self._name = join(base, path)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._size: int | None = None
        self.url = join(root, path)

    @property
    def size(self) -> int:
        """Bytes in the file. Raises `SourceChanged` where it is gone."""
        if self._size is None:
            try:
                with client_errors("read", self.url):
                    self._size = os.stat(self._name).st_size if self._local else int(self._fs.info(self._name)["size"])
            except OSError as error:
                raise self._failed(error) from error
        return self._size

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` (exclusive), fewer where the file ends earlier."""
        return b"".join(self.blocks(start, end))

    def blocks(self, start: int, end: int) -> Iterator[bytes]:
        """The range in consecutive blocks, none empty; ends early where the file does."""
        try:
            if self._local:
                with open(self._name, "rb", buffering=0) as handle:
                    handle.seek(start)
                    while start < end and (block := handle.read(min(BLOCK_BYTES, end - start))):
                        start += len(block)
                        yield block
                return
            end = min(end, self.size)
            while start < end:
                with client_errors("read", self.url):
                    block = self._fs.cat_file(self._name, start=start, end=min(start + BLOCK_BYTES, end))
                if not block:
                    return
                start += len(block)
                yield block
        except OSError as error:
            raise self._failed(error) from error

    def open(self) -> io.BufferedReader:
        """A seekable binary file over the ranged reads."""
        return io.BufferedReader(_SeekableSource(self), 1 << 20 if self._local else BLOCK_BYTES)

    def _failed(self, error: Exception) -> Exception:
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return SourceChanged(f"{self.url} is gone; {WAY_OUT}")
        reason = getattr(error, "strerror", None) or str(error)
        return InputError(f"cannot read {self.url}: {reason}. Check that it exists and may be read by you")


class _SeekableSource(SeekableRanges):
    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source

    @property
    def size(self) -> int:
        return self._source.size

    def read_range(self, start: int, end: int) -> bytes:
        return self._source.read(start, end)


class RangeView:
    """Random access by file offset into a range; sequential readers fetch every block once.

    `data` is the range itself where it is held in memory; otherwise the latest block is kept.
    """

    def __init__(self, source: Source, start: int, end: int, data: bytes | None = None) -> None:
        self._source = source
        self.start = start
        self.end = end
        self._block = data if data is not None else b""
        self._at = start

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of the file, cut at the end of the range or of the file."""
        end = min(end, self.end)
        if start < self._at or end > self._at + len(self._block):
            if start >= end:
                return b""
            self._block = self._source.read(start, min(max(end, start + BLOCK_BYTES), self.end))
            self._at = start
        return self._block[start - self._at : end - self._at]

    def blocks(self) -> Iterator[bytes]:
        """The whole range in order."""
        if len(self._block) == self.end - self.start and self._at == self.start:
            yield from [self._block] if self._block else []
        else:
            yield from self._source.blocks(self.start, self.end)


def new_digest() -> Any:
    """The hash of ranges: 128-bit BLAKE2b over the bytes alone."""
    return hashlib.blake2b(digest_size=16)


def hash_range(source: Source, start: int, end: int) -> str:
    """Fingerprint of a range of bytes."""
    digest = new_digest()
    for block in source.blocks(start, end):
        digest.update(block)
    return digest.hexdigest()


def checked_view(source: Source, unit: WorkUnit) -> RangeView:
    """The unit's range, after its bytes were compared with the plan. Raises `SourceChanged` naming the file."""
    data = None
    if unit.byte_end - unit.byte_start <= HELD_BYTES:
        data = source.read(unit.byte_start, unit.byte_end)
        digest = new_digest()
        digest.update(data)
        found = digest.hexdigest()
    else:
        found = hash_range(source, unit.byte_start, unit.byte_end)
    if found != unit.source_fingerprint:
        raise source_changed(source, f"bytes {unit.byte_start:,} to {unit.byte_end:,}")
    return RangeView(source, unit.byte_start, unit.byte_end, data)


def source_changed(source: Source, what: str) -> SourceChanged:
    """The error for a file that is not the planned one."""
    return SourceChanged(f"{source.url} differs from the plan ({what}): it was changed after it was planned; {WAY_OUT}")


def make_unit(
    spec: PlanSpec,
    *,
    path: str,
    format: str,
    byte_start: int,
    byte_end: int,
    row_start: int,
    row_count: int,
    source_fingerprint: str,
    estimated_tokens: int,
) -> WorkUnit:
    """A work unit with its id, which covers everything of the spec that changes the rows of a range."""
    columns = fingerprint([format, spec.columns, spec.max_row_bytes])
    return WorkUnit(
        unit_id=unit_id(path, byte_start, byte_end, row_start, row_count, source_fingerprint, columns),
        path=path,
        format=format,
        byte_start=byte_start,
        byte_end=byte_end,
        row_start=row_start,
        row_count=row_count,
        source_fingerprint=source_fingerprint,
        estimated_tokens=estimated_tokens,
    )
