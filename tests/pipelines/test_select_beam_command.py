"""`lehr select --engine beam` through the real command: workers in other processes, one of them killed, and what follows a selection."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.pools import make_pool
from lehr.cli import main
from schemas.parquet import read_table
from schemas.run import Run
from tests.killing import finish, session, start_module, until
from tests.pipelines.engine_stages import bytes_after_kill
from tests.pipelines.worlds import make_world, tree_hashes

pytestmark = pytest.mark.slow


def rows(run: str, name: str) -> pa.Table:
    listed = [part for part in Run.open(run).manifest("select", name).parts if part.path.endswith(".parquet")]
    return pa.concat_tables([read_table(f"{run}/{part.path}", schema="selection") for part in listed])


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    return [
        pid
        for pid, command in session(process).items()
        if "pipelines.engines.worker" in command and "sh -c" not in command
    ]


def test_two_workers_choose_as_memory_does_and_all_that_follows_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path)
    world.describe()
    world.score()
    run = world.run.url
    common = ("--samples", "20", "--max-loss-quantile", "0.9")
    assert main(["select", run, "--name", "memory", *common]) == 0
    assert main(["select", run, "--name", "beam", *common, "--engine", "beam", "--workers", "2"]) == 0
    assert "set cosine" in capsys.readouterr().out
    memory, beam = rows(run, "memory"), rows(run, "beam")
    for name in ("sample_id", "rank", "reason", "selection_weight", "score", "alignment"):
        assert memory[name].equals(beam[name]), name
    for selection in ("memory", "beam"):
        assert main(["export", run, "--selection", selection]) == 0
    shards = [sorted((tmp_path / f"run/streams/{name}/gen-000001").glob("*.tar")) for name in ("memory", "beam")]
    assert shards[0] and [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    for verb in ("verify", "report", "audit", "status"):
        assert main([verb, run]) == 0, verb


LIMITED = ("--selector", "direct-signed", "--stiff-limit", "0.8", "--stiff-limit-kind", "pool")
PASSES = ("--shortlist", "0", "--greedy-rows", "500", "--max-iterations", "3", "--stiff-limit", "0.8")
ROUNDS = ("--selector", "direct", "--stiff-limit", "0.6", "--max-iterations", "3")


@pytest.mark.parametrize("settings", [LIMITED, PASSES, ROUNDS], ids=["direct-signed", "match", "direct"])
def test_a_killed_worker_costs_another_attempt_and_no_byte(tmp_path: Path, settings: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    make_pool(run, rows=6_000, k=64, part_rows=50)
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    command = ("--samples", "300", *settings, "--engine", "beam", "--workers", "2", "--name", "s")
    finish(start_module("lehr", "select", str(whole), *command, log=tmp_path / "whole.log"), tmp_path / "whole.log")
    log = tmp_path / "log"
    process = start_module("lehr", "select", str(run), *command, log=log)
    until(lambda: list((run / "selections/s").glob("part-*")) or process.poll() is not None, 240, "a first part stands")
    victim = workers_of(process)[0]
    os.kill(victim, signal.SIGKILL)
    assert not (run / "stages/select/s.json").exists()
    finish(process, log)
    assert "a worker process was lost" in log.read_text()
    assert bytes_after_kill(run) == tree_hashes(whole)
