"""How a stream is read: ahead in a thread, from a disk, with patience, dealt to processes and workers."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import CorruptFile, InputError
from tests.gcs import Gcs
from tests.trainer.streams import make_run, ranked, sample, texts, write_stream
from tests.trainer.test_loop import results, settings
from trainer.loop import train
from trainer.opening import open_stream
from trainer.stream import RankedStream

ROWS = 23


@pytest.fixture
def url(tmp_path: Path) -> str:
    write_stream(str(tmp_path / "stream"), ranked([sample("words", row, text) for row, text in enumerate(texts(ROWS))]))
    return str(tmp_path / "stream")


@pytest.fixture
def remote(bucket: str) -> str:
    write_stream(f"{bucket}/stream", ranked([sample("words", row, text) for row, text in enumerate(texts(ROWS))]))
    return f"{bucket}/stream"


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lehr")]


def ranks(items: Any) -> list[int]:
    return [item.ranked.rank for item in items]


@pytest.mark.parametrize("ahead", [1, 5, 100])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_reading_ahead_changes_nothing(url: str, ahead: int, cache_bytes: int) -> None:
    plain = RankedStream(url, epochs=2, cache_bytes=cache_bytes)
    stream = RankedStream(url, epochs=2, cache_bytes=cache_bytes, prefetch=ahead)
    for count in (3, 1, 7, 20):
        assert stream.take(count) == plain.take(count)
    state = stream.state_dict()
    assert state == plain.state_dict()
    stream.take(5)
    stream.load_state_dict(state)
    assert list(stream) == list(plain)
    assert stream.take(1) == []
    assert threads() == []


def test_reads_no_further_ahead_than_it_may(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = RankedStream(url, prefetch=4, epochs=3)
    read: list[int] = []
    real = stream.reader.read

    def counted(wanted: Any) -> Any:
        read.extend(wanted)
        return real(wanted)

    monkeypatch.setattr(stream.reader, "read", counted)
    for taken in (1, 2):
        stream.take(1)
        deadline = time.monotonic() + 5
        while len(read) < taken + 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(read) == taken + 4
    stream.close()
    assert threads() == []


def test_a_failed_read_surfaces_at_its_sample(url: str) -> None:
    """The shard of ranks 7 to 13 is gone: what is offered before it is delivered, nothing of the step that needs it."""
    (Path(url) / "shard-000001.tar").unlink()
    order = [RankedStream(url).rank_at(position) for position in range(ROWS)]
    first = next(position for position, rank in enumerate(order) if 7 <= rank < 14)
    for prefetch in (0, 50):
        stream = RankedStream(url, cache_bytes=0, prefetch=prefetch)
        assert ranks(stream.take(first)) == order[:first]
        for _ in range(2):
            with pytest.raises(
                CorruptFile, match=r"shard-000001\.tar is listed .*generation 1 of stream 'match'.*export"
            ):
                stream.take(1)
            assert stream.position == first
            assert threads() == []


def test_no_thread_stays_behind(url: str) -> None:
    with RankedStream(url, prefetch=3) as stream:
        stream.take(1)
        assert threads() == ["lehr-prefetch"]
    assert threads() == []
    for _ in stream:
        assert threads() == ["lehr-prefetch"]
        break
    gc.collect()
    assert threads() == []
    dropped = RankedStream(url, prefetch=3)
    dropped.take(1)
    del dropped
    gc.collect()
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threads() == []


def test_close_ends_a_wait_between_two_tries(remote: str, gcs: Gcs) -> None:
    stream = RankedStream(remote, prefetch=4, read_limit_s=0.2)
    gcs.fail("^GET /download", sleep=3, count=1000)
    threading.Timer(0.6, stream.close).start()
    began = time.monotonic()
    with pytest.raises((InputError, InterruptedError)):
        stream.take(1)
    assert time.monotonic() - began < 2
    gcs.clear()
    assert len(stream.take(ROWS)) == ROWS


def test_a_forked_copy_reads_on_by_itself(url: str) -> None:
    stream = RankedStream(url, prefetch=4)
    stream.take(5)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(ranks(stream)))
    process.start()
    assert ours.poll(30)
    assert ours.recv() == [RankedStream(url).rank_at(position) for position in range(5, ROWS)]
    process.join(30)
    assert process.exitcode == 0
    assert len(list(stream)) == ROWS - 5


# A local disk.


def test_shards_on_a_disk_are_read_once_from_the_store(remote: str, gcs: Gcs, tmp_path: Path) -> None:
    for cache_bytes in (1 << 20, 0):
        expected = RankedStream(remote).take(ROWS)
        for fetched in (4, 0):
            stream = RankedStream(remote, cache_bytes=cache_bytes, cache_dir=str(tmp_path / str(cache_bytes)))
            gcs.clear()
            assert [item for part in range(8) for item in stream.take(3)] == expected
            assert len(gcs.requests(r"^GET /download.*\.tar")) == fetched
    sizes = [shard.bytes for shard in RankedStream(remote).index.shards]
    assert sum(path.stat().st_size for path in (tmp_path / "0").iterdir()) == sum(sizes)


def test_a_disk_too_small_is_read_past(remote: str, gcs: Gcs, tmp_path: Path) -> None:
    """Shuffled, the shards that fit stay and the rest is read by ranges; in ranked order each is kept in turn."""
    expected = RankedStream(remote).take(ROWS)
    sizes = [shard.bytes for shard in RankedStream(remote).index.shards]
    for bound, whole in ((0, 0), (sizes[0], 1), (sizes[0] + sizes[1] + sizes[2], 3)):
        stream = RankedStream(remote, cache_bytes=0, cache_dir=str(tmp_path / str(bound)), cache_disk_bytes=bound)
        gcs.clear()
        assert stream.take(ROWS) == expected
        asked = gcs.requests(r"^GET /download.*\.tar")
        assert len([request for request in asked if "bytes=" not in request["line"]]) == whole
        assert len([request for request in asked if "bytes=" in request["line"]]) == max(0, ROWS - 7 * whole)
        assert sum(path.stat().st_size for path in (tmp_path / str(bound)).iterdir()) <= bound
    stream = RankedStream(
        remote, order="ranked", cache_bytes=0, cache_dir=str(tmp_path / "r"), cache_disk_bytes=max(sizes)
    )
    assert ranks(stream) == list(range(ROWS))
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "r").iterdir()) <= max(sizes)


def test_a_copy_that_is_damaged_while_in_use_is_read_again(remote: str, tmp_path: Path) -> None:
    stream = RankedStream(remote, cache_bytes=0, cache_dir=str(tmp_path / "cache"))
    expected = stream.take(ROWS)
    for path in (tmp_path / "cache").iterdir():
        if data := bytearray(path.read_bytes()):
            data[data.index(b'"text":"') + 9] ^= 1
            with open(path, "r+b") as handle:
                handle.write(data)
    stream.start_epoch(0)
    assert stream.take(ROWS) == expected


def test_a_damaged_shard_is_never_kept(url: str, tmp_path: Path) -> None:
    path = Path(url) / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    for cache_bytes in (0, 1 << 20):
        with pytest.raises(CorruptFile, match=r"shard-000000\.tar differs from the index"):
            RankedStream(url, order="ranked", cache_bytes=cache_bytes, cache_dir=str(tmp_path / "cache")).take(1)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


# A store that is slow.


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("prefetch", [0, 8])
def test_a_slow_store_is_tried_again_with_growing_pauses(
    remote: str, gcs: Gcs, cache_bytes: int, prefetch: int
) -> None:
    expected = RankedStream(remote).take(ROWS)
    pauses: list[float] = []
    stream = RankedStream(
        remote, cache_bytes=cache_bytes, prefetch=prefetch, read_limit_s=0.5, sleep=pauses.append
    )  # fmt: skip
    gcs.fail(r"^GET /download.*\.tar", sleep=5, count=2)
    assert stream.take(8) == expected[:8]
    assert pauses[:1] == [1.0]
    gcs.clear()
    stream.close()
    fewer = RankedStream(remote, cache_bytes=cache_bytes, read_attempts=2, read_limit_s=0.2, sleep=pauses.append)
    gcs.fail(r"^GET /download.*\.tar", sleep=2, count=1000)
    with pytest.raises(InputError, match=r"cannot read .*\.tar: no answer within 0\.2 s, at each of 2 tries"):
        fewer.take(1)


# Processes and workers.


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("prefetch", [0, 6])
def test_sample_i_goes_to_process_i_modulo_their_number(url: str, processes: int, prefetch: int) -> None:
    streams = [
        RankedStream(url, epochs=2, process=process, processes=processes, prefetch=prefetch)
        for process in range(processes)
    ]
    found = [list(stream) for stream in streams]
    assert {len(items) for items in found} == {46 // processes} == {len(stream) for stream in streams}
    for process, items in enumerate(found):
        assert [item.position for item in items] == list(range(process, 46 // processes * processes, processes))
    assert all(stream.exhausted for stream in streams)
    assert len({str(stream.state_dict()) for stream in streams}) == 1


def test_a_job_goes_on_with_another_number_of_processes(url: str) -> None:
    """Positions that were dealt are not dealt again, and none is left out."""
    before = [RankedStream(url, process=process, processes=3) for process in range(3)]
    done = [item.position for stream in before for item in stream.take(4)]
    after = [RankedStream(url, process=process, processes=2) for process in range(2)]
    for stream in after:
        stream.load_state_dict(before[1].state_dict())
    assert sorted(done) == list(range(12))
    assert sorted(item.position for stream in after for item in stream) == list(range(12, 22))


@pytest.mark.parametrize(
    "changes", [{"process": 2, "processes": 2}, {"processes": 0}, {"worker_block": 0}, {"prefetch": -1}]
)
def test_impossible_dealing(url: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"process|worker_block|prefetch"):
        RankedStream(url, **changes)


def loaded(stream: RankedStream, **options: Any) -> list[int]:
    loader: Any = torch.utils.data.DataLoader(stream, collate_fn=lambda items: items, **options)
    return [item.position for batch in loader for item in batch]


@pytest.mark.parametrize("prefetch", [0, 5])
def test_workers_of_a_loader_offer_every_sample_once_in_a_fixed_order(url: str, prefetch: int) -> None:
    one = loaded(RankedStream(url, prefetch=prefetch), batch_size=4, num_workers=2)
    assert sorted(one) == list(range(ROWS))
    assert one == loaded(RankedStream(url), batch_size=4, num_workers=2)
    assert one[:8] == [0, 2, 4, 6, 1, 3, 5, 7]
    # With blocks as long as a batch, the order is that of a loader without workers.
    assert loaded(RankedStream(url, worker_block=4), batch_size=4, num_workers=2) == list(range(ROWS))
    mine = loaded(RankedStream(url, process=1, processes=2), batch_size=4, num_workers=3)
    assert sorted(mine) == list(range(1, 22, 2))


def test_spawned_workers_get_a_copy(url: str) -> None:
    import pickle

    stream = RankedStream(url, prefetch=4)
    stream.take(3)
    copy = pickle.loads(pickle.dumps(stream))
    assert list(copy) == list(stream)


def test_settings_of_a_training_say_how_its_stream_is_read(tmp_path: Path) -> None:
    """Each of them reaches the stream; what is trained is the same bytes as without."""
    run, model = make_run(tmp_path, samples=ROWS)
    given = {
        "prefetch": 3, "cache_dir": str(tmp_path / "cache"), "cache_disk_bytes": 10**6, "cache_bytes": 0, "read_attempts": 2,
        "read_limit_s": 7.0,
    }  # fmt: skip
    stream = open_stream(run, settings(model, "t", **given))
    stream.take(1)
    assert threads() == ["lehr-prefetch"]
    stream.close()
    found = {**dataclasses.asdict(stream.reading), "prefetch": 3}
    assert {name: found[name] for name in given} == given
    train(run, settings(model, "t", **given, steps=2))
    expected = results(run, "t")
    assert threads() == []
    assert len(list((tmp_path / "cache").glob("[0-9a-f]*"))) == 4
    plain, _ = make_run(tmp_path / "plain", samples=ROWS)
    train(plain, settings(model, "t", prefetch=0, steps=2))
    assert results(plain, "t") == expected
