"""`lehr train`: train on a ranked stream, choosing again at every step."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import tyro

from lehr.options import RunDir
from trainer.settings import TrainSettings

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from trainer.loop import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Train on a ranked stream, choosing again at every step against the optimizer's live state.

    After a stop the same command resumes from the newest checkpoint, with the same decisions and the same losses.
    """

    run_dir: RunDir
    """Run directory, with a stream that `lehr export` wrote."""
    settings: tyro.conf.OmitArgPrefixes[TrainSettings] = TrainSettings()

    def run(self) -> int:
        """Train, print what came of it, return the exit status."""
        from lehr.console import console, new_attempt, pairs
        from schemas.run import Run
        from trainer.loop import train

        run = Run.open(self.run_dir)
        with _bar() as bar:
            summary = train(run, self.settings, _Meter(bar).show, attempt=new_attempt())
        console.print(
            pairs(
                "",
                [
                    ("steps", summary["steps"]),
                    ("ended by", summary["ended"]),
                    ("trained tokens", summary["trained_tokens"]),
                    ("offered tokens", summary["offered_tokens"]),
                    ("held-out loss", _change(summary["initial_eval_loss"], summary["eval_loss"])),
                    ("fallbacks", summary["fallbacks"]),
                    ("model", run.path(summary["checkpoint"])),
                ],
            )
        )
        console.print(f"Next: lehr report {self.run_dir}")
        return 0


def _change(before: float | None, after: float | None) -> str:
    if after is None:
        return "none: it was not asked for, or the stream holds no evaluation samples"
    return f"{after:.4f} nats per token" + ("" if before is None else f" ({before:.4f} before training)")


def _bar() -> Bar:
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from lehr.console import errors

    columns = (SpinnerColumn(), TextColumn("train"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=errors)


class _Meter:
    """Turns the trainer's events into one line of figures beside the bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: Any = bar.add_task("starting", total=1.0)
        self._seconds = 0.0
        self._first: tuple[float, int] | None = None
        self._held_out = ""

    def show(self, event: Progress) -> None:
        """Move the bar; rates count what this process did, not what an earlier one did before a stop."""
        from lehr.console import duration

        if self._first is None:
            self._first = (event.share, event.trained_tokens)
            self._seconds = 0.0
        self._seconds += event.step_seconds
        if event.eval_loss is not None:
            self._held_out = f", held-out {event.eval_loss:.4f}"
        text = f"step {event.step}, loss {event.loss:.4f}{self._held_out}, kept {event.kept_share:.0%}"
        done, tokens = event.share - self._first[0], event.trained_tokens - self._first[1]
        if done > 0:
            pace = self._seconds - event.step_seconds or self._seconds
            left = (1 - event.share) / done * pace
            text += f", {tokens / pace:,.0f} tokens/s, {duration(left)} left"
        self._bar.update(self._task, completed=event.share, description=text)
