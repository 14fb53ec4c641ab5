"""Random and damaged files: nothing but `LehrError` is raised, and the rows are as many as were planned."""

from __future__ import annotations

import gzip
import io
import random
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.readers import Item
from schemas.errors import LehrError
from schemas.spec import CorpusColumns
from tests.pipelines.reading import read, scan, spec, tar_bytes

COLUMNS = [CorpusColumns(), CorpusColumns(messages="m", id="i"), CorpusColumns(prompt="p", completion="c", keep=("k",))]
LINES = st.sampled_from(
    [
        b'{"text": "a", "m": [], "i": 1, "p": "x", "c": "y", "k": {"a": [1]}}',
        b'{"text": "a"}',
        b"{}",
        b"[",
        b"",
        b"\xff",
        b"\0",
        b'{"text": 1, "m": 3, "i": {}, "p": null, "c": [], "k": 1e99}',
    ]
)


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def _parquet(rows: int) -> bytes:
    turns = [[{"role": "user", "content": f"c{row}"}] for row in range(rows)]
    table = pa.table(
        {
            "text": [f"row {row}" for row in range(rows)],
            "m": turns,
            "i": list(range(rows)),
            "p": ["p"] * rows,
            "c": ["c"] * rows,
            "k": [{"a": 1.5}] * rows,
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=20, write_page_checksum=True)
    return sink.getvalue()


def _check(name: str, data: bytes, columns: CorpusColumns, unit_tokens: int = 64) -> None:
    """Scan and read at three unit sizes; all give the same rows."""
    results: list[list[Item]] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        for size in (1 << 20, unit_tokens, 1):
            plan = spec(columns=columns, unit_tokens=size, max_row_bytes=200)
            try:
                units, _ = scan(folder, name, plan)
                results.append(read(folder, units, plan))
            except LehrError as error:
                assert name in str(error)
                return
    if name.endswith("parquet"):
        assert len({len(items) for items in results}) == 1
    else:
        assert results[0] == results[1] == results[2]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.tar"]),
    st.one_of(st.binary(max_size=2000), st.lists(LINES, max_size=20).map(b"\n".join)),
    st.sampled_from(COLUMNS),
)
def test_random_bytes(name: str, data: bytes, columns: CorpusColumns) -> None:
    _check(name, data, columns)


SOUND = {
    "a.jsonl": b"".join(b'{"text": "row %d", "p": "", "c": "", "k": 1, "m": [], "i": 0}\n' % n for n in range(60)),
    "a.parquet": _parquet(60),
    "a.tar": tar_bytes(
        [
            (f"{n}.{kind}", b'{"text": "t", "p": "", "c": "", "k": 1, "m": [], "i": 0}')
            for n in range(12)
            for kind in ("json", "cls")
        ]
    ),
}
SOUND["a.jsonl.gz"] = gzip.compress(SOUND["a.jsonl"], mtime=0)
SOUND["a.jsonl.zst"] = _zstd(SOUND["a.jsonl"])


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(sorted(SOUND)),
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=4),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.sampled_from(COLUMNS),
)
def test_damaged_files(name: str, flips: list[tuple[float, int]], keep: float, columns: CorpusColumns) -> None:
    data = bytearray(SOUND[name])
    for place, mask in flips:
        data[min(int(place * len(data)), len(data) - 1)] ^= mask
    _check(name, bytes(data[: int(keep * len(data))]), columns)


@pytest.mark.parametrize("name", sorted(SOUND))
def test_sound_files_have_no_rejects(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(SOUND[name])
        for columns in COLUMNS:
            plan = spec(columns=columns, unit_tokens=64)
            units, _ = scan(folder, name, plan)
            assert {type(item).__name__ for item in read(folder, units, plan)} == {"Row"}


@pytest.mark.slow
def test_many_damaged_parquet_footers() -> None:
    rng = random.Random(1)
    sound = SOUND["a.parquet"]
    footer = int.from_bytes(sound[-8:-4], "little") + 8
    for _ in range(1500):
        data = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            data[-rng.randint(1, footer)] ^= rng.randint(1, 255)
        _check("a.parquet", bytes(data), rng.choice(COLUMNS))
