"""Several streams as one, by shares: a replay of general data beside what was selected."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from schemas.errors import InputError
from schemas.shards import StreamIndex
from trainer.order import SharePattern
from trainer.positioned import Offered, Positioned
from trainer.stream import RankedStream, refuse_other


class MixedStream(Positioned):
    """Samples of several streams, each with its own order and epochs, in the proportion of their shares.

    Which stream a position is filled from is a function of shares and seed (`SharePattern`): the same stream always gets the same of its
    samples at the same positions, whatever the processes. The mix ends where the first stream has no sample for its next
    position. Options of dealing and reading ahead are the mix's; those of its streams are not used.
    """

    def __init__(
        self,
        streams: Mapping[str, tuple[RankedStream, float]],
        *,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        worker_block: int = 1,
        prefetch: int = 0,
    ) -> None:
        """`streams` holds stream and share by name; the shares sum to 1."""
        super().__init__(process=process, processes=processes, worker_block=worker_block, prefetch=prefetch)
        self.streams = {name: stream for name, (stream, _) in streams.items()}
        self.shares = {name: float(share) for name, (_, share) in streams.items()}
        self.seed = seed
        self._pattern = SharePattern(list(self.shares.values()), seed)
        self._refuse_strangers()

    @property
    def index(self) -> StreamIndex:
        """Index of the first stream: target and evaluation samples of a mix are its."""
        return next(iter(self.streams.values())).index

    @property
    def url(self) -> str:
        """Folder of the first stream."""
        return next(iter(self.streams.values())).url

    @property
    def end(self) -> int:
        """One past the last position."""
        return self._pattern.longest([stream.end for stream in self.streams.values()])

    def at(self, positions: Sequence[int]) -> list[Offered]:
        """The samples at positions of the mix; the cursor stays where it is."""
        names = list(self.streams)
        wanted: dict[str, dict[int, int]] = {name: {} for name in names}
        for position in positions:
            number, place = self._pattern.place(position)
            wanted[names[number]][place] = position
        found: dict[int, Offered] = {}
        for name, places in wanted.items():
            for item in self.streams[name].at(list(places)) if places else ():
                position = places[item.position]
                found[position] = dataclasses.replace(item, position=position, stream=name)
        return [found[position] for position in positions]

    def start_epoch(self, epoch: int) -> None:
        """Put the cursor on the first position, of pass number `epoch` over the whole: with every pass another order."""
        for stream in self.streams.values():
            stream.start_epoch(epoch)
        self._restore_cursor(0, {})

    def replace(self, name: str, stream: RankedStream) -> None:
        """Put another generation in the place of a stream; its `first` is where the one before was left."""
        self.close()
        self.streams[name] = stream
        self._refuse_strangers()

    def places(self) -> dict[str, int]:
        """Where the cursor stands in every stream."""
        return dict(zip(self.streams, self._pattern.counts(self.position)))

    def state_dict(self) -> dict[str, Any]:
        """The cursor, a number for every stream, and what it is a cursor of."""
        streams = {
            name: {**self.streams[name].state_dict(), "position": place, **self._part(name)}
            for name, place in self.places().items()
        }
        return {"streams": streams, "seed": self.seed, **self._cursor()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises `InputError` naming what differs where it is of another mix."""
        parts: dict[str, Any] = state.get("streams", {})
        if set(parts) != set(self.streams):
            there = ", ".join(parts) or "one stream"
            raise InputError(
                f"the cursor was taken of {there}, this mix is of {', '.join(self.streams)}; it cannot be continued"
            )
        refuse_other({"seed": self.seed}, state, "this mix")
        for name, stream in self.streams.items():
            refuse_other({**self._part(name), **stream.identity()}, parts[name], f"stream {name} of this mix")
        places = [int(parts[name]["position"]) for name in self.streams]
        if self._pattern.counts(sum(places)) != places:
            raise InputError(
                f"no position of this mix has {places} samples of its streams behind it; the cursor was edited"
            )
        for name, stream in self.streams.items():
            stream.load_state_dict(parts[name])
        self._restore_cursor(sum(places), state)

    def _part(self, name: str) -> dict[str, Any]:
        """What the pattern of the mix knows of a stream."""
        return {"share": self.shares[name], "number": list(self.streams).index(name)}

    def _refuse_strangers(self) -> None:
        first = self.index
        for name, stream in self.streams.items():
            for what in ("tokenizer", "encoding"):
                if getattr(stream.index, what) != getattr(first, what):
                    raise InputError(
                        f"stream {name} of the mix was cut with another {what} than {next(iter(self.streams))}; export it again "
                        "from the same scoring"
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None, "_closing": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._renew()
