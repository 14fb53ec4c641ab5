"""Whole writes: a reader sees all of a file or none, wherever it lies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from schemas import storage
from schemas.errors import InputError
from schemas.storage import (
    TEMPORARY_PREFIX,
    exists,
    is_local,
    join,
    list_folders,
    list_names,
    normalise,
    read_bytes,
    sweep_temporary,
    write_whole,
)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "place")
    return f"memory://{tmp_path.name}"


def test_written_is_read(place: str) -> None:
    url = join(place, "a", "b.bin")
    assert not exists(url)
    write_whole(url, b"one")
    assert exists(url) and read_bytes(url) == b"one"
    write_whole(url, b"one")
    write_whole(url, b"two")
    assert read_bytes(url) == b"two"


def test_create_only_leaves_what_stands(place: str) -> None:
    url = join(place, "a.bin")
    write_whole(url, b"one", create_only=True)
    for data in (b"one", b"two"):
        with pytest.raises(FileExistsError):
            write_whole(url, data, create_only=True)
    assert read_bytes(url) == b"one"


def test_missing_is_missing(place: str) -> None:
    with pytest.raises(FileNotFoundError):
        read_bytes(join(place, "nothing"))
    assert list_names(join(place, "nowhere")) == [] and list_folders(join(place, "nowhere")) == []


def test_listing_knows_files_from_folders_and_leaves_out_the_unfinished(place: str) -> None:
    for name in ("b.parquet", "a.parquet", "c.json", "folder/x.parquet", f"{TEMPORARY_PREFIX}d.parquet-1"):
        write_whole(join(place, name), b"x")
    assert list_names(place) == ["a.parquet", "b.parquet", "c.json"]
    assert list_names(place, ".parquet") == ["a.parquet", "b.parquet"]
    assert list_folders(place) == ["folder"]


def test_listing_sees_what_another_process_wrote(place: str) -> None:
    write_whole(join(place, "a"), b"x")
    assert list_names(place) == ["a"]
    write_whole(join(place, "b"), b"x")
    assert list_names(place) == ["a", "b"]


def test_object_store_gets_one_upload_conditional_on_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    calls: list[tuple[bytes, str]] = []
    original = type(fs).pipe_file

    def record(self: object, path: str, value: bytes, mode: str = "overwrite", **_: object) -> None:
        calls.append((bytes(value), mode))
        original(self, path, value, mode=mode)

    monkeypatch.setattr(type(fs), "pipe_file", record)
    url = "memory://conditional/a"
    write_whole(url, b"one")
    write_whole(url, b"one")
    assert calls == [(b"one", "create")] * 2  # equal content is not sent over what stands
    write_whole(url, b"two")
    assert calls[2:] == [(b"two", "create"), (b"two", "overwrite")]


def test_no_temporary_file_stays(tmp_path: Path) -> None:
    write_whole(str(tmp_path / "a"), b"x")
    with pytest.raises(FileExistsError):
        write_whole(str(tmp_path / "a"), b"y", create_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "a")
    write_whole(url, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*/a: No space left on device.*has space left"):
        write_whole(url, b"new")
    monkeypatch.undo()
    assert read_bytes(url) == b"old" and [path.name for path in tmp_path.iterdir()] == ["a"]


_KILLED = """
import os, sys
from schemas import storage
original = os.fsync
def stop(descriptor):
    original(descriptor)
    print("written", flush=True)
    import time
    time.sleep(60)
storage.os.fsync = stop
storage.write_whole(sys.argv[1], b"x" * 1_000_000)
"""


def test_killed_writer_leaves_only_a_temporary_file(tmp_path: Path) -> None:
    home = Path(storage.__file__).resolve().parent.parent
    target = tmp_path / "out" / "a.bin"
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(target)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(home)},
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    left = list(target.parent.iterdir())
    assert not target.exists() and len(left) == 1 and left[0].name.startswith(TEMPORARY_PREFIX)
    assert list_names(str(target.parent)) == []
    write_whole(str(target), b"again")
    assert read_bytes(str(target)) == b"again"


def test_sweep_takes_old_temporary_files_only(tmp_path: Path) -> None:
    now = time.time()
    for name, age in ((f"{TEMPORARY_PREFIX}old", 3 * 86400), (f"{TEMPORARY_PREFIX}new", 60), ("result", 3 * 86400)):
        path = tmp_path / "deep" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
        os.utime(path, (now - age, now - age))
    assert sweep_temporary(str(tmp_path), now=now) == 1
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == [f"{TEMPORARY_PREFIX}new", "result"]
    assert sweep_temporary("memory://anything") == 0


def test_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot write"):
        write_whole(str(tmp_path / "file" / "below"), b"x")


@pytest.mark.parametrize("reason", ["Permission denied", "Read-only file system"])
def test_read_only_folder_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    """Root may write into any folder, so the refusal is made by hand: what matters is what becomes of it."""
    number = {"Permission denied": 13, "Read-only file system": 30}[reason]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, reason)

    monkeypatch.setattr(storage, "open", refuse, raising=False)
    with pytest.raises(InputError, match=rf"cannot write .*/a: {reason}"):
        write_whole(str(tmp_path / "a"), b"x")


def test_unknown_kind_of_url_is_a_clear_error() -> None:
    with pytest.raises(InputError, match="nosuch"):
        read_bytes("nosuch://bucket/file")


def test_normalise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normalise("runs/a/") == str(tmp_path / "runs/a")
    assert normalise(Path("runs")) == str(tmp_path / "runs")
    assert normalise("gs://bucket/run/") == "gs://bucket/run"
    assert normalise("memory://") == "memory://"
    assert is_local(str(tmp_path)) and not is_local("memory://x")
