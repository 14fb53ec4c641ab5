"""Manifests and the files they list: hashes, sizes, row counts, footers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyarrow as pa

from lehr.catalog import in_flow
from lehr.verify.findings import Check
from schemas.errors import CorruptFile, LehrError
from schemas.fingerprint import fingerprint
from schemas.manifest import Manifest, read_manifest
from schemas.parquet import Part, check_footer, decode_table, read_footer, read_part
from schemas.run import Run
from schemas.spec import feature_spec_from_dict
from schemas.storage import client_errors, filesystem, list_names

Tick = Callable[[int], None]
Manifests = dict[tuple[str, str], Manifest]


def schema_of(path: str) -> str:
    """Name of the table that a part's path holds, empty for files that are not tables."""
    if not path.endswith(".parquet"):
        return ""
    pieces = path.split("/")
    if pieces[0] == "targets":
        return "target_samples" if pieces[-1].startswith("samples") else "spectrum"
    if pieces[0] == "comparisons":
        return "arms" if pieces[-1].startswith("arms") else "arm_trainings"
    if pieces[0] == "trainings":
        return pieces[2] if len(pieces) == 4 else ""
    known = {"plan.parquet": "plan", "preconditioners": "preconditioner", "selections": "selection"}
    return known.get(pieces[0], pieces[0])


def read_manifests(run: Run) -> tuple[Manifests, list[Check]]:
    """Every readable manifest by (stage, name), in the order of the flow, and the check of all of them."""
    check = Check(subject="manifests", promise="readable, unedited, in their place")
    found: Manifests = {}
    for stage in in_flow(run.folders("stages")):
        for file in list_names(run.path(f"stages/{stage}"), ".json"):
            check.count += 1
            url = run.path(f"stages/{stage}/{file}")
            with check.guarded():
                manifest = read_manifest(url, "run its stage again")
                name = file.removesuffix(".json")
                if (manifest.stage, manifest.name) != (stage, name):
                    check.fail(f"{url} is the manifest of {manifest.stage}/{manifest.name}, not of {stage}/{name}")
                else:
                    found[stage, name] = manifest
    return found, [check]


def _expected(manifest: Manifest, manifests: Manifests, part: Part) -> tuple[str | None, dict[str, str]]:
    """Spec and inputs that the footer of a listed table must hold."""
    spec: str | None = fingerprint(manifest.spec)
    inputs: dict[str, str] = {}
    if manifest.stage == "scoring":
        spec = feature_spec_from_dict(manifest.spec).preconditioner_fingerprint
    if manifest.stage in ("score", "target", "curvature"):
        scoring = manifests.get(("scoring", str(manifest.spec.get("scoring", manifest.name))))
        spec = fingerprint(scoring.spec) if scoring else None
    if manifest.stage in ("score", "curvature"):
        inputs["unit"] = part.path.rsplit("/part-", 1)[-1].removesuffix(".parquet")
    if "keep" in manifest.inputs and part.path.startswith("features/"):
        inputs["keep"] = manifest.inputs["keep"]
    if manifest.stage == "curvature" and "target" in manifest.inputs:
        inputs["target"] = manifest.inputs["target"]
    if manifest.stage == "select" and "score" in manifest.inputs:
        inputs["score"] = manifest.inputs["score"]
    return spec, inputs


def _size(url: str) -> int:
    fs, path = filesystem(url)
    try:
        with client_errors("read", url):
            return int(fs.size(path))
    except FileNotFoundError as error:
        raise CorruptFile(f"{url} is listed in a manifest but missing; run its stage again") from error


def _check_part(run: Run, part: Part, manifest: Manifest, manifests: Manifests, quick: bool) -> None:
    url = run.path(part.path)
    schema = schema_of(part.path)
    spec, inputs = _expected(manifest, manifests, part)
    size = _size(url)
    if size != part.bytes:
        raise CorruptFile(f"{url} has {size} bytes, its manifest lists {part.bytes}; delete it and run its stage again")
    if quick:
        if not schema:
            return
        footer, rows = read_footer(url)
        check_footer(footer, url, schema=schema, spec=spec, inputs=inputs)
    else:
        data = read_part(run.url, part)
        if not schema:
            return
        table, _ = decode_table(data, url, schema=schema, spec=spec, inputs=inputs)
        rows = table.num_rows
    if rows != part.rows:
        raise CorruptFile(f"{url} has {rows} rows, its manifest lists {part.rows}; delete it and run its stage again")


def check_files(run: Run, manifests: Manifests, *, quick: bool, tick: Tick) -> Iterator[Check]:
    """A check per stage: every listed file stands, unchanged, made under the stage's spec from the stage's inputs."""
    for (stage, name), manifest in manifests.items():
        if not manifest.parts:
            continue
        promise = "sizes and footers as listed" if quick else "hashes, pages and footers as listed"
        check = Check(subject=f"files of {stage}/{name}", promise=promise)
        for part in manifest.parts:
            check.count += 1
            with check.guarded():
                try:
                    _check_part(run, part, manifest, manifests, quick)
                except (pa.ArrowException, OSError) as error:
                    raise LehrError(f"{run.path(part.path)}: cannot be read ({error})") from error
            tick(part.bytes)
        yield check
