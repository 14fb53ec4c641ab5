"""Trainings that branch off another's checkpoint: what they start with, what they are part of, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lehr.cli import main
from lehr.verify.files import read_manifests
from lehr.verify.lineage import check_lineage
from lehr.verify.training import check_training
from schemas.errors import CorruptFile, InputError
from schemas.run import Run
from tests.trainer.streams import make_run, ranked, sample, texts, write_stream
from tests.trainer.test_loop import Stop, journal, results, settings, stopping, weights
from trainer.loop import train
from trainer.stream import RankedStream


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A stable phase of six steps at a constant rate, with every checkpoint kept."""
    run, folder = make_run(tmp_path_factory.mktemp("parent"), samples=48)
    train(run, settings(folder, "stable", schedule="constant", checkpoint_every=1, keep_checkpoints=9))
    return run, folder


def branch(name: str, start_from: str = "stable@4", **changes: Any) -> Any:
    return settings(Path(), name, **{"model": "", "start_from": start_from, **changes})


def checkpoint(run: Run, step: int, training: str = "stable") -> str:
    return run.path(f"{run.training_folder(training)}/checkpoints/step-{step:08d}")


def test_a_branch_that_goes_on_is_the_training_it_left(world: tuple[Run, Path]) -> None:
    """Weights, moments and cursor of step 4, the same rate: steps 5 and 6 over again, bitwise."""
    run, _ = world
    summary = train(run, branch("goes-on", schedule="constant", from_cursor=True))
    assert summary["from"] == "stable@4" and summary["steps"] == 2
    mine, theirs = journal(run, "goes-on"), journal(run, "stable")[4:]
    differing = {"step", "total_offered_tokens", "total_trained_tokens"}
    for row, true in zip(mine, theirs):
        assert {k: v for k, v in row.items() if k not in differing} == {
            k: v for k, v in true.items() if k not in differing
        }
    positions = [[row["position"] for row in journal(run, name, "decisions")] for name in ("goes-on", "stable")]
    assert positions[0] == positions[1][32:]
    one, other = weights(run, "goes-on", 2), weights(run, "stable", 6)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_model_and_optimizer_state_are_those_of_the_checkpoint(world: tuple[Run, Path]) -> None:
    """As with both named by their folder; another beginning of the stream, another decay."""
    run, _ = world
    train(run, branch("named", steps=2))
    place = checkpoint(run, 4)
    train(run, settings(Path(place), "by-hand", optimizer_state=place, steps=2))
    assert journal(run, "named") == journal(run, "by-hand")
    train(run, branch("without", steps=2, from_optimizer=False))
    assert journal(run, "without")[0]["loss"] == journal(run, "named")[0]["loss"]
    assert journal(run, "without")[1]["loss"] != journal(run, "named")[1]["loss"]


def test_without_a_step_it_is_the_newest(world: tuple[Run, Path]) -> None:
    run, _ = world
    summary = train(run, branch("newest", "stable", steps=1))
    assert summary["from"] == "stable@6"
    one, other = train(run, branch("sixth", "stable@6", steps=1)), summary
    assert one["eval_loss"] == other["eval_loss"]


def test_the_parent_is_part_of_the_spec(world: tuple[Run, Path]) -> None:
    run, _ = world
    train(run, branch("spec", steps=1))
    assert run.manifest("train", "spec").spec["start_from"]
    with pytest.raises(InputError, match=r"'spec' exists with another spec: .*start_from was"):
        train(run, branch("spec", "stable@5", steps=1))


def test_rewarm_rises_from_the_rate_that_was_reached(tmp_path: Path) -> None:
    """An annealed training ended at 1/6 of its peak in the step before; from there back to a new peak."""
    run, folder = make_run(tmp_path)
    train(run, settings(folder, "annealed", lr=6e-3))
    last = journal(run, "annealed")[-1]["learning_rate"]
    assert last == pytest.approx(1e-3, rel=1e-12)
    train(run, branch("again", "annealed", schedule="constant", lr=5e-3, warmup_steps=4, rewarm=True))
    rates = [row["learning_rate"] for row in journal(run, "again")]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 5e-3], rel=1e-12)
    train(run, branch("share", "annealed", schedule="constant", lr=5e-3, warmup_steps=4, warmup_from=0.2))
    assert [row["learning_rate"] for row in journal(run, "share")] == pytest.approx(rates, rel=1e-12)
    with pytest.raises(InputError, match="above the peak"):
        train(run, branch("x", "annealed", lr=1e-4, warmup_steps=4, rewarm=True))


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_gives_the_same_bytes(world: tuple[Run, Path], tmp_path: Path, stop: int) -> None:
    run, _ = world
    found = []
    for cut in (False, True):
        name = f"resumed-{stop}"
        chosen = branch(name, policy="filter-then-weight", from_cursor=True, epochs=2, checkpoint_every=2, steps=5)
        if cut:
            with pytest.raises(Stop):
                train(run, chosen, stopping(stop))
        train(run, chosen)
        found.append(results(run, name))
        for path in (run.training_folder(name), f"stages/train/{name}.json"):
            Path(run.path(path)).rename(tmp_path / f"{Path(path).name}-{cut}")
    assert found[0].keys() == found[1].keys()
    assert [name for name in found[0] if found[0][name] != found[1][name]] == []


def test_the_cursor_goes_on_into_further_epochs(world: tuple[Run, Path]) -> None:
    run, _ = world
    train(run, branch("epochs", "stable@6", from_cursor=True, epochs=2))
    assert [row["position"] for row in journal(run, "epochs", "decisions")] == list(range(48, 96))


def test_a_lora_on_a_branch(world: tuple[Run, Path]) -> None:
    """The adapter's base is the checkpoint; a branch off the adapter's training goes on with it and its moments."""
    run, _ = world
    train(run, branch("adapter", lora=2, from_optimizer=False, steps=3))
    summary = train(run, branch("adapter-on", "adapter", steps=1))
    first = journal(run, "adapter-on")[0]
    assert first["loss"] > 0 and summary["initial_eval_loss"] == run.manifest("train", "adapter").summary["eval_loss"]
    with pytest.raises(InputError, match="--no-from-optimizer"):
        train(run, branch("x", lora=2))


def test_branches_each_with_a_stream_of_its_own(
    world: tuple[Run, Path], capsys: pytest.CaptureFixture[str], wide_console: None
) -> None:
    """`lehr branch`: from one checkpoint, a training for every stream, the same as by `lehr train` one by one."""
    run, _ = world
    tokenizer = RankedStream(run.path("streams/match/gen-000001")).index.tokenizer
    places = []
    for number in (1, 2):
        items = ranked([sample(f"s{number}", row, text) for row, text in enumerate(texts(16, seed=7 * number))])
        places.append(run.path(f"../other-{number}"))
        write_stream(places[-1], items, tokenizer=tokenizer, name=f"other-{number}")
    options = ["--policy", "full", "--candidates", "8", "--n-keep", "4", "--dtype", "float32", "--lr", "0.01"]
    options += ["--warmup-select", "2", "--proj-rank", "4"]
    assert main(["branch", run.url, *places, "--from", "stable@4", *options]) == 0
    said = capsys.readouterr().out
    for number, place in enumerate(places, 1):
        name = f"other-{number}-full-from-stable-4"
        assert name in said
        train(run, branch(f"alone-{number}", stream=place, lr=1e-2))
        assert journal(run, name) == journal(run, f"alone-{number}")
        assert run.manifest("train", name).spec == run.manifest("train", f"alone-{number}").spec
    assert journal(run, "alone-1") != journal(run, "alone-2")


def test_verify_counts_the_parent_and_every_folder_beside_the_weights(tmp_path: Path) -> None:
    """Whole as it was written; not once another checkpoint stands where the parent was; a pruned parent is no fault."""
    run, folder = make_run(tmp_path, samples=16)
    train(run, settings(folder, "first"))
    changes = {"lora": 2, "merge": True, "ema_decay": 0.5, "average_tail": 0.5, "from_optimizer": False}
    train(run, branch("child", "first@2", **changes))

    def problems() -> list[str]:
        manifests, checks = read_manifests(run)
        checks += list(check_lineage(run, manifests)) + list(check_training(run, manifests, "child", quick=False))
        # The world of these tests has a stream without a selection.
        return [problem for check in checks for problem in check.problems if "stages/export" not in problem]

    assert problems() == []
    beside = Path(run.path(run.manifest("train", "child").summary["checkpoint"]))
    held = (beside / "ema/adapter_model.safetensors").read_bytes()
    (beside / "ema/adapter_model.safetensors").write_bytes(held[:-1])
    assert any("ema/adapter_model.safetensors" in problem for problem in problems())
    (beside / "ema/adapter_model.safetensors").write_bytes(held)
    parent = Path(checkpoint(run, 2, "first"))
    train(run, settings(folder, "second", seed=1))
    shutil.move(parent, tmp_path / "away")
    assert problems() == []
    shutil.copytree(checkpoint(run, 2, "second"), parent)
    assert [problem for problem in problems() if "was started from checkpoint" in problem]


def test_what_cannot_be_started_from_is_refused(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = world
    for start, message in (
        ("nobody", "no checkpoint of a training 'nobody'"),
        ("stable@7", r"no checkpoint at step '7' \(checkpoints: 1, 2, 3, 4, 5, 6\)"),
        ("stable@last", "no checkpoint at step 'last'"),
    ):
        with pytest.raises(InputError, match=message):
            train(run, branch("x", start))
    with pytest.raises(InputError, match="give --model or --from"):
        train(run, settings(folder, "x", start_from="stable"))
    with pytest.raises(InputError, match="name the model to train with --model, or a training to start from"):
        train(run, branch("x", ""))
    with pytest.raises(InputError, match="read all 48 samples"):
        train(run, branch("x", "stable@6", from_cursor=True))
    with pytest.raises(InputError, match="seed = 0, this stream has 1"):
        train(run, branch("x", from_cursor=True, seed=1))
    for changes, message in (
        ({"start_from": "", "from_cursor": True}, "name that one with start_from"),
        ({"rewarm": True}, "give start_from, warmup_steps"),
        ({"rewarm": True, "warmup_steps": 2, "warmup_from": 0.1}, "rewarm or warmup_from"),
    ):
        with pytest.raises(InputError, match=message):
            branch("x", **changes)
    train(run, settings(folder, "light", final_optimizer=False, steps=1))
    with pytest.raises(InputError, match=r"holds no optimizer state.*--no-from-optimizer"):
        train(run, branch("x", "light"))
    shutil.copytree(run.path(run.training_folder("light")), run.path(run.training_folder("torn")))
    (Path(checkpoint(run, 1, "torn")) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFile, match="differs from the manifest"):
        train(run, branch("x", "torn@1"))
