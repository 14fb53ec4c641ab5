"""Site types of other people's packages: the example of the documentation, installed, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYER = """
from torch import nn

class Doubled(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(inputs, outputs).weight.detach().double())

    def forward(self, x):
        return 2 * (x @ self.weight.T)
"""
PROGRAM = """
import torch
from my_layers import Doubled
from schemas.errors import LehrError
from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.sites import find_sites
from tests.tiny import tiny_llama

torch.set_num_threads(1)
torch.manual_seed(0)
model = tiny_llama(dtype=torch.float64)
name = "model.layers.0.mlp.down_proj"
model.model.layers[0].mlp.down_proj = Doubled(48, 32)
try:
    report = find_sites(model)
except LehrError as error:
    print("refused:", error)
    raise SystemExit
assert name in report.sites, report.unattributed[name + ".weight"]
batch = collate([Encoded(ids=[5, 9, 7, 11], loss_mask=[False, True, True, True])])
engine = GradientEngine(model, report.input_groups, proj_rank=3, k=0, seed=1)
with engine:
    found = engine.features(batch).sketch_BK[0]
loss = torch.nn.functional.cross_entropy(model(batch.ids_BT).logits[0, :-1], batch.ids_BT[0, 1:], reduction="sum")
gradient = torch.autograd.grad(loss, model.get_parameter(name + ".weight"))[0]
wanted = engine.project_dense(name, gradient).flatten()
start = 9 * report.sites.index(name)
assert torch.allclose(found[start : start + 9], wanted, rtol=1e-10), (found[start : start + 9], wanted)
print("agrees")
"""


def installed(folder: Path, site: str) -> subprocess.CompletedProcess[str]:
    """The program with a package `my-sites` installed below `folder`."""
    (folder / "my_layers.py").write_text(LAYER)
    (folder / "my_sites.py").write_text(site)
    metadata = folder / "my_sites-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-sites\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[lehr.site_types]\ndoubled = my_sites\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def documented() -> str:
    """The example of the documentation."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "concepts.md").read_text(), re.DOTALL)
    return next(block for block in blocks if "@site_type" in block)


def test_the_documented_site_type_is_found_and_exact(tmp_path: Path) -> None:
    done = installed(tmp_path, documented())
    assert done.stdout == "agrees\n", done.stderr[-2000:]


def test_a_site_type_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    done = installed(tmp_path, "import a_module_that_is_not_there\n")
    assert re.search(r"refused: site type 'doubled' \(my_sites\) of my-sites cannot be loaded", done.stdout), (
        done.stderr
    )


@pytest.mark.parametrize("factor", ["3 * x", "x"])
def test_a_wrong_report_is_seen(tmp_path: Path, factor: str) -> None:
    """The comparison above can fail."""
    done = installed(tmp_path, documented().replace("2 * x)  #", f"{factor})  #"))
    assert done.returncode and "AssertionError" in done.stderr
