"""From data to what stands on the page: numbers written for people, charts, and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup

from lehr.catalog import FLOW
from lehr.report.charts import (
    BESIDE,
    HALF,
    Band,
    Point,
    Series,
    Shift,
    axis,
    bar_chart,
    line_chart,
    ribbon_chart,
    scatter_chart,
    shift_chart,
    shorten,
)
from lehr.report.data import SMALL_POINTS, ReportData, SelectionData, TargetData, TrainingData, heldout_cosine
from lehr.views import flatten

_DOMAINS = 12

LABELS = {
    "set_cosine": "set cosine, in sample",
    "set_cosine_heldout": "set cosine, held out (two-fold)",
    "set_cosine_evaluation": "set cosine, evaluation set",
    "set_cosine_bound": "bound on the set cosine",
    "effective_rank": "effective rank",
}


def number(value: Any, digits: int = 3) -> str:
    """A number as people write it; words stay words."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "–"
        if value == int(value) and abs(value) < 1e9:
            return f"{int(value):,}"
        if not 1e-3 <= abs(value) < 1e5:
            return f"{value:.{digits}g}"
        return f"{value:,.{max(0, digits - max(0, math.floor(math.log10(abs(value)))))}f}"
    return str(value)


def compact(value: float) -> str:
    """A large count in a few characters."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / {'B': 1e9, 'M': 1e6, 'k': 1e3}[suffix]:.3g} {suffix}"
    return f"{value:,.0f}"


def headlines(data: ReportData) -> list[dict[str, str]]:
    """The few numbers a reader wants first."""
    status = data.status
    found = [{"value": compact(status.rows), "label": "corpus rows", "note": f"{status.units:,} work units"}]
    for scoring in status.scorings[:1]:
        share = scoring.rejected / max(1, scoring.samples + scoring.rejected)
        found.append(
            {"value": compact(scoring.samples), "label": "samples scored", "note": f"{share:.1%} rejected"},
        )
    if data.primary:
        of = data.primary.samples / max(1, data.primary.candidates)
        found.append(
            {
                "value": compact(data.primary.samples),
                "label": f"selected by {shorten(data.primary.name, 24)}",
                "note": f"{of:.1%} of candidates, {compact(data.primary.tokens)} tokens",
            }
        )
        cosine = heldout_cosine(data.primary.solution)
        if cosine is not None:
            bound = _diagnostic(data.primary.solution, "set_cosine_bound")
            note = f"bound in sample {number(bound)}" if bound is not None else "on target rows not used to choose"
            found.append({"value": number(cosine), "label": "held-out set cosine", "note": note})
    losses = []
    for training in data.trainings:
        evaluated = [row["eval_loss"] for row in training.curve if row["eval_loss"] is not None]
        if evaluated:
            losses.append((evaluated[-1], training.name))
    if losses:
        loss, name = min(losses)
        found.append({"value": number(loss), "label": "lowest final held-out loss", "note": f"nats per token, {name}"})
    return found


def flow(data: ReportData) -> list[dict[str, Any]]:
    """The stages a corpus goes through, with what each one holds."""
    by_stage: dict[str, list[Any]] = {stage: [] for stage in FLOW}
    for done in data.status.stages:
        by_stage.setdefault(done.stage, []).append(done)
    status = data.status
    scored = status.scorings[0] if status.scorings else None
    notes = {
        "plan": f"{status.units:,} units, {compact(status.tokens)} tokens" if status.units else "",
        "target": ", ".join(
            f"{t.target}: {t.summary.get('counts', {}).get('reference', '?')} rows" for t in data.targets
        ),
        "score": f"{scored.units_done:,} of {scored.units_total:,} units" if scored else "",
        "select": _count(by_stage["select"], "selection"),
        "export": _count(by_stage["export"], "stream"),
        "train": _count(by_stage["train"], "training"),
    }
    return [{"stage": stage, "done": bool(by_stage[stage]), "note": note or "not yet"} for stage, note in notes.items()]


def _count(items: list[Any], word: str) -> str:
    return f"{len(items)} {word}{'s' if len(items) != 1 else ''}" if items else ""


def target_section(target: TargetData) -> dict[str, Any]:
    """Spectrum, what its directions hold, and the numbers that decide trust."""
    geometry = target.summary.get("geometry", {})
    rows = target.spectra.get(geometry.get("curvature", "centred")) or next(iter(target.spectra.values()))
    stiff = sum(row["part"] == "stiff" for row in rows)
    dimension = geometry.get("sketch_dimension") or len(rows)
    many = len(rows) > 60
    last = dimension if dimension <= len(rows) * (8 if many else 1.5) else len(rows)
    x = axis("direction, by eigenvalue", [1, max(2, last)], log=many, integer=True)
    bands = [Band(name=f"stiff ({stiff:,})", start=max(x.low, 0.5), end=stiff + 0.5, style="stiff")]
    bands.append(Band(name=f"flat ({len(rows) - stiff:,})", start=stiff + 0.5, end=len(rows) + 0.5, style="flat"))
    null = dimension - len(rows)
    if null > 0 and last > len(rows):
        bands.append(Band(name=f"null ({null:,})", start=len(rows) + 0.5, end=min(x.high, last + 0.5), style="null"))
    lines = []
    for style, fisher in enumerate(("centred", "empirical", "gauss-newton")):
        if fisher in target.spectra:
            points = [(row["position"] + 1.0, row["eigenvalue"]) for row in target.spectra[fisher]]
            lines.append(
                Series(
                    name="Gauss-Newton" if style == 2 else f"{fisher} Fisher",
                    points=points,
                    style=style,
                    faint=style > 0,
                )
            )
    values = [y for line in lines for _, y in line.points]
    spectrum = line_chart(
        f"Spectrum of {target.target}",
        f"Eigenvalues of the target's curvature in descending order; the elbow lies after direction {stiff}.",
        lines,
        x,
        axis("eigenvalue (nats²)", values, log=True),
        bands=bands,
        width=BESIDE,
        height=320,
    )
    held: list[tuple[float, float]] = []
    total = 0.0
    for row in rows:
        total += row["mean_share"]
        held.append((row["position"] + 1.0, total * 100))
    shares = line_chart(
        f"What the directions of {target.target} hold",
        "Cumulative share of the curvature's trace and of the squared mean target gradient, by direction.",
        [
            Series(
                name="curvature", points=[(r["position"] + 1.0, r["cumulative_energy"] * 100) for r in rows], style=0
            ),
            Series(name="mean gradient", points=held, style=2),
        ],
        axis("direction, by eigenvalue", [1, max(2, len(rows))], log=many, integer=True),
        axis("cumulative share (%)", [0, 100], zero=True),
        width=BESIDE,
        height=240,
    )
    facts = [
        ("target samples M", geometry.get("target_samples")),
        ("sketch dimension k", geometry.get("sketch_dimension")),
        ("stiff directions", stiff),
        ("null directions", geometry.get("null_dimension")),
        ("mean gradient in stiff", _percent(geometry.get("share_stiff"))),
        ("mean gradient in flat", _percent(geometry.get("share_flat"))),
        ("mean gradient in null", _percent(geometry.get("share_null"))),
        ("damping in use", geometry.get("damping")),
        ("damping recommended", target.summary.get("damping", {}).get("recommended")),
    ]
    return {
        "name": target.target,
        "scoring": target.scoring,
        "elbow": stiff,
        "spectrum": spectrum,
        "shares": shares,
        "facts": [(label, number(value)) for label, value in facts if value is not None],
        "warnings": geometry.get("warnings", []),
    }


def _percent(value: Any) -> str | None:
    return f"{value:.1%}" if isinstance(value, int | float) else None


def geometry_charts(data: ReportData) -> list[dict[str, Any]]:
    """Stiff cost against alignment: the primary selection large, the others beside each other, all on the same axes."""
    shown = [s for s in data.selections if s.geometry]
    if not shown:
        return []
    first = data.primary if data.primary in shown else shown[0]
    ordered = [first, *(s for s in shown if s is not first)]
    everything = [row for selection in ordered for row in selection.geometry]
    costs = sorted(row["stiff_cost"] for row in everything)
    log = costs[0] > 0 and costs[-1] / costs[len(costs) // 20] > 30
    x = axis("alignment with the mean target gradient (cosine)", [row["alignment"] for row in everything])
    y = axis("stiff cost", costs, log=log, zero=not log)
    charts = []
    for selection in ordered:
        large = selection is first
        rows = [row for row in selection.geometry if row["selected"]]
        rest = [row for row in selection.geometry if not row["selected"]]
        rest = rest if large else rest[:SMALL_POINTS]
        points = [
            Point(
                x=row["alignment"],
                y=row["stiff_cost"],
                chosen=row["selected"],
                hint=f"rank {row['rank']} · {row['domain']} · {row['preview']}" if row["selected"] else "",
            )
            for row in [*rest, *rows]
        ]
        description = (
            f"{len(rows)} selected and {len(rest)} other candidates of {selection.name}, by alignment and stiff cost."
        )
        title = f"Stiff cost against alignment, {selection.name}"
        size = {} if large else {"width": HALF, "height": 300}
        left_out = selection.candidates - len(rows) - len(rest)
        charts.append(
            {
                "name": selection.name,
                "large": large,
                "svg": scatter_chart(title, description, points, x, y, **size),
                "note": f"{left_out:,} further candidates are not drawn" if left_out > 0 else "",
            }
        )
    return charts


def domain_charts(data: ReportData) -> list[dict[str, Any]]:
    """Shares of every domain before and after, the primary selection first."""
    ordered = [selection for selection in _primary_first(data) if len(selection.domains) > 1]
    if not ordered:
        return []
    leading = sorted(ordered[0].domains, key=lambda row: -max(row["before"], row["after"]))[:_DOMAINS]
    leading.sort(key=lambda row: (row["before"] - row["after"], row["domain"]))
    names = [row["domain"] for row in leading]
    high = max(max(r["before"], r["after"]) for s in ordered for r in s.domains if r["domain"] in names)
    charts = []
    for selection in ordered:
        shares = {row["domain"]: (row["before"], row["after"]) for row in selection.domains}
        shifts = [
            Shift(name=name or "(no domain)", before=before, after=after)
            for name in names
            for before, after in [shares.get(name, (0.0, 0.0))]
        ]
        others = [row for row in selection.domains if row["domain"] not in names]
        if others:
            before, after = sum(r["before"] for r in others), sum(r["after"] for r in others)
            shifts.append(Shift(name=f"{len(others)} others", before=before, after=after))
        large = selection is ordered[0]
        title = f"Domains before and after {selection.name}"
        description = "; ".join(f"{s.name} from {s.before:.1%} to {s.after:.1%}" for s in shifts)
        top = max(high, *(max(s.before, s.after) for s in shifts))
        svg = shift_chart(title, description, shifts, top, **({} if large else {"width": HALF}))
        charts.append({"name": selection.name, "large": large, "svg": svg, "note": ""})
    return charts


def _primary_first(data: ReportData) -> list[SelectionData]:
    return sorted(data.selections, key=lambda s: (s is not data.primary, s.name))


def _diagnostic(solution: dict[str, Any], key: str) -> Any:
    for section in ("diagnostics", "certificate"):
        content = solution.get(section)
        if isinstance(content, dict) and isinstance(content.get(key), int | float):
            return content[key]
    return None


def selections_table(data: ReportData) -> dict[str, Any]:
    """One row a selection: budget, cosines, bound, rank, what was left out; then everything else it says about itself."""
    rows, details = [], []
    warnings: dict[str, list[str]] = {}
    known = {str(w) for target in data.targets for w in target.summary.get("geometry", {}).get("warnings", [])}
    for selection in _primary_first(data):
        reasons = {row["reason"]: row["samples"] for row in selection.reasons}
        solution = selection.solution
        rows.append(
            {
                "name": selection.name,
                "primary": selection is data.primary,
                "selector": solution.get("selector", ""),
                "cells": [
                    number(selection.samples),
                    compact(selection.tokens),
                    *(_fixed(_diagnostic(solution, key), 1 if key == "effective_rank" else 3) for key in LABELS),
                    number(sum(v for k, v in reasons.items() if k.startswith("duplicate"))),
                    number(sum(v for k, v in reasons.items() if k.startswith("overlap"))),
                ],
            }
        )
        pairs = [
            (key, number(value, 4))
            for section in ("settings", "budget", "certificate", "diagnostics", "counts")
            for key, value in flatten(_brief(solution.get(section, {})), section)
            if key.removeprefix("diagnostics.") not in LABELS
        ]
        details.append({"name": selection.name, "pairs": pairs[:200]})
        for warning in solution.get("warnings", []):
            if str(warning) not in known:
                warnings.setdefault(str(warning), []).append(selection.name)
    columns = ["samples", "tokens", *LABELS.values(), "duplicates dropped", "overlap left out"]
    held = [i for i in range(len(columns)) if any(row["cells"][i] != "–" for row in rows)]
    for row in rows:
        row["cells"] = [row["cells"][i] for i in held]
    said = [{"names": ", ".join(names), "text": warning} for warning, names in warnings.items()]
    return {"columns": [columns[i] for i in held], "rows": rows, "details": details, "warnings": said}


def _fixed(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "–"


_SHOWN_ELSEWHERE = ("domains", "target", "supply_curve")


def _brief(section: Any) -> Any:
    """A section of a solution without what the page shows elsewhere, long lists as their length."""
    if isinstance(section, dict):
        return {key: _brief(value) for key, value in section.items() if key not in _SHOWN_ELSEWHERE}
    return f"{len(section)} values" if isinstance(section, list) and len(section) > 6 else section


def supply_chart(data: ReportData) -> Markup | None:
    """Held-out set cosine along the path of each greedy selection: where it peaks, the pool has given what it holds."""
    lines, notes, ends = [], [], []
    for style, selection in enumerate(_primary_first(data)):
        diagnostics = selection.solution.get("diagnostics", {})
        curve = diagnostics.get("supply_curve")
        if not isinstance(curve, list) or len(curve) < 2:
            continue
        points = [(float(at), float(cosine)) for at, cosine in curve]
        lines.append(Series(name=selection.name, points=points, style=style))
        notes.append(f"{selection.name} peaks at {diagnostics.get('supply_peak', '?')} samples")
        ends.append(diagnostics.get("supply_peak"))
    if not lines:
        return None
    x = axis("samples taken, best first", [x for line in lines for x, _ in line.points], log=True, integer=True)
    y = axis("held-out set cosine", [y for line in lines for _, y in line.points])
    peaks = [float(end) for end in ends if isinstance(end, int | float)]
    return line_chart("Supply of the pool", "; ".join(notes), lines, x, y, height=260, marks=peaks)


def shared_table(data: ReportData) -> dict[str, Any] | None:
    """Share of the row's selection that is also in the column's."""
    names = [selection.name for selection in _primary_first(data)]
    if len(names) < 2:
        return None
    shared = {(row["selection"], row["other"]): row["shared"] for row in data.shared}
    return {
        "names": names,
        "rows": [
            (name, [shared.get((name, other), 0) / max(1, shared.get((name, name), 0)) for other in names])
            for name in names
        ],
    }


def loss_charts(trainings: Iterable[TrainingData]) -> list[dict[str, Any]]:
    """Held-out, target and training loss against trained tokens, a line for each training."""
    charts = []
    names = {
        "eval_loss": ("Held-out loss", "held-out loss (nats per token)"),
        "target_loss": ("Target loss", "loss of target batches (nats per token)"),
        "loss": ("Training loss", "step loss (nats per token)"),
    }
    for key, (title, label) in names.items():
        lines = []
        for style, training in enumerate(trainings):
            points = [(float(r["tokens"]), float(r[key])) for r in training.curve if r[key] is not None]
            if points:
                lines.append(Series(name=training.name, points=points, style=style, mark=len(points) <= 20))
        if lines:
            x = axis("trained tokens", [x for line in lines for x, _ in line.points], zero=True)
            y = axis(label, [y for line in lines for _, y in line.points])
            last = "; ".join(f"{line.name} ends at {line.points[-1][1]:.3f}" for line in lines)
            charts.append({"title": title, "svg": line_chart(title, last, lines, x, y, height=280)})
    return charts


def weight_charts(trainings: Iterable[TrainingData]) -> list[dict[str, Any]]:
    """Spread of step weights over steps, for trainings whose weights differ."""
    charts = []
    for style, training in enumerate(trainings):
        if not training.weights:
            continue
        steps = [float(row["step"]) for row in training.weights]
        values = [row["q"] for row in training.weights]
        title = f"Weights over steps, {training.name}"
        description = "Least, quartiles, median and greatest step weight of the kept samples, by step; the mean is 1."
        svg = ribbon_chart(
            title,
            description,
            steps,
            values,
            axis("step", steps, integer=True),
            axis("step weight", [v for q in values for v in q], zero=True),
            style=style,
        )
        charts.append({"name": training.name, "svg": svg})
    return charts


def rejects_section(data: ReportData) -> list[dict[str, Any]]:
    """A bar chart and a table for each scoring."""
    found = []
    for scoring in sorted({row["scoring"] for row in data.rejects}):
        rows = [row for row in data.rejects if row["scoring"] == scoring]
        bars = [(f"{row['reason']} ({row['stage']})", float(row["windows"])) for row in rows]
        description = "; ".join(f"{name}: {count:.0f}" for name, count in bars)
        svg: Markup = bar_chart(f"Rejects of {scoring}", description, bars, "rows or windows")
        found.append({"scoring": scoring, "svg": svg, "rows": rows})
    return found
