"""What a Parquet footer says of rows and bytes, decoded here.

pyarrow decodes footers too, but asking it about a column of a damaged footer can end the whole process. A footer is a
Thrift structure in the compact protocol (parquet.thrift of the Parquet format): decoded into dicts by field number.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

_MAX_DEPTH = 32
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_BYTE_ARRAY = 6
_DICTIONARIES = {2, 8}
"""Encodings PLAIN_DICTIONARY and RLE_DICTIONARY."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A column of a row group."""

    path: tuple[str, ...]
    values: int
    """Of a column that is not nested, its rows, nulls included."""
    text_bytes: int
    """Bytes of its strings: exact where the writer noted them, else the uncompressed size of its pages."""
    shared: bool
    """Whether repeated strings may be counted once, the writer having noted no exact size."""
    page_bytes: int = 0
    """Uncompressed size of its pages."""
    stored_bytes: int = 0
    """Their size in the file."""
    text_once: bool = False
    """Whether its values are strings, and repeated ones may stand in it once."""


@dataclasses.dataclass(frozen=True)
class RowGroup:
    """A row group: its rows and its columns."""

    rows: int
    chunks: tuple[Chunk, ...]


class _Decoder:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("the footer ends early")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("the footer holds a number of more than 64 bits")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("the footer ends early")
        self.at += count
        return self.data[self.at - count : self.at]

    def value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("the footer is nested too deep")
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind == _BYTE:
            return self.byte()
        if kind in (_I16, _I32, _I64):
            return self.zigzag()
        if kind == _DOUBLE:
            return self.take(8)
        if kind == _BINARY:
            return self.take(self.varint())
        if kind in (_LIST, _SET):
            return self.items(depth)
        if kind == _MAP:
            return self.pairs(depth)
        if kind == _STRUCT:
            return self.struct(depth)
        raise ValueError(f"the footer holds a value of unknown type {kind}")

    def element(self, kind: int, depth: int) -> Any:
        # In a collection a boolean is a byte of its own.
        return self.byte() == _TRUE if kind in (_TRUE, _FALSE) else self.value(kind, depth)

    def count(self, count: int) -> int:
        if count > len(self.data) - self.at:
            raise ValueError("the footer ends early")
        return count

    def items(self, depth: int) -> list[Any]:
        head = self.byte()
        count = self.count(self.varint() if head >> 4 == 15 else head >> 4)
        return [self.element(head & 15, depth + 1) for _ in range(count)]

    def pairs(self, depth: int) -> list[Any]:
        count = self.count(self.varint())
        kinds = self.byte() if count else 0
        return [(self.element(kinds >> 4, depth + 1), self.element(kinds & 15, depth + 1)) for _ in range(count)]

    def struct(self, depth: int) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            fields[number] = self.value(head & 15, depth + 1)
        return fields


def _get(fields: Any, number: int, kind: type, default: Any = None) -> Any:
    value = fields.get(number, default) if isinstance(fields, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"the footer lacks field {number}")
    return value


def _chunk(fields: Any) -> Chunk:
    meta = _get(fields, 3, dict)
    values = _get(meta, 5, int)
    size = _get(meta, 6, int)
    exact = _get(_get(meta, 16, dict, {}), 1, int, -1)
    if values < 0 or size < 0:
        raise ValueError("the footer holds a negative size")
    dictionary = bool(_DICTIONARIES & {code for code in _get(meta, 2, list) if isinstance(code, int)})
    return Chunk(
        path=tuple(part.decode("utf-8") for part in _get(meta, 3, list) if isinstance(part, bytes)),
        values=values,
        text_bytes=exact if exact >= 0 else size,
        shared=exact < 0 and dictionary,
        page_bytes=size,
        stored_bytes=_get(meta, 7, int, 0),
        text_once=dictionary and _get(meta, 1, int, -1) == _BYTE_ARRAY,
    )


@functools.lru_cache(maxsize=4)
def decode_footer(data: bytes) -> tuple[RowGroup, ...]:
    """Row groups of a footer without its length and magic. Raises `ValueError` where it contradicts itself."""
    fields = _Decoder(data).struct(0)
    groups = []
    for group in _get(fields, 4, list):
        rows = _get(group, 3, int)
        chunks = tuple(_chunk(chunk) for chunk in _get(group, 1, list))
        if rows < 0 or any(chunk.values != rows for chunk in chunks if len(chunk.path) == 1):
            raise ValueError("the footer contradicts itself about the number of rows")
        groups.append(RowGroup(rows, chunks))
    if sum(group.rows for group in groups) != _get(fields, 3, int):
        raise ValueError("the footer contradicts itself about the number of rows")
    return tuple(groups)
