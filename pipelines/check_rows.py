"""Rows to check: drawn from a scored run, with what is stored of them and the text they were made from."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Sequence

import numpy as np

from pipelines.geometry import TargetData, read_target, unit_sketches
from pipelines.options import CheckOptions
from pipelines.readers import read_unit
from schemas.errors import CorruptFile, InputError, SourceChanged
from schemas.fingerprint import fingerprint
from schemas.manifest import Manifest
from schemas.parquet import Part, decode_table, read_part
from schemas.run import Run
from schemas.sample import Row, Sample
from schemas.spec import FeatureSpec, PlanSpec
from schemas.storage import join
from schemas.units import WorkUnit, read_plan
from selection_ops.encoding import Encoder

CHOOSABLE = ("not_chosen", "outside_shortlist")
"""Reasons of rows that a selection could have chosen and did not."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredRow:
    """One row as it is stored, and its sample."""

    sample: Sample
    unit_K: np.ndarray | None
    """Unit sketch in its stored type; None where it was not kept."""
    norm: float
    loss: float
    alignment: float = float("nan")
    """Where the sketch was not kept: its cosine with the mean target gradient, as stored."""
    selected: bool = False
    """Whether the selection that is checked chose it."""

    @property
    def place(self) -> str:
        """Where the row came from, for messages."""
        return f"{self.sample.path} row {self.sample.row} window {self.sample.window}"


def draw_rows(
    run: Run, scoring: str, spec: FeatureSpec, encoder: Encoder, options: CheckOptions, target: str = ""
) -> list[StoredRow]:
    """Rows of a finished scoring by seed, in corpus order, with their texts; `target`: whose alignment stands for a sketch that was
    not kept.

    Raises `InputError` where the scoring is not finished or too small, `SourceChanged` naming the file where a text is not the scored
    one, `CorruptFile` where a part differs from its manifest.
    """
    score = run.manifest("score", scoring)
    parts = _by_unit(part for part in score.parts if part.path.startswith("features/"))
    sketchless = "keep" in score.inputs
    curvature = _by_unit(run.manifest("curvature", f"{target}.{scoring}").parts) if sketchless else {}
    rng = random.Random(f"check {options.seed}")
    if options.selection:
        wanted, selected = _of_selection(run, scoring, options, rng)
    else:
        wanted, selected = _of_all(parts, options.rows, rng), set()
    plan = read_plan(run)
    rows: list[StoredRow] = []
    for unit in plan.units:
        places = wanted.get(unit.unit_id, set()) | wanted.get(unit.path, set())
        if places and unit.unit_id in parts:
            aligned = curvature[unit.unit_id] if sketchless else None
            rows += _of_unit(run, unit, parts[unit.unit_id], aligned, spec, plan.spec, encoder, places, selected)
    if len(rows) < 2:
        raise InputError(f"{run.url}: scoring {scoring!r} holds {len(rows)} rows to check, and two are needed")
    return rows


def _by_unit(parts: Iterable[Part]) -> dict[str, Part]:
    return {part.path.rsplit("/part-", 1)[-1].removesuffix(".parquet"): part for part in parts}


def _of_all(parts: dict[str, Part], count: int, rng: random.Random) -> dict[str, set[object]]:
    """Positions by unit of `count` rows of all parts."""
    total = sum(part.rows for part in parts.values())
    chosen = sorted(rng.sample(range(total), min(count, total)))
    found: dict[str, set[object]] = {}
    start = 0
    for unit, part in parts.items():
        here: set[object] = {index - start for index in chosen if start <= index < start + part.rows}
        if here:
            found[unit] = here
        start += part.rows
    return found


def _of_selection(
    run: Run, scoring: str, options: CheckOptions, rng: random.Random
) -> tuple[dict[str, set[object]], set[str]]:
    """Sample ids by path: half of the rows chosen by the selection, half of those it could have chosen; and which are chosen."""
    manifest = run.manifest("select", options.selection)
    if manifest.spec["scoring"] != scoring:
        raise InputError(
            f"selection {options.selection!r} was made from scoring {manifest.spec['scoring']!r}, not {scoring!r}; name it with --scoring"
        )
    chosen: list[tuple[str, str]] = []
    left: list[tuple[str, str]] = []
    for part in manifest.parts:
        if not part.path.endswith(".parquet"):
            continue
        table, _ = decode_table(
            read_part(run.url, part), run.path(part.path), schema="selection", spec=fingerprint(manifest.spec)
        )
        columns = (table[name].to_pylist() for name in ("path", "sample_id", "selected", "reason"))
        for path, sample_id, selected, reason in zip(*columns):
            if selected:
                chosen.append((path, sample_id))
            elif reason.split(" ")[0] in CHOOSABLE:
                left.append((path, sample_id))
    from_chosen = min(len(chosen), max(1, options.rows - min(len(left), options.rows // 2)))
    picked = rng.sample(chosen, from_chosen)
    other = rng.sample(left, min(len(left), options.rows - from_chosen))
    found: dict[str, set[object]] = {}
    for path, sample_id in (*picked, *other):
        found.setdefault(path, set()).add(sample_id)
    return found, {sample_id for _, sample_id in picked}


def _of_unit(
    run: Run,
    unit: WorkUnit,
    part: Part,
    aligned: Part | None,
    spec: FeatureSpec,
    plan_spec: PlanSpec,
    encoder: Encoder,
    places: set[object],
    selected: set[str],
) -> list[StoredRow]:
    """Rows of one unit, by position in its part or by sample id."""
    lineage = {"unit": unit.unit_id}
    url = run.path(part.path)
    table, _ = decode_table(read_part(run.url, part), url, schema="features", spec=spec.fingerprint, inputs=lineage)
    ids = table["sample_id"].to_pylist()
    wanted = [index for index, sample_id in enumerate(ids) if index in places or sample_id in places]
    if not wanted:
        return []
    texts = _texts(run, unit, plan_spec, encoder, {ids[index] for index in wanted})
    if aligned is None:
        units: Sequence[np.ndarray | None] = list(unit_sketches(table))
        alignments = [float("nan")] * len(ids)
    else:
        data, name = read_part(run.url, aligned), run.path(aligned.path)
        columns = decode_table(data, name, schema="curvature", spec=spec.fingerprint, inputs=lineage)[0]
        units, alignments = [None] * len(ids), columns["alignment"].to_pylist()
    contents, norms, losses = (table[name].to_pylist() for name in ("content_id", "sketch_norm", "loss"))
    rows = []
    for index in wanted:
        sample = texts.get(ids[index])
        if sample is None or sample.content_id != contents[index]:
            found = "is not there any more" if sample is None else "has another text"
            raise SourceChanged(
                f"{join(run.root, unit.path)}: the sample that {url} holds at position {index} {found}; "
                "run `lehr plan --extend` and score again"
            )
        if not np.isfinite(norms[index]):
            raise CorruptFile(
                f"{url}: sketch_norm of position {index} is {norms[index]}; delete it and run `lehr score`"
            )
        rows.append(
            StoredRow(
                sample=sample,
                unit_K=units[index],
                norm=norms[index],
                loss=losses[index],
                alignment=alignments[index],
                selected=ids[index] in selected,
            )
        )
    return rows


def _texts(run: Run, unit: WorkUnit, plan_spec: PlanSpec, encoder: Encoder, ids: set[str]) -> dict[str, Sample]:
    found = {}
    for item in read_unit(run.root, unit, plan_spec):
        if isinstance(item, Row):
            for made in encoder.samples(item, run.corpus):
                if isinstance(made, Sample) and made.sample_id in ids:
                    found[made.sample_id] = made
    return found


def draw_target(
    run: Run, scoring: str, spec: FeatureSpec, options: CheckOptions
) -> tuple[Manifest | None, list[StoredRow]]:
    """The target that is checked, and the rows drawn of its reference samples.

    Raises `InputError` where several targets stand and none is named.
    """
    name = options.target
    if options.selection and not name:
        name = run.manifest("select", options.selection).spec["target"]
    described = {manifest.spec["target"]: manifest for manifest in run.targets(scoring)}
    if not name:
        if not described:
            return None, []
        if len(described) > 1:
            raise InputError(f"scoring {scoring!r} has targets {', '.join(described)}; name one with --target")
        name = next(iter(described))
    manifest = run.manifest("target", f"{name}.{scoring}")
    data = read_target(run, name, scoring, spec)
    return manifest, _reference_rows(data, options)


def _reference_rows(data: TargetData, options: CheckOptions) -> list[StoredRow]:
    samples, sketches = data.samples["reference"], data.sketches["reference"].numpy()
    count = min(options.target_rows or len(samples), len(samples))
    rng = random.Random(f"check target {options.seed}")
    rows = []
    for index in sorted(rng.sample(range(len(samples)), count)):
        norm = float(np.linalg.norm(sketches[index]))
        rows.append(
            StoredRow(
                sample=samples[index],
                unit_K=(sketches[index] / norm).astype(np.float32),
                norm=norm,
                loss=float("nan"),
            )
        )
    return rows
