"""Counts of a training: steps without a gap, decisions that add up to them, totals that are sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from lehr.verify.files import Manifests
from lehr.verify.findings import Check
from schemas.parquet import read_table
from schemas.run import Run

_STEPS = ("step", "offered", "kept", "offered_tokens", "trained_tokens", "total_offered_tokens", "total_trained_tokens")


def _journal(run: Run, manifests: Manifests, name: str, table: str, columns: tuple[str, ...]) -> pa.Table:
    prefix = f"{run.training_folder(name)}/{table}/"
    paths = [p.path for p in manifests["train", name].parts if p.path.startswith(prefix)]
    tables = [read_table(run.path(path), schema=table, columns=columns) for path in paths]
    return pa.concat_tables(tables) if tables else pa.table({column: [] for column in columns})


def check_training(run: Run, manifests: Manifests, name: str) -> Iterator[Check]:
    """The journal of one training against itself."""
    where = run.path(run.training_folder(name))
    check = Check(subject=f"journal of {name}", promise="steps 1..n, decisions and totals add up", unit="steps")
    with check.guarded():
        steps = _journal(run, manifests, name, "steps", _STEPS).to_pylist()
        check.count = len(steps)
        steps.sort(key=lambda row: row["step"])
        if [row["step"] for row in steps] != list(range(1, len(steps) + 1)):
            check.fail(f"{where}/steps: steps are not 1..{len(steps)}, each once")
        for kind in ("offered", "trained"):
            total = 0
            for row in steps:
                total += row[f"{kind}_tokens"]
                if row[f"total_{kind}_tokens"] != total:
                    check.fail(f"{where}/steps: {kind} tokens up to step {row['step']} are not the sum of the steps")
                    break
        decisions = _journal(run, manifests, name, "decisions", ("step", "position", "kept", "step_weight")).to_pylist()
        offered = Counter(row["step"] for row in decisions)
        kept = Counter(row["step"] for row in decisions if row["kept"])
        for row in steps if decisions else []:
            if (row["offered"], row["kept"]) != (offered[row["step"]], kept[row["step"]]):
                check.fail(
                    f"{where}/decisions: step {row['step']} has {offered[row['step']]} decisions, {kept[row['step']]} kept; "
                    f"the step says {row['offered']} and {row['kept']}"
                )
        for number, count in Counter((row["step"], row["position"]) for row in decisions).items():
            if count > 1:
                check.fail(f"{where}/decisions: position {number[1]} is decided {count} times in step {number[0]}")
        if any(not row["kept"] and row["step_weight"] != 0 for row in decisions):
            check.fail(f"{where}/decisions: a sample that was not kept has a weight")
    yield check
