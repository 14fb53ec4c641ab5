"""Soups: the mean of final weights, its loss, its folder, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lehr.cli import main
from schemas.errors import CorruptFile, InputError, LehrError
from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import settings, weights
from trainer.loop import train
from trainer.settings import SoupSettings
from trainer.soup import average_trainings


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Three data orders of one training."""
    run, folder = make_run(tmp_path_factory.mktemp("soup"), samples=24)
    for seed in range(3):
        train(run, settings(folder, f"seed-{seed}", seed=seed))
    return run, folder


NAMES = ["seed-0", "seed-1", "seed-2"]


def soup(tmp_path: Path, **changes: object) -> SoupSettings:
    return SoupSettings(out=str(tmp_path / "soup"), dtype="float32", **changes)  # type: ignore[arg-type]


def test_the_mean_of_the_final_weights(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = world
    found = average_trainings(run, NAMES, soup(tmp_path))
    members = [weights(run, name, 3) for name in NAMES]
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "soup").state_dict().items():
        true = torch.stack([member[name].double() for member in members]).mean(0)
        assert torch.equal(value, true.float()), name
    assert found.members == {name: run.manifest("train", name).summary["eval_loss"] for name in NAMES}
    assert found.loss not in found.members.values()


def test_its_loss_is_that_of_the_folder_and_its_record_says_what_it_is(
    world: tuple[Run, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = world
    out = tmp_path / "soup"
    assert main(["average", run.url, *NAMES, "--out", str(out), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    record = json.loads((out / "average.json").read_bytes())
    assert all(name in said for name in NAMES) and f"{record['eval_loss']:.4f}" in said
    assert record["trainings"] == {name: run.manifest("train", name).fingerprint for name in NAMES}
    assert {file["path"] for file in record["files"]} == {path.name for path in out.iterdir()} - {"average.json"}
    again = train(run, settings(out, "from-soup", lr=0.0, steps=1))
    assert again["initial_eval_loss"] == record["eval_loss"]


def test_the_held_out_set_may_be_that_of_another_stream(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = world
    other, _ = make_run(tmp_path / "other", samples=8, evaluation=3)
    found = average_trainings(run, NAMES[:2], soup(tmp_path, stream=other.path("streams/match/gen-000001")))
    assert found.members["seed-0"] != run.manifest("train", "seed-0").summary["eval_loss"]


def test_what_cannot_be_averaged_is_refused(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = world
    for names in ([], ["seed-0"], ["seed-0", "seed-0"]):
        with pytest.raises(InputError, match="at least two different trainings"):
            average_trainings(run, names, soup(tmp_path))
    with pytest.raises(InputError, match="say with --out"):
        average_trainings(run, NAMES, SoupSettings())
    with pytest.raises(InputError, match=r"nobody\.json does not exist"):
        average_trainings(run, ["seed-0", "nobody"], soup(tmp_path))
    with pytest.raises(InputError, match="holds something already"):
        average_trainings(run, NAMES, SoupSettings(out=str(folder)))
    train(run, settings(folder, "adapter", lora=2, steps=1))
    with pytest.raises(InputError, match=r"'adapter' trained an adapter.*--merge"):
        average_trainings(run, ["seed-0", "adapter"], soup(tmp_path))
    assert not (tmp_path / "soup").exists()


def test_another_model_does_not_fit(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = world
    other, wide = make_run(tmp_path / "other", samples=8, kind="qwen2")
    train(other, settings(wide, "wide"))
    for place in ("trainings/wide", "stages/train/wide.json"):
        Path(other.path(place)).rename(run.path(place))
    with pytest.raises(LehrError, match="weights do not fit the model"):
        average_trainings(run, ["seed-0", "wide"], soup(tmp_path))
    (Path(run.path(run.manifest("train", "wide").summary["checkpoint"])) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFile, match="differs from the manifest"):
        average_trainings(run, ["seed-0", "wide"], soup(tmp_path))
