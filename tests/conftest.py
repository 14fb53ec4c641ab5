"""Places that tests of several rooms share."""

from __future__ import annotations

import os
import types
from collections.abc import Iterator

import pytest

# Before torch is imported: the models are tiny, and threads that wait for each other take thirty times as long where the
# processors are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.gcs import BUCKET, ENVIRONMENT, Gcs, serve

os.environ.update(ENVIRONMENT)  # gcsfs reads it when it is imported, whichever test does that


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[Gcs]:
    """A server of Google Cloud Storage's API in another process, started by the first test that asks for it."""
    with serve() as server:
        yield server


@pytest.fixture
def gcs(gcs_server: Gcs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gcs]:
    """The server without faults, and this process as its client."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server.host)
    gcs_server.clear()
    yield gcs_server
    gcs_server.clear()


@pytest.fixture
def bucket(gcs: Gcs, request: pytest.FixtureRequest) -> str:
    """An empty place of the test's own in the server's bucket."""
    return f"gs://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs tries again at once instead of after 1, 2, 4, 8 and 16 seconds."""
    import gcsfs.retry

    async def at_once(_: float) -> None:
        return None

    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=at_once))


@pytest.fixture
def wide_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of commands are printed unbroken, whichever test made the console first."""
    from lehr.console import console

    monkeypatch.setattr(console, "width", 300)
