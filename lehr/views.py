"""Artifacts of a run as Arrow datasets and tables that a query engine can scan."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.dataset as ds

from lehr.catalog import TABLE_VIEWS, Source, sources, stage_manifests, stream_folders
from schemas.errors import CorruptFile
from schemas.parquet import Footer, check_footer, parse_footer, read_table, same_spec
from schemas.ranged import arrow_filesystem
from schemas.run import Run
from schemas.shards import read_index
from schemas.storage import join, read_bytes
from schemas.tables import table_schema
from schemas.timings import Heartbeat, read_heartbeats

_OPEN_AT_ONCE = 16
_STR = pa.string()
_INT = pa.int64()

RECORD_VIEWS: dict[str, tuple[pa.Schema, str]] = {
    "manifests": (
        pa.schema(
            [
                ("stage", _STR),
                ("name", _STR),
                ("fingerprint", _STR),
                ("parts", _INT),
                ("rows", _INT),
                ("bytes", _INT),
                ("spec", _STR),
                ("summary", _STR),
            ]
        ),
        "every finished stage; spec and summary are JSON",
    ),
    "inputs": (
        pa.schema([("stage", _STR), ("name", _STR), ("input", _STR), ("fingerprint", _STR), ("made_by", _STR)]),
        "what every finished stage was made from",
    ),
    "parts": (
        pa.schema([("stage", _STR), ("name", _STR), ("path", _STR), ("rows", _INT), ("bytes", _INT), ("sha256", _STR)]),
        "every file that a manifest lists",
    ),
    "solutions": (
        pa.schema([("selection", _STR), ("section", _STR), ("key", _STR), ("value", pa.float64()), ("text", _STR)]),
        "certificates, diagnostics, counts and warnings of every selection, one value a row",
    ),
    "shards": (
        pa.schema(
            [
                ("stream", _STR),
                ("generation", _INT),
                ("selection", _STR),
                ("part", _STR),
                ("shard", _STR),
                ("rows", _INT),
                ("tokens", _INT),
                ("rank_first", _INT),
                ("rank_last", _INT),
                ("bytes", _INT),
                ("sha256", _STR),
                ("domains", pa.map_(_STR, _INT)),
            ]
        ),
        "every shard of every stream; part is ranked, target or evaluation",
    ),
    "stream_entries": (
        pa.schema(
            [
                ("stream", _STR),
                ("generation", _INT),
                ("selection", _STR),
                ("part", _STR),
                ("shard", _STR),
                ("position", _INT),
                ("rank", _INT),
                ("byte_offset", _INT),
                ("bytes", _INT),
            ]
        ),
        "every sample of every stream: in which shard, at which bytes",
    ),
    "workers": (
        pa.schema(
            [
                ("stage", _STR),
                ("name", _STR),
                ("host", _STR),
                ("pid", _INT),
                ("started", pa.float64()),
                ("updated", pa.float64()),
                ("attempt", _STR),
                ("unit", _STR),
                ("units_done", _INT),
                ("tokens_done", _INT),
                ("last_error", _STR),
            ]
        ),
        "what every worker process last said; times are Unix seconds",
    ),
}
"""View name: its schema and what it holds."""


def view_names() -> list[str]:
    """Every view there is."""
    return [*TABLE_VIEWS, *RECORD_VIEWS]


def describe_view(view: str) -> str:
    """What a view holds, in a line."""
    return TABLE_VIEWS[view][2] if view in TABLE_VIEWS else RECORD_VIEWS[view][1]


def view_schema(view: str) -> pa.Schema:
    """Columns of a view: the name columns first, then those of the table. Vectors have no fixed length, since scorings differ."""
    if view in RECORD_VIEWS:
        return RECORD_VIEWS[view][0]
    schema_name, names, _ = TABLE_VIEWS[view]
    fields = [pa.field(name, _STR, nullable=False) for name in names]
    for field in table_schema(schema_name, 1) if schema_name in _VECTORS else table_schema(schema_name):
        is_vector = pa.types.is_fixed_size_list(field.type)
        fields.append(pa.field(field.name, pa.list_(pa.float32()) if is_vector else field.type))
    return pa.schema(fields)


_VECTORS = ("features", "target_samples", "spectrum")


class TableView:
    """A table view over every file that feeds it, opened as one dataset with page checksums verified."""

    def __init__(self, run: Run, view: str) -> None:
        self.run = run
        self.view = view
        self.sources = sources(run, view)
        self.dataset = self._open()

    @property
    def running(self) -> list[Source]:
        """Sources whose stage has not finished."""
        return [source for source in self.sources if not source.finished]

    def _open(self) -> ds.Dataset:
        schema = view_schema(self.view)
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        file_format = ds.ParquetFileFormat(default_fragment_scan_options=options)
        arrow_fs, root = arrow_filesystem(self.run.url)
        fragments = []
        for source in self.sources:
            constant: ds.Expression | None = None
            for name, value in source.names.items():
                equal = ds.field(name) == value
                constant = equal if constant is None else constant & equal
            own = [file_format.make_fragment(join(root, path), arrow_fs, constant) for path in source.paths]
            with ThreadPoolExecutor(_OPEN_AT_ONCE) as pool:
                footers = list(pool.map(self._footer, own, source.paths))
            same_spec(zip(source.paths, footers))
            fragments += own
        if not fragments:
            return ds.dataset(schema.empty_table())
        return ds.FileSystemDataset(fragments, schema, file_format, arrow_fs)

    def _footer(self, fragment: ds.ParquetFileFragment, path: str) -> Footer:
        url = self.run.path(path)
        try:
            metadata = {**(fragment.physical_schema.metadata or {}), **(fragment.metadata.metadata or {})}
        except FileNotFoundError as error:
            raise CorruptFile(f"{url} is listed in a manifest but missing; run its stage again") from error
        except (pa.ArrowException, OSError) as error:
            raise CorruptFile(
                f"{url}: not a readable Parquet file ({error}); delete it and run its stage again"
            ) from error
        footer = parse_footer(metadata, url)
        check_footer(footer, url, schema=TABLE_VIEWS[self.view][0], spec=None, inputs={})
        return footer

    def find_damage(self) -> None:
        """Read every file and raise `CorruptFile` naming the first that cannot be read."""
        for source in self.sources:
            for path in source.paths:
                read_table(self.run.path(path), schema=TABLE_VIEWS[self.view][0])


def _text(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


def _manifest_records(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "stage": manifest.stage,
            "name": manifest.name,
            "fingerprint": manifest.fingerprint,
            "parts": len(manifest.parts),
            "rows": sum(part.rows for part in manifest.parts),
            "bytes": sum(part.bytes for part in manifest.parts),
            "spec": _text(manifest.spec),
            "summary": _text(manifest.summary),
        }
        for manifest in stage_manifests(run)
    ]


def _input_records(run: Run) -> list[dict[str, Any]]:
    manifests = stage_manifests(run)
    made_by = {manifest.fingerprint: f"{manifest.stage}/{manifest.name}" for manifest in manifests}
    for stream, folder in stream_folders(run):
        made_by[read_index(run.path(folder)).fingerprint] = f"stream/{stream} {folder.rsplit('/', 1)[1]}"
    return [
        {
            "stage": manifest.stage,
            "name": manifest.name,
            "input": name,
            "fingerprint": value,
            "made_by": made_by.get(value, "nothing that stands in this run"),
        }
        for manifest in manifests
        for name, value in sorted(manifest.inputs.items())
    ]


def _part_records(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "stage": manifest.stage,
            "name": manifest.name,
            "path": part.path,
            "rows": part.rows,
            "bytes": part.bytes,
            "sha256": part.sha256,
        }
        for manifest in stage_manifests(run)
        for part in manifest.parts
    ]


def read_solution(run: Run, selection: str) -> dict[str, Any]:
    """`solution.json` of a selection. Raises `CorruptFile` where it is missing or not JSON."""
    url = run.path(f"{run.selection_folder(selection)}/solution.json")
    try:
        record = json.loads(read_bytes(url))
    except FileNotFoundError as error:
        raise CorruptFile(f"{url} is missing; run `lehr select` again") from error
    except ValueError as error:
        raise CorruptFile(f"{url} is not JSON ({error}); delete it and run `lehr select` again") from error
    if not isinstance(record, dict):
        raise CorruptFile(f"{url} is not a JSON object; delete it and run `lehr select` again")
    return record


def flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(dotted key, leaf) pairs of nested JSON; lists keep their position as key."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            yield from flatten(item, f"{prefix}.{position}" if prefix else str(position))
    else:
        yield prefix, value


def _solution_records(run: Run) -> list[dict[str, Any]]:
    records = []
    for manifest in run.manifests("select"):
        for section, content in read_solution(run, manifest.name).items():
            for key, value in flatten(content):
                is_number = isinstance(value, int | float)
                records.append(
                    {
                        "selection": manifest.name,
                        "section": section,
                        "key": key,
                        "value": float(value) if is_number else None,
                        "text": value if isinstance(value, str) else _text(value),
                    }
                )
    return records


def _shard_records(run: Run, *, entries: bool) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for stream, folder in stream_folders(run):
        index = read_index(run.path(folder))
        for part, shards in (("ranked", index.shards), ("target", index.target), ("evaluation", index.evaluation)):
            for shard in shards:
                base = {
                    "stream": stream,
                    "generation": index.generation,
                    "selection": index.selection,
                    "part": part,
                    "shard": shard.name,
                }
                if entries:
                    records += [
                        {**base, "position": i, "rank": shard.rank_first + i, "byte_offset": offset, "bytes": size}
                        for i, (offset, size) in enumerate(shard.offsets)
                    ]
                else:
                    record = {
                        "rows": shard.rows,
                        "tokens": shard.tokens,
                        "rank_first": shard.rank_first,
                        "rank_last": shard.rank_last,
                        "bytes": shard.bytes,
                        "sha256": shard.sha256,
                        "domains": list(shard.domains.items()),
                    }
                    records.append({**base, **record})
    return records


def all_heartbeats(run: Run) -> list[tuple[str, str, Heartbeat]]:
    """(stage, name, heartbeat) of every worker of every stage."""
    return [
        (stage, name, beat)
        for stage in run.folders("timings")
        for name in run.folders(f"timings/{stage}")
        for beat in read_heartbeats(run, stage, name)
    ]


def _worker_records(run: Run) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "name": name,
            **{field: getattr(beat, field) for field in RECORD_VIEWS["workers"][0].names[2:]},
        }
        for stage, name, beat in all_heartbeats(run)
    ]


def record_view(run: Run, view: str) -> pa.Table:
    """The table of a view that is made from JSON files."""
    if view == "manifests":
        records = _manifest_records(run)
    elif view == "inputs":
        records = _input_records(run)
    elif view == "parts":
        records = _part_records(run)
    elif view == "solutions":
        records = _solution_records(run)
    elif view == "workers":
        records = _worker_records(run)
    else:
        records = _shard_records(run, entries=view == "stream_entries")
    return pa.Table.from_pylist(records, schema=RECORD_VIEWS[view][0])
