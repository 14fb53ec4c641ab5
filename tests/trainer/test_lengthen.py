"""An unfinished training is given another number of steps where no step so far would have been another; anything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import InputError
from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import Stop, results, settings, stopping
from trainer.loop import train

Place = tuple[Run, Path]
LONG = {"epochs": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_run(tmp_path_factory.mktemp("lengthen"))


def stopped(place: Place, name: str, at: int, **changes: Any) -> None:
    with pytest.raises(Stop):
        train(place[0], settings(place[1], name, **{**LONG, **changes}), stopping(at))


@pytest.mark.parametrize(
    "changes,before,after",
    [({"schedule": "constant"}, 6, 9), ({"schedule": "constant"}, 9, 6), ({"decay_from": 0.5}, 8, 10)],
    ids=["longer", "shorter", "before the decay"],
)
def test_another_number_of_steps_gives_the_bytes_of_a_training_that_had_it_from_the_start(
    tmp_path: Path, changes: dict[str, Any], before: int, after: int
) -> None:
    found = []
    for folder, first in (("whole", after), ("changed", before)):
        place = make_run(tmp_path / folder)
        if first == before:
            stopped(place, "t", 5, steps=before, **changes)
        train(place[0], settings(place[1], "t", steps=after, **LONG, **changes))
        # A checkpoint that was written before the change, after steps 2 and 4, says which number held then.
        held = results(place[0], "t").items()
        found.append({path: data for path, data in held if "step-00000002" not in path and "step-00000004" not in path})
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_a_schedule_over_all_steps_says_why_it_cannot_change(world: Place) -> None:
    stopped(world, "linear", 3, steps=6)
    with pytest.raises(
        InputError, match="steps was 6 and is now 9, and schedule linear spreads the learning rate over all steps"
    ):
        train(world[0], settings(world[1], "linear", steps=9, **LONG))
    stopped(world, "sizes", 3, steps=6, schedule="constant", batch_schedule="0.5:4/2")
    with pytest.raises(InputError, match="batch_schedule places sizes by shares of the training"):
        train(world[0], settings(world[1], "sizes", steps=9, schedule="constant", batch_schedule="0.5:4/2", **LONG))


def test_neither_into_the_decay_nor_to_before_what_was_taken(world: Place) -> None:
    stopped(world, "decaying", 7, steps=8, decay_from=0.5)
    with pytest.raises(
        InputError, match=r"the decay of the learning rate has begun, or would have, within the 6 steps .*0\.5"
    ):
        train(world[0], settings(world[1], "decaying", steps=12, decay_from=0.5, **LONG))
    stopped(world, "constant", 5, steps=8, schedule="constant")
    with pytest.raises(InputError, match="it has taken 4 steps: ask for more"):
        train(world[0], settings(world[1], "constant", steps=4, schedule="constant", **LONG))


def test_a_finished_training_stays_as_it_is(world: Place) -> None:
    train(world[0], settings(world[1], "done", steps=4, schedule="constant", **LONG))
    before = results(world[0], "done")
    with pytest.raises(
        InputError, match=r"it has finished after 4 steps\. To go on from there, start another training --from done"
    ):
        train(world[0], settings(world[1], "done", steps=6, schedule="constant", **LONG))
    assert results(world[0], "done") == before


@pytest.mark.parametrize("changes", [{"lr": 2e-2}, {"seed": 1}, {"batch_tokens": 77}, {"epochs": 3}])
def test_anything_else_is_refused_by_name_beside_a_number_of_steps(world: Place, changes: dict[str, Any]) -> None:
    name = f"else-{next(iter(changes))}"
    stopped(world, name, 3, steps=6, schedule="constant")
    given = {**LONG, "steps": 9, "schedule": "constant", **changes}
    with pytest.raises(InputError, match=rf"exists with another spec: .*{next(iter(changes))} was"):
        train(world[0], settings(world[1], name, **given))


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_every": 1},
        {"keep_checkpoints": 5},
        {"cache_bytes": 0},
        {"process_timeout": 5},
        {"final_optimizer": False},
        {"device": "cpu"},
    ],
)
def test_what_changes_no_result_may_change(world: Place, changes: dict[str, Any]) -> None:
    name = f"may-{next(iter(changes))}"
    stopped(world, name, 3, steps=4)
    assert train(world[0], settings(world[1], name, **{**LONG, "steps": 4, **changes}))["steps"] == 4
