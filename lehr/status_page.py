"""A run's status for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lehr.catalog import FLOW, OPTIONAL
from lehr.console import duration, size
from lehr.rendering import visible
from lehr.status import RunStatus, ScoringStatus, WorkerStatus


def _workers(workers: WorkerStatus) -> str:
    if not workers.live and not workers.gone:
        return "not started"
    words = [f"{workers.live} working" if workers.live else "nobody is working"]
    if workers.tokens_per_second is not None:
        words.append(f"{workers.tokens_per_second:,.0f} tokens/s")
    if not workers.live and workers.seconds_since_heard is not None:
        words.append(f"last heard {duration(workers.seconds_since_heard)} ago")
    return ", ".join(words)


def _scoring(status: ScoringStatus) -> list[RenderableType]:
    line = Table.grid(padding=(0, 2))
    for _ in range(4):
        line.add_column(no_wrap=True)
    line.add_row(
        Text(f"scoring {visible(status.scoring)}", style="bold"),
        ProgressBar(total=max(1, status.units_total), completed=status.units_done, width=24),
        Text(f"{status.units_done:,} of {status.units_total:,} units"),
        Text("finished", style="green") if status.finished else Text(f"{len(status.missing):,} missing"),
    )
    parts: list[RenderableType] = [line]
    parts.append(
        Text(f"  {status.samples:,} samples scored, {status.rejected:,} rows or windows rejected", style="dim")
    )
    if not status.finished:
        left = f", {duration(status.seconds_left)} left" if status.seconds_left is not None else ""
        parts.append(
            Text(f"  {_workers(status.workers)}, about {status.tokens_left:,} tokens to go{left}", style="dim")
        )
        if not status.missing:
            parts.append(Text("  every unit stands; `lehr score` writes the manifest", style="yellow"))
    if status.workers.last_error:
        error = f"  last error ({status.workers.last_error_host}): {visible(status.workers.last_error)}"
        parts.append(Text(error, style="yellow"))
    return parts


def status_page(status: RunStatus) -> RenderableType:
    """The whole status."""
    parts: list[RenderableType] = [
        Text(f"{visible(status.url)}", style="bold"),
        Text(
            f"corpus {visible(status.corpus)} at {visible(status.root)}: "
            f"{status.units:,} units, {status.rows:,} rows, about {status.tokens:,} tokens"
            if status.units
            else "no plan yet: `lehr plan` makes one",
            style="dim",
        ),
        Text(""),
    ]
    for scoring in status.scorings:
        parts += _scoring(scoring)
        parts.append(Text(""))
    for stage, name, workers in status.working:
        parts.append(Text(f"{stage} {visible(name)}: {_workers(workers)}"))
        if workers.last_error:
            parts.append(Text(f"  last error: {visible(workers.last_error)}", style="yellow"))
    for comparison in status.comparisons:
        line = f"comparison {visible(comparison.name)}: {comparison.trained:,} of {comparison.trainings:,} trainings finished"
        parts.append(Text(f"{line}, {_workers(comparison.workers)}"))
    table = Table("stage", "name", show_edge=False, pad_edge=False, header_style="bold")
    for column in ("files", "rows", "size"):
        table.add_column(column, justify="right")
    for done in status.stages:
        table.add_row(done.stage, visible(done.name), f"{done.parts:,}", f"{done.rows:,}", size(done.bytes))
    parts.append(table)
    finished = {stage.stage for stage in status.stages}
    missing = [stage for stage in FLOW if stage not in finished and stage not in OPTIONAL]
    if missing:
        parts.append(Text(f"not yet: {', '.join(missing)}", style="dim"))
    for problem in status.problems:
        parts.append(Text(visible(problem), style="red"))
    return Group(*parts)
