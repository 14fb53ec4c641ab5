"""SIGKILL from outside, at a moment drawn from how long the work takes when nobody disturbs it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[1]
Place = TypeVar("Place")


def start_module(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """`python -m ARGUMENTS` in another process and session, on one thread, its output in the file `log`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a process that has to end well; its output is the message where it does not."""
    assert process.wait(timeout=300) == 0, log.read_text(errors="replace")[-4000:]


def kill_unfinished(
    prepare: Callable[[int], Place],
    start: Callable[[Place], subprocess.Popen[bytes]],
    wait: Callable[[subprocess.Popen[bytes], Place, int], None],
    finished: Callable[[Place], bool],
    *,
    attempts: int = 30,
) -> tuple[Place, subprocess.Popen[bytes]]:
    """Prepare, start, wait, kill, as often as it takes until the work was unfinished when it was killed; returns its place and process.

    An attempt that finished first is repeated, never counted. One that ended by itself, unfinished, fails the test.
    """
    for number in range(attempts):
        place = prepare(number)
        process = start(place)
        wait(process, place, number)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if finished(place):
            continue
        assert code == -signal.SIGKILL, f"it ended by itself with status {code}, unfinished"
        return place, process
    raise AssertionError(f"each of {attempts} attempts finished before it was killed")


def session(leader: subprocess.Popen[bytes]) -> dict[int, str]:
    """Command lines of the living processes that `leader` started, directly or not, by process id; also after its end."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != leader.pid:
            with contextlib.suppress(OSError):
                # pid (name) state parent group session ...
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader.pid and fields[0] != "Z":
                    found[int(folder.name)] = (
                        (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    )
    return found


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition; fails with `what` where it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
