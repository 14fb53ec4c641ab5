"""The page: data and charts poured into the template, everything escaped, nothing loaded from anywhere."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2

from lehr.compare.arms import TRAINING_PREFIX
from lehr.rendering import visible
from lehr.report import sections
from lehr.report.comparisons import COLUMNS, comparison_sections
from lehr.report.data import ReportData, collect
from schemas.run import Run, check_name
from schemas.storage import write_whole


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    environment.filters["number"] = sections.number
    environment.filters["short"] = lambda value: str(value)[:12]
    environment.filters["compact"] = sections.compact
    return environment


def _context(data: ReportData) -> dict[str, Any]:
    # Those of comparisons are many, and drawn as differences.
    single = [training for training in data.trainings if not training.name.startswith(TRAINING_PREFIX)]
    name = data.run.url.rstrip("/").rsplit("/", 1)[-1]
    return {
        "name": name,
        "data": data,
        "headlines": sections.headlines(data),
        "flow": sections.flow(data),
        "targets": [sections.target_section(target) for target in data.targets],
        "geometry": sections.geometry_charts(data),
        "domains": sections.domain_charts(data),
        "selections": sections.selections_table(data) if data.selections else None,
        "supply": sections.supply_chart(data),
        "shared": sections.shared_table(data),
        "compared": comparison_sections(data.run),
        "compared_columns": COLUMNS,
        "losses": sections.loss_charts(single),
        "weights": sections.weight_charts(single),
        "rejects": sections.rejects_section(data),
    }


def render_report(run: Run) -> str:
    """The whole page as HTML: the same for the same run, with no time of day in it."""
    source = resources.files("lehr.report").joinpath("page.html").read_text(encoding="utf-8")
    return _environment().from_string(source).render(_context(collect(run)))


def write_report(run: Run, name: str) -> str:
    """Write `reports/<name>.html` into the run and return its URL."""
    check_name("report", name)
    url = run.path(run.report_path(name))
    write_whole(url, render_report(run).encode("utf-8", "backslashreplace"))
    return url
