"""`lehr verify`: is this run what its manifests say?"""

from __future__ import annotations

import dataclasses

import tyro

from lehr.options import RunDir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Check every checksum, count and lineage of a run: each corpus row in features or rejects exactly once, curvature and
    candidates row for row, ranks, shards, journals. Exit status 1 where something is wrong.
    """

    run_dir: RunDir
    """Run directory: a path or any fsspec URL."""
    quick: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compare sizes and footers instead of hashing every file; shards are not opened."""
    show: int = 5
    """How many problems of one check are printed."""

    def run(self) -> int:
        """Print the checks; return 0 if all hold, 1 otherwise."""
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Table
        from rich.text import Text

        from lehr.console import console, errors
        from lehr.rendering import visible
        from lehr.verify import verify
        from schemas.run import Run

        run = Run.open(self.run_dir)
        columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task("", total=None)
            checks = list(
                verify(
                    run,
                    quick=self.quick,
                    on_total=lambda total: progress.update(task, total=total),
                    tick=lambda count: progress.advance(task, count),
                )
            )
        table = Table("", "what", "looked at", "promise", show_edge=False, pad_edge=False, header_style="bold")
        for check in checks:
            mark = Text("ok", style="green") if check.ok else Text("FAILED", style="bold red")
            table.add_row(mark, visible(check.subject), f"{check.count:,} {check.unit}", check.promise)
        console.print(table)
        failed = [check for check in checks if not check.ok]
        for check in failed:
            console.print(Text(f"\n{visible(check.subject)}: {len(check.problems)} wrong", style="bold red"))
            for problem in check.problems[: self.show]:
                console.print(Text(f"  {visible(problem)}"), soft_wrap=True)
            if len(check.problems) > self.show:
                console.print(f"  and {len(check.problems) - self.show} more (--show {len(check.problems)})")
        if failed:
            return 1
        console.print(Text(f"\nAll {len(checks)} checks hold.", style="green"))
        return 0
