"""Engines started by their command lines: a Dask cluster, a Beam worker pool. Each in sessions of its own, ended at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.killing import ROOT, session, until


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def listens(port: int) -> bool:
    """Whether something accepts connections at a port of this machine."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def start_service(*arguments: str, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """`python -m ARGUMENTS` as a service: its own session, the `python` of this environment first on its PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def end_service(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a service and to everything that it started."""
    for pid in [process.pid, *session(process)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


@dataclasses.dataclass(frozen=True)
class DaskCluster:
    """One scheduler and two workers of one thread, each with the nanny that starts it again."""

    port: int
    scheduler: subprocess.Popen[bytes]
    nannies: tuple[subprocess.Popen[bytes], ...]

    @property
    def address(self) -> str:
        return f"tcp://127.0.0.1:{self.port}"

    @property
    def options(self) -> tuple[str, ...]:
        """What a `lehr` command needs to run there."""
        return ("--runner", "dask", f"--beam-options=--dask_client_address={self.address}")

    def worker_pids(self) -> set[int]:
        """Processes that run tasks: those below the nannies, by the operating system's word."""
        return {pid for nanny in self.nannies for pid, command in session(nanny).items() if "spawn_main" in command}

    @contextlib.contextmanager
    def client(self) -> Iterator[Any]:
        """A client of the test's own."""
        import distributed

        with distributed.Client(self.address, timeout=30, set_as_default=False) as client:
            yield client

    def end(self) -> None:
        for process in (*self.nannies, self.scheduler):
            end_service(process)


def start_dask(folder: Path, port: int = 0) -> DaskCluster:
    """Start a cluster and wait until both workers are known to the scheduler."""
    port = port or free_port()
    address = f"tcp://127.0.0.1:{port}"
    scheduler = start_service(
        *("dask", "scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-show"),
        log=folder / "scheduler.log",
    )
    nannies = tuple(
        start_service(
            *("dask", "worker", address, "--nworkers", "1", "--nthreads", "1", "--no-dashboard"),
            *("--local-directory", str(folder / f"worker-{number}")),
            log=folder / f"worker-{number}.log",
        )
        for number in range(2)
    )
    cluster = DaskCluster(port, scheduler, nannies)
    try:
        until(lambda: listens(port), 120, "the Dask scheduler listens")
        with cluster.client() as client:
            client.wait_for_workers(2, timeout=120)
    except BaseException:
        cluster.end()
        raise
    return cluster


@dataclasses.dataclass(frozen=True)
class WorkerPool:
    """Beam's own service that starts SDK worker processes for a runner elsewhere."""

    port: int
    service: subprocess.Popen[bytes]

    @property
    def options(self) -> tuple[str, ...]:
        return (
            "--runner",
            "worker-pool",
            "--workers",
            "2",
            f"--beam-options=--environment_config=localhost:{self.port}",
        )

    def worker_pids(self) -> set[int]:
        """SDK worker processes below the pool."""
        return {pid for pid, command in session(self.service).items() if "SdkHarness" in command}

    def end(self) -> None:
        end_service(self.service)


def start_pool(folder: Path) -> WorkerPool:
    """Start a worker pool and wait until it listens."""
    port = free_port()
    service = start_service(
        *("apache_beam.runners.worker.worker_pool_main", f"--service_port={port}"), log=folder / "pool.log"
    )
    pool = WorkerPool(port, service)
    try:
        until(lambda: listens(port), 120, "the worker pool listens")
    except BaseException:
        pool.end()
        raise
    return pool
