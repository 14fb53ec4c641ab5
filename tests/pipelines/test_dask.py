"""A Dask cluster of its command line: one scheduler and two workers in processes of their own, and what is lost with them."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest

from pipelines.engines import dask_cluster
from pipelines.engines.dask_cluster import keep_all_ends
from pipelines.options import Execution
from pipelines.runners import run_job
from schemas.errors import InputError, LehrError, RunIncomplete
from schemas.run import Run
from tests.clusters import DaskCluster, end_service, free_port, start_dask
from tests.killing import finish, until
from tests.pipelines.engine_stages import (
    Expected,
    TwoEnds,
    begin_scoring,
    bytes_after_kill,
    choose,
    features_of,
    log_of,
    make_expected,
    pids_of,
    refused,
    resumes,
    run_stage,
)
from tests.pipelines.worlds import tree_hashes

TASK = re.compile(r"\('apply_dofn_to_bundle-\w+', (\d+)\)")
"""Dask's name for a task that runs a step of a Beam pipeline on one partition, with the partition's number."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return make_expected(tmp_path_factory.mktemp("dask-world"))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    started = start_dask(tmp_path)
    yield started
    started.end()


def tasks_by_worker(client: Any) -> dict[str, set[int]]:
    """Partitions that each worker computed in a step of a pipeline, by the scheduler's record of tasks."""
    found: dict[str, set[int]] = {}
    for task in client.get_task_stream():
        if (match := TASK.fullmatch(str(task["key"]))) and task["status"] == "OK":
            found.setdefault(task["worker"], set()).add(int(match[1]))
    return found


@pytest.mark.slow
def test_every_stage_on_two_dask_workers_gives_the_same_bytes(
    expected: Expected, cluster: DaskCluster, tmp_path: Path
) -> None:
    run = expected.copy(expected.planned, tmp_path / "run")
    parents = set()
    with cluster.client() as client:
        client.get_task_stream()  # the scheduler records from here on
        parents.add(run_stage(expected, "target", run, cluster.options))
        before = tasks_by_worker(client)
        parents.add(run_stage(expected, "score", run, cluster.options))
        after = tasks_by_worker(client)
        choose(Run.open(str(run)))
        parents.add(run_stage(expected, "export", run, cluster.options))
        workers = set(client.run(os.getpid).values())
    assert tree_hashes(run) == expected.bytes

    # The operating system, the scheduler and the workers' own word agree on who worked, and it was not the command.
    assert workers == cluster.worker_pids() and len(workers) == 2
    assert pids_of(run, "score", "base") == workers
    for stage, name in (("target", "target.base"), ("export", "s")):
        assert pids_of(run, stage, name) and pids_of(run, stage, name) <= workers
    assert not parents & workers and os.getpid() not in workers

    # One task for each chunk of the target, then for each unit: partitions 0 to n-1, over both workers. (128 together would be one.)
    assert set().union(*before.values()) == set(range(3))
    assert len(after) == 2 and all(len(units) > expected.units // 8 for units in after.values())
    assert set().union(*after.values()) == set(range(expected.units))


@pytest.mark.slow
def test_a_killed_dask_worker_costs_no_byte(expected: Expected, cluster: DaskCluster, tmp_path: Path) -> None:
    run = expected.copy(expected.described, tmp_path / "run")
    process = begin_scoring(expected, run, cluster.options)
    victim = sorted(pids_of(run, "score", "base"))[0]
    assert victim in cluster.worker_pids()
    os.kill(victim, signal.SIGKILL)
    assert len(features_of(run)) < expected.units and process.poll() is None
    finish(process, log_of(run))
    assert victim not in cluster.worker_pids()
    assert bytes_after_kill(run) == expected.scored_bytes


@pytest.mark.slow
def test_a_job_that_has_lost_all_workers_ends(
    cluster: DaskCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_cluster, "_WORKERS_S", 3)

    def tick() -> None:
        if any(tmp_path.glob("first-*")):
            for nanny in cluster.nannies:
                end_service(nanny)

    execution = Execution(runner="dask", beam_options=(cluster.options[-1].removeprefix("--beam-options="),))
    with pytest.raises(RunIncomplete, match="the Dask cluster was lost"):
        run_job(TwoEnds(str(tmp_path), pause_s=0.2), execution, finished=lambda: 0, tick=tick)


@pytest.mark.slow
def test_a_killed_dask_scheduler_is_status_75_and_the_same_command_resumes(
    expected: Expected, cluster: DaskCluster, tmp_path: Path
) -> None:
    run = expected.copy(expected.described, tmp_path / "run")
    process = begin_scoring(expected, run, cluster.options)
    cluster.scheduler.send_signal(signal.SIGKILL)
    assert process.poll() is None
    refused(process, run, "the Dask cluster was lost")
    assert len(features_of(run)) < expected.units
    cluster.end()
    again = start_dask(tmp_path)
    try:
        resumes(expected, run, again.options)
    finally:
        again.end()


@pytest.mark.slow
def test_no_branch_is_dropped_and_a_lost_cluster_is_told(
    cluster: DaskCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "touched"
    folder.mkdir()
    execution = Execution(runner="dask", beam_options=(cluster.options[-1].removeprefix("--beam-options="),))
    run_job(TwoEnds(str(folder)), execution, finished=lambda: 0)
    names = [path.name.split("-") for path in folder.iterdir()]
    assert {(name, int(number)) for name, number, _ in names} == {(n, i) for n in ("first", "last") for i in range(300)}
    assert {int(pid) for _, _, pid in names} == cluster.worker_pids()

    for nanny in cluster.nannies:
        end_service(nanny)
    with cluster.client() as client:
        until(lambda: not client.nthreads(), 60, "the scheduler misses its workers")
    monkeypatch.setattr(dask_cluster, "_WORKERS_S", 1)
    with pytest.raises(InputError, match="has no workers after 1 s; start some: dask worker tcp://"):
        run_job(TwoEnds(str(folder)), execution, finished=lambda: 0)


def test_no_scheduler_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask_cluster, "_CONNECT_S", 1)
    address = f"--dask_client_address=tcp://127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match="no Dask scheduler answers at tcp://127"):
        run_job(TwoEnds(str(tmp_path)), Execution(runner="dask", beam_options=(address,)), finished=lambda: 0)
    with pytest.raises(InputError, match="--beam-options=--dask_client_address=tcp://HOST:8786"):
        run_job(TwoEnds(str(tmp_path)), Execution(runner="DaskRunner"), finished=lambda: 0)


class _LastWords(beam.DoFn):
    def process(self, element: int) -> Iterator[int]:
        yield element

    def finish_bundle(self) -> None:
        return None


class _Tagged(beam.DoFn):
    def process(self, element: int) -> Iterator[Any]:
        yield beam.pvalue.TaggedOutput("odd", element)


@pytest.mark.parametrize(
    "step", [beam.ParDo(_LastWords()), beam.ParDo(_Tagged()).with_outputs("odd", main="even")], ids=["finish", "tags"]
)
def test_steps_that_dask_would_lose_from_are_refused(step: beam.PTransform) -> None:
    pipeline = beam.Pipeline()
    _ = pipeline | beam.Create([1]) | "Lossy" >> step
    with pytest.raises(LehrError, match=r"step Lossy.* cannot run on Dask"):
        keep_all_ends(pipeline)
