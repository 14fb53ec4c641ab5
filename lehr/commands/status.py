"""`lehr status`: how far a run is."""

from __future__ import annotations

import dataclasses
import sys
import time

import tyro

from lehr.options import RunDir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Show stages finished, units done and missing, rejected rows, tokens per second, time left and the last error. Works
    from any machine that can read the run, while others are working on it.
    """

    run_dir: RunDir
    """Run directory: a path or any fsspec URL."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead, missing units included."""
    watch: float = 0.0
    """Show again every so many seconds, until interrupted or until nothing is missing; 0 shows once."""

    def run(self) -> int:
        """Print and return 0."""
        from rich.live import Live

        from lehr.console import console
        from lehr.status import RunStatus, run_status, status_json
        from lehr.status_page import status_page
        from schemas.errors import InputError
        from schemas.fingerprint import pretty_json
        from schemas.run import Run

        if self.watch < 0:
            raise InputError(f"watch must be 0 (once) or a positive number of seconds, not {self.watch}")
        run = Run.open(self.run_dir)

        def show_json(status: RunStatus) -> None:
            sys.stdout.write(pretty_json(status_json(status)).decode())
            sys.stdout.flush()

        def working(status: RunStatus) -> bool:
            return any(not scoring.finished for scoring in status.scorings) or bool(
                status.working or status.comparisons
            )

        status = run_status(run)
        if not self.watch:
            show_json(status) if self.json else console.print(status_page(status))
            return 0
        if self.json:
            show_json(status)
            while working(status):
                time.sleep(self.watch)
                status = run_status(run)
                show_json(status)
            return 0
        with Live(status_page(status), console=console, auto_refresh=False) as live:
            while working(status):
                time.sleep(self.watch)
                status = run_status(run)
                live.update(status_page(status), refresh=True)
        return 0
