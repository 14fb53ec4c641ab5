"""The decoder of Parquet footers, on footers encoded by hand and on those of pyarrow."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.readers.footer import decode_footer

I64, BINARY, LIST, STRUCT = 6, 8, 9, 12


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def encode(value: Any) -> tuple[int, bytes]:
    """(type, bytes) in the compact protocol: int, bytes, list of one kind, dict by field number."""
    if isinstance(value, int):
        return I64, varint((value << 1) ^ (value >> 63))
    if isinstance(value, bytes):
        return BINARY, varint(len(value)) + value
    if isinstance(value, list):
        kind = encode(value[0])[0] if value else I64
        head = bytes([len(value) << 4 | kind]) if len(value) < 15 else bytes([0xF0 | kind]) + varint(len(value))
        return LIST, head + b"".join(encode(item)[1] for item in value)
    body, last = b"", 0
    for number, item in value.items():
        kind, data = encode(item)
        step = number - last
        body += (bytes([step << 4 | kind]) if 0 < step < 16 else bytes([kind]) + encode(number)[1]) + data
        last = number
    return STRUCT, body + b"\0"


def footer(rows: int, values: int, size: int = 100, total: int | None = None, **more: Any) -> bytes:
    meta = {2: [0, 8], 3: [b"text"], 5: values, 6: size, **more.get("meta", {})}
    group = {1: [{3: meta}], 3: rows}
    return encode({3: rows if total is None else total, 4: [group], **more.get("top", {})})[1]


def test_what_is_read() -> None:
    (group,) = decode_footer(footer(7, 7))
    assert group.rows == 7
    assert (group.chunks[0].path, group.chunks[0].text_bytes, group.chunks[0].shared) == (("text",), 100, True)
    exact = decode_footer(footer(7, 7, meta={16: {1: 55}}))[0].chunks[0]
    assert (exact.text_bytes, exact.shared) == (55, False)
    assert not decode_footer(footer(7, 7, meta={2: [0]}))[0].chunks[0].shared
    nested = decode_footer(footer(7, 20, meta={3: [b"m", b"list", b"element"]}))[0]
    assert nested.chunks[0].values == 20
    assert decode_footer(footer(7, 7, top={300: [1] * 40})) == (group,)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (footer(7, 8), "contradicts itself"),
        (footer(7, 7, total=8), "contradicts itself"),
        (footer(-1, -1), "negative|contradicts"),
        (footer(7, 7, size=-5), "negative"),
        (footer(7, 7)[:-9], "ends early"),
        (b"", "ends early"),
        (b"\0", "lacks field 4"),
        (b"\x16" + b"\xff" * 30 + b"\0", "more than 64 bits"),
        (b"\x1c" * 1000, "nested too deep"),
        (b"\x19" * 1000, "nested too deep"),
        (b"\x1f\0", "unknown type"),
        (b"\x19\xf3" + varint(1 << 40), "ends early"),
        (b"\x1b" + varint(1 << 40) + b"\x33", "ends early"),
        (b"\x18" + varint(1 << 40), "ends early"),
    ],
)
def test_damage_is_a_value_error(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_footer(data)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_are_a_value_error_or_groups(data: bytes) -> None:
    try:
        groups = decode_footer(data)
    except ValueError:
        return
    assert all(group.rows >= 0 for group in groups)


def test_it_agrees_with_pyarrow() -> None:
    table = pa.table(
        {
            "text": [f"row {row}" * 9 for row in range(500)],
            "m": [[{"role": "user", "content": "x"}]] * 500,
            "n": list(range(500)),
        }
    )
    for options in ({}, {"use_dictionary": False}, {"write_statistics": False, "compression": "zstd"}):
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=130, **options)
        data = sink.getvalue()
        metadata = pq.ParquetFile(io.BytesIO(data)).metadata
        groups = decode_footer(data[-8 - int.from_bytes(data[-8:-4], "little") : -8])
        assert [group.rows for group in groups] == [130, 130, 130, 110]
        for number, group in enumerate(groups):
            theirs = [metadata.row_group(number).column(index) for index in range(metadata.num_columns)]
            assert [".".join(chunk.path) for chunk in group.chunks] == [chunk.path_in_schema for chunk in theirs]
            assert [chunk.values for chunk in group.chunks] == [chunk.num_values for chunk in theirs]
        assert sum(group.chunks[0].text_bytes for group in groups) == sum(
            len(text) for text in table["text"].to_pylist()
        )
