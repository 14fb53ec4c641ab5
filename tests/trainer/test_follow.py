"""Trainings that follow their stream: when they switch, what is offered then, and the same again after a stop."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lehr.verify.lineage import check_lineage
from schemas.errors import CorruptFile, InputError
from schemas.manifest import Manifest, read_manifest, write_manifest
from schemas.run import Run
from schemas.storage import list_names
from selection_ops.model import tokenizer_fingerprint
from tests.trainer.streams import make_run, ranked, sample, texts, write_stream
from tests.trainer.test_loop import Stop, journal, results, settings, stopping
from tests.trainer.test_parallel import arguments
from tests.trainer.together import Group
from trainer.__main__ import main
from trainer.follow import newest_generation, read_record
from trainer.loggers import Progress
from trainer.loop import train
from trainer.order import shuffled_ranks

SECOND = 30
Place = tuple[Run, Path]


@pytest.fixture
def world(tmp_path: Path) -> Place:
    return make_run(tmp_path, samples=40)


def add(
    world: Place,
    generation: int = 2,
    *,
    stream: str = "match",
    rows: int = SECOND,
    finished: bool = True,
    **changes: Any,
) -> None:
    """A generation of a stream, as `lehr export` leaves it; unless `finished`, without its manifest."""
    run, model = world
    items = ranked([sample(f"gen{generation}", row, text) for row, text in enumerate(texts(rows, seed=generation))])
    beside = ranked([sample("target", row, text) for row, text in enumerate(texts(9, seed=1))])
    evaluation = ranked([sample("eval", row, text) for row, text in enumerate(texts(6, seed=2))])
    write_stream(
        run.path(run.stream_folder(stream, generation)),
        items,
        **{
            "tokenizer": tokenizer_fingerprint(str(model)), "target": beside, "evaluation": evaluation, "name": stream,
            "generation": generation, **changes,
        },
    )  # fmt: skip
    if finished:
        name = f"{stream}.gen-{generation:06d}"
        spec = {"stream": stream, "generation": generation}
        write_manifest(
            run.path(run.manifest_path("export", name)), Manifest(stage="export", name=name, spec=spec, inputs={})
        )


def remove(world: Place, generation: int) -> None:
    """A generation as if it had never been."""
    run, _ = world
    shutil.rmtree(run.path(run.stream_folder("match", generation)))
    Path(run.path(run.manifest_path("export", f"match.gen-{generation:06d}"))).unlink()


def at(step: int, act: Callable[[], None], stop: int = 0) -> Callable[[Progress], None]:
    """Something that happens while a step is taken."""

    def progress(event: Progress) -> None:
        if event.row["step"] == step:
            act()
        if event.row["step"] == stop:
            raise Stop

    return progress


def following(world: Place, **changes: Any) -> Any:
    return settings(world[1], "t", **{"follow": True, "follow_every": 2, "steps": 7, "checkpoint_every": 3, **changes})


def generations(world: Place) -> list[int]:
    return [row["generation"] for row in journal(world[0], "t")]


def test_the_next_generation_is_taken_between_two_steps(world: Place) -> None:
    """It stands during step 3 and looks are made behind 2, 4, ...: steps 1 to 4 are of the first, 5 to 7 of the second, from its
    first position on in its own order; positions run on."""
    run, _ = world
    summary = train(run, following(world), at(3, lambda: add(world)))
    assert generations(world) == [1, 1, 1, 1, 2, 2, 2]
    decisions = journal(run, "t", "decisions")
    assert [row["position"] for row in decisions] == list(range(56))
    assert [row["generation"] for row in decisions] == [1] * 32 + [2] * 24
    assert {row["stream"] for row in decisions} == {"match"}
    assert [row["rank"] for row in decisions[:32]] == shuffled_ranks(0, 40, 0)[:32].tolist()
    assert [row["rank"] for row in decisions[32:]] == shuffled_ranks(0, SECOND, 0)[:24].tolist()
    assert [row["learning_rate"] for row in journal(run, "t")] == pytest.approx([1e-2 * (1 - n / 7) for n in range(7)])
    assert [(s["step"], s["generation"], s["first"]) for s in summary["generations"]] == [(0, 1, 0), (4, 2, 32)]
    manifest = run.manifest("train", "t")
    assert manifest.inputs == {"stream": summary["generations"][1]["fingerprint"]}
    assert manifest.spec["stream"] == summary["generations"][0]["fingerprint"]
    # The checkpoint behind the switch stands, and the files that a training leaves hold no other record than the last.
    assert [part.path for part in manifest.parts if "/steps/" in part.path] == [
        f"trainings/t/steps/part-{a:06d}-{b:06d}.parquet" for a, b in ((1, 3), (4, 4), (5, 6), (7, 7))
    ]
    assert list_names(run.path("trainings/t/follow")) == ["step-00000006.json"]


def test_without_follow_nothing_is_taken(world: Place) -> None:
    train(world[0], following(world, follow=False, steps=5), at(1, lambda: add(world)))
    assert generations(world) == [1] * 5


@pytest.mark.parametrize("every,expected", [(1, [1] * 4 + [2] * 3), (3, [1] * 6 + [2]), (5, [1] * 5 + [2] * 2)])
def test_looks_are_made_every_so_many_steps(tmp_path: Path, every: int, expected: list[int]) -> None:
    """What is finished while step 3 is reported stands after the look behind it."""
    world = make_run(tmp_path, samples=80)
    train(world[0], following(world, follow_every=every), at(3, lambda: add(world)))
    assert generations(world) == expected


@pytest.mark.parametrize(
    "policy,stop",
    [
        ("full", 3),
        ("full", 4),
        ("full", 6),
        ("filter-then-weight", 5),
        pytest.param("filter-then-weight", 3, marks=pytest.mark.slow),
        pytest.param("filter-then-weight", 4, marks=pytest.mark.slow),
    ],
)
def test_resume_repeats_the_switch_though_the_old_generation_is_gone(tmp_path: Path, policy: str, stop: int) -> None:
    """Stopped before, at and behind the switch, once its checkpoint stands: all bytes as without a stop."""
    found = []
    for place in ("whole", "cut"):
        world = make_run(tmp_path / place, samples=40)
        chosen = following(world, policy=policy)
        if place == "cut":
            with pytest.raises(Stop):
                train(world[0], chosen, at(3, lambda: add(world), stop=stop))  # noqa: B023
            if stop >= 4:
                remove(world, 1)
            train(world[0], chosen)
        else:
            train(world[0], chosen, at(3, lambda: add(world)))  # noqa: B023
        assert generations(world) == [1] * 4 + [2] * 3
        found.append(results(world[0], "t"))
    assert found[0] == found[1]


def test_a_stop_between_the_look_and_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record stands and the checkpoint does not: steps from the one before are taken again, and the same switch."""
    whole, cut = (make_run(tmp_path / place, samples=40) for place in ("whole", "cut"))
    train(whole[0], following(whole), at(3, lambda: add(whole)))

    def fails(*_: Any) -> None:
        raise Stop

    def broken() -> None:
        add(cut)
        monkeypatch.setattr("trainer.loop.write_checkpoint", fails)

    with pytest.raises(Stop):
        train(cut[0], following(cut), at(3, broken))
    monkeypatch.undo()
    record = read_record(cut[0], "t")
    assert record is not None and [switch.step for switch in record.switches] == [0, 4]
    add(cut, 3)  # stands by now, and was not there when the look was made
    train(cut[0], following(cut))
    assert generations(cut) == [1, 1, 1, 1, 2, 2, 3]
    assert journal(cut[0], "t")[:6] == journal(whole[0], "t")[:6]


def test_steps_that_were_taken_are_taken_again_on_the_same_generation(world: Place) -> None:
    """Looks that found nothing are on record too: what comes later does not reach back behind steps that no checkpoint holds."""
    run, _ = world
    chosen = following(world, follow_every=1, checkpoint_every=100)
    losses: list[float] = []

    def remembered(event: Progress) -> None:
        losses.append(event.row["loss"])
        stopping(3)(event)

    with pytest.raises(Stop):
        train(run, chosen, remembered)
    add(world)
    train(run, chosen)
    assert generations(world) == [1, 1, 1, 1, 2, 2, 2]
    assert [row["loss"] for row in journal(run, "t")][:3] == losses


def test_a_training_that_was_stopped_before_its_first_checkpoint_begins_as_it_had(world: Place) -> None:
    run, _ = world
    with pytest.raises(Stop):
        train(run, following(world, checkpoint_every=100), stopping(1))
    add(world, rows=60)
    train(run, following(world, checkpoint_every=100))
    assert generations(world) == [1, 1, 2, 2, 2, 2, 2]


def test_the_generation_of_the_checkpoint_is_gone(world: Place) -> None:
    run, _ = world
    with pytest.raises(Stop):
        train(run, following(world), stopping(3))
    add(world)
    remove(world, 1)
    with pytest.raises(
        InputError, match=r"has no finished stream|has no generation 1|stands on a generation that is gone"
    ):
        train(run, following(world))


def test_several_processes_switch_together(world: Place, tmp_path: Path) -> None:
    """Process 0 looks, all of them switch: the decisions of one process."""
    run, _ = world
    add(world)
    options: dict[str, Any] = {"policy": "full", "generation": 1, "follow-every": 2, "steps": 5}
    words = [[*arguments(*world, name, **options), "--follow"] for name in ("one", "two")]
    assert main(words[0]) == 0
    group = Group(2, words[1], tmp_path / "logs")
    assert group.wait() == [0, 0], group.output(0)[-2000:]
    for name in ("one", "two"):
        assert [row["generation"] for row in journal(run, name)] == [1, 1, 2, 2, 2]
    one, two = (
        [(row["position"], row["sample_id"]) for row in journal(run, name, "decisions")] for name in ("one", "two")
    )
    assert one == two


def test_follow_with_a_token_budget(world: Place) -> None:
    run, _ = world
    summary = train(run, following(world, steps=0, token_budget=400), at(1, lambda: add(world, rows=60)))
    assert generations(world)[:4] == [1, 1, 2, 2]
    assert summary["ended"] == "token budget"
    assert 388 < summary["trained_tokens"] <= 400


def test_a_stream_that_is_used_up_is_followed_at_once_or_ends_the_training(
    world: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """Forty samples are five steps; the look behind the fifth is not one of every hundred."""
    run, _ = world
    summary = train(run, following(world, follow_every=100, steps=30), at(2, lambda: add(world, rows=12)))
    assert generations(world) == [1] * 5 + [2] * 2
    assert summary["ended"] == "stream"
    assert "the stream ended after 7 of 30 steps" in caplog.text


def test_the_newest_of_several_is_taken(world: Place) -> None:
    run, _ = world
    assert newest_generation(run, "match", 1) == 1
    add(world, 2)
    add(world, 3)
    add(world, 4, finished=False)
    add(world, 7, stream="match-er")
    assert newest_generation(run, "match", 1) == 3
    assert newest_generation(run, "match", 3) == 3
    (Path(run.path(run.stream_folder("match", 3))) / "index.json").unlink()
    assert newest_generation(run, "match", 1) == 2


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"tokenizer": "another"}, "another tokenizer"),
        ({"rows": 0}, "holds no samples"),
        ({"target": []}, "holds no target samples"),
    ],
)
def test_a_generation_that_cannot_take_over_is_passed_over(
    world: Place, changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    train(world[0], following(world, steps=4), at(1, lambda: add(world, **changes)))
    assert generations(world) == [1] * 4
    assert "generation 2 of stream match is passed over" in caplog.text
    assert reason in caplog.text


def test_several_targets_must_stay_the_same_ones(world: Place, caplog: pytest.LogCaptureFixture) -> None:
    """A generation of one domain (every second row) does not take over where each domain is a target; of both, it does."""
    items = ranked([sample("target", row, text) for row, text in zip((0, 2, 4), texts(3, seed=1))])
    chosen = following(world, policy="filter-then-weight", targets="mean", steps=6)
    once = at(1, lambda: add(world, target=items))
    again = at(3, lambda: add(world, 3))
    train(world[0], chosen, lambda event: (once(event), again(event))[0])
    assert generations(world) == [1, 1, 1, 1, 3, 3]
    assert "generation 2 of stream match is passed over" in caplog.text
    assert "its target samples are of the domains math" in caplog.text


def test_other_held_out_samples_are_said(world: Place, caplog: pytest.LogCaptureFixture) -> None:
    other = ranked([sample("eval", row, text) for row, text in enumerate(texts(4, seed=9))])
    with caplog.at_level(logging.WARNING):
        train(world[0], following(world, steps=4), at(1, lambda: add(world, evaluation=other)))
    assert "losses before and after it do not compare" in caplog.text


def test_a_damaged_record_is_named(world: Place) -> None:
    run, _ = world
    with pytest.raises(Stop):
        train(run, following(world), stopping(3))
    (path,) = Path(run.path("trainings/t/follow")).iterdir()
    path.write_bytes(path.read_bytes().replace(b'"looked": 2', b'"looked": 9'))
    with pytest.raises(CorruptFile, match=r"follow/step-00000002\.json is damaged"):
        train(run, following(world))


def test_lineage_of_a_training_that_followed(world: Place) -> None:
    """What it ended on must stand; what it came from may be gone."""
    run, _ = world
    train(run, following(world), at(3, lambda: add(world)))
    remove(world, 1)
    manifest = {("train", "t"): read_manifest(run.path("stages/train/t.json"), "")}
    assert [check.problems for check in check_lineage(run, manifest)] == [[], []]
    remove(world, 2)
    assert any(check.problems for check in check_lineage(run, manifest))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"steps": 0}, "give steps or token_budget with follow"),
        ({"stream": "gs://bucket/stream"}, "follow needs a stream of the run"),
        ({"start_from": "other", "from_cursor": True}, "give follow or from_cursor"),
        ({"follow_every": 0}, "follow_every must be at least 1"),
    ],
)
def test_impossible_following(world: Place, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        following(world, **changes)


# Mixes in a training.


def test_a_mix_in_a_training(world: Place, tmp_path: Path) -> None:
    """Three tenths of what is offered come from another stream, which is passed through as often as its part says."""
    run, model = world
    add(world, 1, stream="general", rows=6)
    chosen = settings(model, "t", mix=("general=0.3:3",), steps=6)
    with pytest.raises(Stop):
        train(run, chosen, stopping(3))
    train(run, chosen)
    decisions = journal(run, "t", "decisions")
    drawn = [row["stream"] for row in decisions]
    assert len(drawn) == 48
    assert abs(drawn.count("general") - 0.3 * 48) < 1
    assert [row["rank"] for row in decisions if row["stream"] == "match"] == shuffled_ranks(0, 40, 0)[
        : drawn.count("match")
    ].tolist()
    general = [row["rank"] for row in decisions if row["stream"] == "general"]
    assert (
        general
        == [*shuffled_ranks(0, 6, 0).tolist(), *shuffled_ranks(0, 6, 1).tolist(), *shuffled_ranks(0, 6, 2).tolist()][
            : len(general)
        ]
    )
    manifest = run.manifest("train", "t")
    assert set(manifest.inputs) == {"stream", "stream.general"}
    assert manifest.spec["mix"] == [{"stream": manifest.inputs["stream.general"], "share": 0.3, "epochs": 3}]
    other = make_run(tmp_path / "other", samples=40)
    add(other, 1, stream="general", rows=6)
    train(other[0], settings(other[1], "t", mix=("general=0.3:3",), steps=6))
    assert journal(other[0], "t", "decisions") == decisions
    # The share is part of the spec, and so is what is mixed in.
    for mix in (("general=0.4:3",), ("general=0.3:2",), ()):
        with pytest.raises(InputError, match="exists with another spec: mix was"):
            train(run, settings(model, "t", mix=mix, steps=6))


def test_a_training_goes_on_where_a_mixed_one_stood(world: Place) -> None:
    """From its weights and its place in every stream, with more epochs of what is replayed."""
    run, model = world
    add(world, 1, stream="general", rows=6)
    train(run, settings(model, "t", mix=("general=0.25:2",), steps=2, checkpoint_every=2))
    chosen = settings(model, "u", mix=("general=0.25:3",), steps=2, start_from="t@2", from_cursor=True)
    train(run, dataclasses.replace(chosen, model=""))
    rows = [row for name in "tu" for row in journal(run, name, "decisions")]
    assert [row["position"] for row in rows] == list(range(32))
    general = [row["rank"] for row in rows if row["stream"] == "general"]
    assert general == [*shuffled_ranks(0, 6, 0).tolist(), *shuffled_ranks(0, 6, 1).tolist()][:8]


def test_a_stream_of_a_mix_is_followed_by_itself(world: Place) -> None:
    run, _ = world
    add(world, 1, stream="general", rows=30)
    chosen = following(world, mix=("general=0.25",), steps=6)
    with pytest.raises(Stop):
        train(run, chosen, at(3, lambda: add(world, 2, stream="general", rows=30), stop=5))
    train(run, chosen)
    rows = journal(run, "t", "decisions")
    general = [row for row in rows if row["stream"] == "general"]
    assert [row["generation"] for row in general] == [1] * 8 + [2] * 4
    assert {row["generation"] for row in rows if row["stream"] == "match"} == {1}
    assert [row["rank"] for row in general[8:]] == shuffled_ranks(0, 30, 0)[:4].tolist()
    assert [row["position"] for row in rows] == list(range(48))


@pytest.mark.parametrize(
    "mix,message",
    [
        (("general",), "NAME=SHARE"),
        (("general=much",), "NAME=SHARE"),
        (("general=0.3:x",), "NAME=SHARE"),
        (("match=0.3",), "a name of its own"),
        (("a=0.5", "b=0.5"), "leave something to stream match"),
        (("a=-0.5",), "must be positive"),
        (("a=0.5:0",), "epochs be at least 1"),
        (("general=0.3",), "no finished stream 'general'"),
    ],
)
def test_impossible_mixes(world: Place, mix: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(world[0], settings(world[1], "t", mix=mix))
