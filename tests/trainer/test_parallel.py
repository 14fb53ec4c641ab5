"""Data parallel training in real processes over gloo: the same decisions as in one process, and nothing that hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import journal, weights
from tests.trainer.together import Group
from trainer.__main__ import main

EXACT = {"step", "policy", "metric", "mode", "offered", "kept", "offered_tokens", "trained_tokens", "fallback"}
"""Columns of the journal's steps that do not depend on rounding."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """51 samples: the last step offers three, fewer than the four processes of some tests."""
    return make_run(tmp_path_factory.mktemp("parallel"), samples=51)


def arguments(run: Run, model: Path, name: str, **options: Any) -> list[str]:
    chosen = {
        "model": model, "name": name, "policy": "filter-then-weight", "candidates": 8, "n-keep": 4, "lr": 0.01, "dtype": "float64",
        "proj-rank": 4, "warmup-select": 2, "checkpoint-every": 3, "eval-every": 5, "process-timeout": 60,
        **{key.replace("_", "-"): value for key, value in options.items()},
    }  # fmt: skip
    return [run.url, *(word for key, value in chosen.items() for word in (f"--{key}", str(value)))]


def together(count: int, world: tuple[Run, Path], folder: Path, name: str, **options: Any) -> Group:
    group = Group(count, arguments(*world, name, **options), folder)
    codes = group.wait()
    assert codes == [0] * count, [group.output(index)[-3000:] for index in range(count)]
    return group


def close(found: Any, wanted: Any, tolerance: float) -> bool:
    if isinstance(wanted, float) and isinstance(found, float):
        return found == pytest.approx(wanted, rel=tolerance, abs=tolerance)
    return bool(found == wanted)


def assert_same_training(run: Run, one: str, other: str, *, tolerance: float) -> None:
    """The same rows, places and decisions; numbers to a tolerance. Padding depends on who computes what beside what."""
    for table in ("steps", "decisions"):
        wanted, found = journal(run, one, table), journal(run, other, table)
        assert len(found) == len(wanted)
        for row, true in zip(found, wanted):
            for column, value in true.items():
                if column == "padding_share":
                    continue
                exact = column in EXACT or isinstance(value, int | str | bool | None)
                assert close(row[column], value, 0.0 if exact else tolerance), (table, column, row[column], value)
    first, second = run.manifest("train", one), run.manifest("train", other)
    assert first.spec == second.spec
    assert first.summary["steps"] == second.summary["steps"]
    a, b = weights(run, one, first.summary["steps"]), weights(run, other, first.summary["steps"])
    assert all(float((a[name] - b[name]).norm() / a[name].norm().clamp_min(1e-30)) < 10 * tolerance for name in a)


@pytest.mark.parametrize(
    "count,options",
    [
        (2, {}),
        (4, {}),
        (2, {"policy": "full", "batch-tokens": 20}),
        (2, {"policy": "random", "token-budget": 150, "epochs": 4}),
        (4, {"mode": "one-pass", "precondition": "rank-one"}),
        pytest.param(2, {"mode": "one-pass", "precondition": "rank-one"}, marks=pytest.mark.slow),
        pytest.param(4, {"precondition": "rank-one", "target-batch": 2}, marks=pytest.mark.slow),
        pytest.param(3, {"dtype": "float32", "policy": "full"}, marks=pytest.mark.slow),
    ],
)
def test_several_processes_decide_and_train_as_one(
    world: tuple[Run, Path], tmp_path: Path, count: int, options: dict[str, Any]
) -> None:
    """float64: sums over processes are other sums of the same numbers. AdamW's first steps divide by gradients that are next to nothing."""
    run = world[0]
    name = "-".join(["several", *map(str, options.values())])
    if not (Path(run.path(run.manifest_path("train", name)))).exists():
        assert main(arguments(*world, name, **options)) == 0
    together(count, world, tmp_path, f"{name}-{count}", **options)
    tolerance = 1e-4 if "float32" in options.values() else 1e-8
    assert_same_training(run, name, f"{name}-{count}", tolerance=tolerance)
