"""`lehr status` from another process, of a job that several processes are at and one unit of which fails."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lehr.cli import main
from lehr.status import run_status, status_json
from pipelines.plan import make_plan
from schemas.run import Run
from schemas.spec import PlanSpec
from tests.gcs import Gcs
from tests.killing import start_module
from tests.pipelines.test_hostile import features_options
from tests.pipelines.worlds import COLUMNS, make_world

pytestmark = pytest.mark.slow


def status(run: str) -> list[dict[str, Any]]:
    return status_json(run_status(Run.open(run)))["scorings"]


@pytest.mark.parametrize("place", ["disk", "gs"])
def test_speed_time_left_and_the_last_error_of_a_running_job(
    place: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world = make_world(tmp_path, rows=800, unit_tokens=800)
    run, environment = world.run.url, dict(os.environ)
    if place == "gs":
        server: Gcs = request.getfixturevalue("gcs")
        bucket, environment = request.getfixturevalue("bucket"), server.environment
        fs = fsspec.filesystem("gs", use_listings_cache=False)
        fs.put(str(world.corpus), f"{bucket}/corpus", recursive=True)
        run = f"{bucket}/run"
        make_plan(run, f"{bucket}/corpus", PlanSpec(corpus="tiny", columns=COLUMNS, unit_tokens=800))
    lines = (world.corpus / "b.jsonl").read_bytes().split(b"\n")
    lines[20] = lines[20].replace(b"r2-20", b"x2-20")
    changed = b"\n".join(lines)
    if place == "gs":
        fs.pipe_file(f"{bucket}/corpus/b.jsonl", changed)
    else:
        (world.corpus / "b.jsonl").write_bytes(changed)

    log = tmp_path / "score.log"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = [*features_options(world.model)[:-1], "2"]
    process = start_module("lehr", "score", run, *options, log=log)
    seen: list[dict[str, Any]] = []
    while process.poll() is None:
        time.sleep(0.2)
        seen += [{"at": time.monotonic(), **scoring} for scoring in status(run)]
    assert process.wait() == 2 and "b.jsonl" in log.read_text(), log.read_text()[-3000:]
    running = [
        one for one in seen
        if one["workers"]["last_error"] and one["workers"]["tokens_per_second"] and one["seconds_left"]
    ]  # fmt: skip
    assert running, [(one["units_done"], one["workers"]) for one in seen]
    for one in running:
        assert "b.jsonl" in one["workers"]["last_error"] and "process" in one["workers"]["last_error_host"]
        assert 1 <= one["workers"]["live"] <= 2
        assert one["seconds_left"] == pytest.approx(one["tokens_left"] / one["workers"]["tokens_per_second"])
    assert max(one["workers"]["live"] for one in seen) == 2
    # The time left at the middle is about what it took, within what a busy machine does to it.
    ended = seen[-1]["at"]
    middle = min(running, key=lambda one: abs(one["units_done"] / one["units_total"] - 0.5))
    took = ended - middle["at"]
    assert took / 4 - 3 < middle["seconds_left"] < 4 * took + 3, (middle["seconds_left"], took)
    last = status(run)[0]
    assert last["units_done"] == last["units_total"] - 1 and len(last["missing"]) == 1
    assert "b.jsonl" in last["missing"][0] and "b.jsonl" in last["workers"]["last_error"]

    capsys.readouterr()
    assert main(["status", run]) == 0
    said = "".join(capsys.readouterr().out.split())  # lines are wrapped anywhere
    assert "lasterror" in said and "b.jsonl" in said and "1missing" in said

    # Put right and run again: the error is overcome.
    if place == "disk":
        lines[20] = lines[20].replace(b"x2-20", b"r2-20")
        (world.corpus / "b.jsonl").write_bytes(b"\n".join(lines))
        again = start_module("lehr", "score", run, *options, log=log)
        assert again.wait(300) == 0, log.read_text()[-3000:]
        last = status(run)[0]
        assert last["finished"] and not last["workers"]["last_error"] and last["tokens_left"] == 0
