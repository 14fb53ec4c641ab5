import numpy as np
import pytest
import torch

from selection_ops.sketch_theory import float16_variance, fold_variance, projection_variance
from tests.reference import sketch_moments as exact

torch.set_num_threads(1)
PAIR = torch.tensor([[0, 1]])


def matrices(seed: int, sites: int, outputs: int = 2, inputs: int = 2) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return tuple([rng.normal(size=(outputs, inputs)) for _ in range(sites)] for _ in range(2))  # type: ignore[return-value]


def stacked(gs: list[np.ndarray], hs: list[np.ndarray]) -> dict[str, torch.Tensor]:
    return {f"site{i}": torch.from_numpy(np.stack([g, h])) for i, (g, h) in enumerate(zip(gs, hs))}


@pytest.mark.parametrize(
    ("sites", "outputs", "inputs", "rank"), [(1, 2, 3, 1), (1, 3, 2, 2), (2, 2, 2, 1), (2, 1, 3, 2), (2, 2, 2, 2)]
)
def test_projection_variance_is_that_of_every_outcome(sites: int, outputs: int, inputs: int, rank: int) -> None:
    gs, hs = matrices(sites + 10 * rank, sites, outputs, inputs)
    outcomes = exact.projected_products(gs, hs, rank)
    # Unbiased, and the variance is a finite sum in float64: rounding of some hundred terms.
    assert outcomes.mean() == pytest.approx(sum(float((g * h).sum()) for g, h in zip(gs, hs)), rel=1e-10)
    assert float(projection_variance(stacked(gs, hs), PAIR, rank)[0]) == pytest.approx(outcomes.var(), rel=1e-9)


def test_projection_variance_of_a_norm_and_of_many_pairs() -> None:
    gs, hs = matrices(3, 1)
    pairs = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]] * 6)  # more than are gathered at a time
    found = projection_variance(stacked(gs, hs), pairs, 2)
    assert float(found[0]) == pytest.approx(exact.projected_products(gs, gs, 2).var(), rel=1e-9)
    assert float(found[1]) == pytest.approx(float(found[3]), rel=1e-12)
    torch.testing.assert_close(found[:4], found[-4:])


def test_probes_estimate_the_same_without_bias() -> None:
    gs, hs = matrices(5, 2, 6, 5)
    whole = float(projection_variance(stacked(gs, hs), PAIR, 4)[0])
    some = [float(projection_variance(stacked(gs, hs), PAIR, 4, probes=4, seed=seed)[0]) for seed in range(400)]
    # 400 estimates: their mean is off by their spread over 20, three times that in one of 370 tries.
    assert abs(np.mean(some) - whole) < 3 * np.std(some) / 20
    assert np.std(some) > 0


def test_vectors_have_no_variance() -> None:
    assert float(projection_variance({"norm": torch.randn(2, 5)}, PAIR, 4)[0]) == 0.0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_fold_variance_is_that_of_every_outcome(k: int) -> None:
    rng = np.random.default_rng(k)
    x, y = rng.normal(size=4), rng.normal(size=4)
    outcomes = exact.folded_products(x, y, k)
    assert outcomes.mean() == pytest.approx(x @ y, rel=1e-9)
    assert float(fold_variance(torch.from_numpy(np.stack([x, y])), PAIR, k)[0]) == pytest.approx(
        outcomes.var(), rel=1e-9
    )
    assert float(fold_variance(torch.from_numpy(np.stack([x, y])), PAIR, 0)[0]) == 0.0


def test_float16_variance_is_what_rounding_does() -> None:
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(60, 2048, dtype=torch.float64), dim=1)
    pairs = torch.triu_indices(60, 60, 1).T
    errors = (unit.half().double() @ unit.half().double().T - unit @ unit.T)[pairs[:, 0], pairs[:, 1]]
    ratio = float(errors.square().mean() / float16_variance(unit, pairs).mean())
    # The bound takes numbers at the bottom of their binade, where 2^-11 is reached; over a binade the mean square of the
    # relative step is about half of that.
    assert 0.3 < ratio < 1.0
