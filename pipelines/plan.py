"""The plan: a corpus cut into work units, and what scoring it would cost."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson

from pipelines.listing import CorpusFile, Listing, corpus_files, list_corpus
from pipelines.readers import file_format, get_reader
from schemas.errors import CorruptFile, InputError, LehrError, SourceChanged
from schemas.fingerprint import plain
from schemas.manifest import Manifest, write_manifest
from schemas.run import Run
from schemas.spec import EncodingSpec, PlanSpec
from schemas.storage import exists, join, normalise, read_bytes, write_whole
from schemas.units import PLAN_NAME, Plan, WorkUnit, read_plan, write_plan_table

__all__ = ["CostEstimate", "PlanReport", "corpus_files", "estimate_cost", "make_plan"]

LOGGER = logging.getLogger(__name__)
_THREADS = 4
_NAMED_FILES = 5

DEFAULT_TOKENS_PER_SECOND = 400.0
"""One CPU core with a model of 135 million parameters in bfloat16: the slow end of what people use."""
_SKETCH_BYTES = 1.77
"""Per number: float16, byte-stream split, zstd."""
_ROW_BYTES = 250
"""Per sample: everything else of a features row and a curvature row, compressed."""

Progress = Callable[[int, int], None]
"""Called with (bytes scanned, bytes in all)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What a plan holds, and what changed since the plan before it."""

    run: Run
    fingerprint: str
    """Of the plan's manifest."""
    files: int
    units: int
    rows: int
    bytes: int
    """Bytes of the planned ranges as they are stored."""
    tokens: int
    """Estimated."""
    warnings: tuple[str, ...]
    written: bool
    """Whether the plan was written; an unchanged corpus leaves it alone."""
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """What scoring a plan would take."""

    hours: float
    """Of one worker at the assumed speed."""
    samples: int
    """Rows, and a window for every `max_tokens` of their tokens: an upper estimate."""
    bytes: int
    """Of features and curvature of one target."""
    scalar_bytes: int
    """The same without sketches."""


def estimate_cost(
    rows: int,
    tokens: int,
    *,
    k: int,
    tokens_per_second: float = DEFAULT_TOKENS_PER_SECOND,
    max_tokens: int = EncodingSpec().max_tokens,
) -> CostEstimate:
    """Hours, samples and output bytes of scoring `rows` of `tokens` with sketches of `k` numbers."""
    if tokens_per_second <= 0:
        raise InputError(f"tokens_per_second must be positive, not {tokens_per_second}")
    if k <= 0:
        raise InputError(f"k must be positive, not {k}")
    samples = rows + tokens // max_tokens
    return CostEstimate(
        hours=tokens / tokens_per_second / 3600,
        samples=samples,
        bytes=round(samples * (_SKETCH_BYTES * k + _ROW_BYTES)),
        scalar_bytes=samples * _ROW_BYTES,
    )


@dataclasses.dataclass(frozen=True)
class _Scanned:
    units: tuple[WorkUnit, ...]
    warnings: tuple[str, ...]


def make_plan(
    run_dir: str,
    corpus: str | Sequence[str],
    spec: PlanSpec,
    *,
    extend: bool = False,
    progress: Progress | None = None,
) -> PlanReport:
    """Cut `corpus` into work units and write `plan.parquet` and the manifest of stage plan.

    A corpus that equals the plan of the run leaves it alone; files that their file system says are untouched are not read
    again. One that differs raises `SourceChanged` naming the files; with `extend`, new files are added, changed ones
    replaced, and planned files that are not named this time stay as long as they exist. Units of unchanged files keep
    their ids. `extend` may also change `spec.limit`; other settings are fixed by the first plan (`InputError`).
    """
    url = normalise(run_dir)
    listing = _outside(list_corpus(corpus, any_suffix=spec.format != "auto"), url)
    old = _previous(url, listing.root, spec, extend)
    files = list(listing.files)
    removed: tuple[str, ...] = ()
    if old is not None and extend:
        files, removed = _with_planned(listing, old)
    scanned = _scan(listing.root, files, spec, _untouched(url, old, spec), progress)
    units = tuple(unit for file in scanned.values() for unit in file.units)
    if not units:
        raise InputError(
            f"{listing.root}: no row to score in {len(files):,} files; {'; '.join(_warnings(listing, scanned))}"
        )
    if old is not None:
        difference = _Difference.between(old.units, units)
        if not difference.any and old.spec == spec:
            run = Run.open(url)
            _remember(run, old.fingerprint, files, scanned)
            return _report(run, run.manifest("plan", PLAN_NAME), written=False)
        if not extend:
            raise SourceChanged(
                f"{listing.root} differs from the plan of {url}: {difference}. Scoring needs the planned files; run `lehr plan` "
                "with --extend to add and replace, or use a new run directory"
            )
    else:
        difference = _Difference((), (), ())
    run = Run.create(url, corpus=spec.corpus, root=listing.root)
    part = write_plan_table(run, spec, units)
    manifest = Manifest(
        stage="plan",
        name=PLAN_NAME,
        spec=plain(spec),
        inputs={},
        parts=(part,),
        summary={
            "files": len({unit.path for unit in units}),
            "units": len(units),
            "rows": sum(unit.row_count for unit in units),
            "bytes": _stored_bytes(units),
            "tokens": sum(unit.estimated_tokens for unit in units),
            "warnings": _warnings(listing, scanned),
        },
    )
    write_manifest(run.path(run.manifest_path("plan", PLAN_NAME)), manifest)
    _remember(run, manifest.fingerprint, files, scanned)
    report = _report(run, manifest, written=True)
    gone = tuple(dict.fromkeys((*removed, *difference.removed)))
    return dataclasses.replace(report, added=difference.added, changed=difference.changed, removed=gone)


def _outside(listing: Listing, run_url: str) -> Listing:
    """The listing without what lies in the run directory, which may stand inside the corpus folder."""
    files = tuple(file for file in listing.files if not join(listing.root, file.path).startswith(f"{run_url}/"))
    if not files:
        raise InputError(
            f"the corpus at {listing.root} lies in the run directory {run_url}; choose another run directory"
        )
    return dataclasses.replace(listing, files=files)


def _report(run: Run, manifest: Manifest, *, written: bool) -> PlanReport:
    summary = dict(manifest.summary)
    warnings = tuple(summary.pop("warnings"))
    return PlanReport(run=run, fingerprint=manifest.fingerprint, warnings=warnings, written=written, **summary)


def _warnings(listing: Listing, scanned: dict[str, _Scanned]) -> list[str]:
    return [*listing.warnings, *(warning for file in scanned.values() for warning in file.warnings)]


def _stored_bytes(units: Sequence[WorkUnit]) -> int:
    ranges = {(unit.path, unit.byte_start, unit.byte_end) for unit in units}
    return sum(end - start for _, start, end in ranges)


# What stood before.


def _previous(url: str, root: str, spec: PlanSpec, extend: bool) -> Plan | None:
    """The plan that stands, after it was found to be of the same corpus and settings; None where there is none."""
    if not exists(join(url, "run.json")):
        return None
    run = Run.create(url, corpus=spec.corpus, root=root)
    if not exists(run.path(run.manifest_path("plan", PLAN_NAME))):
        return None
    try:
        plan = read_plan(run)
    except CorruptFile:
        if not extend:
            raise
        # The plan is made anew, whole; a process that was killed between table and manifest leaves it like this.
        LOGGER.warning("the plan of %s is damaged or half replaced; it is made again", url)
        return None
    planned = dataclasses.replace(plan.spec, limit=spec.limit) if extend else plan.spec
    if planned != spec:
        differences = [
            f"{name} {before!r}, now {after!r}" for name, before, after in _settings(plan.spec, spec) if before != after
        ]
        raise InputError(
            f"{url} was planned with other settings: {'; '.join(differences)}. Repeat the settings of the first plan "
            "(--extend may change --limit), or use a new run directory"
        )
    return plan


def _settings(before: PlanSpec, after: PlanSpec) -> Iterator[tuple[str, Any, Any]]:
    for one, other in ((before, after), (before.columns, after.columns)):
        for field in dataclasses.fields(one):
            if field.name != "columns":
                yield field.name, getattr(one, field.name), getattr(other, field.name)


def _with_planned(listing: Listing, old: Plan) -> tuple[list[CorpusFile], tuple[str, ...]]:
    """Listed files and planned ones that still exist, by path; and the planned ones that do not."""
    listed = {file.path: file for file in listing.files}
    missing = [path for path in dict.fromkeys(unit.path for unit in old.units) if path not in listed]
    removed = []
    for path in missing:
        try:
            found = list_corpus(join(listing.root, path), any_suffix=True)
            listed[path] = dataclasses.replace(found.files[0], path=path)
        except InputError:
            removed.append(path)
    return [listed[path] for path in sorted(listed)], tuple(removed)


@dataclasses.dataclass(frozen=True)
class _Difference:
    added: tuple[str, ...]
    changed: tuple[str, ...]
    removed: tuple[str, ...]

    @classmethod
    def between(cls, before: Sequence[WorkUnit], after: Sequence[WorkUnit]) -> _Difference:
        one, other = _by_path(before), _by_path(after)
        return cls(
            tuple(path for path in other if path not in one),
            tuple(path for path in other if path in one and one[path] != other[path]),
            tuple(path for path in one if path not in other),
        )

    @property
    def any(self) -> bool:
        return bool(self.added or self.changed or self.removed)

    def __str__(self) -> str:
        kinds = (("changed", self.changed), ("new", self.added), ("gone", self.removed))
        return "; ".join(
            f"{len(paths):,} {kind} ({', '.join(paths[:_NAMED_FILES])}{', ...' * (len(paths) > _NAMED_FILES)})"
            for kind, paths in kinds
            if paths
        )


def _by_path(units: Sequence[WorkUnit]) -> dict[str, list[WorkUnit]]:
    found: dict[str, list[WorkUnit]] = {}
    for unit in units:
        found.setdefault(unit.path, []).append(unit)
    return found


# What need not be read again: the stamps of the files as they were planned. Losing this costs a scan and nothing else.


def _stamps_path(run: Run) -> str:
    return run.path(f"{run.timings_folder('plan', PLAN_NAME)}/files.json")


def _remember(run: Run, plan: str, files: Sequence[CorpusFile], scanned: dict[str, _Scanned]) -> None:
    stamps = {
        file.path: [file.stamp, list(scanned[file.path].warnings)]
        for file in files
        if file.stamp and file.path in scanned
    }
    try:
        write_whole(_stamps_path(run), orjson.dumps({"plan": plan, "files": stamps}))
    except LehrError as error:
        LOGGER.info("stamps of the corpus files are not kept: %s", error)


def _untouched(url: str, old: Plan | None, spec: PlanSpec) -> dict[str, tuple[str, _Scanned]]:
    """(stamp, units and warnings) of every file of the plan that stands."""
    if old is None or old.spec != spec or spec.limit:
        return {}
    try:
        record = orjson.loads(read_bytes(_stamps_path(Run.open(url))))
        if record["plan"] != old.fingerprint:
            return {}
        units = _by_path(old.units)
        return {
            path: (stamp, _Scanned(tuple(units.get(path, ())), tuple(map(str, warnings))))
            for path, (stamp, warnings) in record["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, LehrError):
        return {}


# Scanning.


class _Tally:
    """Bytes scanned, over all threads."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._lock = threading.Lock()
        self._done = 0
        self._total = total
        self._progress = progress

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress is not None:
                self._progress(self._done, self._total)


def _scan(
    root: str,
    files: Sequence[CorpusFile],
    spec: PlanSpec,
    untouched: dict[str, tuple[str, _Scanned]],
    progress: Progress | None,
) -> dict[str, _Scanned]:
    """Units and warnings of every file, in order; with a limit, of as many first files as it takes."""
    tally = _Tally(sum(file.size for file in files), progress)
    stop = threading.Event()

    def scan(file: CorpusFile, limit: int) -> _Scanned:
        known = untouched.get(file.path)
        if known is not None and file.stamp and known[0] == file.stamp:
            tally.add(file.size)
            return known[1]
        return _scan_file(root, file, dataclasses.replace(spec, limit=limit), tally, stop)

    if spec.limit:
        found: dict[str, _Scanned] = {}
        left = spec.limit
        for file in files:
            found[file.path] = scan(file, left)
            left -= sum(unit.row_count for unit in found[file.path].units)
            if left <= 0:
                break
        return found
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        try:
            return dict(zip((file.path for file in files), pool.map(lambda file: scan(file, 0), files)))
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _scan_file(root: str, file: CorpusFile, spec: PlanSpec, tally: _Tally, stop: threading.Event) -> _Scanned:
    units, warnings, done = [], [], 0
    name = file_format(file.path, spec)

    def warn(message: str) -> None:
        # A manifest holds no absolute path, so that plans of one corpus in two places are equal.
        warnings.append(message.replace(join(root, file.path), file.path))

    for unit in get_reader(name).scan(root, file.path, spec, warn=warn):
        units.append(unit)
        if name != "parquet":
            tally.add(unit.byte_end - done)
            done = unit.byte_end
        if stop.is_set():
            break
    tally.add(max(0, file.size - done))
    return _Scanned(tuple(units), tuple(warnings))
