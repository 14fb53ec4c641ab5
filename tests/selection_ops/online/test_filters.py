"""The greedy filter against a literal implementation, and its stated behaviour."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.online.filters import SCORES, greedy_filter, line_search, top_by_alignment
from tests.reference.online import greedy


def instance(seed: int, n: int = 12, k: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k)) * rng.uniform(0.3, 3.0, (n, 1))
    z[1] = z[0]  # a duplicate
    return z @ z.T, z @ rng.normal(size=k)


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("seed", range(25))
def test_equals_the_slow_implementation(score: str, seed: int) -> None:
    gram, align = instance(seed)
    for n_keep in (1, 4, 12):
        found = greedy_filter(torch.tensor(gram), torch.tensor(align), n_keep, score)
        assert list(found.chosen) == greedy(gram, align, n_keep, score)


def test_scores_choose_differently() -> None:
    """Large gradients win by `residual`, aligned ones by `normalised`; `decrease` of a first choice is cosine squared."""
    gram = np.diag([100.0, 1.0])
    align = np.array([3.0, 1.0])
    chosen = {s: greedy_filter(torch.tensor(gram), torch.tensor(align), 1, s).chosen[0] for s in SCORES}
    assert chosen == {"residual": 0, "normalised": 1, "decrease": 1}


def test_redundant_copies_are_passed_over() -> None:
    """Of two equal candidates the second explains nothing new; an independent, less aligned one comes before it."""
    z = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5]])
    target = np.array([1.0, 0.6])
    found = greedy_filter(torch.tensor(z @ z.T), torch.tensor(z @ target), 2)
    assert found.chosen == (0, 2)


def test_stops_where_nothing_is_left_to_gain() -> None:
    gram, align = torch.eye(3, dtype=torch.float64), torch.tensor([1.0, -1.0, -2.0], dtype=torch.float64)
    assert greedy_filter(gram, align, 3).chosen == (0,)
    assert greedy_filter(gram, -align.abs(), 3).chosen == ()


def test_candidates_without_gradient_are_never_chosen() -> None:
    gram = torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64))
    align = torch.tensor([0.0, 0.1], dtype=torch.float64)
    for score in SCORES:
        assert greedy_filter(gram, align, 2, score).chosen == (1,)


def test_score_column_is_the_score_at_choice() -> None:
    gram, align = instance(3)
    found = greedy_filter(torch.tensor(gram), torch.tensor(align), 4)
    first = found.chosen[0]
    # One expression of float64 operations: rounding only.
    assert float(found.score_N[first]) == pytest.approx(align[first] ** 2 / (2 * gram[first, first]), rel=1e-12)


def test_line_search_is_the_minimum_over_uniform_weights() -> None:
    gram, align = instance(5)
    chosen = (2, 4, 7)
    alpha = line_search(torch.tensor(gram), torch.tensor(align), chosen)
    w = np.zeros(12)
    w[list(chosen)] = 1

    def value(a: float) -> float:
        return 0.5 * a * a * w @ gram @ w - a * align @ w

    # A parabola's minimum: 1 % to either side is worse, or alpha is 0 and any positive is worse.
    assert value(alpha) <= min(value(alpha * 1.01 + 1e-9), value(alpha * 0.99))


def test_ties_go_to_the_first_offered() -> None:
    gram, align = torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert greedy_filter(gram, align, 2).chosen == (0, 1)
    assert top_by_alignment(align, 2) == (0, 1)


def test_unknown_score_lists_the_known() -> None:
    with pytest.raises(InputError, match="decrease, residual, normalised"):
        greedy_filter(torch.eye(1), torch.ones(1), 1, "best")
