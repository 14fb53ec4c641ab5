"""What every verb prints with: one console, live progress from heartbeats, small tables."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from schemas.run import Run
from schemas.storage import is_local
from schemas.timings import estimate_ratio, read_heartbeats
from trainer.loggers.console import duration

# Nothing that is printed is markup: paths and names may hold brackets and colons.
console = Console(markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)


def new_attempt() -> str:
    """A name for one run of a command, so that progress counts only what this one did."""
    return uuid.uuid4().hex[:12]


class _Done(ProgressColumn):
    """Tokens done, and how many there are as soon as that is known."""

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f" / {task.total:,.0f}"
        return Text(f"{task.completed:,.0f}{total} tokens")


class _Rate(ProgressColumn):
    """Tokens per second and time left, over the whole run so far."""

    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        if elapsed < 1 or not task.completed:
            return Text("starting", style="dim")
        rate = task.completed / elapsed
        left = max(0.0, (task.total or 0) - task.completed) / rate
        return Text(f"{rate:,.0f} tokens/s, {duration(left)} left")


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class StageProgress:
    """A bar over tokens, fed by the heartbeats of a stage's workers, whichever runner they live on."""

    def __init__(self, run: Run, stage: str, name: str, attempt: str) -> None:
        self._run, self._stage, self._name, self._attempt = run, stage, name, attempt
        self._every = 1.0 if is_local(run.url) else 5.0
        self._next = 0.0
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            _Done(),
            _Rate(),
            TimeElapsedColumn(),
            console=errors,
            transient=False,
        )
        self._total = 0
        self._task = self._progress.add_task(stage, total=None)

    def start(self, total_tokens: int) -> None:
        """Say how much there is to do."""
        self._total = max(total_tokens, 1)
        self._progress.update(self._task, total=self._total)

    def tick(self) -> None:
        """Read the heartbeats if it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._every
        beats = [b for b in read_heartbeats(self._run, self._stage, self._name) if b.attempt == self._attempt]
        # What the plan estimated is put right by the units that are done.
        total = round(self._total * estimate_ratio(beats)) or None
        self._progress.update(self._task, completed=sum(beat.tokens_done for beat in beats), total=total)

    @contextmanager
    def live(self) -> Iterator[StageProgress]:
        """Show the bar while the body runs."""
        with self._progress:
            yield self
            self._next = 0.0
            self.tick()


def coverage(summary: Mapping[str, Any], scoring: str) -> list[tuple[str, object]]:
    """Rows for `pairs`: what a scoring attributes, in batches of which size if one was searched, through which preconditioner."""
    share = summary["attributed_share"]
    rows: list[tuple[str, object]] = [
        ("parameters attributed", f"{share:.1%} (the rest by name: stages/scoring/{scoring}.json)")
    ]
    searched = summary.get("batch_tokens")
    if searched:
        tried = ", ".join(f"{tokens:,}" for tokens in searched["tried"])
        stopped = searched["stopped"].replace("_", " ")
        where = f"timings/scoring/{scoring}/batch_tokens.json"
        rows.append(("batch tokens", f"{searched['found']:,} (tried {tried}; stopped by {stopped}; {where})"))
    held = summary.get("preconditioner")
    if held:
        text = f"{held['form']} {held['optimizer']} after {held['steps']:,} steps, metric {held['metric']}"
        fit = held.get("correlation")
        if fit:
            text += (
                f"; correlation of the fit with the exact one {fit['mean']:.2f} in the mean, "
                f"{fit['lowest']:.2f} at {fit['lowest_site']}"
            )
        rows.append(("preconditioner", text))
    return rows


def pairs(title: str, rows: Iterable[tuple[str, object]]) -> Table:
    """A two-column table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
    return table
