"""Dataflow: what a job there needs, asked for before anything is sent; accelerators for the steps that run the model."""

from __future__ import annotations

import os
from collections.abc import Callable

import apache_beam as beam
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    WorkerOptions,
)

from pipelines.engines.base import Job, in_thread, pipeline_options
from pipelines.options import Execution
from schemas.errors import InputError

_ONE_PROCESS = "no_use_multiple_sdk_containers"
"""Beam's experiment for one SDK process on a worker machine; otherwise there is one for each core, each with a model."""


def run_on_dataflow(job: Job, execution: Execution, tick: Callable[[], None]) -> None:
    """Send the job to Dataflow and wait for its end, whatever that is: storage says what was done."""
    pipeline = dataflow_pipeline(job, execution)
    in_thread(lambda: pipeline.run().wait_until_finish(), tick)


def dataflow_pipeline(job: Job, execution: Execution) -> beam.Pipeline:
    """The pipeline as it would be sent. Raises `InputError` with everything that is missing."""
    options = dataflow_options(execution)
    try:
        pipeline = beam.Pipeline(options=options)
    except ImportError as error:
        raise InputError(f"the runner dataflow needs pip install 'lehr[gcp]' ({error})") from error
    except ValueError as error:  # Beam's own words on a project, bucket or job name that cannot be
        raise InputError(f"Beam refuses these options for Dataflow: {error}") from error
    job.build(pipeline)
    return pipeline


def dataflow_options(execution: Execution) -> PipelineOptions:
    """Beam's options for Dataflow, completed; raises `InputError` that lists all that has to be added."""
    options = pipeline_options("--runner=DataflowRunner", *execution.beam_options)
    cloud, setup = options.view_as(GoogleCloudOptions), options.view_as(SetupOptions)
    worker, debug = options.view_as(WorkerOptions), options.view_as(DebugOptions)
    missing = [
        f"--beam-options=--{name}={example}"
        for name, value, example in (
            ("project", cloud.project, "PROJECT"),
            ("region", cloud.region, "us-central1"),
            ("temp_location", cloud.temp_location, "gs://BUCKET/tmp"),
            ("staging_location", cloud.staging_location, "gs://BUCKET/staging"),
            (
                "sdk_container_image",
                worker.sdk_container_image or setup.setup_file,
                "IMAGE, or --setup_file=./setup.py",
            ),
        )
        if not value
    ]
    if missing:
        raise InputError("Dataflow needs more options; add\n  " + "\n  ".join(missing))
    for name, place in (("temp_location", cloud.temp_location), ("staging_location", cloud.staging_location)):
        if not place.startswith("gs://"):
            raise InputError(f"--{name} of a Dataflow job is a gs:// folder, not {place}")
    if setup.setup_file and not os.path.isfile(setup.setup_file):
        raise InputError(f"--setup_file={setup.setup_file} does not exist; it is lehr's own setup.py")
    if execution.accelerator:
        _check_accelerator(execution.accelerator, cloud.dataflow_service_options or [])
        debug.add_experiment(_ONE_PROCESS)
    if debug.number_of_worker_harness_threads is None:
        # A process scores one unit at a time; more of them would only wait, each for its bundle's time limit.
        debug.number_of_worker_harness_threads = 1
    return options


def _check_accelerator(text: str, service_options: list[str]) -> None:
    pieces = dict(piece.partition(":")[::2] for piece in text.split(";"))
    if not pieces.get("type") or pieces.get("count") != "1":
        raise InputError(
            f"--accelerator {text!r} must look like type:nvidia-l4;count:1;install-nvidia-driver, with a count of 1: a worker "
            "machine runs one process, and a process uses one accelerator"
        )
    if any(option.startswith("worker_accelerator") for option in service_options):
        raise InputError(
            "--accelerator is for the steps that run the model; leave the service option worker_accelerator out"
        )
