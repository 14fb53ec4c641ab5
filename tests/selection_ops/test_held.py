"""Weighted gradients formed from held factors, for every parameter of every family, against autograd's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from schemas.spec import BatchLayout
from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.model import causal_model
from selection_ops.sites import find_sites
from tests.families import FAMILIES, wide_arithmetic
from tests.reference.gradients import sample_loss
from tests.selection_ops.test_coverage import samples

WEIGHTS = ((0.7, 0.0, 1.9, 1.1, 0.0), (1.0, 1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 2.5, 0.0, 0.0))


def formed(
    model: Any, items: list[Encoded], weights: tuple[float, ...], layout: BatchLayout
) -> dict[str, torch.Tensor]:
    """The weighted gradient by the engine, of all trainable parameters."""
    report = find_sites(model)
    engine = GradientEngine(model, report.input_groups, proj_rank=2, k=0, seed=0, hold=True)
    assert not engine.unheld
    with engine:
        held = engine.features(collate(items, layout=layout)).held
    assert held is not None and held.bytes > 0
    named = dict(causal_model(model).named_parameters())
    gradients = {name: torch.zeros_like(p) for name, p in named.items() if p.requires_grad}
    held.add_weighted(torch.tensor(weights, dtype=torch.float64), gradients)
    return gradients


def autograd(model: Any, items: list[Encoded], weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """The same by autograd, sample by sample."""
    model = causal_model(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = sum(w * sample_loss(model, item.ids, item.loss_mask) for item, w in zip(items, weights))
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)  # type: ignore[arg-type]
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found)}


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], negligible: float) -> dict[str, float]:
    """Error of every parameter's gradient relative to its norm; what is all rounding is measured against the whole gradient's."""
    assert found.keys() == wanted.keys()
    whole = float(torch.stack([g.double().norm() for g in wanted.values()]).norm())
    return {
        name: float((found[name] - g).double().norm()) / max(float(g.double().norm()), negligible * whole)
        for name, g in wanted.items()
    }


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_invariant_3_every_weighted_gradient_is_autograd_s(family: str, weights: tuple[float, ...]) -> None:
    """Invariant 3, 1e-10 in float64. A key's bias has no gradient but rounding: 1e-6 of the whole counts as none."""
    with wide_arithmetic():
        model, items = FAMILIES[family](torch.float64), samples()
        errors = worst(formed(model, items, weights, "padded"), autograd(model, items, weights), 1e-6)
    assert max(errors.values()) < 1e-10, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "phi", "gemma2"])
def test_packed_samples_give_the_same_weighted_gradient(family: str) -> None:
    """As padded: every row of a token has its sample's weight."""
    with wide_arithmetic():
        model, items = FAMILIES[family](torch.float64), samples()
        errors = worst(formed(model, items, WEIGHTS[0], "packed"), autograd(model, items, WEIGHTS[0]), 1e-6)
    assert max(errors.values()) < 1e-10, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "mamba"])
def test_float32_is_exact_to_rounding(family: str) -> None:
    """1e-5: sums over some ten tokens, amplified by two blocks."""
    model, items = FAMILIES[family](torch.float32), samples()
    errors = worst(formed(model, items, WEIGHTS[0], "padded"), autograd(model, items, WEIGHTS[0]), 1e-4)
    assert max(errors.values()) < 1e-5, max(errors, key=errors.__getitem__)
