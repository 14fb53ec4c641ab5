"""SIGKILL from outside to other OS processes: the same command again gives the bytes of an undisturbed run."""

from __future__ import annotations

import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.select import run_select
from schemas.run import Run
from schemas.storage import TEMPORARY_PREFIX
from schemas.units import read_plan
from selection_ops.selectors import Budget, SelectorSettings
from tests.killing import finish, kill_unfinished, session, start_module, until
from tests.pipelines.worlds import SCORING, World, make_world, tree_hashes

pytestmark = pytest.mark.slow

Starter = Callable[[Path], "subprocess.Popen[bytes]"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, the run it starts from, and how an undisturbed run of it went."""

    name: str
    start: Starter
    manifest: str
    """The file that says the stage is finished."""
    begun: str
    """A folder that holds files as soon as the first result stands."""
    before: Path
    """Run directory before the stage."""
    expected: dict[str, str]
    first_s: float
    """Seconds until the first result stood."""
    last_s: float
    """Seconds until the manifest stood."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A corpus of 2,000 rows in some hundred units, one file of it damaged in places; nothing scored yet."""
    world = make_world(tmp_path_factory.mktemp("world"), rows=1000, unit_tokens=800)
    assert len(read_plan(world.run).units) > 50
    return world


def options(world: World) -> tuple[str, ...]:
    given = dataclasses.replace(SCORING, model=str(world.model))
    return tuple(
        part
        for field, value in dataclasses.asdict(given).items()
        if value is not None
        for part in (f"--{field.replace('_', '-')}", str(value))
    )


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def starter(*arguments: str) -> Starter:
    """Starts `lehr VERB RUN OPTIONS` on a run directory."""
    verb, *rest = arguments

    def start(run: Path) -> subprocess.Popen[bytes]:
        return start_module("lehr", verb, str(run), *rest, log=log_of(run))

    return start


def files(folder: Path) -> list[Path]:
    """What stands in a folder, without what is still being written."""
    return [path for path in folder.glob("*") if not path.name.startswith(TEMPORARY_PREFIX)]


def undisturbed(name: str, start: Starter, manifest: str, begun: str, before: Path) -> Stage:
    """Run the stage once on a copy of the run directory `before`."""
    run = before.with_name(f"whole-{name}")
    shutil.copytree(before, run)
    began = time.monotonic()
    process = start(run)
    until(lambda: files(run / begun) or process.poll() is not None, 300, "a first result stands")
    first = time.monotonic()
    until(lambda: (run / manifest).exists() or process.poll() is not None, 300, "the manifest stands")
    last = time.monotonic()
    finish(process, log_of(run))
    return Stage(name, start, manifest, begun, before, tree_hashes(run), first - began, last - began)


@pytest.fixture(scope="module")
def describing(world: World) -> Stage:
    start = starter(
        "target", "--data", str(world.target), "--eval", str(world.evaluation), "--workers", "1", *options(world)
    )
    chunks = "targets/target/base/chunks"
    return undisturbed("target", start, "stages/target/target.base.json", chunks, world.folder / "run")


@pytest.fixture(scope="module")
def scoring(world: World, describing: Stage) -> Stage:
    before = describing.before.with_name("whole-target")
    start = starter("score", "--workers", "1")
    return undisturbed("score", start, "stages/score/base.json", "features/base", before)


@pytest.fixture(scope="module")
def scoring_by_two(scoring: Stage) -> Stage:
    start = starter("score", "--workers", "2")
    stage = undisturbed("score-2", start, scoring.manifest, scoring.begun, scoring.before)
    assert stage.expected == scoring.expected
    return stage


@pytest.fixture(scope="module")
def keeping(scoring: Stage) -> Stage:
    """Without sketches: features are written last, and curvature columns from what only the process holds."""
    start = starter("score", "--workers", "1", "--keep", "scalars")
    stage = undisturbed("score-scalars", start, scoring.manifest, scoring.begun, scoring.before)
    assert stage.expected.keys() - scoring.expected.keys() == {"stages/keep/base.json"}
    return stage


@pytest.fixture(scope="module")
def exporting(world: World, scoring: Stage) -> Stage:
    before = scoring.before.with_name("whole-score")
    run = Run.open(str(before))
    settings = SelectorSettings(selector="target-cosine", two_fold=False, bound=False)
    run_select(run, "s", "base", "target", Budget(samples=600), settings)
    start = starter("export", "--selection", "s", "--shard-samples", "10")
    return undisturbed("export", start, "stages/export/s.gen-000001.json", "streams/s/gen-000001", before)


def killed_at_random(stage: Stage, folder: Path, seed: int) -> tuple[Path, subprocess.Popen[bytes]]:
    """A run directory whose stage was killed, and the process. Two of three times after the first result stood: most of a
    short run is spent on imports, and killing those tests little."""
    rng = random.Random(seed)

    def prepare(number: int) -> Path:
        run = folder / f"attempt-{number}"
        shutil.copytree(stage.before, run)
        return run

    def wait(process: subprocess.Popen[bytes], run: Path, number: int) -> None:
        if seed % 3 == 0:
            time.sleep(rng.uniform(0, stage.first_s))
            return
        while process.poll() is None and not files(run / stage.begun):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, stage.last_s - stage.first_s))

    return kill_unfinished(prepare, stage.start, wait, lambda run: (run / stage.manifest).exists())


def check_finished(stage: Stage, run: Path) -> None:
    """The bytes of an undisturbed run, and nothing else but what a killed process was writing, which no manifest lists."""
    for unfinished in run.rglob(f"{TEMPORARY_PREFIX}*"):
        assert unfinished.name not in (run / stage.manifest).read_text()
        unfinished.unlink()
    assert tree_hashes(run) == stage.expected


def check_resumes(stage: Stage, run: Path) -> None:
    """The same command again gives the same bytes and keeps what stood."""
    kept = {path: path.stat().st_mtime_ns for path in files(run / stage.begun)}
    finish(stage.start(run), log_of(run))
    check_finished(stage, run)
    if stage.name.startswith(("score", "target")):
        assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize("seed", range(1, 3))
def test_invariant_5_target_killed_at_any_time(describing: Stage, tmp_path: Path, seed: int) -> None:
    check_resumes(describing, killed_at_random(describing, tmp_path, seed)[0])


@pytest.mark.parametrize("seed", range(3))
def test_invariant_5_score_killed_at_any_time(scoring: Stage, tmp_path: Path, seed: int) -> None:
    check_resumes(scoring, killed_at_random(scoring, tmp_path, seed)[0])


@pytest.mark.parametrize("seed", range(3))
def test_invariant_5_score_without_sketches_killed_at_any_time(keeping: Stage, tmp_path: Path, seed: int) -> None:
    check_resumes(keeping, killed_at_random(keeping, tmp_path, seed)[0])


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Beam's worker processes below a command; not the shells that started them."""
    return [
        pid
        for pid, command in session(process).items()
        if "pipelines.engines.worker" in command and "sh -c" not in command
    ]


@pytest.mark.parametrize("seed", range(1, 3))
def test_invariant_5_score_by_two_workers_killed_at_any_time(scoring_by_two: Stage, tmp_path: Path, seed: int) -> None:
    run, process = killed_at_random(scoring_by_two, tmp_path, seed)
    until(lambda: not session(process), 5, "workers end when the command that started them was killed")
    check_resumes(scoring_by_two, run)


def test_invariant_5_score_completes_when_a_worker_is_killed(scoring_by_two: Stage, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(scoring_by_two.before, run)
    process = scoring_by_two.start(run)
    until(lambda: files(run / scoring_by_two.begun), 120, "the first features stand")
    victim = workers_of(process)[0]
    os.kill(victim, signal.SIGKILL)
    assert not (run / scoring_by_two.manifest).exists()
    finish(process, log_of(run))
    assert victim not in session(process)
    # Python's tracker of shared resources ends a moment after those it served.
    until(lambda: not session(process), 10, "no process of the command is left")
    check_finished(scoring_by_two, run)


def test_invariant_5_no_worker_outlives_the_killed_supervisor(scoring_by_two: Stage, tmp_path: Path) -> None:
    """The process between command and workers, that holds Beam's runner: the command starts another."""
    run = tmp_path / "run"
    shutil.copytree(scoring_by_two.before, run)
    process = scoring_by_two.start(run)
    until(lambda: files(run / scoring_by_two.begun), 120, "the first features stand")
    orphans = workers_of(process)
    assert len(orphans) == 2
    [supervisor] = [pid for pid, command in session(process).items() if "spawn_main" in command]
    os.kill(supervisor, signal.SIGKILL)
    assert not (run / scoring_by_two.manifest).exists()
    until(lambda: not set(orphans) & session(process).keys(), 5, "workers end when their supervisor was killed")
    finish(process, log_of(run))
    check_finished(scoring_by_two, run)


def test_invariant_5_two_processes_on_one_run_write_the_same_bytes(
    world: World, scoring: Stage, tmp_path: Path
) -> None:
    """Both find a plan and nothing else: they declare the scoring, score every unit and finish the stage side by side."""
    run = tmp_path / "run"
    shutil.copytree(world.run.url, run)
    start = starter("score", "--workers", "1", *options(world))
    started = [start(run) for _ in range(2)]
    for process in started:
        finish(process, log_of(run))
    found = tree_hashes(run)
    stages = {path.split("/")[1] for path in found if path.startswith("stages/")}
    assert stages == {"plan", "scoring", "score"}
    assert found == {path: scoring.expected[path] for path in found}
    assert not list(run.rglob(f"{TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize("seed", range(3))
def test_invariant_5_export_killed_at_any_time(exporting: Stage, tmp_path: Path, seed: int) -> None:
    check_resumes(exporting, killed_at_random(exporting, tmp_path, seed)[0])
