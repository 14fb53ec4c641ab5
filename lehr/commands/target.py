"""`lehr target`: what the model should become good at, described by its gradients."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro

from lehr.options import ColumnOptions, RunDir
from pipelines.options import Execution, ScoringOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Describe a target set: sketches of its samples, the spectrum of its curvature, and what can be trusted of it.

    The first `target` or `score` of a run declares the scoring (model, encoding, projections); later ones inherit it.
    """

    run_dir: RunDir
    """Run directory, as `lehr plan` made it."""
    data: str
    """Target samples: a file, folder or glob of Parquet, JSONL or WebDataset, local or any fsspec URL."""
    eval: str = ""
    """Held-out samples for evaluation only; they must not overlap the target."""
    name: str = "target"
    """Name of the target."""
    scoring: str = "base"
    """Name of the scoring."""
    contrast: Literal["none", "swap"] = "none"
    """`swap` also scores the target with its answers exchanged between rows, for `lehr select --contrast swap`."""
    energy: float = 0.945
    """Share of the trace at which the elbow between stiff and flat directions is put."""
    columns: tyro.conf.OmitArgPrefixes[ColumnOptions] = ColumnOptions()
    features: tyro.conf.OmitArgPrefixes[ScoringOptions] = ScoringOptions()
    execution: tyro.conf.OmitArgPrefixes[Execution] = Execution()

    def run(self) -> int:
        """Describe, print the numbers that decide trust, return the exit status."""
        from lehr.console import StageProgress, console, new_attempt, pairs
        from pipelines.options import TargetOptions
        from pipelines.target import describe
        from schemas.run import Run

        run = Run.open(self.run_dir)
        attempt = new_attempt()
        progress = StageProgress(run, "target", f"{self.name}.{self.scoring}", attempt)
        with progress.live():
            report = describe(
                run,
                self.name,
                self.scoring,
                TargetOptions(
                    data=self.data,
                    eval=self.eval,
                    columns=self.columns.columns(),
                    contrast=self.contrast,
                    energy=self.energy,
                ),
                self.features,
                self.execution,
                attempt=attempt,
                on_start=lambda samples, tokens: progress.start(tokens),
                tick=progress.tick,
            )
        numbers = report.geometry
        console.print(
            pairs(
                "",
                [
                    ("samples", ", ".join(f"{count:,} {part}" for part, count in report.counts.items())),
                    (
                        "M against k",
                        f"{numbers['target_samples']:,} samples, {numbers['sketch_dimension']:,} dimensions",
                    ),
                    ("elbow k*", f"{numbers['k_star']} stiff directions ({numbers['k_star_empirical']} uncentred)"),
                    ("null dimension", numbers["null_dimension"]),
                    (
                        "mean gradient",
                        f"{numbers['share_stiff']:.0%} stiff, {numbers['share_flat']:.0%} flat, {numbers['share_null']:.0%} null",
                    ),
                    ("parameters attributed", f"{report.coverage['attributed_share']:.1%}"),
                    ("rejected", len(report.rejects)),
                ],
            )
        )
        for reject in report.rejects[:5]:
            console.print(f"  {reject.path} row {reject.row}: {reject.reason} {reject.detail}", markup=False)
        for warning in numbers["warnings"]:
            console.print(f"note: {warning}", markup=False)
        console.print(f"Next: lehr score {self.run_dir}")
        return 0
