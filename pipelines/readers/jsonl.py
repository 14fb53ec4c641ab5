"""JSON lines, plain or compressed with gzip or zstd.

A plain file is cut at line ends; its tokens are estimated from the bytes of its lines, JSON syntax included. A compressed
file cannot be entered in the middle: it is one unit, whose tokens are estimated from its bytes after decompression. Of a
key that stands twice in an object the last value counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import orjson
import pyarrow as pa

from pipelines.readers.base import LOGGER, Item, Warn, build_row, check_columns, read_reject, reader
from pipelines.readers.lines import Line, LineError, cut_lines, read_lines
from pipelines.readers.source import BYTES_PER_TOKEN, RangeView, Source, checked_view, hash_range, make_unit
from schemas.spec import PlanSpec
from schemas.units import WorkUnit

_BOM = b"\xef\xbb\xbf"
_CODECS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_PLAIN = (".jsonl", ".ndjson", ".json", ".jsonlines")
_CHUNK_BYTES = 256 << 10
_CHECKED_ROWS = 100
"""Rows at the start of a file that are searched for the columns asked for."""
_DECODE_ERRORS = (OSError, EOFError, pa.ArrowException, MemoryError)


def codec_of(path: str) -> str:
    """`gzip`, `zstd`, or empty for a plain file, by the file's name."""
    return next((codec for suffix, codec in _CODECS.items() if path.lower().endswith(suffix)), "")


@reader("jsonl")
class JsonlReader:
    """One JSON object a line."""

    suffixes = tuple(plain + packed for plain in _PLAIN for packed in ("", *_CODECS))

    def scan(self, root: str, path: str, spec: PlanSpec, warn: Warn = LOGGER.warning) -> Iterator[WorkUnit]:
        """See `Reader.scan`."""
        source = Source(root, path)
        if not source.size:
            warn(f"{source.url} is empty")
            return
        codec = codec_of(path)
        view = RangeView(source, 0, source.size)
        _check_columns(source.url, _blocks(view, codec), spec, warn)
        if codec:
            yield from _scan_packed(source, path, codec, spec, warn)
            return
        first_row = 0
        offset = len(_BOM) if source.read(0, len(_BOM)) == _BOM else 0
        blocks = source.blocks(offset, source.size)
        for cut in cut_lines(blocks, spec.unit_tokens * BYTES_PER_TOKEN, spec.limit):
            yield make_unit(
                spec,
                path=path,
                format="jsonl",
                byte_start=offset + cut.start,
                byte_end=offset + cut.end,
                row_start=first_row,
                row_count=cut.rows,
                source_fingerprint=cut.digest,
                estimated_tokens=-(-(cut.end - cut.start) // BYTES_PER_TOKEN),
            )
            first_row += cut.rows
        if not first_row:
            warn(f"{source.url} holds no row")

    def rows(self, root: str, unit: WorkUnit, spec: PlanSpec) -> Iterator[Item]:
        """See `Reader.rows`. Reasons: invalid_json, invalid_utf8, not_an_object, too_deep, row_too_large, truncated,
        corrupt, and those of a record."""
        source = Source(root, unit.path)
        blocks = _blocks(checked_view(source, unit), codec_of(unit.path))
        row, end = unit.row_start, unit.row_start + unit.row_count
        try:
            for line in read_lines(blocks, spec.max_row_bytes):
                if row == end:
                    return
                yield _parse(unit.path, row, line, spec)
                row += 1
        except LineError as error:
            if row < end:
                yield read_reject(
                    unit.path, row, _reason(error), f"the compressed stream broke: {error}", error.partial
                )
                row += 1
        for missing in range(row, end):
            yield read_reject(unit.path, missing, "truncated", "the file ended before this row")


def _scan_packed(source: Source, path: str, codec: str, spec: PlanSpec, warn: Warn) -> Iterator[WorkUnit]:
    rows = size = 0
    try:
        for line in read_lines(_blocks(RangeView(source, 0, source.size), codec), spec.max_row_bytes):
            rows += 1
            size += line.size + 1
            if rows == spec.limit:
                break
    except LineError as error:
        warn(
            f"{source.url}: {_reason(error)} after {rows:,} rows ({error}); what follows is listed as one reject. "
            "Fetch or compress the file again"
        )
        rows += 1
        size += len(error.partial)
    if not rows:
        warn(f"{source.url} holds no row")
        return
    tokens = -(-size // BYTES_PER_TOKEN)
    if tokens > spec.unit_tokens:
        unpack = "gzip -dc" if codec == "gzip" else "zstd -dc"
        warn(
            f"{source.url} is one work unit of about {tokens:,} tokens ({spec.unit_tokens:,} asked for), because a compressed "
            f"file cannot be entered in the middle: one worker has to score all of it. Unpack it, or cut it: "
            f"`{unpack} FILE | split -l {max(1, rows * spec.unit_tokens // tokens)} - part- --additional-suffix .jsonl`"
        )
    yield make_unit(
        spec,
        path=path,
        format="jsonl",
        byte_start=0,
        byte_end=source.size,
        row_start=0,
        row_count=rows,
        source_fingerprint=hash_range(source, 0, source.size),
        estimated_tokens=tokens,
    )


def _reason(error: LineError) -> str:
    text = str(error).lower()
    return "truncated" if "truncated" in text or "end of" in text else "corrupt"


def _blocks(view: RangeView, codec: str) -> Iterator[bytes]:
    blocks = _unpacked(view, codec) if codec else view.blocks()
    if codec or not view.start:
        first = next(blocks, b"")
        while len(first) < len(_BOM) and (more := next(blocks, b"")):
            first += more
        yield first.removeprefix(_BOM)
    yield from blocks


class _ViewFile:
    """The little of a file that Arrow's decompressor asks for."""

    closed = False

    def __init__(self, view: RangeView) -> None:
        self._view = view
        self._at = view.start

    def read(self, count: int = -1) -> bytes:
        data = self._view.read(self._at, self._view.end if count < 0 else self._at + count)
        self._at += len(data)
        return data

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


def _unpacked(view: RangeView, codec: str) -> Iterator[bytes]:
    """Decompressed chunks of bounded size. Behind the last readable byte, raises what the decompressor said.

    A failing read loses what it had decoded, so the end of a broken stream is read again byte by byte.
    """
    if view.start == view.end:
        raise EOFError("truncated: the file is empty")
    done = 0
    try:
        for chunk in _decode(view, codec, _CHUNK_BYTES):
            done += len(chunk)
            yield chunk
        return
    except _DECODE_ERRORS as error:
        broken = error
    skipped, rest = 0, bytearray()
    try:
        stream = pa.CompressedInputStream(pa.PythonFile(_ViewFile(view), mode="r"), codec)
        while skipped < done:
            skipped += len(stream.read(min(_CHUNK_BYTES, done - skipped)))
        while byte := stream.read(1):
            rest += byte
    except _DECODE_ERRORS:
        pass
    if rest:
        yield bytes(rest)
    raise EOFError(str(broken)) from broken


def _decode(view: RangeView, codec: str, size: int) -> Iterator[bytes]:
    stream = pa.CompressedInputStream(pa.PythonFile(_ViewFile(view), mode="r"), codec)
    while chunk := stream.read(size):
        yield chunk


def _load(data: bytes) -> tuple[object, str, str]:
    """(value, reason, detail); the reason is empty where the line is JSON."""
    try:
        return orjson.loads(data), "", ""
    except orjson.JSONDecodeError as error:
        reason = "too_deep" if "depth limit" in str(error) or "ecursion" in str(error) else "invalid_json"
        detail = str(error)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, "invalid_utf8", str(error)
    return None, reason, detail


def _parse(path: str, row: int, line: Line, spec: PlanSpec) -> Item:
    if not line.complete:
        detail = f"{line.size:,} bytes; max_row_bytes is {spec.max_row_bytes:,}"
        return read_reject(path, row, "row_too_large", detail, line.data)
    value, reason, detail = _load(line.data)
    if reason:
        return read_reject(path, row, reason, detail, line.data)
    if not isinstance(value, dict):
        return read_reject(path, row, "not_an_object", f"the line is a JSON {type(value).__name__}", line.data)
    return build_row(path, row, value, spec)


def _check_columns(url: str, blocks: Iterable[bytes], spec: PlanSpec, warn: Warn) -> None:
    found: set[str] = set()
    objects = 0
    try:
        for number, line in enumerate(read_lines(blocks, spec.max_row_bytes)):
            if not number and line.data.lstrip().startswith(b"["):
                warn(f"{url} looks like one JSON array, not JSON lines; convert it: `jq -c '.[]' FILE > FILE.jsonl`")
            value = _load(line.data)[0] if line.complete else None
            if isinstance(value, dict):
                objects += 1
                found |= value.keys()
                if set(spec.columns.names()) <= found:
                    return
            if number + 1 == _CHECKED_ROWS:
                break
    except LineError:
        LOGGER.debug("%s: broken within its first rows", url)
    if objects:
        check_columns(url, found, spec)
