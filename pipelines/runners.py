"""Running a Beam job: in this process, in several local processes under a supervisor, or on any other Beam runner.

No runner's final state is taken as proof of anything here: a stage compares what it planned with what stands on storage.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.options import Execution
from schemas.errors import InputError, LehrError, RunIncomplete

log = logging.getLogger(__name__)

_IN_PROCESS = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_WORKER_LOST = 75
_LOCK = "LEHR_SUPERVISOR_LOCK"
_MAX_FRUITLESS = 2
_TICK_S = 0.25
_STEP = re.compile(r" \[while running '[^']*'\]")
_RAISED = re.compile(r"^schemas\.errors\.\w+: ", re.MULTILINE)


class Job(Protocol):
    """A pipeline that can be sent to another process: settings, and how to build the pipeline from them."""

    def build(self, pipeline: beam.Pipeline) -> None:
        """Add the transforms."""


def default_workers(model_bytes: int) -> int:
    """One worker per visible accelerator; on CPU one per core, each with room for the model and its activations."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Weights, activations of a batch and the logits of a chunk: measured near 4 x the weights plus 2 GB at 135M.
    needed = 4 * model_bytes + 2 * 2**30
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(1, min(cores, available // needed))


def run_job(
    job: Job,
    execution: Execution,
    *,
    model_bytes: int = 0,
    finished: Callable[[], int],
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Run `job` to its end, calling `tick` a few times a second; `model_bytes` are the weights each worker will hold.

    `finished` counts the units that stand on storage; a local run whose worker was killed is started again for as long
    as that count grows between two starts. Raises `RunIncomplete` when it no longer does.
    """
    workers = execution.workers or default_workers(model_bytes)
    if execution.runner != "local":
        _run_remote(job, execution, tick)
    elif workers == 1:
        _in_thread(lambda: _run_local(job, 1, execution.beam_options), tick)
    else:
        _supervise(job, workers, execution.beam_options, finished, tick)


def _run_local(job: Job, workers: int, beam_options: tuple[str, ...]) -> None:
    options = [f"--runner={_IN_PROCESS}", "--no_save_main_session", *beam_options]
    if workers > 1:
        options += ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
    pipeline = beam.Pipeline(options=PipelineOptions(options))
    job.build(pipeline)
    pipeline.run().wait_until_finish()


def _run_remote(job: Job, execution: Execution, tick: Callable[[], None]) -> None:
    try:
        pipeline = beam.Pipeline(options=PipelineOptions([f"--runner={execution.runner}", *execution.beam_options]))
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"Beam does not know the runner {execution.runner!r}: {error}") from error
    job.build(pipeline)
    _in_thread(lambda: pipeline.run().wait_until_finish(), tick)


def _in_thread(work: Callable[[], Any], tick: Callable[[], None]) -> None:
    """Run `work` in a thread, so that this one can show progress and take Ctrl-C."""
    failure: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name="lehr-pipeline", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_TICK_S)
        tick()
    if failure:
        raise explained(failure[0]) or failure[0]


def explained(error: BaseException) -> LehrError | None:
    """The `LehrError` that a worker raised, if that is what ended the job, without Beam's remark on the step.

    From another process it arrives as the last words of a traceback's text.
    """
    if isinstance(error, LehrError):
        return type(error)(_STEP.sub("", str(error)))
    last = [match.end() for match in _RAISED.finditer(str(error))]
    return LehrError(_STEP.split(str(error)[last[-1] :])[0].strip()) if last else None


def _supervise(
    job: Job, workers: int, beam_options: tuple[str, ...], finished: Callable[[], int], tick: Callable[[], None]
) -> None:
    """Beam's own local runner hangs when one of its workers is killed; a child process that then ends itself does not."""
    # A child that ends itself leaves semaphores to the resource tracker, which then says so although it removes them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    fruitless, before = 0, finished()
    with tempfile.TemporaryDirectory(prefix="lehr-workers-") as folder:
        log_path = os.path.join(folder, "log")
        while (status := _attempt(job, workers, beam_options, log_path, tick)) != 0:
            after = finished()
            fruitless = 0 if after > before else fruitless + 1
            if fruitless > _MAX_FRUITLESS:
                raise RunIncomplete(
                    f"workers were killed {fruitless} times without one more unit finished (exit status {status}); "
                    "most often memory: use fewer --workers or smaller --batch-tokens, then run the same command again"
                )
            log.warning("a worker process was lost; %d units stand, starting again", after)
            before = after


def _attempt(job: Job, workers: int, beam_options: tuple[str, ...], log_path: str, tick: Callable[[], None]) -> int:
    """Run the job in a child process; returns its exit status. Raises `LehrError` with what a failed job said."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    arguments = (job, workers, beam_options, os.getpid(), log_path, writer)
    child = context.Process(target=_child, args=arguments, name="lehr-runner")
    child.start()
    writer.close()
    try:
        while child.is_alive():
            child.join(_TICK_S)
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


def _child(job: Job, workers: int, beam_options: tuple[str, ...], parent: int, log_path: str, writer: Any) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if os.environ.get("LEHR_LOG", "warning").lower() not in ("info", "debug"):
        # Beam's workers narrate their start on stderr, over the progress bar; the file is shown when something fails.
        with open(log_path, "ab") as handle:
            os.dup2(handle.fileno(), 1)
            os.dup2(handle.fileno(), 2)

    def guard(arguments: threading.ExceptHookArgs) -> None:
        if "Worker subprocess exited" in str(arguments.exc_value):
            os._exit(_WORKER_LOST)
        threading.__excepthook__(arguments)

    def follow_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(_WORKER_LOST)

    threading.excepthook = guard
    threading.Thread(target=follow_parent, daemon=True).start()
    os.environ[_LOCK] = f"{log_path}.{os.getpid()}.lock"
    fcntl.flock(os.open(os.environ[_LOCK], os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
    try:
        _run_local(job, workers, beam_options)
    except BaseException as error:
        if "Worker subprocess exited" in str(error):
            os._exit(_WORKER_LOST)
        writer.send((str(explained(error) or ""), f"{type(error).__name__}: {error}"[-4000:]))
        os._exit(1)
    os._exit(0)


@functools.cache
def end_with_supervisor() -> None:
    """End this worker process as soon as its supervisor has ended; does nothing where there is none.

    Beam's workers finish their bundle first, which may be hours of work for nobody, on a device that the next attempt
    needs. The supervisor holds a lock for as long as it lives: the kernel takes it from a process however it died.
    """
    path = os.environ.get(_LOCK)
    if not path:
        return

    def follow() -> None:
        try:
            fcntl.flock(os.open(path, os.O_RDWR), fcntl.LOCK_SH)
        except FileNotFoundError:
            log.info("the supervisor has ended and tidied up")
        os._exit(_WORKER_LOST)

    threading.Thread(target=follow, name="lehr-supervisor", daemon=True).start()
