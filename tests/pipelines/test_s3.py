"""A whole run on `s3://`, over HTTP against a server in another process: with the bytes of a run on a disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lehr.cli import main
from schemas.errors import InputError
from schemas.ranged import open_ranged
from schemas.storage import exists, list_folders, list_names, read_bytes, remove, write_whole
from tests import s3
from tests.killing import ROOT
from tests.pipelines.test_hostile import features_options
from tests.pipelines.test_object_store import object_hashes
from tests.pipelines.worlds import make_world, tree_hashes

for package in ("s3fs", "moto", "flask"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'lehr[test]'")
pytestmark = pytest.mark.slow

COLUMNS = ["--id-column", "name", "--domain-column", "topic", "--keep-columns", "clean", "--unit-tokens", "400"]
TRAINING = [
    "--name", "t", "--stream", "match", "--policy", "filter-then-weight", "--candidates", "4", "--n-keep", "2", "--lr", "0.01",
    "--dtype", "float32", "--epochs", "1", "--proj-rank", "4", "--checkpoint-every", "1", "--seed", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3.serve() as client:
        yield client


@pytest.fixture
def client(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The server, and this process as its client."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    return s3.environment(server)


def test_objects_are_whole_created_once_and_read_by_ranges(client: dict[str, str]) -> None:
    place = f"s3://{s3.BUCKET}/objects"
    for size in (10, 12 << 20, 60 << 20):  # the last one takes s3fs several requests
        url, data = f"{place}/{size}", bytes(range(250)) * (size // 250) + b"end"
        write_whole(url, data, create_only=True)
        with pytest.raises(FileExistsError):
            write_whole(url, b"x" + data, create_only=True)
        assert read_bytes(url) == data
        with open_ranged(url) as handle:
            handle.seek(len(data) // 2)
            assert handle.read(100) == data[len(data) // 2 : len(data) // 2 + 100]
        write_whole(url, data[::-1])
        assert read_bytes(url) == data[::-1]
    write_whole(f"{place}/folder/a.json", b"1")
    assert list_folders(place) == ["folder"] and list_names(f"{place}/folder", ".json") == ["a.json"]
    remove(f"{place}/folder/a.json")
    assert not exists(f"{place}/folder/a.json")
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{place}/folder/a.json")
    with pytest.raises(InputError, match="no such bucket"):
        write_whole("s3://nowhere/a", b"1")


def test_a_whole_run_by_commands_has_the_bytes_of_one_on_a_disk(client: dict[str, str], tmp_path: Path) -> None:
    """Every verb on the store is a process of its own; the workers of `score` are two more, and a training follows."""
    world = make_world(tmp_path, rows=12)
    bucket = f"s3://{s3.BUCKET}/whole"
    fs = fsspec.filesystem("s3", use_listings_cache=False)
    for name in ("corpus", "target.jsonl", "eval.jsonl"):
        fs.put(str(tmp_path / name), f"{bucket}/{name}", recursive=(tmp_path / name).is_dir())

    def commands(run: str, place: str, workers: str) -> list[list[str]]:
        target = ["--data", f"{place}/target.jsonl", "--eval", f"{place}/eval.jsonl", *features_options(world.model)]
        return [
            ["plan", run, f"{place}/corpus", "--name", "tiny", *COLUMNS],
            ["target", run, *target],
            ["score", run, "--workers", workers],
            ["select", run, "--samples", "8"],
            ["export", run, "--shard-samples", "3", "--workers", "1"],
            ["train", run, "--model", str(world.model), *TRAINING],
            ["verify", run],
            ["status", run],
            ["audit", run, "--sql", "SELECT count(*) FROM features"],
        ]

    for command in commands(str(tmp_path / "disk"), str(tmp_path), "1"):
        assert main(command) == 0, command
    for command in commands(f"{bucket}/run", bucket, "2"):
        done = subprocess.run(
            [sys.executable, "-m", "lehr.cli", *command],
            cwd=ROOT,
            env=client,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0 and "Traceback" not in done.stderr, f"{command}: {done.stderr[-3000:]}"
    expected = tree_hashes(tmp_path / "disk")
    assert any(path.startswith("trainings/t/checkpoints/") for path in expected)
    assert object_hashes(f"{bucket}/run") == expected
