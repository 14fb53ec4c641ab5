"""What a training shows: on the console, in TensorBoard, in the journal, and in loggers of other people's packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lehr.cli import EXIT_ERROR, main
from schemas import plugins
from schemas.errors import InputError
from schemas.run import Run
from selection_ops.flops import MapsSize, ModelSize, model_size
from tests.tiny import tiny_llama
from tests.trainer.streams import make_run
from tests.trainer.test_loop import Stop, journal, results, settings, stopping
from trainer.loggers import Begun, Progress, base, get_logger, logger, logger_names
from trainer.loggers.console import Figures
from trainer.loop import train
from trainer.measures import measured_peak, peak_memory, step_flops

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("loggers"))


def scalars(run: Run, name: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run.path(f"{run.timings_folder('train', name)}/tensorboard")
    found = EventAccumulator(folder, size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_shows_the_journal_once_also_after_a_stop(world: tuple[Run, Path]) -> None:
    run, folder = world
    chosen = settings(
        folder, "board", policy="filter-then-weight", checkpoint_every=2, loggers=("tensorboard",), eval_every=2
    )
    with pytest.raises(Stop):
        train(run, chosen, stopping(5))
    assert [step for step, _ in scalars(run, "board")["steps/loss"]] == [1, 2, 3, 4, 5]
    train(run, chosen)
    found = scalars(run, "board")
    for table in ("steps", "timings"):
        for name in journal(run, "board", table)[0]:
            rows = [(r["step"], r[name]) for r in journal(run, "board", table) if isinstance(r[name], int | float)]
            if name in ("step", "process") or not rows:
                assert f"{table}/{name}" not in found
                continue
            shown = found[f"{table}/{name}"]
            assert [step for step, _ in shown] == [step for step, _ in rows], name
            assert [value for _, value in shown] == pytest.approx([value for _, value in rows], rel=1e-6), name


def test_loggers_change_nothing_that_is_compared(world: tuple[Run, Path]) -> None:
    run, folder = world
    plain = settings(folder, "quiet", checkpoint_every=3)
    train(run, plain)
    before = results(run, "quiet")
    other, again = make_run(Path(run.url).parent / "again")
    train(other, settings(again, "quiet", checkpoint_every=3, loggers=("tensorboard", "console"), peak_flops=1e9))
    assert results(other, "quiet") == before


def test_tensorboard_without_the_package_names_the_extra(
    world: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = world
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "trainer.loggers.tensorboard", raising=False)
    monkeypatch.delitem(base._REGISTRY, "tensorboard", raising=False)
    with pytest.raises(InputError, match=r"pip install 'lehr\[tensorboard\]'"):
        train(run, settings(folder, "missing", loggers=("tensorboard",)))
    assert not Path(run.path(run.training_folder("missing"))).exists()


def test_an_unknown_logger_lists_the_known_ones(world: tuple[Run, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, model = world
    assert main(["train", run.url, "--model", str(model), "--loggers", "wall"]) == EXIT_ERROR
    assert "unknown logger 'wall': choose among console, tensorboard" in capsys.readouterr().err


def test_a_logger_is_told_once_of_every_step_and_closed(
    world: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = world
    heard: list[Any] = []

    @logger("mine")
    class Mine:
        def __init__(self, begun: Begun) -> None:
            heard.append(begun)

        def step(self, event: Progress) -> None:
            heard.append(event.step)

        def close(self) -> None:
            heard.append("closed")

    try:
        chosen = settings(folder, "told", checkpoint_every=2, loggers=("mine",), policy="filter-then-weight")
        with pytest.raises(Stop):
            train(run, chosen, stopping(3))
        train(run, chosen)
        train(run, chosen)  # has finished: nothing begins
        assert "mine" in logger_names()
    finally:
        del base._REGISTRY["mine"]
    assert [h for h in heard if not isinstance(h, Begun)] == [1, 2, 3, "closed", 3, 4, 5, 6, "closed"]
    first, second = (h for h in heard if isinstance(h, Begun))
    assert (first.steps_done, second.steps_done) == (0, 2)
    assert "at most 4 of 8 offered" in first.choices["policy"] and first.choices["mode"].startswith("two-pass (asked")


def documented() -> str:
    """The example of the documentation."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "@logger" in block)


def with_package(folder: Path, code: str, run: Run, model: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """`python -m trainer --loggers ...` where a package `my-loggers` is installed below `folder`."""
    (folder / "my_loggers.py").write_text(code)
    metadata = folder / "my_loggers-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-loggers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lehr.loggers]\npaper = my_loggers\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer", run.url, "--model", str(model), "--policy", "full", "--name", "plugged"]
    return subprocess.run(
        [*command, "--candidates", "16", "--loggers", *names], env=environment, cwd=folder, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_a_logger_of_an_installed_package_is_found(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, model = world
    done = with_package(tmp_path, documented(), run, model, "paper", "console")
    assert done.returncode == 0, done.stderr
    steps = journal(run, "plugged")
    expected = [f"{row['step']} {row['loss']:.4f}" for row in steps]
    assert (tmp_path / "plugged.txt").read_text().splitlines() == expected
    assert len(re.findall(r"^step \d", done.stdout, re.MULTILINE)) == len(steps) == 3


def test_a_package_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value, dist = "paper", "my_loggers", None

        def load(self) -> None:
            raise ModuleNotFoundError("no module named wall")

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point()])
    plugins.load_installed.cache_clear()
    with pytest.raises(InputError, match=r"logger 'paper' \(my_loggers\) of an installed package cannot be loaded"):
        get_logger("paper")
    plugins.load_installed.cache_clear()


# Measures.


def test_flops_of_a_step_by_mode() -> None:
    size = ModelSize(parameters=100, trained_parameters=60, attention=2)
    given: dict[str, Any] = {"offered": [3, 4, 5], "kept": [4], "target": [6]}
    plain = step_flops(size, mode="plain", sketched_target=False, **given)
    assert (plain.total, plain.selection) == (size.trained([4]), 0)
    two = step_flops(size, mode="two-pass", sketched_target=False, **given)
    assert two.total == size.trained([6]) + size.scored([3, 4, 5]) + size.trained([4])
    assert two.selection == two.total - plain.total
    one = step_flops(size, mode="one-pass", sketched_target=True, **given)
    assert one.total == size.scored([6]) + size.scored([3, 4, 5]) + size.formed([4])
    assert size.trained([4]) == size.scored([4]) + size.formed([4])
    assert one.selection == pytest.approx(size.scored([6]) + size.scored([3, 5]))
    other = ModelSize(parameters=7, trained_parameters=0, attention=1)
    measured = step_flops(size, mode="plain", measured=given["offered"], reference=other, **given)
    assert measured.selection == size.forward([3, 4, 5]) + other.forward([3, 4, 5])
    assert measured.total == plain.total + measured.selection
    maps = MapsSize(entries=50)
    assert step_flops(size, mode="two-pass", maps=maps, **given) == two
    aligned = step_flops(size, mode="two-pass", maps=maps, exact_alignment=True, **given)
    assert aligned.total - two.total == aligned.selection - two.selection == 2 * 50 * (3 + 4 + 5)
    formed = step_flops(size, mode="two-pass", maps=maps, formed=True, **given)
    assert formed.selection - two.selection == 2 * 50 * (3 + 4 + 5)
    exact = step_flops(size, mode="two-pass", maps=maps, exact_gram=[3, 5], **given)
    assert exact.selection - two.selection == 2 * 50 * (3 + 5) + 2 * 50 * 2 * 2
    norms = step_flops(size, mode="two-pass", offered=[3, 4, 5], kept=[4])
    assert norms.selection == size.scored([3, 4, 5])


@pytest.mark.parametrize("policy,passes", [("loss", "forward"), ("grad-norm", "scored")])
def test_selection_flops_of_policies_without_a_target(world: tuple[Run, Path], policy: str, passes: str) -> None:
    run, folder = world
    train(run, settings(folder, f"flops-{policy}", policy=policy, precondition="rank-one", steps=1))
    (row,) = journal(run, f"flops-{policy}", "timings")
    lengths = [d["tokens"] for d in journal(run, f"flops-{policy}", "decisions")]
    assert row["selection_flops"] == pytest.approx(getattr(model_size(tiny_llama()), passes)(lengths))


def test_the_journal_holds_flops_utilisation_and_memory(world: tuple[Run, Path]) -> None:
    run, folder = world
    chosen = settings(folder, "measured", policy="filter-then-weight", eval_every=1, peak_flops=2e9, target_batch=2)
    train(run, chosen)
    size = model_size(tiny_llama())
    decisions = journal(run, "measured", "decisions")
    for row, step in zip(journal(run, "measured", "timings"), journal(run, "measured")):
        mine = [d for d in decisions if d["step"] == step["step"]]
        scored = size.scored(d["tokens"] for d in mine)
        trained = size.trained(d["tokens"] for d in mine if d["kept"])
        assert row["flops"] - row["selection_flops"] == pytest.approx(trained)
        assert row["selection_flops"] > scored
        busy = row["seconds"] - row["evaluation_seconds"]
        assert row["mfu"] == pytest.approx(row["flops"] / busy / 2e9)
        assert 0 < row["evaluation_seconds"] < row["seconds"]
        assert 50_000_000 < row["peak_memory"] < 60_000_000_000


def test_the_peak_is_what_a_product_reaches() -> None:
    peak = measured_peak("cpu", "float32")
    assert 1e8 < peak < 1e14
    assert measured_peak("cpu", "float32") == peak
    assert peak_memory(torch.device("cpu")) > 50_000_000


def test_the_line_of_figures_says_how_long_it_will_take() -> None:
    figures = Figures()
    row = {
        "step": 1, "loss": 2.0, "eval_loss": 1.5, "learning_rate": 1e-3, "kept": 4, "offered": 8, "trained_tokens": 100,
        "total_trained_tokens": 100,
    }  # fmt: skip
    timing = {
        "seconds": 3.0, "evaluation_seconds": 1.0, "selection_seconds": 1.5, "mfu": 0.31, "peak_memory": 2_500_000_000,
    }  # fmt: skip
    first = figures.line(Progress(share=0.1, row=row, timing=timing))
    assert first == (
        "step 1 (10%): loss 2.0000, held-out 1.5000, lr 1.00e-03, kept 50%, 100 tokens, 3.00 s (50% selecting), "
        "50 tokens/s, MFU 31%, peak 2.50 GB"
    )
    later = figures.line(Progress(share=0.2, row={**row, "step": 2, "eval_loss": None}, timing=timing))
    assert "held-out 1.5000" in later and later.endswith(", 24 s left")
