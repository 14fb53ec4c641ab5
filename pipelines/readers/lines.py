"""Lines of a byte stream: where units are cut, and the lines themselves, in bounded memory.

A row is a line that holds anything but ASCII white space. Lines end in LF or CRLF; the last one may end in neither.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipelines.readers.source import new_digest

_FOLLOWED_BY_BLANK = re.compile(rb"\n(?=[ \t\r\x0b\x0c]*\n)")
_BLANK = re.compile(rb"[ \t\r\x0b\x0c]*\n")
_PREFIX_BYTES = 1024


@dataclasses.dataclass(slots=True)
class Cut:
    """A range of whole lines; offsets are relative to where the stream began."""

    start: int
    end: int
    rows: int
    digest: str


def count_rows(block: bytes, start: int, end: int) -> int:
    """Rows in `block[start:end]`, which begins at a line's start and ends behind a line feed."""
    if start == end:
        return 0
    blank = sum(1 for _ in _FOLLOWED_BY_BLANK.finditer(block, start, end))
    return block.count(b"\n", start, end) - blank - (_BLANK.match(block, start, end) is not None)


def _end_of_rows(block: bytes, start: int, end: int, rows: int) -> int:
    """Where the `rows`-th row of `block[start:end]` ends."""
    while rows:
        line_end = block.index(b"\n", start, end) + 1
        rows -= bool(block[start:line_end].strip())
        start = line_end
    return start


class _Cutter:
    """Greedy cuts: a unit is the longest run of whole lines within the limit, and at least one line.

    Only digests are kept of a line that reaches over the end of a block: `joined` of unit and line, `alone` of the line.
    """

    def __init__(self, limit_bytes: int, limit_rows: int) -> None:
        self.limit_bytes = limit_bytes
        self.rows_left = limit_rows or -1
        self.start = 0
        self.digest = new_digest()
        self.bytes = 0
        self.rows = 0
        self.line_bytes = 0
        self.line_blank = True
        self.joined: Any = None
        self.alone: Any = None

    def close(self, next_digest: Any = None) -> Iterator[Cut]:
        """The unit so far, where it has rows; blank lines alone make none."""
        if self.rows:
            yield Cut(self.start, self.start + self.bytes, self.rows, self.digest.hexdigest())
        self.start += self.bytes
        self.digest = next_digest or new_digest()
        self.bytes = self.rows = 0

    def begin_line(self) -> None:
        self.joined, self.alone, self.line_bytes, self.line_blank = self.digest.copy(), new_digest(), 0, True

    def more_line(self, piece: bytes) -> None:
        self.joined.update(piece)
        self.alone.update(piece)
        self.line_bytes += len(piece)
        self.line_blank = self.line_blank and not piece.strip()

    def end_line(self) -> Iterator[Cut]:
        if self.bytes and self.bytes + self.line_bytes > self.limit_bytes:
            yield from self.close(self.alone)
        else:
            self.digest = self.joined
        self.bytes += self.line_bytes
        self.add_rows(0 if self.line_blank else 1)
        self.line_bytes = 0

    def add_rows(self, rows: int) -> None:
        self.rows += rows
        self.rows_left -= rows if self.rows_left > 0 else 0

    def add_block(self, block: bytes) -> Iterator[Cut]:
        position, view = 0, memoryview(block)
        while position < len(block) and self.rows_left:
            if self.line_bytes:
                end = block.find(b"\n", position) + 1
                self.more_line(block[position : end or len(block)])
                if not end:
                    return
                yield from self.end_line()
                position = end
                continue
            room = self.limit_bytes - self.bytes
            end = block.rfind(b"\n", position, position + room) + 1 if room > 0 else 0
            if not end:
                end = block.find(b"\n", position) + 1
                if not end:
                    self.begin_line()
                    self.more_line(block[position:])
                    return
                if self.bytes:
                    yield from self.close()
                    continue
            rows = count_rows(block, position, end)
            if 0 < self.rows_left < rows:
                rows = self.rows_left
                end = _end_of_rows(block, position, end, rows)
            self.digest.update(view[position:end])
            self.bytes += end - position
            self.add_rows(rows)
            position = end


def cut_lines(blocks: Iterable[bytes], limit_bytes: int, limit_rows: int = 0) -> Iterator[Cut]:
    """Cuts of a stream of blocks, in order; memory holds one block whatever the lines are."""
    cutter = _Cutter(limit_bytes, limit_rows)
    for block in blocks:
        yield from cutter.add_block(block)
        if not cutter.rows_left:
            break
    if cutter.line_bytes and cutter.rows_left:
        yield from cutter.end_line()
    yield from cutter.close()


@dataclasses.dataclass(slots=True)
class Line:
    """A row's bytes without its line break; of a line over the bound only the first bytes, with `complete` false."""

    data: bytes
    size: int
    complete: bool = True


class LineError(Exception):
    """The stream broke in the middle; raised behind the last whole line. `partial` begins the line that was cut."""

    def __init__(self, error: Exception, partial: bytes) -> None:
        super().__init__(str(error))
        self.partial = partial


def read_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[Line]:
    """Every row of a stream of blocks; at most one block and `max_bytes` are held. Raises `LineError` for a broken stream."""
    parts: list[bytes] = []
    held = size = 0
    blank = True
    bound = max_bytes + 1  # room for the carriage return, which does not count

    def add(piece: bytes) -> None:
        nonlocal held, size, blank
        size += len(piece)
        if blank and piece.strip():
            blank = False
        if held < bound:
            parts.append(piece[: bound - held])
            held += len(parts[-1])

    def line() -> Line:
        nonlocal held, size, blank
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        length = size
        parts.clear()
        held = size = 0
        blank = True
        if length == len(data) and data.endswith(b"\r"):
            data, length = data[:-1], length - 1
        if length <= max_bytes:
            return Line(data, length)
        return Line(data[:_PREFIX_BYTES], length, False)

    iterator = iter(blocks)
    while True:
        try:
            block = next(iterator, None)
        except (OSError, EOFError) as error:
            raise LineError(error, b"".join(parts)[:_PREFIX_BYTES]) from error
        if block is None:
            break
        start = 0
        while (end := block.find(b"\n", start)) >= 0:
            if size:
                add(block[start:end])
                if blank:
                    line()
                else:
                    yield line()
            elif block[start:end].strip():
                add(block[start:end])
                yield line()
            start = end + 1
        if start < len(block):
            add(block[start:])
    if not blank:
        yield line()
