"""Running a Beam job: in this process, in several local processes under a supervisor, or on any other Beam runner.

No runner's final state is taken as proof of anything here: a stage compares what it planned with what stands on storage.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from pipelines.engines.base import Job, explained, in_thread
from pipelines.engines.local import Processes, pool_address, supervise
from pipelines.options import Execution
from schemas.errors import InputError
from schemas.run import Run
from schemas.storage import is_local

__all__ = ["Job", "default_workers", "explained", "model_hints", "refuse_unreachable", "run_job"]


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


def model_hints(execution: Execution) -> dict[str, str]:
    """Resource hints of the steps that run the model. Only Dataflow has any: a local runner would start workers twice for them."""
    hints = {"accelerator": execution.accelerator, "min_ram": execution.min_ram}
    return {name: value for name, value in hints.items() if value}


def refuse_unreachable(run: Run, execution: Execution) -> None:
    """Raise `InputError` where workers of another machine could not read the run directory or the corpus."""
    if execution.engine != "dataflow":
        return
    for name, url in (("run directory", run.url), ("corpus", run.root)):
        if is_local(url):
            raise InputError(f"{name} {url} lies on this machine, where workers of Dataflow cannot read it; use gs://")


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
    as that count grows between two starts. Raises `RunIncomplete` when it no longer does, or where a cluster was lost.
    """
    engine = execution.engine
    if engine in ("local", "worker-pool"):
        pool = pool_address(execution.beam_options) if engine == "worker-pool" else ""
        workers = execution.workers or default_workers(model_bytes)
        processes = Processes(workers=workers, beam_options=execution.beam_options, pool=pool)
        if pool or workers > 1:
            supervise(job, processes, finished, tick)
        else:
            in_thread(lambda: processes.run(job), tick)
    elif engine == "dask":
        from pipelines.engines.dask_cluster import run_on_dask

        run_on_dask(job, execution.beam_options, tick)
    elif engine == "dataflow":
        from pipelines.engines.dataflow import run_on_dataflow

        run_on_dataflow(job, execution, tick)
    else:
        _run_elsewhere(job, execution, tick)


def _run_elsewhere(job: Job, execution: Execution, tick: Callable[[], None]) -> None:
    options = PipelineOptions([f"--runner={execution.runner}", "--no_save_main_session", *execution.beam_options])
    try:
        pipeline = beam.Pipeline(options=options)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"Beam does not know the runner {execution.runner!r}: {error}") from error
    job.build(pipeline)
    in_thread(lambda: pipeline.run().wait_until_finish(), tick)
