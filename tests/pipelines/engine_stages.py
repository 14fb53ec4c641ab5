"""The stages that run on an engine, as commands, and what an undisturbed run of them in one process leaves."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import time
from pathlib import Path

import apache_beam as beam

from pipelines.export import export
from pipelines.select import run_select
from schemas.run import Run
from schemas.storage import TEMPORARY_PREFIX
from schemas.timings import read_heartbeats
from schemas.units import read_plan
from selection_ops.selectors import Budget, SelectorSettings
from tests.killing import finish, start_module, until
from tests.pipelines.worlds import IN_PROCESS, SCORING, World, make_world, tree_hashes

SHARD_SAMPLES = 20


@dataclasses.dataclass(frozen=True)
class Expected:
    """A planned run, and the bytes of every stage of it in one process; folders of runs for stages to start from."""

    world: World
    units: int
    planned: Path
    """Nothing but the plan."""
    described: Path
    """Also the target."""
    selected: Path
    """Also scored, and a selection made."""
    scored_bytes: dict[str, str]
    """Plan, target and scores."""
    bytes: dict[str, str]
    """Everything, up to the exported stream."""

    def copy(self, before: Path, place: Path) -> Path:
        shutil.copytree(before, place)
        return place


def choose(run: Run) -> None:
    """The selection of all these tests, made in this process: it is no pipeline."""
    settings = SelectorSettings(selector="target-cosine", two_fold=False, bound=False)
    run_select(run, "s", "base", "target", Budget(samples=200), settings)


def make_expected(folder: Path) -> Expected:
    """Describe, score, select and export in this process."""
    world = make_world(folder, rows=200, unit_tokens=800)
    planned, described, selected = (folder / name for name in ("planned", "described", "selected"))
    run = folder / "run"
    shutil.copytree(run, planned)
    world.describe()
    shutil.copytree(run, described)
    world.score()
    scored_bytes = tree_hashes(run)
    choose(world.run)
    shutil.copytree(run, selected)
    export(world.run, "s", IN_PROCESS, shard_samples=SHARD_SAMPLES)
    units = len(read_plan(world.run).units)
    # No heartbeat of this process may be taken for one of an engine's workers.
    for before in (described, selected):
        for beat in before.glob("timings/*/*/worker-*.json"):
            beat.unlink()
    return Expected(world, units, planned, described, selected, scored_bytes, tree_hashes(run))


def log_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.log")


def start_stage(expected: Expected, verb: str, run: Path, engine: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """`lehr VERB RUN` on an engine, in a process of its own."""
    world = expected.world
    model = dataclasses.replace(SCORING, model=str(world.model))
    features = [
        part
        for field, value in dataclasses.asdict(model).items()
        if value is not None
        for part in (f"--{field.replace('_', '-')}", str(value))
    ]
    arguments = {
        "target": ["--data", str(world.target), "--eval", str(world.evaluation), *features],
        "score": [],
        "export": ["--selection", "s", "--shard-samples", str(SHARD_SAMPLES)],
    }[verb]
    return start_module("lehr", verb, str(run), *arguments, *engine, log=log_of(run))


def run_stage(expected: Expected, verb: str, run: Path, engine: tuple[str, ...]) -> int:
    """Run a stage to its good end; returns the process id of the command."""
    process = start_stage(expected, verb, run, engine)
    finish(process, log_of(run))
    return process.pid


def begin_scoring(expected: Expected, run: Path, engine: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """A `lehr score` whose first features stand."""
    process = start_stage(expected, "score", run, engine)
    until(lambda: len(features_of(run)) >= 5 or process.poll() is not None, 120, "the first features stand")
    assert process.poll() is None and len(features_of(run)) < expected.units
    return process


def refused(process: subprocess.Popen[bytes], run: Path, what: str) -> None:
    """A `lehr score` whose engine was killed says so, and ends with status 75 and no manifest."""
    assert process.wait(timeout=60) == 75, log_of(run).read_text()[-4000:]
    told = " ".join(log_of(run).read_text().split())
    assert what in told and "run the same command again" in told
    assert not (run / "stages/score/base.json").exists()


def resumes(expected: Expected, run: Path, engine: tuple[str, ...]) -> None:
    """The same command again keeps what stands and ends in the bytes of an undisturbed run."""
    kept = {path: path.stat().st_mtime_ns for path in features_of(run)}
    run_stage(expected, "score", run, engine)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert bytes_after_kill(run) == expected.scored_bytes


def features_of(run: Path) -> list[Path]:
    """Feature shards that stand."""
    return list((run / "features/base").glob("part-*.parquet"))


def pids_of(run: Path, stage: str, name: str) -> set[int]:
    """Processes that did the work of a stage, by their own word."""
    return {beat.pid for beat in read_heartbeats(Run.open(str(run)), stage, name)}


@dataclasses.dataclass(frozen=True)
class TwoEnds:
    """A job whose first end is not what the last transform needs."""

    folder: str
    pause_s: float = 0.0

    def build(self, pipeline: beam.Pipeline) -> None:
        numbers = pipeline | beam.Create(list(range(300)))
        _ = numbers | "First" >> beam.Map(_touch, self.folder, "first", self.pause_s)
        _ = numbers | "Last" >> beam.Map(_touch, self.folder, "last")


def _touch(number: int, folder: str, name: str, pause_s: float = 0.0) -> int:
    time.sleep(pause_s)
    Path(folder, f"{name}-{number}-{os.getpid()}").touch()
    return number


def bytes_after_kill(run: Path) -> dict[str, str]:
    """Hashes of a run directory without what a killed process was writing, which no manifest may list."""
    manifests = "".join(path.read_text() for path in (run / "stages").rglob("*.json"))
    for unfinished in run.rglob(f"{TEMPORARY_PREFIX}*"):
        assert unfinished.name not in manifests
        unfinished.unlink()
    return tree_hashes(run)
