"""Orders as pure functions: the permutation of an epoch, and which stream of a mix a position belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from schemas.errors import InputError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_UNIT_BITS = 32


def _mix(value_N: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of 64-bit numbers, equal on every machine and in every numpy."""
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value_N ^ (value_N >> np.uint64(31))


def _keys(seed: int, stretch: int, rows: int) -> np.ndarray:
    """A 64-bit key for each of 0..rows-1, of the stretch of that number under a seed."""
    with np.errstate(over="ignore"):
        start = _mix(np.array([seed & (2**64 - 1)], np.uint64))
        start = _mix(start + np.uint64(stretch) * _GOLDEN)
        return _mix(start + np.arange(1, rows + 1, dtype=np.uint64) * _GOLDEN)


def shuffled_ranks(seed: int, rows: int, epoch: int) -> np.ndarray:
    """Permutation of 0..rows-1: the order of one epoch, int64, a pure function of its arguments."""
    return np.argsort(_keys(seed, epoch, rows), kind="stable")


class SharePattern:
    """Which of several streams every position of a mix is filled from, in exact proportion: a function of shares and seed.

    The first stream fills position i where floor(i q + o) steps, q its share and o an offset drawn from the seed; the second likewise
    among the positions that are left, and so on. Whole numbers of 2^-32 throughout, so the same on every machine. Among any first n
    positions a stream has n times its share, give or take less than the number of streams (less than 1 where there are two). Raises
    `InputError` where shares are not positive or do not sum to 1.
    """

    def __init__(self, shares: Sequence[float], seed: int) -> None:
        if not shares or any(share <= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
            raise InputError(
                f"the shares of a mix must be positive and sum to 1, not {', '.join(f'{s:g}' for s in shares)}"
            )
        self._steps: list[tuple[int, int]] = []
        offsets = _keys(seed, 0, len(shares)) >> np.uint64(64 - _UNIT_BITS)
        for number in range(len(shares) - 1):
            part = shares[number] / sum(shares[number:])
            self._steps.append((min(round(part * 2**_UNIT_BITS), 2**_UNIT_BITS), int(offsets[number])))

    def counts(self, positions: int) -> list[int]:
        """Samples of every stream among the first `positions`; they sum to it."""
        counts = []
        for share, offset in self._steps:
            counts.append((positions * share + offset) >> _UNIT_BITS)
            positions -= counts[-1]
        return [*counts, positions]

    def place(self, position: int) -> tuple[int, int]:
        """(number of the stream, place in it) of the sample at a position."""
        before, behind = self.counts(position), self.counts(position + 1)
        number = next(number for number, (a, b) in enumerate(zip(before, behind)) if a != b)
        return number, before[number]

    def longest(self, lengths: Sequence[int]) -> int:
        """Positions that can be filled before one of the streams, of these lengths, has run out."""
        low, high = 0, sum(lengths)
        while low < high:
            middle = (low + high + 1) // 2
            fits = all(count <= length for count, length in zip(self.counts(middle), lengths))
            low, high = (middle, high) if fits else (low, middle - 1)
        return low
