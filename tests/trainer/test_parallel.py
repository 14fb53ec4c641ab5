"""Data parallel training in real processes over gloo: the same decisions as in one process, and nothing that hangs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import journal, results, weights
from tests.trainer.together import Group
from trainer.__main__ import main
from trainer.parallel import OneProcess, join_processes

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
        (2, {"mode": "two-pass"}),
        (4, {"mode": "two-pass"}),
        (2, {"policy": "full", "batch-tokens": 20}),
        (2, {"policy": "random", "token-budget": 150, "epochs": 4}),
        (4, {"mode": "one-pass", "precondition": "rank-one"}),
        (2, {"policy": "loss", "oracle-every": 2}),
        pytest.param(2, {"target-mode": "ema", "target-refresh": 2, "targets": "max"}, marks=pytest.mark.slow),
        pytest.param(2, {"policy": "less-online"}, marks=pytest.mark.slow),
        pytest.param(2, {"granularity": "token-mask", "alignment": "exact"}, marks=pytest.mark.slow),
        pytest.param(3, {"granularity": "token-mean", "mode": "one-pass"}, marks=pytest.mark.slow),
        pytest.param(2, {"policy": "grad-norm", "oracle-every": 3}, marks=pytest.mark.slow),
        pytest.param(4, {"policy": "match", "oracle-every": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"mode": "one-pass", "precondition": "rank-one"}, marks=pytest.mark.slow),
        pytest.param(4, {"mode": "two-pass", "precondition": "rank-one", "target-batch": 2}, marks=pytest.mark.slow),
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


def test_timings_hold_a_row_of_every_process(world: tuple[Run, Path], tmp_path: Path) -> None:
    together(3, world, tmp_path, "timed", policy="full")
    rows = journal(world[0], "timed", "timings")
    assert [(row["step"], row["process"]) for row in rows] == [(step, p) for step in range(1, 8) for p in range(3)]
    assert all(row["seconds"] > 0 and row["host"] for row in rows)
    assert [row["step"] for row in journal(world[0], "timed")] == list(range(1, 8))
    assert len(list((tmp_path / "process-1.log").read_text())) == 0  # process 0 speaks for all


KILLED: dict[str, Any] = {
    "epochs": 3,
    "checkpoint-every": 3,
    "dtype": "float32",
    "candidates": 7,
    "process-timeout": 60,
}


def start_and_kill(
    world: tuple[Run, Path], folder: Path, *, count: int, victim: int, after: int, **options: Any
) -> Group:
    """Start `count` processes and kill one after some steps; the others have to end by themselves."""
    group = Group(count, arguments(*world, "t", **(options or KILLED)), folder)
    end = time.monotonic() + 60
    while group.steps() < after:
        assert time.monotonic() < end, group.output(0)
        time.sleep(0.005)
    group.kill(victim)
    return group


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_invariant_7_a_killed_process_ends_all_and_the_same_number_resumes_bitwise(tmp_path: Path, victim: int) -> None:
    whole, place = make_run(tmp_path / "whole", samples=49), make_run(tmp_path / "killed", samples=49)
    together(2, whole, tmp_path / "logs", "t", **KILLED)
    group = start_and_kill(place, tmp_path / "first", count=2, victim=victim, after=8)
    begun = time.monotonic()
    codes = group.wait(30)
    assert time.monotonic() - begun < 10
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 2
    said = group.output(1 - victim)
    assert "lost the others: one of them ended" in said
    assert "Run the same command again" in said
    assert "Traceback" not in said
    assert not Path(place[0].path(place[0].manifest_path("train", "t"))).exists()
    resumed = together(2, place, tmp_path / "second", "t", **KILLED)
    assert "\nstep 1 " not in resumed.output(0)
    expected, found = results(whole[0], "t"), results(place[0], "t")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_invariant_7_another_number_of_processes_is_offered_the_same_candidates_in_the_same_steps(
    tmp_path: Path,
) -> None:
    whole = make_run(tmp_path / "whole", samples=49)
    assert main(arguments(*whole, "t", **KILLED)) == 0
    place = make_run(tmp_path / "killed", samples=49)
    group = start_and_kill(place, tmp_path / "first", count=3, victim=2, after=5)
    assert group.wait(30)[2] == -signal.SIGKILL
    group = start_and_kill(place, tmp_path / "second", count=1, victim=0, after=5)
    assert group.wait(30) == [-signal.SIGKILL]
    resumed = together(2, place, tmp_path / "third", "t", **KILLED)
    assert "\nstep 1 " not in resumed.output(0)
    wanted, found = journal(whole[0], "t", "decisions"), journal(place[0], "t", "decisions")
    for column in ("step", "position", "sample_id", "rank"):
        assert [row[column] for row in found] == [row[column] for row in wanted]
    losses = [row["loss"] for row in journal(whole[0], "t")]
    assert [row["loss"] for row in journal(place[0], "t")] == pytest.approx(losses, rel=0.05)


def test_a_process_with_other_settings_ends_all(world: tuple[Run, Path], tmp_path: Path) -> None:
    """The first process has declared the spec; the second's differs from it."""
    one, other = (arguments(*world, "differing", policy="full", seed=seed) for seed in (0, 1))
    group = Group(2, one, tmp_path, last=other)
    assert group.wait(30) == [2, 2]
    assert "'differing' exists with another spec: seed was 0 and is now 1" in group.output(1)
    assert "lost the others" in group.output(0)


def test_an_error_of_process_0_is_told_by_all(tmp_path: Path) -> None:
    """Its checkpoint cannot be written: a file stands where the folder has to be."""
    run, model = make_run(tmp_path, samples=16)
    folder = Path(run.path(run.training_folder("blocked")))
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("in the way")
    group = Group(2, arguments(run, model, "blocked", policy="full"), tmp_path / "logs")
    assert group.wait(60) == [2, 2]
    assert "trainer: cannot write" in group.output(0)
    assert "trainer, process 1 of 2: process 0: cannot write" in group.output(1)


def test_a_gradient_that_is_not_finite_is_named_by_every_process(world: tuple[Run, Path], tmp_path: Path) -> None:
    group = Group(2, arguments(*world, "exploding", policy="full", lr=1e30, clip=0, dtype="float32"), tmp_path)
    assert group.wait(60) == [2, 2]
    for index in range(2):
        assert "is not finite; nothing was updated. Samples: " in group.output(
            index
        ) or "lost the others" in group.output(index)
    assert any("is not finite" in group.output(index) for index in range(2))


def exchange(arguments: list[str]) -> int:
    """What a process does in the test below."""
    processes = join_processes("cpu", 30)
    index = processes.index
    assert processes.every([index, "x"]) == [[0, "x"], [1, "x"], [2, "x"]]
    assert processes.sum(torch.tensor([float(index), 1.0])).tolist() == [3.0, 3.0]
    assert processes.decide(lambda: (index, torch.tensor([0.1], dtype=torch.float64), None)) == (0, 0.1, None)
    same, other, count = torch.arange(5.0), torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5], dtype=torch.float64)
    assert not processes.align([same, other, count])
    if index == 2:
        other[1] += 2.0**-22  # the last bit
    assert processes.align([same, other, count])
    assert other.tolist() == [1.0, 2.0]
    # Only one has a gradient for the first, none for the last; buckets are cut at whole tensors.
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 9 << 20, 2, 4)]
    for number, parameter in enumerate(parameters[:3]):
        if number or index == 1:
            parameter.grad = torch.full_like(parameter, float(index + 1))
    processes.sum_gradients(parameters)
    assert [None if p.grad is None else p.grad[-1].item() for p in parameters] == [2.0, 6.0, 6.0, None]
    processes.close()
    return 0


def test_exchanges(tmp_path: Path) -> None:
    group = Group(3, [], tmp_path, run=exchange)
    assert group.wait(60) == [0, 0, 0], [group.output(index) for index in range(3)]


def drifting(arguments: list[str]) -> int:
    """A training whose second process rounds otherwise."""
    if os.environ["RANK"] == "1":
        step = torch.optim.AdamW.step

        def rounded(self: Any, closure: Any = None) -> Any:
            found = step(self, closure)
            for group in self.param_groups:
                group["params"][0].data[0].mul_(1 + 1e-6)
            return found

        torch.optim.AdamW.step = rounded  # type: ignore[method-assign]
    return main(arguments)


def test_processes_that_drift_apart_go_on_from_process_0(world: tuple[Run, Path], tmp_path: Path) -> None:
    group = Group(2, arguments(*world, "drifting", policy="full", steps=5), tmp_path, run=drifting)
    assert group.wait(60) == [0, 0], group.output(0)
    assert group.output(0).count("no longer held the same weights") == 2  # at both checkpoints
    assert group.output(0).count("step 3: the processes") == 1


def test_shares_are_whole_and_balanced() -> None:
    class Three(OneProcess):
        count = 3

    costs = [7, 1, 1, 9, 4, 4, 2, 8, 3, 3]
    shares = Three().shares(costs)
    assert sorted(place for share in shares for place in share) == list(range(10))
    sums = [sum(costs[place] for place in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs) / 3
    assert Three().shares([5]) == [[0], [], []]
    assert OneProcess().shares(costs) == [list(range(10))]
