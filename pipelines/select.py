"""From features and curvature columns to a selection: one row per candidate considered, with everything that decided it."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.candidates import candidate_set, in_threads, read_pool
from pipelines.geometry import TargetData, read_target
from pipelines.keep import refuse_sketchless
from schemas.errors import InputError
from schemas.fingerprint import fingerprint, plain, pretty_json
from schemas.manifest import Manifest, write_manifest
from schemas.parquet import Footer, Part, write_table
from schemas.run import Run, check_name
from schemas.spec import FeatureSpec
from schemas.storage import exists, sha256, write_whole
from schemas.tables import table_schema
from selection_ops.selectors import (
    Budget,
    CandidateSet,
    SelectorSettings,
    Solution,
    get_selector,
    select,
    set_cosine,
)
from selection_ops.selectors.seconds import counted, spent

PART_ROWS = 100_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectReport:
    """A finished selection, as `solution.json` holds it."""

    name: str
    selected: int
    tokens: int
    solution: dict[str, Any]
    fingerprint: str
    seconds: dict[str, float]
    """Wall seconds by what they went into, and `total`; in no file."""


def run_select(
    run: Run,
    name: str,
    scoring: str,
    target: str,
    budget: Budget,
    settings: SelectorSettings,
    *,
    keep_overlapping: bool = False,
    columns_only: bool = False,
) -> SelectReport:
    """Select and write the parts, `solution.json` and the manifest.

    `target` may be empty for selectors that need none. With `columns_only` no sketch is read: seconds on large pools, without
    the diagnostics that need sketches, and only for selectors that rank by columns. Raises `InputError` where a selection of this name was made with
    other settings, or where the columns of the target are missing.
    """
    started = time.perf_counter()
    with counted() as seconds:
        ready = prepare(
            run, name, scoring, target, budget, settings, keep_overlapping=keep_overlapping, columns_only=columns_only
        )
        spec, data = ready.spec, ready.data
        pool = read_pool(run, ready.score, ready.curvature, spec, columns_only=ready.columns_only)
        candidates = candidate_set(
            pool.columns, loss=spec.loss, keep_overlapping=keep_overlapping, unit_NK=pool.unit_NK
        )
        solution = select(candidates, data.geometry if data else None, budget, settings)
        record = _solution_record(settings, budget, candidates, solution, data)
        report = _write(run, name, ready.select_spec, ready.inputs, pool.columns, candidates, solution, record)
    total = time.perf_counter() - started
    seconds["other"] = total - sum(seconds.values())
    seconds["total"] = total
    return dataclasses.replace(report, seconds=seconds)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A selection before anything is read of its candidates."""

    select_spec: dict[str, Any]
    inputs: dict[str, str]
    spec: FeatureSpec
    score: Manifest
    curvature: Manifest | None
    data: TargetData | None
    columns_only: bool
    """Whether no sketch is read: asked for, or because none is stored."""


def prepare(
    run: Run,
    name: str,
    scoring: str,
    target: str,
    budget: Budget,
    settings: SelectorSettings,
    *,
    keep_overlapping: bool,
    columns_only: bool,
    engine: str = "",
) -> Prepared:
    """Check names and lineage; `InputError` where they do not fit, or where a selection of this name was made otherwise."""
    check_name("selection", name)
    if columns_only and get_selector(settings.selector).needs_sketches:
        raise InputError(
            f"selector {settings.selector!r} reads sketches, so it cannot select by columns alone; leave that out, or use "
            "a ranking such as 'target-cosine'"
        )
    score = run.manifest("score", scoring)
    if "keep" in score.inputs:
        if get_selector(settings.selector).needs_sketches:
            raise refuse_sketchless(scoring, f"selector {settings.selector!r}")
        if settings.redundancy > 0.0:
            raise refuse_sketchless(scoring, "the price on redundancy")
        columns_only = True
    spec = run.scoring(scoring)
    select_spec = {
        "scoring": scoring,
        "target": target,
        "settings": plain(settings),
        "budget": plain(budget),
        "keep_overlapping": keep_overlapping,
    }
    if columns_only:
        select_spec["columns_only"] = True
    if engine:
        select_spec["engine"] = engine
    inputs = {"score": score.fingerprint}
    data: TargetData | None = None
    curvature: Manifest | None = None
    if target:
        data = read_target(run, target, scoring, spec)
        curvature = run.manifest("curvature", f"{target}.{scoring}")
        if curvature.inputs != {"score": score.fingerprint, "target": data.fingerprint}:
            raise InputError(
                f"the curvature columns of target {target!r} were made before the scores or the target changed; run `lehr score` again"
            )
        inputs |= {"curvature": curvature.fingerprint, "target": data.fingerprint}
    _refuse_other(run, name, select_spec)
    return Prepared(
        select_spec=select_spec,
        inputs=inputs,
        spec=spec,
        score=score,
        curvature=curvature,
        data=data,
        columns_only=columns_only,
    )


def _refuse_other(run: Run, name: str, select_spec: dict[str, Any]) -> None:
    if not exists(run.path(run.manifest_path("select", name))):
        return
    before = run.manifest("select", name).spec
    if before != select_spec:
        differing = sorted(key for key in {*before, *select_spec} if before.get(key) != select_spec.get(key))
        raise InputError(
            f"selection {name!r} exists with other {', '.join(differing)}; a selection never changes. Give this one another --name"
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
    return {
        "selector": settings.selector,
        "settings": plain(settings),
        "budget": plain(budget),
        "certificate": solution.certificate,
        "diagnostics": diagnostics,
        "counts": _counts(solution.reason_N),
        "warnings": warnings,
    }


def _counts(reason_N: np.ndarray) -> dict[str, int]:
    """How many candidates were left for each reason; what a duplicate repeats is not part of its reason."""
    found: Counter[str] = Counter()
    for entry in pc.value_counts(pa.array(reason_N, pa.string())).to_pylist():
        found[entry["values"].split(" ")[0]] += entry["counts"]
    return dict(sorted(found.items()))


@spent("write")
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
    rank_N = np.full(features.num_rows, -1, np.int64)
    rank_N[solution.order_n] = np.arange(len(solution.order_n))
    table = selection_table(features, solution, rank_N)
    folder = run.selection_folder(name)
    footer = selection_footer(fingerprint(select_spec), inputs["score"])
    starts = range(0, max(table.num_rows, 1), PART_ROWS)

    def write(number: int) -> Part:
        rows = table.slice(starts[number], PART_ROWS)
        return write_table(run.url, f"{folder}/part-{number:05d}.parquet", rows, footer)

    parts = in_threads(write, range(len(starts)))
    selected, tokens = len(solution.order_n), int(candidates.tokens_N[solution.order_n].sum())
    summary = {"candidates": table.num_rows, "selected": selected, "tokens": tokens, "counts": record["counts"]}
    return finish(run, name, select_spec, inputs, parts, record, summary)


def finish(
    run: Run,
    name: str,
    select_spec: dict[str, Any],
    inputs: dict[str, str],
    parts: list[Part],
    record: dict[str, Any],
    summary: dict[str, Any],
) -> SelectReport:
    """Write `solution.json`, then the manifest."""
    path, body = f"{run.selection_folder(name)}/solution.json", pretty_json(record)
    write_whole(run.path(path), body)
    solution = Part(path=path, rows=0, bytes=len(body), sha256=sha256(body))
    manifest = Manifest(
        stage="select", name=name, spec=select_spec, inputs=inputs, parts=(*parts, solution), summary=summary
    )
    write_manifest(run.path(run.manifest_path("select", name)), manifest)
    return SelectReport(
        name=name,
        selected=summary["selected"],
        tokens=summary["tokens"],
        solution=record,
        fingerprint=manifest.fingerprint,
        seconds={},
    )


def selection_footer(footer_spec: str, score: str) -> Footer:
    """The footer of every part; `footer_spec`: fingerprint of the select spec."""
    return Footer(schema="selection", spec=footer_spec, inputs={"score": score})


def selection_table(features: pa.Table, solution: Solution, rank: np.ndarray) -> pa.Table:
    """A row per candidate with everything that decided it; `rank`: position in the selection, -1 where not selected."""
    count = features.num_rows
    schema = table_schema("selection")
    weight = np.zeros(count, np.float32)
    weight[solution.order_n] = solution.weights_n
    scores = {name: np.asarray(values, np.float64) for name, values in sorted(solution.scores.items())}
    main = scores.get("score", np.full(count, np.nan))
    columns: dict[str, Any] = {
        "rank": pa.array(rank, mask=rank < 0),
        "selected": rank >= 0,
        "selection_weight": weight,
        "score": pa.array(main, mask=~np.isfinite(main)),
        "scores": _map_column({name: values for name, values in scores.items() if name != "score"}, count),
        "reason": pa.array(solution.reason_N, pa.string()),
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
        offsets = pa.array(np.zeros(count + 1, np.int32))
        return pa.MapArray.from_arrays(offsets, pa.array([], pa.string()), pa.array([], pa.float64()))
    values = np.stack([scores[name] for name in names], axis=1)
    held = np.isfinite(values)
    offsets = np.concatenate([[0], np.cumsum(held.sum(axis=1))]).astype(np.int32)
    keys = pa.array(names, pa.string()).take(pa.array(np.nonzero(held)[1]))
    return pa.MapArray.from_arrays(pa.array(offsets), keys, pa.array(values[held]))
