"""The layout of a run directory: one place that knows every path."""

from __future__ import annotations

import dataclasses
import re
import uuid
from typing import Any

import orjson

from schemas.errors import CorruptFile, InputError, LehrError
from schemas.fingerprint import pretty_json
from schemas.manifest import Manifest, read_manifest
from schemas.spec import LAYOUT_VERSION, FeatureSpec, feature_spec_from_dict
from schemas.storage import exists, join, list_folders, list_names, normalise, read_bytes, write_whole

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")

_WAY_OUT = {
    "plan": "run `lehr plan` first",
    "scoring": "run `lehr target` or `lehr score` with --model first",
    "target": "run `lehr target` first",
    "score": "run `lehr score` to its end first",
    "curvature": "run `lehr score` to its end first",
    "select": "run `lehr select` first",
    "export": "run `lehr export` first",
    "train": "run `lehr train` to its end first",
    "compare": "run `lehr compare` to its end first",
}


def check_name(kind: str, name: str) -> str:
    """`name` itself if it can name a folder everywhere; raises `InputError` otherwise."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{kind} name {name!r} is not usable: letters, digits, '-' and '_', starting with a letter or digit, at most 100"
        )
    return name


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory: one corpus under one or more scorings, targets, selections, trainings.

    Paths returned by methods are relative to `url`, as manifests list them.
    """

    url: str
    run_id: str
    corpus: str
    root: str

    @classmethod
    def create(cls, url: str, *, corpus: str, root: str) -> Run:
        """Create the directory, or open it where it stands for the same corpus and root."""
        url = normalise(url)
        check_name("corpus", corpus)
        record = {"run_id": uuid.uuid4().hex, "layout_version": LAYOUT_VERSION, "corpus": corpus, "root": root}
        try:
            write_whole(join(url, "run.json"), pretty_json(record), create_only=True)
        except FileExistsError:
            run = cls.open(url)
            if (run.corpus, run.root) != (corpus, root):
                raise InputError(
                    f"{url} is a run over corpus {run.corpus!r} at {run.root}, not {corpus!r} at {root}; choose another run directory"
                ) from None
            return run
        return cls(url, record["run_id"], corpus, root)  # type: ignore[arg-type]

    @classmethod
    def open(cls, url: str) -> Run:
        """Open an existing run directory."""
        url = normalise(url)
        try:
            data = read_bytes(join(url, "run.json"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(f"{url} is not a run directory (no run.json); `lehr plan` creates one") from error
        except LehrError as error:
            raise InputError(f"{url} is not a run directory: {error}") from error
        try:
            record: dict[str, Any] = orjson.loads(data)
            version = record["layout_version"]
            run = cls(url, record["run_id"], record["corpus"], record["root"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptFile(
                f"{url}/run.json is damaged ({error}); delete it and run `lehr plan` once more with the same corpus and options, "
                "which writes it again and keeps everything else"
            ) from error
        if version != LAYOUT_VERSION:
            raise InputError(f"{url} has layout version {version}; this Lehr reads {LAYOUT_VERSION}")
        return run

    def path(self, relative: str) -> str:
        """URL of a path relative to the run."""
        return join(self.url, relative)

    # Paths, relative to the run.

    plan_path = "plan.parquet"

    def manifest_path(self, stage: str, name: str) -> str:
        return f"stages/{stage}/{name}.json"

    def target_folder(self, target: str, scoring: str) -> str:
        return f"targets/{check_name('target', target)}/{check_name('scoring', scoring)}"

    def preconditioner_path(self, scoring: str) -> str:
        return f"preconditioners/{check_name('scoring', scoring)}/factors.parquet"

    def features_path(self, scoring: str, unit: str) -> str:
        return f"features/{check_name('scoring', scoring)}/part-{unit}.parquet"

    def rejects_path(self, scoring: str, unit: str) -> str:
        return f"rejects/{check_name('scoring', scoring)}/part-{unit}.parquet"

    def curvature_path(self, target: str, scoring: str, unit: str) -> str:
        return f"curvature/{check_name('target', target)}/{check_name('scoring', scoring)}/part-{unit}.parquet"

    def selection_folder(self, name: str) -> str:
        return f"selections/{check_name('selection', name)}"

    def stream_folder(self, name: str, generation: int) -> str:
        return f"streams/{check_name('stream', name)}/gen-{generation:06d}"

    def training_folder(self, name: str) -> str:
        return f"trainings/{check_name('training', name)}"

    def comparison_folder(self, name: str) -> str:
        return f"comparisons/{check_name('comparison', name)}"

    def report_path(self, name: str) -> str:
        return f"reports/{check_name('report', name)}.html"

    def timings_folder(self, stage: str, name: str) -> str:
        """Where live progress, seconds and hosts are kept; never compared."""
        return f"timings/{stage}/{name}"

    # Manifests.

    def manifest(self, stage: str, name: str) -> Manifest:
        """The finished stage `stage` of that name; raises `InputError` with the command to run where it is missing."""
        known = list_names(self.path(f"stages/{stage}"), ".json")
        hint = f"; finished: {', '.join(file[:-5] for file in known)}" if known else ""
        return read_manifest(
            self.path(self.manifest_path(stage, name)), _WAY_OUT.get(stage, "its stage has not finished") + hint
        )

    def manifests(self, stage: str) -> list[Manifest]:
        """Every finished stage of that kind, by name."""
        return [self.manifest(stage, file[:-5]) for file in list_names(self.path(f"stages/{stage}"), ".json")]

    def scoring(self, name: str) -> FeatureSpec:
        """The feature spec that scoring `name` was declared with."""
        return feature_spec_from_dict(self.manifest("scoring", check_name("scoring", name)).spec)

    def keep(self, scoring: str) -> Manifest | None:
        """What was declared to be stored of a scoring; None where its features hold their sketches."""
        if not exists(self.path(self.manifest_path("keep", check_name("scoring", scoring)))):
            return None
        return self.manifest("keep", scoring)

    def targets(self, scoring: str) -> list[Manifest]:
        """Manifests of every target described under a scoring, by name."""
        return [manifest for manifest in self.manifests("target") if manifest.spec["scoring"] == scoring]

    def generations(self, stream: str) -> list[int]:
        """Finished generations of a stream, ascending."""
        found = [m.spec["generation"] for m in self.manifests("export") if m.spec["stream"] == stream]
        return sorted(found)

    def folders(self, relative: str) -> list[str]:
        """Names of the folders below a relative path."""
        return list_folders(self.path(relative))
