"""Describing a target: the small set that stands for what the model should become good at.

The driver reads, encodes and checks the samples (a target set is small); a pipeline scores them in chunks; the driver puts
the chunks together, decomposes the curvature and writes samples, spectrum and manifest.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import torch
from apache_beam.utils.shared import Shared

from pipelines.geometry import full_sketches, write_spectrum
from pipelines.keep import no_columns
from pipelines.options import Execution, ScoringOptions, TargetOptions
from pipelines.results import GatherResults, read_results, results_url
from pipelines.runners import model_hints, refuse_unreachable, run_job
from pipelines.scorer import SampleScorer, Scored, load_encoder, scored_columns
from pipelines.scoring import ModelLocation, scoring_spec
from pipelines.target_data import read_parts, refuse_overlap
from schemas.errors import CorruptFile, InputError, LehrError, RunIncomplete
from schemas.fingerprint import fingerprint, plain
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Footer, decode_table, write_table
from schemas.run import Run, check_name
from schemas.sample import Reject, Sample
from schemas.spec import FeatureSpec
from schemas.storage import exists, list_names, read_bytes
from schemas.tables import table_schema
from schemas.timings import HeartbeatWriter
from selection_ops.curvature import TargetGeometry, describe_target
from selection_ops.damping import damping_report

log = logging.getLogger(__name__)

CHUNK_SAMPLES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A few samples of one part of a target, scored together."""

    part: str
    index: int
    samples: tuple[Sample, ...]
    draws: int = 0
    """Times that labels are sampled; 0 keeps the samples' own."""

    @property
    def key(self) -> str:
        return f"{self.part}-{self.index:05d}-{fingerprint([sample.sample_id + sample.content_id for sample in self.samples])[:16]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TargetSettings:
    run_url: str
    scoring: str
    target: str
    location: ModelLocation
    attempt: str = ""

    def chunk_path(self, run: Run, key: str) -> str:
        return f"{run.target_folder(self.target, self.scoring)}/chunks/{key}.parquet"


class _ChunkScorer:
    """Scores chunks in one process."""

    def __init__(self, settings: _TargetSettings) -> None:
        self._settings = settings
        self._run = Run.open(settings.run_url)
        self._spec = self._run.scoring(settings.scoring)
        self._scorer = SampleScorer(self._run, settings.scoring, settings.location, "target")
        name = f"{settings.target}.{settings.scoring}"
        self._heart = HeartbeatWriter(self._run, "target", name, attempt=settings.attempt)
        self._one_at_a_time = threading.Lock()

    def finish(self, chunk: _Chunk) -> dict[str, Any]:
        try:
            with self._one_at_a_time:
                return self._finish(chunk)
        except LehrError as error:
            self._heart.error(str(error))
            return {"key": chunk.key, "error": str(error)}

    def _finish(self, chunk: _Chunk) -> dict[str, Any]:
        path = self._settings.chunk_path(self._run, chunk.key)
        if not _sound_chunk(self._run, path, self._spec):
            self._heart.unit(chunk.key)
            if chunk.draws:
                drawn = self._scorer.sampled_labels(chunk.samples, chunk.draws)
                scored = [self._scorer.score(chunk.samples, self._heart.tokens, labels) for labels in drawn]
            else:
                scored = [self._scorer.score(chunk.samples, self._heart.tokens)]
            table = pa.concat_tables(
                self._table(f"{chunk.part} {draw}" if chunk.draws else chunk.part, found)
                for draw, found in enumerate(scored)
            )
            # A draw without a gradient is a zero in the mean over draws, not a reject: the sample itself is none.
            rejects = [] if chunk.draws else scored[0].rejects
            notes = {"rejects": [plain(reject) for reject in rejects]}
            footer = Footer(
                schema="target_samples", spec=self._spec.fingerprint, inputs={"chunk": chunk.key}, notes=notes
            )
            write_table(self._run.url, path, table, footer)
        self._heart.unit_done()
        return {"key": chunk.key}

    def _table(self, part: str, scored: Scored) -> pa.Table:
        schema = table_schema("target_samples", self._spec.sketch_size)
        columns = {
            **scored_columns(scored, schema),
            "part": [part] * len(scored.samples),
            "text": [sample.text for sample in scored.samples],
            "loss_spans": [orjson.dumps(sample.loss_spans).decode() for sample in scored.samples],
        }
        return pa.table(columns, schema=schema)


def _sound_chunk(run: Run, path: str, spec: FeatureSpec) -> bool:
    try:
        decode_table(read_bytes(run.path(path)), run.path(path), schema="target_samples", spec=spec.fingerprint)
    except (FileNotFoundError, CorruptFile):
        return False
    return True


class _ScoreChunk(beam.DoFn):
    def __init__(self, settings: _TargetSettings, shared: Shared) -> None:
        self._settings = settings
        self._shared = shared

    def setup(self) -> None:
        settings = self._settings
        self._scorer = self._shared.acquire(lambda: _ChunkScorer(settings))

    def process(self, element: _Chunk) -> Iterator[dict[str, Any]]:
        yield self._scorer.finish(element)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TargetJob:
    settings: _TargetSettings
    chunks: tuple[_Chunk, ...]
    results_url: str
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def build(self, pipeline: beam.Pipeline) -> None:
        (
            pipeline
            | "Chunks" >> beam.Create(list(self.chunks))
            | "ScoreChunk" >> beam.ParDo(_ScoreChunk(self.settings, Shared())).with_resource_hints(**self.hints)
            | "Gather" >> GatherResults(self.results_url)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetReport:
    """A described target."""

    name: str
    scoring: str
    counts: dict[str, int]
    rejects: tuple[Reject, ...]
    geometry: dict[str, Any]
    damping: dict[str, Any]
    """A row per damping, and the recommended one with the reason (`selection_ops.damping`)."""
    coverage: dict[str, Any]
    fingerprint: str


def describe(
    run: Run,
    name: str,
    scoring: str,
    options: TargetOptions,
    scoring_options: ScoringOptions,
    execution: Execution,
    *,
    attempt: str = "",
    on_start: Callable[[int, int], None] = lambda samples, tokens: None,
    tick: Callable[[], None] = lambda: None,
) -> TargetReport:
    """Score a target set and write samples.parquet, spectrum.parquet and the manifest.

    Raises `InputError` where the evaluation set overlaps the target, where no sample can be used, or where a target of
    this name was described from other data.
    """
    check_name("target", name)
    refuse_unreachable(run, execution)
    spec, location = scoring_spec(run, scoring, scoring_options)
    encoder = load_encoder(spec, location)
    parts, rejects = read_parts(name, options, encoder)
    refuse_overlap(parts)
    target_spec = {
        "scoring": scoring,
        "target": name,
        "contrast": options.contrast,
        "energy": options.energy,
        "columns": plain(options.columns),
        "content": {
            part: fingerprint([[s.sample_id, s.content_id] for s in samples]) for part, samples in parts.items()
        },
        **_choices(options),
    }
    manifest_name = f"{name}.{scoring}"
    if exists(run.path(run.manifest_path("target", manifest_name))):
        before = run.manifest("target", manifest_name)
        if before.spec != target_spec:
            keys = {*before.spec, *target_spec}
            differing = sorted(key for key in keys if before.spec.get(key) != target_spec.get(key))
            raise InputError(
                f"target {name!r} was described before with other {', '.join(differing)}; give this one another name with --name"
            )
    held = run.keep(scoring)
    if held is not None and name not in held.spec["targets"]:
        raise InputError(no_columns(name, scoring, held))
    settings = _TargetSettings(run_url=run.url, scoring=scoring, target=name, location=location, attempt=attempt)
    chunks = tuple(
        _Chunk(part=part, index=number, samples=samples[start : start + CHUNK_SAMPLES])
        for part, samples in parts.items()
        for number, start in enumerate(range(0, len(samples), CHUNK_SAMPLES))
    )
    lengths = {
        part: [len(encoder.encode(s.text, s.loss_spans).ids) for s in samples] for part, samples in parts.items()
    }
    tokens = sum(map(sum, lengths.values()))
    if options.curvature == "gauss-newton":
        chunks += tuple(
            _Chunk(part=f"sampled-{options.draws}", index=number, samples=chunk.samples, draws=options.draws)
            for number, chunk in enumerate(chunk for chunk in chunks if chunk.part == "reference")
        )
        tokens += options.draws * sum(lengths["reference"])
    on_start(sum(map(len, lengths.values())), tokens)
    tables, score_rejects = _score_chunks(run, settings, chunks, execution, tick)
    rejects += score_rejects
    whole = pa.concat_tables(tables)
    table = whole.filter(pc.is_in(whole["part"], pa.array(list(parts))))
    sampled_MDK = _sampled(whole, options) if options.curvature == "gauss-newton" else None
    geometry = _geometry(table, name, options, sampled_MDK)
    damping = damping_report(geometry, sampled_MDK)
    return _write(run, name, scoring, spec, target_spec, table, geometry, damping, rejects)


def _choices(options: TargetOptions) -> dict[str, Any]:
    """What differs from the defaults of how curvature is estimated; targets of the defaults keep the spec they always had."""
    found: dict[str, Any] = {}
    if options.curvature != "centred":
        found["curvature"] = options.curvature
    if options.curvature == "gauss-newton":
        found["draws"] = options.draws
    if options.damping != 1.0:
        found["damping"] = options.damping
    return found


def _sampled(table: pa.Table, options: TargetOptions) -> torch.Tensor:
    """Sketches at sampled labels of every reference sample that was scored, [M, D, K]; zero where a draw has no gradient."""
    place = {
        sample_id: index
        for index, sample_id in enumerate(table.filter(pc.equal(table["part"], "reference"))["sample_id"].to_pylist())
    }
    sampled_MDK = torch.zeros(
        len(place), options.draws, table.schema.field("sketch").type.list_size, dtype=torch.float64
    )
    for draw in range(options.draws):
        rows = table.filter(pc.equal(table["part"], f"sampled-{options.draws} {draw}"))
        for sample_id, sketch_K in zip(rows["sample_id"].to_pylist(), full_sketches(rows)):
            if sample_id in place:
                sampled_MDK[place[sample_id], draw] = sketch_K
    return sampled_MDK


def _score_chunks(
    run: Run, settings: _TargetSettings, chunks: tuple[_Chunk, ...], execution: Execution, tick: Callable[[], None]
) -> tuple[list[pa.Table], list[Reject]]:
    folder = f"{run.target_folder(settings.target, settings.scoring)}/chunks"
    url = results_url(run, "target", f"{settings.target}.{settings.scoring}")
    job = _TargetJob(settings=settings, chunks=chunks, results_url=url, hints=model_hints(execution))
    run_job(
        job,
        execution,
        model_bytes=run.manifest("scoring", settings.scoring).summary["weight_bytes"],
        finished=lambda: len(list_names(run.path(folder), ".parquet")),
        tick=tick,
    )
    records = read_results(url)
    errors = list(dict.fromkeys(record["error"] for record in records.values() if record.get("error")))
    if errors:
        raise LehrError("\n".join(errors[:3]))
    tables, rejects = [], []
    for chunk in chunks:
        if chunk.key not in records:
            raise RunIncomplete(
                f"chunk {chunk.key} of target {settings.target!r} is not scored; run the same command again"
            )
        url = run.path(settings.chunk_path(run, chunk.key))
        table, footer = decode_table(read_bytes(url), url, schema="target_samples", inputs={"chunk": chunk.key})
        tables.append(table)
        rejects += [Reject(**record) for record in footer.notes["rejects"]]
    return tables, rejects


def _geometry(table: pa.Table, name: str, options: TargetOptions, sampled_MDK: torch.Tensor | None) -> TargetGeometry:
    reference = full_sketches(table.filter(pc.equal(table["part"], "reference")))
    if not len(reference):
        raise InputError(
            f"target {name!r}: every sample was rejected in scoring (NaN or infinite gradients): is the model sound?"
        )
    swapped = full_sketches(table.filter(pc.equal(table["part"], "swapped")))
    mean: torch.Tensor | None = swapped.mean(dim=0) if len(swapped) else None
    return describe_target(
        reference,
        energy=options.energy,
        swapped_mean_K=mean,
        curvature=options.curvature,
        sampled_MDK=sampled_MDK,
        damping_factor=options.damping,
    )


def _write(
    run: Run,
    name: str,
    scoring: str,
    spec: FeatureSpec,
    target_spec: dict[str, Any],
    table: pa.Table,
    geometry: TargetGeometry,
    damping: dict[str, Any],
    rejects: list[Reject],
) -> TargetReport:
    folder = run.target_folder(name, scoring)
    footer = Footer(schema="target_samples", spec=spec.fingerprint)
    samples_part = write_table(run.url, f"{folder}/samples.parquet", table, footer)
    spectrum_part = write_spectrum(run, folder, geometry, spec)
    declared = run.manifest("scoring", scoring)
    counts = {value["values"]: value["counts"] for value in pc.value_counts(table["part"]).to_pylist()}
    manifest = Manifest(
        stage="target",
        name=f"{name}.{scoring}",
        spec=target_spec,
        inputs={"scoring": declared.fingerprint},
        parts=(samples_part, spectrum_part),
        summary={
            "counts": counts,
            "geometry": geometry.summary(),
            "damping": damping,
            "rejects": [plain(reject) for reject in rejects],
        },
    )
    write_manifest(run.path(run.manifest_path("target", manifest.name)), manifest)
    return TargetReport(
        name=name,
        scoring=scoring,
        counts=counts,
        rejects=tuple(rejects),
        geometry=geometry.summary(),
        damping=damping,
        coverage=declared.summary,
        fingerprint=manifest.fingerprint,
    )
