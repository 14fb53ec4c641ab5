"""Comparisons on the page: the differences of every arm with their intervals, what they cost, and the verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from lehr.compare.judge import differences
from lehr.compare.run import Comparison, read_comparison, read_seconds
from lehr.report.charts import BESIDE, axis, shorten, text
from schemas.run import Run


def comparison_sections(run: Run) -> list[dict[str, Any]]:
    """Chart and table of every finished comparison, by name."""
    return [_section(run, read_comparison(run, manifest.name)) for manifest in run.manifests("compare")]


def _section(run: Run, found: Comparison) -> dict[str, Any]:
    spec = found.manifest.spec
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found.trainings:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    control = by_arm[spec["control"]]
    judged = [row for row in found.arms if not row["control"]]
    charts = []
    for key, ends, title, unit in (
        ("eval_loss", "difference", "Held-out loss", "held-out loss minus the control's (nats per token)"),
        ("guard_loss", "guard", "Guard loss", "guard loss minus the control's (nats per token)"),
    ):
        shown = [
            (row, differences(by_arm[row["arm"]], control, key)) for row in judged if row[f"{ends}_low"] is not None
        ]
        if shown:
            limit = -spec["margin"] if key == "eval_loss" else spec["tolerance"]
            charts.append(
                {"title": title, "svg": _chart(f"{title} of {found.manifest.name}", shown, ends, unit, limit)}
            )
    return {
        "name": found.manifest.name,
        "control": spec["control"],
        "seeds": len(spec["seeds"]),
        "budget": spec["token_budget"],
        "interval": f"{spec['level']:.0%} {spec['interval']}",
        "charts": charts,
        "rows": [_cells(row, read_seconds(run, found.manifest.name).get(row["arm"], {})) for row in found.arms],
        "start": found.manifest.summary["start"],
    }


def _cells(row: dict[str, Any], spent: dict[str, Any]) -> dict[str, Any]:
    offline = sum(spent["offline"].values()) if spent.get("offline") else None
    least, most = row["least_tokens"], row["most_tokens"]
    return {
        "arm": row["arm"],
        "numbers": [
            _plain(row["eval_loss"], ".4f"),
            _plain(row["difference"], "+.4f"),
            _span(row, "difference"),
            _plain(row["guard_difference"], "+.4f"),
            f"{least:,}" if least == most else f"{least:,} to {most:,}",
            *(_plain(None if row[k] is None else row[k] / 1e12, ",.3g") for k in ("flops", "selection_flops", "offline_flops")),
            *(_plain(value, ",.0f") for value in (spent.get("training"), spent.get("selection"), offline)),
        ],
        "verdict": row["verdict"] or "control",
        "reason": row["reason"],
    }  # fmt: skip


COLUMNS = (
    "held-out loss", "difference", "interval", "guard difference", "trained tokens", "TFLOP", "of them choosing", "scoring TFLOP",
    "seconds", "of them choosing", "offline seconds",
)  # fmt: skip


def _plain(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _span(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "–" if low is None else f"{low:+.4f} to {high:+.4f}"


def _chart(
    title: str, shown: Sequence[tuple[dict[str, Any], list[float]]], ends: str, unit: str, limit: float
) -> Markup:
    """A row an arm: its interval a line, the mean a disc, every seed a ring; upright lines at zero and at the limit of the rule."""
    row, left, right, top, width = 34, 220, 110, 8, BESIDE
    bottom = top + row * len(shown)
    mean = "difference" if ends == "difference" else "guard_difference"
    x = axis(
        unit, [limit, *(v for r, apart in shown for v in (r[f"{ends}_low"], r[f"{ends}_high"], *apart))], zero=True
    )
    parts: list[Markup] = []

    def add(template: str, **values: object) -> None:
        parts.append(Markup(template).format(**values))

    def place(value: float) -> str:
        return f"{left + x.place(value) * (width - left - right):.1f}"

    for value, label in x.ticks():
        add('<line class="grid" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/>', x=place(value), a=top, b=bottom)
        add('<text class="tick mid" x="{x}" y="{y}">{t}</text>', x=place(value), y=bottom + 16, t=label)
    add('<line class="axis" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/>', x=place(0.0), a=top, b=bottom)
    if limit:
        add('<line class="mark" x1="{x}" x2="{x}" y1="{a}" y2="{b}"/>', x=place(limit), a=top, b=bottom)
    for number, (found, apart) in enumerate(shown):
        y = top + row * number + row / 2
        name = shorten(found["arm"], 34)
        add('<text class="tick end name" x="{x}" y="{y}" dy=".32em">{t}</text>', x=left - 12, y=y, t=text(name))
        low, high = place(found[f"{ends}_low"]), place(found[f"{ends}_high"])
        add('<line class="move" x1="{a}" x2="{b}" y1="{y}" y2="{y}"/>', a=low, b=high, y=y)
        for value in apart:
            add('<circle class="ring" cx="{x}" cy="{y}" r="3.5"/>', x=place(value), y=y)
        add('<circle class="disc" cx="{x}" cy="{y}" r="4.5"/>', x=place(found[mean]), y=y)
        if ends == "difference":
            add('<text class="tick end" x="{x}" y="{y}" dy=".32em">{t}</text>', x=width - 2, y=y, t=found["verdict"])
    middle = (left + width - right) / 2
    add('<text class="label mid" x="{x}" y="{y}">{t}</text>', x=middle, y=bottom + 38, t=unit)
    told = "; ".join(
        f"{r['arm']}: {r[mean]:+.4f}, from {r[f'{ends}_low']:+.4f} to {r[f'{ends}_high']:+.4f}" for r, _ in shown
    )
    return Markup('<svg viewBox="0 0 {w} {h}" role="img"><title>{t}</title><desc>{d}</desc>{b}</svg>').format(
        w=width, h=bottom + 46, t=text(title), d=text(told), b=Markup("").join(parts)
    )
