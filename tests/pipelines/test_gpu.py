"""A scoring by a worker that holds an accelerator, by the real command. Runs where there is one (`make test-gpu`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pipelines.geometry import full_sketches
from tests.pipelines.worlds import World, make_world

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator on this machine"),
]


def scored(folder: Path, *, accelerator: bool) -> World:
    """Target and corpus scored by `lehr`, in processes that see an accelerator or none."""
    world = make_world(folder, rows=40)
    environment = {"CUDA_VISIBLE_DEVICES": "0" if accelerator else ""}
    common = ["--dtype", "float32", "--attention", "sdpa", "--k", "64", "--proj-rank", "4", "--batch-tokens", "512"]
    lehr = [sys.executable, "-m", "lehr"]
    target = [*lehr, "target", world.run.url, "--data", str(world.target), "--model", str(world.model), *common]
    for command in (target, [*lehr, "score", world.run.url]):
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return world


def test_a_pipeline_on_an_accelerator_gives_the_cpu_s_features(tmp_path: Path) -> None:
    """float32 products, TF32 allowed by nobody: 1e-3 with what float16 storage rounds (2^-11 of a row)."""
    worlds = [scored(tmp_path / name, accelerator=name == "gpu") for name in ("gpu", "cpu")]
    parts = [part for part in worlds[0].run.manifest("score", "base").parts if part.path.startswith("features/")]
    assert parts
    for part in parts:
        there, here = (pq.read_table(f"{world.run.url}/{part.path}") for world in worlds)
        assert there["sample_id"].equals(here["sample_id"])
        if there.num_rows:
            wanted = full_sketches(here)
            off = (full_sketches(there) - wanted).norm(dim=1) / wanted.norm(dim=1)
            assert float(off.max()) < 1e-3
