"""Every parameter of every family, against dense per-sample gradients by autograd."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine, SampleFeatures
from selection_ops.model import causal_model
from selection_ops.sites import MatrixParameter, Site, SiteReport, find_sites, search
from tests.families import FAMILIES, wide_arithmetic
from tests.reference.gradients import projection, sample_loss

RANK, SEED = 3, 11


def samples() -> list[Encoded]:
    rng = random.Random(0)
    made = []
    for length in (9, 4, 13, 2, 9):
        mask = [False] + [rng.random() < 0.7 for _ in range(length - 2)] + [True]
        made.append(Encoded(ids=[rng.randrange(3, 400) for _ in range(length)], loss_mask=mask))
    return made


def engine_of(model: Any, report: SiteReport) -> GradientEngine:
    return GradientEngine(model, report.input_groups, report.small, proj_rank=RANK, k=0, seed=SEED)


def features(model: Any, report: SiteReport, items: list[Encoded]) -> SampleFeatures:
    with engine_of(model, report) as engine:
        return engine.features(collate(items))


def parts(model: Any, sites: dict[str, Site], report: SiteReport, item: Encoded) -> list[np.ndarray]:
    """P_out G P_in^T of every matrix and the gradient of every small parameter of one sample, G by autograd."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(sample_loss(model, item.ids, item.loss_mask), [p for _, p in named], allow_unused=True)
    gradients = {name: (torch.zeros_like(p) if g is None else g).double().numpy() for (name, p), g in zip(named, found)}
    pieces = []
    for group in report.input_groups:
        for name in group.sites:
            shape = sites[name].shape
            assert isinstance(shape, MatrixParameter)
            gradient = gradients[sites[name].parameter]
            index = shape.name.partition(".")[2]
            gradient = gradient[int(index)] if index else gradient
            gradient_OI = gradient.T if shape.transposed else gradient
            p_out = projection(SEED, 1, name, "out", RANK, gradient_OI.shape[0])
            pieces.append(
                (p_out @ gradient_OI @ projection(SEED, 1, group.name, "in", RANK, gradient_OI.shape[1]).T).ravel()
            )
    return [*pieces, *(gradients[site.name].ravel() for site in report.small)]


def relative(found_BK: torch.Tensor, wanted_BK: np.ndarray) -> float:
    """Largest relative error of a row."""
    wanted = torch.as_tensor(wanted_BK)
    return float(((found_BK.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_invariant_3_every_parameter_is_the_projected_dense_gradient(family: str) -> None:
    """Invariant 3, 1e-10: contractions of some ten terms of 1e-16, amplified by two blocks. Site by site, so that no small
    gradient hides behind a large one."""
    with wide_arithmetic():
        model, items = FAMILIES[family](torch.float64), samples()
        report = find_sites(model, "all")
        found_BK = features(model, report, items).sketch_BK
        model = causal_model(model)
        sites = {site.name: site for site in search(model).matrices}
        wanted = [parts(model, sites, report, item) for item in items]
    sizes = [len(part) for part in wanted[0]]
    for index, found in enumerate(found_BK.split(sizes, dim=1)):
        exact = np.stack([row[index] for row in wanted])
        scale = np.linalg.norm(exact)
        # A key's bias has no gradient but rounding: the softmax does not see it.
        assert float((found - torch.as_tensor(exact)).norm()) <= 1e-10 * scale + 1e-13 * float(found_BK.norm()), index
    if not family.startswith("lora"):
        assert not report.unattributed
        assert report.coverage == 1
    else:
        assert set(report.unattributed.values()) == {"frozen: its requires_grad is False"}
        assert all("lora_" in name for name in report.sites)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_invariant_1_every_parameter_depends_on_the_sample_alone(family: str) -> None:
    """float32, 1e-5: alone and in a padded batch; and the blocks' part of it is what `blocks` alone gives."""
    model, items = FAMILIES[family](torch.float32), samples()
    report, blocks = find_sites(model, "all"), find_sites(model)
    with engine_of(model, report) as engine:
        together = engine.features(collate(items))
        alone = torch.cat([engine.features(collate([item])).sketch_BK for item in items])
    # Experts are chosen by comparing numbers: a tie within rounding could turn over, and none does here.
    assert relative(together.sketch_BK, alone.double().numpy()) < 1e-5
    wanted = features(model, blocks, items).sketch_BK
    at = {name: index for index, name in enumerate(report.sites)}
    columns = torch.cat([torch.arange(at[name] * RANK**2, (at[name] + 1) * RANK**2) for name in blocks.sites])
    # The same group of sites may be named after another member, and then has other signs.
    same = [g.name for g in report.input_groups if set(g.sites) & set(blocks.sites)] == [
        g.name for g in blocks.input_groups
    ]
    assert same
    assert relative(together.sketch_BK[:, columns], wanted.double().numpy()) < 1e-5


@pytest.mark.parametrize("family", ["llama-tied", "neox", "mixtral", "mamba"])
def test_invariant_1_every_parameter_in_bfloat16(family: str) -> None:
    """Against the float32 model of the same weights: measured 0.01-0.03 relative."""
    narrow = FAMILIES[family](torch.bfloat16)
    wide = FAMILIES[family](torch.bfloat16).float()
    report, items = find_sites(narrow, "all"), samples()
    exact = features(wide, report, items).sketch_BK
    assert relative(features(narrow, report, items).sketch_BK, exact.double().numpy()) < 0.1


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "mamba", "gemma"])
def test_nothing_remains_on_the_modules_of_any_type(family: str) -> None:
    """Forwards and parameters are the model's own again, also after an error inside."""
    model = FAMILIES[family](torch.float32)
    before = [(sorted(m.__dict__), dict(m._parameters), len(m._forward_hooks)) for m in model.modules()]
    report = find_sites(model, "all")
    features(model, report, samples())
    with pytest.raises(IndexError):
        features(model, report, [Encoded(ids=[3, 4000, 5], loss_mask=[False, True, True])])
    after = [(sorted(m.__dict__), dict(m._parameters), len(m._forward_hooks)) for m in model.modules()]
    for (keys, parameters, hooks), (new_keys, new_parameters, new_hooks) in zip(before, after):
        assert (keys, hooks) == (new_keys, new_hooks)
        assert all(new_parameters[name] is parameter for name, parameter in parameters.items())
