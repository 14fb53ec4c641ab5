"""`lehr target`: what the model should become good at, described by its gradients."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

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
    curvature: Literal["centred", "empirical", "gauss-newton"] = "centred"
    """What stiff, flat and damped mean: the Fisher of the target's gradients without their mean, or with it, or the Gauss-Newton
    matrix at labels sampled from the model (--draws passes over the target more)."""
    draws: int = 4
    """Times that the labels of every target sample are sampled, for --curvature gauss-newton."""
    damping: float = 1.0
    """Damping of influence and damped gains, as a multiple of the mean eigenvalue; the table printed says which can be trusted."""
    columns: tyro.conf.OmitArgPrefixes[ColumnOptions] = ColumnOptions()
    features: tyro.conf.OmitArgPrefixes[ScoringOptions] = ScoringOptions()
    execution: tyro.conf.OmitArgPrefixes[Execution] = Execution()

    def run(self) -> int:
        """Describe, print the numbers that decide trust, return the exit status."""
        from lehr.console import StageProgress, console, coverage, new_attempt, pairs
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
                    curvature=self.curvature,
                    draws=self.draws,
                    damping=self.damping,
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
                    (
                        "elbow k*",
                        f"{numbers['k_star']} stiff directions, {self.curvature} ({numbers['k_star_empirical']} uncentred)",
                    ),
                    ("null dimension", numbers["null_dimension"]),
                    (
                        "mean gradient",
                        f"{numbers['share_stiff']:.0%} stiff, {numbers['share_flat']:.0%} flat, {numbers['share_null']:.0%} null",
                    ),
                    *coverage(report.coverage, self.scoring),
                    ("rejected", len(report.rejects)),
                ],
            )
        )
        for reject in report.rejects[:5]:
            console.print(f"  {reject.path} row {reject.row}: {reject.reason} {reject.detail}", markup=False)
        console.print(_damping_table(report.damping))
        recommended = report.damping["recommended_factor"]
        advice = f"--damping {recommended:.3g}" if recommended else "none recommended"
        console.print(f"damping: {advice}; {report.damping['reason']}", markup=False)
        for warning in numbers["warnings"]:
            console.print(f"note: {warning}", markup=False)
        console.print(f"Next: lehr score {self.run_dir}")
        return 0


def _damping_table(damping: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        "damping", "at", "dim.", "passed", "gain kept", "cost", "signal", "", show_edge=False, pad_edge=False,
        header_style="bold", box=None, title="Damping, on unseen target samples (two-fold)", title_justify="left",
    )  # fmt: skip

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in damping["rows"]:
        table.add_row(
            f"{row['damping']:.3g}",
            row["at"],
            f"{row['effective_dimension']:.1f}",
            f"{row['share_passed']:.0%}",
            cell(row["gain_ratio"], ".0%"),
            cell(row["cost_ratio"], ".2f"),
            cell(row["signal_heldout"], ".2f"),
            "best" if row["damping"] == damping["recommended"] else "" if row["trusted"] else "untrusted",
        )
    return table
