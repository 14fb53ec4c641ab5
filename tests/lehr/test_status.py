"""`lehr status`: what is done, what is missing, how fast it goes, what went wrong last."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from lehr.cli import main
from lehr.status import LIVE_S, run_status, worker_status
from lehr.status_page import status_page
from schemas.declared import declare
from schemas.run import Run
from schemas.timings import Heartbeat
from schemas.units import read_plan
from tests.fake_run import build_fake_run


def unfinish(run: Run, missing: int) -> None:
    Path(run.path(run.manifest_path("score", "main"))).unlink()
    for unit in read_plan(run).units[-missing:]:
        Path(run.path(run.features_path("main", unit.unit_id))).unlink()


def beat(**changes: object) -> Heartbeat:
    base = Heartbeat(
        host="a", pid=1, started=1000.0, updated=1100.0, attempt="x", tokens_done=500, busy_s=100.0, busy_tokens=500
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_finished_run(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run")
    status = run_status(run)
    (scoring,) = status.scorings
    assert scoring.finished and scoring.units_done == scoring.units_total == 4
    assert (scoring.samples, scoring.rejected, scoring.missing, scoring.tokens_left) == (112, 20, (), 0)
    assert {stage.stage for stage in status.stages} == {
        "plan", "scoring", "target", "score", "curvature", "select", "export", "train", "compare",
    }  # fmt: skip
    assert status.problems == ()
    assert status.comparisons == ()


def test_a_comparison_that_runs_says_how_many_trainings_have_finished(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run")
    spec = run.manifest("compare", "anneal").spec
    Path(run.path(run.manifest_path("compare", "anneal"))).unlink()
    Path(run.path(run.manifest_path("train", "full"))).unlink()
    declare(run.path(f"{run.comparison_folder('anneal')}/spec.json"), "comparison", "anneal", spec)
    (found,) = run_status(run).comparisons
    assert (found.name, found.trained, found.trainings) == ("anneal", 6, 9)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(status_page(run_status(run)))
    assert "comparison anneal: 6 of 9 trainings finished, not started" in console.export_text()


def test_running_scoring_counts_what_stands(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    unfinish(run, 1)
    (scoring,) = run_status(run).scorings
    assert not scoring.finished and (scoring.units_done, scoring.units_total) == (3, 4)
    assert scoring.tokens_left == read_plan(run).units[-1].estimated_tokens
    assert len(scoring.missing) == 1 and read_plan(run).units[-1].unit_id in scoring.missing[0]
    assert 0 < scoring.samples < 112


def test_units_need_features_and_rejects(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    unfinish(run, 1)
    Path(run.path(run.rejects_path("main", read_plan(run).units[0].unit_id))).unlink()
    assert run_status(run).scorings[0].units_done == 2


def test_time_left_follows_the_speed_of_live_workers(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    unfinish(run, 2)
    folder = Path(run.path(run.timings_folder("score", "main")))
    for file in folder.iterdir():
        file.unlink()
    for pid in (1, 2):
        (folder / f"worker-a-{pid}.json").write_bytes(orjson.dumps(dataclasses.asdict(beat(pid=pid))))
    (scoring,) = run_status(run, now=1101.0).scorings
    assert scoring.workers.tokens_per_second == pytest.approx(10.0)  # two workers, 500 tokens in 100 s each
    assert scoring.seconds_left == pytest.approx(2 * 1800 / 10)
    (later,) = run_status(run, now=1100.0 + LIVE_S + 1).scorings
    assert later.workers.live == 0 and later.workers.gone == 2
    assert later.workers.tokens_per_second is None and later.seconds_left is None


def test_time_left_is_in_the_tokens_that_units_come_to_have(tmp_path: Path) -> None:
    """A plan estimates by bytes; the units that are done say what that is worth."""
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    unfinish(run, 2)
    folder = Path(run.path(run.timings_folder("score", "main")))
    for file in folder.iterdir():
        file.unlink()
    for pid in (1, 2):
        done = beat(pid=pid, planned_done=200, encoded_done=500, tokens_done=500, busy_s=50.0)
        (folder / f"worker-a-{pid}.json").write_bytes(orjson.dumps(dataclasses.asdict(done)))
    (scoring,) = run_status(run, now=1101.0).scorings
    assert scoring.workers.tokens_per_second == pytest.approx(20.0)
    assert scoring.tokens_left == 2 * 1800 * 2.5
    assert scoring.seconds_left == pytest.approx(2 * 1800 * 2.5 / 20)


def test_clocks_that_were_set_back() -> None:
    """A worker's speed is of its steady clock; one that spoke in the far future is not taken for alive."""
    status = worker_status([beat(updated=900.0, busy_s=100.0)], now=901.0)
    assert status.tokens_per_second == pytest.approx(5.0)
    later = worker_status([beat(updated=9000.0, busy_s=100.0)], now=901.0)
    assert (later.live, later.gone, later.tokens_per_second, later.seconds_since_heard) == (0, 1, None, 0.0)


def test_last_error_is_the_latest_of_the_latest_attempt() -> None:
    beats = [
        beat(pid=1, updated=1100.0, last_error="first"),
        beat(pid=2, updated=1105.0, last_error="second", host="b"),
        beat(pid=3, updated=1110.0),
    ]
    status = worker_status(beats, now=1111.0)
    assert (status.last_error, status.last_error_host) == ("second", "b process 2")
    again = [*beats, beat(pid=4, updated=1200.0, attempt="y")]
    assert worker_status(again, now=1201.0).last_error == ""
    assert worker_status([], now=0.0).last_error == ""


def test_damaged_heartbeat_is_passed_over(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    folder = Path(run.path(run.timings_folder("score", "main")))
    (folder / "worker-x-9.json").write_text("{half a fi")
    assert run_status(run).scorings[0].workers.live == 2


def test_damaged_manifest_is_said_and_the_rest_shown(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    Path(run.path(run.manifest_path("score", "main"))).write_text("{")
    status = run_status(run)
    assert any("main.json" in problem for problem in status.problems)
    assert status.scorings[0].units_done == 4 and not status.scorings[0].finished


def test_extended_plan_makes_a_finished_scoring_unfinished(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    build_fake_run(tmp_path / "more", files=3, stages=("plan",))
    for name in ("plan.parquet", "stages/plan/corpus.json"):
        Path(run.url, name).write_bytes((tmp_path / "more" / name).read_bytes())
    (scoring,) = run_status(run).scorings
    assert not scoring.finished and (scoring.units_done, scoring.units_total) == (4, 6)


def test_scoring_of_a_larger_plan_is_not_finished_for_a_smaller_one(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    build_fake_run(tmp_path / "less", files=1, stages=("plan",))
    for name in ("plan.parquet", "stages/plan/corpus.json"):
        Path(run.url, name).write_bytes((tmp_path / "less" / name).read_bytes())
    (scoring,) = run_status(run).scorings
    assert not scoring.finished and (scoring.units_done, scoring.units_total) == (2, 2)
    assert scoring.samples < 112  # rows of the planned units alone


def test_export_of_a_finished_stream_is_not_shown_as_working(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run")
    for stage, name in (("export", "match"), ("train", "next")):
        folder = Path(run.path(run.timings_folder(stage, name)))
        folder.mkdir(parents=True)
        (folder / "worker-a-1.json").write_bytes(orjson.dumps(dataclasses.asdict(beat())))
    assert [(stage, name) for stage, name, _ in run_status(run, now=1101.0).working] == [("train", "next")]


def test_command_prints_page_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    unfinish(run, 1)
    assert main(["status", run.url]) == 0
    page = capsys.readouterr().out
    assert "3 of 4 units" in page and "1 missing" in page and "out of memory" in page and "not yet: target" in page
    assert main(["status", run.url, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["scorings"][0]["units_done"] == 3
    assert record["scorings"][0]["workers"]["last_error"].startswith("out of memory")


def test_watch_ends_when_nothing_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = build_fake_run(tmp_path / "run", stages=("plan", "score"))
    assert main(["status", run.url, "--watch", "0.01"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["status", run.url, "--watch", "-1"]) == 2


def test_run_without_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run.create(str(tmp_path / "run"), corpus="c", root="/r")
    assert main(["status", str(tmp_path / "run")]) == 0
    assert "no plan yet" in capsys.readouterr().out
    assert main(["status", str(tmp_path / "nothing")]) == 2


def test_status_writes_nothing(tmp_path: Path) -> None:
    run = build_fake_run(tmp_path / "run")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in Path(run.url).rglob("*"))
    run_status(run)
    assert sorted((str(p), p.stat().st_mtime_ns) for p in Path(run.url).rglob("*")) == before


def test_status_through_fsspec() -> None:
    run = build_fake_run("memory://status-run", stages=("plan", "score"))
    assert run_status(run).scorings[0].finished
