"""The cache of files on a local disk: whole, within its bound, shared, never a reason to wait for ever."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from schemas.disk_cache import DiskCache
from schemas.errors import InputError
from schemas.storage import sha256

ROOT = Path(__file__).resolve().parents[2]
BODIES = [bytes([number]) * 100 for number in range(6)]


class Fetches:
    """What was fetched, and by whom it is read."""

    def __init__(self, cache: DiskCache) -> None:
        self.cache = cache
        self.fetched: list[int] = []

    def read(self, number: int) -> bytes | None:
        def fetch() -> bytes:
            self.fetched.append(number)
            return BODIES[number]

        handle = self.cache.open(sha256(BODIES[number]), 100, fetch)
        if handle is None:
            return None
        with handle:
            return handle.read()


def standing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def names(*numbers: int) -> list[str]:
    return sorted(sha256(BODIES[number]) for number in numbers)


def test_a_file_is_fetched_once_also_by_another_object(tmp_path: Path) -> None:
    for expected in ([1], []):
        reads = Fetches(DiskCache(str(tmp_path), 1000))
        assert [reads.read(1), reads.read(1)] == [BODIES[1], BODIES[1]]
        assert reads.fetched == expected
    assert standing(tmp_path) == names(1)


def test_the_least_recently_used_goes_first_and_the_bound_holds(tmp_path: Path) -> None:
    reads = Fetches(DiskCache(str(tmp_path), 300))
    for number in (0, 1, 2, 0, 3):
        assert reads.read(number) == BODIES[number]
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 300
        time.sleep(0.01)  # the clock of a file system may be coarse
    assert standing(tmp_path) == names(0, 2, 3)
    assert reads.read(0) == BODIES[0]
    assert reads.fetched == [0, 1, 2, 3]


def test_what_is_longer_than_the_bound_is_not_taken_in(tmp_path: Path) -> None:
    reads = Fetches(DiskCache(str(tmp_path), 99))
    assert reads.read(0) is None
    assert reads.fetched == []


def test_an_evicted_file_stays_readable_to_who_has_it_open(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 100)
    handle = cache.open(sha256(BODIES[0]), 100, lambda: BODIES[0])
    assert handle is not None
    assert Fetches(cache).read(1) == BODIES[1]
    assert standing(tmp_path) == names(1)
    with handle:
        assert handle.read() == BODIES[0]


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_file_is_fetched_again(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    Fetches(DiskCache(str(tmp_path), 300)).read(0)
    path = tmp_path / names(0)[0]
    path.write_bytes({"flip": b"x" + BODIES[0][1:], "cut": BODIES[0][:50], "empty": b""}[harm])
    reads = Fetches(DiskCache(str(tmp_path), 300))
    assert reads.read(0) == BODIES[0]
    assert reads.fetched == [0]
    assert "is damaged; it is fetched again" in caplog.text
    assert path.read_bytes() == BODIES[0]


def test_a_fetch_that_fails_leaves_nothing_and_its_error_passes(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), 300)

    def fails() -> bytes:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        cache.open(sha256(BODIES[0]), 100, fails)
    assert standing(tmp_path) == []
    assert Fetches(cache).read(0) == BODIES[0]


def test_a_full_disk_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    reads = Fetches(DiskCache(str(tmp_path), 300))
    assert [reads.read(0), reads.read(0)] == [None, None]
    assert caplog.text.count("No space left on device") == 1
    assert standing(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot make the cache folder"):
        DiskCache(str(tmp_path / "file" / "cache"), 100)
    with pytest.raises(InputError, match="cache_disk_bytes"):
        DiskCache(str(tmp_path), -1)


def locked(path: Path) -> Callable[[], None]:
    """Hold a file's lock, as another process would; returns what lets go."""
    place = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(place, fcntl.LOCK_EX)

    def release() -> None:
        fcntl.flock(place, fcntl.LOCK_UN)
        os.close(place)

    return release


def test_waits_for_another_process_that_fetches_the_same(tmp_path: Path) -> None:
    """And takes what it made."""
    cache = DiskCache(str(tmp_path), 300)
    release = locked(tmp_path / f".tmp-{names(0)[0]}")
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            (tmp_path / f".tmp-{names(0)[0]}").write_bytes(BODIES[0])
            (tmp_path / f".tmp-{names(0)[0]}").rename(tmp_path / names(0)[0])
            release()

    cache = DiskCache(str(tmp_path), 300, sleep=sleep)
    reads = Fetches(cache)
    assert reads.read(0) == BODIES[0]
    assert reads.fetched == []
    assert len(pauses) == 3


@pytest.mark.parametrize("name", [f".tmp-{names(0)[0]}", ".lock"])
def test_never_waits_longer_than_it_may(tmp_path: Path, name: str) -> None:
    """Another process holds a lock for ever, the file's or the folder's: read past the cache."""
    pauses: list[float] = []
    release = locked(tmp_path / name)
    reads = Fetches(DiskCache(str(tmp_path), 300, wait_s=2.0, sleep=pauses.append))
    assert reads.read(0) is None
    assert 1.9 < sum(pauses) < 4.2
    release()
    assert reads.read(0) == BODIES[0]


def test_room_that_others_have_reserved_is_theirs_and_that_of_the_dead_is_not(tmp_path: Path) -> None:
    other = tmp_path / f".tmp-{names(5)[0]}"
    other.write_bytes(bytes(250))
    release = locked(other)
    reads = Fetches(DiskCache(str(tmp_path), 300))
    assert reads.read(0) is None
    assert other.exists()
    release()
    assert reads.read(0) == BODIES[0]
    assert standing(tmp_path) == names(0)


_WORKER = """
import random, sys
from schemas.disk_cache import DiskCache
from schemas.storage import sha256
folder, seed, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
bodies = [bytes([n]) * 100_000 for n in range(8)]
cache, rng, fetched = DiskCache(folder, 350_000), random.Random(seed), 0
print("ready", flush=True)
for _ in range(rounds):
    n = rng.randrange(8)
    handle = cache.open(sha256(bodies[n]), 100_000, lambda: bodies[n])
    if handle is not None:
        with handle:
            assert handle.read() == bodies[n]
print("done", flush=True)
"""


def test_processes_share_a_folder_within_its_bound_also_when_one_is_killed(tmp_path: Path) -> None:
    """Three processes thrash a folder that holds three of their eight files; one of them is killed on the way."""
    command = [sys.executable, "-c", _WORKER, str(tmp_path)]
    workers = [
        subprocess.Popen([*command, str(seed), rounds], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for seed, rounds in enumerate(("150", "150", "100000"))
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    largest = 0
    while any(worker.poll() is None for worker in workers[:2]):
        sizes = []
        for path in list(tmp_path.iterdir()):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        largest = max(largest, sum(sizes))
        time.sleep(0.002)
        if largest and workers[2].poll() is None and time.monotonic() % 1 > 0.5:
            workers[2].send_signal(signal.SIGKILL)
    workers[2].kill()
    assert [worker.wait(60) for worker in workers[:2]] == [0, 0]
    assert workers[2].wait(60) == -signal.SIGKILL
    for worker in workers:
        assert worker.stdout is not None
        worker.stdout.close()
    # A listing is no snapshot: a file may be seen before it is evicted, and the one that took its room after.
    assert 0 < largest <= 350_000 + 100_000
    reads = Fetches(DiskCache(str(tmp_path), 350_000))
    assert reads.read(0) == BODIES[0]
    assert not [name for name in standing(tmp_path) if name.startswith(".tmp-")]
