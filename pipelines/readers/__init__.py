"""Corpus readers: JSONL, Parquet, WebDataset."""

from pipelines.readers.base import (
    Item,
    Reader,
    file_format,
    format_by_suffix,
    get_reader,
    read_row,
    read_unit,
    reader,
    reader_names,
    suffixes,
)

__all__ = [
    "Item",
    "Reader",
    "file_format",
    "format_by_suffix",
    "get_reader",
    "read_row",
    "read_unit",
    "reader",
    "reader_names",
    "suffixes",
]
