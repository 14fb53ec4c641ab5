"""Counts of a training: steps without a gap, decisions that add up to them, totals that are sums."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import orjson
import pyarrow as pa

from lehr.verify.files import Manifests
from lehr.verify.findings import Check
from schemas.fingerprint import fingerprint
from schemas.parquet import Part, read_part, read_table
from schemas.run import Run
from schemas.storage import read_bytes

_STEPS = ("step", "offered", "kept", "offered_tokens", "trained_tokens", "total_offered_tokens", "total_trained_tokens")


def _journal(run: Run, manifests: Manifests, name: str, table: str, columns: tuple[str, ...]) -> pa.Table:
    prefix = f"{run.training_folder(name)}/{table}/"
    paths = [p.path for p in manifests["train", name].parts if p.path.startswith(prefix)]
    tables = [read_table(run.path(path), schema=table, columns=columns) for path in paths]
    return pa.concat_tables(tables) if tables else pa.table({column: [] for column in columns})


def check_training(run: Run, manifests: Manifests, name: str, *, quick: bool) -> Iterator[Check]:
    """The journal of one training against itself, then its checkpoints unless `quick`."""
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
    if not quick:
        yield _check_checkpoints(run, name)


def _check_checkpoints(run: Run, name: str) -> Check:
    """Every checkpoint that has a manifest is whole; one without was torn or is being deleted, and counts for nothing."""
    check = Check(subject=f"checkpoints of {name}", promise="whole, as their manifests list them")
    folder = f"{run.training_folder(name)}/checkpoints"
    for step in run.folders(folder):
        url = run.path(f"{folder}/{step}/manifest.json")
        try:
            record = orjson.loads(read_bytes(url))
            files = record["files"]
            if record["fingerprint"] != fingerprint([record["step"], files]):
                check.fail(f"{url} does not match its fingerprint; it was edited or damaged")
                continue
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError) as error:
            check.fail(f"{url} is not the manifest of a checkpoint ({error})")
            continue
        for file in files:
            check.count += 1
            part = Part(path=f"{folder}/{step}/{file['path']}", rows=0, bytes=file["bytes"], sha256=file["sha256"])
            with check.guarded():
                read_part(run.url, part)
    return check
