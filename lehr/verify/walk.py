"""All checks of a run, in the order of the flow."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

from lehr.catalog import stream_folders
from lehr.verify.comparison import check_comparison
from lehr.verify.files import Manifests, check_files, read_manifests
from lehr.verify.findings import Check
from lehr.verify.lineage import check_lineage
from lehr.verify.scoring import check_plan, check_scoring
from lehr.verify.selection import check_selection, check_stream
from lehr.verify.training import check_training
from schemas.run import Run
from schemas.units import PLAN_NAME, Plan, read_plan


def _nothing(_: int) -> None:
    return None


def verify(
    run: Run,
    *,
    quick: bool = False,
    on_total: Callable[[int], None] = _nothing,
    tick: Callable[[int], None] = _nothing,
) -> Iterator[Check]:
    """Check everything that the manifests of a run promise, one `Check` after the other.

    `quick` compares sizes and footers instead of hashing every file, and reads no shard. `on_total` is told the bytes of
    all listed files, `tick` the bytes of each file that was looked at.
    """
    manifests, checks = read_manifests(run)
    yield from checks
    on_total(sum(part.bytes for manifest in manifests.values() for part in manifest.parts))
    yield from check_files(run, manifests, quick=quick, tick=tick)
    yield from check_lineage(run, manifests)
    plan = yield from _planned(run, manifests)
    for stage, name in manifests:
        if stage == "score" and plan is not None:
            yield from check_scoring(run, plan, manifests, name, _nothing)
        elif stage == "select":
            yield from check_selection(run, manifests, name)
        elif stage == "train":
            yield from check_training(run, manifests, name, quick=quick)
        elif stage == "compare":
            yield check_comparison(run, manifests, name)
    if not quick:
        for _, folder in stream_folders(run):
            yield check_stream(run, manifests, folder, _nothing)


def _planned(run: Run, manifests: Manifests) -> Generator[Check, None, Plan | None]:
    """The check of the plan; returns the plan where it can be read."""
    if ("plan", PLAN_NAME) not in manifests:
        return None
    check = Check(subject="plan", promise="readable", unit="units")
    plan: Plan | None = None
    with check.guarded():
        plan = read_plan(run)
    if plan is None:
        yield check
        return None
    yield check_plan(plan)
    return plan
