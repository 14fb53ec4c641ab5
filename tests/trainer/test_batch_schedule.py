"""Sizes of steps over a training: points, counts of steps against brute force, positions, exact resume."""

from __future__ import annotations

import random
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import InputError
from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import Stop, journal, results, settings, stopping
from trainer.batch_schedule import BatchSchedule
from trainer.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("sizes"), samples=48)


def parsed(text: str) -> BatchSchedule:
    return BatchSchedule.parse(text, candidates=16, n_keep=8)


def test_points_hold_from_their_share_on() -> None:
    schedule = parsed("0:4/2, 0.25:8, 0.75:32/16")
    shares = (0, 0.24, 0.25, 0.74, 0.75, 1.0)
    found = [(schedule.at(share).candidates, schedule.at(share).n_keep) for share in shares]
    assert found == [(4, 2), (4, 2), (8, 8), (8, 8), (32, 16), (32, 16)]
    assert [(p.start, p.candidates, p.n_keep) for p in parsed("0.5:32/16").points] == [(0, 16, 8), (0.5, 32, 16)]
    assert parsed("").at(0.7).candidates == 16


def test_steps_are_as_many_as_the_samples_allow() -> None:
    """Against counting step by step: the largest T whose last step still finds a sample."""
    rng = random.Random(0)
    for _ in range(200):
        starts = sorted(rng.sample([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1 / 3], rng.randint(0, 3)))
        text = ",".join(f"{start}:{rng.randint(1, 40)}/1" for start in starts)
        schedule, samples = parsed(text), rng.randint(1, 300)

        def before_last(total: int, schedule: BatchSchedule = schedule) -> int:
            return sum(schedule.at(step / total).candidates for step in range(total - 1))

        allowed = [total for total in range(1, 320) if before_last(total) < samples]
        assert schedule.steps(samples) == max(allowed), (text, samples)
        asked = rng.randint(1, 40)
        assert schedule.steps(samples, asked) == max(total for total in allowed if total <= asked), (text, samples)


@pytest.mark.parametrize(
    "text,message",
    [
        ("half:16", "'half:16' is no point"),
        ("0.5:16/x", "is no point"),
        ("0.5", "is no point"),
        ("1:16", r"in \[0, 1\)"),
        ("0.5:0", "at least 1"),
        ("0.5:16,0.5:8", "does not come after"),
        ("0.5:16,0:8", "does not come after"),
    ],
)
def test_points_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parsed(text)


@pytest.mark.parametrize("policy", ["random", "filter-then-weight"])
def test_a_step_is_offered_the_positions_after_those_before_it(world: tuple[Run, Path], policy: str) -> None:
    run, folder = world
    name = f"sizes-{policy}"
    train(run, settings(folder, name, policy=policy, batch_schedule="0:4/1,0.5:12/3"))
    steps, decisions = journal(run, name), journal(run, name, "decisions")
    assert [row["offered"] for row in steps] == [4, 4, 4, 4, 12, 12, 8]
    assert max(row["kept"] for row in steps[:4]) == 1
    assert [row["kept"] for row in steps[4:]] == [3] * 3 or policy != "random"
    ends = list(accumulate(row["offered"] for row in steps))
    for row, end in zip(steps, ends):
        mine = [d["position"] for d in decisions if d["step"] == row["step"]]
        assert mine == list(range(end - row["offered"], end))


@pytest.mark.parametrize("changes", [{}, {"token_budget": 260, "epochs": 4}, {"epochs": 2, "steps": 7}])
def test_resume_gives_the_same_bytes(tmp_path: Path, changes: dict[str, Any]) -> None:
    run, folder = make_run(tmp_path)
    found = []
    for stop in (None, 1, 3, 5):
        chosen = settings(
            folder, "t", policy="filter-then-weight", batch_schedule="0.3:4/2,0.6:16/5", checkpoint_every=2, **changes
        )
        if stop:
            with pytest.raises(Stop):
                train(run, chosen, stopping(stop))
        train(run, chosen)
        found.append(results(run, "t"))
        assert len({row["offered"] for row in journal(run, "t")}) > 2
        for path in ("trainings/t", "stages/train/t.json"):
            Path(run.path(path)).rename(tmp_path / f"{Path(path).name}-{stop}")
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert [name for name in other if other[name] != found[0][name]] == []


def test_the_rate_follows_the_steps_whatever_their_size(world: tuple[Run, Path]) -> None:
    run, folder = world
    train(run, settings(folder, "rates", batch_schedule="0:4,0.5:12", steps=6))
    assert [row["learning_rate"] for row in journal(run, "rates")] == pytest.approx(
        [1e-2 * (1 - t / 6) for t in range(6)], rel=1e-12
    )
