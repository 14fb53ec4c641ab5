"""`lehr score`: features and curvature columns of the whole corpus."""

from __future__ import annotations

import dataclasses

import tyro

from lehr.options import RunDir
from pipelines.options import Execution, Keep, ScoringOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Compute features of every planned sample, and curvature columns for every described target, in one pass.

    What already stands is kept: after a stop, the same command resumes. A target that was described after scoring gets
    its columns by running this again; the model is then not run.
    """

    run_dir: RunDir
    """Run directory, as `lehr plan` made it."""
    scoring: str = "base"
    """Name of the scoring: one model, one feature spec."""
    units: str = "1/1"
    """Score only the i-th of n fixed shares of the plan, as i/n: one array task of a cluster without Beam."""
    keep: Keep | None = None
    """What is stored of the features: `all`, or `scalars`, everything but the sketches, which are nine tenths of the bytes: for
    rankings and `direct-signed`. Every target has to be described first: columns of another one would need the model again (default: what the
    scoring was declared with, or all)."""
    features: tyro.conf.OmitArgPrefixes[ScoringOptions] = ScoringOptions()
    execution: tyro.conf.OmitArgPrefixes[Execution] = Execution()

    def run(self) -> int:
        """Score, print what came of it, return the exit status."""
        from lehr.console import StageProgress, console, coverage, new_attempt, pairs
        from pipelines.score import parse_share, score
        from schemas.run import Run

        run = Run.open(self.run_dir)
        attempt = new_attempt()
        progress = StageProgress(run, "score", self.scoring, attempt)
        with progress.live():
            report = score(
                run,
                self.scoring,
                self.features,
                self.execution,
                keep=self.keep,
                share=parse_share(self.units),
                attempt=attempt,
                on_start=lambda plan, units: progress.start(sum(unit.estimated_tokens for unit in units)),
                tick=progress.tick,
            )
        rows: list[tuple[str, object]] = [
            ("work units", f"{report.units:,} of {report.units_total:,}"),
            ("samples", report.samples),
            ("tokens", report.tokens),
            *coverage(report.coverage, self.scoring),
            ("rejected", _listed(report.rejects)),
        ]
        rows += [(f"overlapping {target}", count) for target, count in report.overlapping.items()]
        console.print(pairs("", rows))
        if not report.complete:
            console.print("This share of the plan is done; the stage finishes when every share is.")
        elif not report.targets:
            console.print(f"Next: lehr target {self.run_dir} --data ... and this command again, then lehr select.")
        else:
            console.print(f"Next: lehr select {self.run_dir} --samples N")
        return 0


def _listed(rejects: dict[str, int]) -> str:
    total = sum(rejects.values())
    return f"{total:,} ({', '.join(f'{n:,} {reason}' for reason, n in sorted(rejects.items()))})" if total else "none"
