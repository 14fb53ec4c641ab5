"""Interactions from held factors are those of whole gradients; alignments token by token add up to those of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from schemas.spec import BatchLayout
from selection_ops import exact_gram as module
from selection_ops.batching import collate
from selection_ops.engine import GradientEngine
from selection_ops.exact_gram import exact_gram
from selection_ops.model import causal_model
from selection_ops.preconditioning import SiteForm
from selection_ops.sites import MatrixParameter, Site, find_sites
from tests.families import FAMILIES, wide_arithmetic
from tests.reference.gradients import dense_gradients
from tests.selection_ops.test_coverage import samples

KINDS = ["llama-tied", "gpt2", "phi", "mixtral"]


def of_site(site: Site, gradients: dict[str, np.ndarray]) -> np.ndarray:
    assert isinstance(site.shape, MatrixParameter)
    return site.shape.matrix(torch.from_numpy(gradients[site.parameter])).numpy()


def engine_of(model: Any, **settings: Any) -> GradientEngine:
    return GradientEngine(model, find_sites(model).input_groups, proj_rank=2, k=0, seed=0, **settings)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", KINDS)
def test_interactions_are_those_of_whole_gradients(
    family: str, layout: BatchLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-10 of the largest in float64, in blocks of a few rows, of chosen samples in the order asked for, over two batches."""
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 500)
    with wide_arithmetic():
        model, items = FAMILIES[family](torch.float64), samples()
        engine = engine_of(model, hold=True)
        with engine:
            first, second = (engine.features(collate(part, layout=layout)).held for part in (items[:3], items[3:]))
        assert first is not None and second is not None
        held = [(second, 0), (first, 2), (first, 0)]
        sites = engine.matrix_sites
        found = exact_gram(held, sites, lambda site: SiteForm(), [1, 1, 1]).numpy()
        dense = [dense_gradients(causal_model(model), items[i].ids, items[i].loss_mask) for i in (3, 2, 0)]
    flat = np.stack([np.concatenate([of_site(site, g).ravel() for site in sites]) for g in dense])
    wanted = flat @ flat.T
    assert np.abs(found - wanted).max() <= 1e-10 * np.abs(wanted).max()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", KINDS)
def test_alignments_of_tokens_add_up_to_those_of_samples(family: str, layout: BatchLayout) -> None:
    """With random directions: 1e-10 of the largest in float64; nothing on padding."""
    with wide_arithmetic():
        model, items = FAMILIES[family](torch.float64), samples()
        engine = engine_of(model)
        rng = np.random.default_rng(0)
        directions = {
            site.name: rng.normal(size=(site.shape.outputs, site.shape.inputs))  # type: ignore[union-attr]
            for site in engine.matrix_sites
        }
        engine.align_with({name: torch.from_numpy(value) for name, value in directions.items()})
        with engine:
            aligned_BT = engine.features(collate(items, layout=layout)).aligned_BT
            engine.align_with(None)
            assert engine.features(collate(items, layout=layout)).aligned_BT is None
        assert aligned_BT is not None
        dense = [dense_gradients(causal_model(model), item.ids, item.loss_mask) for item in items]
    wanted = np.array([sum(np.sum(of_site(s, g) * directions[s.name]) for s in engine.matrix_sites) for g in dense])
    assert np.abs(aligned_BT.sum(1).numpy() - wanted).max() <= 1e-10 * np.abs(wanted).max()
    for row_T, item in zip(aligned_BT, items):
        assert not row_T[len(item.ids) :].any()
