"""Averages of the weights: against torch's own and float64 means, as folders that load, exact over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

from schemas.errors import InputError
from schemas.run import Run
from tests.tiny import tiny_llama
from tests.trainer.streams import make_run
from tests.trainer.test_loop import Stop, results, settings, stopping
from trainer.averages import WeightAverage
from trainer.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("averages"), samples=48)


def loaded(place: str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).state_dict())


def states(run: Run, name: str, steps: range) -> list[dict[str, torch.Tensor]]:
    return [loaded(run.path(f"{run.training_folder(name)}/checkpoints/step-{step:08d}")) for step in steps]


def test_exponential_average_is_that_of_torch() -> None:
    model = tiny_llama()
    mine, theirs = WeightAverage(model, decay=0.7), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
    theirs.update_parameters(model)  # the first is a copy
    for _ in range(5):
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        mine.update()
        theirs.update_parameters(model)
    with mine.in_place():
        for found, true in zip(model.parameters(), theirs.module.parameters()):
            assert torch.allclose(found, true, rtol=1e-6, atol=1e-6)


def test_both_averages_of_a_training(world: tuple[Run, Path]) -> None:
    """From the weights after every step, in float64; six steps, of which 0.5 are the last three."""
    run, folder = world
    summary = train(
        run, settings(folder, "both", ema_decay=0.6, average_tail=0.5, checkpoint_every=1, keep_checkpoints=9)
    )
    found = states(run, "both", range(1, 7))
    start = loaded(str(folder))
    averages = {name: loaded(run.path(about["model"])) for name, about in summary["averages"].items()}
    assert [summary["averages"][name]["steps"] for name in ("ema", "tail")] == [6, 3]
    for name, first in start.items():
        ema = first.double()
        for state in found:
            ema = 0.6 * ema + 0.4 * state[name].double()
        tail = torch.stack([state[name].double() for state in found[3:]]).mean(0)
        # Float32 weights, of some size 1: a rounding of 1e-7 a step.
        assert float((averages["ema"][name] - ema).abs().max()) < 1e-6, name
        assert float((averages["tail"][name] - tail).abs().max()) < 1e-6, name


def test_the_loss_that_is_reported_is_that_of_the_folder(world: tuple[Run, Path]) -> None:
    """Each average trained at rate 0 has the loss that was said of it; the training itself is not touched by averaging."""
    run, folder = world
    plain = train(run, settings(folder, "plain"))
    summary = train(run, settings(folder, "said", ema_decay=0.6, average_tail=0.5))
    assert summary["eval_loss"] == plain["eval_loss"]
    for name, about in summary["averages"].items():
        again = train(run, settings(Path(run.path(about["model"])), f"again-{name}", lr=0.0, steps=1))
        assert again["initial_eval_loss"] == about["eval_loss"] != summary["eval_loss"]
    listed = {part.path for part in run.manifest("train", "said").parts}
    assert all(f"{about['model']}/model.safetensors" in listed for about in summary["averages"].values())


@pytest.mark.parametrize("changes", [{}, {"lora": 2}, {"token_budget": 250}])
def test_resume_gives_the_same_bytes(tmp_path: Path, changes: dict[str, Any]) -> None:
    run, folder = make_run(tmp_path)
    found = []
    for stop in (None, 1, 3, 5):
        chosen = settings(folder, "t", checkpoint_every=2, ema_decay=0.6, average_tail=0.5, **changes)
        if stop:
            with pytest.raises(Stop):
                train(run, chosen, stopping(stop))
        train(run, chosen)
        found.append(results(run, "t"))
        for path in ("trainings/t", "stages/train/t.json"):
            Path(run.path(path)).rename(tmp_path / f"{Path(path).name}-{stop}")
    assert any("/ema/" in name for name in found[0]) and any("/tail/" in name for name in found[0])
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert [name for name in other if other[name] != found[0][name]] == []


def test_a_tail_shorter_than_a_step_is_the_last_step(world: tuple[Run, Path]) -> None:
    run, folder = world
    summary = train(run, settings(folder, "short", average_tail=0.01))
    assert summary["averages"]["tail"] == {
        "steps": 1,
        "eval_loss": summary["eval_loss"],
        "model": f"{summary['checkpoint']}/tail",
    }


def test_no_loss_is_taken_where_none_was_asked_for(world: tuple[Run, Path]) -> None:
    run, folder = world
    summary = train(run, settings(folder, "unsaid", ema_decay=0.5, evaluate="never"))
    assert summary["averages"]["ema"]["eval_loss"] is None


def test_merged_beside_the_final_checkpoint(world: tuple[Run, Path]) -> None:
    """The merged model has the loss of the training; execution, so that the spec is as without."""
    run, folder = world
    summary = train(run, settings(folder, "merged", lora=2, merge=True, checkpoint_every=2))
    assert "merge" not in run.manifest("train", "merged").spec
    again = train(run, settings(Path(run.path(summary["merged"])), "from-merged", lr=0.0, steps=1))
    assert again["initial_eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert not Path(run.path(summary["checkpoint"])).with_name("step-00000004").joinpath("merged").exists()
    with pytest.raises(InputError, match="merge needs an adapter"):
        train(run, settings(folder, "x", merge=True))
