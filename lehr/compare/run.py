"""A comparison from arms to verdicts: train what is missing, evaluate what is guarded, judge, write the manifest last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import orjson
import torch

from lehr.audit import Audit
from lehr.compare.arms import Arm, CompareSettings, SharedSettings, open_arms
from lehr.compare.costs import SECONDS_FILE, OfflineCost, TrainingCost, offline_cost, training_costs
from lehr.compare.judge import arm_rows
from pipelines.target_data import read_samples
from schemas.declared import declare
from schemas.errors import InputError
from schemas.fingerprint import fingerprint, plain, pretty_json
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Footer, read_table, rows_to_table, write_table
from schemas.run import Run
from schemas.spec import CorpusColumns, EncodingSpec
from schemas.storage import exists, read_bytes, write_whole
from schemas.timings import HeartbeatWriter
from selection_ops.encoding import Encoded, Encoder
from selection_ops.flops import ModelSize, model_size
from selection_ops.losses import HeadRoute
from selection_ops.model import (
    choose_attention,
    default_dtype,
    load_model,
    load_tokenizer,
    model_fingerprint,
    quiet,
)
from trainer.batches import StepBatches
from trainer.evaluation import evaluate
from trainer.loggers import LoggerType
from trainer.loop import train
from trainer.parent import find_parent
from trainer.prepare import encode
from trainer.stream import read_beside

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished comparison."""

    manifest: Manifest
    arms: list[Row]
    """Rows of `arms`, the control first."""
    trainings: list[Row]
    """Rows of `arm_trainings`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """What is told while a comparison runs."""

    trainings: Callable[[int, int], None] = lambda done, total: None
    """Trainings finished, and how many there are."""
    console: Callable[[Arm], LoggerType | None] = lambda arm: None
    """What takes the place of the logger called console, for the training of an arm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
    """What every arm starts from."""

    shared: SharedSettings
    location: str
    revision: str | None
    fingerprint: str
    """Fingerprint of the model there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Judges:
    """What final models are judged on."""

    held_out: list[Encoded]
    guard: list[Encoded]
    guard_fingerprint: str


def compare(
    run: Run,
    settings: CompareSettings,
    *,
    guard: str = "",
    columns: CorpusColumns | None = None,
    watch: Watch | None = None,
    attempt: str = "",
) -> Comparison:
    """Train every arm under every seed as far as that has not been done, and judge them.

    Raises `InputError` where arms cannot be compared, where a comparison of the name was made otherwise, and where a training
    ended before its token budget.
    """
    watch = watch or Watch()
    start = _find_start(run, settings.shared)
    shared, model = start.shared, start.fingerprint
    arms = open_arms(run, settings, shared, model)
    judges = _judges(run, arms, start, guard, columns)
    name, spec = shared.name, _spec(settings, shared, arms, model, judges)
    folder = run.comparison_folder(name)
    declare(run.path(f"{folder}/spec.json"), "comparison", name, spec, follows=frozenset({"trainings", "streams"}))
    if exists(run.path(run.manifest_path("compare", name))):
        return read_comparison(run, name)
    heart = HeartbeatWriter(run, "compare", name, attempt=attempt)
    watch.trainings(0, len(arms))
    for number, arm in enumerate(arms, start=1):
        heart.unit(arm.settings.name)
        if not exists(run.path(run.manifest_path("train", arm.settings.name))):
            train(run, arm.settings, attempt=attempt, console=watch.console(arm))
        _check_budget(run, arm)
        heart.unit_done()
        watch.trainings(number, len(arms))
    return _judge(run, name, spec, arms, start, judges)


def _find_start(run: Run, shared: SharedSettings) -> _Start:
    """Where all arms start, with the arithmetic of this machine written out, so that arms trained on different machines are not paired."""
    location, revision, name = shared.model, shared.revision or None, ""
    if shared.start_from:
        parent = find_parent(run, shared.start_from)
        location, revision, name = parent.url, None, parent.name
    if not location:
        raise InputError(
            "name the model that every arm starts from with --model, or a training to branch off with --from"
        )
    device = shared.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = shared.dtype or default_dtype(device)
    attention = shared.attention or choose_attention(location, device, dtype, revision=revision)
    resolved = dataclasses.replace(shared, device=device, dtype=dtype, attention=attention, start_from=name)
    return _Start(
        shared=resolved,
        location=location,
        revision=revision,
        fingerprint=model_fingerprint(location, revision=revision),
    )


def _judges(run: Run, arms: list[Arm], start: _Start, guard: str, columns: CorpusColumns | None) -> _Judges:
    from trainer.prepare import open_stream

    tokenizer = load_tokenizer(start.location, revision=start.revision)
    encoder = Encoder(tokenizer, EncodingSpec(**arms[0].index.encoding))
    stream = open_stream(run, arms[0].settings)
    held_out = [encode(encoder, item) for item in read_beside(stream.url, stream.index, "evaluation")]
    if not guard:
        return _Judges(held_out=held_out, guard=[], guard_fingerprint="")
    samples, rejects = read_samples("guard", guard, columns or CorpusColumns(), encoder)
    if not samples:
        reasons = "; ".join(f"{r.path} row {r.row}: {r.reason} {r.detail}".strip() for r in rejects[:3])
        raise InputError(f"{guard}: no usable sample for the guard set ({reasons or 'it has no rows'})")
    return _Judges(
        held_out=held_out,
        guard=[encoder.encode(sample.text, sample.loss_spans) for sample in samples],
        guard_fingerprint=fingerprint([sample.content_id for sample in samples]),
    )


def _spec(
    settings: CompareSettings, shared: SharedSettings, arms: list[Arm], model: str, judges: _Judges
) -> dict[str, Any]:
    common = {
        name: value for name, value in shared.spec(model=model).items() if name not in ("stream", "policy", "seed")
    }
    spec = {
        **common,
        "arms": list(settings.labels),
        "control": settings.control,
        "seeds": list(settings.seeds),
        "interval": settings.interval,
        "level": settings.level,
        "margin": settings.margin,
        "tolerance": settings.tolerance,
        "guard": judges.guard_fingerprint,
        "streams": sorted({arm.index.fingerprint for arm in arms}),
        "trainings": [[arm.label, arm.seed, arm.settings.name] for arm in arms],
    }
    return plain(spec)


def _check_budget(run: Run, arm: Arm) -> None:
    summary = run.manifest("train", arm.settings.name).summary
    if summary["ended"] != "token budget":
        raise InputError(
            f"arm {arm.label!r}, seed {arm.seed}: training {arm.settings.name} ended with its {summary['ended']} after "
            f"{summary['trained_tokens']:,} of {arm.settings.token_budget:,} tokens, before its learning rate came to its end; lower "
            "--token-budget, raise --epochs, or export a larger selection"
        )


def _judge(run: Run, name: str, spec: dict[str, Any], arms: list[Arm], start: _Start, judges: _Judges) -> Comparison:
    shared = start.shared
    size, before = _measured(start, judges)
    inputs, trainings = {}, []
    with Audit(run) as audit:
        costs = training_costs(audit, {arm.settings.name for arm in arms})
        offline = {arm.label: offline_cost(run, audit, arm, size, start.fingerprint) for arm in reversed(arms)}
    for arm in arms:
        manifest = run.manifest("train", arm.settings.name)
        inputs[f"train/{arm.settings.name}"] = manifest.fingerprint
        cost = costs[arm.settings.name]
        trainings.append(
            {
                "arm": arm.label,
                "seed": arm.seed,
                "training": arm.settings.name,
                "eval_loss": manifest.summary["eval_loss"],
                "guard_loss": _guarded(run.path(manifest.summary["checkpoint"]), shared, judges),
                "trained_tokens": manifest.summary["trained_tokens"],
                "offered_tokens": manifest.summary["offered_tokens"],
                "steps": manifest.summary["steps"],
                "flops": cost.flops,
                "selection_flops": cost.selection_flops,
            }
        )
    rows = arm_rows(trainings, spec, {label: cost.flops for label, cost in offline.items()})
    folder, printed = run.comparison_folder(name), fingerprint(spec)
    parts = tuple(
        write_table(
            run.url, f"{folder}/{file}", rows_to_table(table, made), Footer(schema=table, spec=printed, inputs={})
        )
        for file, table, made in (
            ("arms.parquet", "arms", rows),
            ("trainings.parquet", "arm_trainings", trainings),
        )
    )
    summary = {"start": before, "verdicts": {row["arm"]: row["verdict"] for row in rows if not row["control"]}}
    seconds = {row["arm"]: _seconds(row["arm"], arms, costs, offline) for row in rows}
    write_whole(run.path(f"{run.timings_folder('compare', name)}/{SECONDS_FILE}"), pretty_json(seconds))
    manifest = Manifest(stage="compare", name=name, spec=spec, inputs=inputs, parts=parts, summary=summary)
    write_manifest(run.path(run.manifest_path("compare", name)), manifest)
    return Comparison(manifest=manifest, arms=rows, trainings=trainings)


def _load(location: str, revision: str | None, shared: SharedSettings) -> Any:
    with quiet():
        return load_model(
            location,
            revision=revision,
            dtype="float64" if shared.dtype == "float64" else "float32",
            attention=shared.attention,
            device=shared.device,
        ).model


def _measured(start: _Start, judges: _Judges) -> tuple[ModelSize, dict[str, float | None]]:
    """Size of the model that all arms start from, and its losses."""
    model = _load(start.location, start.revision, start.shared)
    return model_size(model), {
        "eval_loss": _loss(model, judges.held_out, start.shared),
        "guard_loss": _loss(model, judges.guard, start.shared),
    }


def _loss(model: Any, samples: list[Encoded], shared: SharedSettings) -> float | None:
    device = next(model.parameters()).device
    batches = StepBatches(batch_tokens=shared.batch_tokens, dtype=shared.dtype, device=device)
    return evaluate(HeadRoute(model), samples, batches)


def _guarded(checkpoint: str, shared: SharedSettings, judges: _Judges) -> float | None:
    if not judges.guard:
        return None
    return _loss(_load(checkpoint, None, shared), judges.guard, shared)


def _seconds(
    label: str, arms: list[Arm], costs: dict[str, TrainingCost], offline: dict[str, OfflineCost]
) -> dict[str, Any]:
    own = [costs[arm.settings.name] for arm in arms if arm.label == label]

    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return round(sum(known) / len(known), 3) if known else None

    return {
        "training": mean([cost.seconds for cost in own]),
        "selection": mean([cost.selection_seconds for cost in own]),
        "offline": {stage: round(seconds, 3) for stage, seconds in sorted(offline[label].seconds.items())},
    }


def read_seconds(run: Run, name: str) -> dict[str, Any]:
    """Seconds by arm of a finished comparison: of a training, of choosing in it, of the stages before; empty where they were deleted."""
    try:
        record = orjson.loads(read_bytes(run.path(f"{run.timings_folder('compare', name)}/{SECONDS_FILE}")))
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def read_comparison(run: Run, name: str) -> Comparison:
    """A finished comparison, as it was written."""
    manifest = run.manifest("compare", name)
    folder = run.comparison_folder(name)
    return Comparison(
        manifest=manifest,
        arms=read_table(run.path(f"{folder}/arms.parquet"), schema="arms").to_pylist(),
        trainings=read_table(run.path(f"{folder}/trainings.parquet"), schema="arm_trainings").to_pylist(),
    )
