"""Parquet files: equal bytes for equal content, nothing damaged or mixed is ever read."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import CorruptFile, LehrError, MixedFingerprints
from schemas.parquet import (
    SCALAR_ROWS,
    VECTOR_ROWS,
    Footer,
    Part,
    decode_table,
    encode_table,
    footer_of,
    read_footer,
    read_part,
    read_table,
    same_spec,
    write_table,
)
from schemas.tables import table_schema

FOOTER = Footer(schema="features", spec="a" * 32, inputs={"unit": "u1"}, notes={"halved": 1})
K = 8


def features(rows: int) -> pa.Table:
    rng = np.random.default_rng(0)
    columns = {}
    for field in table_schema("features", K):
        if pa.types.is_string(field.type):
            columns[field.name] = pa.array([f"{field.name} {i}" for i in range(rows)])
        elif pa.types.is_fixed_size_list(field.type):
            flat = pa.array(rng.normal(size=rows * K).astype(np.float16))
            columns[field.name] = pa.FixedSizeListArray.from_arrays(flat, type=field.type)
        else:
            columns[field.name] = pa.array(rng.integers(0, 99, rows)).cast(field.type)
    return pa.table(columns, schema=table_schema("features", K))


def test_round_trip_with_lineage(tmp_path: Path) -> None:
    table = features(50)
    part = write_table(str(tmp_path), "x/part.parquet", table, FOOTER)
    assert (part.rows, part.bytes) == (50, (tmp_path / part.path).stat().st_size)
    url = str(tmp_path / part.path)
    assert read_table(url, schema="features", spec="a" * 32, inputs={"unit": "u1"}).equals(table)
    assert read_table(url, schema="features", columns=("row", "path")).column_names == ["row", "path"]
    decoded, footer = decode_table(read_part(str(tmp_path), part), url, schema="features")
    assert decoded.equals(table) and footer == FOOTER
    assert read_footer(url) == (FOOTER, 50)


@pytest.mark.parametrize("rows", [0, 1, VECTOR_ROWS + 1])
def test_equal_content_gives_equal_bytes(rows: int) -> None:
    table = features(rows)
    once = encode_table(table, FOOTER)
    assert encode_table(table, FOOTER) == once
    pieces = pa.concat_tables([table.slice(0, rows // 3), table.slice(rows // 3)])
    assert encode_table(pieces, FOOTER) == once
    back, _ = decode_table(once, "x", schema="features")
    assert back.equals(table) and encode_table(back, FOOTER) == once
    assert encode_table(table, dataclasses.replace(FOOTER, spec="b" * 32)) != once


def test_row_groups_are_bounded() -> None:
    file = pq.ParquetFile(pa.BufferReader(encode_table(features(2 * VECTOR_ROWS + 1), FOOTER)))
    assert file.num_row_groups == 3
    scalars = features(SCALAR_ROWS + 1).drop_columns(["sketch"])
    assert pq.ParquetFile(pa.BufferReader(encode_table(scalars, FOOTER))).num_row_groups == 2


def test_opens_in_any_engine(tmp_path: Path) -> None:
    """A plain reader sees the rows, the docs of the fields and the footer."""
    write_table(str(tmp_path), "p.parquet", features(3), FOOTER)
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.num_rows == 3 and table.schema.field("tokens").metadata[b"unit"] == b"tokens"
    assert pq.read_metadata(tmp_path / "p.parquet").metadata[b"lehr.spec"] == b"a" * 32
    import duckdb

    count = duckdb.sql(f"SELECT count(*), sum(tokens) FROM '{tmp_path}/p.parquet'").fetchall()
    assert count == [(3, sum(table["tokens"].to_pylist()))]


def test_mixed_spec_is_refused_with_both(tmp_path: Path) -> None:
    write_table(str(tmp_path), "p.parquet", features(3), FOOTER)
    with pytest.raises(MixedFingerprints) as error:
        read_table(str(tmp_path / "p.parquet"), schema="features", spec="c" * 32)
    assert "a" * 32 in str(error.value) and "c" * 32 in str(error.value) and "p.parquet" in str(error.value)


def test_mixed_input_is_refused_with_both(tmp_path: Path) -> None:
    write_table(str(tmp_path), "p.parquet", features(3), FOOTER)
    with pytest.raises(MixedFingerprints, match=r"made from unit u1, expected u2"):
        read_table(str(tmp_path / "p.parquet"), schema="features", inputs={"unit": "u2"})
    with pytest.raises(MixedFingerprints, match=r"made from target None, expected t"):
        read_table(str(tmp_path / "p.parquet"), schema="features", inputs={"target": "t"})


def test_other_schema_and_version_are_refused() -> None:
    data = encode_table(features(3), FOOTER)
    with pytest.raises(MixedFingerprints, match="holds features, not curvature"):
        decode_table(data, "x", schema="curvature")
    old = encode_table(features(3), dataclasses.replace(FOOTER, schema_version=99))
    with pytest.raises(MixedFingerprints, match="schema version 99"):
        decode_table(old, "x", schema="features")


def test_files_of_two_specs_are_not_one_table() -> None:
    other = dataclasses.replace(FOOTER, spec="b" * 32)
    same_spec([("one", FOOTER), ("two", FOOTER)])
    same_spec([])
    with pytest.raises(MixedFingerprints) as error:
        same_spec([("one", FOOTER), ("two", FOOTER), ("three", other)])
    assert all(word in str(error.value) for word in ("one", "three", "a" * 32, "b" * 32))


def test_every_flipped_bit_in_a_page_is_detected() -> None:
    """Readers are silent about flipped bits by default; with page checksums none may come back as other rows."""
    table = features(300)
    data = encode_table(table, FOOTER)
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    ends = [
        (c.dictionary_page_offset or c.data_page_offset, c.total_compressed_size)
        for g in range(metadata.num_row_groups)
        for c in (metadata.row_group(g).column(i) for i in range(metadata.num_columns))
    ]
    rng = random.Random(0)
    silent = 0
    for _ in range(200):
        start, size = rng.choice(ends)
        at = start + rng.randrange(size)
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            read, _ = decode_table(bytes(damaged), "x.parquet", schema="features")
        except LehrError as error:
            assert "x.parquet" in str(error)
        else:
            # A flip in a page header may touch a field that nobody reads; then the rows are the same.
            silent += not read.equals(table)
    assert silent == 0


def test_flipped_bit_without_verification_would_pass_unseen() -> None:
    """The test above proves something: a plain reader returns other rows for some of the same flips."""
    table = features(300)
    data = encode_table(table, FOOTER)
    column = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(table.column_names.index("loss"))
    unseen = 0
    for at in range(column.data_page_offset + 40, column.data_page_offset + column.total_compressed_size, 7):
        damaged = bytearray(data)
        damaged[at] ^= 1
        try:
            unseen += not pq.read_table(pa.BufferReader(bytes(damaged))).equals(table)
        except (pa.ArrowException, OSError):
            continue
    assert unseen > 0


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -500])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    data = encode_table(features(30), FOOTER)
    (tmp_path / "p.parquet").write_bytes(data[:keep])
    with pytest.raises(CorruptFile, match=r"p\.parquet"):
        read_table(str(tmp_path / "p.parquet"), schema="features")


def test_part_that_differs_from_its_manifest_is_named(tmp_path: Path) -> None:
    part = write_table(str(tmp_path), "p.parquet", features(3), FOOTER)
    path = tmp_path / "p.parquet"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # in the footer, where no page checksum reaches
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptFile, match=r"p\.parquet differs from its manifest"):
        read_part(str(tmp_path), part)
    path.unlink()
    with pytest.raises(CorruptFile, match="missing"):
        read_part(str(tmp_path), part)
    with pytest.raises(CorruptFile, match="missing"):
        read_table(str(path), schema="features")


def test_foreign_parquet_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "p.parquet")
    with pytest.raises(CorruptFile, match="not a file of Lehr"):
        read_table(str(tmp_path / "p.parquet"), schema="features")
    with pytest.raises(CorruptFile, match="not a file of Lehr"):
        footer_of(pq.ParquetFile(tmp_path / "p.parquet"), "p")


def test_part_is_what_a_manifest_lists() -> None:
    assert [field.name for field in dataclasses.fields(Part)] == ["path", "rows", "bytes", "sha256"]


def test_every_bit_of_a_file_is_covered() -> None:
    """Page checksums cover the pages; the file's own hash covers the footer, the page index and itself."""
    rng = random.Random(3)
    sound = encode_table(features(3), FOOTER)
    footer = int.from_bytes(sound[-8:-4], "little") + 8
    places = [len(sound) - 1 - rng.randrange(footer) for _ in range(1500)] + [
        rng.randrange(len(sound)) for _ in range(300)
    ]
    for place in places:
        data = bytearray(sound)
        data[place] ^= 1 << rng.randrange(8)
        with pytest.raises(LehrError):
            decode_table(bytes(data), "x", schema="features")


def test_files_without_a_hash_of_their_own_are_read() -> None:
    """Those written before there was one."""
    metadata = pq.read_metadata(pa.BufferReader(encode_table(features(3), FOOTER))).metadata
    kept = {key: value for key, value in metadata.items() if key not in (b"lehr.sha256", b"ARROW:schema")}
    assert len(kept) == len(metadata) - 2 == 5
    sink = pa.BufferOutputStream()
    pq.write_table(features(3).replace_schema_metadata(kept), sink)
    table, footer = decode_table(sink.getvalue().to_pybytes(), "x", schema="features")
    assert table.column("row").equals(features(3).column("row")) and footer == FOOTER
