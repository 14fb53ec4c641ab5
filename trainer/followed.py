"""A training's streams while it follows them: what was looked at and decided in `follow`, done to what is trained on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from schemas.errors import InputError
from schemas.run import Run
from schemas.shards import StreamIndex
from trainer.follow import Following, Record, Switch
from trainer.mixing import MixedStream
from trainer.opening import Standing, Stream, open_source, open_stream, parts_of, sources
from trainer.parallel import OneProcess
from trainer.prepare import Prepared, encode
from trainer.settings import TrainSettings
from trainer.stream import read_beside

log = logging.getLogger(__name__)


def stream_fingerprints(stream: Stream) -> dict[str, str]:
    """Fingerprints of what is trained on, as inputs of a stage: `stream`, and `stream.<name>` for what is mixed in."""
    named = {name: part.index.fingerprint for name, part in parts_of(stream).items()}
    first = next(iter(named))
    return {"stream" if name == first else f"stream.{name}": value for name, value in named.items()}


class Followed:
    """Streams of a run that are followed, in the place of those that the training was prepared with."""

    def __init__(self, run: Run, settings: TrainSettings, ready: Prepared, processes: OneProcess) -> None:
        self._run, self._settings, self._ready = run, settings, ready
        self._sources = {source.name: source for source in sources(settings)}
        self._following = Following(
            run,
            ready.name,
            every=settings.follow_every,
            same_domains=settings.targets != "together",
            processes=processes,
        )

    def restore(self, step: int) -> None:
        """Stand where the training stood behind `step` steps. Raises `InputError` where that generation is gone."""
        record = self._following.begin({name: part.index for name, part in parts_of(self._ready.stream).items()})
        standing = record.standing(step)
        open_now = {
            name: Standing(generation=part.index.generation, first=part.first)
            for name, part in parts_of(self._ready.stream).items()
        }
        if standing != open_now:
            self._ready.stream.close()
            try:
                self._ready.stream = open_stream(self._run, self._settings, standing)
            except InputError as error:
                raise InputError(
                    f"the newest checkpoint, after {step} steps, stands on a generation that is gone: {error}. Bring it back, or start "
                    "again under another --name"
                ) from error
            self._read_beside()
        _refuse_changed(record, step, self._ready.stream)

    def look(self, step: int) -> tuple[Switch, ...]:
        """What is to be taken behind `step`."""
        stream = self._ready.stream
        places = stream.places() if isinstance(stream, MixedStream) else {stream.name: stream.position}
        indexes = {name: part.index for name, part in parts_of(stream).items() if self._sources[name].in_run}
        return self._following.look(step, indexes, places, used_up=stream.exhausted)

    def take(self, switches: Sequence[Switch]) -> None:
        """Put the new generations in the place of the old ones, with the target and held-out samples that stand beside them."""
        for switch in switches:
            log.info("stream %s: generation %d from step %d on", switch.stream, switch.generation, switch.step + 1)
            source = self._sources[switch.stream]
            place = Standing(generation=switch.generation, first=switch.first)
            part = open_source(self._run, self._settings, source, place)
            stream, before = self._ready.stream, self._ready.stream.index
            if isinstance(stream, MixedStream):
                stream.replace(switch.stream, part)
            else:
                stream.close()
                self._ready.stream = part
            if switch.stream == self._settings.stream:
                self._read_beside(before)

    def history(self) -> list[dict[str, Any]]:
        """Every generation that was trained on, and from which step."""
        record = self._following.record
        return [dataclasses.asdict(switch) for switch in record.switches] if record else []

    def _read_beside(self, before: StreamIndex | None = None) -> None:
        ready = self._ready
        index = ready.stream.index
        if before is not None and [s.sha256 for s in before.evaluation] != [s.sha256 for s in index.evaluation]:
            log.warning(
                "the held-out samples of generation %d are others: losses before and after it do not compare",
                index.generation,
            )
        target, evaluation = (read_beside(ready.stream.url, index, part) for part in ("target", "evaluation"))
        ready.target = [(item.sample.domain, encode(ready.encoder, item)) for item in target]
        ready.evaluation = [encode(ready.encoder, item) for item in evaluation]


def _refuse_changed(record: Record, step: int, stream: Stream) -> None:
    """Raise `InputError` where a generation is not the one that was trained on under its number."""
    latest = {switch.stream: switch for switch in record.switches if switch.step <= step}
    for name, part in parts_of(stream).items():
        if latest[name].fingerprint != part.index.fingerprint:
            raise InputError(
                f"generation {part.index.generation} of stream {name} is not the one that step {latest[name].step + 1} was taken on "
                f"({latest[name].fingerprint}): it was exported anew. Start again under another --name"
            )
