"""This machine: one process, or several under a supervisor; or the processes of an SDK worker pool, likewise supervised.

Beam's own local runner waits forever for a worker that was killed. Here it runs in a child process, which ends itself as
soon as it hears of such a loss; its parent starts another for as long as work gets done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import multiprocessing
import os
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PortableOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.environments import Environment, ExternalEnvironment, SubprocessSDKEnvironment

from pipelines.engines import worker
from pipelines.engines.base import TICK_S, Job, explained, pipeline_options
from pipelines.engines.worker import LOCK, WORKER_LOST
from schemas.errors import InputError, LehrError, RunIncomplete

log = logging.getLogger(__name__)

FOLDER_PREFIX = "lehr-workers-"
_OWNER = "owner"
"""A file of the folder that its command holds a lock on."""
_SETTLED_S = 60.0
"""A folder is this old before its lock says anything: a command makes it, then locks it."""
_MAX_FRUITLESS = 2
_POOL_START_S = 120.0
_POOL_END_S = 10.0
_CONTROL_THREAD = "beam_control_read"
"""Beam's name for the thread that reads what a worker says; there is one for each worker that has connected."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """How Beam's Fn API runner gets its workers."""

    workers: int
    beam_options: tuple[str, ...] = ()
    pool: str = ""
    """HOST:PORT of a worker pool that starts them; otherwise they are started here."""

    def run(self, job: Job) -> None:
        """Run the job to its end; for several workers only in a process that may end itself."""
        options = list(self.beam_options)
        environment: Environment | None = None
        if self.pool:
            environment = ExternalEnvironment(self.pool)
        elif self.workers > 1:
            environment = SubprocessSDKEnvironment.from_command_string(_worker_command())
        if environment is not None:
            options.append(f"--direct_num_workers={self.workers}")
        pipeline = beam.Pipeline(
            runner=FnApiRunner(default_environment=environment), options=pipeline_options(*options)
        )
        job.build(pipeline)
        pipeline.run().wait_until_finish()


def _worker_command() -> str:
    """The shell command that becomes a worker, of this very Lehr: folders named as its rooms may lie where the command was given."""
    root = str(Path(worker.__file__).parents[2])
    code = (
        f"import sys; sys.path[:0] = [path for path in [{root!r}] if path not in sys.path]; "
        f"from {worker.__name__} import main; main()"
    )
    return f"exec {shlex.quote(sys.executable)} -P -c {shlex.quote(code)}"


def pool_address(beam_options: tuple[str, ...]) -> str:
    """HOST:PORT of the worker pool that the options name. Raises `InputError` where there is none, or where none answers."""
    address = pipeline_options(*beam_options).view_as(PortableOptions).environment_config or ""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(
            "the runner worker-pool needs the pool's address: --beam-options=--environment_config=HOST:PORT"
            + (f", not {address!r}" if address else "")
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"no worker pool answers at {address} ({error}); start one there with "
            f"`python -m apache_beam.runners.worker.worker_pool_main --service_port={port}`"
        ) from error
    return address


def supervise(job: Job, processes: Processes, finished: Callable[[], int], tick: Callable[[], None]) -> None:
    """Run the job in a child process, again after every lost worker for as long as `finished` grows.

    Raises `RunIncomplete` when it no longer does.
    """
    # A child that ends itself leaves semaphores to the resource tracker, which then says so although it removes them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    fruitless, before = 0, finished()
    with _own_folder() as folder:
        log_path = os.path.join(folder, "log")
        while (status := _attempt(job, processes, log_path, tick)) != 0:
            if processes.pool:
                _still_there(processes)
            after = finished()
            fruitless = 0 if after > before else fruitless + 1
            if fruitless > _MAX_FRUITLESS:
                raise RunIncomplete(
                    f"workers were killed {fruitless} times without one more unit finished (exit status {status}); "
                    "most often memory: use fewer --workers or smaller --batch-tokens, then run the same command again"
                )
            log.warning("a worker process was lost; %d units stand, starting again", after)
            before = after


@contextlib.contextmanager
def _own_folder() -> Iterator[str]:
    """A temporary folder of this command's own; those that killed commands have left are deleted."""
    _sweep_folders()
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder:
        owner = os.open(os.path.join(folder, _OWNER), os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(owner, fcntl.LOCK_EX)
            yield folder
        finally:
            os.close(owner)


def _sweep_folders() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        # Another user's, or one that its owner is deleting.
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime < _SETTLED_S:
                continue
            owner = os.open(folder / _OWNER, os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(owner)


def _still_there(processes: Processes) -> None:
    try:
        pool_address(processes.beam_options)
    except InputError as error:
        raise RunIncomplete(f"the worker pool was lost: {error}, then run the same command again to resume") from error


def _attempt(job: Job, processes: Processes, log_path: str, tick: Callable[[], None]) -> int:
    """Run the job in a child process; returns its exit status. Raises `LehrError` with what a failed job said."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    arguments = (job, processes, os.getpid(), log_path, writer)
    child = context.Process(target=_child, args=arguments, name="lehr-runner")
    child.start()
    writer.close()
    try:
        while child.is_alive():
            child.join(TICK_S)
            tick()
    except BaseException:
        child.kill()
        child.join()
        raise
    if child.exitcode and reader.poll():
        try:
            explanation, message = reader.recv()
        except EOFError:  # killed before it could say anything
            return child.exitcode
        if explanation:
            raise LehrError(explanation)
        raise LehrError(f"the local pipeline failed: {message}\n{_tail(log_path)}")
    return child.exitcode or 0


def _tail(path: str, size: int = 2000) -> str:
    """The end of what the workers wrote."""
    try:
        with open(path, errors="replace") as handle:
            return handle.read()[-size:]
    except FileNotFoundError:
        return ""


def _child(job: Job, processes: Processes, parent: int, log_path: str, writer: Any) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if os.environ.get("LEHR_LOG", "warning").lower() not in ("info", "debug"):
        # Beam's workers narrate their start on stderr, over the progress bar; the file is shown when something fails.
        with open(log_path, "ab") as handle:
            os.dup2(handle.fileno(), 1)
            os.dup2(handle.fileno(), 2)

    def guard(arguments: threading.ExceptHookArgs) -> None:
        if _tells_a_loss(arguments.exc_value):
            os._exit(WORKER_LOST)
        threading.__excepthook__(arguments)

    def follow_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(WORKER_LOST)

    threading.excepthook = guard
    threading.Thread(target=follow_parent, daemon=True).start()
    if processes.pool:
        threading.Thread(target=_end_with_first_worker, args=(processes.workers,), daemon=True).start()
    os.environ[LOCK] = f"{log_path}.{os.getpid()}.lock"
    fcntl.flock(os.open(os.environ[LOCK], os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
    try:
        processes.run(job)
    except BaseException as error:
        if _tells_a_loss(error):
            os._exit(WORKER_LOST)
        writer.send((str(explained(error) or ""), f"{type(error).__name__}: {error}"[-4000:]))
        os._exit(1)
    os._exit(0)


def _tells_a_loss(error: BaseException | None) -> bool:
    return any(words in str(error) for words in ("Worker subprocess exited", "Channel closed prematurely"))


def _end_with_first_worker(workers: int) -> None:
    """End this process when a worker of a pool has gone or does not come: Beam would wait for it forever."""

    def connected() -> int:
        return sum(thread.name == _CONTROL_THREAD for thread in threading.enumerate())

    deadline = time.monotonic() + _POOL_START_S
    while connected() < workers and time.monotonic() < deadline:
        time.sleep(TICK_S)
    while connected() >= workers:
        time.sleep(TICK_S)
    time.sleep(_POOL_END_S)  # at the end of a job, too, workers go; then this process ends by itself
    os._exit(WORKER_LOST)
