"""A whole run on an object store: every stage from and to URLs alone, with the bytes of a run on a disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lehr.cli import EXIT_ERROR, main
from schemas.run import Run
from schemas.shards import read_index, read_shard
from tests.pipelines.test_hostile import features_options
from tests.pipelines.worlds import make_world, tree_hashes


@pytest.fixture
def store() -> Iterator[str]:
    """An empty place in memory; forgotten afterwards."""
    fs = fsspec.filesystem("memory")
    yield "memory://lehr-test"
    fs.rm("/lehr-test", recursive=True)


def object_hashes(url: str) -> dict[str, str]:
    """As `tree_hashes`, of everything below a URL."""
    fs, root = fsspec.core.url_to_fs(url)
    found = {}
    for path in fs.find(root):
        relative = path.removeprefix(root).lstrip("/")
        if not {"timings", "chunks"} & set(relative.split("/")) and relative != "run.json":
            found[relative] = hashlib.sha256(fs.cat_file(path)).hexdigest()
    return found


def test_a_whole_run_on_an_object_store_has_the_bytes_of_one_on_a_disk(tmp_path: Path, store: str) -> None:
    """Memory is of one process, so one worker; corpus, target and evaluation set are read from URLs too."""
    world = make_world(tmp_path, rows=12)
    fs = fsspec.filesystem("memory")
    for name in ("corpus", "target.jsonl", "eval.jsonl"):
        fs.put(str(tmp_path / name), f"{store}/{name}", recursive=(tmp_path / name).is_dir())
    columns = ["--id-column", "name", "--domain-column", "topic", "--keep-columns", "clean", "--unit-tokens", "400"]
    disk = tmp_path / "disk"
    for place, run in ((str(tmp_path), str(disk)), (store, f"{store}/run")):
        planning = ["plan", run, f"{place}/corpus", "--name", "tiny", *columns]
        target = ["--data", f"{place}/target.jsonl", "--eval", f"{place}/eval.jsonl"]
        commands: list[list[str]] = [
            planning,
            ["target", run, *target, *features_options(world.model)],
            ["score", run, "--workers", "1"],
        ]
        for command in commands:
            assert main(command) == 0, command
        # An extension replaces plan and manifests.
        with fsspec.open(f"{place}/corpus/c.jsonl", "w") as handle:
            handle.write(json.dumps({"name": "late", "topic": "web", "clean": True, "text": "glass " * 20}) + "\n")
        commands = [
            [*planning, "--extend"],
            ["score", run, "--workers", "1"],
            ["select", run, "--samples", "8"],
            ["export", run, "--shard-samples", "3"],
        ]
        for command in commands:
            assert main(command) == 0, command
    expected = tree_hashes(disk)
    assert object_hashes(f"{store}/run") == expected
    assert main(["verify", f"{store}/run"]) == 0

    fs.rm(f"{store}/run/features", recursive=True)
    fs.rm(f"{store}/run/streams", recursive=True)
    for command in commands[1:]:
        assert main(command) == 0, command
    assert object_hashes(f"{store}/run") == expected

    opened = Run.open(f"{store}/run")
    index = read_index(opened.path(opened.stream_folder("match", 1)))
    ranked = [item for entry in index.shards for item in read_shard(opened.path("streams/match/gen-000001"), entry)]
    assert [item.rank for item in ranked] == list(range(8))
    assert json.loads(ranked[0].sample.extra).keys() == {"clean"}


def test_a_place_that_is_not_there_is_an_error_that_names_it(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("memory").pipe_file(f"{store}/keep", b"")
    for command, named in (
        (["score", f"{store}/nothing", "--workers", "1"], f"{store}/nothing is not a run directory"),
        (["plan", f"{store}/run", f"{store}/nothing"], f"{store}/nothing"),
        (["plan", "nowhere://bucket/run", f"{store}/nothing"], "nowhere"),
    ):
        assert main(command) == EXIT_ERROR
        error = capsys.readouterr().err
        assert named in error and "Traceback" not in error
