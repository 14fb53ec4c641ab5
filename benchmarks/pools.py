"""A scored run of any size, without a model: the files `lehr score` leaves, of synthetic sketches.

Sketches lie in clusters: topics of unequal size, each with its own direction and a few axes of its own along which its rows
differ, plus noise in every direction. The target leans on three of the topics, so that a ranking, a set and a limit each choose
differently. A hundredth of the rows repeat the content of another one. Everything is a function of (rows, k, seed).

The folder is written once and kept; it opens with every command of Lehr.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pipelines.geometry import write_spectrum
from schemas.fingerprint import fingerprint, plain
from schemas.ids import content_id, sample_id, unit_id
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Footer, Part, write_table
from schemas.run import Run
from schemas.spec import EncodingSpec, FeatureSpec, InputGroup, PlanSpec
from schemas.tables import table_schema
from schemas.units import PLAN_NAME, WorkUnit, write_plan_table
from selection_ops.curvature import TargetGeometry, curvature_columns, describe_target

SCORING, TARGET = "base", "target"
TOPICS, AXES, TARGETS = 48, 6, 200
DOMAINS = np.array(["math", "code", "web", "news", "books", "forum", "lists", "noise"])
PREVIEW_CHARS = 160
_CHUNK = 4096


class _World:
    """Directions of topics, and what a row of one looks like."""

    def __init__(self, k: int, seed: int) -> None:
        self.k = k
        draw = torch.Generator().manual_seed(seed)
        self.centre_TK = torch.nn.functional.normalize(torch.randn(TOPICS, k, generator=draw), dim=1)
        # Topics share a direction, as gradients of one model do: no two are orthogonal.
        shared_K = torch.nn.functional.normalize(torch.randn(k, generator=draw), dim=0)
        self.centre_TK = torch.nn.functional.normalize(self.centre_TK + 0.3 * shared_K, dim=1)
        self.axes_TAK = torch.nn.functional.normalize(torch.randn(TOPICS, AXES, k, generator=draw), dim=2)
        weight = 1.0 / torch.arange(1.0, TOPICS + 1.0)
        self.share_T = weight / weight.sum()

    def rows(self, topic_N: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Unit rows [N, K] float32: 0.4 along the topic, 0.4 inside its axes, 0.8 anywhere."""
        noise_NK = torch.randn(len(topic_N), self.k, generator=draw).div_(self.k**0.5)
        along_NA = torch.randn(len(topic_N), AXES, generator=draw).div_(AXES**0.5)
        noise_NK += 0.5 * self.centre_TK[topic_N]
        for topic in topic_N.unique().tolist():
            index = torch.nonzero(topic_N == topic).flatten()
            noise_NK[index] += 0.5 * (along_NA[index] @ self.axes_TAK[topic])
        return torch.nn.functional.normalize(noise_NK, dim=1)


def feature_spec(k: int) -> FeatureSpec:
    """The spec of the scoring."""
    return FeatureSpec(
        model=fingerprint("synthetic model"),
        tokenizer=fingerprint("synthetic tokenizer"),
        encoding=EncodingSpec(max_tokens=512),
        input_groups=(InputGroup(name="layer.0", sites=("layer.0",)),),
        k=k,
    )


def pool_folder(below: Path, *, rows: int, k: int, part_rows: int) -> Path:
    """Where a pool of these sizes is kept; another feature spec is another folder."""
    return below / f"r{rows}-k{k}-p{part_rows}-{feature_spec(k).fingerprint[:8]}"


def make_pool(folder: Path, *, rows: int, k: int, part_rows: int, seed: int = 0) -> Run:
    """Write the run, or open it where it stands finished."""
    run = Run.create(str(folder), corpus="synthetic", root="/nowhere")
    curvature_name = f"{TARGET}.{SCORING}"
    if Path(run.path(run.manifest_path("curvature", curvature_name))).exists():
        return run
    spec, world = feature_spec(k), _World(k, seed)
    plan_spec = PlanSpec(corpus="synthetic")
    units = [_unit(start, min(part_rows, rows - start)) for start in range(0, rows, part_rows)]
    plan = _manifest(run, "plan", PLAN_NAME, plain(plan_spec), {}, (write_plan_table(run, plan_spec, units),), {})
    declared = _manifest(run, "scoring", SCORING, plain(spec), {}, (), {"weight_bytes": 0})
    geometry, target_parts = _target(run, spec, world, seed)
    target_spec = {"scoring": SCORING, "target": TARGET, "data": "synthetic", "energy": geometry.energy}
    target = _manifest(run, "target", curvature_name, target_spec, {"scoring": declared.fingerprint}, target_parts, {})
    features: list[Part] = []
    curvature: list[Part] = []
    for number, unit in enumerate(units):
        own, columns = _unit_parts(run, spec, world, geometry, target, unit, seed + 1 + number)
        features.append(own)
        curvature.append(columns)
    summary = {"units": len(units), "rows": rows, "samples": rows}
    inputs = {"plan": plan.fingerprint, "scoring": declared.fingerprint}
    score = _manifest(run, "score", SCORING, declared.spec, inputs, tuple(features), summary)
    inputs = {"score": score.fingerprint, "target": target.fingerprint}
    _manifest(run, "curvature", curvature_name, {"scoring": SCORING, "target": TARGET}, inputs, tuple(curvature), {})
    return run


def _manifest(
    run: Run, stage: str, name: str, spec: dict, inputs: dict[str, str], parts: tuple[Part, ...], summary: dict
) -> Manifest:
    made = Manifest(stage=stage, name=name, spec=spec, inputs=inputs, parts=parts, summary=summary)
    write_manifest(run.path(run.manifest_path(stage, name)), made)
    return made


def _unit(start: int, count: int) -> WorkUnit:
    path = f"shard-{start // 1_000_000:04d}.jsonl"
    source = fingerprint([path, start])
    return WorkUnit(
        unit_id=unit_id(path, start, start + count, start, count, source, "columns"),
        path=path, format="jsonl", byte_start=start, byte_end=start + count, row_start=start, row_count=count,
        source_fingerprint=source, estimated_tokens=256 * count,
    )  # fmt: skip


def _target(run: Run, spec: FeatureSpec, world: _World, seed: int) -> tuple[TargetGeometry, tuple[Part, ...]]:
    draw = torch.Generator().manual_seed(seed + 77)
    topic_M = torch.tensor([3, 7, 20]).repeat(TARGETS)[: TARGETS + TARGETS // 4]
    unit = world.rows(topic_M, draw)
    norm = torch.exp(0.5 * torch.randn(len(topic_M), generator=draw)).numpy()
    parts = ["reference"] * TARGETS + ["evaluation"] * (len(topic_M) - TARGETS)
    schema = table_schema("target_samples", spec.k)
    texts = [f"target sample {index}" for index in range(len(topic_M))]
    columns = {
        "part": parts,
        **_place("target.jsonl", 0, texts, np.full(len(texts), "target")),
        "text": texts,
        "loss_spans": [f"[[0,{len(text)}]]" for text in texts],
        **_measures(norm, draw),
        "sketch": _vectors(unit.numpy(), schema),
    }
    table = pa.table({field.name: columns[field.name] for field in schema}, schema=schema)
    folder = run.target_folder(TARGET, SCORING)
    samples = write_table(
        run.url, f"{folder}/samples.parquet", table, Footer(schema="target_samples", spec=spec.fingerprint)
    )
    full_MK = unit[:TARGETS].double() * torch.from_numpy(norm[:TARGETS]).double()[:, None]
    geometry = describe_target(full_MK)
    return geometry, (samples, write_spectrum(run, folder, geometry, spec))


def _unit_parts(
    run: Run, spec: FeatureSpec, world: _World, geometry: TargetGeometry, target: Manifest, unit: WorkUnit, seed: int
) -> tuple[Part, Part]:
    draw = torch.Generator().manual_seed(seed)
    topic_N = torch.multinomial(world.share_T, unit.row_count, replacement=True, generator=draw)
    stored = np.empty((unit.row_count, spec.k), np.float16)
    for start in range(0, unit.row_count, _CHUNK):
        stored[start : start + _CHUNK] = world.rows(topic_N[start : start + _CHUNK], draw).numpy()
    norm = torch.exp(0.8 * torch.randn(unit.row_count, generator=draw)).numpy()
    schema = table_schema("features", spec.k)
    domain = DOMAINS[topic_N.numpy() % len(DOMAINS)]
    columns = {
        **_place(unit.path, unit.row_start, _previews(unit, np.random.default_rng(seed)), domain),
        **_measures(norm, draw),
        "sketch": _vectors(stored, schema),
    }
    table = pa.table({field.name: columns[field.name] for field in schema}, schema=schema)
    footer = Footer(schema="features", spec=spec.fingerprint, inputs={"unit": unit.unit_id})
    features = write_table(run.url, run.features_path(SCORING, unit.unit_id), table, footer)
    values = curvature_columns(torch.from_numpy(stored), norm, geometry)
    overlapping = np.random.default_rng(seed).random(unit.row_count) < 0.002
    values |= {
        "overlap": np.where(overlapping, 0.8, 0.0).astype(np.float32),
        "overlap_with": np.where(overlapping, "reference", ""),
        "overlapping": overlapping,
    }
    schema = table_schema("curvature")
    table = pa.table({"sample_id": table["sample_id"], **values}, schema=schema)
    inputs = {"unit": unit.unit_id, "target": target.fingerprint, "features": features.sha256}
    footer = Footer(schema="curvature", spec=spec.fingerprint, inputs=inputs)
    return features, write_table(run.url, run.curvature_path(TARGET, SCORING, unit.unit_id), table, footer)


def _vectors(values_NK: np.ndarray, schema: pa.Schema) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values_NK.reshape(-1)), type=schema.field("sketch").type)


def _place(path: str, start: int, texts: pa.Array | list[str], domain: np.ndarray) -> dict[str, object]:
    count = len(texts)
    row = np.arange(start, start + count)
    # Every hundredth row repeats the one before it.
    content = np.where(row % 100 == 99, row - 1, row)
    length = pc.utf8_length(pa.array(texts, pa.string()))
    return {
        "sample_id": [sample_id("synthetic", path, int(number), 0) for number in row],
        "content_id": [content_id(f"{path} {number}", [(0, 1)]) for number in content],
        "source_id": [f"doc-{number:09d}" for number in row],
        "path": np.full(count, path),
        "row": row,
        "window": np.zeros(count, np.int32),
        "char_start": np.zeros(count, np.int64),
        "char_end": pc.cast(length, pa.int64()),
        "domain": domain,
        "extra": np.full(count, "{}"),
        "preview": texts,
    }


def _measures(norm: np.ndarray, draw: torch.Generator) -> dict[str, object]:
    tokens = torch.randint(40, 500, (len(norm),), generator=draw, dtype=torch.int32).numpy()
    return {
        "tokens": tokens,
        "loss_tokens": tokens - 1,
        "loss": (2.5 * tokens + 40.0 * norm).astype(np.float32),
        "grad_norm": norm,
        "sketch_norm": norm,
    }


def _previews(unit: WorkUnit, draw: np.random.Generator) -> pa.Array:
    words = pa.array(["".join(draw.choice(list("etaoinshrdlu"), size)) for size in draw.integers(2, 11, 3000)])
    picked = [words.take(pa.array(draw.integers(0, len(words), unit.row_count))) for _ in range(24)]
    return pc.utf8_slice_codeunits(pc.binary_join_element_wise(*picked, " "), 0, PREVIEW_CHARS)
