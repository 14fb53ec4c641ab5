"""A comparison: its rows are what its trainings ended with, its verdicts what the rule makes of them."""

from __future__ import annotations

from typing import Any

from lehr.compare.judge import arm_rows
from lehr.verify.files import Manifests
from lehr.verify.findings import Check
from schemas.parquet import read_table
from schemas.run import Run


def check_comparison(run: Run, manifests: Manifests, name: str) -> Check:
    """Trainings against their manifests, arms against the trainings; the guard losses stand as they were measured."""
    check = Check(
        subject=f"comparison {name}", promise="rows agree with trainings, verdicts with the rule", unit="trainings"
    )
    manifest, folder = manifests["compare", name], run.path(run.comparison_folder(name))
    with check.guarded():
        trainings = read_table(f"{folder}/trainings.parquet", schema="arm_trainings").to_pylist()
        arms = read_table(f"{folder}/arms.parquet", schema="arms").to_pylist()
        check.count = len(trainings)
        declared = [[row["arm"], row["seed"], row["training"]] for row in trainings]
        if declared != manifest.spec["trainings"]:
            check.fail(f"{folder}/trainings.parquet: its trainings are not those that the comparison declares")
            return check
        for row in trainings:
            trained = manifests.get(("train", row["training"]))
            wrong = _differing(row, trained.summary) if trained else ["it has no manifest"]
            if wrong:
                check.fail(f"{folder}/trainings.parquet: {row['training']}: {', '.join(wrong)}")
        remade = arm_rows(trainings, manifest.spec, {row["arm"]: row["offline_flops"] for row in arms})
        for row, again in zip(arms, remade):
            wrong = [name for name in row if not _close(row[name], again[name])]
            if wrong:
                check.fail(f"{folder}/arms.parquet: {row['arm']}: {', '.join(wrong)} do not follow from the trainings")
        if len(arms) != len(remade):
            check.fail(f"{folder}/arms.parquet: {len(arms)} arms, the comparison declares {len(remade)}")
        told = {row["arm"]: row["verdict"] for row in arms if not row["control"]}
        if told != manifest.summary["verdicts"]:
            check.fail(f"{run.path(run.manifest_path('compare', name))}: its verdicts are not those of arms.parquet")
    return check


def _differing(row: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    names = ("eval_loss", "trained_tokens", "offered_tokens", "steps")
    return [f"{name} is {row[name]}, the training says {summary[name]}" for name in names if row[name] != summary[name]]


def _close(one: Any, other: Any) -> bool:
    """Equal, numbers to rounding: another machine may sum in another order."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= 1e-9 * max(1.0, abs(one))
    return one == other
