"""Parquet: row ranges, column types, damage."""

from __future__ import annotations

import datetime
import decimal
import io
import random
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.readers import parquet, read_unit
from schemas.errors import InputError, SourceChanged
from schemas.sample import Reject, Row
from schemas.spec import CorpusColumns
from tests.killing import ROOT
from tests.pipelines.reading import outcome, put, read, scan, scan_and_read, spec


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def encode(table: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **{"write_page_checksum": True, "compression": "none", **options})
    return sink.getvalue()


def texts(count: int) -> list[str]:
    return [f"row {row} {uuid.UUID(int=row).hex}" for row in range(count)]


def test_units_are_whole_row_groups_that_fit_and_pieces_of_those_that_do_not(root: str) -> None:
    # A text has 38 bytes, from row 10 on 39: a group of 20 rows has 195 tokens (193 the first), a row 9.75.
    put(root, "a.parquet", encode(pa.table({"text": texts(100)}), row_group_size=20, use_dictionary=False))
    counts = {
        size: [unit.row_count for unit in scan(root, "a.parquet", spec(unit_tokens=size))[0]]
        for size in (100_000, 600, 100, 1)
    }
    assert counts[100_000] == [100]
    assert counts[600] == [60, 40]
    assert counts[100] == [10] * 10
    assert counts[1] == [1] * 100
    whole = scan_and_read(root, "a.parquet", spec())
    assert [outcome(item) for item in whole] == texts(100)
    for size in counts:
        plan = spec(unit_tokens=size)
        units, _ = scan(root, "a.parquet", plan)
        assert size == 1 or max(unit.estimated_tokens for unit in units) <= size
        assert read(root, units, plan) == whole
        for unit in reversed(units):
            assert list(read_unit(root, unit, plan)) == whole[unit.row_start : unit.row_start + unit.row_count]


@pytest.mark.parametrize("dictionary", [False, True])
def test_tokens_are_a_quarter_of_the_bytes_of_the_text(root: str, dictionary: bool) -> None:
    # 3 texts, 900 times: dictionary encoding would count them once.
    body = ["x" * 400, "y" * 800, "z" * 1200] * 900
    table = pa.table({"text": body, "other": ["o" * 5000] * 2700})
    put(root, "a.parquet", encode(table, use_dictionary=dictionary))
    tokens = sum(unit.estimated_tokens for unit in scan(root, "a.parquet", spec())[0])
    # Exact, up to the rounding of each of 9 units.
    assert tokens == pytest.approx(800 * 2700 / 4, abs=9)


@pytest.mark.parametrize("distinct", [3, 2700])
def test_tokens_where_the_writer_did_not_note_the_bytes(tmp_path: Path, distinct: int) -> None:
    path = tmp_path / "a.parquet"
    query = f"SELECT repeat(chr((97 + i % 3)::INT), 796) || lpad((i % {distinct})::VARCHAR, 4, '0') AS text FROM range(2700) t(i)"
    duckdb.sql(f"COPY ({query}) TO '{path}' (FORMAT parquet, COMPRESSION uncompressed)")
    tokens = sum(unit.estimated_tokens for unit in scan(str(tmp_path), "a.parquet", spec())[0])
    # Parquet adds 4 bytes to a string of 800, and headers to pages; repeated texts are measured.
    assert tokens == pytest.approx(800 * 2700 / 4, rel=0.01)
    assert len(scan_and_read(str(tmp_path), "a.parquet", spec())) == 2700


@pytest.mark.parametrize("small", [0, 100])
def test_a_repeated_text_is_no_bomb(tmp_path: Path, small: int) -> None:
    """300 texts of 2 MB that the file holds once: its first rows say what they are, or say nothing of it."""
    path = tmp_path / "a.parquet"
    text = f"CASE WHEN i < {small} THEN 'small' ELSE repeat('x', 2000000) END"
    limits = "DICTIONARY_SIZE_LIMIT 1000, STRING_DICTIONARY_PAGE_SIZE_LIMIT 100000000"
    duckdb.sql(f"COPY (SELECT {text} AS text FROM range(300) t(i)) TO '{path}' (FORMAT parquet, {limits})")
    assert path.stat().st_size < 200_000
    before, counting = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counting)
    try:
        units, _ = scan(str(tmp_path), "a.parquet", spec())
        lengths = [len(outcome(item) or "") for unit in units for item in read_unit(str(tmp_path), unit, spec())]
    finally:
        pa.set_memory_pool(before)
    assert lengths == [5] * small + [2_000_000] * (300 - small)
    # A batch of 16 MB, in an array that grows by doubling, the page, and what the batch before it left.
    assert counting.max_memory() < 80 << 20


def test_a_large_row_group_is_decoded_once_by_a_worker_that_reads_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(str(tmp_path), "a.parquet", encode(pa.table({"text": texts(5000)})))
    plan = spec(unit_tokens=1000)
    units, _ = scan(str(tmp_path), "a.parquet", plan)
    assert len(units) > 20
    opened = []
    original = parquet._batches

    def counted(*args: Any) -> Any:
        opened.append(args)
        return original(*args)

    monkeypatch.setattr(parquet, "_batches", counted)
    read(str(tmp_path), units, plan)
    assert len(opened) == 1
    list(read_unit(str(tmp_path), units[3], plan))
    assert len(opened) == 2


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_string_types(root: str, kind: pa.DataType) -> None:
    column = pa.array(["a", "", " b\0 ", None, "a"])
    column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
    put(root, "a.parquet", encode(pa.table({"text": column})))
    assert [outcome(item) for item in scan_and_read(root, "a.parquet", spec())] == [
        "a",
        "",
        " b\0 ",
        "!wrong_type",
        "a",
    ]


def test_values_that_json_has_not_are_strings(root: str) -> None:
    table = pa.table(
        {
            "text": ["t", "t"],
            "id": pa.array([2**63 + 1, 5], pa.uint64()),
            "d": [decimal.Decimal("1.50"), None],
            "bytes": [b"abc", b"\xff\x00"],
            "day": [datetime.date(2020, 1, 2), None],
            "ns": pa.array([1_000_000_007, None], pa.timestamp("ns")),
            "far": pa.array([2**45, None], pa.timestamp("ms")),
            "span": [datetime.timedelta(seconds=1), None],
            "nan": [float("nan"), float("inf")],
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
            "struct": [{"z": 1, "a": b"x"}, None],
        }
    )
    put(root, "a.parquet", encode(table))
    keep = tuple(name for name in table.column_names if name not in ("text", "id", "d"))
    items = scan_and_read(root, "a.parquet", spec(columns=CorpusColumns(id="id", domain="d", keep=keep)))
    assert [(item.source_id, item.domain) for item in items] == [("9223372036854775809", "1.50"), ("5", "")]
    assert items[0].extra.startswith('{"bytes":"abc","day":"2020-01-02","far":"3084-12-12 12:41:28.832","map"')
    assert '"map":[["k",1]],"nan":null,"ns":"1970-01-01 00:00:01.000000007"' in items[0].extra
    assert items[0].extra.endswith('"struct":{"a":"x","z":1}}')
    assert '"bytes":"ff00","day":null' in items[1].extra


def test_prompts_and_messages(root: str) -> None:
    turns = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        [],
        [{"role": "user", "content": None}],
        None,
    ]
    table = pa.table({"q": ["a", "b", None, "d"], "a": ["1", "2", "3", "4"], "m": turns})
    put(root, "a.parquet", encode(table))
    items = scan_and_read(root, "a.parquet", spec(columns=CorpusColumns(prompt="q", completion="a")))
    assert [(item.prompt, item.completion) for item in items if isinstance(item, Row)] == [
        ("a", "1"),
        ("b", "2"),
        ("d", "4"),
    ]
    items = scan_and_read(root, "a.parquet", spec(columns=CorpusColumns(messages="m")))
    assert [item.messages if isinstance(item, Row) else item.reason for item in items] == [
        turns[0],
        [],
        "wrong_type",
        "wrong_type",
    ]


def test_columns_that_cannot_be_read_are_errors_of_the_plan(root: str) -> None:
    put(root, "a.parquet", encode(pa.table({"body": ["x"], "n": [1], "raw": [b"x"], "m": [["x"]]})))
    with pytest.raises(InputError, match=r"a\.parquet: no column 'text'; it has: body, m, n, raw.*--text-column"):
        scan(root, "a.parquet", spec())
    for columns in (
        CorpusColumns(text="body", id="x"),
        CorpusColumns(text="body", domain="x"),
        CorpusColumns(text="body", keep=("x",)),
    ):
        with pytest.raises(InputError, match="no column 'x'"):
            scan(root, "a.parquet", spec(columns=columns))
    for name in ("n", "raw"):
        with pytest.raises(InputError, match=f"column '{name}' is .*not text"):
            scan(root, "a.parquet", spec(columns=CorpusColumns(text=name)))
    with pytest.raises(InputError, match=r"not a list of \{role"):
        scan(root, "a.parquet", spec(columns=CorpusColumns(messages="m")))


def test_a_column_that_stands_twice_is_an_error_of_the_plan(root: str) -> None:
    put(root, "a.parquet", encode(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])))
    with pytest.raises(InputError, match="stands twice"):
        scan(root, "a.parquet", spec())


def test_limit_and_row_bound(root: str) -> None:
    put(root, "a.parquet", encode(pa.table({"text": ["x" * n for n in range(50)]}), row_group_size=10))
    items = scan_and_read(root, "a.parquet", spec(limit=25, unit_tokens=20, max_row_bytes=20))
    assert [outcome(item) for item in items] == ["x" * n if n <= 20 else "!row_too_large" for n in range(25)]


def test_text_that_is_not_utf8_costs_its_row(root: str) -> None:
    raw = pa.array([b"good", b"\xff\xfe", b"also"])
    bad = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    put(root, "a.parquet", encode(pa.table({"text": bad})))
    assert [outcome(item) for item in scan_and_read(root, "a.parquet", spec())] == ["good", "!invalid_utf8", "also"]


@pytest.mark.parametrize(
    "body", [b"", b"PAR1", b"no parquet at all" * 9, b"x" * 50 + b"\xff\xff\xff\x7fPAR1", b"y" * 30 + b"\x08\0\0\0PAR1"]
)
def test_a_file_that_cannot_be_opened_is_one_reject_and_a_warning(root: str, body: bytes) -> None:
    put(root, "a.parquet", body)
    units, warnings = scan(root, "a.parquet", spec())
    assert [unit.row_count for unit in units] == [1]
    assert "not a readable Parquet file" in warnings[0]
    assert [outcome(item) for item in read(root, units, spec())] == ["!unreadable_file"]
    put(root, "a.parquet", body + b"more")
    with pytest.raises(SourceChanged):
        list(read_unit(root, units[0], spec()))


def test_a_truncated_file_is_one_reject(root: str) -> None:
    data = encode(pa.table({"text": texts(100)}))
    put(root, "a.parquet", data[:-1])
    assert [outcome(item) for item in scan_and_read(root, "a.parquet", spec())] == ["!unreadable_file"]


def test_damaged_pages_reject_the_rows_behind_them_however_units_are_cut(root: str) -> None:
    body = texts(4000)
    data = bytearray(encode(pa.table({"text": body}), row_group_size=2000, use_dictionary=False, data_page_size=4096))
    at = data.index(body[1000].encode())
    data[at] ^= 1
    put(root, "a.parquet", bytes(data))
    whole = scan_and_read(root, "a.parquet", spec())
    # One unit: nothing behind the page can be placed.
    good = [item for item in whole if isinstance(item, Row)]
    assert [item.text for item in good] == body[: len(good)]
    assert 0 <= len(good) <= 1000
    assert all(outcome(item) == "!damaged" for item in whole[len(good) :])
    plan = spec(unit_tokens=1000)
    cut = read(root, scan(root, "a.parquet", plan)[0], plan)
    # Smaller units: the second row group is sound again.
    assert [outcome(item) for item in cut[2000:]] == body[2000:]
    assert outcome(cut[1000]) == outcome(cut[1999]) == "!damaged"
    assert [outcome(item) for item in cut[: len(good)]] == body[: len(good)]


def test_a_replaced_file_is_named(root: str) -> None:
    put(root, "a.parquet", encode(pa.table({"text": texts(100)})))
    units, _ = scan(root, "a.parquet", spec())
    put(root, "a.parquet", encode(pa.table({"text": texts(101)})))
    with pytest.raises(SourceChanged, match=r"a\.parquet differs from the plan \(its size or footer\).*--extend"):
        list(read_unit(root, units[0], spec()))


def test_no_rows(root: str) -> None:
    put(root, "a.parquet", encode(pa.table({"text": pa.array([], pa.string())})))
    units, warnings = scan(root, "a.parquet", spec())
    assert units == []
    assert "holds no row" in warnings[0]


def repeated(turns: int, content: str) -> pa.ListArray:
    """One row of so many turns with one text, which a file holds once."""
    same = np.zeros(turns, np.int32)
    fields = [pa.DictionaryArray.from_arrays(pa.array(same), pa.array([text])) for text in ("user", content)]
    return pa.ListArray.from_arrays(
        pa.array([0, turns], pa.int32()), pa.StructArray.from_arrays(fields, ["role", "content"])
    )


_LIST_BOMB = """
import resource, sys
from schemas.spec import CorpusColumns
from tests.pipelines.reading import outcome, scan_and_read, spec

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

plan = spec(columns=CorpusColumns(messages="m"))
before = peak()
print([outcome(item) for item in scan_and_read(sys.argv[1], "a.parquet", plan)], peak() - before)
"""


def test_a_list_that_repeats_a_text_is_measured_without_being_expanded(tmp_path: Path) -> None:
    """A kilobyte that stands for 1.5 GB costs its row, and some tens of megabytes."""
    table = pa.table({"m": repeated(300_000, "x" * 5000)})
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 1000
    command = [sys.executable, "-c", _LIST_BOMB, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    outcomes, peak = done.stdout.rsplit(" ", 1)
    assert outcomes == "['!row_too_large']" and float(peak) < 300


def test_a_list_of_countless_empty_turns_is_too_large(tmp_path: Path) -> None:
    pq.write_table(pa.table({"m": repeated(200_000, "")}), tmp_path / "a.parquet", store_schema=False)
    plan = spec(columns=CorpusColumns(messages="m"), max_row_bytes=1 << 20)
    (item,) = scan_and_read(str(tmp_path), "a.parquet", plan)
    assert isinstance(item, Reject) and item.reason == "row_too_large" and "'m'" in item.detail


def test_pages_that_stand_for_far_more_than_the_file_holds_are_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.readers.parquet._BOMB_BYTES", 1 << 20)
    bodies = ["a" * (2 << 20), "b" * 100]
    for dictionary in (False, True):
        pq.write_table(
            pa.table({"text": bodies}), tmp_path / "a.parquet", compression="zstd", use_dictionary=dictionary, row_group_size=1
        )  # fmt: skip
        items = scan_and_read(str(tmp_path), "a.parquet", spec())
        assert [outcome(item) for item in items] == ["!damaged", bodies[1]]
        assert "stand for 2,09" in items[0].detail  # type: ignore[union-attr]
    # As large, and worth its bytes.
    bodies[0] = random.Random(0).randbytes(1 << 20).hex()
    pq.write_table(pa.table({"text": bodies}), tmp_path / "a.parquet", compression="zstd", row_group_size=1)
    assert [outcome(item) for item in scan_and_read(str(tmp_path), "a.parquet", spec())] == bodies


@pytest.mark.parametrize("text", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("outer", [pa.list_, pa.large_list])
def test_texts_in_lists_read_alike_however_they_are_encoded(tmp_path: Path, text: pa.DataType, outer: Any) -> None:
    turn = pa.struct([("role", text), ("content", text), ("n", pa.int64())])
    rows: list[Any] = [
        [{"role": "user", "content": f"c{row % 3}", "n": row}, {"role": "assistant", "content": "yes", "n": None}]
        for row in range(40)
    ]
    rows[5], rows[6], rows[7] = [], None, [{"role": None, "content": None, "n": 1}]
    table = pa.table(
        {"m": pa.array(rows, outer(turn)), "k": pa.array([{"a": ["z", None], "b": "z"}] * 40)},
    )
    found = []
    for dictionary in (False, True):
        for schema in (False, True):
            pq.write_table(
                table, tmp_path / "a.parquet", use_dictionary=dictionary, store_schema=schema, row_group_size=15
            )
            plan = spec(columns=CorpusColumns(messages="m", keep=("k",)), unit_tokens=20)
            found.append(scan_and_read(str(tmp_path), "a.parquet", plan))
    assert found[0] == found[1] == found[2] == found[3]
    assert isinstance(found[0][0], Row) and found[0][0].messages == [
        {"role": "user", "content": "c0"}, {"role": "assistant", "content": "yes"},
    ]  # fmt: skip
