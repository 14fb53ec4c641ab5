"""The streams that the settings of a training name: one, or a mix; which generation of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from schemas.errors import InputError
from schemas.run import Run
from trainer.mixing import MixedStream
from trainer.settings import TrainSettings
from trainer.stream import RankedStream, StreamReading, stream_url

Stream = RankedStream | MixedStream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A stream of a training: the name or URL that was given, what share of the samples comes from it, how often it is passed through."""

    name: str
    share: float
    epochs: int

    @property
    def in_run(self) -> bool:
        """Whether it is a stream of the run, which may have generations to come."""
        return "/" not in self.name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """The generation of a stream that is trained on, and the position it was begun at."""

    generation: int
    first: int = 0


def sources(settings: TrainSettings) -> list[Source]:
    """The streams, `stream` first. Raises `InputError` for a mix that cannot be read as one."""
    mixed = []
    for part in settings.mix:
        name, _, rest = part.rpartition("=")
        share, _, epochs = rest.partition(":")
        try:
            mixed.append(Source(name=name, share=float(share), epochs=int(epochs or settings.epochs)))
        except ValueError as error:
            raise InputError(f"mix {part!r} is not NAME=SHARE or NAME=SHARE:EPOCHS, such as general=0.3:5") from error
    left = 1 - sum(source.share for source in mixed)
    everything = [Source(name=settings.stream, share=left, epochs=settings.epochs), *mixed]
    names = [source.name for source in everything]
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"every stream of a mix needs a name of its own, not {', '.join(map(repr, names))}")
    if any(source.share <= 0 or source.epochs < 1 for source in everything):
        raise InputError(
            f"the shares of mix must be positive and leave something to stream {settings.stream}, and epochs be at least 1, not "
            f"{' '.join(settings.mix)}"
        )
    return everything


def stream_reading(settings: TrainSettings) -> StreamReading:
    """How the settings say that streams are read."""
    names = [field.name for field in dataclasses.fields(StreamReading) if field.name != "sleep"]
    return StreamReading(**{name: getattr(settings, name) for name in names})


def open_source(run: Run, settings: TrainSettings, source: Source, standing: Standing) -> RankedStream:
    """One stream at one generation; 0 takes the newest. Raises `InputError` listing what there is where it is not there."""
    finished: dict[str, list[int]] = {}
    if source.in_run:
        for manifest in run.manifests("export"):
            finished.setdefault(manifest.spec["stream"], []).append(int(manifest.spec["generation"]))
    url = stream_url(
        run.url, source.name, standing.generation, {name: sorted(found) for name, found in finished.items()}
    )
    return RankedStream(
        url,
        order=settings.order,
        seed=settings.seed,
        epochs=source.epochs,
        first=standing.first,
        prefetch=0 if settings.mix else settings.prefetch,
        reading=stream_reading(settings),
    )


def open_stream(run: Run, settings: TrainSettings, standing: Mapping[str, Standing] | None = None) -> Stream:
    """What the settings name: a stream, or the mix of several. `standing` says by name which generations, where it is known."""
    named, opened = sources(settings), {}
    for source in named:
        generation = settings.generation if source.name == settings.stream else 0
        place = (standing or {}).get(source.name) or Standing(generation=generation)
        opened[source.name] = (open_source(run, settings, source, place), source.share)
    if not settings.mix:
        return opened[settings.stream][0]
    return MixedStream(opened, seed=settings.seed, prefetch=settings.prefetch)


def parts_of(stream: Stream) -> dict[str, RankedStream]:
    """The streams of a mix by name; a stream alone is its only part."""
    return stream.streams if isinstance(stream, MixedStream) else {stream.name: stream}
