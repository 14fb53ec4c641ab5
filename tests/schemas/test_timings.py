"""Heartbeats: what workers say, whatever their clocks do."""

from __future__ import annotations

from pathlib import Path

import pytest

from schemas.run import Run
from schemas.timings import Heartbeat, HeartbeatWriter, read_heartbeats


class Clock:
    """Two clocks: one that anybody may set, and one that goes on."""

    def __init__(self) -> None:
        self.wall, self.steady = 1_000_000.0, 50.0

    def passes(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(str(tmp_path / "run"), corpus="c", root="/c")


def writer(run: Run, clock: Clock) -> HeartbeatWriter:
    return HeartbeatWriter(run, "score", "base", clock=lambda: clock.wall, steady=lambda: clock.steady)


def said(run: Run) -> Heartbeat:
    [beat] = read_heartbeats(run, "score", "base")
    return beat


def test_written_every_two_seconds_and_with_every_unit(run: Run) -> None:
    clock = Clock()
    heart = writer(run, clock)
    heart.tokens(10)
    assert said(run).tokens_done == 10
    clock.passes(1)
    heart.tokens(10)
    assert said(run).tokens_done == 10
    clock.passes(1.5)
    heart.tokens(10)
    assert said(run).tokens_done == 30
    heart.unit_done(planned_tokens=12)
    assert (said(run).units_done, said(run).planned_done, said(run).encoded_done) == (1, 12, 30)


def test_speed_is_that_of_the_work_and_not_of_loading_a_model(run: Run) -> None:
    clock = Clock()
    heart = writer(run, clock)
    heart.unit("u")
    clock.passes(60)
    heart.tokens(100)
    assert said(run).tokens_per_second is None
    clock.passes(4)
    heart.tokens(80)
    assert said(run).tokens_per_second == pytest.approx(80 / 4)


def test_a_clock_that_is_set_back_neither_silences_nor_hurries_a_worker(run: Run) -> None:
    clock = Clock()
    heart = writer(run, clock)
    heart.tokens(10)
    clock.wall -= 3600
    clock.passes(5)
    heart.tokens(10)
    beat = said(run)
    assert beat.tokens_done == 20 and beat.tokens_per_second == pytest.approx(10 / 5) and beat.updated < beat.started


def test_a_skipped_unit_says_nothing_about_the_estimate(run: Run) -> None:
    heart = writer(run, Clock())
    heart.unit_done()
    assert (said(run).units_done, said(run).planned_done, said(run).encoded_done) == (1, 0, 0)
