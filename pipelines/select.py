"""From features and curvature columns to a selection: one row per candidate considered, with everything that decided it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.geometry import TargetData, read_target, unit_sketches
from schemas.errors import InputError
from schemas.fingerprint import fingerprint, plain, pretty_json
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Footer, Part, decode_table, read_part, write_table
from schemas.run import Run, check_name
from schemas.spec import FeatureSpec, LossKind
from schemas.storage import exists, sha256, write_whole
from schemas.tables import GEOMETRY_COLUMNS, OVERLAP_COLUMNS, table_schema
from selection_ops.selectors import Budget, CandidateSet, SelectorSettings, Solution, select, set_cosine

PART_ROWS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectReport:
    """A finished selection, as `solution.json` holds it."""

    name: str
    selected: int
    tokens: int
    solution: dict[str, Any]
    fingerprint: str


def run_select(
    run: Run,
    name: str,
    scoring: str,
    target: str,
    budget: Budget,
    settings: SelectorSettings,
    *,
    keep_overlapping: bool = False,
) -> SelectReport:
    """Select and write the parts, `solution.json` and the manifest.

    `target` may be empty for selectors that need none. Raises `InputError` where a selection of this name was made with
    other settings, or where the columns of the target are missing.
    """
    check_name("selection", name)
    score = run.manifest("score", scoring)
    spec = run.scoring(scoring)
    select_spec = {
        "scoring": scoring,
        "target": target,
        "settings": plain(settings),
        "budget": plain(budget),
        "keep_overlapping": keep_overlapping,
    }
    inputs = {"score": score.fingerprint}
    data: TargetData | None = None
    if target:
        data = read_target(run, target, scoring, spec)
        curvature = run.manifest("curvature", f"{target}.{scoring}")
        if curvature.inputs != {"score": score.fingerprint, "target": data.fingerprint}:
            raise InputError(
                f"the curvature columns of target {target!r} were made before the scores or the target changed; run `lehr score` again"
            )
        inputs |= {"curvature": curvature.fingerprint, "target": data.fingerprint}
    _refuse_other(run, name, select_spec)
    features = _read(run, [p for p in score.parts if p.path.startswith("features/")], "features", spec)
    if data is not None:
        features = _with_curvature(features, _read(run, curvature.parts, "curvature", spec))
    candidates = candidate_set(features, loss=spec.loss, keep_overlapping=keep_overlapping)
    solution = select(candidates, data.geometry if data else None, budget, settings)
    record = _solution_record(settings, budget, candidates, solution, data)
    return _write(run, name, select_spec, inputs, features, candidates, solution, record)


def _refuse_other(run: Run, name: str, select_spec: dict[str, Any]) -> None:
    if not exists(run.path(run.manifest_path("select", name))):
        return
    before = run.manifest("select", name).spec
    if before != select_spec:
        differing = sorted(key for key in select_spec if before.get(key) != select_spec[key])
        raise InputError(
            f"selection {name!r} exists with other {', '.join(differing)}; a selection never changes. Give this one another --name"
        )


def _read(run: Run, parts: Iterable[Part], schema: str, spec: FeatureSpec) -> pa.Table:
    tables = [
        decode_table(read_part(run.url, part), run.path(part.path), schema=schema, spec=spec.fingerprint)[0]
        for part in parts
    ]
    if not tables:
        raise InputError("the plan has no work units, so there is nothing to select from")
    return pa.concat_tables(tables)


def _with_curvature(features: pa.Table, curvature: pa.Table) -> pa.Table:
    if not features["sample_id"].equals(curvature["sample_id"]):
        raise InputError("curvature columns are not those of the features, row by row; run `lehr score` again")
    for name in (*GEOMETRY_COLUMNS, *OVERLAP_COLUMNS):
        features = features.append_column(name, curvature[name])
    return features


def candidate_set(features: pa.Table, *, loss: LossKind = "sum", keep_overlapping: bool = False) -> CandidateSet:
    """Candidates of a features table, with its curvature columns where it has them.

    `loss` is that of the feature spec: losses and gradient norms of means are brought back to those of sums.
    """
    loss_tokens_N = features["loss_tokens"].to_numpy().astype(np.int64)
    per_mean_N = loss_tokens_N.astype(np.float64) if loss == "mean" else 1
    excluded = np.full(features.num_rows, "", dtype=object)
    if "overlapping" in features.column_names and not keep_overlapping:
        excluded[features["overlapping"].to_numpy()] = "overlap"
    columns = {name: features[name].to_numpy() for name in GEOMETRY_COLUMNS if name in features.column_names}
    return CandidateSet(
        sample_id=features["sample_id"].to_numpy(),
        content_id=features["content_id"].to_numpy(),
        domain=features["domain"].to_numpy(),
        tokens_N=features["tokens"].to_numpy().astype(np.int64),
        loss_tokens_N=loss_tokens_N,
        loss_N=features["loss"].to_numpy() * per_mean_N,
        grad_norm_N=features["grad_norm"].to_numpy() * per_mean_N,
        norm_N=features["sketch_norm"].to_numpy(),
        unit_NK=torch.from_numpy(unit_sketches(features)),
        excluded_N=excluded,
        **columns,
    )


def _solution_record(
    settings: SelectorSettings,
    budget: Budget,
    candidates: CandidateSet,
    solution: Solution,
    data: TargetData | None,
) -> dict[str, Any]:
    diagnostics = dict(solution.diagnostics)
    warnings = list(diagnostics.pop("warnings", []))
    if (
        data is not None
        and candidates.unit_NK is not None
        and len(data.sketches["evaluation"])
        and len(solution.order_n)
    ):
        mean = data.sketches["evaluation"].mean(dim=0)
        diagnostics["set_cosine_evaluation"] = set_cosine(
            candidates.unit_NK, candidates.norm_N, solution.order_n, solution.weights_n, mean
        )
    reasons = Counter(reason.split(" ")[0] for reason in solution.reason_N)
    return {
        "selector": settings.selector,
        "settings": plain(settings),
        "budget": plain(budget),
        "certificate": solution.certificate,
        "diagnostics": diagnostics,
        "counts": dict(sorted(reasons.items())),
        "warnings": warnings,
    }


def _write(
    run: Run,
    name: str,
    select_spec: dict[str, Any],
    inputs: dict[str, str],
    features: pa.Table,
    candidates: CandidateSet,
    solution: Solution,
    record: dict[str, Any],
) -> SelectReport:
    table = _selection_table(features, solution)
    folder = run.selection_folder(name)
    footer = Footer(schema="selection", spec=fingerprint(select_spec), inputs={"score": inputs["score"]})
    parts = [
        write_table(run.url, f"{folder}/part-{number:05d}.parquet", table.slice(start, PART_ROWS), footer)
        for number, start in enumerate(range(0, max(table.num_rows, 1), PART_ROWS))
    ]
    body = pretty_json(record)
    write_whole(run.path(f"{folder}/solution.json"), body)
    parts.append(Part(path=f"{folder}/solution.json", rows=0, bytes=len(body), sha256=sha256(body)))
    selected, tokens = len(solution.order_n), int(candidates.tokens_N[solution.order_n].sum())
    manifest = Manifest(
        stage="select",
        name=name,
        spec=select_spec,
        inputs=inputs,
        parts=tuple(parts),
        summary={"candidates": table.num_rows, "selected": selected, "tokens": tokens, "counts": record["counts"]},
    )
    write_manifest(run.path(run.manifest_path("select", name)), manifest)
    return SelectReport(name=name, selected=selected, tokens=tokens, solution=record, fingerprint=manifest.fingerprint)


def _selection_table(features: pa.Table, solution: Solution) -> pa.Table:
    count = features.num_rows
    schema = table_schema("selection")
    rank = np.full(count, -1, np.int64)
    weight = np.zeros(count, np.float32)
    rank[solution.order_n] = np.arange(len(solution.order_n))
    weight[solution.order_n] = solution.weights_n
    scores = {name: np.asarray(values, np.float64) for name, values in sorted(solution.scores.items())}
    main = scores.get("score", np.full(count, np.nan))
    columns: dict[str, Any] = {
        "rank": pa.array(rank, mask=rank < 0),
        "selected": rank >= 0,
        "selection_weight": weight,
        "score": pa.array(main, mask=~np.isfinite(main)),
        "scores": _map_column({name: values for name, values in scores.items() if name != "score"}, count),
        "reason": [str(reason) for reason in solution.reason_N],
    }
    for field in schema:
        if field.name not in columns:
            held = field.name in features.column_names
            columns[field.name] = features[field.name] if held else pa.nulls(count, field.type)
    return pa.table({field.name: columns[field.name] for field in schema}, schema=schema)


def _map_column(scores: dict[str, np.ndarray], count: int) -> pa.MapArray:
    """A map per row; a score that is not finite is left out of its row's map."""
    names = list(scores)
    if not names or not count:
        return pa.array([{}] * count, type=pa.map_(pa.string(), pa.float64()))
    values = np.stack([scores[name] for name in names], axis=1)
    held = np.isfinite(values)
    offsets = np.concatenate([[0], np.cumsum(held.sum(axis=1))]).astype(np.int32)
    keys = np.array(names, dtype=object)[np.nonzero(held)[1]]
    return pa.MapArray.from_arrays(pa.array(offsets), pa.array(keys, pa.string()), pa.array(values[held]))
