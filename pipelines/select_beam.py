"""Selection over more rows than memory holds: the driver of the Beam job, and the choice between it and memory.

The manifest is written only when every part that the job names stands on storage and they hold every candidate once.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from pipelines.beam_selection.job import SelectionJob
from pipelines.beam_selection.rows import SelectionTask, UnitParts
from pipelines.candidates import available_bytes
from pipelines.keep import refuse_sketchless
from pipelines.options import Execution
from pipelines.results import read_results, results_url
from pipelines.runners import model_hints, refuse_unreachable, run_job
from pipelines.select import Prepared, SelectReport, finish, prepare
from schemas.errors import InputError, RunIncomplete
from schemas.fingerprint import fingerprint, plain
from schemas.parquet import Part
from schemas.run import Run
from schemas.storage import exists, list_names, remove
from selection_ops.selectors import Budget, SelectorSettings, get_selector
from selection_ops.selectors.baselines import Ranking
from selection_ops.selectors.limit import refuse_few_targets
from selection_ops.selectors.problem import plain_target

COLUMN_BYTES = 1_200
"""Memory that a candidate takes in the in-memory path beside its sketch: columns, ids, texts, scores."""


def choose_engine(run: Run, scoring: str) -> tuple[str, str]:
    """`memory` or `beam`, and why: memory where the columns of all candidates take at most half of what is available.

    Sketches do not count: where they are too many, the in-memory path maps them from scratch.
    """
    rows = int(run.manifest("score", scoring).summary["samples"])
    needed, available = rows * COLUMN_BYTES, available_bytes()
    engine = "memory" if needed <= available / 2 else "beam"
    said = f"{rows:,} candidates take about {needed / 1e9:.1f} GB of the {available / 1e9:.1f} GB available"
    return engine, said


def refuse_unsupported(settings: SelectorSettings) -> None:
    """Stop before anything runs where the job does not know the selector: those of Lehr it does."""
    if settings.selector not in ("match", "direct", "direct-signed") and not isinstance(
        get_selector(settings.selector), Ranking
    ):
        raise InputError(
            f"selector {settings.selector!r} is not run by the engine beam, which knows how 'match', 'direct', 'direct-signed' and "
            "rankings go through rows in many places; use --engine memory, or make it a `Ranking`"
        )


def search_rounds(samples: int) -> int:
    """Rounds after which a few thousand rows are undecided; each leaves about a fiftieth, or much less."""
    return 1 if samples <= 10**6 else 2 if samples <= 10**8 else 3


def run_select_beam(
    run: Run,
    name: str,
    scoring: str,
    target: str,
    budget: Budget,
    settings: SelectorSettings,
    execution: Execution,
    *,
    keep_overlapping: bool = False,
    columns_only: bool = False,
    rounds: int | None = None,
    tick: Callable[[], None] = lambda: None,
) -> SelectReport:
    """`run_select` as one Beam job: the same rows in the same order, to ties; parts are those of the work units.

    The relaxed bound and the two-fold held-out set cosine take further passes over the whole pool and are left out.
    `rounds` sets the rounds of every search.
    """
    started = time.perf_counter()
    refuse_unsupported(settings)
    refuse_unreachable(run, execution)
    if model_hints(execution):
        raise InputError("select runs no model, so it has no use for --accelerator and --min-ram")
    ready = prepare(
        run, name, scoring, target, budget, settings,
        keep_overlapping=keep_overlapping, columns_only=columns_only, engine="beam",
    )  # fmt: skip
    selector = get_selector(settings.selector)
    if selector.needs_target and ready.data is None:
        raise InputError(f"selector {selector.name!r} needs a target; name one, or use selector 'random'")
    if settings.selector in ("direct", "direct-signed") and ready.data is not None:
        refuse_few_targets(settings.selector, ready.data.geometry, settings)
    if "keep" in ready.score.inputs and not (isinstance(selector, Ranking) or plain_target(settings)):
        raise refuse_sketchless(scoring, f"selector {selector.name!r} with these settings")
    units = _units(ready)
    samples = sum(unit.features.rows for unit in units)
    task = SelectionTask(
        run_url=run.url,
        name=name,
        scoring=scoring,
        target=target,
        budget=budget,
        settings=settings,
        keep_overlapping=keep_overlapping,
        columns_only=ready.columns_only,
        rounds=search_rounds(samples) if rounds is None else rounds,
        samples=samples,
    )
    url = results_url(run, "select", name)
    remove(url)
    job = SelectionJob(
        task=task,
        units=units,
        footer_spec=fingerprint(ready.select_spec),
        score=ready.inputs["score"],
        results_url=url,
    )
    folder = run.path(run.selection_folder(name))
    run_job(job, execution, finished=lambda: len(list_names(folder, ".parquet")), tick=tick)
    report = _finish(run, ready, task, units, read_results(url))
    return dataclasses.replace(report, seconds={"total": time.perf_counter() - started})


def _units(ready: Prepared) -> tuple[UnitParts, ...]:
    features = [part for part in ready.score.parts if part.path.startswith("features/")]
    if not features:
        raise InputError("the plan has no work units, so there is nothing to select from")
    curvature: list[Part | None] = [None] * len(features)
    if ready.curvature is not None:
        curvature = list(ready.curvature.parts)
        if [part.rows for part in features] != [part.rows for part in ready.curvature.parts]:
            raise InputError("curvature columns are not those of the features, part by part; run `lehr score` again")
    return tuple(
        UnitParts(index=index, features=one, curvature=other)
        for index, (one, other) in enumerate(zip(features, curvature))
    )


def _finish(
    run: Run, ready: Prepared, task: SelectionTask, units: tuple[UnitParts, ...], records: dict[str, dict[str, Any]]
) -> SelectReport:
    parts: list[Part] = []
    reasons: Counter[str] = Counter()
    domains: dict[str, list[int]] = {}
    tokens = selected = 0
    weights = 0.0
    for unit in units:
        record = records.get(f"part-{unit.index:05d}")
        if record is None or not exists(run.path(record["part"]["path"])):
            raise RunIncomplete("the selection is not written whole; run the same command again")
        part = Part(**record["part"])
        if part.rows != unit.features.rows:
            raise RunIncomplete(
                f"{part.path} holds {part.rows} of {unit.features.rows} candidates; run the same command again"
            )
        parts.append(part)
        reasons.update(record["reasons"])
        selected, tokens, weights = (
            selected + record["selected"],
            tokens + record["tokens"],
            weights + record["weights"],
        )
        for domain, (rows, size) in record["domains"].items():
            held = domains.setdefault(domain, [0, 0])
            held[0], held[1] = held[0] + rows, held[1] + size
    if "solution" not in records:
        raise RunIncomplete("the job ended without its solution; run the same command again")
    solved = records["solution"]
    asked = {"bound": task.settings.bound, "set_cosine_heldout": task.settings.two_fold}
    found = {"selector": task.settings.selector} | solved["certificate"]
    found["not_computed"] = [name for name, wanted in asked.items() if wanted and ready.data and name not in found]
    record = {
        "selector": task.settings.selector,
        "settings": plain(task.settings),
        "budget": plain(task.budget),
        "certificate": found,
        "diagnostics": _diagnostics(ready, task, solved, records, reasons, domains, selected, tokens, weights),
        "counts": dict(sorted(reasons.items())),
    }
    record["warnings"] = record["diagnostics"].pop("warnings")
    summary = {
        "candidates": sum(part.rows for part in parts),
        "selected": selected,
        "tokens": tokens,
        "counts": record["counts"],
    }
    return finish(run, task.name, ready.select_spec, ready.inputs, parts, record, summary)


def _diagnostics(
    ready: Prepared,
    task: SelectionTask,
    solved: dict[str, Any],
    records: dict[str, dict[str, Any]],
    reasons: Counter[str],
    domains: dict[str, list[int]],
    selected: int,
    tokens: int,
    weights: float,
) -> dict[str, Any]:
    """What `describe_selection` gives, but for the bound and the two folds."""
    warnings: list[str] = []
    certificate = solved["certificate"]
    found: dict[str, Any] = {
        "candidates": solved["candidates"],
        "pool": solved["pool"],
        "selected": selected,
        "selected_tokens": tokens,
        "weight_sum": weights,
        "duplicates_dropped": reasons["duplicate_of"],
        "non_finite": solved["reasons"].get("non_finite", 0),
        "domains": _shares(solved["domains"], domains),
    }
    if solved["caps"]:
        found["outlier_caps"] = solved["caps"]
    if not selected:
        warnings.append(f"nothing fits a budget of {task.budget.amount} {task.budget.unit}")
    if task.settings.fractional and task.budget.unit == "tokens" and tokens > task.budget.amount:
        warnings.append(
            f"the weights meet the budget, but the {selected} samples that carry them hold {tokens} tokens; it is these that training reads"
        )
    if certificate.get("redundancy_rho") == 0.0:
        warnings.append("redundancy weighed nothing: the selection without it has no gain to measure it by")
    if ready.data is not None:
        geometry = ready.data.geometry
        found["target"] = geometry.summary()
        found["share_stiff"], found["share_flat"] = geometry.share_stiff, geometry.share_flat
        found["share_null"] = geometry.share_null
        warnings += [
            text for text in geometry.warnings if "influence" not in text or "influence" in task.settings.selector
        ]
    if task.columns_only:
        warnings.append("set cosines and effective rank need sketches, and only scalar columns were read")
    else:
        spread = records.get("spread", {"effective_rank": 0.0, "effective_rank_rows": 0})
        found |= {key: spread[key] for key in ("effective_rank", "effective_rank_rows")}
        found |= {key: value for key, value in records.get("cosines", {}).items() if key != "key"}
        if ready.data is not None:
            found |= {"set_cosine_bound": None, "set_cosine_heldout": None, "set_cosine_heldout_folds": None}
            if task.settings.bound or task.settings.two_fold:
                warnings.append(
                    "the engine beam leaves out the bound and the held-out set cosine, which take more passes over the whole pool"
                )
    raised = certificate.get("limit_raised_by")
    if raised is not None:
        warnings.append(f"the stiff limit was infeasible and was raised by a factor of {raised:.4g}")
    unhelpful = certificate.get("filled_without_gain")
    if unhelpful:
        warnings.append(f"{unhelpful} samples without gain were needed to fill the budget; allow_short leaves them out")
    return found | {"warnings": warnings}


def _shares(before: dict[str, list[int]], after: dict[str, list[int]]) -> dict[str, dict[str, float]]:
    sums = [[max(sum(held[at] for held in side.values()), 1e-300) for at in (0, 1)] for side in (before, after)]
    return {
        name: {
            "before": before[name][0] / sums[0][0],
            "after": after.get(name, [0, 0])[0] / sums[1][0],
            "before_tokens": before[name][1] / sums[0][1],
            "after_tokens": after.get(name, [0, 0])[1] / sums[1][1],
        }
        for name in sorted(before)
    }
