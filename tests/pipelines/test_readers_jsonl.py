"""JSON lines: cutting, counting, hostile bytes, compression."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.readers import lines, read_row, read_unit, source
from schemas.errors import InputError, SourceChanged
from schemas.sample import Reject, Row
from schemas.spec import CorpusColumns
from tests.pipelines.reading import outcome, put, read, scan, scan_and_read, spec


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKERS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstd, ".zstd": zstd}


def rows_of(count: int) -> bytes:
    return b"".join(b'{"text": "row %d"}\n' % row for row in range(count))


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n"])
def test_lines_blank_lines_and_line_ends(root: str, ending: bytes, last: bytes) -> None:
    body = ending.join([b"", b'{"text": "a"}', b" \t", b"", b'{"text": " b "}', b'{"text": ""}']) + last
    put(root, "a.jsonl", body)
    assert [outcome(item) for item in scan_and_read(root, "a.jsonl", spec())] == ["a", " b ", ""]


def test_units_are_bounded_cover_the_file_and_agree_with_one_unit(root: str) -> None:
    put(root, "a.jsonl", rows_of(1000))
    whole = scan_and_read(root, "a.jsonl", spec())
    plan = spec(unit_tokens=50)
    units, _ = scan(root, "a.jsonl", plan)
    assert len(units) > 50
    assert max(unit.estimated_tokens for unit in units) <= 50
    # Greedy: two neighbours would not fit into one unit.
    assert all(a.byte_end - a.byte_start + b.byte_end - b.byte_start > 200 for a, b in itertools.pairwise(units))
    assert units[0].byte_start == 0
    assert units[-1].byte_end == len(rows_of(1000))
    assert all(a.byte_end == b.byte_start for a, b in itertools.pairwise(units))
    assert read(root, units, plan) == whole
    assert len({unit.unit_id for unit in units}) == len(units)


def test_tokens_are_a_quarter_of_the_bytes_of_the_lines(root: str) -> None:
    put(root, "a.jsonl", rows_of(1000))
    units, _ = scan(root, "a.jsonl", spec())
    assert [unit.estimated_tokens for unit in units] == [-(-len(rows_of(1000)) // 4)]
    put(root, "a.jsonl.gz", gzip.compress(rows_of(1000)))
    assert scan(root, "a.jsonl.gz", spec())[0][0].estimated_tokens == units[0].estimated_tokens


def _oracle(data: bytes, limit: int) -> list[tuple[int, int, int]]:
    """(start, end, rows) of the longest runs of whole lines within `limit` bytes; runs without rows are no units."""
    ends, at = [], 0
    for line in data.splitlines(keepends=True) if b"\r" not in data else _split(data):
        ends.append((at, at + len(line), bool(line.strip())))
        at += len(line)
    cuts: list[list[int]] = []
    for start, end, row in ends:
        if cuts and end - cuts[-1][0] <= limit:
            cuts[-1][1:] = [end, cuts[-1][2] + row]
        else:
            cuts.append([start, end, int(row)])
    return [(start, end, rows) for start, end, rows in cuts if rows]


def _split(data: bytes) -> list[bytes]:
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([b"a", b"bb" * 9, b"", b" ", b"\t\r", b"\r", b"ccc", b"x" * 40]), max_size=30),
    st.booleans(),
    st.integers(1, 60),
    st.integers(1, 50),
)
def test_cuts_do_not_depend_on_blocks(parts: list[bytes], last: bool, limit: int, block: int) -> None:
    data = b"\n".join(parts) + (b"\n" if last else b"")
    blocks = [data[at : at + block] for at in range(0, len(data), block)]
    cuts = list(lines.cut_lines(blocks, limit))
    assert [(cut.start, cut.end, cut.rows) for cut in cuts] == _oracle(data, limit)
    for cut in cuts:
        digest = source.new_digest()
        digest.update(data[cut.start : cut.end])
        assert cut.digest == digest.hexdigest()
    whole = [line.data for line in lines.read_lines(blocks, 1000)]
    assert whole == [line.strip(b"\n").removesuffix(b"\r") for line in _split(data) if line.strip()]
    assert sum(cut.rows for cut in cuts) == len(whole)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60).filter(lambda b: b"\n" not in b), st.integers(1, 50), st.integers(1, 20))
def test_the_bound_of_a_row_counts_its_bytes_without_the_line_break(line: bytes, bound: int, block: int) -> None:
    for ending in (b"\n", b"\r\n", b""):
        data = line + ending
        found = list(lines.read_lines([data[at : at + block] for at in range(0, len(data), block)], bound))
        if not line.strip():
            assert found == []
            continue
        body = data.removesuffix(b"\n").removesuffix(b"\r")
        assert [(entry.complete, entry.size) for entry in found] == [(len(body) <= bound, len(body))] or (
            len(body) > bound and found[0].complete is False
        )


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("block", [100, 1 << 20])
def test_the_bound_is_exact_for_rows_of_several_kib(ending: bytes, block: int) -> None:
    for size, complete in ((3000, True), (3001, False), (3002, False)):
        data = b"x" * size + ending
        found = list(lines.read_lines([data[at : at + block] for at in range(0, len(data), block)], 3000))
        assert [(line.complete, len(line.data)) for line in found] == [(complete, 3000 if complete else 1024)]


def test_limit_plans_exactly_the_first_rows(root: str) -> None:
    put(root, "a.jsonl", b"\n" + rows_of(10).replace(b"\n", b"\n\n"))
    put(root, "a.jsonl.gz", gzip.compress(rows_of(10)))
    for path in ("a.jsonl", "a.jsonl.gz"):
        texts = [outcome(item) for item in scan_and_read(root, path, spec(limit=4, unit_tokens=8))]
        assert texts == [f"row {row}" for row in range(4)]


def test_bad_rows_cost_themselves(root: str) -> None:
    deep = b'{"text": ' + b"[" * 2000 + b"]" * 2000 + b"}"
    body = [
        (b'{"text": "good"}', "good"),
        (b'{"text": ', "!invalid_json"),
        (b'{"text": NaN}', "!invalid_json"),
        (b'{"text": "\\ud800"}', "!invalid_json"),
        (b'{"text": "\xff"}', "!invalid_utf8"),
        (b"\xff\xfe\x00", "!invalid_utf8"),
        (b"[1, 2]", "!not_an_object"),
        (b'"text"', "!not_an_object"),
        (b"null", "!not_an_object"),
        (b'{"other": "x"}', "!missing_column"),
        (b"{}", "!missing_column"),
        (b'{"text": 5}', "!wrong_type"),
        (b'{"text": null}', "!wrong_type"),
        (b'{"text": ["a"]}', "!wrong_type"),
        (deep, "!too_deep"),
        (b'{"text": "' + b"x" * 5000 + b'"}', "!row_too_large"),
        (b'{"text": "first", "text": "second"}', "second"),
        (b'{"text": "nul \\u0000 end"}', "nul \0 end"),
        (b"\0\0\0", "!invalid_json"),
    ]
    put(root, "a.jsonl", b"\n".join(line for line, _ in body))
    items = scan_and_read(root, "a.jsonl", spec(max_row_bytes=4500))
    assert [outcome(item) for item in items] == [expected for _, expected in body]
    rejects = [item for item in items if isinstance(item, Reject)]
    assert all(reject.detail and len(reject.preview) <= 200 for reject in rejects)
    assert rejects[0].preview == '{"text": '


def test_ids_domains_and_carried_columns(root: str) -> None:
    columns = CorpusColumns(id="id", domain="d", keep=("z", "a"))
    body = [
        ({"text": "t", "id": "a\0\x1b[31m", "d": True, "z": {"b": 1, "a": [None]}, "a": 1.5}, ("a\0\x1b[31m", "true")),
        ({"text": "t", "id": 7, "d": 2.5}, ("7", "2.5")),
        ({"text": "t", "id": None}, ("", "")),
    ]
    put(root, "a.jsonl", "\n".join(json.dumps(record) for record, _ in body).encode())
    items = scan_and_read(root, "a.jsonl", spec(columns=columns))
    assert all(isinstance(item, Row) for item in items)
    assert [(item.source_id, item.domain) for item in items] == [expected for _, expected in body]
    assert items[0].extra == '{"a":1.5,"z":{"a":[null],"b":1}}'
    assert items[1].extra == '{"a":null,"z":null}'


def test_an_id_that_is_no_single_value_and_a_carried_column_without_bottom(root: str) -> None:
    nested = "[" * 300 + "]" * 300
    put(root, "a.jsonl", f'{{"text": "t", "id": [1], "k": 1}}\n{{"text": "t", "k": {nested}}}'.encode())
    items = scan_and_read(root, "a.jsonl", spec(columns=CorpusColumns(id="id", keep=("k",))))
    assert [outcome(item) for item in items] == ["!wrong_type", "!too_deep"]


def test_prompts_and_messages(root: str) -> None:
    put(root, "p.jsonl", b'{"q": "1+1?", "a": " 2"}\n{"q": "x"}\n{"q": "x", "a": 2}')
    items = scan_and_read(root, "p.jsonl", spec(columns=CorpusColumns(prompt="q", completion="a")))
    assert (items[0].prompt, items[0].completion, items[0].text) == ("1+1?", " 2", None)
    assert [item.reason for item in items[1:]] == ["missing_column", "wrong_type"]
    body = [
        [{"role": "user", "content": "hi", "name": "x"}, {"role": "assistant", "content": "ho"}],
        [],
        {"role": "user"},
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": 1, "content": "x"}],
    ]
    put(root, "m.jsonl", b"\n".join(json.dumps({"m": value}).encode() for value in body))
    items = scan_and_read(root, "m.jsonl", spec(columns=CorpusColumns(messages="m")))
    assert items[0].messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert items[1].messages == []
    assert [item.reason for item in items[2:]] == ["wrong_type"] * 5


def test_a_column_that_no_row_has_is_an_error_of_the_plan(root: str) -> None:
    put(root, "a.jsonl", b'oops\n{"content": "x", "text": "y"}\n')
    for columns in (
        CorpusColumns(text="body"),
        CorpusColumns(id="key"),
        CorpusColumns(domain="d"),
        CorpusColumns(keep=("k",)),
    ):
        with pytest.raises(InputError, match=r"a\.jsonl: no column .*it has: content, text"):
            scan(root, "a.jsonl", spec(columns=columns))
    put(root, "b.jsonl", b'{"text": "y"}\n{"text": "y", "d": "late"}\n')
    assert [item.domain for item in scan_and_read(root, "b.jsonl", spec(columns=CorpusColumns(domain="d")))] == [
        "",
        "late",
    ]


def test_a_byte_order_mark_is_not_content(root: str) -> None:
    for blank in (b"", b"\n"):
        put(root, "a.jsonl", b"\xef\xbb\xbf" + blank + rows_of(3))
        put(root, "a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + blank + rows_of(3)))
        for path in ("a.jsonl", "a.jsonl.gz"):
            assert [outcome(item) for item in scan_and_read(root, path, spec(unit_tokens=4))] == [
                "row 0",
                "row 1",
                "row 2",
            ]


def test_empty_files_hold_no_unit_and_an_array_is_pointed_out(root: str) -> None:
    put(root, "a.jsonl", b"")
    units, warnings = scan(root, "a.jsonl", spec())
    assert units == []
    assert warnings == [f"{root}/a.jsonl is empty"]
    put(root, "b.json", b'[\n{"text": "a"},\n{"text": "b"}\n]')
    assert "JSON array" in scan(root, "b.json", spec())[1][0]


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_files_are_one_unit_with_a_warning(root: str, suffix: str) -> None:
    path = f"a.jsonl{suffix}"
    put(root, path, PACKERS[suffix](rows_of(400)) + PACKERS[suffix](rows_of(100)))
    units, warnings = scan(root, path, spec(unit_tokens=500))
    assert len(units) == 1
    assert "split -l" in warnings[0]
    texts = [outcome(item) for item in read(root, units, spec(unit_tokens=500))]
    assert texts == [f"row {row}" for row in [*range(400), *range(100)]]
    assert scan(root, path, spec())[1] == []


@pytest.mark.parametrize("suffix", PACKERS)
def test_truncated_streams_end_in_one_reject(root: str, suffix: str) -> None:
    path = f"a.jsonl{suffix}"
    body = b"".join(b'{"text": "%s"}\n' % uuid.uuid4().hex.encode() for _ in range(20000))
    packed = PACKERS[suffix](body)
    texts = [json.loads(line)["text"] for line in body.splitlines()]
    for keep in (len(packed) // 2, len(packed) - 1, 3, 0):
        put(root, path, packed[:keep])
        units, warnings = scan(root, path, spec())
        if not units:
            assert keep == 0, "only an empty file has nothing to reject"
            continue
        assert "truncated" in warnings[0] or "corrupt" in warnings[0]
        items = read(root, units, spec())
        readable = len(items) - 1
        assert [outcome(item) for item in items[:-1]] == texts[:readable]
        assert outcome(items[-1]) in ("!truncated", "!corrupt")
    # Half of the stream holds about half of the rows; zstd decodes in blocks of at most 128 KiB (3000 of these rows).
    put(root, path, packed[: len(packed) // 2])
    assert abs(len(scan_and_read(root, path, spec())) - 10000) < 3500


def test_damage_inside_a_stream_is_one_reject_and_the_rows_before_it_stay(root: str) -> None:
    body = b"".join(b'{"text": "%s"}\n' % uuid.uuid4().hex.encode() for _ in range(20000))
    packed = bytearray(gzip.compress(body))
    packed[len(packed) // 2 : len(packed) // 2 + 64] = bytes(64)
    put(root, "a.jsonl.gz", bytes(packed))
    items = scan_and_read(root, "a.jsonl.gz", spec())
    assert sum(isinstance(item, Row) for item in items) > 5000
    assert outcome(items[-1]) in ("!truncated", "!corrupt")
    put(root, "b.jsonl.gz", b"this is no gzip\n")
    assert [outcome(item) for item in scan_and_read(root, "b.jsonl.gz", spec())] == ["!corrupt"]


def test_memory_is_bounded_by_the_largest_row_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr(source, "HELD_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as handle:
        handle.write(b'{"text": "first"}\n{"text": "')
        for _ in range(64):
            handle.write(b"x" * (1 << 20))
        handle.write(b'"}\n{"text": "last"}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wb", compresslevel=1) as packed:
        packed.write(path.read_bytes())
    plan = spec(max_row_bytes=1 << 20, unit_tokens=1 << 30)
    for name in ("a.jsonl", "b.jsonl.gz"):
        tracemalloc.start()
        items = scan_and_read(str(tmp_path), name, plan)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert [outcome(item) for item in items] == ["first", "!row_too_large", "last"]
        assert items[1].detail.startswith("67,108,876 bytes")
        # A few blocks of 1 MiB and one row of 1 MiB, of a line of 64 MiB.
        assert peak < 12 << 20


def test_a_large_row_within_the_bound_is_read(root: str) -> None:
    put(root, "a.jsonl", b'{"text": "' + b"x" * (5 << 20) + b'"}\n' + rows_of(2))
    items = scan_and_read(root, "a.jsonl", spec(unit_tokens=100))
    assert [len(outcome(item) or "") for item in items] == [5 << 20, 5, 5]
    assert len(scan(root, "a.jsonl", spec(unit_tokens=100))[0]) == 2


def test_a_changed_source_is_named_and_only_the_units_range_is_read(root: str) -> None:
    put(root, "a.jsonl", rows_of(100))
    plan = spec(unit_tokens=100)
    units, _ = scan(root, "a.jsonl", plan)
    body = bytearray(rows_of(100))
    body[units[1].byte_start + 12] ^= 1
    put(root, "a.jsonl", bytes(body) + b"appended\n")
    read(root, units[:1], plan)
    with pytest.raises(SourceChanged, match=r"a\.jsonl differs from the plan.*--extend"):
        list(read_unit(root, units[1], plan))
    put(root, "a.jsonl", rows_of(50))
    with pytest.raises(SourceChanged):
        list(read_unit(root, units[-1], plan))


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    put(str(tmp_path), "a.jsonl", rows_of(3))
    units, _ = scan(str(tmp_path), "a.jsonl", spec())
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(SourceChanged, match=r"a\.jsonl is gone"):
        list(read_unit(str(tmp_path), units[0], spec()))


def test_one_row_by_its_number(root: str) -> None:
    put(root, "a.jsonl", rows_of(100))
    plan = spec(unit_tokens=100)
    unit = scan(root, "a.jsonl", plan)[0][1]
    assert outcome(read_row(root, unit, plan, unit.row_start + 1)) == f"row {unit.row_start + 1}"
    with pytest.raises(InputError, match="row 0 is not in unit"):
        read_row(root, unit, plan, 0)


def test_unit_ids_follow_everything_that_changes_rows(root: str) -> None:
    put(root, "a.jsonl", b'{"text": "a", "b": "c"}\n')
    base = scan(root, "a.jsonl", spec())[0][0].unit_id
    assert scan(root, "a.jsonl", spec(unit_tokens=1000))[0][0].unit_id == base
    for plan in (
        spec(columns=CorpusColumns(text="b")),
        spec(columns=CorpusColumns(keep=("b",))),
        spec(max_row_bytes=9),
    ):
        assert scan(root, "a.jsonl", plan)[0][0].unit_id != base
    put(root, "b.jsonl", b'{"text": "a", "b": "c"}\n')
    assert scan(root, "b.jsonl", spec())[0][0].unit_id != base
