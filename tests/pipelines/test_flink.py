"""Beam's Flink runner, where somebody has its job server: no package registry brings one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from schemas.run import Run
from tests.clusters import start_pool
from tests.pipelines.engine_stages import choose, make_expected, pids_of, run_stage
from tests.pipelines.worlds import tree_hashes

JAR = "LEHR_FLINK_JOB_SERVER_JAR"


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get(JAR), reason=f"{JAR} names no jar of Beam's Flink job server; it also needs Java"
)
def test_every_stage_on_flink_gives_the_same_bytes(tmp_path: Path) -> None:
    expected = make_expected(tmp_path / "world")
    run = expected.copy(expected.planned, tmp_path / "run")
    pool = start_pool(tmp_path)
    options = (
        f"--flink_job_server_jar={os.environ[JAR]}",
        "--flink_master=[local]",
        "--parallelism=2",
        "--environment_type=EXTERNAL",
        f"--environment_config=localhost:{pool.port}",
    )
    flink = ("--runner", "FlinkRunner", *(f"--beam-options={option}" for option in options))
    parents = {os.getpid()}
    try:
        for verb in ("target", "score"):
            parents.add(run_stage(expected, verb, run, flink))
        choose(Run.open(str(run)))
        parents.add(run_stage(expected, "export", run, flink))
    finally:
        pool.end()
    for stage, name in (("target", "target.base"), ("score", "base"), ("export", "s")):
        assert pids_of(run, stage, name) and not pids_of(run, stage, name) & parents
    assert tree_hashes(run) == expected.bytes
