"""Following a stream: taking the next generation of a re-scored selection between two steps, once, and again after a stop.

Every look is on record before the step behind it is taken: a file `follow/step-*.json` of the training, which holds the history. A
resumed training does at every step that was looked at what the record says, and looks for itself from there on.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping

import orjson

from schemas.errors import CorruptFile, LehrError
from schemas.fingerprint import fingerprint, plain, pretty_json
from schemas.run import Run
from schemas.shards import StreamIndex, read_index
from schemas.storage import exists, join, list_names, read_bytes, remove, write_whole
from trainer.opening import Standing
from trainer.parallel import OneProcess

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switch:
    """From the step behind `step` on, candidates of a stream come from this generation."""

    step: int
    """Steps taken before; 0 where the training began."""
    stream: str
    generation: int
    fingerprint: str
    first: int
    """Position in the stream at which it was begun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What is known of a training's streams: every switch, and the last step that was looked behind."""

    looked: int
    switches: tuple[Switch, ...]

    def standing(self, step: int) -> dict[str, Standing]:
        """Generation and first position of every stream behind `step` steps."""
        past = [switch for switch in self.switches if switch.step <= step]
        return {s.stream: Standing(generation=s.generation, first=s.first) for s in past}

    def begun_with(self, stream: str) -> str:
        """Fingerprint of the generation that the training began with."""
        return next(switch.fingerprint for switch in self.switches if switch.stream == stream)


def newest_generation(run: Run, stream: str, current: int) -> int:
    """The newest finished generation of a stream of the run, `current` where none is newer. One listing, and no more where nothing is new."""
    pattern = re.compile(rf"{re.escape(stream)}\.gen-(\d+)\.json")
    names = list_names(run.path("stages/export"), ".json")
    newer = sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)) and int(found[1]) > current)
    for generation in reversed(newer):
        if exists(run.path(f"{run.stream_folder(stream, generation)}/index.json")):
            return generation
    return current


def read_record(run: Run, training: str) -> Record | None:
    """The record of a training, None where it has not begun to follow."""
    folder = _folder(run, training)
    names = list_names(folder, ".json")
    if not names:
        return None
    url = join(folder, names[-1])
    try:
        content = orjson.loads(read_bytes(url))
        stored = content.pop("fingerprint")
        if fingerprint(content) != stored:
            raise ValueError("it does not match its fingerprint")
        return Record(looked=int(content["looked"]), switches=tuple(Switch(**entry) for entry in content["switches"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(
            f"{url} is damaged ({error}): which generation each step was taken on is not known any more. Start again under another --name"
        ) from error


def write_record(run: Run, training: str, record: Record) -> None:
    """Write the record, whole, and delete the ones before it."""
    folder, content = _folder(run, training), plain(record)
    name = f"step-{record.looked:08d}.json"
    write_whole(join(folder, name), pretty_json({**content, "fingerprint": fingerprint(content)}))
    for old in list_names(folder, ".json"):
        if old < name:
            remove(join(folder, old))


def _folder(run: Run, training: str) -> str:
    return run.path(f"{run.training_folder(training)}/follow")


class Following:
    """The looks of one training. Process 0 looks and writes; every process keeps the record.

    `same_domains` asks of a new generation target samples of the domains that the old one has: each is a target of its own.
    """

    def __init__(
        self, run: Run, training: str, *, every: int, processes: OneProcess, same_domains: bool = False
    ) -> None:
        self._same_domains = same_domains
        self._run, self._training, self._every, self._processes = run, training, every, processes
        self.record: Record | None = processes.decide(lambda: read_record(run, training), kinds=(Record, Switch))

    def begin(self, indexes: Mapping[str, StreamIndex]) -> Record:
        """Put on record what the training begins with, unless it has begun already."""
        if self.record is None:
            self.record = Record(
                looked=0,
                switches=tuple(
                    Switch(step=0, stream=name, generation=index.generation, fingerprint=index.fingerprint, first=0)
                    for name, index in indexes.items()
                ),
            )
            record = self.record
            self._processes.decide(lambda: write_record(self._run, self._training, record))
        return self.record

    def look(
        self, step: int, indexes: Mapping[str, StreamIndex], places: Mapping[str, int], *, used_up: bool
    ) -> tuple[Switch, ...]:
        """The switches behind `step`: those on record, or what stands now where it is time to look: every so many steps, or when
        the stream is used up. `indexes` are of the streams that may be followed, `places` the cursors in them."""
        assert self.record is not None
        if step <= self.record.looked:
            return tuple(switch for switch in self.record.switches if switch.step == step)
        if step % self._every and not used_up:
            return ()
        found = self._processes.decide(lambda: self._look(step, indexes, places), kinds=(Switch,))
        self.record = Record(looked=step, switches=(*self.record.switches, *found))
        return found

    def _look(self, step: int, indexes: Mapping[str, StreamIndex], places: Mapping[str, int]) -> tuple[Switch, ...]:
        assert self.record is not None
        found = []
        for name, index in indexes.items():
            generation = newest_generation(self._run, name, index.generation)
            following = self._usable(name, index, generation) if generation > index.generation else None
            if following is not None:
                found.append(
                    Switch(
                        step=step,
                        stream=name,
                        generation=generation,
                        fingerprint=following.fingerprint,
                        first=places[name],
                    )
                )
        write_record(self._run, self._training, Record(looked=step, switches=(*self.record.switches, *found)))
        return tuple(found)

    def _usable(self, name: str, index: StreamIndex, generation: int) -> StreamIndex | None:
        """Index of a generation that can take the place of another; one that cannot is passed over with a warning."""
        try:
            following = read_index(self._run.path(self._run.stream_folder(name, generation)))
        except LehrError as error:
            reason = str(error)
        else:
            reason = ""
            for what in ("tokenizer", "encoding"):
                if getattr(following, what) != getattr(index, what):
                    reason = f"it was cut with another {what}"
            if not following.rows or (index.target and not following.target):
                reason = f"it holds no {'target' if following.rows else ''} samples".replace("  ", " ")
            if self._same_domains and _domains(following) != _domains(index):
                reason = f"its target samples are of the domains {', '.join(_domains(following))}"
            if not reason:
                return following
        log.warning(
            "generation %d of stream %s is passed over, training goes on with %d: %s",
            generation,
            name,
            index.generation,
            reason,
        )
        return None


def _domains(index: StreamIndex) -> list[str]:
    return sorted({domain for shard in index.target for domain in shard.domains})
