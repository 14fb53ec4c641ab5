"""The candidates of a scoring, read from its parts: scalar columns as one table, sketches as one compact array.

Parts are read by as many threads as torch has. Sketches are decoded once, straight into float16 rows of one array, which is
memory where it fits and an unlinked file on local scratch where it does not; what is computed from them is the same.

Shape legend: N candidates, K sketch dimension.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch

from schemas.errors import InputError
from schemas.manifest import Manifest
from schemas.parquet import Part, decode_table, decode_vectors, part_buffer, read_columns
from schemas.run import Run
from schemas.spec import FeatureSpec, LossKind
from schemas.tables import GEOMETRY_COLUMNS, MEASURE_COLUMNS, OVERLAP_COLUMNS, PLACE_COLUMNS
from selection_ops.selectors import CandidateSet
from selection_ops.selectors.seconds import spent

MEMORY_SHARE = 0.5
"""Sketches stay in memory where they take at most this share of what is available."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pool:
    """What is known of every candidate."""

    columns: pa.Table
    """Scalar columns of features and, where there is a target, of curvature; a row per candidate, in corpus order."""
    unit_NK: torch.Tensor | None
    """Unit sketches as stored, float16; None where only columns were read."""


@spent("read")
def read_pool(
    run: Run, score: Manifest, curvature: Manifest | None, spec: FeatureSpec, *, columns_only: bool = False
) -> Pool:
    """Read every part of a scoring, and its curvature columns; lineage and checksums are verified, and hashes of the parts.

    `columns_only` leaves sketches on storage: their bytes are not read, so the hashes of the feature parts are not verified.
    Where the scoring was stored without sketches there are none to leave, and the hashes are verified.
    """
    parts = [part for part in score.parts if part.path.startswith("features/")]
    if not parts:
        raise InputError("the plan has no work units, so there is nothing to select from")
    unit_NK: torch.Tensor | None = None
    if "keep" in score.inputs:
        features = _all(lambda part: _read(run, part, "features", spec), parts)
    elif columns_only:
        names = [*PLACE_COLUMNS, *MEASURE_COLUMNS]
        features = _all(
            lambda part: read_columns(run.url, part, names, schema="features", spec=spec.fingerprint), parts
        )
    else:
        features, stored = _with_sketches(run, parts, spec)
        unit_NK = torch.from_numpy(stored)
    columns = pa.concat_tables(features)
    if curvature is not None:
        tables = _all(lambda part: _read(run, part, "curvature", spec), curvature.parts)
        columns = with_curvature(columns, pa.concat_tables(tables))
    return Pool(columns=columns, unit_NK=unit_NK)


def with_curvature(features: pa.Table, curvature: pa.Table) -> pa.Table:
    """Features with the columns of their curvature table beside them; refuses those of other rows."""
    if not features["sample_id"].equals(curvature["sample_id"]):
        raise InputError("curvature columns are not those of the features, row by row; run `lehr score` again")
    for name in (*GEOMETRY_COLUMNS, *OVERLAP_COLUMNS):
        features = features.append_column(name, curvature[name])
    return features


@spent("columns")
def candidate_set(
    features: pa.Table,
    *,
    loss: LossKind = "sum",
    keep_overlapping: bool = False,
    unit_NK: torch.Tensor | None = None,
) -> CandidateSet:
    """Candidates of a features table, with its curvature columns where it has them, and with `unit_NK` as their sketches.

    `loss` is that of the feature spec: losses and gradient norms of means are brought back to those of sums.
    """
    loss_tokens_N = features["loss_tokens"].to_numpy().astype(np.int64)
    per_mean_N = loss_tokens_N.astype(np.float64) if loss == "mean" else 1
    excluded = np.full(features.num_rows, "", dtype=object)
    if "overlapping" in features.column_names and not keep_overlapping:
        excluded[features["overlapping"].to_numpy()] = "overlap"
    columns = {name: features[name].to_numpy() for name in GEOMETRY_COLUMNS if name in features.column_names}
    return CandidateSet(
        sample_id=_strings(features["sample_id"]),
        content_id=_strings(features["content_id"]),
        domain=_names(features["domain"]),
        tokens_N=features["tokens"].to_numpy().astype(np.int64),
        loss_tokens_N=loss_tokens_N,
        loss_N=features["loss"].to_numpy() * per_mean_N,
        grad_norm_N=features["grad_norm"].to_numpy() * per_mean_N,
        norm_N=features["sketch_norm"].to_numpy(),
        unit_NK=unit_NK,
        excluded_N=excluded,
        **columns,
    )


def in_threads(work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """work(item) for every item, in order, by as many threads as torch has."""
    with ThreadPoolExecutor(max(1, min(torch.get_num_threads(), len(items)))) as pool:
        return list(pool.map(work, items))


def sketch_array(rows: int, width: int) -> np.ndarray:
    """An uninitialised float16 array [rows, width]: in memory, or in an unlinked scratch file where it takes too much."""
    bytes_needed = 2 * rows * width
    if bytes_needed <= MEMORY_SHARE * available_bytes():
        return np.empty((rows, width), np.float16)
    try:
        with tempfile.TemporaryFile(prefix="lehr-sketches-") as handle:
            os.posix_fallocate(handle.fileno(), 0, bytes_needed)
            return np.memmap(handle, np.float16, mode="r+", shape=(rows, width))
    except OSError as error:
        raise InputError(
            f"the sketches of {rows} candidates take {bytes_needed / 1e9:.1f} GB, more than memory allows, and scratch in "
            f"{tempfile.gettempdir()} has no room for them ({error.strerror}); set TMPDIR to a place that has, or select by "
            "columns alone"
        ) from error


def available_bytes() -> int:
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _all(read: Callable[[Part], pa.Table], parts: Sequence[Part]) -> list[pa.Table]:
    return in_threads(read, parts)


def _read(run: Run, part: Part, schema: str, spec: FeatureSpec) -> pa.Table:
    return decode_table(part_buffer(run.url, part), run.path(part.path), schema=schema, spec=spec.fingerprint)[0]


def _with_sketches(run: Run, parts: Sequence[Part], spec: FeatureSpec) -> tuple[list[pa.Table], np.ndarray]:
    starts = np.cumsum([0, *(part.rows for part in parts)])
    width = spec.sketch_size
    stored_NK = sketch_array(int(starts[-1]), width)

    def read(number: int) -> pa.Table:
        part, first = parts[number], int(starts[number])

        def store(row: int, numbers: pa.Array) -> None:
            rows = numbers.to_numpy().reshape(-1, width)
            stored_NK[first + row : first + row + len(rows)] = rows

        return decode_vectors(
            part_buffer(run.url, part), run.path(part.path), "sketch", store,
            schema="features", spec=spec.fingerprint, rows=part.rows, width=width,
        )  # fmt: skip

    return in_threads(read, range(len(parts))), stored_NK


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    """A text column as numpy text; ids of one length and of ASCII as the bytes they are, without an object each."""
    pieces = [_fixed(chunk) for chunk in column.chunks if len(chunk)]
    widths = {piece.dtype for piece in pieces if piece is not None}
    if pieces and all(piece is not None for piece in pieces) and len(widths) == 1:
        return np.concatenate(pieces)  # type: ignore[arg-type]
    return column.to_numpy()


def _fixed(chunk: pa.StringArray) -> np.ndarray | None:
    _, offsets_at, bytes_at = chunk.buffers()
    offsets = np.frombuffer(offsets_at, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
    width = int(offsets[1] - offsets[0])
    if width == 0 or bytes_at is None or np.any(np.diff(offsets) != width):
        return None
    letters = np.frombuffer(bytes_at, np.uint8)[offsets[0] : offsets[-1]]
    # numpy drops zeros at the end of a text, and letters beyond ASCII take more than a byte.
    if letters.max() > 127 or letters.min() == 0:
        return None
    return letters.view(f"S{width}")


def _names(column: pa.ChunkedArray) -> np.ndarray:
    """A text column of few values, as objects shared between equal ones."""
    coded = column.combine_chunks().dictionary_encode()
    if isinstance(coded, pa.ChunkedArray):
        coded = coded.combine_chunks()
    names = coded.dictionary.to_numpy(zero_copy_only=False)
    return names[coded.indices.to_numpy()] if len(names) else np.zeros(0, dtype=object)
