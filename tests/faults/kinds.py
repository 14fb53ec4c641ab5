"""Every kind of fault by name, and running one or many of them."""

from __future__ import annotations

import contextlib
import queue
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.faults.corpus import corpus_changed
from tests.faults.damage import manifest_half_written, shard_bit_flipped, shard_truncated
from tests.faults.disk import disk_full
from tests.faults.kills import kill_command, kill_export, kill_select, kill_worker
from tests.faults.memory import out_of_memory
from tests.faults.others import clock_backwards, two_schedulers
from tests.faults.store import prepare, store_errors
from tests.faults.trial import Lane, Trial, Verdict
from tests.faults.world import World, make_world
from tests.faults.zygote import Zygote
from tests.gcs import serve

KINDS: dict[str, tuple[Callable[[Trial], None], int]] = {
    "kill_command": (kill_command, 4),
    "kill_worker": (kill_worker, 2),
    "kill_select": (kill_select, 3),
    "kill_export": (kill_export, 3),
    "out_of_memory": (out_of_memory, 2),
    "disk_full": (disk_full, 3),
    "shard_truncated": (shard_truncated, 3),
    "shard_bit_flipped": (shard_bit_flipped, 4),
    "manifest_half_written": (manifest_half_written, 3),
    "two_schedulers": (two_schedulers, 2),
    "corpus_changed": (corpus_changed, 3),
    "clock_backwards": (clock_backwards, 3),
    "store_errors": (store_errors, 3),
}
"""Injector, and how many of it there are among each 38 faults."""


def schedule(count: int, kinds: Sequence[str] = tuple(KINDS)) -> list[tuple[str, int]]:
    """`count` faults as (kind, seed): every kind in its share, interleaved, so that a run that is stopped has some of all."""
    shares = {kind: KINDS[kind][1] for kind in kinds}
    turns = sorted((place / share, kind) for kind, share in shares.items() for place in range(share))
    seeds = dict.fromkeys(kinds, 0)
    found = []
    for number in range(count):
        kind = turns[number % len(turns)][1]
        found.append((kind, seeds[kind]))
        seeds[kind] += 1
    return found


@contextlib.contextmanager
def lane(world: World, folder: Path, *, zygote: Zygote | None = None) -> Iterator[Lane]:
    """A place for faults: a process to fork from and a store of its own."""
    own = zygote or Zygote(folder / "logs")
    with serve() as gcs:
        prepare(gcs, world, folder / "store")
        try:
            yield Lane(world, own, folder, {"gcs": gcs})
        finally:
            own.close()


def run_fault(lane: Lane, kind: str, seed: int) -> Verdict:
    """Inject one fault and judge it. An error of the injector itself counts as unfinished."""
    trial, began = Trial(lane, kind, seed), time.monotonic()
    try:
        KINDS[kind][0](trial)
    except Exception:
        trial.verdict.unfinished += 1
        trial.note(f"the injector failed: {traceback.format_exc()}")
    finally:
        trial.again()
    trial.verdict.seconds = time.monotonic() - began
    return trial.verdict


def run_many(
    folder: Path,
    faults: Sequence[tuple[str, int]],
    *,
    lanes: int = 1,
    told: Callable[[str, int, Verdict], None] = lambda kind, seed, verdict: None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[tuple[str, int, Verdict]]:
    """Inject faults below an empty folder, several at a time; in the order of `faults`."""
    first = Zygote(folder / "lane-0" / "logs")
    world = make_world(folder / "world", first)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(faults)):
        waiting.put(number)
    found: dict[int, Verdict] = {}
    lock = threading.Lock()

    def work(number: int) -> None:
        with lane(world, folder / f"lane-{number}", zygote=first if number == 0 else None) as place:
            while not stopped():
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                verdict = run_fault(place, *faults[index])
                with lock:
                    found[index] = verdict
                    told(*faults[index], verdict)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    shutil.rmtree(folder / "world", ignore_errors=True)
    return [(*faults[index], found[index]) for index in sorted(found)]
