"""Live progress of a stage: what its workers say about themselves, never compared and never a proof that work is done."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable

import orjson

from schemas.errors import LehrError
from schemas.run import Run
from schemas.storage import join, list_names, read_bytes, write_whole

_INTERVAL_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The latest word of one worker process; times are Unix seconds, tokens are encoded tokens."""

    host: str
    pid: int
    started: float
    updated: float
    attempt: str = ""
    unit: str = ""
    units_done: int = 0
    tokens_done: int = 0
    last_error: str = ""


def read_heartbeats(run: Run, stage: str, name: str) -> list[Heartbeat]:
    """What every worker of a stage last said, by file name; unreadable files are passed over, being written again soon."""
    folder = run.path(run.timings_folder(stage, name))
    found = []
    for file in list_names(folder, ".json"):
        if not file.startswith("worker-"):
            continue
        try:
            found.append(Heartbeat(**orjson.loads(read_bytes(join(folder, file)))))
        except (OSError, ValueError, TypeError, LehrError):
            continue
    return found


class HeartbeatWriter:
    """Writes one worker's heartbeat at most every two seconds; a failure to write never stops the work."""

    def __init__(
        self, run: Run, stage: str, name: str, *, attempt: str = "", clock: Callable[[], float] = time.time
    ) -> None:
        self._clock = clock
        host, pid, now = socket.gethostname(), os.getpid(), clock()
        self._url = run.path(f"{run.timings_folder(stage, name)}/worker-{host}-{pid}.json")
        self._beat = Heartbeat(host=host, pid=pid, started=now, updated=now, attempt=attempt)
        self._written = 0.0

    def unit(self, unit_id: str) -> None:
        """Say which unit is worked on."""
        self._update(unit=unit_id)

    def tokens(self, count: int) -> None:
        """Add finished tokens."""
        self._update(tokens_done=self._beat.tokens_done + count)

    def unit_done(self) -> None:
        """Count a finished unit and write at once."""
        self._update(units_done=self._beat.units_done + 1, force=True)

    def error(self, message: str) -> None:
        """Keep the latest error and write at once."""
        self._update(last_error=message, force=True)

    def _update(self, *, force: bool = False, **changes: object) -> None:
        now = self._clock()
        self._beat = dataclasses.replace(self._beat, updated=now, **changes)  # type: ignore[arg-type]
        if force or now - self._written >= _INTERVAL_S:
            self._written = now
            try:
                write_whole(self._url, orjson.dumps(dataclasses.asdict(self._beat)))
            except (OSError, LehrError):
                return
