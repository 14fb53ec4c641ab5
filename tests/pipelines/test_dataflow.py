"""A Dataflow job as it would be sent, built without the cloud: what each step asks for, what is staged, what is refused early."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.engines.dataflow import dataflow_options
from pipelines.options import Execution
from pipelines.runners import model_hints, refuse_unreachable
from schemas.errors import InputError
from schemas.run import Run
from tests.killing import ROOT

ACCELERATOR = "type:nvidia-l4;count:1;install-nvidia-driver"
OPTIONS = (
    "--project=lehr-test",
    "--region=us-central1",
    "--temp_location=gs://lehr-test-bucket/tmp",
    "--staging_location=gs://lehr-test-bucket/staging",
)
IMAGE = "--sdk_container_image=registry.example/lehr:1"
ACCELERATOR_URN, RAM_URN = "beam:resources:accelerator:v1", "beam:resources:min_ram_bytes:v1"

# Beam would look for credentials for half a minute; a process of its own keeps its runner's global state away from here.
_BUILD = """
import json, sys
import google.auth
from google.auth.credentials import AnonymousCredentials
google.auth.default = lambda *a, **k: (AnonymousCredentials(), "lehr-test")
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.dataflow.internal import apiclient
from pipelines.engines.dataflow import dataflow_pipeline
from pipelines.options import Execution
from pipelines.runners import model_hints
from tests.pipelines.dataflow_jobs import JOBS
verb, *options = sys.argv[1:]
execution = Execution(runner="dataflow", **json.loads(options.pop(0)), beam_options=tuple(options))
pipeline = dataflow_pipeline(JOBS[verb](model_hints(execution)), execution)
result = pipeline.run()
proto = pipeline.runner.proto_pipeline
pool = apiclient.Environment([], pipeline.options, "8", "gs://lehr-test-bucket/pipeline.pb", proto).proto
steps, images, staged = {}, {}, []
for transform in proto.components.transforms.values():
    if transform.environment_id and not transform.subtransforms:
        environment = proto.components.environments[transform.environment_id]
        steps[transform.unique_name] = {name: value.decode() for name, value in environment.resource_hints.items()}
        images[transform.unique_name] = environment.payload.decode(errors="replace")
        staged += [item.role_payload.decode(errors="replace") for item in environment.dependencies]
print(json.dumps({
    "state": str(result.state), "steps": steps, "images": images, "staged": sorted(set(staged)),
    "experiments": list(pool.experiments), "threads": pool.worker_pools[0].num_threads_per_worker,
    "machine": pool.worker_pools[0].machine_type,
    "main_session": pipeline.options.get_all_options()["save_main_session"],
}))
"""


def build(verb: str, *options: str, **execution: str) -> dict[str, Any]:
    """The job of a stage after a dry run, within a time limit: what Beam cannot resolve offline, it tries for minutes."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, verb, json.dumps(execution), "--dry_run=True", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "step"), [("score", "ScoreUnit"), ("target", "ScoreChunk")])
def test_the_step_that_runs_the_model_alone_asks_for_an_accelerator(verb: str, step: str) -> None:
    job = build(verb, *OPTIONS, IMAGE, "--machine_type=n1-standard-8", accelerator=ACCELERATOR, min_ram="32GB")
    assert step in job["steps"] and len(job["steps"]) > 3
    for name, hints in job["steps"].items():
        asked = {ACCELERATOR_URN: ACCELERATOR, RAM_URN: "32000000000"} if name == step else {}
        assert hints == asked, name
    assert all("registry.example/lehr:1" in payload for payload in job["images"].values())
    assert "no_use_multiple_sdk_containers" in job["experiments"]
    assert job["threads"] == 1 and job["machine"] == "n1-standard-8"
    assert job["main_session"] is False


@pytest.mark.slow
def test_the_package_is_staged_and_cpu_jobs_ask_for_nothing() -> None:
    job = build("export", *OPTIONS, "--setup_file=./setup.py")
    assert any("workflow.tar.gz" in payload for payload in job["staged"])
    assert all(hints == {} for hints in job["steps"].values())
    assert "no_use_multiple_sdk_containers" not in job["experiments"]
    assert job["threads"] == 1 and job["main_session"] is False


@pytest.mark.slow
def test_the_package_that_is_staged_holds_every_room(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=120,
    )
    [archive] = tmp_path.glob("lehr-*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    rooms = ("schemas", "selection_ops", "pipelines", "trainer", "lehr")
    sources = {str(path.relative_to(ROOT)) for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert sources <= held


def test_everything_that_is_missing_is_listed_at_once() -> None:
    with pytest.raises(InputError) as refused:
        dataflow_options(Execution(runner="DataflowRunner"))
    for name in ("project", "region", "temp_location", "staging_location", "sdk_container_image"):
        assert f"--beam-options=--{name}=" in str(refused.value)
    with pytest.raises(InputError) as refused:
        dataflow_options(Execution(runner="dataflow", beam_options=OPTIONS))
    assert str(refused.value).count("--beam-options") == 1 and "--setup_file=./setup.py" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beam_options": (*OPTIONS, "--setup_file=elsewhere/setup.py")}, "elsewhere/setup.py does not exist"),
        ({"beam_options": (*OPTIONS[:2], "--temp_location=/tmp", OPTIONS[3], IMAGE)}, "gs:// folder, not /tmp"),
        ({"beam_options": (*OPTIONS, IMAGE, "--max_num_worker=3")}, "no option --max_num_worker "),
        ({"accelerator": "nvidia-l4"}, "must look like type:nvidia-l4;count:1"),
        ({"accelerator": "type:nvidia-l4;count:4"}, "a count of 1"),
        (
            {
                "accelerator": ACCELERATOR,
                "beam_options": (*OPTIONS, IMAGE, "--dataflow_service_options=worker_accelerator=type:nvidia-l4"),
            },
            "leave the service option worker_accelerator out",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_refused(change: dict[str, Any], message: str) -> None:
    execution = Execution(runner="dataflow", beam_options=(*OPTIONS, IMAGE))
    dataflow_options(execution)
    with pytest.raises(InputError, match=message):
        dataflow_options(dataclasses.replace(execution, **change))


def test_accelerators_are_for_dataflow_and_local_places_are_not(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--accelerator is for --runner dataflow"):
        Execution(accelerator=ACCELERATOR)
    assert model_hints(Execution()) == {}
    dataflow = Execution(runner="apache_beam.runners.DataflowRunner", min_ram="8GB")
    assert dataflow.engine == "dataflow" and model_hints(dataflow) == {"min_ram": "8GB"}
    run = Run.create(str(tmp_path / "run"), corpus="tiny", root="gs://bucket/corpus")
    refuse_unreachable(run, Execution(runner="dask"))
    with pytest.raises(InputError, match=r"run directory .*run lies on this machine"):
        refuse_unreachable(run, dataflow)


def test_the_container_recipe_has_the_versions_of_the_constraints() -> None:
    recipe = (ROOT / "docs/dataflow/Dockerfile").read_text()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert f"apache/beam_python3.11_sdk:{pins['apache-beam']}" in recipe
    assert "constraints.txt" in recipe and "setup.py" in recipe
