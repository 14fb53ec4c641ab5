"""Weights: optimality conditions, exact answers on small problems, bounds, normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.online.filters import line_search
from selection_ops.online.weights import bounded_nnls, effective_sample_size, normalise, solve_weights
from tests.reference.online import box_quadratic


def instance(seed: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k))
    gram = z @ z.T
    return gram + 1e-3 * np.mean(np.diag(gram)) * np.eye(n), z @ (z.T @ rng.uniform(0, 1, n) + rng.normal(size=k))


def kkt(gram: np.ndarray, align: np.ndarray, w: np.ndarray, upper: float) -> float:
    """Largest violation: free weights have gradient 0, those at 0 want to fall, those at the bound want to rise."""
    slope = gram @ w - align
    worst = 0.0
    for value, s in zip(w, slope):
        if value <= 0:
            worst = max(worst, -s)
        elif value >= upper:
            worst = max(worst, s)
        else:
            worst = max(worst, abs(s))
    return worst


@pytest.mark.parametrize("n,k", [(1, 4), (5, 8), (20, 64), (64, 16)])
@pytest.mark.parametrize("seed", range(5))
def test_kkt_residual(seed: int, n: int, k: int) -> None:
    gram, align = instance(seed, n, k)
    for upper in (0.1, 1.0, 1e6):
        w = bounded_nnls(torch.tensor(gram), torch.tensor(align), upper=upper).numpy()
        assert (w >= 0).all()
        assert (w <= upper).all()
        # The solver stops at 1e-10 of |b|; its running residual drifts by rounding, far less than that again.
        assert kkt(gram, align, w, upper) <= 2e-10 * np.abs(align).max()


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_exact_solution(seed: int) -> None:
    gram, align = instance(seed, 5, 8)
    for upper in (0.3, 100.0):
        w = bounded_nnls(torch.tensor(gram), torch.tensor(align), upper=upper).numpy()
        # A KKT residual of 1e-10 |b| moves w by at most that over the smallest eigenvalue.
        slack = 2e-10 * np.abs(align).max() / np.linalg.eigvalsh(gram)[0] * 5
        assert np.abs(w - box_quadratic(gram, align, upper)).max() <= slack


def test_ridge_and_bound_change_the_weights_as_stated() -> None:
    z = np.random.default_rng(0).normal(size=(6, 4))
    gram = torch.tensor(z @ z.T)
    align = torch.tensor(z @ z.sum(0))
    alpha = line_search(gram, align, tuple(range(6)))
    loose = solve_weights(gram, align, alpha, bound=50.0)
    tight = solve_weights(gram, align, alpha, bound=1.05)
    damped = solve_weights(gram, align, alpha, bound=50.0, ridge=10.0)
    assert float(loose.max()) > 1.05 * alpha
    assert float(tight.max()) == pytest.approx(1.05 * alpha, rel=1e-15)
    assert float(damped.norm()) < float(loose.norm())
    uniform = solve_weights(gram, align, alpha, scheme="uniform")
    assert uniform.tolist() == [alpha] * 6


def test_equal_candidates_share_their_weight() -> None:
    """Two copies have a singular Gram; the ridge makes the answer unique and symmetric."""
    z = np.array([[1.0, 0.0], [1.0, 0.0]])
    gram, align = torch.tensor(z @ z.T), torch.tensor(z @ np.array([1.0, 1.0]))
    w = solve_weights(gram, align, line_search(gram, align, (0, 1)))
    # (K + 0.001 I) w = b: w = 1/2.001 each; the solver's residual 1e-10 over the ridge 1e-3.
    assert w.tolist() == pytest.approx([1 / 2.001] * 2, abs=2e-7)


def test_normalise_means_one_over_the_support() -> None:
    w = normalise(torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64))
    assert w.tolist() == [0.0, 0.5, 1.5]
    assert effective_sample_size(w) == pytest.approx(4 / 2.5, rel=1e-15)
    assert normalise(torch.zeros(2)).tolist() == [0.0, 0.0]
    assert effective_sample_size(torch.zeros(2)) == 0.0


def test_no_alignment_gives_zero() -> None:
    assert solve_weights(torch.eye(2), -torch.ones(2), 0.0).tolist() == [0.0, 0.0]


def test_unknown_scheme_lists_the_known() -> None:
    with pytest.raises(InputError, match="nnls, uniform"):
        solve_weights(torch.eye(1), torch.ones(1), 1.0, scheme="softmax")
