"""The two ways to start a training: `lehr train` and `python -m trainer`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lehr.cli import EXIT_ERROR, main
from schemas.run import Run
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainer.streams import make_run
from trainer.__main__ import main as module_main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("command"), samples=16)


def arguments(run: Run, model: Path, name: str) -> list[str]:
    return [run.url, "--model", str(model), "--name", name, "--candidates", "8", "--n-keep", "4", "--dtype", "float32"]


def test_both_commands_train_the_same(world: tuple[Run, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, model = world
    assert main(["train", *arguments(run, model, "verb")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "steps 2" in printed
    assert "held-out loss" in printed
    assert "lehr report" in printed
    assert module_main(arguments(run, model, "module")) == 0
    printed = capsys.readouterr().out
    assert "step 1 (50%): loss " in printed
    assert "done: 2 steps" in printed
    verb, module = run.manifest("train", "verb"), run.manifest("train", "module")
    assert verb.spec == module.spec
    assert verb.summary["eval_loss"] == module.summary["eval_loss"]


def test_the_name_is_that_of_stream_and_policy_by_default(world: tuple[Run, Path]) -> None:
    run, model = world
    assert main(["train", run.url, "--model", str(model), "--policy", "full", "--steps", "1"]) == 0
    assert run.manifest("train", "match-full").summary["steps"] == 1


def test_errors_are_one_line_with_status_2(world: tuple[Run, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, model = world
    chosen = [*arguments(run, model, "x"), "--stream", "nothing"]
    assert main(["train", *chosen]) == EXIT_ERROR
    said = capsys.readouterr().err
    assert "has no finished stream 'nothing'" in said
    assert "Traceback" not in said
    assert module_main(chosen) == 2
    assert capsys.readouterr().err.startswith("trainer: ")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_torchrun_trains_in_any_number_of_processes(world: tuple[Run, Path], count: int) -> None:
    """Real processes of torchrun: what one says, once, and the loss of a training in one process."""
    run, model = world
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "trainer"]
    chosen = arguments(run, model, f"torchrun-{count}")
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 1 (50%)") == done.stdout.count("done: 2 steps") == 1
    assert module_main(arguments(run, model, f"alone-{count}")) == 0
    alone = run.manifest("train", f"alone-{count}")
    found = run.manifest("train", f"torchrun-{count}")
    assert found.spec == alone.spec
    assert found.summary["trained_tokens"] == alone.summary["trained_tokens"]
    assert found.summary["eval_loss"] == pytest.approx(alone.summary["eval_loss"], rel=1e-5)


def test_the_loop_of_the_documentation_runs(world: tuple[Run, Path]) -> None:
    """The example of docs/training.md, as it stands there."""
    text = (ROOT / "docs" / "training.md").read_text()
    code = next(block.split("```")[0] for block in text.split("```python\n")[1:] if "def fine_tune" in block)
    place: dict[str, Any] = {}
    exec(compile(code, "docs/training.md", "exec"), place)
    run, _ = world
    losses = place["fine_tune"](
        tiny_llama().requires_grad_(True), tiny_tokenizer(), run.path("streams/match/gen-000001")
    )
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
