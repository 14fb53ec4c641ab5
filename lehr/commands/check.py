"""`lehr check`: do the stored sketches say what exact gradients say?"""

from __future__ import annotations

import dataclasses
from typing import Any

import tyro

from lehr.options import RunDir
from pipelines.options import CheckOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Recompute random rows of a scored run and compare: stored sketches with recomputed ones, sketches with exact gradients.

    Three tables. Integrity: a stored row must be what the scoring makes of its text, to rounding; a damaged file, another
    model or other signs show here. Errors: inner products and norms of sketches against exact gradients, with what theory
    predicts of a projection of this rank and a fold to this k. Decisions: ranks and chosen sets from stored sketches against
    the same from exact gradients. Exit status 1 where rows are not intact, or errors pass three times the prediction.

    Costs some ten passes of training over the rows drawn, printed before it starts; take fewer rows, or give more memory.
    """

    run_dir: RunDir
    """Run directory whose scoring is finished: a path or any fsspec URL."""
    scoring: str = "base"
    """Name of the scoring."""
    model: str | None = None
    """Where the model of the scoring lies, if not where it was when the scoring was declared."""
    revision: str | None = None
    """Revision of a hub id."""
    check: tyro.conf.OmitArgPrefixes[CheckOptions] = CheckOptions()
    out: str = ""
    """JSON file for everything that was measured."""
    show: int = 5
    """How many failures are printed."""

    def run(self) -> int:
        """Print three tables; return 0 if rows are intact and errors as predicted, 1 otherwise."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.text import Text

        from lehr.console import console, errors, size
        from lehr.rendering import visible
        from pipelines.check import CheckCost, check
        from schemas.fingerprint import pretty_json
        from schemas.run import Run
        from schemas.storage import normalise, write_whole

        run = Run.open(self.run_dir)
        columns = (TextColumn("checking"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task("", total=None)

            def start(cost: CheckCost) -> None:
                progress.update(task, total=cost.tokens_run)
                console.print(
                    f"{cost.rows} rows and {cost.target_rows} target samples, {cost.tokens:,} tokens; exact gradients of "
                    f"{cost.numbers:,} numbers in {cost.passes} passes of up to {size(cost.largest_pass)}: "
                    f"{cost.tokens_run:,} tokens forward and backward"
                )

            report = check(
                run,
                self.scoring,
                self.check,
                model=self.model,
                revision=self.revision,
                on_start=start,
                tick=lambda tokens: progress.advance(task, tokens),
            )
        if self.out:
            write_whole(normalise(self.out), pretty_json(report.record))
        asked = self.check.rows
        if report.record["cost"]["rows"] < asked:
            console.print(f"note: {report.record['cost']['rows']} rows are all there are of the {asked} asked for")
        for table in (_integrity(report.record), _errors(report.record), _decisions(report.record)):
            if table is not None:
                console.print(table)
                console.print()
        for failure in report.failures[: self.show]:
            console.print(Text(visible(failure), style="red"), soft_wrap=True)
        if len(report.failures) > self.show:
            console.print(f"and {len(report.failures) - self.show} more (--show {len(report.failures)})")
        if report.failures:
            if not report.intact:
                console.print(
                    Text("Stored rows are not those of this model and spec.", style="bold red"),
                    "`lehr verify` says which file is damaged; delete it and run `lehr score`, or score under another name.",
                )
            return 1
        console.print(Text("Rows are intact, and errors as theory predicts.", style="green"))
        return 0


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    return Table(
        *columns, title=title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold", box=None
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"


def _integrity(record: dict[str, Any]) -> Any:
    found = record["integrity"]
    table = _table("Stored against recomputed", "", "compared", "largest distance", "limit")
    counts = {"rows": record["cost"]["rows"], "target": record["cost"]["target_rows"]}
    for kind, count in counts.items():
        if count:
            by = " (alignment; sketches not kept)" if kind == "rows" and record["kept"] == "scalars" else ""
            table.add_row(
                kind + by, str(count), _number(found["largest_distance"][kind]), _number(found["limit"][kind])
            )
    return table


def _errors(record: dict[str, Any]) -> Any:
    names = {
        "projection": "inner products: projection, rank {proj_rank}",
        "fold": "fold to {k}",
        "arithmetic": "arithmetic of the scoring",
        "storage": "float16, other batches",
        "stored": "all of it",
        "norm": "norms",
    }
    table = _table("Against exact gradients, of the norms", "", "observed", "theory", "ratio", "largest")
    for name, title in names.items():
        found = record["errors"][name]
        cells = (_number(found[key]) for key in ("observed", "theory"))
        ratio = "" if not found["theory"] else f"{found['ratio']:.2f}"
        table.add_row(title.format(**record["sketch"]), *cells, ratio, _number(found["largest"]))
    return table


def _decisions(record: dict[str, Any]) -> Any:
    found = record["decisions"]
    if not found:
        return None
    table = _table(f"Decisions on target {record['target']}, stored against exact", "", "")
    table.add_row("Spearman of gain", _number(found["spearman_gain"]))
    table.add_row(
        "Spearman of stiff cost",
        f"{_number(found['spearman_stiff_cost'])} (k* {found['k_star']['stored']} stored, {found['k_star']['exact']} exact)",
    )
    table.add_row("overlap of the better half by gain", _number(found["top_half_overlap"]))
    table.add_row("overlap of half chosen by match", _number(found["match_half_overlap"]))
    chosen = found.get("selection")
    if chosen:
        name = f"{chosen['selected']} chosen by match, as {chosen['name']} had"
        table.add_row(name, _number(chosen["match_overlap"]))
        table.add_row(f"exact match, also in {chosen['name']}", _number(chosen["exact_match_in_selection"]))
    return table
