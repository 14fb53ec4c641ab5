"""Projections and the fold."""

from __future__ import annotations

import numpy as np
import torch

from schemas.spec import InputGroup
from selection_ops.projections import Fold, ProjectionSpec, input_projection, output_projection
from tests.reference.gradients import fold_matrix, projection

SPEC = ProjectionSpec(proj_rank=3, seed=5, version=1, k=16)
CPU = torch.device("cpu")


def groups(*names: str) -> tuple[InputGroup, ...]:
    return tuple(InputGroup(name=name, sites=(name,)) for name in names)


def test_projections_are_those_of_the_definition() -> None:
    assert np.array_equal(input_projection(SPEC, "g", 7).numpy(), projection(5, 1, "g", "in", 3, 7))
    assert np.array_equal(output_projection(SPEC, "s", 7).numpy(), projection(5, 1, "s", "out", 3, 7))


def test_fold_is_the_count_sketch_of_the_definition() -> None:
    flat_BS = torch.randn(5, 27, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = fold_matrix(5, 1, ["a", "b", "c"], 3, 16)
    folded = Fold(SPEC, groups("a", "b", "c"), CPU, torch.float64)(flat_BS)
    # At most 27 additions of numbers of size 1 in float64.
    assert np.abs(folded.numpy() - flat_BS.numpy() @ matrix.T).max() < 1e-13


def test_invariant_2_adding_a_site_moves_nothing() -> None:
    """A new site only adds its own numbers: with zeros in its place the fold is what it was without it."""
    flat_BS = torch.randn(4, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    without = Fold(SPEC, groups("a", "b"), CPU, torch.float64)(flat_BS)
    zeros_BS = torch.zeros(4, 9, dtype=torch.float64)
    wider_BS = torch.cat([flat_BS[:, :9], zeros_BS, flat_BS[:, 9:]], 1)
    fold = Fold(SPEC, groups("a", "new", "b"), CPU, torch.float64)
    # The same few numbers of size 1, perhaps added in another order.
    assert float((fold(wider_BS) - without).abs().max()) < 1e-14
    wider_BS[:, 9] = 1.0
    assert int((fold(wider_BS) - without).abs().gt(0.5).sum()) == len(
        flat_BS
    )  # one number, in one bucket of each sample


def test_fold_of_nothing_keeps_every_site() -> None:
    flat_BS = torch.randn(2, 18)
    spec = ProjectionSpec(proj_rank=3, seed=5, version=1, k=0)
    assert torch.equal(Fold(spec, groups("a", "b"), CPU, torch.float32)(flat_BS), flat_BS)


def test_fold_of_a_sample_does_not_depend_on_its_batch() -> None:
    flat_BS = torch.randn(6, 18, generator=torch.Generator().manual_seed(2))
    fold = Fold(SPEC, groups("a", "b"), CPU, torch.float32)
    alone = torch.cat([fold(row[None]) for row in flat_BS])
    assert torch.equal(fold(flat_BS), alone)


def test_sketches_keep_inner_products_in_expectation() -> None:
    """Mean over seeds of <sketch(G), sketch(H)> against <G, H>: P and the fold together are unbiased."""
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(6, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    values = []
    for seed in range(3000):
        spec = ProjectionSpec(proj_rank=3, seed=seed, version=1, k=8)
        left, right = output_projection(spec, "a", 6), input_projection(spec, "a", 5)
        flat = torch.stack([(left @ g @ right.T).flatten() for g in (one, other)])
        folded = Fold(spec, groups("a"), CPU, torch.float64)(flat)
        values.append(float(folded[0] @ folded[1]))
    error = float(np.std(values)) / 3000**0.5
    assert error < 0.5  # the test can see a bias of a few percent of |G||H|, about 25
    assert abs(float(np.mean(values)) - float((one * other).sum())) < 5 * error
