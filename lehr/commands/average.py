"""`lehr average`: average the final weights of several trainings."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from lehr.options import RunDir
from trainer.settings import SoupSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Average the final weights of trainings of one model, over data orders or seeds, into one model folder, and say its held-out loss."""

    run_dir: RunDir
    """Run directory that holds the trainings."""
    trainings: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="TRAINING")]
    """Finished trainings of whole models; all count alike."""
    settings: tyro.conf.OmitArgPrefixes[SoupSettings] = SoupSettings()

    def run(self) -> int:
        """Average, print the losses, return the exit status."""
        from lehr.console import console, pairs
        from schemas.run import Run
        from trainer.soup import average_trainings

        found = average_trainings(Run.open(self.run_dir), self.trainings, self.settings)
        losses = [*found.members.items(), ("average", found.loss)]
        said = [(name, "none" if loss is None else f"{loss:.4f}") for name, loss in losses]
        console.print(pairs("held-out loss, nats per token", [*said, ("model", found.url)]))
        return 0
