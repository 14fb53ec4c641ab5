"""Ranked shards: equal bytes, right offsets, plain WebDataset, never code."""

from __future__ import annotations

import dataclasses
import io
import pickle
import tarfile
from pathlib import Path

import orjson
import pytest

from schemas.errors import CorruptFile, InputError
from schemas.sample import Sample
from schemas.shards import (
    RankedSample,
    StreamIndex,
    decode_record,
    encode_record,
    encode_shard,
    index_bytes,
    read_index,
    read_shard,
)


def ranked(rank: int, text: str | None = None) -> RankedSample:
    text = f"text of rank {rank}: ünïcode \u202e\x00 \U0001f600 " + "x" * (rank * 97) if text is None else text
    sample = Sample(
        sample_id=f"{rank:032x}",
        content_id=f"{rank + 1:032x}",
        path="a/b.jsonl",
        row=rank,
        window=0,
        char_start=0,
        char_end=len(text),
        text=text,
        loss_spans=((0, 3), (5, len(text))),
        source_id=f"id-{rank}",
        domain="math" if rank % 2 else "code",
        extra='{"a":[1,2],"b":"c"}',
    )
    return RankedSample(sample=sample, rank=rank, selection_weight=0.5 + rank, tokens=10 + rank, loss_tokens=9)


def shard(first: int, count: int) -> tuple[bytes, object, list[RankedSample]]:
    rows = [ranked(rank) for rank in range(first, first + count)]
    members = [(row.rank, encode_record(row)) for row in rows]
    body, entry = encode_shard("shard-000000.tar", members, {"math": 1, "code": 2}, sum(r.tokens for r in rows))
    return body, entry, rows


def write(tmp_path: Path) -> tuple[StreamIndex, list[RankedSample]]:
    body, entry, rows = shard(0, 5)
    (tmp_path / "shard-000000.tar").write_bytes(body)
    index = StreamIndex(
        stream="s",
        generation=1,
        selection="s",
        encoding={"max_tokens": 9},
        tokenizer="t",
        shards=(entry,),  # type: ignore[arg-type]
    )
    (tmp_path / "index.json").write_bytes(index_bytes(index))
    return index, rows


def test_equal_samples_give_equal_bytes() -> None:
    assert shard(0, 5)[:2] == shard(0, 5)[:2]
    assert shard(0, 5)[0] != shard(1, 5)[0]


def test_record_round_trip() -> None:
    for row in (ranked(0), ranked(7), ranked(3, "")):
        assert decode_record(encode_record(row), "here") == row


def test_offsets_point_at_the_records() -> None:
    body, entry, rows = shard(3, 6)
    assert [decode_record(body[at : at + size], "x") for at, size in entry.offsets] == rows  # type: ignore[attr-defined]


def test_tar_says_nothing_about_who_wrote_it_and_when() -> None:
    body, _, _ = shard(0, 3)
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.isreg() and member.mode == 0o644


def test_keys_are_zero_padded_ranks_so_that_names_sort_like_ranks() -> None:
    body, _, _ = shard(98, 4)
    with tarfile.open(fileobj=io.BytesIO(body)) as tar:
        names = tar.getnames()
    assert names == sorted(names) == [f"{rank:012d}.json" for rank in range(98, 102)]


def test_webdataset_reads_it_without_lehr(tmp_path: Path) -> None:
    import webdataset

    _, rows = write(tmp_path)
    dataset = webdataset.WebDataset([str(tmp_path / "shard-000000.tar")], shardshuffle=False).decode(only=["json"])
    samples = list(dataset)
    assert [s["__key__"] for s in samples] == [f"{row.rank:012d}" for row in rows]
    assert [s["json"]["text"] for s in samples] == [row.sample.text for row in rows]
    assert samples[1]["json"]["extra"] == {"a": [1, 2], "b": "c"}


def test_index_round_trip_and_shard(tmp_path: Path) -> None:
    index, rows = write(tmp_path)
    assert read_index(str(tmp_path)) == index
    assert (index.rows, index.tokens) == (5, sum(row.tokens for row in rows))
    assert list(read_shard(str(tmp_path), index.shards[0])) == rows


@pytest.mark.parametrize("at", [0, 600, -1])
def test_damaged_shard_is_named(tmp_path: Path, at: int) -> None:
    index, _ = write(tmp_path)
    path = tmp_path / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptFile, match=r"shard-000000\.tar differs from the index"):
        list(read_shard(str(tmp_path), index.shards[0]))


def test_shard_cut_between_members_is_named(tmp_path: Path) -> None:
    """A tar reader ends quietly there."""
    index, _ = write(tmp_path)
    path = tmp_path / "shard-000000.tar"
    cut = index.shards[0].offsets[2][0] - 512
    path.write_bytes(path.read_bytes()[:cut])
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 2
    with pytest.raises(CorruptFile, match="truncated or damaged"):
        list(read_shard(str(tmp_path), index.shards[0]))
    path.unlink()
    with pytest.raises(CorruptFile, match="missing"):
        list(read_shard(str(tmp_path), index.shards[0]))


def test_edited_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "index.json"
    path.write_text(path.read_text().replace('"rows": 5', '"rows": 6'))
    with pytest.raises(CorruptFile, match="does not match its fingerprint"):
        read_index(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"fingerprint": 1}', b'{"shards": 3}'])
def test_damaged_index_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"index\.json"):
        read_index(str(tmp_path))


def test_missing_index_and_other_version(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `lehr export`"):
        read_index(str(tmp_path))
    index, _ = write(tmp_path)
    (tmp_path / "index.json").write_bytes(index_bytes(dataclasses.replace(index, version=99)))
    with pytest.raises(InputError, match="version 99"):
        read_index(str(tmp_path))


class _Bomb:
    def __reduce__(self) -> tuple:
        return (Path("exploded").touch, ())


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps(_Bomb()),
        b"[]",
        b"{}",
        b"null",
        b"\x80\x04",
        b'{"rank": 1}',
        orjson.dumps({**orjson.loads(encode_record(ranked(1))), "rank": "x"}),
        orjson.dumps({**orjson.loads(encode_record(ranked(1))), "text": 3}),
        orjson.dumps({**orjson.loads(encode_record(ranked(1))), "loss_spans": [[1]]}),
    ],
)
def test_record_that_is_no_sample_is_data_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorruptFile, match="member 3"):
        decode_record(data, "shard member 3")
    assert list(tmp_path.iterdir()) == []


def test_unknown_keys_are_ignored() -> None:
    record = {**orjson.loads(encode_record(ranked(1))), "added_later": {"__class__": "x"}}
    assert decode_record(orjson.dumps(record), "x") == ranked(1)
