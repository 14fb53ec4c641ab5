"""Lineage: what a stage was made from still stands, and is what the next stage believes it is."""

from __future__ import annotations

from collections.abc import Iterator

import orjson

from lehr.catalog import stream_folders
from lehr.verify.files import Manifests
from lehr.verify.findings import Check
from schemas.manifest import Manifest
from schemas.run import Run
from schemas.shards import read_index
from schemas.storage import read_bytes
from schemas.units import PLAN_NAME

_REQUIRED = {
    "target": {"scoring"},
    "keep": {"scoring"},
    "score": {"plan", "scoring"},
    "curvature": {"score", "target"},
    "select": {"score"},
    "export": {"select", "plan"},
    "train": {"stream"},
}


def _candidates(manifest: Manifest, kind: str, manifests: Manifests) -> list[tuple[str, str]]:
    """The stages that input `kind` of a manifest can be."""
    spec = manifest.spec
    if manifest.stage == "compare":
        return [("train", kind.removeprefix("train/"))]
    scoring, target = str(spec.get("scoring", "")), str(spec.get("target", ""))
    if kind == "plan":
        return [("plan", PLAN_NAME)]
    if kind == "scoring":
        return [("scoring", manifest.name if manifest.stage == "score" else scoring)]
    if kind == "keep":
        return [("keep", manifest.name)]
    if kind == "score" and scoring:
        return [("score", scoring)]
    if kind in ("target", "curvature") and target:
        return [(kind, f"{target}.{scoring}")]
    if kind == "select" and "selection" in spec:
        return [("select", str(spec["selection"]))]
    return [key for key in manifests if key[0] == kind]


def check_lineage(run: Run, manifests: Manifests) -> Iterator[Check]:
    """A check per stage: each input is the fingerprint of the manifest (or stream) that stands now."""
    streams = Check(subject="stream indexes", promise="readable and unedited")
    standing: set[str] = set()
    for _, folder in stream_folders(run):
        streams.count += 1
        with streams.guarded():
            standing.add(read_index(run.path(folder)).fingerprint)
    if streams.count:
        yield streams
    for (stage, name), manifest in manifests.items():
        check = Check(subject=f"lineage of {stage}/{name}", promise="made from what stands now", unit="inputs")
        url = run.path(run.manifest_path(stage, name))
        for missing in sorted(_REQUIRED.get(stage, set()) - set(manifest.inputs)):
            check.fail(f"{url} does not say which {missing} it was made from")
        for kind, value in sorted(manifest.inputs.items()):
            check.count += 1
            if kind.partition(".")[0] == "stream":
                if value not in standing:
                    check.fail(f"{url} was made from stream {value}, which is no generation of any stream in this run")
                continue
            keys = _candidates(manifest, kind, manifests)
            present = {key: manifests[key].fingerprint for key in keys if key in manifests}
            if value in present.values():
                continue
            named = ", ".join(f"{key[0]}/{key[1]} has {found}" for key, found in present.items())
            check.fail(f"{url} was made from {kind} {value}; {named or f'no {kind} stands in this run'}")
        for target, value in sorted(manifest.spec["targets"].items()) if stage == "keep" else ():
            check.count += 1
            described = manifests.get(("target", f"{target}.{name}"))
            if described is None or described.fingerprint != value:
                check.fail(f"{url} was declared with target {target} {value}, which does not stand in this run")
        if stage == "train" and "from" in manifest.summary:
            check.count += 1
            problem = _parent_problem(run, manifest)
            if problem:
                check.fail(f"{url} {problem}")
        scoring = manifests.get(("scoring", name)) if stage == "score" else None
        if scoring is not None and scoring.spec != manifest.spec:
            check.fail(f"{url} was made under another feature spec than scoring/{name} declares")
        if check.count or check.problems:
            yield check


def _parent_problem(run: Run, manifest: Manifest) -> str:
    """What is wrong with the checkpoint that a training started from, if it still stands: old ones are pruned."""
    training, _, step = str(manifest.summary["from"]).partition("@")
    where = f"{run.training_folder(training)}/checkpoints/step-{int(step):08d}/manifest.json"
    try:
        found = orjson.loads(read_bytes(run.path(where)))["fingerprint"]
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError) as error:
        return f"was started from {where}, which is damaged ({error})"
    wanted = manifest.spec.get("start_from")
    return "" if found == wanted else f"was started from checkpoint {wanted} of {training}; {where} now has {found}"
