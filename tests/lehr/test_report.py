"""`lehr report`: one page that holds what the run holds, loads nothing, and lets no text of a corpus act."""

from __future__ import annotations

import html
import html.parser
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lehr.cli import main
from lehr.compare.run import read_comparison
from lehr.report import render_report
from lehr.report.charts import Axis, Point, Series, Shift, axis, bar_chart, line_chart, scatter_chart, shift_chart
from lehr.report.data import SCATTER_POINTS, collect
from lehr.report.sections import compact, number
from schemas.manifest import Manifest, write_manifest
from schemas.run import Run
from tests.fake_run import HOSTILE, build_fake_run

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(html.parser.HTMLParser):
    """Tags with their attributes, ids, text; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def ids(self) -> set[str]:
        return {value for _, attributes in self.tags if (value := attributes.get("id"))}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return build_fake_run(tmp_path_factory.mktemp("report") / "run", hostile=True)


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return render_report(run)


SECTIONS = {"target", "geometry", "selections", "domains", "compared", "training", "samples", "rejects", "lineage"}


def test_page_has_every_section_and_nests(page: str) -> None:
    parsed = Page(page)
    assert parsed.ids == SECTIONS
    links = {a["href"] for tag, a in parsed.tags if tag == "a"}
    assert links == {f"#{name}" for name in SECTIONS}


def test_page_loads_and_runs_nothing(page: str) -> None:
    parsed = Page(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "video",
        "audio",
        "image",
        "use",
    }
    for _, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert not {"src", "srcset", "data", "action", "xlink:href"} & set(attributes)
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    assert "url(" not in page and "@import" not in page and "http://" not in page and "https://" not in page
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_comparison_shows_every_arm_its_interval_and_verdict(run: Run, page: str) -> None:
    found = read_comparison(run, "anneal")
    assert "against match:random, 3 seeds, 1,000 tokens, 95% student interval" in page
    for row in found.arms:
        assert f"{row['eval_loss']:.4f}" in page
        if not row["control"]:
            assert f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}" in page
            assert f"{row['verdict']}: {row['reason']}" in html.unescape(page)
    # Two arms and three seeds in each of two charts.
    section = page[page.index('<section id="compared">') : page.index('<section id="training">')]
    assert section.count('r="3.5"/>') - 1 == 12  # and the key


def test_hostile_text_is_shown_and_does_nothing(page: str) -> None:
    parsed = Page(page)
    shown = "".join(parsed.text)
    assert "<script>document.title" in shown and "{{ 7 * 7 }}" in shown and "<i>noise</i>" in shown
    assert not {tag for tag, _ in parsed.tags} & {"script", "i", "img"}  # the template has none of them
    assert page.count("<style") == 1 and page.count("</style>") == 1
    harmful = {c for c in page if ord(c) < 32 and c not in "\n\t"} | ({*"\u202e\u2066\u202c\ufeff\x85"} & set(page))
    assert harmful == set()
    assert "\\u202e" in shown  # the override is shown as text
    assert HOSTILE[4].split()[0] in shown  # honest right-to-left text stays as it is
    assert page.encode("utf-8")


def test_previews_are_isolated_from_the_direction_around_them(page: str) -> None:
    cells = re.findall(r'<td class="preview"[^>]*>(.*?)</td>', page, re.S)
    assert cells and all(cell.strip().startswith("<bdi>") for cell in cells)
    assert page.count('<td class="preview" dir="auto">') == page.count('<td class="preview"')


def test_page_says_what_the_run_says(run: Run, page: str) -> None:
    text = " ".join(Page(page).text)
    for expected in (
        "112",
        "120",
        "held-out set cosine",
        "0.880",
        "1.700",
        "the budget lies past",
        "fewer target samples",
    ):
        assert expected in text
    assert "a_measure_of_tomorrow" in text  # an unknown diagnostic is shown as it is
    assert run.manifest("plan", "corpus").fingerprint[:12] in text
    assert all(
        name in text for name in ("match", "target-cosine", "random", "filter-then-weight", "too_short", "no_text")
    )


def test_every_picture_is_valid_and_described(page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", page, re.S)
    described = 0
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        for node in root.iter():
            for name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "points"):
                assert "nan" not in node.get(name, "") and "inf" not in node.get(name, "")
        if root.get("aria-hidden") != "true":
            assert root.get("role") == "img"
            assert root.findtext("title") and root.findtext("desc")
            described += 1
    assert described >= 12


def test_same_run_same_page(run: Run, page: str) -> None:
    assert render_report(run) == page


@pytest.mark.parametrize(
    ("stages", "sections", "lines"),
    [
        ((), set(), ["No target", "Nothing has been selected", "Nothing has been trained", "No row has been rejected"]),
        (("plan",), set(), ["No target", "Nothing has been selected"]),
        (("plan", "score"), {"rejects", "lineage"}, ["No target", "Nothing has been selected"]),
        (("plan", "score", "target"), {"rejects", "lineage", "target"}, ["Nothing has been selected"]),
        (
            ("plan", "score", "target", "curvature", "select"),
            {"rejects", "lineage", "target", "geometry", "selections", "domains", "samples"},
            ["Nothing has been trained"],
        ),
    ],
)
def test_parts_that_do_not_exist_are_left_out(
    tmp_path: Path, stages: tuple[str, ...], sections: set[str], lines: list[str]
) -> None:
    page = render_report(build_fake_run(tmp_path / "run", stages=stages))
    parsed = Page(page)
    assert parsed.ids == sections
    text = "".join(parsed.text)
    for line in lines:
        assert text.count(line) == 1


def test_selection_without_target_columns(tmp_path: Path) -> None:
    """A selection that needed no target has no geometry to draw."""
    import pyarrow as pa

    from schemas.parquet import read_footer, read_table
    from schemas.tables import GEOMETRY_COLUMNS
    from tests.fake_run import replace_part

    run = build_fake_run(
        tmp_path / "run", selectors=("random",), stages=("plan", "score", "target", "curvature", "select")
    )
    path = f"{run.selection_folder('random')}/part-00000.parquet"
    table = read_table(run.path(path), schema="selection")
    for name in GEOMETRY_COLUMNS:
        column = table.column_names.index(name)
        table = table.set_column(column, table.schema.field(name), pa.nulls(table.num_rows, pa.float32()))
    replace_part(run, "select", "random", path, table, read_footer(run.path(path))[0])
    page = render_report(run)
    assert "geometry" not in Page(page).ids and "no picture of stiff cost" in page


def test_scatter_is_thinned_deterministically(tmp_path: Path) -> None:
    run = build_fake_run(
        tmp_path / "run",
        rows_per_unit=1600,
        selectors=("match",),
        k=8,
        stages=("plan", "score", "target", "curvature", "select"),
    )
    (selection,) = collect(run).selections
    assert selection.candidates > SCATTER_POINTS
    chosen = [row for row in selection.geometry if row["selected"]]
    assert len(chosen) == 24 and len(selection.geometry) == SCATTER_POINTS + 24
    assert collect(run).selections[0].geometry == selection.geometry
    assert "further candidates are not drawn" in render_report(run)


def test_running_training_is_shown_as_running(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run")
    Path(run.path(run.manifest_path("train", "full"))).unlink()
    page = render_report(run)
    assert "(running)" in page and "has not finished" in page


def test_command_writes_into_the_run_or_elsewhere(
    run: Run, page: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", run.url, "--name", "mine"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text() == page
    assert Path(run.url, "reports/mine.html").read_text() == page
    assert main(["report", run.url, "--out", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").read_text() == page
    assert main(["report", run.url, "--name", "../escape"]) == 2
    assert main(["report", str(tmp_path / "none")]) == 2


def test_page_is_package_data() -> None:
    from importlib import resources

    assert resources.files("lehr.report").joinpath("page.html").is_file()


# Charts.


def test_points_land_where_the_axes_say() -> None:
    x, y = Axis(label="x", low=0, high=10), Axis(label="y", low=1, high=1000, log=True)
    assert [x.place(v) for v in (0, 5, 10)] == [0, 0.5, 1]
    # log10 of a power of ten is exact to one rounding; three roundings of numbers of size 1 follow.
    assert [y.place(v) for v in (1, 10, 100, 1000)] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=4 * 2.3e-16)
    svg = line_chart("t", "d", [Series(name="s", points=[(0, 1), (10, 1000)])], x, y, height=300)
    points = re.search(r'points="([^"]+)"', svg)
    assert points is not None
    (x0, y0), (x1, y1) = (map(float, pair.split(",")) for pair in points[1].split())
    assert x0 < x1 and y0 > y1  # larger values stand further right and higher up


@pytest.mark.parametrize(
    "values", [[], [3.0], [0.0, 0.0], [float("nan"), 1.0], [-5.0, 5.0], [1e-12, 1e12], [1e9, 1e9 + 1]]
)
@pytest.mark.parametrize("log", [False, True])
def test_axes_hold_any_values(values: list[float], log: bool) -> None:
    made = axis("a", values, log=log)
    assert made.low < made.high
    ticks = made.ticks()
    assert 2 <= len(ticks) <= 12
    assert all(made.low <= value * (1 + 1e-9) + 1e-9 and value <= made.high * (1 + 1e-9) + 1e-9 for value, _ in ticks)


def test_charts_escape_their_names() -> None:
    evil = '<script>x</script>"&'
    x = axis("x", [0, 1])
    for svg in (
        line_chart(evil, evil, [Series(name=evil, points=[(0, 0), (1, 1)])], x, x),
        scatter_chart(evil, evil, [Point(x=0.5, y=0.5, chosen=True, hint=evil)], x, x),
        shift_chart(evil, evil, [Shift(name=evil, before=0.1, after=0.9)], 1.0),
        bar_chart(evil, evil, [(evil, 3)], evil),
    ):
        assert "<script" not in svg
        ElementTree.fromstring(svg)


def test_numbers_for_people() -> None:
    assert [number(v) for v in (None, 0, 1234, 0.12345, 11.3, 4711.5, float("nan"), 1e-9, True, "x")] == [
        "–", "0", "1,234", "0.123", "11.30", "4,712", "–", "1e-09", "yes", "x",
    ]  # fmt: skip
    assert [compact(v) for v in (999, 9999, 12345, 2.5e6, 3e9)] == ["999", "9,999", "12.3 k", "2.5 M", "3 B"]


def test_the_best_exported_selection_is_shown_at_large(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", selectors=("random", "match", "target-cosine"))
    primary = collect(run).primary
    assert primary is not None
    assert primary.name == "random"  # the only one exported
    spec = {"stream": "match", "selection": "match", "shard_samples": 10, "generation": 1}
    manifest = Manifest(stage="export", name="match.gen-000001", spec=spec, inputs={})
    write_manifest(run.path(run.manifest_path("export", manifest.name)), manifest)
    primary = collect(run).primary
    assert primary is not None
    assert primary.name == "match"
