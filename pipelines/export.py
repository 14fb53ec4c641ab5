"""From selection and corpus to ranked WebDataset shards, best first, with the target and the evaluation set beside them.

Workers read only the work units that hold selected rows; a shuffle by rank range brings the samples of a shard together.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import apache_beam as beam
from apache_beam.utils.shared import Shared

from pipelines.geometry import read_target
from pipelines.options import Execution, ScoringOptions
from pipelines.readers import read_unit
from pipelines.results import GatherResults, read_results, results_url
from pipelines.runners import model_hints, refuse_unreachable, run_job
from pipelines.scorer import load_encoder
from pipelines.scoring import ModelLocation, scoring_spec
from schemas.errors import CorruptFile, InputError, LehrError, RunIncomplete, SourceChanged
from schemas.fingerprint import plain
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Part, decode_table, read_part
from schemas.run import Run, check_name
from schemas.sample import Row, Sample
from schemas.shards import (
    RankedSample,
    ShardEntry,
    StreamIndex,
    encode_record,
    encode_shard,
    index_bytes,
    read_index,
)
from schemas.spec import PlanSpec
from schemas.storage import exists, list_names, sha256, write_whole
from schemas.timings import HeartbeatWriter
from schemas.units import WorkUnit, read_plan

_SELECTION_COLUMNS = (
    "sample_id",
    "content_id",
    "path",
    "row",
    "window",
    "tokens",
    "loss_tokens",
    "rank",
    "selected",
    "selection_weight",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Wanted:
    """One selected sample, as the selection names it."""

    sample_id: str
    content_id: str
    row: int
    window: int
    rank: int
    selection_weight: float
    tokens: int
    loss_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ExportSettings:
    run_url: str
    scoring: str
    location: ModelLocation
    plan_spec: PlanSpec
    stream: str
    folder: str
    shard_samples: int
    attempt: str = ""

    def shard_name(self, number: int) -> str:
        return f"shard-{number:06d}.tar"


class _UnitReader:
    """Finds selected samples in the corpus again; needs the tokenizer, never the model."""

    def __init__(self, settings: _ExportSettings) -> None:
        self._settings = settings
        self._run = Run.open(settings.run_url)
        self._encoder = load_encoder(self._run.scoring(settings.scoring), settings.location)
        self._heart = HeartbeatWriter(self._run, "export", settings.stream, attempt=settings.attempt)
        self._one_at_a_time = threading.Lock()

    def read(self, unit: WorkUnit, wanted: tuple[_Wanted, ...]) -> list[RankedSample]:
        """The wanted samples of a unit. Raises `SourceChanged` naming file and row where a text is not the scored one."""
        with self._one_at_a_time:
            return self._read(unit, wanted)

    def _read(self, unit: WorkUnit, wanted: tuple[_Wanted, ...]) -> list[RankedSample]:
        self._heart.unit(unit.unit_id)
        rows = {item.row for item in wanted}
        found: dict[tuple[int, int], Sample] = {}
        for item in read_unit(self._run.root, unit, self._settings.plan_spec):
            if isinstance(item, Row) and item.row in rows:
                for made in self._encoder.samples(item, self._run.corpus):
                    if isinstance(made, Sample):
                        found[made.row, made.window] = made
        samples = []
        for place in wanted:
            sample = found.get((place.row, place.window))
            if sample is None or sample.content_id != place.content_id:
                raise SourceChanged(
                    f"{unit.path} row {place.row}: the text is not the one that was scored (content_id {place.content_id[:12]} "
                    f"expected, {sample.content_id[:12] if sample else 'nothing'} found); run `lehr plan --extend` and score again"
                )
            samples.append(
                RankedSample(
                    sample=sample,
                    rank=place.rank,
                    selection_weight=place.selection_weight,
                    tokens=place.tokens,
                    loss_tokens=place.loss_tokens,
                )
            )
            self._heart.tokens(place.tokens)
        self._heart.unit_done()
        return samples


class _ReadSelected(beam.DoFn):
    """(unit, wanted) in, (shard number, (rank, JSON, domain, tokens)) out; an error goes to shard -1 as text."""

    def __init__(self, settings: _ExportSettings, shared: Shared) -> None:
        self._settings = settings
        self._shared = shared

    def setup(self) -> None:
        settings = self._settings
        self._reader = self._shared.acquire(lambda: _UnitReader(settings))

    def process(
        self, element: tuple[WorkUnit, tuple[_Wanted, ...]]
    ) -> Iterator[tuple[int, tuple[int, bytes, str, int]]]:
        unit, wanted = element
        try:
            samples = self._reader.read(unit, wanted)
        except LehrError as error:
            yield -1, (0, str(error).encode(), unit.path, 0)
            return
        for ranked in samples:
            value = (ranked.rank, encode_record(ranked), ranked.sample.domain, ranked.tokens)
            yield ranked.rank // self._settings.shard_samples, value


class _WriteShard(beam.DoFn):
    """All samples of one rank range in, the shard on storage and its index entry out."""

    def __init__(self, settings: _ExportSettings) -> None:
        self._settings = settings

    def process(self, element: tuple[int, Iterable[tuple[int, bytes, str, int]]]) -> Iterator[dict[str, Any]]:
        number, values = element
        if number < 0:
            yield {"key": "error", "error": "\n".join(sorted({value[1].decode() for value in values})[:3])}
            return
        entry = _write_shard(self._settings, self._settings.shard_name(number), sorted(values))
        yield {"key": entry.name, "entry": plain(entry)}


def _write_shard(settings: _ExportSettings, name: str, values: list[tuple[int, bytes, str, int]]) -> ShardEntry:
    domains = Counter(domain for _, _, domain, _ in values)
    members = [(rank, data) for rank, data, _, _ in values]
    body, entry = encode_shard(name, members, dict(domains), sum(tokens for _, _, _, tokens in values))
    write_whole(f"{Run.open(settings.run_url).path(settings.folder)}/{name}", body)
    return entry


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportJob:
    """The export pipeline: units with selected rows -> samples -> shards by rank range -> index entries."""

    settings: _ExportSettings
    elements: tuple[tuple[WorkUnit, tuple[_Wanted, ...]], ...]
    results_url: str

    def build(self, pipeline: beam.Pipeline) -> None:
        (
            pipeline
            | "Units" >> beam.Create(list(self.elements))
            | "ReadSelected" >> beam.ParDo(_ReadSelected(self.settings, Shared()))
            | "ByRankRange" >> beam.GroupByKey()
            | "WriteShard" >> beam.ParDo(_WriteShard(self.settings))
            | "Gather" >> GatherResults(self.results_url)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """A finished generation of a stream."""

    stream: str
    generation: int
    url: str
    index: StreamIndex


def export(
    run: Run,
    selection: str,
    execution: Execution,
    *,
    stream: str = "",
    shard_samples: int = 4096,
    options: ScoringOptions | None = None,
    attempt: str = "",
    on_start: Callable[[int], None] = lambda tokens: None,
    tick: Callable[[], None] = lambda: None,
) -> ExportReport:
    """Write the selection as a generation of `stream` (its own name by default).

    The same selection again gives the same generation, byte for byte; a changed one gives the next generation.
    Raises `SourceChanged` naming file and row where a text no longer matches its `content_id`.
    """
    if shard_samples < 1:
        raise InputError(f"shard_samples must be positive, not {shard_samples}")
    refuse_unreachable(run, execution)
    if model_hints(execution):
        raise InputError("export runs no model, so it has no use for --accelerator and --min-ram")
    stream = check_name("stream", stream or selection)
    chosen = run.manifest("select", selection)
    plan = read_plan(run)
    scoring, target = chosen.spec["scoring"], chosen.spec["target"]
    spec, location = scoring_spec(run, scoring, options or ScoringOptions())
    inputs = {"select": chosen.fingerprint, "plan": plan.fingerprint}
    stream_spec = {"stream": stream, "selection": selection, "shard_samples": shard_samples}
    generation = _generation(run, stream, {**stream_spec}, inputs)
    settings = _ExportSettings(
        run_url=run.url,
        scoring=scoring,
        location=location,
        plan_spec=plan.spec,
        stream=stream,
        folder=run.stream_folder(stream, generation),
        shard_samples=shard_samples,
        attempt=attempt,
    )
    wanted = _wanted(run, chosen.parts)
    elements = _by_unit(plan.units, wanted)
    count = sum(len(items) for _, items in elements)
    on_start(sum(item.tokens for _, items in elements for item in items))
    shards = _run_shards(run, settings, elements, count, execution, tick)
    beside = _write_beside(run, settings, target, scoring) if target else {"target": (), "evaluation": ()}
    index = StreamIndex(
        stream=stream,
        generation=generation,
        selection=selection,
        encoding=plain(spec.encoding),
        tokenizer=spec.tokenizer,
        shards=shards,
        target=beside["target"],
        evaluation=beside["evaluation"],
    )
    data = index_bytes(index)
    write_whole(run.path(f"{settings.folder}/index.json"), data)
    parts = [Part(path=f"{settings.folder}/index.json", rows=index.rows, bytes=len(data), sha256=sha256(data))]
    for folder, entries in (("", shards), ("target/", index.target), ("eval/", index.evaluation)):
        for entry in entries:
            path = f"{settings.folder}/{folder}{entry.name}"
            parts.append(Part(path=path, rows=entry.rows, bytes=entry.bytes, sha256=entry.sha256))
    manifest = Manifest(
        stage="export",
        name=f"{stream}.gen-{generation:06d}",
        spec={**stream_spec, "generation": generation},
        inputs=inputs,
        parts=tuple(parts),
        summary={"rows": index.rows, "tokens": index.tokens, "shards": len(shards)},
    )
    write_manifest(run.path(run.manifest_path("export", manifest.name)), manifest)
    return ExportReport(
        stream=stream,
        generation=generation,
        url=run.path(settings.folder),
        index=read_index(run.path(settings.folder)),
    )


def _generation(run: Run, stream: str, spec: dict[str, Any], inputs: dict[str, str]) -> int:
    """The generation that holds exactly this export, or the next free one."""
    found = [manifest for manifest in run.manifests("export") if manifest.spec["stream"] == stream]
    for manifest in found:
        if dict(manifest.inputs) == inputs and all(manifest.spec[name] == value for name, value in spec.items()):
            return int(manifest.spec["generation"])
    return max((int(manifest.spec["generation"]) for manifest in found), default=0) + 1


def _wanted(run: Run, parts: tuple[Part, ...]) -> dict[str, list[_Wanted]]:
    wanted: dict[str, list[_Wanted]] = {}
    for part in parts:
        if not part.path.endswith(".parquet"):
            continue
        table = decode_table(read_part(run.url, part), run.path(part.path), schema="selection")[0]
        table = table.select(_SELECTION_COLUMNS).filter(table["selected"])
        for record in table.to_pylist():
            path = record.pop("path")
            record.pop("selected")
            wanted.setdefault(path, []).append(_Wanted(**record))
    return wanted


def _by_unit(
    units: tuple[WorkUnit, ...], wanted: dict[str, list[_Wanted]]
) -> tuple[tuple[WorkUnit, tuple[_Wanted, ...]], ...]:
    """Units that hold selected rows, each with them; raises `CorruptFile` for a row that no planned unit holds."""
    elements = []
    placed = 0
    for unit in units:
        end = unit.row_start + unit.row_count
        items = tuple(item for item in wanted.get(unit.path, ()) if unit.row_start <= item.row < end)
        if items:
            elements.append((unit, items))
            placed += len(items)
    total = sum(len(items) for items in wanted.values())
    if placed != total:
        raise CorruptFile(f"{total - placed} selected samples are in no work unit of the plan; score and select again")
    return tuple(elements)


def _run_shards(
    run: Run,
    settings: _ExportSettings,
    elements: tuple[tuple[WorkUnit, tuple[_Wanted, ...]], ...],
    count: int,
    execution: Execution,
    tick: Callable[[], None],
) -> tuple[ShardEntry, ...]:
    url = results_url(run, "export", settings.stream)
    job = ExportJob(settings=settings, elements=elements, results_url=url)
    folder = run.path(settings.folder)
    run_job(job, execution, finished=lambda: len(list_names(folder, ".tar")), tick=tick)
    records = read_results(url)
    if "error" in records:
        raise SourceChanged(records["error"]["error"])
    shards = []
    for number in range((count + settings.shard_samples - 1) // settings.shard_samples):
        record = records.get(settings.shard_name(number))
        if record is None or not exists(f"{folder}/{settings.shard_name(number)}"):
            raise RunIncomplete(f"{settings.shard_name(number)} is not written; run the same command again")
        entry = dict(record["entry"])
        entry["offsets"] = tuple((int(start), int(size)) for start, size in entry["offsets"])
        shards.append(ShardEntry(**entry))
    if sum(shard.rows for shard in shards) != count:
        raise RunIncomplete("the shards hold fewer samples than the selection; run the same command again")
    return tuple(shards)


def _write_beside(run: Run, settings: _ExportSettings, target: str, scoring: str) -> dict[str, tuple[ShardEntry, ...]]:
    """Target and evaluation samples in the stream's own format, so that a trainer needs no corpus reader."""
    data = read_target(run, target, scoring, run.scoring(scoring))
    written: dict[str, tuple[ShardEntry, ...]] = {}
    for name, part, folder in (("target", "reference", "target"), ("evaluation", "evaluation", "eval")):
        values = []
        for rank, (sample, (tokens, loss_tokens)) in enumerate(zip(data.samples[part], data.tokens[part])):
            record = encode_record(RankedSample(sample=sample, rank=rank, tokens=tokens, loss_tokens=loss_tokens))
            values.append((rank, record, sample.domain, tokens))
        beside = dataclasses.replace(settings, folder=f"{settings.folder}/{folder}")
        written[name] = tuple(
            _write_shard(
                beside,
                settings.shard_name(start // settings.shard_samples),
                values[start : start + settings.shard_samples],
            )
            for start in range(0, len(values), settings.shard_samples)
        )
    return written
