"""A Dask cluster, through Beam's Dask runner and around what that runner loses without a word.

It computes only what the last transform needs, hands tagged outputs to every consumer, drops what `finish_bundle` emits,
puts 128 elements into one task, shuffles in a number of tasks that grows faster than that of the elements, and calls a
job done whose scheduler has died.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

import apache_beam as beam
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor

from pipelines.engines.base import Job, in_thread, pipeline_options
from schemas.errors import InputError, LehrError, RunIncomplete

log = logging.getLogger(__name__)

_CONNECT_S = 10
_WORKERS_S = 60
_MOST_PARTITIONS = 256
_AGAIN = "what is finished stands; when the cluster is up again, run the same command again to resume"


def run_on_dask(job: Job, beam_options: tuple[str, ...], tick: Callable[[], None]) -> None:
    """Run the job on the cluster that the options name, one task for each element of its inputs.

    Raises `InputError` where no scheduler is named or answers, where it has no workers, and `RunIncomplete` where the
    cluster was lost on the way.
    """
    try:
        import distributed
        from apache_beam.runners.dask.dask_runner import DaskOptions, DaskRunner
    except ImportError as error:
        raise InputError(
            f"the runner dask needs Dask here and on the cluster: pip install 'lehr[dask]' ({error})"
        ) from None
    options = pipeline_options(*beam_options)
    given = options.view_as(DaskOptions)
    if not (given.address or given.scheduler_file):
        raise InputError("the runner dask needs a scheduler: --beam-options=--dask_client_address=tcp://HOST:8786")
    if not (given.npartitions or given.partition_size):
        given.partition_size = 1
    threads = _wait_for_workers(given)
    pipeline = beam.Pipeline(runner=DaskRunner(), options=options)
    job.build(pipeline)
    keep_all_ends(pipeline)

    def run() -> None:
        with _shuffles_over(min(2 * threads, _MOST_PARTITIONS)):
            result: Any = pipeline.run()
        threading.Thread(target=_cancel_without_workers, args=(result,), daemon=True).start()
        try:
            result.wait_until_finish()
            lost = [future.status for future in result.futures if future.status != "finished"]
            if lost:
                raise RunIncomplete(f"the Dask cluster was lost, the job ended as {lost[0]}; {_AGAIN}")
        except distributed.KilledWorker as error:
            raise RunIncomplete(
                f"a work unit ended every Dask worker that it was given to ({error}); most often memory: give workers more, "
                "or use smaller --batch-tokens, then run the same command again"
            ) from error
        except (CancelledError, OSError, TimeoutError) as error:
            raise RunIncomplete(f"the Dask cluster was lost ({type(error).__name__}: {error}); {_AGAIN}") from error
        except RuntimeError as error:
            if "deserialization of the task graph" in str(error):
                raise LehrError(
                    f"the Dask cluster cannot import what it is to run; install the same lehr on scheduler and workers: {error}"
                ) from error
            raise
        finally:
            # A scheduler that died is not waited for.
            with contextlib.suppress(OSError, TimeoutError):
                result.client.close(timeout=2)

    in_thread(run, tick)


def _cancel_without_workers(result: Any) -> None:
    """Cancel a job whose workers have all gone and do not come back: the scheduler would keep it forever."""
    seen = time.monotonic()
    with contextlib.suppress(
        OSError, TimeoutError, RuntimeError, CancelledError
    ):  # the job has ended, or the scheduler
        while not all(future.done() for future in result.futures):
            if result.client.nthreads():
                seen = time.monotonic()
            elif time.monotonic() - seen > _WORKERS_S:
                log.warning("all Dask workers have gone, and none has come for %d s", _WORKERS_S)
                result.cancel()
                return
            time.sleep(1)


def _wait_for_workers(options: Any) -> int:
    """Threads of all workers that are there, at least one."""
    import distributed

    place = options.address or options.scheduler_file
    # Beam leaves Dask's own default where no time-out is given, which is no number.
    timeout = options.timeout if isinstance(options.timeout, int) else _CONNECT_S
    try:
        client = distributed.Client(address=options.address, scheduler_file=options.scheduler_file, timeout=timeout)
    except (OSError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {place}: {error}") from error
    with client:
        try:
            client.wait_for_workers(1, timeout=_WORKERS_S)
        except TimeoutError as error:
            raise InputError(
                f"the Dask scheduler at {place} has no workers after {_WORKERS_S} s; start some: dask worker {place} --nthreads 1"
            ) from error
        threads = list(client.nthreads().values())
    if max(threads) > 1:
        log.warning(
            "Dask workers have %d threads, but a process scores one unit at a time: use --nthreads 1", max(threads)
        )
    return sum(threads)


def keep_all_ends(pipeline: beam.Pipeline) -> None:
    """Join what nothing consumes, so that the last transform needs all of it.

    Raises `LehrError` for a step that would lose elements on Dask: tagged outputs, or an own `finish_bundle`.
    """
    ends = _Ends()
    pipeline.visit(ends)
    open_ends = [value for value in ends.produced if value not in ends.consumed]
    if len(open_ends) > 1:
        _ = tuple(open_ends) | "JoinEnds" >> beam.Flatten()


class _Ends(PipelineVisitor):
    def __init__(self) -> None:
        self.produced: list[beam.pvalue.PValue] = []
        self.consumed: set[beam.pvalue.PValue] = set()

    def visit_transform(self, transform_node: AppliedPTransform) -> None:
        function = getattr(transform_node.transform, "fn", None)
        own_finish = getattr(type(function), "finish_bundle", beam.DoFn.finish_bundle) is not beam.DoFn.finish_bundle
        if isinstance(function, beam.DoFn) and (len(transform_node.outputs) > 1 or own_finish):
            raise LehrError(
                f"step {transform_node.full_label} cannot run on Dask, which loses tagged outputs and bundle ends"
            )
        self.produced += [value for value in transform_node.outputs.values() if value not in self.produced]
        self.consumed.update(transform_node.inputs)
        self.consumed.update(view.pvalue for view in transform_node.side_inputs)


@contextlib.contextmanager
def _shuffles_over(partitions: int) -> Iterator[None]:
    """Beam's translation for Dask, with shuffles over so many partitions, for as long as a pipeline is translated.

    Dask's shuffle by tasks takes up to 32 for each partition and stage, and Beam leaves it a partition for each element.
    """
    from apache_beam.runners.dask import transform_evaluator
    from apache_beam.runners.dask.overrides import _GroupByKeyOnly

    plain = transform_evaluator.TRANSLATIONS[_GroupByKeyOnly]

    class GroupByKey(transform_evaluator.GroupByKey):
        def apply(self, input_bag: Any, side_inputs: Any = None) -> Any:
            return super().apply(input_bag.repartition(npartitions=min(input_bag.npartitions, partitions)))

    transform_evaluator.TRANSLATIONS[_GroupByKeyOnly] = GroupByKey
    try:
        yield
    finally:
        transform_evaluator.TRANSLATIONS[_GroupByKeyOnly] = plain
