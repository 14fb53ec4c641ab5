"""What the report shows, read from a run with narrow queries; each piece is None or empty where the run has none."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

from lehr.audit import Audit
from lehr.status import RunStatus, run_status
from lehr.views import read_solution
from schemas.manifest import Manifest
from schemas.run import Run

SCATTER_POINTS = 5000
SCATTER_CHOSEN = 1500
SMALL_POINTS = 2000
CURVE_POINTS = 200
TABLE_SAMPLES = 8
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionData:
    """One selection with what it is judged by."""

    name: str
    manifest: Manifest
    solution: dict[str, Any]
    candidates: int
    samples: int
    tokens: int
    domains: tuple[Row, ...]
    """domain, before, after (shares)."""
    reasons: tuple[Row, ...]
    """reason, samples."""
    geometry: tuple[Row, ...]
    """A deterministic sample of candidates: alignment, stiff_cost, selected, rank, domain, preview."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetData:
    """One target under one scoring."""

    target: str
    scoring: str
    summary: dict[str, Any]
    spectra: dict[str, tuple[Row, ...]]
    """By fisher: index, eigenvalue, part, cumulative_energy, mean_share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """One training."""

    name: str
    policy: str
    steps: int
    kept: int
    offered: int
    trained_tokens: int
    offered_tokens: int
    finished: bool
    curve: tuple[Row, ...]
    """tokens, loss, target_loss, eval_loss; held-out loss before the first step at 0 tokens where it was measured."""
    weights: tuple[Row, ...]
    """step, q (five quantiles of step_weight over the kept); empty where all weights are equal."""
    fallbacks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything on the page."""

    run: Run
    status: RunStatus
    targets: tuple[TargetData, ...]
    selections: tuple[SelectionData, ...]
    primary: SelectionData | None
    """The selection that was trained on or exported, or else the one with the highest held-out set cosine."""
    shared: tuple[Row, ...]
    """selection, other, share_of_smaller."""
    best: tuple[Row, ...]
    worst: tuple[Row, ...]
    rejects: tuple[Row, ...]
    trainings: tuple[TrainingData, ...]
    lineage: tuple[Row, ...]
    scorings: tuple[Manifest, ...]
    notices: tuple[str, ...]


_QUANTILES = "quantile_cont(step_weight, [0, 0.25, 0.5, 0.75, 1])"
_SAMPLE = """rank, score, domain, tokens, loss / greatest(loss_tokens, 1) AS nats_per_token, alignment, stiff_cost,
    path, row, "window" AS part, preview, reason"""


class _Reader:
    def __init__(self, run: Run, audit: Audit) -> None:
        self.run, self.audit = run, audit

    def rows(self, sql: str) -> tuple[Row, ...]:
        return tuple(self.audit.query(sql).to_pylist())

    def targets(self) -> tuple[TargetData, ...]:
        by_key: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
        query = """SELECT target, scoring, fisher, "index" AS position, eigenvalue, part, cumulative_energy, mean_share
            FROM spectrum ORDER BY target, scoring, fisher, "index\""""
        for row in self.rows(query):
            by_key[row["target"], row["scoring"]][row["fisher"]].append(row)
        summaries = {manifest.name: manifest.summary for manifest in self.run.manifests("target")}
        return tuple(
            TargetData(
                target=target,
                scoring=scoring,
                summary=summaries.get(f"{target}.{scoring}", {}),
                spectra={fisher: tuple(rows) for fisher, rows in spectra.items()},
            )
            for (target, scoring), spectra in sorted(by_key.items())
        )

    def selections(self) -> tuple[SelectionData, ...]:
        counts = {
            row["selection"]: row
            for row in self.rows(
                """SELECT selection, count(*) AS candidates, count(*) FILTER (selected) AS samples,
                coalesce(sum(tokens) FILTER (selected), 0)::BIGINT AS tokens FROM selections GROUP BY selection"""
            )
        }
        domains = self.grouped(
            """SELECT selection, domain, count(*) / sum(count(*)) OVER (PARTITION BY selection) AS before,
            coalesce(count(*) FILTER (selected) / nullif(sum(count(*) FILTER (selected)) OVER (PARTITION BY selection), 0), 0) AS after
            FROM selections GROUP BY selection, domain ORDER BY selection, after DESC, before DESC, domain"""
        )
        reasons = self.grouped(
            """SELECT selection, split_part(reason, ' ', 1) AS reason, count(*) AS samples FROM selections
            GROUP BY selection, split_part(reason, ' ', 1) ORDER BY selection, samples DESC, reason"""
        )
        geometry = self.grouped(
            f"""SELECT selection, alignment, stiff_cost, selected, rank, domain, preview FROM selections
            WHERE alignment IS NOT NULL AND stiff_cost IS NOT NULL
            QUALIFY row_number() OVER (PARTITION BY selection, selected ORDER BY selected, rank, sample_id)
                <= CASE WHEN selected THEN {SCATTER_CHOSEN} ELSE {SCATTER_POINTS} END
            ORDER BY selection, sample_id"""
        )
        return tuple(
            SelectionData(
                name=manifest.name,
                manifest=manifest,
                solution=read_solution(self.run, manifest.name),
                candidates=counts.get(manifest.name, {}).get("candidates", 0),
                samples=counts.get(manifest.name, {}).get("samples", 0),
                tokens=counts.get(manifest.name, {}).get("tokens", 0),
                domains=domains[manifest.name],
                reasons=reasons[manifest.name],
                geometry=geometry[manifest.name],
            )
            for manifest in self.run.manifests("select")
        )

    def grouped(self, sql: str, key: str = "selection") -> dict[str, tuple[Row, ...]]:
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows(sql):
            found[row[key]].append(row)
        return defaultdict(tuple, {name: tuple(rows) for name, rows in found.items()})

    def samples(self, selection: str, order: str) -> tuple[Row, ...]:
        name = selection.replace("'", "''")
        condition = "rank IS NOT NULL" if order == "rank" else "score IS NOT NULL"
        return self.rows(
            f"""SELECT {_SAMPLE} FROM selections WHERE selection = '{name}' AND {condition}
            ORDER BY {order}, sample_id LIMIT {TABLE_SAMPLES}"""
        )

    def trainings(self) -> tuple[TrainingData, ...]:
        finished = {manifest.name: manifest.summary for manifest in self.run.manifests("train")}
        bins = f"least(step, 1 + (step - 1) * {CURVE_POINTS} // max(step) OVER (PARTITION BY training))"
        curves = self.grouped(
            f"""SELECT training, bin, max(total_trained_tokens) AS tokens, avg(loss) AS loss, avg(target_loss) AS target_loss,
            avg(eval_loss) AS eval_loss FROM (SELECT *, {bins} AS bin FROM steps)
            GROUP BY training, bin ORDER BY training, bin""",
            "training",
        )
        weights = self.grouped(
            f"""SELECT training, max(step) AS step, {_QUANTILES} AS q FROM (SELECT *, {bins} AS bin FROM decisions)
            WHERE kept GROUP BY training, bin ORDER BY training, bin""",
            "training",
        )
        totals = self.rows(
            """SELECT training, any_value(policy) AS policy, count(*) AS steps, sum(kept)::BIGINT AS kept,
            sum(offered)::BIGINT AS offered, max(total_trained_tokens) AS trained_tokens,
            max(total_offered_tokens) AS offered_tokens, count(*) FILTER (fallback <> '') AS fallbacks
            FROM steps GROUP BY training ORDER BY training"""
        )
        found = []
        for row in totals:
            name = row.pop("training")
            own = weights[name]
            curve = curves[name]
            before = finished.get(name, {}).get("initial_eval_loss")
            if isinstance(before, int | float):
                start = {"tokens": 0, "loss": None, "target_loss": None, "eval_loss": float(before)}
                curve = (start, *curve)
            uneven = any(max(w["q"]) - min(w["q"]) > 1e-6 for w in own)
            found.append(
                TrainingData(
                    name=name,
                    finished=name in finished,
                    curve=curve,
                    weights=own if uneven else (),
                    **row,
                )
            )
        return tuple(found)


def _primary(run: Run, selections: tuple[SelectionData, ...]) -> SelectionData | None:
    """The selection the page shows at large: of those that were exported (of all, where none was) the best on held-out rows."""
    exported = {manifest.spec.get("selection") for manifest in run.manifests("export")}
    pool = [selection for selection in selections if selection.name in exported] or list(selections)
    return max(pool, key=lambda s: (heldout_cosine(s.solution) or -1.0, s.name), default=None)


def heldout_cosine(solution: dict[str, Any]) -> float | None:
    """Set cosine on target rows that the selection did not see, where the diagnostics hold it."""
    diagnostics = solution.get("diagnostics", {})
    for key in ("set_cosine_heldout", "set_cosine_evaluation"):
        if isinstance(diagnostics.get(key), int | float):
            return float(diagnostics[key])
    return None


def collect(run: Run) -> ReportData:
    """Read everything the page shows."""
    notices: list[str] = []
    with Audit(run, notices.append) as audit:
        reader = _Reader(run, audit)
        selections = reader.selections()
        primary = _primary(run, selections)
        return ReportData(
            run=run,
            status=run_status(run),
            targets=reader.targets(),
            selections=selections,
            primary=primary,
            shared=reader.rows(
                """SELECT a.selection AS selection, b.selection AS other, count(*) AS shared FROM selections a
                JOIN selections b ON a.sample_id = b.sample_id WHERE a.selected AND b.selected
                GROUP BY a.selection, b.selection ORDER BY 1, 2"""
            ),
            best=reader.samples(primary.name, "rank") if primary else (),
            worst=reader.samples(primary.name, "score") if primary else (),
            rejects=reader.rows(
                """SELECT scoring, reason, stage, count(*) AS windows, min_by(path || ' row ' || row, (path, row)) AS example,
                min_by(detail, (path, row)) AS detail, min_by(preview, (path, row)) AS preview
                FROM rejects GROUP BY scoring, reason, stage ORDER BY scoring, windows DESC, reason"""
            ),
            trainings=reader.trainings(),
            lineage=reader.rows("SELECT * FROM inputs"),
            scorings=tuple(run.manifests("scoring")),
            notices=tuple(notice for notice in notices if "has not finished" in notice),
        )
