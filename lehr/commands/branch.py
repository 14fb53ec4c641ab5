"""`lehr branch`: from one checkpoint, a training for each of several streams."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from lehr.options import RunDir
from trainer.settings import TrainSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Train from one checkpoint on each of several streams, one after the other, with the same settings.

    Each is the training that `lehr train --stream STREAM --from CHECKPOINT` makes; after a stop the same command goes on.
    """

    run_dir: RunDir
    """Run directory, with the streams and the training to branch off."""
    streams: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="STREAM")]
    """Streams of the run, or paths or URLs of folders that hold an index.json."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = TrainSettings(loggers=("console",))

    def run(self) -> int:
        """Train, print a row per stream, return the exit status."""
        from rich.table import Table

        from lehr.console import console, new_attempt
        from schemas.errors import InputError
        from schemas.run import Run
        from trainer.loggers.console import Bar
        from trainer.loop import train

        if not self.streams or not self.settings.start_from:
            raise InputError("name the streams to train on, and the training to branch off with --from")
        if self.settings.name:
            raise InputError("leave --name out: every branch is named for its stream and its parent")
        run = Run.open(self.run_dir)
        table = Table("stream", "training", "steps", "trained tokens", "held-out loss")
        for stream in self.streams:
            summary = train(run, dataclasses.replace(self.settings, stream=stream), attempt=new_attempt(), console=Bar)
            loss = "none" if summary["eval_loss"] is None else f"{summary['eval_loss']:.4f}"
            name = summary["checkpoint"].split("/")[1]
            table.add_row(stream, name, str(summary["steps"]), str(summary["trained_tokens"]), loss)
        console.print(table)
        return 0
