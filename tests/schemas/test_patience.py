"""Reads that are tried again: what is, what is not, how often, with which pauses."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import aiohttp
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from gcsfs.retry import HttpError

from schemas.errors import InputError
from schemas.patience import Patience, worth_another_try
from tests.gcs import Gcs


class Flaky(MemoryFileSystem):
    """Reads fail as `script` says, then succeed."""

    protocol = "flaky"
    cachable = False
    script: ClassVar[list[Any]] = []
    hang = threading.Event()

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        failure = Flaky.script.pop(0) if Flaky.script else None
        if failure == "hang":
            Flaky.hang.wait(30)
        elif failure is not None:
            raise failure
        return b"0123456789"[start:end]


@pytest.fixture(autouse=True)
def flaky(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.script, Flaky.hang = [], threading.Event()


def patience(pauses: list[float], **changes: Any) -> Patience:
    return Patience(sleep=pauses.append, **changes)


def test_pauses_double_and_the_read_succeeds() -> None:
    pauses: list[float] = []
    Flaky.script = [ConnectionResetError("reset"), TimeoutError(), aiohttp.ServerDisconnectedError()]
    assert patience(pauses).whole("flaky://x") == b"0123456789"
    assert pauses == [1.0, 2.0, 4.0]
    assert patience(pauses).ranges("flaky://x", [(2, 3), (0, 1)]) == [b"234", b"0"]


def test_tries_are_bounded_and_the_error_says_how_many() -> None:
    pauses: list[float] = []
    Flaky.script = [ConnectionResetError("connection reset")] * 9
    with pytest.raises(InputError, match=r"cannot read flaky://x: .*connection reset, at each of 3 tries\. Check"):
        patience(pauses, attempts=3, pause_s=0.5).whole("flaky://x")
    assert pauses == [0.5, 1.0]
    assert len(Flaky.script) == 6


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), PermissionError("no"), ValueError("bad"), OSError("Forbidden")]
)
def test_what_will_not_pass_is_not_tried_again(error: Exception) -> None:
    pauses: list[float] = []
    Flaky.script = [error] * 2
    with pytest.raises((InputError, FileNotFoundError)):
        patience(pauses).whole("flaky://x")
    assert pauses == []
    assert len(Flaky.script) == 1


def test_a_read_that_hangs_is_an_error_after_its_limit_and_is_tried_again() -> None:
    pauses: list[float] = []
    Flaky.script = ["hang", "hang"]
    try:
        assert patience(pauses, limit_s=0.05).whole("flaky://x") == b"0123456789"
        assert pauses == [1.0, 2.0]
        Flaky.script = ["hang"] * 2
        with pytest.raises(InputError, match=r"no answer within 0\.05 s, at each of 2 tries"):
            patience(pauses, limit_s=0.05, attempts=2).whole("flaky://x")
    finally:
        Flaky.hang.set()


def test_the_limit_grows_with_what_is_asked_for() -> None:
    Flaky.script = ["hang"]
    threading.Timer(0.1, Flaky.hang.set).start()
    pauses: list[float] = []
    assert patience(pauses, limit_s=0.06).whole("flaky://x", size=80 << 20) == b"0123456789"
    assert pauses == []


def test_what_a_client_has_tried_itself_is_not_tried_again() -> None:
    gcs, http = fsspec.filesystem("gs", token="anon"), fsspec.filesystem("http")
    busy = HttpError({"code": 503, "message": "busy"})
    for error in (busy, aiohttp.ServerDisconnectedError()):
        assert not worth_another_try(error, gcs)
        assert worth_another_try(error, http)
    assert worth_another_try(TimeoutError(), gcs)
    assert worth_another_try(ConnectionResetError(), gcs)
    assert not worth_another_try(HttpError({"code": 400, "message": "bad"}), http)


def test_a_store_that_does_not_answer(bucket: str, gcs: Gcs) -> None:
    """Over HTTP: the request that was given up is cancelled, the next one is answered; faults gcsfs tries itself count once."""
    fs, path = fsspec.core.url_to_fs(f"{bucket}/file")
    fs.pipe_file(path, b"0123456789")
    pauses: list[float] = []
    gcs.clear()
    gcs.fail("^GET /download", sleep=20, count=2)
    assert patience(pauses, limit_s=0.5).whole(f"{bucket}/file") == b"0123456789"
    assert pauses == [1.0, 2.0]
    gcs.clear()
    gcs.fail("^GET /download", sleep=20)
    assert patience(pauses, limit_s=0.5).ranges(f"{bucket}/file", [(1, 2)]) == [b"12"]
    assert len(pauses) == 3


def test_faults_that_gcsfs_has_tried_six_times_are_tried_six_times(bucket: str, gcs: Gcs, impatient: None) -> None:
    fs, path = fsspec.core.url_to_fs(f"{bucket}/file")
    fs.pipe_file(path, b"x")
    gcs.clear()
    gcs.fail("^GET /download", status=503, count=1000)
    pauses: list[float] = []
    with pytest.raises(InputError, match="cannot read"):
        patience(pauses).whole(f"{bucket}/file")
    assert pauses == []
    assert len(gcs.requests("^GET /download")) == 6


@pytest.mark.parametrize("changes", [{"attempts": 0}, {"limit_s": 0.0}])
def test_impossible_patience(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"read_{next(iter(changes))}"):
        Patience(**changes)
