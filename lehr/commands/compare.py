"""`lehr compare`: is it worth it? Policies and selections at equal trained tokens, over seeds, with a verdict."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import tyro

from lehr.compare.arms import SharedSettings
from lehr.options import ColumnOptions, RunDir

if TYPE_CHECKING:
    from lehr.compare.run import Comparison
    from schemas.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Train arms from the same start, on equally many tokens, with the same learning rates, under several seeds; say for each
    arm how its held-out loss differs from the control's, what it cost, and adopt, reject or inconclusive.

    Every arm is an ordinary training of the run directory. After a stop the same command goes on; what has finished is not trained again.
    """

    run_dir: RunDir
    """Run directory, with the streams of all arms."""
    arm: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An arm, STREAM:POLICY, such as match:filter-then-weight; options of the policy follow behind commas, as in
    match:random,n_keep=4. `{seed}` in the stream's name stands for the seed. Give it once for each arm."""
    control: str = ""
    """The arm that the others are compared with, such as random:full."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of order, target batches, random choice and dropout; each arm is trained under each. At least three."""
    guard: str = ""
    """Text that must not become worse: a file, folder or glob, encoded as the target is. Its loss under every final model is
    compared too."""
    interval: Literal["student", "percentile", "bca"] = "student"
    """Interval that the verdict takes: `student`, or of resampled seeds `percentile` or `bca`, which are too narrow for few seeds."""
    level: float = 0.95
    """Level of the interval."""
    margin: float = 0.0
    """How much lower than the control's the held-out loss must be for `adopt` (higher for `reject`): the whole interval lies beyond.
    Nats per token."""
    tolerance: float = 0.01
    """How much the guard loss may rise above the control's. Nats per token."""
    columns: tyro.conf.OmitArgPrefixes[ColumnOptions] = ColumnOptions()
    settings: tyro.conf.OmitArgPrefixes[SharedSettings] = SharedSettings()

    def run(self) -> int:
        """Compare, print the table, return the exit status."""
        from lehr.compare.arms import CompareSettings
        from lehr.compare.run import Watch, compare
        from lehr.console import console, new_attempt
        from schemas.run import Run
        from trainer.loggers.console import Overview

        run = Run.open(self.run_dir)
        chosen = CompareSettings(
            arms=self.arm,
            control=self.control,
            seeds=self.seeds,
            interval=self.interval,
            level=self.level,
            margin=self.margin,
            tolerance=self.tolerance,
            shared=self.settings,
        )
        with Overview() as overview:
            found = compare(
                run,
                chosen,
                guard=self.guard,
                columns=self.columns.columns(),
                attempt=new_attempt(),
                watch=Watch(
                    trainings=overview.trainings, console=lambda arm: overview.logger(f"{arm.label} seed {arm.seed}")
                ),
            )
        for line in result_lines(run, found):
            console.print(line)
        console.print(f"Next: lehr report {self.run_dir}")
        return 0


def result_lines(run: Run, found: Comparison) -> list[Any]:
    """Tables of a finished comparison, a sentence for each verdict, and what the columns mean."""
    from rich.table import Table

    from lehr.compare.run import read_seconds

    spec, start = found.manifest.spec, found.manifest.summary["start"]
    guarded = bool(spec["guard"])
    title = f"{len(spec['seeds'])} seeds, {spec['token_budget']:,} trained tokens; held-out loss at the start {start['eval_loss']:.4f}"
    title += f", guard {start['guard_loss']:.4f}" if guarded else ""
    losses = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    costs = Table(title="What it cost", title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    columns = ["held-out", "difference", f"{spec['level']:.0%} {spec['interval']}", "bootstrap"]
    columns += ["guard diff.", "interval"] if guarded else []
    for table, names in (
        (losses, [*columns, "verdict"]),
        (costs, ["tokens", "TFLOP", "choosing", "offline", "seconds", "choosing", "offline"]),
    ):
        table.add_column("arm")
        for name in names:
            table.add_column(name, justify="right")
    seconds = read_seconds(run, found.manifest.name)
    for row in found.arms:
        cells = [
            _fixed(row["eval_loss"]),
            _signed(row["difference"]),
            _span(row, "difference"),
            _span(row, "bootstrap"),
        ]
        cells += [_signed(row["guard_difference"]), _span(row, "guard")] if guarded else []
        losses.add_row(row["arm"], *cells, row["verdict"] or "control")
        spent = seconds.get(row["arm"], {})
        least, most = row["least_tokens"], row["most_tokens"]
        costs.add_row(
            row["arm"],
            f"{least:,}" if least == most else f"{least:,} to {most:,}",
            *(_tera(row[name]) for name in ("flops", "selection_flops", "offline_flops")),
            _short(spent.get("training")),
            _short(spent.get("selection")),
            _short(sum(spent["offline"].values()) if spent.get("offline") else None),
        )
    lines: list[Any] = [losses, "", costs, ""]
    lines += [f"{row['arm']}: {row['verdict']}, {row['reason']}" for row in found.arms if not row["control"]]
    lines.append(
        "difference: held-out loss minus the control's, mean over seeds, nats per token; below zero is better. TFLOP and seconds: of one "
        "training, of them choosing at every step, and once for the scoring that the stream was selected by."
    )
    return lines


def _fixed(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def _span(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f"{low:+.4f} to {high:+.4f}"


def _tera(value: float | None) -> str:
    return "" if value is None else f"{value / 1e12:.3g}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
