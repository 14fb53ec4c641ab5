"""Weights: optimality conditions, exact answers on small problems, bounds, normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.online.filters import line_search
from selection_ops.online.weights import (
    SCHEMES,
    bounded_nnls,
    effective_sample_size,
    normalise,
    simplex_least_squares,
    solve_weights,
)
from tests.reference.online import box_quadratic
from tests.reference.policies import non_negative, simplex


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
    with pytest.raises(InputError, match=", ".join(SCHEMES)):
        solve_weights(torch.eye(1), torch.ones(1), 1.0, scheme="softmax")


@pytest.mark.parametrize("seed", range(12))
def test_simplex_equals_the_exact_solution(seed: int) -> None:
    """Every support tried: float64 systems of condition at most 1e4, 1e-9 of the total."""
    gram, align = instance(seed, 6, 8)
    for total in (0.2, 3.0, 50.0):
        w = simplex_least_squares(torch.tensor(gram), torch.tensor(align), total=total).numpy()
        assert (w >= 0).all()
        assert w.sum() == pytest.approx(total, rel=1e-12)
        assert np.abs(w - simplex(gram, align, total)).max() <= 1e-9 * total


@pytest.mark.parametrize("n,k", [(1, 4), (30, 64), (64, 16)])
def test_simplex_is_optimal_where_supports_cannot_be_tried(n: int, k: int) -> None:
    """One multiplier on the support, at least as large outside."""
    for seed in range(4):
        gram, align = instance(seed, n, k)
        w = simplex_least_squares(torch.tensor(gram), torch.tensor(align), total=2.0).numpy()
        slope = align - gram @ w
        level = slope[w > 0]
        # float64 solves of systems whose condition the ridge bounds by 1e5.
        slack = 1e-8 * np.abs(align).max()
        assert level.max() - level.min() <= slack
        assert slope.max() <= level.max() + slack


@pytest.mark.parametrize("seed", range(8))
def test_schemes_are_what_they_say(seed: int) -> None:
    """By vectors: unbounded is regularised NNLS of another library, signed a linear solve, simplex has uniform's sum."""
    rng = np.random.default_rng(seed)
    z, u = rng.normal(size=(6, 9)), rng.normal(size=9)
    u = u if z.sum(0) @ u > 0 else -u
    gram, align = torch.tensor(z @ z.T), torch.tensor(z @ u)
    alpha = line_search(gram, align, tuple(range(6)))
    lift = 0.02 * np.mean((z**2).sum(1))
    found = {name: solve_weights(gram, align, alpha, scheme=name, ridge=0.02, bound=1.2).numpy() for name in SCHEMES}
    # KKT residual 1e-10 |b| over the smallest eigenvalue, at least the ridge.
    slack = 1e-10 * np.abs(z @ u).max() * 6 / lift * 2
    assert np.abs(found["unbounded"] - non_negative(z, u, 0.02)).max() <= slack
    assert np.abs(found["signed"] - np.linalg.solve(z @ z.T + lift * np.eye(6), z @ u)).max() <= 1e-10
    assert (found["signed"] < 0).any() or (found["signed"] == pytest.approx(found["unbounded"], abs=slack))
    assert found["simplex"].sum() == pytest.approx(found["uniform"].sum(), rel=1e-12)
    assert np.abs(found["simplex"] - simplex(z @ z.T + lift * np.eye(6), z @ u, 6 * alpha)).max() <= 1e-9
    assert found["nnls"].max() <= 1.2 * alpha * (1 + 1e-12)
    assert found["unbounded"].max() > 1.2 * alpha


def test_signed_weights_are_scaled_by_their_sizes() -> None:
    w = normalise(torch.tensor([3.0, -1.0, 0.0], dtype=torch.float64))
    assert w.tolist() == [1.5, -0.5, 0.0]
    assert effective_sample_size(w) == pytest.approx(4 / 2.5, rel=1e-15)


def test_candidates_without_gradients_get_no_weight() -> None:
    for scheme in SCHEMES:
        assert solve_weights(torch.zeros(2, 2), torch.zeros(2), 0.0, scheme=scheme).tolist() == [0.0, 0.0]
