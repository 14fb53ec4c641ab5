"""Live progress of a stage: what its workers say about themselves, never compared and never a proof that work is done."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterable

import orjson

from schemas.errors import LehrError
from schemas.run import Run
from schemas.storage import join, list_names, read_bytes, write_whole

_INTERVAL_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The latest word of one worker process; times are Unix seconds of its host, tokens are encoded tokens."""

    host: str
    pid: int
    started: float
    updated: float
    attempt: str = ""
    unit: str = ""
    units_done: int = 0
    tokens_done: int = 0
    last_error: str = ""
    busy_s: float = 0.0
    """Seconds from its first finished batch to this word by a clock that nobody sets: without what loading a model takes."""
    busy_tokens: int = 0
    """Tokens finished in them."""
    planned_done: int = 0
    """Tokens that the plan estimated for the units that this worker computed."""
    encoded_done: int = 0
    """Tokens that those units came to have."""

    @property
    def tokens_per_second(self) -> float | None:
        """Its speed; None before its second batch."""
        if self.busy_tokens and self.busy_s:
            return self.busy_tokens / self.busy_s
        return None


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


def estimate_ratio(beats: Iterable[Heartbeat]) -> float:
    """Encoded tokens for each that the plan estimated, over the units that were computed; 1 before the first."""
    known = [beat for beat in beats if beat.planned_done and beat.encoded_done]
    return sum(beat.encoded_done for beat in known) / sum(beat.planned_done for beat in known) if known else 1.0


class HeartbeatWriter:
    """Writes one worker's heartbeat at most every two seconds; a failure to write never stops the work."""

    def __init__(
        self,
        run: Run,
        stage: str,
        name: str,
        *,
        attempt: str = "",
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._steady = clock, steady
        self._first: tuple[float, int] | None = None
        host, pid, now = socket.gethostname(), os.getpid(), clock()
        self._url = run.path(f"{run.timings_folder(stage, name)}/worker-{host}-{pid}.json")
        self._beat = Heartbeat(host=host, pid=pid, started=now, updated=now, attempt=attempt)
        self._written: float | None = None

    def unit(self, unit_id: str) -> None:
        """Say which unit is worked on."""
        self._update(unit=unit_id)

    def tokens(self, count: int) -> None:
        """Add finished tokens."""
        done = self._beat.tokens_done + count
        if self._first is None:
            self._first = self._steady(), done
        since, before = self._first
        self._update(tokens_done=done, busy_s=round(self._steady() - since, 3), busy_tokens=done - before)

    def unit_done(self, *, planned_tokens: int = 0) -> None:
        """Count a finished unit and write at once; `planned_tokens` is the plan's estimate of one that was computed, not kept."""
        beat = self._beat
        compared = {"planned_done": beat.planned_done + planned_tokens, "encoded_done": beat.tokens_done}
        self._update(units_done=beat.units_done + 1, force=True, **(compared if planned_tokens else {}))

    def error(self, message: str) -> None:
        """Keep the latest error and write at once."""
        self._update(last_error=message, force=True)

    def _update(self, *, force: bool = False, **changes: object) -> None:
        now = self._steady()
        self._beat = dataclasses.replace(self._beat, updated=self._clock(), **changes)  # type: ignore[arg-type]
        if force or self._written is None or now - self._written >= _INTERVAL_S:
            self._written = now
            try:
                write_whole(self._url, orjson.dumps(dataclasses.asdict(self._beat)))
            except (OSError, LehrError):
                return
