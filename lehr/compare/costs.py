"""What the arms of a comparison cost: operations by formula, seconds where workers and trainings left them."""

from __future__ import annotations

import dataclasses
from typing import Any

import orjson

from lehr.audit import Audit
from lehr.compare.arms import Arm
from schemas.errors import LehrError
from schemas.run import Run
from schemas.storage import exists, read_bytes
from schemas.timings import read_heartbeats
from selection_ops.flops import ModelSize

SECONDS_FILE = "seconds.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """Sums over the steps of a training; None where its timings are gone."""

    seconds: float | None
    selection_seconds: float | None
    flops: float | None
    selection_flops: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineCost:
    """What a stream took before any training; a random selection needs no scoring."""

    flops: float | None
    """None where the run does not say what the stream was made from."""
    seconds: dict[str, float]
    """By stage, of those whose workers or command said so."""


def training_costs(audit: Audit, names: set[str]) -> dict[str, TrainingCost]:
    """Costs by training: of a step, the slowest process's seconds, and the operations of all, which each of them states."""
    listed = ", ".join(f"'{name}'" for name in sorted(names))
    rows = audit.query(
        f"""SELECT training, sum(s) AS seconds, sum(c) AS selection_seconds, sum(f) AS flops, sum(g) AS selection_flops FROM (
            SELECT training, step, max(seconds - evaluation_seconds) AS s, max(selection_seconds) AS c, max(flops) AS f,
            max(selection_flops) AS g FROM timings WHERE training IN ({listed}) GROUP BY training, step ORDER BY training, step
            ) GROUP BY training"""
    ).to_pylist()
    found = {row.pop("training"): TrainingCost(**row) for row in rows}
    nothing = TrainingCost(seconds=None, selection_seconds=None, flops=None, selection_flops=None)
    return {name: found.get(name, nothing) for name in names}


def offline_cost(run: Run, audit: Audit, arm: Arm, size: ModelSize, model: str) -> OfflineCost:
    """Scoring, target, selection and export of the arm's stream. `size` is that of `model`, a fingerprint; a scorer that is another
    model is taken at all its parameters, without attention."""
    index = arm.index
    made = _manifest_spec(run, "export", f"{index.stream}.gen-{index.generation:06d}")
    chosen = _manifest_spec(run, "select", str(made.get("selection", "")))
    if not chosen or made.get("selection") != index.selection or "/" in arm.settings.stream:
        return OfflineCost(flops=None, seconds={})
    scoring, target = str(chosen["scoring"]), str(chosen["target"])
    seconds = {"export": _busy(run, "export", index.stream), "select": _select_seconds(run, index.selection)}
    flops = 0.0
    if chosen["settings"]["selector"] != "random":
        declared = run.manifest("scoring", scoring)
        if declared.spec["model"] != model:
            parameters = int(declared.summary["parameters"])
            size = ModelSize(parameters=parameters, trained_parameters=parameters, attention=0)
        seconds["score"] = _busy(run, "score", scoring)
        sums = "sum(tokens)::DOUBLE AS tokens, sum(tokens::DOUBLE * tokens) AS squares"
        questions = [f"SELECT {sums} FROM features WHERE scoring = '{scoring}'"]
        if target:
            seconds["target"] = _busy(run, "target", f"{target}.{scoring}")
            questions.append(f"SELECT {sums} FROM target_samples WHERE scoring = '{scoring}' AND target = '{target}'")
        for question in questions:
            (row,) = audit.query(question).to_pylist()
            flops += size.scored_sums(row["tokens"] or 0.0, row["squares"] or 0.0)
    return OfflineCost(flops=flops, seconds={stage: taken for stage, taken in seconds.items() if taken})


def _manifest_spec(run: Run, stage: str, name: str) -> dict[str, Any]:
    if not name or not exists(run.path(run.manifest_path(stage, name))):
        return {}
    return run.manifest(stage, name).spec


def _busy(run: Run, stage: str, name: str) -> float:
    """Seconds of all workers of all attempts, without loading a model."""
    return sum(beat.busy_s for beat in read_heartbeats(run, stage, name))


def _select_seconds(run: Run, selection: str) -> float:
    try:
        return float(
            orjson.loads(read_bytes(run.path(f"{run.timings_folder('select', selection)}/{SECONDS_FILE}")))["total"]
        )
    except (FileNotFoundError, LehrError, ValueError, KeyError, TypeError):
        return 0.0  # a selection that an earlier version made, or seconds that were deleted
