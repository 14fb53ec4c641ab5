"""FSDP2 in real processes over gloo: sums where it would average, the same decisions as whole, checkpoints that anybody resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from schemas.errors import InputError
from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import journal
from tests.trainer.test_parallel import arguments, assert_same_training, start_and_kill, together
from tests.trainer.together import Group
from trainer.__main__ import main
from trainer.settings import TrainSettings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("sharding"), samples=51)


@pytest.mark.parametrize(
    "count,options",
    [
        (2, {}),
        (4, {"precondition": "exact", "policy": "full", "batch-tokens": 20}),
    ],
)
def test_shards_decide_and_train_as_the_whole(
    world: tuple[Run, Path], tmp_path: Path, count: int, options: dict[str, Any]
) -> None:
    run = world[0]
    name, options = "-".join(["whole", *map(str, options.values())]), {"mode": "two-pass", **options}
    assert main(arguments(*world, name, **options)) == 0
    together(count, world, tmp_path, f"{name}-{count}", shard="fsdp2", **options)
    assert_same_training(run, name, f"{name}-{count}", tolerance=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count,options",
    [
        (3, {"precondition": "rank-one"}),
        (2, {"alignment": "exact"}),
        (2, {"alignment": "exact", "granularity": "token-mask"}),
        (2, {"metric": "opus"}),
        (2, {"policy": "loss", "oracle-every": 3, "oracle-draws": 2}),
        (2, {"policy": "grad-norm", "mode": "auto"}),
    ],
)
def test_every_way_to_compare_works_on_shards(
    world: tuple[Run, Path], tmp_path: Path, count: int, options: dict[str, Any]
) -> None:
    run = world[0]
    name = "-".join(["ways", *map(str, options.values())])
    alone = {**options, "mode": "two-pass"}
    assert main(arguments(*world, name, **alone)) == 0
    together(count, world, tmp_path, f"{name}-{count}", shard="fsdp2", **options)
    assert_same_training(run, name, f"{name}-{count}", tolerance=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "neox"])
def test_other_families_and_tied_weights(tmp_path: Path, kind: str) -> None:
    world = make_run(tmp_path / "world", samples=24, kind=kind)
    assert main(arguments(*world, "whole", mode="two-pass")) == 0
    together(2, world, tmp_path / "logs", "cut", shard="fsdp2")
    assert_same_training(world[0], "whole", "cut", tolerance=1e-7)


CUT: dict[str, Any] = {"mode": "two-pass", "epochs": 3, "checkpoint-every": 3, "candidates": 7, "shard": "fsdp2"}


@pytest.mark.slow
def test_checkpoints_are_whole_and_resumed_in_any_number_of_processes(tmp_path: Path) -> None:
    """Cut over three, killed; cut over two, killed; whole in one to the end: the same candidates, and losses to rounding."""
    whole = make_run(tmp_path / "whole", samples=49)
    assert main(arguments(*whole, "t", **{**CUT, "shard": "none"})) == 0
    place = make_run(tmp_path / "killed", samples=49)
    for count, after in ((3, 5), (2, 4)):
        group = start_and_kill(place, tmp_path / f"first-{count}", count=count, victim=count - 1, after=after, **CUT)
        assert group.wait(30)[0] == 2
        assert "lost the others" in group.output(0)
        assert "Traceback" not in group.output(0)
    last = together(1, place, tmp_path / "last", "t", **{**CUT, "shard": "none"})
    assert "\nstep 1 " not in last.output(0)
    for table in ("steps", "decisions"):
        wanted, found = journal(whole[0], "t", table), journal(place[0], "t", table)
        for column in ("step", "position", "sample_id", "kept") if table == "decisions" else ("step", "kept"):
            assert [row[column] for row in found] == [row[column] for row in wanted]
    losses = [row["loss"] for row in journal(whole[0], "t")]
    assert [row["loss"] for row in journal(place[0], "t")] == pytest.approx(losses, rel=1e-7)
    files = [
        run.path(f"{run.training_folder('t')}/checkpoints/step-00000021/optimizer.safetensors")
        for run, _ in (whole, place)
    ]
    one, other = (load_file(file) for file in files)
    assert one.keys() == other.keys()
    assert all(float((one[n] - other[n]).norm()) <= 1e-6 * float(one[n].norm()) for n in one)


def test_what_shards_cannot_do_is_refused(
    world: tuple[Run, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(*world, "alone", shard="fsdp2")) == 2
    assert "shard fsdp2 needs several processes" in capsys.readouterr().err
    assert main(arguments(*world, "began", mode="one-pass", steps=1)) == 0
    group = Group(2, arguments(*world, "began", steps=1, shard="fsdp2"), tmp_path)
    assert group.wait(60) == [2, 2]
    assert "'began' began in one pass, which shards cannot go on with" in group.output(0)
    with pytest.raises(InputError, match="fsdp2 and mode one-pass exclude each other"):
        TrainSettings(shard="fsdp2", mode="one-pass")
    with pytest.raises(InputError, match="keeps no averages"):
        TrainSettings(shard="fsdp2", ema_decay=0.9)
    with pytest.raises(InputError, match="unknown value 'zero' of shard"):
        TrainSettings(shard="zero")  # type: ignore[arg-type]
