"""How many candidates a step is offered and how many it keeps, over the training: drop, hold, ramp.

Written as points `share:candidates/n_keep`, each in force from that share of the training on. With a number of steps T, step t (from 1) is at
share (t - 1)/T, so that what it is offered is a function of t alone: the positions after those of the steps before. With a token
budget the share is that of the tokens trained on, which a checkpoint holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import pairwise

from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchPoint:
    """Sizes from a share of the training on."""

    start: float
    candidates: int
    n_keep: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """Points in ascending order, the first at 0."""

    points: tuple[BatchPoint, ...]

    @classmethod
    def parse(cls, text: str, *, candidates: int, n_keep: int) -> BatchSchedule:
        """The schedule that `text` says, such as `0:16/8,0.5:32/16`; `candidates` and `n_keep` are what holds where it says nothing.

        Raises `InputError` for a point that is none, or out of order.
        """
        points = [BatchPoint(start=0.0, candidates=candidates, n_keep=n_keep)]
        for written in filter(None, (part.strip() for part in text.split(","))):
            start, _, sizes = written.partition(":")
            offered, _, kept = sizes.partition("/")
            try:
                point = BatchPoint(start=float(start), candidates=int(offered), n_keep=int(kept) if kept else n_keep)
            except ValueError:
                raise InputError(
                    f"batch_schedule {text!r}: {written!r} is no point; write share:candidates/n_keep, such as 0.5:32/16"
                ) from None
            if not 0 <= point.start < 1 or point.candidates < 1 or point.n_keep < 1:
                raise InputError(
                    f"batch_schedule {text!r}: in {written!r} the share must lie in [0, 1) and sizes be at least 1"
                )
            if point.start == 0 and len(points) == 1:
                points = []
            if points and point.start <= points[-1].start:
                raise InputError(f"batch_schedule {text!r}: {written!r} does not come after the point before it")
            points.append(point)
        return cls(points=tuple(points))

    def at(self, progress: float) -> BatchPoint:
        """Sizes at a share of the training."""
        return next(point for point in reversed(self.points) if point.start <= max(progress, 0.0))

    @property
    def largest(self) -> int:
        """Most candidates of a step."""
        return max(point.candidates for point in self.points)

    def steps(self, samples: int, asked: int = 0) -> int:
        """Steps that `samples` allow, the last with what is left; at most `asked`, unless that is 0."""
        # The mean size gives the number but for the rounding of where points fall, a step each.
        ends = [*(point.start for point in self.points[1:]), 1.0]
        mean = sum((end - point.start) * point.candidates for point, end in zip(self.points, ends))
        most = math.ceil((samples + (len(self.points) + 1) * self.largest) / mean) + 1
        total = min(asked, most) if asked else most
        while total > 1 and self._offered(total, total - 1) >= samples:
            total -= 1
        return total

    def _offered(self, total: int, steps: int) -> int:
        """Candidates of the first `steps` of `total` steps."""
        return sum(count * point.candidates for point, count in self._counts(total, steps))

    def _counts(self, total: int, steps: int) -> Iterator[tuple[BatchPoint, int]]:
        firsts = [min(_first(point.start, total), steps) for point in self.points]
        for point, (first, end) in zip(self.points, pairwise([*firsts, steps])):
            yield point, end - first


def _first(start: float, total: int) -> int:
    """Steps of `total` that lie before share `start`: those s with s/total < start, in the arithmetic that `at` is asked in."""
    step = math.ceil(start * total)
    while step and (step - 1) / total >= start:
        step -= 1
    while step / total < start:
        step += 1
    return step
