"""SDK workers of a pool of their own, over the Fn API: Beam's worker pool service, started by its command line."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.engines.local import pool_address
from schemas.errors import InputError
from schemas.run import Run
from tests.clusters import WorkerPool, end_service, free_port, start_pool
from tests.killing import finish, session, until
from tests.pipelines.engine_stages import (
    Expected,
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
    start_stage,
)
from tests.pipelines.worlds import tree_hashes


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    return make_expected(tmp_path_factory.mktemp("pool-world"))


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[WorkerPool]:
    started = start_pool(tmp_path)
    yield started
    started.end()


@pytest.mark.slow
def test_every_stage_by_two_pool_workers_gives_the_same_bytes(
    expected: Expected, pool: WorkerPool, tmp_path: Path
) -> None:
    run = expected.copy(expected.planned, tmp_path / "run")
    parents = {os.getpid(), run_stage(expected, "target", run, pool.options)}
    score = start_stage(expected, "score", run, pool.options)
    until(lambda: features_of(run) or score.poll() is not None, 120, "the first features stand")
    # By the operating system's word: below the pool, and the command has no worker below itself.
    workers = pool.worker_pids()
    assert not [pid for pid, command in session(score).items() if "sdk_worker" in command]
    finish(score, log_of(run))
    assert len(workers) == 2 and pids_of(run, "score", "base") == workers
    choose(Run.open(str(run)))
    parents |= {score.pid, run_stage(expected, "export", run, pool.options)}
    for stage, name in (("target", "target.base"), ("score", "base"), ("export", "s")):
        assert pids_of(run, stage, name) and not pids_of(run, stage, name) & parents
    assert tree_hashes(run) == expected.bytes
    until(lambda: not pool.worker_pids(), 20, "workers end with their job")


@pytest.mark.slow
def test_a_killed_pool_worker_costs_no_byte(expected: Expected, pool: WorkerPool, tmp_path: Path) -> None:
    run = expected.copy(expected.described, tmp_path / "run")
    process = begin_scoring(expected, run, pool.options)
    victim = sorted(pids_of(run, "score", "base"))[0]
    assert victim in pool.worker_pids()
    os.kill(victim, signal.SIGKILL)
    finish(process, log_of(run))
    assert "a worker process was lost" in log_of(run).read_text()
    assert bytes_after_kill(run) == expected.scored_bytes


@pytest.mark.slow
def test_a_killed_pool_is_status_75_and_the_same_command_resumes(
    expected: Expected, pool: WorkerPool, tmp_path: Path
) -> None:
    run = expected.copy(expected.described, tmp_path / "run")
    process = begin_scoring(expected, run, pool.options)
    end_service(pool.service)
    refused(process, run, "the worker pool was lost")
    again = start_pool(tmp_path)
    try:
        resumes(expected, run, again.options)
    finally:
        again.end()


@pytest.mark.slow
def test_pool_workers_end_with_the_killed_command(expected: Expected, pool: WorkerPool, tmp_path: Path) -> None:
    run = expected.copy(expected.described, tmp_path / "run")
    process = begin_scoring(expected, run, pool.options)
    assert pool.worker_pids()
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not pool.worker_pids(), 20, "workers end when the command that they work for was killed")
    assert len(features_of(run)) < expected.units


def test_a_pool_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(InputError, match=r"--beam-options=--environment_config=HOST:PORT$"):
        pool_address(())
    with pytest.raises(InputError, match="HOST:PORT, not 'localhost'"):
        pool_address(("--environment_config=localhost",))
    with pytest.raises(InputError, match=r"no worker pool answers at localhost:\d+ .*worker_pool_main --service_port="):
        pool_address((f"--environment_config=localhost:{free_port()}",))
