"""Counts of a scoring: every row of the plan in features or in rejects, every window once, curvature row by row."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import pyarrow as pa

from lehr.verify.files import Manifests
from lehr.verify.findings import Check
from schemas.ids import sample_id
from schemas.parquet import read_footer, read_table
from schemas.run import Run
from schemas.units import Plan, WorkUnit

_PLACE = ("path", "row", "window")
_CHARACTERS = ("char_start", "char_end")


def check_plan(plan: Plan) -> Check:
    """Units of one file never share a row, and each has its own id."""
    check = Check(subject="plan", promise="units are distinct and never share a row", unit="units")
    check.count = len(plan.units)
    for identity, count in Counter(unit.unit_id for unit in plan.units).items():
        if count > 1:
            check.fail(f"plan.parquet lists unit {identity} {count} times")
    by_path: dict[str, list[WorkUnit]] = defaultdict(list)
    for unit in plan.units:
        by_path[unit.path].append(unit)
    for path, units in by_path.items():
        units.sort(key=lambda unit: unit.row_start)
        for before, after in itertools.pairwise(units):
            if before.row_start + before.row_count > after.row_start:
                check.fail(f"plan.parquet: units {before.unit_id} and {after.unit_id} share rows of {path}")
    return check


def _listed(manifests: Manifests, stage: str, name: str, folder: str) -> dict[str, str]:
    """Path by unit id of every part that a manifest lists below `folder`."""
    prefix = f"{folder}/part-"
    return {
        part.path.removeprefix(prefix).removesuffix(".parquet"): part.path
        for part in manifests[stage, name].parts
        if part.path.startswith(prefix)
    }


def check_scoring(
    run: Run, plan: Plan, manifests: Manifests, scoring: str, tick: Callable[[int], None]
) -> Iterator[Check]:
    """Rows and windows of one finished scoring against the plan, then its curvature columns."""
    features = _listed(manifests, "score", scoring, f"features/{scoring}")
    rejects = _listed(manifests, "score", scoring, f"rejects/{scoring}")
    yield _check_units(run, plan, scoring, {"features": features, "rejects": rejects})
    yield _check_rows(run, plan, scoring, features, rejects, tick)
    for stage, name in manifests:
        if stage == "curvature" and name.endswith(f".{scoring}"):
            target = name.removesuffix(f".{scoring}")
            curvature = _listed(manifests, "curvature", name, f"curvature/{target}/{scoring}")
            yield _check_units(run, plan, name, {"curvature": curvature})
            yield _check_curvature(run, name, features, curvature)


def _check_units(run: Run, plan: Plan, name: str, listed: dict[str, dict[str, str]]) -> Check:
    check = Check(subject=f"units of {name}", promise=f"each unit of the plan has {' and '.join(listed)}", unit="units")
    planned = {unit.unit_id: unit for unit in plan.units}
    check.count = len(planned)
    for kind, parts in listed.items():
        for identity, unit in planned.items():
            if identity not in parts:
                check.fail(
                    f"no {kind} part of unit {identity} ({unit.path} rows {unit.row_start}..{unit.row_start + unit.row_count - 1}) is listed"
                )
        for identity in sorted(set(parts) - set(planned)):
            check.fail(f"{run.path(parts[identity])} belongs to no unit of the plan; run `lehr score` again")
    return check


def _windows(table: pa.Table) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    for path, row, window in zip(*(table[name].to_pylist() for name in _PLACE)):
        found[path, row].append(window)
    return found


def _check_rows(
    run: Run,
    plan: Plan,
    scoring: str,
    features: dict[str, str],
    rejects: dict[str, str],
    tick: Callable[[int], None],
) -> Check:
    check = Check(
        subject=f"rows of {scoring}", promise="every corpus row in features or rejects, every window once", unit="rows"
    )
    for unit in plan.units:
        tick(unit.row_count)
        if unit.unit_id not in features or unit.unit_id not in rejects:
            continue
        with check.guarded():
            _check_unit_rows(run, unit, features[unit.unit_id], rejects[unit.unit_id], check)
    return check


def _check_unit_rows(run: Run, unit: WorkUnit, features: str, rejects: str, check: Check) -> None:
    columns = ("sample_id", *_PLACE, *_CHARACTERS)
    samples = read_table(run.path(features), schema="features", columns=columns)
    refused = read_table(run.path(rejects), schema="rejects", columns=_PLACE)
    scored, rejected, known = _windows(samples), _windows(refused), len(check.problems)
    wanted = {(unit.path, row) for row in range(unit.row_start, unit.row_start + unit.row_count)}
    check.count += len(wanted)
    for table, url in ((scored, run.path(features)), (rejected, run.path(rejects))):
        for path, row in sorted(set(table) - wanted):
            check.fail(f"{url}: row {row} of {path} does not belong to this unit")
    lost = sorted(wanted - set(scored) - set(rejected))
    if lost:
        rows = ", ".join(str(row) for _, row in lost[:10])
        check.fail(
            f"{run.path(features)}: {len(lost)} rows of {unit.path} are neither in features nor in rejects: {rows}"
        )
    for path, row in sorted(wanted & (set(scored) | set(rejected))):
        seen = scored.get((path, row), []) + rejected.get((path, row), [])
        for window, count in Counter(seen).items():
            if count > 1:
                check.fail(f"{run.path(features)}: window {window} of {path} row {row} is listed {count} times")
        gap = sorted(set(range(max(seen) + 1)) - set(seen))
        if gap:
            check.fail(
                f"{run.path(features)}: windows {gap} of {path} row {row} are neither in features nor in rejects"
            )
    _check_tiling(samples, run.path(features), check)
    for identity, path, row, window in zip(*(samples[name].to_pylist() for name in ("sample_id", *_PLACE))):
        if identity != sample_id(run.corpus, path, row, window):
            check.fail(f"{run.path(features)}: sample_id {identity} is not that of {path} row {row} window {window}")
    made = read_footer(run.path(features))[0].notes.get("windows")
    # What is missing at the end of a document has no name; what has one is named already.
    if len(check.problems) == known and made is not None and made != samples.num_rows + refused.num_rows:
        check.fail(
            f"{run.path(features)}: {made} rows and windows of {unit.path} were read, {samples.num_rows} are in features and "
            f"{refused.num_rows} in rejects"
        )


def _check_tiling(samples: pa.Table, url: str, check: Check) -> None:
    """Windows of a document follow one another character by character."""
    places = {
        (path, row, window): (start, end)
        for path, row, window, start, end in zip(*(samples[name].to_pylist() for name in (*_PLACE, *_CHARACTERS)))
    }
    for (path, row, window), (start, end) in places.items():
        before = places.get((path, row, window - 1)) if window else (0, 0)
        if end <= start or (before is not None and before[1] != start):
            check.fail(f"{url}: window {window} of {path} row {row} does not begin where the one before it ends")


def _check_curvature(run: Run, name: str, features: dict[str, str], curvature: dict[str, str]) -> Check:
    check = Check(subject=f"rows of {name}", promise="curvature has the samples of features, in order", unit="samples")
    for identity, path in curvature.items():
        if identity not in features:
            continue
        with check.guarded():
            of_features = read_table(run.path(features[identity]), schema="features", columns=("sample_id",))
            of_curvature = read_table(run.path(path), schema="curvature", columns=("sample_id",))
            check.count += of_features.num_rows
            if not of_features["sample_id"].equals(of_curvature["sample_id"]):
                check.fail(f"{run.path(path)} does not hold the samples of {features[identity]}, row by row")
    return check
