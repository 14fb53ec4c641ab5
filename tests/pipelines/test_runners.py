"""What ends a job, and what is said of it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.engines.local import LOCK, WORKER_LOST
from pipelines.runners import explained
from schemas.errors import InputError, LehrError
from tests.killing import ROOT

_BUSY = """
from pipelines.runners import end_with_supervisor
end_with_supervisor()
print("busy", flush=True)
while True:
    pass
"""


def test_a_busy_worker_ends_with_its_supervisor(tmp_path: Path) -> None:
    """Beam's own worker would finish its bundle first."""
    lock = os.open(tmp_path / "lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    environment = {**os.environ, LOCK: str(tmp_path / "lock")}
    worker = subprocess.Popen([sys.executable, "-c", _BUSY], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None and worker.stdout.readline() == b"busy\n"
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(0.5)
        os.close(lock)  # what the kernel does for a process that died
        assert worker.wait(10) == WORKER_LOST
    finally:
        worker.kill()
        worker.communicate()


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
