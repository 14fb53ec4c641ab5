"""`lehr report`: a run as one HTML page."""

from __future__ import annotations

import dataclasses

from lehr.options import RunDir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Write one self-contained HTML page about a run: spectrum, geometry, domains, selections, training, samples, rejects,
    lineage. What does not exist yet is left out. The page loads nothing from anywhere.
    """

    run_dir: RunDir
    """Run directory: a path or any fsspec URL."""
    name: str = "report"
    """Name of the page: RUN/reports/NAME.html."""
    out: str = ""
    """Write to this file or URL instead of into the run."""

    def run(self) -> int:
        """Write the page, print where, and return 0."""
        from lehr.report import render_report, write_report
        from schemas.run import Run
        from schemas.storage import normalise, write_whole

        run = Run.open(self.run_dir)
        if self.out:
            url = normalise(self.out)
            write_whole(url, render_report(run).encode("utf-8", "backslashreplace"))
        else:
            url = write_report(run, self.name)
        print(url)
        return 0
