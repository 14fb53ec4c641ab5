"""Faults injected into real processes: how many of each kind ran, and what they did to the results.

Workers and commands are killed, batches refused their memory, disks filled, files cut and flipped, manifests halved, two
schedulers started on one run, corpus files changed, clocks turned back, an object store made to fail. After each the run has
to complete, or stop with an error that says what to do; the same commands then have to give the bytes of an undisturbed run.
The injectors are those of the tests (`tests/faults`).
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import environment, main, say
from tests.faults.disk import can_mount
from tests.faults.kinds import KINDS, run_many, schedule
from tests.faults.trial import COUNTS, Verdict, total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to run."""

    out: Path | None = None
    """JSON file for the result; without it, it is printed."""
    count: int = 50
    """Faults in all."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Kinds to inject."""
    lanes: int = 2
    """Faults at a time."""
    first: int = 0
    """Faults of the schedule to leave out at its start: with the count of an earlier run, this one has other seeds."""
    minutes: float = 0.0
    """Start no more faults after so long; 0 runs them all."""
    folder: Path | None = None
    """Where runs are made: best a file system in memory."""


def measure(settings: Settings) -> dict[str, Any]:
    """Run them and count."""
    began = time.monotonic()
    done = 0
    faults = schedule(settings.first + settings.count, settings.kinds)[settings.first :]

    def told(kind: str, seed: int, verdict: Verdict) -> None:
        nonlocal done
        done += 1
        if verdict.wrong:
            found = {name: getattr(verdict, name) for name in COUNTS if getattr(verdict, name)}
            say(f"{kind} seed {seed}: {found}\n" + "\n".join(f"    {note}" for note in verdict.notes))
        elif done % 20 == 0:
            say(f"{done} of {len(faults)}, {(time.monotonic() - began) / done:.2f} s each")

    def stopped() -> bool:
        return bool(settings.minutes) and time.monotonic() - began > 60 * settings.minutes

    with tempfile.TemporaryDirectory(dir=settings.folder, prefix="lehr-faults-") as folder:
        results = run_many(Path(folder), faults, lanes=settings.lanes, told=told, stopped=stopped)
    by_kind: dict[str, list[Verdict]] = collections.defaultdict(list)
    for kind, _, verdict in results:
        by_kind[kind].append(verdict)
    return {
        **environment(settings),
        "disk": "tmpfs, mounted and resized" if can_mount() else "RLIMIT_FSIZE (mounting is not permitted)",
        "asked": len(faults),
        "ran": len(results),
        "seconds": round(time.monotonic() - began, 1),
        "kinds": {
            kind: {
                "ran": len(found),
                **total(found),
                "seconds": round(statistics.mean(verdict.seconds for verdict in found), 2),
            }
            for kind, found in by_kind.items()
        },
        "all": {"ran": len(results), **total(verdict for _, _, verdict in results)},
        "wrong": [
            {"kind": kind, "seed": seed, "notes": verdict.notes} for kind, seed, verdict in results if verdict.wrong
        ],
    }


if __name__ == "__main__":
    main(Settings, measure, __doc__)
