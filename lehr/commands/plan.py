"""`lehr plan`: a corpus cut into work units, and what scoring it would cost."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import TYPE_CHECKING, Annotated

import tyro

from lehr.options import ColumnOptions, RunDir
from pipelines.plan import DEFAULT_TOKENS_PER_SECOND
from schemas.spec import CorpusFormat, FeatureSpec, PlanSpec

if TYPE_CHECKING:
    from rich.progress import Progress

_SPEC = PlanSpec(corpus="default")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Cut a corpus into work units and say what scoring it would cost, before anything is spent.

    Creates the run directory. The same corpus again changes nothing; a corpus that changed needs --extend.
    """

    run_dir: RunDir
    """Run directory to create or extend: any path or fsspec URL."""
    corpus: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="CORPUS")]
    """Files, folders or globs of Parquet, JSONL (also .gz, .zst) or WebDataset tar; local or any fsspec URL."""
    name: str = ""
    """Name of the corpus, part of every sample id; by default the run's, or for a new run that of the folder or file."""
    columns: tyro.conf.OmitArgPrefixes[ColumnOptions] = ColumnOptions()
    format: CorpusFormat = _SPEC.format
    """File format; `auto` goes by the file name."""
    unit_tokens: int = _SPEC.unit_tokens
    """Upper bound of estimated tokens in a work unit: what a worker loses when it is killed (a single row may exceed it)."""
    max_row_bytes: int = _SPEC.max_row_bytes
    """A row of more bytes than this is rejected as `row_too_large`."""
    limit: int = _SPEC.limit
    """Plan only this many first rows, for a try; 0 plans all."""
    extend: bool = False
    """Add new files, replace changed ones and drop deleted ones; the units of unchanged files stay as they are."""
    tokens_per_second: float = DEFAULT_TOKENS_PER_SECOND
    """Speed that the estimate of hours assumes, of all workers together. The default is one CPU core with a model of 135
    million parameters; after its first units, `lehr score` and `lehr status` show the real one."""
    k: int = FeatureSpec.k
    """Sketch dimension that the estimate of output bytes assumes; `lehr target` and `lehr score` set it."""

    def run(self) -> int:
        """Plan, print what came of it and what scoring would cost, return the exit status."""
        from lehr.console import console, duration, pairs, size
        from pipelines.plan import estimate_cost, make_plan

        estimate_cost(0, 0, k=self.k, tokens_per_second=self.tokens_per_second)
        with _ByteProgress() as progress:
            report = make_plan(self.run_dir, self.corpus, self._spec(), extend=self.extend, progress=progress)
        cost = estimate_cost(report.rows, report.tokens, k=self.k, tokens_per_second=self.tokens_per_second)
        rows: list[tuple[str, object]] = [
            ("corpus", f"{report.run.corpus} at {report.run.root}"),
            ("files", report.files),
            ("work units", report.units),
            ("rows", report.rows),
            ("bytes", size(report.bytes)),
            ("tokens, estimated", report.tokens),
            ("scoring takes", f"{duration(cost.hours * 3600)} at {self.tokens_per_second:,.0f} tokens/s"),
            (
                "scoring writes",
                f"{size(cost.bytes)} for {cost.samples:,} samples, k = {self.k:,}; {size(cost.scalar_bytes)} with --keep scalars",
            ),
        ]
        rows += [
            (what, f"{len(paths):,}: {', '.join(paths[:3])}{', ...' * (len(paths) > 3)}")
            for what, paths in (("new", report.added), ("changed", report.changed), ("dropped", report.removed))
            if paths
        ]
        console.print(pairs("", rows))
        for warning in report.warnings:
            console.print(f"warning: {warning}", markup=False, highlight=False)
        if not report.written:
            console.print("The corpus is the one that was planned; nothing was written.")
        console.print(
            f"The speed is an assumption: --tokens-per-second names another, and the first units of scoring show yours.\n"
            f"Next: lehr target {self.run_dir} --data ... --model ...",
            markup=False,
        )
        return 0

    def _spec(self) -> PlanSpec:
        return PlanSpec(
            corpus=self.name or _default_name(self.run_dir, self.corpus),
            format=self.format,
            columns=self.columns.columns(),
            unit_tokens=self.unit_tokens,
            max_row_bytes=self.max_row_bytes,
            limit=self.limit,
        )


class _ByteProgress:
    """A bar over the bytes of the corpus, shown once reading has taken a second."""

    def __init__(self) -> None:
        self._shown: Progress | None = None
        self._began = time.monotonic()

    def __enter__(self) -> _ByteProgress:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._shown is not None:
            self._shown.stop()

    def __call__(self, done: int, total: int) -> None:
        if self._shown is None:
            if time.monotonic() - self._began < 1.0:
                return
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            from lehr.console import errors

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._shown = Progress(TextColumn("reading the corpus"), *columns, console=errors)
            self._shown.add_task("reading", total=total)
            self._shown.start()
        self._shown.update(self._shown.task_ids[0], completed=done)


def _default_name(run_dir: str, corpus: tuple[str, ...]) -> str:
    """The name that the run has; for a new run, the last name in the path that can be one, without globs and suffixes."""
    from schemas.run import Run
    from schemas.storage import exists, join, normalise

    if exists(join(normalise(run_dir), "run.json")):
        return Run.open(run_dir).corpus
    first = normalise(corpus[0]) if corpus else ""
    parts = [part for part in re.split(r"[/\\]+", first.rpartition("://")[2]) if part and not set("*?[") & set(part)]
    stem = parts[-1].split(".")[0] if parts else ""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:100] or "corpus"
