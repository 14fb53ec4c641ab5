"""Streams and trainings on `gs://`, over HTTP against a server in another process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import orjson
import pytest
import webdataset
from webdataset.gopen import gopen_schemes

from schemas.errors import CorruptFile, InputError
from schemas.ranged import open_ranged
from schemas.run import Run
from schemas.shards import decode_record
from schemas.storage import exists, list_folders, list_names, write_whole
from tests.gcs import ROOT, Gcs
from tests.killing import kill_unfinished, until
from tests.trainer.streams import make_run, ranked, sample, texts, write_stream
from tests.trainer.test_loop import results, settings
from trainer.checkpoints import latest_checkpoint, prune_checkpoints
from trainer.loop import train
from trainer.stream import RankedStream, read_beside

Place = tuple[str, Path]
"""URL of a run and the folder of its model."""
CHOSEN = [
    "--name", "t", "--policy", "filter-then-weight", "--candidates", "8", "--n-keep", "4", "--lr", "0.01",
    "--dtype", "float32", "--epochs", "4", "--proj-rank", "4", "--checkpoint-every", "3", "--keep-checkpoints", "2",
    "--eval-every", "5", "--warmup-select", "2", "--seed", "3",
]  # fmt: skip


@pytest.fixture
def stream(bucket: str) -> str:
    """URL of a stream of 23 samples in shards of 7, with a target beside it."""
    items = ranked([sample("words", row, text) for row, text in enumerate(texts(23))])
    beside = ranked([sample("target", row, text) for row, text in enumerate(texts(3, seed=1))])
    write_stream(f"{bucket}/stream", items, target=beside)
    return f"{bucket}/stream"


def upload(run: Run, url: str) -> str:
    """A copy of a local run directory at `url`."""
    fs, root = fsspec.core.url_to_fs(url)
    folder = Path(run.url)
    for path in folder.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"{root}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    return url


def found_on(url: str, name: str) -> dict[str, bytes]:
    """As `results`, of a run on an object store."""
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    folder = f"{root}/trainings/{name}/"
    found = {path.removeprefix(folder): fs.cat_file(path) for path in fs.find(folder) if "/timings/" not in path}
    found["manifest"] = fs.cat_file(f"{root}/stages/train/{name}.json")
    return found


def start(gcs: Gcs, run: str, model: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lehr", "train", run, "--model", str(model), *CHOSEN],
        cwd=ROOT,
        env=gcs.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    text = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, text[-3000:]
    return text


@pytest.mark.slow
def test_trainings_in_other_processes_give_the_bytes_of_a_local_one_also_after_a_kill(
    tmp_path: Path, bucket: str, gcs: Gcs
) -> None:
    """`lehr train` undisturbed, and one killed after its first checkpoint stood: journal, losses, weights, manifest."""
    run, model = make_run(tmp_path, samples=96)
    remote = upload(run, f"{bucket}/whole")
    finish(start(gcs, run.url, model))
    finish(start(gcs, remote, model))
    expected = results(run, "t")
    assert found_on(remote, "t") == expected

    def prepare(number: int) -> Place:
        return upload(run_without_training, f"{bucket}/killed-{number}"), model

    def wait(process: subprocess.Popen[bytes], place: Place, number: int) -> None:
        first = f"{place[0]}/trainings/t/checkpoints/step-{3:08d}/manifest.json"
        until(lambda: exists(first), 120, "a checkpoint")

    run_without_training, _ = make_run(tmp_path / "again", samples=96)
    place, killed = kill_unfinished(
        prepare,
        lambda place: start(gcs, *place),
        wait,
        lambda place: exists(f"{place[0]}/stages/train/t.json"),
    )
    assert killed.returncode == -signal.SIGKILL
    # Rows of steps that no checkpoint vouches for, as a later kill may leave them.
    for table in ("steps", "decisions"):
        write_whole(f"{place[0]}/trainings/t/{table}/part-000090-000099.parquet", b"rows")
    finish(start(gcs, *place))
    assert found_on(place[0], "t") == expected


def test_training_under_faults_gives_the_bytes_of_a_local_one(
    tmp_path: Path, bucket: str, gcs: Gcs, impatient: None
) -> None:
    run, model = make_run(tmp_path)
    remote = upload(run, f"{bucket}/run")
    chosen = settings(model, "t", policy="filter-then-weight", checkpoint_every=2, keep_checkpoints=1)
    train(run, chosen)
    gcs.clear()
    gcs.fail("", status=503, every=5, count=1000)
    gcs.fail("", drop=True, late=True, every=7, count=1000)
    gcs.fail("^GET", cut=100, every=9, count=1000)
    train(Run.open(remote), chosen)
    assert sum(request["fault"] for request in gcs.requests()) > 20
    gcs.clear()
    assert found_on(remote, "t") == results(run, "t")
    assert "step-00000002" not in list_folders(f"{remote}/trainings/t/checkpoints")


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_stream_reads_the_same_through_faults(
    stream: str, gcs: Gcs, impatient: None, tmp_path: Path, cache_bytes: int
) -> None:
    items = ranked([sample("words", row, text) for row, text in enumerate(texts(23))])
    write_stream(str(tmp_path), items, target=ranked([sample("target", 0, "glass")]))
    expected = [item.ranked for item in RankedStream(str(tmp_path), seed=3).take(23)]
    for fault in ({}, {"status": 503}, {"drop": True}, {"cut": 100}):
        gcs.clear()
        gcs.fail("^GET", every=3, count=4, **fault)
        remote = RankedStream(stream, seed=3, cache_bytes=cache_bytes)
        assert [item.ranked for part in range(5) for item in remote.take(5)] == expected
        if fault:
            assert any(request["fault"] for request in gcs.requests())
        assert len(read_beside(stream, remote.index, "target")) == 3


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 403}, {"drop": True}, {"cut": 100}])
def test_stream_that_cannot_be_read_names_the_shard(
    stream: str, gcs: Gcs, impatient: None, fault: dict[str, Any], cache_bytes: int
) -> None:
    remote = RankedStream(stream, cache_bytes=cache_bytes, order="shuffled")
    gcs.fail("^GET /download", count=1000, **fault)
    with pytest.raises(InputError, match=r"cannot read gs://.*shard-00000\d\.tar"):
        remote.take(23)
    assert remote.position == 0
    gcs.clear()
    assert len(remote.take(23)) == 23
    with pytest.raises(InputError, match=r"gs://.*index\.json"):
        gcs.fail("", count=1000, **fault)
        RankedStream(stream)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_missing_cut_or_changed_shard_is_named(stream: str, cache_bytes: int) -> None:
    fs, root = fsspec.core.url_to_fs(stream, use_listings_cache=False)
    whole = fs.cat_file(f"{root}/shard-000001.tar")
    place = whole.index(b'"text":"') + 9
    changed = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    fs.pipe_file(f"{root}/shard-000001.tar", changed)
    with pytest.raises(CorruptFile, match=r"gs://.*shard-000001\.tar .*damaged"):
        RankedStream(stream, cache_bytes=cache_bytes).take(23)
    fs.pipe_file(f"{root}/shard-000001.tar", whole[:1000])
    with pytest.raises((CorruptFile, InputError), match=r"gs://.*shard-000001\.tar"):
        RankedStream(stream, cache_bytes=cache_bytes).take(23)
    fs.rm_file(f"{root}/shard-000001.tar")
    with pytest.raises(CorruptFile, match=r"gs://.*shard-000001\.tar is listed in the index but missing"):
        RankedStream(stream, cache_bytes=cache_bytes).take(23)
    with pytest.raises(InputError, match=r"gs://.*nowhere has no index\.json"):
        RankedStream(f"{stream}/nowhere")


def test_stream_never_opens_a_file_object_of_the_client(bucket: str, gcs: Gcs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small reads in a row through gcsfs's file objects may wait for ever; 40 samples of 100 kB, whole shards and ranges."""
    from gcsfs import GCSFileSystem

    monkeypatch.setattr(GCSFileSystem, "_open", lambda *_, **__: pytest.fail("a file object of the client"))
    items = ranked([sample("words", row, text * 1500) for row, text in enumerate(texts(40))])
    write_stream(f"{bucket}/stream", items, per_shard=20)
    gcs.clear()
    taken: list[int] = []

    def read() -> None:
        for cache_bytes in (0, 1 << 30):
            taken.append(len(RankedStream(f"{bucket}/stream", cache_bytes=cache_bytes).take(40)))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(30)
    assert taken == [40, 40]
    # Twice the index, one range a sample, two whole shards.
    assert len(gcs.requests("^GET /download")) == 2 + 40 + 2


def test_webdataset_reads_the_shards(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The webdataset package itself, given Lehr's reader for `gs://` instead of its `gsutil cat`."""
    monkeypatch.setitem(gopen_schemes, "gs", lambda url, *args, **kwargs: open_ranged(url))
    urls = [f"{stream}/{name}" for name in list_names(stream, ".tar")]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    found = [decode_record(item["json"], item["__key__"]) for item in dataset]
    assert found == [item.ranked for item in RankedStream(stream, order="ranked").take(23)]
    assert [orjson.loads(item["json"])["rank"] for item in dataset] == list(range(23))


def test_old_checkpoints_go_whole_and_one_that_cannot_is_a_warning(
    bucket: str, gcs: Gcs, impatient: None, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the answer to a deletion is lost, so that the second try finds nothing."""
    for step in (1, 2, 3):
        for name in ("manifest.json", "model.safetensors"):
            write_whole(f"{bucket}/step-{step:08d}/{name}", b"x")
    gcs.fail("^DELETE", status=503, late=True, count=2)
    prune_checkpoints(bucket, keep=2, newest=3)
    assert list_folders(bucket) == ["step-00000002", "step-00000003"]
    gcs.fail("^DELETE", status=503, count=1000)
    prune_checkpoints(bucket, keep=1, newest=3)
    assert list_folders(bucket) == ["step-00000002", "step-00000003"]
    assert f"cannot delete {bucket}/step-00000002/manifest.json" in caplog.text


def test_torn_checkpoint_is_passed_over_by_name(
    tmp_path: Path, bucket: str, gcs: Gcs, caplog: pytest.LogCaptureFixture
) -> None:
    run, model = make_run(tmp_path)
    remote = Run.open(upload(run, f"{bucket}/run"))
    train(remote, settings(model, "t", checkpoint_every=2, keep_checkpoints=9))
    folder = remote.path("trainings/t/checkpoints")
    fs = fsspec.filesystem("gs", use_listings_cache=False)
    fs.rm_file(f"{folder}/step-00000006/model.safetensors")
    fs.rm_file(f"{folder}/step-00000004/manifest.json")
    assert latest_checkpoint(folder) == f"{folder}/step-00000002"
    assert "step-00000006 is torn and passed over: model.safetensors is missing" in caplog.text
    assert "step-00000004 is torn and passed over: manifest.json is missing" in caplog.text
    assert json.loads(fs.cat_file(remote.path("stages/train/t.json")))["stage"] == "train"
