"""The job of each stage with settings that nobody reads until a worker runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipelines.export import ExportJob, _ExportSettings
from pipelines.score import ScoreJob, ScoreSettings
from pipelines.scoring import ModelLocation
from pipelines.target import _Chunk, _TargetJob, _TargetSettings
from schemas.spec import PlanSpec
from schemas.units import WorkUnit

_RUN, _RESULTS = "gs://lehr-test-bucket/run", "gs://lehr-test-bucket/run/timings/results.json"
_LOCATION = ModelLocation(model="gs://lehr-test-bucket/model")
_PLAN = PlanSpec(corpus="tiny")
_UNITS = tuple(
    WorkUnit(
        unit_id=f"{number:032x}",
        path=f"part-{number}.parquet",
        format="parquet",
        byte_start=0,
        byte_end=1000,
        row_start=0,
        row_count=10,
        source_fingerprint="0" * 32,
        estimated_tokens=100,
    )
    for number in range(3)
)


def _score(hints: Mapping[str, str]) -> ScoreJob:
    settings = ScoreSettings(run_url=_RUN, scoring="base", location=_LOCATION, plan_spec=_PLAN, targets=("target",))
    return ScoreJob(settings=settings, units=_UNITS, results_url=_RESULTS, hints=hints)


def _target(hints: Mapping[str, str]) -> _TargetJob:
    settings = _TargetSettings(run_url=_RUN, scoring="base", target="target", location=_LOCATION)
    chunks = tuple(_Chunk(part="reference", index=number, samples=()) for number in range(3))
    return _TargetJob(settings=settings, chunks=chunks, results_url=_RESULTS, hints=hints)


def _export(hints: Mapping[str, str]) -> ExportJob:
    settings = _ExportSettings(
        run_url=_RUN,
        scoring="base",
        location=_LOCATION,
        plan_spec=_PLAN,
        stream="s",
        folder="streams/s/gen-000001",
        shard_samples=10,
    )
    return ExportJob(settings=settings, elements=tuple((unit, ()) for unit in _UNITS), results_url=_RESULTS)


JOBS: dict[str, Callable[[Mapping[str, str]], Any]] = {"score": _score, "target": _target, "export": _export}
