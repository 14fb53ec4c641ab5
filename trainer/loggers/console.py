"""What a training prints: what was decided and why, then its figures, as a bar that moves or as a line a step."""

from __future__ import annotations

import functools
import sys
from typing import Any

from trainer.loggers.base import Begun, LoggerType, Progress, logger


def duration(seconds: float) -> str:
    """Seconds as people say them: 45 s, 12 min, 3.4 h, 2.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


class Figures:
    """Turns steps into a line of figures. Rates count what this process did, not what an earlier one did before a stop."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._pace = 0.0
        self._held_out = ""

    def line(self, event: Progress) -> str:
        """The figures after a step."""
        row, timing = event.row, event.timing
        whole = float(timing["seconds"])
        if event.eval_loss is not None:
            self._held_out = f", held-out {event.eval_loss:.4f}"
        text = (
            f"step {event.step} ({event.share:.0%}): loss {event.loss:.4f}{self._held_out}, lr {row['learning_rate']:.2e}, "
            f"kept {event.kept_share:.0%}, {row['total_trained_tokens']:,} tokens, {whole:.2f} s"
        )
        if whole > 0:
            text += f" ({timing['selection_seconds'] / whole:.0%} selecting)"
        if event.seconds > 0:
            text += f", {row['trained_tokens'] / event.seconds:,.0f} tokens/s"
        if timing["mfu"] is not None:
            text += f", MFU {timing['mfu']:.0%}"
        text += f", peak {timing['peak_memory'] / 1e9:.2f} GB"
        if self._first is None:
            self._first = event.share  # the first step holds what a start costs: it gives no pace
        elif event.share > self._first:
            self._pace += whole
            text += f", {duration((1 - event.share) / (event.share - self._first) * self._pace)} left"
        return text


def decided(begun: Begun) -> list[str]:
    """A line for each thing that was decided for the training, and why."""
    lines = [f"{what}: {why}" for what, why in begun.choices.items()]
    if begun.steps_done:
        lines.append(f"goes on after step {begun.steps_done}")
    return lines


@logger("console")
class Lines:
    """A line a step on standard output."""

    def __init__(self, begun: Begun) -> None:
        self._figures = Figures()
        for line in decided(begun):
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def step(self, event: Progress) -> None:
        """Print a line."""
        sys.stdout.write(self._figures.line(event) + "\n")
        sys.stdout.flush()

    def close(self) -> None:
        """Nothing is held back."""


class Bar:
    """A bar with the figures beside it, on standard error."""

    def __init__(self, begun: Begun) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(stderr=True, markup=False, emoji=False)
        for line in decided(begun):
            console.print(line, style="dim", soft_wrap=True)
        columns = (SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
        self._figures = Figures()
        self._bar: Any = Progress(*columns, console=console)
        self._task = self._bar.add_task("starting", total=1.0)
        self._bar.start()

    def step(self, event: Progress) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=event.share, description=self._figures.line(event))

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()


class Overview:
    """Bars over many trainings, on standard error: how many have finished, and the figures of the one that runs."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar: Any = Progress(*columns, console=Console(stderr=True, markup=False, emoji=False))
        self._whole = self._bar.add_task("trainings", total=None)
        self._one: Any = None

    def __enter__(self) -> Overview:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def trainings(self, done: int, total: int) -> None:
        """So many trainings have finished."""
        self._bar.update(self._whole, completed=done, total=total, description=f"{done} of {total} trainings")

    def logger(self, label: str) -> LoggerType:
        """A logger that shows a training in the second bar."""
        return functools.partial(_Labelled, self, label)

    def show(self, text: str, share: float) -> None:
        """Move the second bar."""
        if self._one is None:
            self._one = self._bar.add_task("", total=1.0)
        self._bar.update(self._one, completed=share, description=text)


class _Labelled:
    """One of many trainings."""

    def __init__(self, overview: Overview, label: str, begun: Begun) -> None:
        self._overview, self._label, self._figures = overview, label, Figures()
        overview.show(f"{label}: starting", 0.0)

    def step(self, event: Progress) -> None:
        """Show its figures."""
        self._overview.show(f"{self._label}: {self._figures.line(event)}", event.share)

    def close(self) -> None:
        """The next one takes the bar over."""
