"""What stands in a run directory: every artifact by the name of its view, and the files that hold it.

Only what a manifest lists is a result. Where a stage has not finished, the files it has finished so far are offered
instead, and the caller is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from schemas.manifest import Manifest
from schemas.run import Run
from schemas.storage import join, list_names
from schemas.tables import schema_names

FLOW = ("plan", "scoring", "target", "keep", "score", "curvature", "select", "export", "train")
"""Stages in the order in which a corpus goes through them."""
OPTIONAL = ("keep",)
"""Of them, those that a finished run may lack."""

JOURNAL = ("steps", "decisions", "evals", "timings")

TABLE_VIEWS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "plan": ("plan", (), "work units of the corpus"),
    "features": (
        "features",
        ("scoring",),
        "every scored sample: place, preview, tokens, loss, norms, sketch (null where it was not kept)",
    ),
    "rejects": ("rejects", ("scoring",), "rows and windows that could not be scored, and why"),
    "curvature": ("curvature", ("target", "scoring"), "geometry of every scored sample against a target"),
    "target_samples": ("target_samples", ("target", "scoring"), "the target set and the held-out set"),
    "spectrum": ("spectrum", ("target", "scoring"), "eigenvalues and vectors of a target's curvature"),
    "preconditioners": (
        "preconditioner",
        ("scoring",),
        "rank-one fits of an optimizer's preconditioner, folded into projections",
    ),
    "selections": ("selection", ("selection",), "every candidate a selector considered, and what decided"),
    "steps": ("steps", ("training",), "every optimizer step of every training"),
    "decisions": ("decisions", ("training",), "every sample offered to a training, and what was done with it"),
    "timings": ("timings", ("training",), "seconds and operations of every step, by process"),
    "arms": ("arms", ("comparison",), "every arm of every comparison: difference to the control, cost, verdict"),
    "arm_trainings": ("arm_trainings", ("comparison",), "every training of every arm, with its final losses"),
}
"""View name: its table schema, its name columns, and what it holds."""
if "evals" in schema_names():
    TABLE_VIEWS["evals"] = ("evals", ("training",), "evaluations during trainings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The files of one stage that feed a view."""

    view: str
    names: dict[str, str]
    """Values of the view's name columns."""
    paths: tuple[str, ...]
    """Parquet files, relative to the run."""
    finished: bool
    """Whether a manifest lists them."""


def _parquet(run: Run, folder: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in list_names(run.path(folder), ".parquet"))


def _listed(manifest: Manifest, folder: str) -> tuple[str, ...]:
    return tuple(p.path for p in manifest.parts if p.path.startswith(f"{folder}/") and p.path.endswith(".parquet"))


def _names(run: Run, stage: str) -> list[str]:
    return [file.removesuffix(".json") for file in list_names(run.path(f"stages/{stage}"), ".json")]


def _source(run: Run, view: str, stage: str, name: str, folder: str, names: dict[str, str]) -> Source:
    """Files of one stage: as its manifest lists them, or else those that stand."""
    if name in _names(run, stage):
        paths = _listed(run.manifest(stage, name), folder)
        if not paths and view in JOURNAL:
            # A journal table that is never compared (seconds, hosts) may stand beside the listed ones.
            paths = _parquet(run, folder)
        return Source(view=view, names=names, paths=paths, finished=True)
    return Source(view=view, names=names, paths=_parquet(run, folder), finished=False)


def _plan(run: Run, view: str) -> Iterator[Source]:
    if "corpus" in _names(run, "plan"):
        yield Source(view=view, names={}, paths=(run.plan_path,), finished=True)
    elif run.plan_path in list_names(run.url):
        yield Source(view=view, names={}, paths=(run.plan_path,), finished=False)


def _scored(run: Run, view: str) -> Iterator[Source]:
    for scoring in sorted({*_names(run, "score"), *run.folders(view)}):
        yield _source(run, view, "score", scoring, f"{view}/{scoring}", {"scoring": scoring})


def _preconditioned(run: Run, view: str) -> Iterator[Source]:
    for scoring in run.folders(view):
        yield _source(run, view, "scoring", scoring, f"{view}/{scoring}", {"scoring": scoring})


def _targeted(run: Run, view: str) -> Iterator[Source]:
    stage, root = ("curvature", "curvature") if view == "curvature" else ("target", "targets")
    known = {tuple(name.split(".", 1)) for name in _names(run, stage) if "." in name}
    known |= {(target, scoring) for target in run.folders(root) for scoring in run.folders(f"{root}/{target}")}
    for target, scoring in sorted(known):
        folder = f"{root}/{target}/{scoring}"
        source = _source(run, view, stage, f"{target}.{scoring}", folder, {"target": target, "scoring": scoring})
        if view != "curvature":
            wanted = "samples" if view == "target_samples" else "spectrum"
            source = dataclasses.replace(
                source, paths=tuple(path for path in source.paths if path.startswith(f"{folder}/{wanted}"))
            )
        yield source


def _selections(run: Run, view: str) -> Iterator[Source]:
    for name in sorted({*_names(run, "select"), *run.folders("selections")}):
        yield _source(run, view, "select", name, f"selections/{name}", {"selection": name})


def _journal(run: Run, view: str) -> Iterator[Source]:
    for name in sorted({*_names(run, "train"), *run.folders("trainings")}):
        yield _source(run, view, "train", name, f"trainings/{name}/{view}", {"training": name})


def _compared(run: Run, view: str) -> Iterator[Source]:
    file = {"arms": "arms.parquet", "arm_trainings": "trainings.parquet"}[view]
    for name in _names(run, "compare"):
        source = _source(run, view, "compare", name, run.comparison_folder(name), {"comparison": name})
        yield dataclasses.replace(source, paths=tuple(path for path in source.paths if path.endswith(f"/{file}")))


def sources(run: Run, view: str) -> list[Source]:
    """Everything that feeds a table view, by name; sources without any file are left out."""
    if view == "plan":
        found = _plan(run, view)
    elif view in ("features", "rejects"):
        found = _scored(run, view)
    elif view == "preconditioners":
        found = _preconditioned(run, view)
    elif view in ("curvature", "target_samples", "spectrum"):
        found = _targeted(run, view)
    elif view == "selections":
        found = _selections(run, view)
    elif view in ("arms", "arm_trainings"):
        found = _compared(run, view)
    else:
        found = _journal(run, view)
    return [source for source in found if source.paths]


def in_flow(stages: Iterable[str]) -> list[str]:
    """Stages in the order of the flow, unknown ones last."""
    return sorted(stages, key=lambda stage: (FLOW.index(stage) if stage in FLOW else len(FLOW), stage))


def stage_manifests(run: Run) -> list[Manifest]:
    """Every finished stage of a run, in the order of the flow."""
    return [manifest for stage in in_flow(run.folders("stages")) for manifest in run.manifests(stage)]


def stream_folders(run: Run) -> list[tuple[str, str]]:
    """(stream, folder relative to the run) of every finished generation of every stream."""
    return [
        (stream, f"streams/{stream}/{generation}")
        for stream in run.folders("streams")
        for generation in run.folders(f"streams/{stream}")
        if "index.json" in list_names(join(run.path("streams"), stream, generation))
    ]
