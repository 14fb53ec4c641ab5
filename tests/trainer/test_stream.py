"""The ranked stream: order, cursor, checks of what is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from schemas.errors import CorruptFile, InputError
from tests.trainer.streams import ranked, sample, texts, write_stream
from trainer.stream import RankedStream, read_beside, shuffled_ranks, stream_url


@pytest.fixture
def url(tmp_path: Path) -> str:
    items = ranked([sample("words", row, text) for row, text in enumerate(texts(23))])
    beside = ranked([sample("target", row, text) for row, text in enumerate(texts(3, seed=1))])
    write_stream(str(tmp_path / "stream"), items, target=beside, evaluation=beside[:2])
    return str(tmp_path / "stream")


def ranks(stream: RankedStream, count: int = 10_000) -> list[int]:
    return [item.ranked.rank for item in stream.take(count)]


def test_shuffled_order_is_a_permutation_fixed_by_seed_rows_and_epoch() -> None:
    order = shuffled_ranks(0, 1000, 0).tolist()
    assert sorted(order) == list(range(1000))
    # Pinned: a resumed training on another machine or numpy must see the same order.
    assert shuffled_ranks(0, 8, 0).tolist() == [2, 4, 6, 5, 1, 7, 0, 3]
    assert shuffled_ranks(1, 1000, 0).tolist() != order
    assert shuffled_ranks(0, 1000, 1).tolist() != order
    # Spearman's rho of a random permutation of 1000 has standard deviation 0.032; five of them.
    rho = torch.corrcoef(torch.stack([torch.tensor(order).double(), torch.arange(1000).double()]))[0, 1]
    assert abs(float(rho)) < 0.16


def test_orders(url: str) -> None:
    assert ranks(RankedStream(url, order="ranked")) == list(range(23))
    shuffled = ranks(RankedStream(url, seed=3))
    assert sorted(shuffled) == list(range(23))
    assert shuffled == shuffled_ranks(3, 23, 0).tolist()
    assert ranks(RankedStream(url, seed=4)) != shuffled


def test_epochs_are_full_passes_in_different_orders(url: str) -> None:
    stream = RankedStream(url, epochs=3)
    found = ranks(stream)
    assert len(stream) == len(found) == 69
    passes = [found[start : start + 23] for start in (0, 23, 46)]
    assert all(sorted(part) == list(range(23)) for part in passes)
    assert passes[0] != passes[1] != passes[2]


def test_resumes_exactly_at_any_position(url: str) -> None:
    whole = [(item.position, item.ranked) for item in RankedStream(url, epochs=2)]
    for stop in (0, 1, 7, 22, 23, 24, 45, 46):
        first = RankedStream(url, epochs=2)
        taken = first.take(stop)
        second = RankedStream(url, epochs=2)
        second.load_state_dict(first.state_dict())
        assert [(item.position, item.ranked) for item in (*taken, *second)] == whole


def test_iterates_in_a_data_loader(url: str) -> None:
    loader: Any = torch.utils.data.DataLoader(RankedStream(url, order="ranked"), batch_size=None)
    assert [item.ranked.rank for item in loader] == list(range(23))


@pytest.mark.parametrize(
    "name,changes", [("order", {"order": "ranked"}), ("seed", {"seed": 5}), ("epochs", {"epochs": 2})]
)
def test_a_cursor_of_another_order_is_refused(url: str, name: str, changes: dict[str, Any]) -> None:
    state = RankedStream(url).state_dict()
    with pytest.raises(InputError, match=f"taken with {name} ="):
        RankedStream(url, **changes).load_state_dict(state)


def test_a_cursor_of_another_stream_is_refused(url: str, tmp_path: Path) -> None:
    other = ranked([sample("words", row, text) for row, text in enumerate(texts(22))])
    write_stream(str(tmp_path / "other"), other)
    with pytest.raises(InputError, match="taken with stream ="):
        RankedStream(str(tmp_path / "other")).load_state_dict(RankedStream(url).state_dict())


def test_ranged_requests_read_the_same(url: str) -> None:
    whole, ranged = RankedStream(url, seed=2), RankedStream(url, seed=2, cache_bytes=0)
    assert (whole.reader.whole, ranged.reader.whole) == (True, False)
    assert whole.take(23) == ranged.take(23)


def test_a_small_cache_reads_the_same(url: str) -> None:
    biggest = max(shard.bytes for shard in RankedStream(url).index.shards)
    stream = RankedStream(url, order="ranked", cache_bytes=biggest)
    assert [item.ranked.rank for item in stream] == list(range(23))
    assert len(stream.reader._held) == 1


def test_object_store(url: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(url, "/streams/m", recursive=True)
    try:
        for cache_bytes in (0, 1 << 20):
            remote = RankedStream("memory://streams/m", cache_bytes=cache_bytes)
            assert remote.take(23) == RankedStream(url).take(23)
    finally:
        memory.rm("/streams", recursive=True)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_names_the_shard(url: str) -> None:
    stream = RankedStream(url)
    offset, size = stream.index.shards[1].offsets[2]
    body = (Path(url) / "shard-000001.tar").read_bytes()[offset : offset + size]
    place = offset + body.index(b'"text"') + 9
    flip(Path(url) / "shard-000001.tar", place)
    with pytest.raises(CorruptFile, match=r"shard-000001.tar differs from the index"):
        stream.take(23)
    with pytest.raises(CorruptFile, match=r"shard-000001.tar rank 9 "):
        RankedStream(url, cache_bytes=0).take(23)


def test_a_missing_shard_is_named(url: str) -> None:
    (Path(url) / "shard-000002.tar").unlink()
    for cache_bytes in (0, 1 << 20):
        with pytest.raises(CorruptFile, match=r"shard-000002.tar is listed in the index but missing"):
            RankedStream(url, cache_bytes=cache_bytes).take(23)


def test_target_and_evaluation_stand_beside(url: str) -> None:
    index = RankedStream(url).index
    assert [item.sample.text for item in read_beside(url, index, "target")] == texts(3, seed=1)
    assert len(read_beside(url, index, "evaluation")) == 2
    flip(Path(url) / "eval" / "shard-000000.tar", 600)
    with pytest.raises(CorruptFile, match=r"eval/shard-000000.tar"):
        read_beside(url, index, "evaluation")


def test_no_stream(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no index.json"):
        RankedStream(str(tmp_path))
    write_stream(str(tmp_path / "empty"), [])
    with pytest.raises(InputError, match="holds no samples"):
        RankedStream(str(tmp_path / "empty"))


def test_names_of_streams() -> None:
    finished = {"match": [1, 3], "random": [1]}
    assert stream_url("RUN", "match", 0, finished) == "RUN/streams/match/gen-000003"
    assert stream_url("RUN", "match", 1, finished) == "RUN/streams/match/gen-000001"
    assert stream_url("RUN", "gs://bucket/s/", 0, {}) == "gs://bucket/s"
    with pytest.raises(InputError, match="finished: match, random"):
        stream_url("RUN", "direct", 0, finished)
    with pytest.raises(InputError, match="it has 1, 3"):
        stream_url("RUN", "match", 2, finished)


@pytest.mark.parametrize("changes", [{"order": "best"}, {"epochs": 0}])
def test_impossible_options(url: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        RankedStream(url, **changes)
