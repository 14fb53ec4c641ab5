"""A whole run on `gs://`, over HTTP against a server in another process: with the bytes of a run on a disk."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.dataset as ds
import pytest

from lehr.cli import EXIT_ERROR, main
from pipelines.readers.source import Source
from schemas.errors import InputError, SourceChanged
from tests.gcs import ROOT, Gcs
from tests.pipelines.test_hostile import features_options
from tests.pipelines.test_object_store import object_hashes
from tests.pipelines.worlds import make_world, tree_hashes

COLUMNS = ["--id-column", "name", "--domain-column", "topic", "--keep-columns", "clean", "--unit-tokens", "400"]
AFTER = [["select", "--samples", "8"], ["export", "--shard-samples", "3", "--workers", "1"]]


def lehr(gcs: Gcs, *arguments: str) -> str:
    """Run a verb in a process of its own; its output."""
    command = [sys.executable, "-m", "lehr.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=gcs.environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{arguments}: {done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """A folder with a corpus, a target, a model and a finished run on disk: (folder, model, hashes of the run)."""
    folder = tmp_path_factory.mktemp("local")
    world = make_world(folder, rows=12)
    run = str(folder / "disk")
    commands = [
        ["plan", run, str(folder / "corpus"), "--name", "tiny", *COLUMNS],
        ["target", run, *targets(str(folder)), *features_options(world.model)],
        ["score", run, "--workers", "1"],
        *([verb, run, *options] for verb, *options in AFTER),
    ]
    for command in commands:
        assert main(command) == 0, command
    return folder, world.model, tree_hashes(folder / "disk")


def targets(place: str) -> list[str]:
    return ["--data", f"{place}/target.jsonl", "--eval", f"{place}/eval.jsonl"]


def upload(folder: Path, bucket: str) -> None:
    """Corpus, target and evaluation set."""
    fs = fsspec.filesystem("gs", use_listings_cache=False)
    for name in ("corpus", "target.jsonl", "eval.jsonl"):
        fs.put(str(folder / name), f"{bucket}/{name}", recursive=(folder / name).is_dir())


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_whole_run_by_commands_has_the_bytes_of_one_on_a_disk(
    local: tuple[Path, Path, dict[str, str]], bucket: str, gcs: Gcs, workers: str
) -> None:
    """Every verb is a process of its own, as a user starts it; two workers of `score` are two more."""
    folder, model, expected = local
    upload(folder, bucket)
    run = f"{bucket}/run"
    lehr(gcs, "plan", run, f"{bucket}/corpus", "--name", "tiny", *COLUMNS)
    lehr(gcs, "target", run, *targets(bucket), *features_options(model))
    lehr(gcs, "score", run, "--workers", workers)
    for verb, *options in AFTER:
        lehr(gcs, verb, run, *options)
    assert object_hashes(run) == expected
    assert "checks hold" in lehr(gcs, "verify", run)
    state = lehr(gcs, "status", run)
    assert "score" in state and "export" in state
    question = ["--sql", "SELECT count(*) AS n, sum(tokens) AS t FROM features", "--format", "json"]
    found = json.loads(lehr(gcs, "audit", run, *question))
    assert found == json.loads(lehr(gcs, "audit", str(folder / "disk"), *question)) and found[0]["n"] > 10


def test_a_whole_run_under_faults_has_the_same_bytes(
    local: tuple[Path, Path, dict[str, str]], bucket: str, gcs: Gcs, impatient: None
) -> None:
    """Every few requests fail before or after they were carried out, or break off in the body; then audit and verify."""
    folder, model, expected = local
    upload(folder, bucket)
    run = f"{bucket}/run"
    gcs.fail("", status=503, every=7, count=1000)
    gcs.fail("", drop=True, late=True, every=11, count=1000)
    gcs.fail("^GET", cut=40, every=13, count=1000)
    commands = [
        ["plan", run, f"{bucket}/corpus", "--name", "tiny", *COLUMNS],
        ["target", run, *targets(bucket), *features_options(model)],
        ["score", run, "--workers", "1"],
        *([verb, run, *options] for verb, *options in AFTER),
        ["verify", run],
        ["status", run],
        ["audit", run, "--sql", "SELECT count(*) FROM features"],
    ]
    for command in commands:
        assert main(command) == 0, command
    assert sum(request["fault"] for request in gcs.requests()) > 100
    gcs.clear()
    assert object_hashes(run) == expected


def test_corpus_that_cannot_be_reached_is_an_error_that_names_it(
    bucket: str,
    gcs: Gcs,
    impatient: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    fsspec.filesystem("gs").pipe_file(f"{bucket}/corpus/a.jsonl", b'{"text": "glass"}\n')
    # As `logging.basicConfig` does, which does nothing where pytest has installed its own handlers: the client logs too.
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    request.addfinalizer(lambda: logging.getLogger().removeHandler(handler))
    for fault, reason in (({"status": 503}, "injected"), ({"status": 403}, "Forbidden"), ({"drop": True}, "isconnect")):
        for corpus in (f"{bucket}/corpus", f"{bucket}/corpus/a.jsonl", f"{bucket}/corpus/*.jsonl"):
            gcs.clear()
            gcs.fail("", count=1000, **fault)
            assert main(["plan", str(tmp_path / "run"), corpus]) == EXIT_ERROR
            error = capsys.readouterr().err
            assert corpus in error and reason in error and "Traceback" not in error
    gcs.clear()
    assert main(["plan", str(tmp_path / "run"), f"{bucket}/nowhere"]) == EXIT_ERROR
    assert f"{bucket}/nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [{"status": 503}, {"cut": 10}, {"drop": True}])
def test_corpus_file_is_read_whole_or_not_at_all(bucket: str, gcs: Gcs, impatient: None, fault: dict[str, Any]) -> None:
    data = bytes(range(256)) * 100
    fsspec.filesystem("gs").pipe_file(f"{bucket}/a.jsonl", data)
    gcs.fail("^GET /download", **fault)
    assert Source(bucket, "a.jsonl").read(0, 1 << 30) == data
    gcs.fail("^GET /download", count=1000, **fault)
    with pytest.raises(InputError, match=r"cannot read gs://.*a\.jsonl"):
        Source(bucket, "a.jsonl").read(0, 1 << 30)
    with pytest.raises(SourceChanged, match=r"gs://.*b\.jsonl is gone"):
        Source(bucket, "b.jsonl").read(0, 1 << 30)


def test_views_read_by_blocks(local: tuple[Path, Path, dict[str, str]], bucket: str, gcs: Gcs) -> None:
    """Audits read tables by ranges of our own making: the client's file object would fetch ahead in the background."""
    from lehr.views import TableView
    from schemas.run import Run

    folder, _, _ = local
    fs = fsspec.filesystem("gs", use_listings_cache=False)
    for path in sorted((folder / "disk").rglob("*")):
        if path.is_file():
            fs.pipe_file(f"{bucket}/{path.relative_to(folder / 'disk')}", path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(fs), "_open", lambda *_, **__: pytest.fail("a file object of the client"))
        remote = TableView(Run.open(bucket), "features").dataset
        assert isinstance(remote, ds.FileSystemDataset)
        found = remote.to_table()
    assert found.equals(TableView(Run.open(str(folder / "disk")), "features").dataset.to_table())
    gone = next(path for path in (folder / "disk" / "features").rglob("*.parquet")).relative_to(folder / "disk")
    fs.rm_file(f"{bucket}/{gone}")
    with pytest.raises(Exception, match=str(gone)) as missing:
        TableView(Run.open(bucket), "features")
    assert "missing" in str(missing.value)


def test_model_is_fetched(
    local: tuple[Path, Path, dict[str, str]],
    bucket: str,
    gcs: Gcs,
    impatient: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model on `gs://`: fetched whole through one fault, a clear error where the fault stays."""
    from selection_ops.model import load_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fs = fsspec.filesystem("gs", use_listings_cache=False)
    fs.put(str(local[1]), f"{bucket}/model", recursive=True)
    fs.put(str(local[1]), f"{bucket}/other", recursive=True)
    gcs.fail("^GET /download", cut=1000)
    found = load_model(f"{bucket}/model", dtype="float32", attention="eager")
    here = load_model(str(local[1]), dtype="float32", attention="eager")
    assert all(bool((a == b).all()) for a, b in zip(found.model.parameters(), here.model.parameters()))
    gcs.fail("^GET /download", cut=10, count=1000)
    with pytest.raises(InputError, match=r"gs://.*other.*"):
        load_model(f"{bucket}/other", dtype="float32", attention="eager")
