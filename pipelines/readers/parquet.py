"""Parquet: units are ranges of rows, whole row groups where they fit.

Tokens are estimated from the mean bytes of text over a row group: what the writer noted in the footer, else the
uncompressed size of the text columns. That counts repeated texts once where they are dictionary encoded, so that then
the first rows of the group are measured too, and the larger figure holds.
The fingerprint covers the file's size and footer, which holds the place of every page; damage inside pages is found by
their checksums where the file has them.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.readers.base import LOGGER, Item, Warn, build_row, check_columns, read_reject, reader
from pipelines.readers.footer import RowGroup, decode_footer
from pipelines.readers.source import BYTES_PER_TOKEN, Source, make_unit, source_changed
from schemas.errors import InputError
from schemas.fingerprint import hash128
from schemas.spec import PlanSpec
from schemas.units import WorkUnit

_TAIL = 8
_BROKEN_TAIL_BYTES = 64 << 10
_BATCH_BYTES = 4 << 20
_MAX_BATCH_ROWS = 1024
_MEASURED_ROWS = 64
_SHARED_BYTES = 16 << 20
"""What a batch of a column whose repeated texts the file holds once may come to, if every row were all of it."""
_BUFFER_BYTES = 1 << 20
_BOMB_BYTES = 256 << 20
_BOMB_RATIO = 250
"""Text compresses three to ten times. Pages of a column that come to more than so many bytes, and to so many times what the file
holds of them, are not decoded: a page stands in memory whole."""
_ELEMENT_BYTES = 8
"""What an element of a list counts, beside its text, where a row's size is bounded."""
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, OverflowError, MemoryError)


@reader("parquet")
class ParquetReader:
    """Columns of strings; lists of {role, content} for messages."""

    suffixes = (".parquet", ".pq")

    def scan(self, root: str, path: str, spec: PlanSpec, warn: Warn = LOGGER.warning) -> Iterator[WorkUnit]:
        """See `Reader.scan`. A file that cannot be opened is one unit of one row, which reads as `unreadable_file`."""
        source = Source(root, path)
        source_fingerprint, footer = _footer(source)

        def unit(row_start: int, row_count: int, text_bytes: float) -> WorkUnit:
            return make_unit(
                spec,
                path=path,
                format="parquet",
                byte_start=0,
                byte_end=source.size,
                row_start=row_start,
                row_count=row_count,
                source_fingerprint=source_fingerprint,
                estimated_tokens=max(1, round(text_bytes / BYTES_PER_TOKEN)),
            )

        names = _body(spec)
        try:
            opened = _open(source, footer, names)
        except _DAMAGE as error:
            warn(f"{source.url} is not a readable Parquet file ({_short(error)}); it is listed as one reject")
            yield unit(0, 1, 0.0)
            return
        _check_schema(source.url, opened.schema, spec)
        limit_bytes = spec.unit_tokens * BYTES_PER_TOKEN
        start, rows, size, first_row = 0, 0, 0.0, 0
        for index, group in enumerate(opened.groups):
            group_rows = group.rows
            if spec.limit:
                group_rows = min(group_rows, spec.limit - first_row)
            if not group_rows:
                continue
            per_row = _row_bytes(opened, index, names)
            group_bytes = per_row * group_rows
            if rows and size + group_bytes > limit_bytes:
                yield unit(start, rows, size)
                start, rows, size = first_row, 0, 0.0
            if group_bytes > limit_bytes:
                step = max(1, int(limit_bytes / per_row))
                for offset in range(0, group_rows, step):
                    count = min(step, group_rows - offset)
                    yield unit(first_row + offset, count, per_row * count)
                start = first_row + group_rows
            else:
                rows, size = rows + group_rows, size + group_bytes
            first_row += group_rows
        if rows:
            yield unit(start, rows, size)
        if not first_row:
            warn(f"{source.url} holds no row")

    def rows(self, root: str, unit: WorkUnit, spec: PlanSpec) -> Iterator[Item]:
        """See `Reader.rows`. Reasons: unreadable_file, damaged (every row behind a broken page), invalid_utf8, and those
        of a record."""
        source = Source(root, unit.path)
        found, footer = _footer(source)
        if found != unit.source_fingerprint:
            raise source_changed(source, "its size or footer")
        row, end = unit.row_start, unit.row_start + unit.row_count
        reason, detail = "damaged", "the file ended before this row"
        try:
            for record in _records(source, footer, unit, spec):
                yield _item(unit.path, row, record, spec)
                row += 1
        except _Unreadable as error:
            reason, detail = "unreadable_file", str(error)
        except _Damaged as error:
            reason, detail = "damaged", str(error)
        for missing in range(row, end):
            yield read_reject(unit.path, missing, reason, detail)


class _Unreadable(Exception):
    """The footer cannot be read."""


class _Damaged(Exception):
    """A page cannot be read."""


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _footer(source: Source) -> tuple[str, bytes]:
    """(fingerprint, footer): hash of size and footer, or of size and the last 64 KiB where there is no footer."""
    size = source.size
    tail = source.read(max(0, size - _TAIL), size)
    length = int.from_bytes(tail[:4], "little") if len(tail) == _TAIL and tail[4:] == b"PAR1" else -1
    if not 0 <= length <= size - _TAIL:
        return hash128(str(size).encode(), source.read(max(0, size - _BROKEN_TAIL_BYTES), size)), b""
    footer = source.read(size - length - _TAIL, size - _TAIL)
    return hash128(str(size).encode(), footer, tail), footer


@dataclasses.dataclass(frozen=True)
class _File:
    file: pq.ParquetFile
    schema: pa.Schema
    groups: tuple[RowGroup, ...]


def _open(source: Source, footer: bytes, names: tuple[str, ...]) -> _File:
    """The file, after its footer was decoded; raises one of `_DAMAGE`.

    Texts inside lists of the columns `names`, where the file holds repeated ones once, are read so too: a list can repeat one
    millions of times.
    """
    if not source.size:
        raise ValueError("the file is empty")
    groups = decode_footer(footer) if footer else ()
    once = {
        ".".join(chunk.path)
        for group in groups
        for chunk in group.chunks
        if chunk.text_once and len(chunk.path) > 1 and chunk.path[0] in names
    }
    file = pq.ParquetFile(
        pa.PythonFile(source.open(), mode="r"),
        page_checksum_verification=True,
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
        read_dictionary=sorted(once) or None,
    )
    if [group.rows for group in groups] != [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]:
        raise ValueError("the footer contradicts itself about the number of rows")
    return _File(file, file.schema_arrow, groups)


def _body(spec: PlanSpec) -> tuple[str, ...]:
    columns = spec.columns
    return {
        "text": (columns.text,),
        "prompt": (columns.prompt, columns.completion),
        "messages": (columns.messages,),
    }[columns.kind]


def _check_schema(url: str, schema: pa.Schema, spec: PlanSpec) -> None:
    check_columns(url, set(schema.names), spec)
    for name in spec.columns.names():
        if len(schema.get_all_field_indices(name)) > 1:
            raise InputError(f"{url}: column {name!r} stands twice in its schema; rename one of them")
    for name in _body(spec):
        kind = schema.field(name).type
        if spec.columns.kind == "messages":
            if not _is_messages(kind):
                raise InputError(f"{url}: column {name!r} is {kind}, not a list of {{role: string, content: string}}")
        elif not _is_text(kind):
            raise InputError(f"{url}: column {name!r} is {kind}, not text; cast it to string, or name another column")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(
        test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    )


def _is_messages(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    turn = kind.value_type
    return pa.types.is_struct(turn) and {"role", "content"} <= {field.name for field in turn}


def _row_bytes(opened: _File, group: int, names: tuple[str, ...]) -> float:
    """Mean bytes of text of a row of the group, at least 1."""
    chunks = [chunk for chunk in opened.groups[group].chunks if chunk.path and chunk.path[0] in names]
    mean = sum(chunk.text_bytes for chunk in chunks) / opened.groups[group].rows
    if any(chunk.shared for chunk in chunks):
        rows = min(_MEASURED_ROWS, _safe_rows(opened, group, names))
        try:
            _refuse_bomb(opened, group, names)
            first = opened.file.iter_batches(rows, row_groups=[group], columns=list(names), use_threads=False)
            batch = next(first)
            mean = max(mean, sum(map(_column_bytes, batch.columns)) / len(batch))
        except (*_DAMAGE, ImportError, StopIteration, ZeroDivisionError):
            LOGGER.debug("row group %d: its first rows cannot be measured", group)
    return max(1.0, mean)


def _safe_rows(opened: _File, group: int, names: tuple[str, ...]) -> int:
    """Rows of the group that fit into memory whatever they hold: a kilobyte of file can stand for a terabyte of repeated text.

    No text is longer than all the pages of its column.
    """
    chunks = [chunk for chunk in opened.groups[group].chunks if chunk.path and chunk.path[0] in names]
    largest = max((chunk.text_bytes for chunk in chunks if chunk.shared), default=0)
    return max(1, _SHARED_BYTES // max(1, largest))


def _refuse_bomb(opened: _File, group: int, names: tuple[str, ...]) -> None:
    for chunk in opened.groups[group].chunks:
        large = chunk.page_bytes > max(_BOMB_BYTES, _BOMB_RATIO * chunk.stored_bytes)
        if large and chunk.path and chunk.path[0] in names:
            raise ValueError(
                f"column {'.'.join(chunk.path)!r}: {chunk.stored_bytes:,} bytes of the file stand for {chunk.page_bytes:,}; "
                "write it with smaller row groups if that is meant"
            )


def _nested_bytes(column: pa.Array) -> np.ndarray | None:
    """Bytes of text of every row of a column of lists or structures, and some for each element; None for other columns.

    Nothing is expanded: of a text that is held once the length is taken as often as it is repeated.
    """
    kind = column.type
    return (
        _bytes_of(column)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_struct(kind)
        else None
    )


def _bytes_of(column: pa.Array) -> np.ndarray:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        ends = np.concatenate([[0], np.cumsum(_bytes_of(column.values) + _ELEMENT_BYTES)])
        offsets = column.offsets.to_numpy()
        return ends[offsets[1:]] - ends[offsets[:-1]]
    if pa.types.is_struct(kind):
        return sum((_bytes_of(field) for field in column.flatten()), np.zeros(len(column), np.int64))
    if pa.types.is_dictionary(kind):
        sizes = np.append(_bytes_of(column.dictionary), 0)
        return sizes[column.indices.fill_null(len(sizes) - 1).to_numpy()]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    return np.zeros(len(column), np.int64)


def _column_bytes(column: pa.Array) -> int:
    """Bytes of text of a column; of lists those of role and content, unless there are too many to look at each."""
    sizes = _nested_bytes(column)
    total = 0 if sizes is None else int(sizes.sum())
    return total if total > _SHARED_BYTES else sum(map(_text_bytes, column.to_pylist()))


def _text_bytes(value: Any) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, list):
        return sum(
            _text_bytes(turn.get("role")) + _text_bytes(turn.get("content")) for turn in value if isinstance(turn, dict)
        )
    return 0


@dataclasses.dataclass
class _Cursor:
    """An open row group, decoded up to `next_row` of it.

    Parquet cannot be entered in the middle of a row group. A worker that reads its units in order goes on from where it
    stopped, so that a large group is decoded once by a worker instead of once by a unit.
    """

    key: tuple[Any, ...]
    batches: Iterator[pa.RecordBatch]
    next_row: int = 0
    rest: pa.RecordBatch | None = None

    def take(self, start: int, end: int) -> Iterator[pa.RecordBatch]:
        """Batches of rows `start` to `end` of the group, no earlier than `next_row`."""
        while self.next_row < end:
            if self.rest is None or not len(self.rest):
                self.rest = next(self.batches, None)
                if self.rest is None:
                    return
            skip = min(max(0, start - self.next_row), len(self.rest))
            count = min(end - self.next_row - skip, len(self.rest) - skip)
            batch = self.rest.slice(skip, count)
            self.rest = self.rest.slice(skip + count)
            self.next_row += skip + count
            if len(batch):
                yield batch


_OPEN = threading.local()


def _records(source: Source, footer: bytes, unit: WorkUnit, spec: PlanSpec) -> Iterator[dict[str, Any]]:
    names = spec.columns.names()
    try:
        opened = _open(source, footer, names)
    except _DAMAGE as error:
        raise _Unreadable(_short(error)) from error
    _check_schema(source.url, opened.schema, spec)
    row, end, group_start = unit.row_start, unit.row_start + unit.row_count, 0
    for group in range(len(opened.groups)):
        group_end = group_start + opened.groups[group].rows
        if group_start < end and group_end > row:
            key = (source.url, unit.source_fingerprint, group, names)
            first = row - group_start
            last = min(end, group_end) - group_start
            cursor: _Cursor | None = getattr(_OPEN, "cursor", None)
            _OPEN.cursor = None
            try:
                if cursor is None or cursor.key != key or cursor.next_row > first:
                    cursor = _Cursor(key, _batches(opened, group, names, _body(spec)))
                for batch in cursor.take(first, last):
                    row += len(batch)
                    yield from _to_records(batch, names, spec.max_row_bytes)
            except _DAMAGE as error:
                raise _Damaged(f"row group {group}: {_short(error)}") from error
            if row < group_start + last:
                raise _Damaged(f"row group {group} holds fewer rows than the footer says")
            if row < group_end:
                _OPEN.cursor = cursor
        group_start = group_end


def _batches(opened: _File, group: int, names: tuple[str, ...], body: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    _refuse_bomb(opened, group, names)
    size = min(
        _MAX_BATCH_ROWS, max(1, int(_BATCH_BYTES / _row_bytes(opened, group, body))), _safe_rows(opened, group, names)
    )
    return opened.file.iter_batches(size, row_groups=[group], columns=list(names), use_threads=False)


class _Unconvertible:
    """Stands for a value that has no Python form."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __str__(self) -> str:
        return f"a value that cannot be read ({self.error})"


class _TooLarge:
    """Stands for a value that is not looked at."""

    def __init__(self, size: int) -> None:
        self.size = size


def _to_records(batch: pa.RecordBatch, names: tuple[str, ...], limit: int) -> Iterator[dict[str, Any]]:
    columns = [_bounded(batch.column(batch.schema.get_field_index(name)), limit) for name in names]
    for values in zip(*columns):
        yield dict(zip(names, values))


def _bounded(column: pa.Array, limit: int) -> list[Any]:
    """Python forms of the values, of lists and structures only where they come to at most `limit` bytes."""
    sizes = _nested_bytes(column)
    if sizes is None or not (sizes > limit).any():
        return _values(column)
    return [
        _TooLarge(int(size)) if size > limit else _values(column.slice(place, 1))[0] for place, size in enumerate(sizes)
    ]


def _values(column: pa.Array) -> list[Any]:
    try:
        if pa.types.is_temporal(column.type):
            # Python has no nanoseconds and no years beyond 9999, and pyarrow's own way out depends on pandas being there.
            return column.cast(pa.string()).to_pylist()
        return column.to_pylist()
    except (*_DAMAGE, ImportError, TypeError):
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> Any:
    """Python form of one value, its text where there is none."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return _Unconvertible(error)
    except (*_DAMAGE, ImportError, TypeError):
        try:
            return str(scalar)
        except (*_DAMAGE, ImportError, TypeError) as error:
            return _Unconvertible(error)


def _item(path: str, row: int, record: dict[str, Any], spec: PlanSpec) -> Item:
    for name, value in record.items():
        if isinstance(value, _TooLarge):
            detail = f"column {name!r}: {value.size:,} bytes; max_row_bytes is {spec.max_row_bytes:,}"
            return read_reject(path, row, "row_too_large", detail)
        if isinstance(value, _Unconvertible):
            reason = "invalid_utf8" if isinstance(value.error, UnicodeDecodeError) else "wrong_type"
            return read_reject(path, row, reason, f"column {name!r}: {value.error}")
    return build_row(path, row, record, spec)
