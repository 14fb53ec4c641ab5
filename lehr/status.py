"""How far a run is: stages finished, units done and missing, speed, time left, the last error of any worker."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

from lehr.catalog import in_flow
from schemas.declared import read_declared
from schemas.errors import LehrError
from schemas.manifest import Manifest
from schemas.parquet import read_footer
from schemas.run import Run
from schemas.storage import list_names
from schemas.timings import Heartbeat, estimate_ratio, read_heartbeats
from schemas.units import PLAN_NAME, Plan, read_plan

LIVE_S = 60.0
"""A worker that has said nothing for longer than this many seconds counts as gone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """What the workers of one stage last said, taken together."""

    live: int
    """Workers heard of within the last minute."""
    gone: int
    """Workers not heard of since."""
    hosts: tuple[str, ...]
    tokens_per_second: float | None
    """Sum over the live workers; None where none is live or none has finished two batches."""
    last_error: str
    last_error_host: str
    seconds_since_heard: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringStatus:
    """How much of the plan one scoring has done."""

    scoring: str
    finished: bool
    """Whether its manifest stands."""
    units_done: int
    units_total: int
    samples: int
    rejected: int
    """Rows of the rejects tables: rows, and windows of rows, that could not be scored."""
    tokens_planned: int
    tokens_left: int
    """Estimated tokens of the units that are missing, put right by how many those had that are done."""
    seconds_left: float | None
    """At the present speed; None where nobody is working."""
    missing: tuple[str, ...]
    """Units that are missing, in the order of the plan."""
    workers: WorkerStatus


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparisonStatus:
    """How far a comparison is that has been declared and not been judged."""

    name: str
    trained: int
    """Trainings that have finished."""
    trainings: int
    workers: WorkerStatus


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One finished stage."""

    stage: str
    name: str
    parts: int
    rows: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Everything `lehr status` says."""

    url: str
    corpus: str
    root: str
    units: int
    rows: int
    tokens: int
    """Estimated tokens of the plan."""
    stages: tuple[StageStatus, ...]
    scorings: tuple[ScoringStatus, ...]
    comparisons: tuple[ComparisonStatus, ...]
    """Those that have not been judged yet."""
    working: tuple[tuple[str, str, WorkerStatus], ...]
    """(stage, name, workers) of other stages whose workers have spoken and whose manifest does not stand."""
    problems: tuple[str, ...]
    """What could not be read."""


def worker_status(beats: list[Heartbeat], now: float) -> WorkerStatus:
    """Heartbeats of one stage, taken together at time `now` (Unix seconds).

    An error counts only if it is of the latest attempt: a command that was run again has overcome the earlier ones.
    """
    # A word from further in the future than that was said before a clock was set back, and nobody has spoken since.
    live = [beat for beat in beats if abs(now - beat.updated) <= LIVE_S]
    speeds = [speed for beat in live if (speed := beat.tokens_per_second)]
    latest = max(beats, key=lambda beat: beat.updated, default=None)
    failed = [beat for beat in beats if beat.last_error and latest and beat.attempt == latest.attempt]
    last = max(failed, key=lambda beat: beat.updated, default=None)
    return WorkerStatus(
        live=len(live),
        gone=len(beats) - len(live),
        hosts=tuple(sorted({beat.host for beat in beats})),
        tokens_per_second=sum(speeds) if speeds else None,
        last_error=last.last_error if last else "",
        last_error_host=f"{last.host} process {last.pid}" if last else "",
        seconds_since_heard=min((max(0.0, now - beat.updated) for beat in beats), default=None),
    )


def _rows_below(run: Run, manifest: Manifest | None, folder: str, units: list[str]) -> int:
    """Rows of the parts of `units` below `folder`: as listed by the manifest, or as their footers say."""
    if manifest is not None:
        return sum(part.rows for part in manifest.parts if part.path.startswith(f"{folder}/"))
    return sum(read_footer(run.path(f"{folder}/part-{unit}.parquet"))[1] for unit in units)


def _scoring(run: Run, plan: Plan, name: str, manifest: Manifest | None, now: float) -> ScoringStatus:
    standing = [
        {file.removeprefix("part-").removesuffix(".parquet") for file in list_names(run.path(folder), ".parquet")}
        for folder in (f"features/{name}", f"rejects/{name}")
    ]
    done = [unit for unit in plan.units if all(unit.unit_id in names for names in standing)]
    missing = [unit for unit in plan.units if not all(unit.unit_id in names for names in standing)]
    # A manifest of another plan does not count the units of this one.
    of_this_plan = manifest is not None and not missing and manifest.inputs.get("plan") == plan.fingerprint
    listed = manifest if of_this_plan else None
    identities = [unit.unit_id for unit in done]
    beats = read_heartbeats(run, "score", name)
    workers = worker_status(beats, now)
    left = round(sum(unit.estimated_tokens for unit in missing) * estimate_ratio(beats))
    return ScoringStatus(
        scoring=name,
        finished=of_this_plan,
        units_done=len(done),
        units_total=len(plan.units),
        samples=_rows_below(run, listed, f"features/{name}", identities),
        rejected=_rows_below(run, listed, f"rejects/{name}", identities),
        tokens_planned=plan.tokens,
        tokens_left=left,
        seconds_left=left / workers.tokens_per_second if left and workers.tokens_per_second else None,
        missing=tuple(f"{unit.unit_id} {unit.path} rows {unit.row_start}+{unit.row_count}" for unit in missing),
        workers=workers,
    )


def _is_finished(stage: str, name: str, manifests: Mapping[tuple[str, str], Manifest]) -> bool:
    """Whether a manifest of this name stands, or of a generation of it."""
    return any(key[0] == stage and (key[1] == name or key[1].startswith(f"{name}.")) for key in manifests)


def run_status(run: Run, now: float | None = None) -> RunStatus:
    """Look at a run from any machine that can read it; takes no lock and writes nothing."""
    now = time.time() if now is None else now
    problems: list[str] = []
    manifests: list[Manifest] = []
    for stage in in_flow(run.folders("stages")):
        try:
            manifests += run.manifests(stage)
        except LehrError as error:
            problems.append(str(error))
    by_key = {(manifest.stage, manifest.name): manifest for manifest in manifests}
    plan: Plan | None = None
    if ("plan", PLAN_NAME) in by_key:
        try:
            plan = read_plan(run)
        except LehrError as error:
            problems.append(str(error))
    scorings = []
    names = {name for stage, name in by_key if stage in ("scoring", "score")} | set(run.folders("features"))
    for name in sorted(names):
        if plan is None:
            break
        try:
            scorings.append(_scoring(run, plan, name, by_key.get(("score", name)), now))
        except LehrError as error:
            problems.append(str(error))
    comparisons = []
    for name in run.folders("comparisons"):
        if ("compare", name) in by_key:
            continue
        try:
            declared = read_declared(run.path(f"{run.comparison_folder(name)}/spec.json"), "comparison")["trainings"]
        except (LehrError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        comparisons.append(
            ComparisonStatus(
                name=name,
                trained=sum(("train", training) in by_key for _, _, training in declared),
                trainings=len(declared),
                workers=worker_status(read_heartbeats(run, "compare", name), now),
            )
        )
    working = [
        (stage, name, worker_status(beats, now))
        for stage in run.folders("timings")
        for name in run.folders(f"timings/{stage}")
        if stage not in ("score", "compare")
        and not _is_finished(stage, name, by_key)
        and (beats := read_heartbeats(run, stage, name))
    ]
    return RunStatus(
        url=run.url,
        corpus=run.corpus,
        root=run.root,
        units=len(plan.units) if plan else 0,
        rows=plan.rows if plan else 0,
        tokens=plan.tokens if plan else 0,
        stages=tuple(
            StageStatus(
                stage=manifest.stage,
                name=manifest.name,
                parts=len(manifest.parts),
                rows=sum(part.rows for part in manifest.parts),
                bytes=sum(part.bytes for part in manifest.parts),
            )
            for manifest in manifests
        ),
        scorings=tuple(scorings),
        comparisons=tuple(comparisons),
        working=tuple(working),
        problems=tuple(problems),
    )


def status_json(status: RunStatus) -> dict[str, Any]:
    """The status as JSON types."""
    record = dataclasses.asdict(status)
    record["working"] = [{"stage": stage, "name": name, **workers} for stage, name, workers in record["working"]]
    return record
