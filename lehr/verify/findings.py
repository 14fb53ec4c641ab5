"""What a check looked at and what it found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from schemas.errors import LehrError


@dataclasses.dataclass(kw_only=True)
class Check:
    """One promise of the run, how many things were held against it, and every one that broke it."""

    subject: str
    """What was looked at, for example `features of main`."""
    promise: str
    """What should be true of it."""
    count: int = 0
    """Things looked at: files, rows, samples."""
    unit: str = "files"
    """What `count` counts."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """A sentence for each thing that is wrong; names the file."""

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems

    def fail(self, problem: str) -> None:
        """Note something that is wrong, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn an error about one file into a problem, so that the other files are still looked at."""
        try:
            yield
        except LehrError as error:
            self.fail(str(error))
