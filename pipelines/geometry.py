"""A described target on storage: written once by `lehr target`, read by scoring, selection and export."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import torch

from schemas.parquet import Footer, Part, decode_table, read_part, write_table
from schemas.run import Run
from schemas.sample import Sample
from schemas.spec import FeatureSpec
from schemas.tables import table_schema
from selection_ops.curvature import Spectrum, TargetGeometry, rebuild_target

PARTS = ("reference", "evaluation", "swapped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetData:
    """Everything a target holds under one scoring."""

    name: str
    fingerprint: str
    """Fingerprint of the target's manifest."""
    geometry: TargetGeometry
    samples: dict[str, tuple[Sample, ...]]
    """Samples by part: reference, evaluation, swapped."""
    tokens: dict[str, tuple[tuple[int, int], ...]]
    """(tokens, loss tokens) of every sample, by part."""
    sketches: dict[str, torch.Tensor]
    """Full sketches [M, K] float64, by part."""


def write_spectrum(run: Run, folder: str, geometry: TargetGeometry, spec: FeatureSpec) -> Part:
    """Write `spectrum.parquet`: every spectrum, a row per eigenvalue above the floor."""
    spectra = [s for s in (geometry.centred, geometry.empirical, geometry.sampled) if s is not None]
    tables = [_spectrum_table(s, geometry) for s in spectra]
    notes: dict[str, Any] = {s.kind: _scalars(s) for s in spectra}
    notes["energy"], notes["floor"] = geometry.energy, geometry.floor
    if (geometry.curvature, geometry.damping_factor) != ("centred", 1.0):
        notes["curvature"], notes["damping_factor"] = geometry.curvature, geometry.damping_factor
    footer = Footer(schema="spectrum", spec=spec.fingerprint, notes=notes)
    return write_table(run.url, f"{folder}/spectrum.parquet", pa.concat_tables(tables), footer)


def _scalars(spectrum: Spectrum) -> dict[str, Any]:
    names = ("heldout_cost_sum", "heldout_cost_unit", "in_sample_cost_sum", "in_sample_cost_unit")
    values = {name: getattr(spectrum, name) for name in names}
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return {"k_star": spectrum.k_star, **finite}


def _spectrum_table(spectrum: Spectrum, geometry: TargetGeometry) -> pa.Table:
    schema = table_schema("spectrum", geometry.dimension)
    values = spectrum.values_J.numpy()
    total = values.sum()
    coordinates = (spectrum.vectors_JK @ geometry.mean_K).numpy()
    vectors = spectrum.vectors_JK.numpy().astype(np.float32).reshape(-1)
    return pa.table(
        {
            "fisher": [spectrum.kind] * len(values),
            "index": np.arange(len(values), dtype=np.int32),
            "eigenvalue": values,
            "part": ["stiff" if index < spectrum.k_star else "flat" for index in range(len(values))],
            "cumulative_energy": np.cumsum(values) / total if len(values) else values,
            "mean_share": coordinates**2 / float(geometry.mean_K @ geometry.mean_K),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors), type=schema.field("vector").type),
        },
        schema=schema,
    )


def read_target(run: Run, target: str, scoring: str, spec: FeatureSpec) -> TargetData:
    """Read a target and rebuild its geometry; hashes and lineage are checked."""
    manifest = run.manifest("target", f"{target}.{scoring}")
    tables = {}
    for part in manifest.parts:
        schema = "spectrum" if part.path.endswith("/spectrum.parquet") else "target_samples"
        tables[schema] = decode_table(
            read_part(run.url, part), run.path(part.path), schema=schema, spec=spec.fingerprint
        )
    samples_table = tables["target_samples"][0]
    spectrum_table, footer = tables["spectrum"]
    samples: dict[str, tuple[Sample, ...]] = {}
    tokens: dict[str, tuple[tuple[int, int], ...]] = {}
    sketches: dict[str, torch.Tensor] = {}
    for name in PARTS:
        table = samples_table.filter(pc.equal(samples_table["part"], name))
        samples[name] = tuple(_sample(record) for record in table.drop_columns(["sketch"]).to_pylist())
        tokens[name] = tuple(zip(table["tokens"].to_pylist(), table["loss_tokens"].to_pylist()))
        sketches[name] = full_sketches(table)
    swapped = sketches["swapped"]
    geometry = rebuild_target(
        sketches["reference"],
        centred=_spectrum(spectrum_table, "centred", footer),
        empirical=_spectrum(spectrum_table, "empirical", footer),
        energy=footer.notes["energy"],
        floor=footer.notes["floor"],
        swapped_mean_K=swapped.mean(dim=0) if len(swapped) else None,
        sampled=_spectrum(spectrum_table, "gauss-newton", footer) if "gauss-newton" in footer.notes else None,
        curvature=footer.notes.get("curvature", "centred"),
        damping_factor=footer.notes.get("damping_factor", 1.0),
    )
    return TargetData(
        name=target,
        fingerprint=manifest.fingerprint,
        geometry=geometry,
        samples=samples,
        tokens=tokens,
        sketches=sketches,
    )


def _sample(record: dict[str, Any]) -> Sample:
    names = {field.name for field in dataclasses.fields(Sample)}
    spans = tuple((int(start), int(end)) for start, end in orjson.loads(record["loss_spans"]))
    return Sample(**{name: record[name] for name in names - {"loss_spans"}}, loss_spans=spans)


def _spectrum(table: pa.Table, kind: str, footer: Footer) -> Spectrum:
    rows = table.filter(pc.equal(table["fisher"], kind))
    width = table.schema.field("vector").type.list_size
    vectors = vector_array(rows["vector"]).reshape(-1, width).astype(np.float64)
    scalars: dict[str, Any] = {name: math.nan if value is None else value for name, value in footer.notes[kind].items()}
    return Spectrum(
        kind=kind,
        values_J=torch.from_numpy(rows["eigenvalue"].to_numpy().copy()),
        vectors_JK=torch.from_numpy(vectors),
        **scalars,
    )


def vector_array(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers of a fixed-size list column, flat, in their stored type."""
    return np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks] or [np.zeros(0, np.float32)])


def unit_sketches(table: pa.Table) -> np.ndarray:
    """Unit-norm sketches of a table, [N, K] in their stored type."""
    width = table.schema.field("sketch").type.list_size
    return vector_array(table["sketch"]).reshape(-1, width)


def full_sketches(table: pa.Table) -> torch.Tensor:
    """Sketches of a table with their norms put back, [N, K] float64."""
    norms = table["sketch_norm"].to_numpy().astype(np.float64)
    return torch.from_numpy(unit_sketches(table).astype(np.float64) * norms[:, None])
