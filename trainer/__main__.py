"""`torchrun -m trainer RUN ...` and `python -m trainer RUN ...`: the settings of `lehr train`, plain lines instead of a bar."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from schemas.errors import LehrError
from schemas.storage import quiet_clients
from trainer.settings import TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Train on a ranked stream of a run directory, choosing again at every step; a second start resumes."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = TrainSettings(loggers=("console",))


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns 0, or 2 after printing an error that the message explains."""
    logging.basicConfig(
        level=os.environ.get("LEHR_LOG", "WARNING").upper(), format="%(levelname)s %(name)s: %(message)s"
    )
    quiet_clients()
    process = int(os.environ.get("RANK", "0"))
    try:
        command = tyro.cli(Command, args=argv, prog="python -m trainer")
        from schemas.run import Run
        from trainer.loop import train

        summary = train(Run.open(command.run_dir), command.settings)
    except LehrError as error:
        who = f"trainer, process {process} of {os.environ.get('WORLD_SIZE')}" if process else "trainer"
        sys.stderr.write(f"{who}: {error}\n")
        return 2
    if not process:
        sys.stdout.write(f"done: {summary['steps']} steps, held-out loss {summary['eval_loss']}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
