"""The engine on an accelerator: the same signs, the same sketches, budgets that fit. Runs where there is one (`make test-gpu`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from selection_ops.batch_budget import find_batch_tokens
from selection_ops.batching import BatchLayout, collate
from selection_ops.engine import GradientEngine
from selection_ops.projections import Fold, ProjectionSpec
from selection_ops.signs import buckets, signs
from selection_ops.sites import find_sites
from tests.families import FAMILIES
from tests.selection_ops.test_coverage import samples
from tests.tiny import tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator on this machine"),
]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Products in float32 as on the CPU, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_invariant_2_signs_are_the_same_on_an_accelerator() -> None:
    """Integers: bitwise, over sizes beyond one block of any kernel."""
    for name, side, shape in (("model.layers.0.mlp.up_proj", "out", (16, 100_003)), ("q", "in", (64, 7))):
        here, there = (signs(3, 1, name, side, shape, device) for device in ("cpu", "cuda"))
        assert torch.equal(here, there.cpu())
    for here_part, there_part in zip(buckets(3, 1, "q", 70_001, 2048), buckets(3, 1, "q", 70_001, 2048, "cuda")):
        assert torch.equal(here_part, there_part.cpu())


def test_the_fold_adds_in_one_order() -> None:
    """Twice the same bytes on the accelerator, and the CPU's to float32's rounding of a sum of some hundred terms."""
    report = find_sites(tiny_llama())
    spec = ProjectionSpec(proj_rank=16, seed=0, version=1, k=64)
    flat_BS = torch.randn(5, len(report.sites) * 256, generator=torch.Generator().manual_seed(0))
    here = Fold(spec, report.input_groups, torch.device("cpu"), torch.float32)(flat_BS)
    fold = Fold(spec, report.input_groups, torch.device("cuda"), torch.float32)
    there, again = fold(flat_BS.cuda()), fold(flat_BS.cuda())
    assert torch.equal(there, again)
    assert float((there.cpu() - here).norm() / here.norm()) < 1e-6


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "padded") for family in ("llama-tied", "gpt2", "mixtral", "gemma2", "mamba", "lora")),
        *((family, "packed") for family in ("llama-tied", "gpt2", "mixtral", "gemma2", "lora")),
    ],
)
def test_invariant_3_sketches_are_those_of_the_cpu(family: str, layout: BatchLayout) -> None:
    """Against the CPU's float64: 1e-5, what float32 is allowed anywhere (measured on CPU: 1e-6)."""
    items = samples()
    wide, narrow = FAMILIES[family](torch.float64), FAMILIES[family](torch.float64).float().to("cuda")
    report = find_sites(wide, "all")
    rows = []
    for model, device in ((wide, "cpu"), (narrow, "cuda")):
        engine = GradientEngine(model, report.input_groups, report.small, proj_rank=3, k=0, seed=1)
        with engine:
            rows.append(engine.features(collate(items, device=device, layout=layout)).sketch_BK.double().cpu())
    assert float(((rows[1] - rows[0]).norm(dim=1) / rows[0].norm(dim=1)).max()) < 1e-5


def test_a_budget_is_found_and_fits() -> None:
    model: Any = tiny_llama(dtype=torch.bfloat16)
    model.to("cuda")
    engine = GradientEngine(model, proj_rank=4, k=64, seed=0)
    search = find_batch_tokens(engine, max_tokens=256)
    assert search.batch_tokens in [tried.batch_tokens for tried in search.tries]
    assert search.stopped
