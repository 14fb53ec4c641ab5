"""Scoring a corpus: one work unit in, one shard of features, rejects and curvature columns out, written by the worker.

What already stands and is sound is kept, so a cancelled job resumes for the price of its unfinished units; a target that
was described later gets its columns from the stored sketches, without the model.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.utils.shared import Shared

from pipelines.curvature import CurvatureView
from pipelines.geometry import read_target
from pipelines.keep import settle_keep
from pipelines.options import Execution, Keep, ScoringOptions
from pipelines.readers import read_unit
from pipelines.results import GatherResults, read_results, results_url
from pipelines.runners import model_hints, refuse_unreachable, run_job
from pipelines.scorer import SampleScorer, scored_columns
from pipelines.scoring import ModelLocation, scoring_spec
from schemas.errors import CorruptFile, InputError, LehrError, RunIncomplete
from schemas.fingerprint import plain
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Footer, Part, decode_table, encode_table, part_of, rows_to_table, write_table
from schemas.run import Run
from schemas.sample import Reject, Row, Sample
from schemas.spec import PlanSpec
from schemas.storage import exists, list_names, read_bytes, sha256, sweep_temporary, write_whole
from schemas.tables import table_schema
from schemas.timings import HeartbeatWriter
from schemas.units import Plan, WorkUnit, read_plan

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What a worker needs to score any unit of a run."""

    run_url: str
    scoring: str
    location: ModelLocation
    plan_spec: PlanSpec
    targets: tuple[str, ...]
    keep: str = ""
    """Fingerprint of what was declared to be stored without sketches; empty where sketches are stored."""
    attempt: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ScoredUnit:
    """A unit as the model has just scored it."""

    samples: list[Sample]
    features: pa.Table
    """With sketches, whether or not they will be stored."""
    rejects: pa.Table
    tokens: int
    notes: Mapping[str, int]


class UnitScorer:
    """Scores work units in one process; model, tokenizer and targets are loaded at first use and kept."""

    def __init__(self, settings: ScoreSettings) -> None:
        self.settings = settings
        self.run = Run.open(settings.run_url)
        self.spec = self.run.scoring(settings.scoring)
        self._scorer = SampleScorer(self.run, settings.scoring, settings.location, "candidate")
        self._views: dict[str, CurvatureView] = {}
        self._failed: LehrError | None = None
        self._one_at_a_time = threading.Lock()
        self._listed = _listed_hashes(self.run, settings)
        self._heart = HeartbeatWriter(self.run, "score", settings.scoring, attempt=settings.attempt)

    def finish(self, unit: WorkUnit) -> dict[str, Any]:
        """Make sure that every part of `unit` stands; returns its record for the driver, which holds errors as text.

        Threads of a process take turns: they share one model.
        """
        with self._one_at_a_time:
            return self._attempt(unit)

    def _attempt(self, unit: WorkUnit) -> dict[str, Any]:
        try:
            if self._failed is not None:
                raise self._failed
            record = self._finish(unit)
        except LehrError as error:
            if type(error) is InputError:
                self._failed = error  # a model or target that cannot be loaded fails every unit alike
            self._heart.error(str(error))
            return {"key": unit.unit_id, "error": str(error), "error_type": type(error).__name__}
        self._heart.unit_done(planned_tokens=unit.estimated_tokens if record["scored_tokens"] else 0)
        return record

    def _finish(self, unit: WorkUnit) -> dict[str, Any]:
        settings, inputs = self.settings, {"unit": unit.unit_id}
        self._heart.unit(unit.unit_id)
        features_path = self.run.features_path(settings.scoring, unit.unit_id)
        rejects_path = self.run.rejects_path(settings.scoring, unit.unit_id)
        lineage = {**inputs, "keep": settings.keep} if settings.keep else inputs
        features = self._existing(features_path, "features", lineage)
        rejects = self._existing(rejects_path, "rejects", inputs)
        curvature = {} if features is None else self._curvature(unit, features[1])
        unwritten, scored = b"", None
        if features is None or rejects is None or (settings.keep and len(curvature) < len(settings.targets)):
            scored = self._score(unit)
            if features is None or rejects is None:
                footer = Footer(schema="rejects", spec=self.spec.fingerprint, inputs=inputs)
                rejects = scored.rejects, write_table(self.run.url, rejects_path, scored.rejects, footer)
                table = scored.features.drop_columns(["sketch"]) if settings.keep else scored.features
                footer = Footer(schema="features", spec=self.spec.fingerprint, inputs=lineage, notes=scored.notes)
                unwritten = encode_table(table, footer)
                features = table, part_of(features_path, table, unwritten)
                curvature = self._curvature(unit, features[1])
            elif not scored.features["sample_id"].equals(features[0]["sample_id"]):
                raise CorruptFile(
                    f"{self.run.path(features_path)} holds other samples than {unit.path} gives now; delete it and run again"
                )
        for target in settings.targets:
            if target not in curvature:
                if scored is None:
                    vectors, samples = features[0], self._texts(unit, features[0])
                else:
                    vectors, samples = scored.features, scored.samples
                path, made_from = self._curvature_place(unit, target, features[1])
                footer = Footer(schema="curvature", spec=self.spec.fingerprint, inputs=made_from)
                table = self._view(target).table(vectors, samples)
                curvature[target] = table, write_table(self.run.url, path, table, footer)
        if unwritten:
            # Features last: a unit counts as scored when they stand, and without sketches nothing else could be made from them.
            write_whole(self.run.path(features_path), unwritten)
        parts = {"features": features[1], "rejects": rejects[1]}
        parts |= {f"curvature/{target}": part for target, (_, part) in curvature.items()}
        return {
            "key": unit.unit_id,
            "parts": {name: plain(part) for name, part in parts.items()},
            "samples": features[0].num_rows,
            "tokens": int(pc.sum(features[0]["tokens"]).as_py() or 0),
            "rejects": dict(Counter(rejects[0]["reason"].to_pylist())),
            "overlapping": {
                target: int(pc.sum(table["overlapping"]).as_py() or 0) for target, (table, _) in curvature.items()
            },
            "scored_tokens": 0 if scored is None else scored.tokens,
        }

    def _score(self, unit: WorkUnit) -> ScoredUnit:
        samples, refused = self._samples(unit)
        scored = self._scorer.score(samples, self._heart.tokens)
        schema = table_schema("features", self.spec.sketch_size)
        return ScoredUnit(
            samples=list(scored.samples),
            features=pa.table(scored_columns(scored, schema), schema=schema),
            rejects=rejects_table([*refused, *scored.rejects]),
            tokens=int(scored.tokens_N.sum()),
            # What reading and encoding gave, so that `lehr verify` sees what was lost behind them.
            notes={"batch_halvings": scored.batch_halvings, "windows": len(samples) + len(refused)},
        )

    def _curvature_place(self, unit: WorkUnit, target: str, features: Part) -> tuple[str, dict[str, str]]:
        """Path and lineage of the curvature columns of a unit."""
        lineage = {"unit": unit.unit_id, "target": self._view(target).target.fingerprint, "features": features.sha256}
        return self.run.curvature_path(target, self.settings.scoring, unit.unit_id), lineage

    def _curvature(self, unit: WorkUnit, features: Part) -> dict[str, tuple[pa.Table, Part]]:
        """The curvature columns that stand, by target."""
        found = {}
        for target in self.settings.targets:
            path, lineage = self._curvature_place(unit, target, features)
            standing = self._existing(path, "curvature", lineage, replace_mixed=True)
            if standing is not None:
                found[target] = standing
        return found

    def _view(self, target: str) -> CurvatureView:
        if target not in self._views:
            self._views[target] = CurvatureView(read_target(self.run, target, self.settings.scoring, self.spec))
        return self._views[target]

    def _existing(
        self, path: str, schema: str, inputs: dict[str, str], *, replace_mixed: bool = False
    ) -> tuple[pa.Table, Part] | None:
        url = self.run.path(path)
        try:
            data = read_bytes(url)
        except FileNotFoundError:
            return None
        if self._listed.get(path, sha256(data)) != sha256(data):
            log.warning("made again: %s differs from its manifest", url)
            return None
        try:
            table, footer = decode_table(data, url, schema=schema, spec=self.spec.fingerprint)
        except CorruptFile as error:
            log.warning("made again: %s", error)
            return None
        if dict(footer.inputs) != inputs:
            if replace_mixed:
                return None  # the target was described anew, or the features were made again
            raise CorruptFile(f"{url} was made from {dict(footer.inputs)}, not {inputs}; delete it and run again")
        return table, Part(path=path, rows=table.num_rows, bytes=len(data), sha256=sha256(data))

    def _samples(self, unit: WorkUnit) -> tuple[list[Sample], list[Reject]]:
        samples: list[Sample] = []
        rejects: list[Reject] = []
        for item in read_unit(self.run.root, unit, self.settings.plan_spec):
            if isinstance(item, Row):
                for made in self._scorer.encoder.samples(item, self.run.corpus):
                    (samples if isinstance(made, Sample) else rejects).append(made)  # type: ignore[arg-type]
            else:
                rejects.append(item)
        return samples, rejects

    def _texts(self, unit: WorkUnit, features: pa.Table) -> list[Sample]:
        found = {sample.sample_id: sample for sample in self._samples(unit)[0]}
        try:
            return [found[sample_id] for sample_id in features["sample_id"].to_pylist()]
        except KeyError as error:
            raise CorruptFile(
                f"{unit.path}: sample {error} of the stored features is not in the corpus any more; plan and score again"
            ) from error


def _listed_hashes(run: Run, settings: ScoreSettings) -> dict[str, str]:
    """Hashes that finished stages listed: they see damage that page checksums do not cover."""
    names = [
        ("score", settings.scoring),
        *(("curvature", f"{target}.{settings.scoring}") for target in settings.targets),
    ]
    finished = [name for name in names if exists(run.path(run.manifest_path(*name)))]
    return {part.path: part.sha256 for name in finished for part in run.manifest(*name).parts}


def rejects_table(rejects: list[Reject]) -> pa.Table:
    """Rejects as a table, in corpus order."""
    ordered = sorted(rejects, key=lambda reject: (reject.path, reject.row, reject.window, reject.reason))
    return rows_to_table("rejects", [dataclasses.asdict(reject) for reject in ordered])


class ScoreUnit(beam.DoFn):
    """A work unit in, its record out."""

    def __init__(self, settings: ScoreSettings, shared: Shared) -> None:
        self._settings = settings
        self._shared = shared

    def setup(self) -> None:
        settings = self._settings
        self._scorer = self._shared.acquire(lambda: UnitScorer(settings))

    def process(self, element: WorkUnit) -> Iterator[dict[str, Any]]:
        yield self._scorer.finish(element)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreJob:
    """The scoring pipeline: units -> score -> records."""

    settings: ScoreSettings
    units: tuple[WorkUnit, ...]
    results_url: str
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Resource hints of the step that runs the model."""

    def build(self, pipeline: beam.Pipeline) -> None:
        (
            pipeline
            | "Units" >> beam.Create(list(self.units))
            | "ScoreUnit" >> beam.ParDo(ScoreUnit(self.settings, Shared())).with_resource_hints(**self.hints)
            | "Gather" >> GatherResults(self.results_url)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreReport:
    """What a scoring run found; `complete` says whether the whole plan stands."""

    scoring: str
    complete: bool
    units: int
    units_total: int
    samples: int
    tokens: int
    rejects: dict[str, int]
    overlapping: dict[str, int]
    targets: tuple[str, ...]
    coverage: dict[str, Any]


def parse_share(text: str) -> tuple[int, int]:
    """`i/n` as (index from 0, count): `1/4` is the first quarter of the plan."""
    try:
        index, count = (int(piece) for piece in text.split("/"))
    except ValueError:
        raise InputError(f"--units {text!r} must look like i/n, for example 1/4 for the first quarter") from None
    if not 1 <= index <= count:
        raise InputError(f"--units {text!r}: i must lie in 1..n")
    return index - 1, count


def score(
    run: Run,
    scoring: str,
    options: ScoringOptions,
    execution: Execution,
    *,
    keep: Keep | None = None,
    share: tuple[int, int] = (0, 1),
    attempt: str = "",
    on_start: Callable[[Plan, tuple[WorkUnit, ...]], None] = lambda plan, units: None,
    tick: Callable[[], None] = lambda: None,
) -> ScoreReport:
    """Score the plan, or a fixed share of it, and write the stage's manifests when the whole plan stands.

    `keep` says what is stored of the features; left out, what the scoring was declared with, or everything.
    Raises `RunIncomplete` where units are missing at the end, and the units' own error where one failed.
    """
    refuse_unreachable(run, execution)
    plan = read_plan(run)
    _, location = scoring_spec(run, scoring, options)
    held = settle_keep(run, scoring, keep)
    targets = tuple(manifest.spec["target"] for manifest in run.targets(scoring))
    sweep_temporary(run.url)
    settings = ScoreSettings(
        run_url=run.url,
        scoring=scoring,
        location=location,
        plan_spec=plan.spec,
        targets=targets,
        keep="" if held is None else held.fingerprint,
        attempt=attempt,
    )
    units = plan.share(*share)
    on_start(plan, units)
    records = _run_units(run, settings, units, execution, tick)
    if share != (0, 1) and _standing(run, scoring, targets, plan.units) == len(plan.units):
        records = _run_units(run, settings, plan.units, execution, tick)  # reads and checks; computes nothing
    complete = len(records) == len(plan.units)
    if complete:
        _write_manifests(run, settings, plan, records)
    declared = run.manifest("scoring", scoring)
    rejects: Counter[str] = Counter()
    for record in records.values():
        rejects.update(record["rejects"])
    return ScoreReport(
        scoring=scoring,
        complete=complete,
        units=len(records),
        units_total=len(plan.units),
        samples=sum(record["samples"] for record in records.values()),
        tokens=sum(record["tokens"] for record in records.values()),
        rejects=dict(rejects),
        overlapping={t: sum(record["overlapping"][t] for record in records.values()) for t in targets},
        targets=targets,
        coverage=declared.summary,
    )


def _run_units(
    run: Run,
    settings: ScoreSettings,
    units: tuple[WorkUnit, ...],
    execution: Execution,
    tick: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    if not units:
        return {}
    url = results_url(run, "score", settings.scoring)
    job = ScoreJob(settings=settings, units=units, results_url=url, hints=model_hints(execution))
    run_job(
        job,
        execution,
        model_bytes=run.manifest("scoring", settings.scoring).summary["weight_bytes"],
        finished=lambda: _standing(run, settings.scoring, settings.targets, units),
        tick=tick,
    )
    records = read_results(url)
    failed = [records[unit.unit_id] for unit in units if records.get(unit.unit_id, {}).get("error")]
    if failed:
        raise _failure(failed, len(units))
    missing = [unit for unit in units if unit.unit_id not in records]
    standing = _standing(run, settings.scoring, settings.targets, units)
    if missing or standing < len(units):
        raise RunIncomplete(
            f"{len(units) - min(standing, len(units) - len(missing))} of {len(units)} work units are not finished; "
            "run the same command again to resume"
        )
    return {unit.unit_id: records[unit.unit_id] for unit in units}


def _failure(failed: list[dict[str, Any]], total: int) -> LehrError:
    distinct = list(dict.fromkeys(record["error"] for record in failed))
    more = f"\n(and {len(distinct) - 3} more)" if len(distinct) > 3 else ""
    return LehrError(
        f"{len(failed)} of {total} work units failed; the others are kept.\n" + "\n".join(distinct[:3]) + more
    )


def _standing(run: Run, scoring: str, targets: tuple[str, ...], units: tuple[WorkUnit, ...]) -> int:
    """How many units have all their parts on storage."""
    folders = [f"features/{scoring}", f"rejects/{scoring}", *(f"curvature/{target}/{scoring}" for target in targets)]
    names = [set(list_names(run.path(folder), ".parquet")) for folder in folders]
    return sum(all(f"part-{unit.unit_id}.parquet" in found for found in names) for unit in units)


def _write_manifests(run: Run, settings: ScoreSettings, plan: Plan, records: dict[str, dict[str, Any]]) -> None:
    scoring = settings.scoring
    ordered = [records[unit.unit_id] for unit in plan.units]
    declared = run.manifest("scoring", scoring)
    rejects: Counter[str] = Counter()
    for record in ordered:
        rejects.update(record["rejects"])
    manifest = Manifest(
        stage="score",
        name=scoring,
        spec=declared.spec,
        inputs={
            "plan": plan.fingerprint,
            "scoring": declared.fingerprint,
            **({"keep": settings.keep} if settings.keep else {}),
        },
        parts=tuple(Part(**record["parts"][kind]) for kind in ("features", "rejects") for record in ordered),
        summary={
            "units": len(ordered),
            "rows": plan.rows,
            "samples": sum(record["samples"] for record in ordered),
            "tokens": sum(record["tokens"] for record in ordered),
            "rejects": dict(sorted(rejects.items())),
        },
    )
    write_manifest(run.path(run.manifest_path("score", scoring)), manifest)
    for target in settings.targets:
        described = run.manifest("target", f"{target}.{scoring}")
        write_manifest(
            run.path(run.manifest_path("curvature", f"{target}.{scoring}")),
            Manifest(
                stage="curvature",
                name=f"{target}.{scoring}",
                spec={"scoring": scoring, "target": target},
                inputs={"score": manifest.fingerprint, "target": described.fingerprint},
                parts=tuple(Part(**record["parts"][f"curvature/{target}"]) for record in ordered),
                summary={"overlapping": sum(record["overlapping"][target] for record in ordered)},
            ),
        )
