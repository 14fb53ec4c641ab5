"""Rows for people and for other programs: terminal tables, JSON, CSV, Parquet."""

from __future__ import annotations

import io
import sys
import unicodedata
from collections.abc import Mapping
from typing import Any, TextIO

import orjson
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from schemas.storage import normalise, write_whole

_CELL = 120


def visible(text: str) -> str:
    """`text` with every character shown that would steer a terminal or turn the direction of writing.

    Controls become their picture (U+2400 block); other format characters and lone surrogates their code point.
    """
    shown = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Cc":
            code = ord(character)
            shown.append(" " if character in "\n\t" else chr(0x2400 + code) if code < 0x20 else f"\\x{code:02x}")
        elif category in ("Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            shown.append(f"\\u{ord(character):04x}")
        else:
            shown.append(character)
    return "".join(shown)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = visible(value if isinstance(value, str) else str(value))
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"


def print_pairs(pairs: Mapping[str, str]) -> None:
    """Names and what they stand for, in two columns."""
    width = max(map(len, pairs), default=0)
    for name, meaning in pairs.items():
        print(f"  {name:<{width}}  {meaning}")


def print_table(table: pa.Table, file: TextIO | None = None) -> None:
    """A table on the terminal, or in a text file; long cells are cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(show_edge=False, pad_edge=False, header_style="bold")
    for field in table.schema:
        is_number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        is_text = pa.types.is_string(field.type)
        shown.add_column(
            Text(visible(field.name)), justify="right" if is_number else "left", overflow="fold", no_wrap=not is_text
        )
    for row in table.to_pylist(maps_as_pydicts="lossy"):
        shown.add_row(*(Text(_cell(value)) for value in row.values()))
    is_terminal = file is None and sys.stdout.isatty()
    Console(file=file, width=None if is_terminal else 200).print(shown)


def _json_ready(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _csv_ready(table: pa.Table) -> pa.Table:
    """Nested columns as JSON text, since CSV has none."""
    for number, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            values = table.column(number).to_pylist(maps_as_pydicts="lossy")
            cells = [None if value is None else orjson.dumps(_json_ready(value)).decode() for value in values]
            table = table.set_column(number, field.name, pa.array(cells, pa.string()))
    return table


def encode_rows(table: pa.Table, format_name: str) -> bytes:
    """The table as bytes of JSON (one array of objects, NaN as null), CSV or Parquet."""
    if format_name == "json":
        rows = [_json_ready(row) for row in table.to_pylist(maps_as_pydicts="lossy")]
        return orjson.dumps(rows, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    buffer = io.BytesIO()
    if format_name == "csv":
        pacsv.write_csv(_csv_ready(table), buffer)
    else:
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def write_rows(table: pa.Table, format_name: str, out: str = "") -> None:
    """Write a table to standard output, or whole to the file or URL `out`."""
    if format_name == "table":
        if not out:
            print_table(table)
            return
        text = io.StringIO()
        print_table(table, text)
        write_whole(normalise(out), text.getvalue().encode())
        return
    data = encode_rows(table, format_name)
    if out:
        write_whole(normalise(out), data)
    else:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
