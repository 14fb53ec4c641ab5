"""Parquet files with checksums and lineage in the footer, written whole, read with verification."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import CorruptFile, InputError, MixedFingerprints
from schemas.fingerprint import canonical_json
from schemas.ranged import open_ranged
from schemas.storage import filesystem, is_local, read_bytes, sha256, write_whole
from schemas.tables import SCHEMA_VERSION, table_schema

VECTOR_ROWS = 2_000
"""Rows of a row group with a sketch: 8 MB decoded at k = 2048, which is what a reader holds at a time."""
SCALAR_ROWS = 20_000
"""Rows of a row group without one: a page costs about the same whether it is full or not, and a table has a page a column."""
_UNIQUE = {"sample_id", "content_id", "source_id", "preview", "text"}
"""Texts that hardly repeat: a dictionary of them is built and thrown away again."""
_DIGEST = b"lehr.sha256"
_DIGEST_MARK = _DIGEST + b"\x18\x40"
"""The key as Parquet writes it, with what says that a string of 64 bytes follows."""
_BLANK = b"0" * 64
_KEYS = {
    _DIGEST, b"lehr.schema", b"lehr.schema_version", b"lehr.spec", b"lehr.inputs", b"lehr.notes", b"ARROW:schema",
}  # fmt: skip
"""All that a footer holds: a bit flipped in the name of one makes it another."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footer:
    """What stands in the footer of every table: schema, spec and what the file was made from."""

    schema: str
    spec: str
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A finished file as a manifest lists it; `path` is relative to the run directory."""

    path: str
    rows: int
    bytes: int
    sha256: str


def _without_reader_notes(table: pa.Table) -> pa.Table:
    """The table without what a Parquet reader adds to a schema, so that a table read back is written as the same bytes."""
    fields = [
        field.with_metadata({k: v for k, v in (field.metadata or {}).items() if not k.startswith(b"PARQUET:")})
        for field in table.schema
    ]
    return pa.Table.from_arrays(table.columns, schema=pa.schema(fields))


def encode_table(table: pa.Table, footer: Footer) -> bytes:
    """Bytes of a Parquet file; equal tables and footers give equal bytes with one version of pyarrow.

    Vectors are byte-stream split (1.77 bytes per float16 after zstd), texts that repeat are dictionary encoded; pages carry
    checksums because readers are silent about flipped bits otherwise. Those do not cover the footer: it holds the SHA-256 of
    the whole file, taken with zeros in its own place.
    """
    table = _without_reader_notes(table)
    vectors = [field.name for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    sink = pa.BufferOutputStream()
    writer = pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=[name for name in texts if name not in _UNIQUE],
        column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in vectors} or None,
        write_page_checksum=True,
        write_page_index=True,
        version="2.6",
    )
    writer.add_key_value_metadata(
        {
            "lehr.schema": footer.schema,
            "lehr.schema_version": str(footer.schema_version),
            "lehr.spec": footer.spec,
            "lehr.inputs": canonical_json(dict(footer.inputs)).decode(),
            "lehr.notes": canonical_json(dict(footer.notes)).decode(),
            _DIGEST.decode(): _BLANK.decode(),
        }
    )
    writer.write_table(table, row_group_size=VECTOR_ROWS if vectors else SCALAR_ROWS)
    writer.close()
    data = bytearray(sink.getvalue())
    place = data.rindex(_DIGEST_MARK) + len(_DIGEST_MARK)
    data[place : place + len(_BLANK)] = sha256(data).encode()
    return bytes(data)


def _check_digest(data: bytes | pa.Buffer, url: str) -> None:
    """Refuse a file that is not, byte for byte, what was written; one from before files held their hash passes."""
    view = memoryview(data)
    # The last 8 bytes say how long the footer before them is; where they are damaged, the file cannot be opened.
    start = max(0, len(view) - int.from_bytes(view[-8:-4], "little") - 8)
    found = bytes(view[start:]).rfind(_DIGEST_MARK)
    if found < 0:
        return
    place = start + found + len(_DIGEST_MARK)
    end = place + len(_BLANK)
    digest = hashlib.sha256(view[:place])
    digest.update(_BLANK)
    digest.update(view[end:])
    if digest.hexdigest().encode() != bytes(view[place:end]):
        raise CorruptFile(
            f"{url}: damaged (its content is not what its own hash says); delete it and run its stage again"
        )


def write_table(run_url: str, path: str, table: pa.Table, footer: Footer) -> Part:
    """Write `table` whole at `run_url`/`path` and return its manifest entry."""
    data = encode_table(table, footer)
    write_whole(f"{run_url}/{path}", data)
    return part_of(path, table, data)


def part_of(path: str, table: pa.Table, data: bytes) -> Part:
    """The manifest entry of a table that was encoded to `data`."""
    return Part(path=path, rows=table.num_rows, bytes=len(data), sha256=sha256(data))


def rows_to_table(schema_name: str, rows: Sequence[Mapping[str, Any]], k: int = 0) -> pa.Table:
    """Table of JSON-like rows in the named schema."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=table_schema(schema_name, k))


def _open(url: str, source: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names that are not UTF-8
        if isinstance(error, FileNotFoundError):
            raise
        raise CorruptFile(f"{url}: not a readable Parquet file ({error}); delete it and run its stage again") from error


def parse_footer(metadata: Mapping[bytes, bytes], url: str) -> Footer:
    """Lineage from the key-value metadata of a Parquet file. Raises `CorruptFile` where it was not written by Lehr."""
    foreign = sorted(key.decode(errors="replace") for key in metadata if key not in _KEYS)
    if foreign:
        raise CorruptFile(
            f"{url}: its footer holds {', '.join(foreign)}, which Lehr does not write; delete it and run its stage again"
        )
    try:
        return Footer(
            schema=metadata[b"lehr.schema"].decode(),
            spec=metadata[b"lehr.spec"].decode(),
            inputs=orjson.loads(metadata[b"lehr.inputs"]),
            notes=orjson.loads(metadata[b"lehr.notes"]),
            schema_version=int(metadata[b"lehr.schema_version"]),
        )
    except (KeyError, ValueError) as error:
        raise CorruptFile(
            f"{url}: its footer does not say what it was made from ({error}); it is not a file of Lehr"
        ) from error


def footer_of(file: pq.ParquetFile, url: str) -> Footer:
    """Lineage of an open file. Raises `CorruptFile` where it was not written by Lehr."""
    metadata = file.schema_arrow.metadata or {}
    return parse_footer({**metadata, **(file.metadata.metadata or {})}, url)


def read_footer(url: str) -> tuple[Footer, int]:
    """Lineage and row count of one file, without reading its rows."""
    try:
        with open_ranged(url) as handle:
            file = _open(url, handle)
            return footer_of(file, url), file.metadata.num_rows
    except FileNotFoundError as error:
        raise CorruptFile(f"{url} is missing; run its stage again") from error


def check_footer(footer: Footer, url: str, *, schema: str, spec: str | None, inputs: Mapping[str, str]) -> None:
    """Refuse a file of another schema, schema version, spec or input; the message holds both sides."""
    if footer.schema != schema:
        raise MixedFingerprints(f"{url} holds {footer.schema}, not {schema}")
    if footer.schema_version != SCHEMA_VERSION:
        raise MixedFingerprints(f"{url} has schema version {footer.schema_version}; this Lehr reads {SCHEMA_VERSION}")
    if spec is not None and footer.spec != spec:
        raise MixedFingerprints(
            f"{url} was made under spec {footer.spec}, expected {spec}; they cannot be mixed. Use another name, or score again"
        )
    for name, expected in inputs.items():
        found = footer.inputs.get(name)
        if found != expected:
            raise MixedFingerprints(f"{url} was made from {name} {found}, expected {expected}; run its stage again")


def _read(file: pq.ParquetFile, url: str, columns: Sequence[str] | None) -> pa.Table:
    try:
        return file.read(columns=list(columns) if columns is not None else None, use_threads=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptFile(f"{url}: damaged ({error}); delete it and run its stage again") from error


def decode_table(
    data: bytes | pa.Buffer, url: str, *, schema: str, spec: str | None = None, inputs: Mapping[str, str] | None = None
) -> tuple[pa.Table, Footer]:
    """Table and lineage of bytes already read, all of them verified; `url` names them in errors."""
    _check_digest(data, url)
    file = _open(url, pa.BufferReader(data))
    footer = footer_of(file, url)
    check_footer(footer, url, schema=schema, spec=spec, inputs=inputs or {})
    return _read(file, url, None), footer


def read_table(
    url: str,
    *,
    schema: str,
    spec: str | None = None,
    inputs: Mapping[str, str] | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Read columns of one file, with page checksums verified and lineage checked."""
    try:
        with open_ranged(url) as handle:
            file = _open(url, handle)
            check_footer(footer_of(file, url), url, schema=schema, spec=spec, inputs=inputs or {})
            return _read(file, url, columns)
    except FileNotFoundError as error:
        raise CorruptFile(f"{url} is missing; run its stage again") from error


def decode_vectors(
    data: bytes | pa.Buffer,
    url: str,
    column: str,
    store: Callable[[int, pa.Array], None],
    *,
    schema: str,
    spec: str | None = None,
    rows: int,
    width: int,
) -> pa.Table:
    """Hand the vectors of `column` to `store(row, numbers)` a row group at a time, and return the other columns as a table.

    `numbers` is flat and not kept here, so one row group is in memory at a time. Raises `CorruptFile` where the file holds
    other than `rows` vectors of `width` numbers, before anything is handed over, or where it is damaged; `InputError` where it
    was stored without the column.
    """
    file = _open(url, pa.BufferReader(data))
    check_footer(footer_of(file, url), url, schema=schema, spec=spec, inputs={})
    if column not in file.schema_arrow.names:
        raise InputError(
            f"{url} holds no column {column!r}: it was left out when the scoring was stored (--keep scalars)"
        )
    found = (file.metadata.num_rows, file.schema_arrow.field(column).type.list_size)
    if found != (rows, width):
        raise CorruptFile(
            f"{url} holds {found[0]} rows of {found[1]} numbers, expected {rows} of {width}; "
            "delete it and run its stage again"
        )
    row = 0
    for group in range(file.num_row_groups):
        try:
            vectors = file.read_row_group(group, columns=[column], use_threads=False)[column]
        except (pa.ArrowException, OSError) as error:
            raise CorruptFile(f"{url}: damaged ({error}); delete it and run its stage again") from error
        for chunk in vectors.chunks:
            store(row, chunk.flatten())
            row += len(chunk)
    return _read(file, url, [name for name in file.schema_arrow.names if name != column])


def read_columns(run_url: str, part: Part, columns: Sequence[str], *, schema: str, spec: str | None = None) -> pa.Table:
    """Some columns of a listed part, without the bytes of the others.

    Size, lineage and the checksums of the pages that are read are verified; the hash of the whole file is not, for it would
    take every byte. Raises `CorruptFile` where the part is missing or damaged.
    """
    url = f"{run_url}/{part.path}"
    try:
        with open_ranged(url) as handle:
            size = handle.seek(0, 2)
            if size != part.bytes:
                raise CorruptFile(
                    f"{url} has {size} bytes, its manifest lists {part.bytes}; delete it and run its stage again"
                )
            handle.seek(0)
            file = _open(url, handle)
            check_footer(footer_of(file, url), url, schema=schema, spec=spec, inputs={})
            if file.metadata.num_rows != part.rows:
                raise CorruptFile(
                    f"{url} holds {file.metadata.num_rows} rows, its manifest lists {part.rows}; "
                    "delete it and run its stage again"
                )
            return _read(file, url, columns)
    except FileNotFoundError as error:
        raise CorruptFile(f"{url} is listed in a manifest but missing; run its stage again") from error


def read_part(run_url: str, part: Part) -> bytes:
    """Bytes of a listed part. Raises `CorruptFile` where it is missing or its hash differs from the manifest."""
    return part_buffer(run_url, part, mapped=False).to_pybytes()


def part_buffer(run_url: str, part: Part, *, mapped: bool = True) -> pa.Buffer:
    """The same as a buffer; of a local file the pages of the file itself (`mapped`), which takes no copy."""
    url = f"{run_url}/{part.path}"
    try:
        if mapped and part.bytes and is_local(url):
            # An empty file cannot be mapped, and any other size than the one listed is refused anyway.
            path = filesystem(url)[1]
            data = pa.memory_map(path).read_buffer() if os.path.getsize(path) == part.bytes else pa.py_buffer(b"")
        else:
            data = pa.py_buffer(read_bytes(url))
    except FileNotFoundError as error:
        raise CorruptFile(f"{url} is listed in a manifest but missing; run its stage again") from error
    found = hashlib.sha256(data).hexdigest()
    if found != part.sha256:
        raise CorruptFile(
            f"{url} differs from its manifest (sha256 {found[:12]}, listed {part.sha256[:12]}); delete it and run its stage again"
        )
    return data


def same_spec(footers: Iterable[tuple[str, Footer]]) -> None:
    """Refuse to read files of different specs as one table."""
    first: tuple[str, Footer] | None = None
    for url, footer in footers:
        if first is None:
            first = (url, footer)
        elif footer.spec != first[1].spec:
            raise MixedFingerprints(
                f"{first[0]} was made under spec {first[1].spec} and {url} under {footer.spec}; they cannot be mixed"
            )
