"""What ends a job, and what is said of it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.engines.local import FOLDER_PREFIX, _own_folder, _worker_command
from pipelines.engines.worker import LOCK, WORKER_LOST
from pipelines.runners import explained
from schemas.errors import InputError, LehrError
from tests.killing import ROOT

_BUSY = """
from pipelines.engines.worker import end_with_supervisor
end_with_supervisor()
print("busy", flush=True)
while True:
    pass
"""


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A lock as a supervisor holds it, and the environment of its workers."""
    held = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    yield held, {**os.environ, LOCK: str(tmp_path / "lock")}


def test_a_busy_worker_ends_with_its_supervisor(lock: tuple[int, dict[str, str]]) -> None:
    """Beam's own worker would finish its bundle first."""
    worker = subprocess.Popen([sys.executable, "-c", _BUSY], cwd=ROOT, env=lock[1], stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None and worker.stdout.readline() == b"busy\n"
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.5)
        os.close(lock[0])  # what the kernel does for a process that died
        assert worker.wait(10) == WORKER_LOST
    finally:
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize("when", [0.0, 0.3, 1.5])
def test_a_worker_ends_with_its_supervisor_before_it_has_anything_to_do(
    lock: tuple[int, dict[str, str]], when: float, tmp_path: Path
) -> None:
    """Nobody answers: Beam's own worker waits a minute for the receiver of its logs, then another for work."""
    nobody = "url: 'localhost:9'"
    environment = {"CONTROL_API_SERVICE_DESCRIPTOR": nobody, "LOGGING_API_SERVICE_DESCRIPTOR": nobody}
    # As Beam starts it; the folder of the command has rooms of its own.
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines/__init__.py").write_text("raise SystemExit('another pipelines')")
    worker = subprocess.Popen(_worker_command(), shell=True, cwd=tmp_path, env={**lock[1], **environment})
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(when)
        os.close(lock[0])
        assert worker.wait(30) == WORKER_LOST  # imports hold it up where the machine is busy
    finally:
        worker.kill()
        worker.wait()


def test_folders_of_killed_commands_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left, young, other = (tmp_path / f"{FOLDER_PREFIX}{name}" for name in ("left", "young", "other"))
    for folder in (left, young, other):
        folder.mkdir()
        (folder / "log").touch()
    (tmp_path / "lehr-else").mkdir()
    with _own_folder() as own:
        held = os.open(other / "owner", os.O_CREAT | os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_EX)
        for folder in (left, other, Path(own)):
            os.utime(folder, (1.0, 1.0))
        with _own_folder():
            assert not left.exists() and young.exists() and other.exists() and Path(own).exists()
        os.close(held)
        os.utime(other, (1.0, 1.0))
    with _own_folder():
        assert sorted(path.name for path in tmp_path.glob("*"))[0] == "lehr-else"
        assert not other.exists() and young.exists() and not Path(own).exists()


_TRACE = """Traceback (most recent call last):
  File "storage.py", line 127, in _write_local
OSError: [Errno 28] No space left on device

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
schemas.errors.InputError: inner

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
schemas.errors.CorruptFile: a.parquet is broken;
fetch it again [while running 'ScoreUnit']

"""


def test_the_error_of_a_worker_is_found_in_whatever_a_runner_raises() -> None:
    assert str(explained(RuntimeError(_TRACE))) == "a.parquet is broken;\nfetch it again"
    direct = explained(InputError("no model [while running 'ReadSelected']"))
    assert isinstance(direct, InputError) and str(direct) == "no model"
    assert str(explained(RuntimeError("schemas.errors.LehrError: at the start"))) == "at the start"


@pytest.mark.parametrize("error", [RuntimeError("boom"), ValueError("says schemas.errors.InputError: inside a line")])
def test_what_no_message_explains_stays_as_it_is(error: Exception) -> None:
    assert explained(error) is None
    assert not isinstance(error, LehrError)
