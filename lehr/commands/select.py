"""`lehr select`: choose the samples worth training on."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tyro

from lehr.options import RunDir
from pipelines.options import Execution
from selection_ops.selectors.settings import SelectorSettings

CERTIFICATE = ("limit", "cost", "smallest_feasible_limit", "limit_raised_by", "converged", "frank_wolfe_gap_share")
DIAGNOSTICS = (
    "set_cosine",
    "set_cosine_heldout",
    "set_cosine_evaluation",
    "set_cosine_bound",
    "effective_rank",
    "supply_peak",
)
"""What is printed of a solution; the file holds everything."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Choose samples, rank them, and say how good the set is.

    Give a budget in samples or in tokens. Beside every selection stand its set cosine with the target (in sample, and
    two-fold on held-out target rows), the bound no set can pass, its effective rank and its shares by domain.
    """

    run_dir: RunDir
    """Run directory."""
    samples: int = 0
    """Budget in samples."""
    tokens: int = 0
    """Budget in tokens; give this or --samples."""
    name: str = ""
    """Name of the selection (default: that of the selector)."""
    scoring: str = "base"
    """Scoring to select from."""
    target: str = "target"
    """Target to select for; `none` for selectors that need none."""
    keep_overlapping: bool = False
    """Keep candidates whose wording overlaps the target or the evaluation set; by default they are left out."""
    columns_only: bool = False
    """Read scalar columns alone and no sketches: seconds on large pools, for selectors that rank by columns; the diagnostics
    that need sketches are left out."""
    engine: Literal["auto", "memory", "beam"] = "auto"
    """Where candidates are held: in the memory of this process, or in work units that one Beam job passes over. auto: memory
    where the columns of all candidates fit."""
    settings: tyro.conf.OmitArgPrefixes[SelectorSettings] = SelectorSettings()
    execution: tyro.conf.OmitArgPrefixes[Execution] = Execution(workers=1)

    def run(self) -> int:
        """Select, print the verdict, return the exit status."""
        from lehr.console import console, errors, pairs
        from schemas.fingerprint import pretty_json
        from schemas.run import Run
        from schemas.storage import write_whole
        from selection_ops.selectors import Budget

        run = Run.open(self.run_dir)
        name = self.name or self.settings.selector
        target = "" if self.target == "none" else self.target
        engine: str = self.engine
        if engine != "memory":
            from pipelines.select_beam import choose_engine, run_select_beam
        if engine == "auto":
            engine, why = choose_engine(run, self.scoring)
            if engine == "beam":
                errors.print(f"Selecting by a Beam job (--engine beam): {why}", markup=False)
        budget = Budget(samples=self.samples or None, tokens=self.tokens or None)
        with errors.status(f"selecting by {self.settings.selector}"):
            if engine == "beam":
                report = run_select_beam(
                    run,
                    name,
                    self.scoring,
                    target,
                    budget,
                    self.settings,
                    self.execution,
                    keep_overlapping=self.keep_overlapping,
                    columns_only=self.columns_only,
                )
            else:
                from pipelines.select import run_select

                report = run_select(
                    run,
                    name,
                    self.scoring,
                    target,
                    budget,
                    self.settings,
                    keep_overlapping=self.keep_overlapping,
                    columns_only=self.columns_only,
                )
        write_whole(run.path(f"{run.timings_folder('select', name)}/seconds.json"), pretty_json(report.seconds))
        rows: list[tuple[str, object]] = [("selected", report.selected), ("tokens", report.tokens)]
        for key, count in report.solution["counts"].items():
            if key != "selected":
                rows.append((key.replace("_", " "), count))
        for part, keys in (("certificate", CERTIFICATE), ("diagnostics", DIAGNOSTICS)):
            for key in keys:
                value = report.solution[part].get(key)
                if value is not None:
                    rows.append((key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else value))
        console.print(pairs(f"selection {name}", rows))
        for warning in report.solution["warnings"]:
            console.print(f"note: {warning}", markup=False)
        seconds = ", ".join(f"{name} {value:.1f}" for name, value in report.seconds.items())
        console.print(f"Seconds: {seconds}", markup=False)
        console.print(f"All numbers: {run.path(run.selection_folder(name))}/solution.json")
        console.print(f"Next: lehr export {self.run_dir} --selection {name}")
        return 0
