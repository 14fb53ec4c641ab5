"""The greedy filter against a literal implementation, and its stated behaviour."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.online.filters import (
    FILTERS,
    SCORES,
    Draw,
    Filtered,
    Filtering,
    get_filter,
    line_search,
    standardised,
    top_by_score,
)
from tests.reference.online import greedy
from tests.reference.policies import boltzmann_first, pursuit, set_cosine


def run(name: str, gram: Any, align: Any, n_keep: int, score: str = "decrease", **how: Any) -> Filtered:
    """A filter by its name on plain numbers, of candidates named by their index."""
    draw = Draw(seed=how.pop("seed", 0), step=how.pop("step", 0), sample_ids=[f"id-{i}" for i in range(len(align))])
    gram, align = (torch.as_tensor(x, dtype=torch.float64) for x in (gram, align))
    return get_filter(name)(gram, align, Filtering(n_keep=n_keep, score=score, draw=draw, **how))


def greedy_filter(gram: Any, align: Any, n_keep: int, score: str = "decrease") -> Filtered:
    return run("greedy", gram, align, n_keep, score)


def vectors(seed: int, n: int = 12, k: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k)) * rng.uniform(0.3, 3.0, (n, 1))
    z[1] = z[0]  # a duplicate
    return z, rng.normal(size=k)


def instance(seed: int, n: int = 12, k: int = 8) -> tuple[np.ndarray, np.ndarray]:
    z, u = vectors(seed, n, k)
    return z @ z.T, z @ u


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
    assert top_by_score(align, 2) == (0, 1)


def test_unknown_score_lists_the_known() -> None:
    with pytest.raises(InputError, match="decrease, residual, normalised"):
        greedy_filter(torch.eye(1), torch.ones(1), 1, "best")


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("seed", range(12))
def test_pursuit_equals_the_slow_implementation(score: str, seed: int) -> None:
    """Against vectors and an active-set solver of another library, at every length, and another choice than the greedy's somewhere."""
    z, u = vectors(seed)
    for n_keep in (1, 4, 9):
        found = run("omp", z @ z.T, z @ u, n_keep, score, ridge=0.05)
        assert list(found.chosen) == pursuit(z, u, n_keep, score, 0.05)


def test_pursuit_is_not_the_greedy_and_its_ridge_counts() -> None:
    chosen = {
        (name, ridge): [run(name, *instance(seed), 6, ridge=ridge).chosen for seed in range(12)]
        for name, ridge in (("omp", 1e-3), ("omp", 3.0), ("greedy", 1e-3))
    }
    assert chosen["omp", 1e-3] != chosen["greedy", 1e-3]
    assert chosen["omp", 1e-3] != chosen["omp", 3.0]


@pytest.mark.parametrize("seed", range(12))
def test_set_cosine_equals_the_slow_implementation(seed: int) -> None:
    z, u = vectors(seed)
    for n_keep in (1, 5, 12):
        found = run("set-cosine", z @ z.T, z @ u, n_keep)
        assert list(found.chosen) == set_cosine(z, u, n_keep)
    first = found.chosen[0]
    # One quotient of float64 sums over eight entries.
    assert float(found.score_N[first]) == pytest.approx(z[first] @ u / np.linalg.norm(z[first]), rel=1e-12)


def test_filters_of_one_look() -> None:
    align = np.array([0.5, -1.0, 2.0, 0.0, 1.0])
    gram = np.diag([0.01, 1.0, 16.0, 1.0, 1.0])
    assert run("top-k", gram, align, 3).chosen == (2, 4, 0)
    assert run("cosine", gram, align, 3).chosen == (0, 4, 2)
    assert run("threshold", gram, align, 1).chosen == (2, 4, 0)
    assert run("none", gram, align, 1).chosen == (0, 1, 2, 3, 4)
    drawn = [run("random", gram, align, 2, step=step).chosen for step in range(20)]
    assert len(set(drawn)) > 5 and all(len(set(chosen)) == 2 for chosen in drawn)


def apart(counts: np.ndarray, wanted: np.ndarray) -> float:
    """How far counts are from probabilities, in standard deviations of a binomial count."""
    total = counts.sum()
    return float((np.abs(counts - total * wanted) / np.sqrt(total * wanted * (1 - wanted))).max())


@pytest.mark.parametrize("temperature", [0.3, 0.9, 3.0])
def test_boltzmann_draws_by_the_softmax_of_standardised_scores(temperature: float) -> None:
    """First draws over 600 steps against the stated probabilities, within five standard deviations."""
    z, u = vectors(4, n=5)
    align = z @ u * 1e-6  # raw scores this small would make every temperature uniform
    counts = np.zeros(5)
    for step in range(600):
        counts[run("boltzmann", z @ z.T, align, 1, "residual", temperature=temperature, step=step).chosen[0]] += 1
    assert apart(counts, boltzmann_first(align, temperature)) <= 5


def test_boltzmann_draws_the_second_by_what_the_first_left() -> None:
    """Where the best aligned was drawn first, the second follows the softmax of the residual under the line search, not that of b."""
    z, u = vectors(6, n=5)
    gram, align = z @ z.T, z @ u
    first = int(align.argmax())
    residual = align - align[first] / gram[first, first] * gram[:, first]
    rest = [j for j in range(5) if j != first]
    counts = np.zeros(5)
    for step in range(800):
        chosen = run("boltzmann", gram, align, 2, "residual", step=step).chosen
        counts[chosen[1]] += chosen[0] == first
    assert counts.sum() > 300
    assert apart(counts[rest], boltzmann_first(residual[rest], 0.9)) <= 5
    assert apart(counts[rest], boltzmann_first(align[rest], 0.9)) > 5


def test_boltzmann_at_no_temperature_is_the_greedy_and_is_seeded() -> None:
    gram, align = instance(2)
    greedy_first = run("greedy", gram, align, 4, "residual").chosen
    assert run("boltzmann", gram, align, 4, "residual", temperature=1e-9).chosen[: len(greedy_first)] == greedy_first
    base = run("boltzmann", gram, align, 4).chosen
    assert run("boltzmann", gram, align, 4).chosen == base
    assert any(run("boltzmann", gram, align, 4, seed=seed).chosen != base for seed in range(1, 5))
    assert any(run("boltzmann", gram, align, 4, step=step).chosen != base for step in range(1, 5))


def test_standardised_scores_have_mean_zero_and_deviation_one_over_the_open() -> None:
    open_N = torch.tensor([True, True, False, True])
    found = standardised(torch.tensor([1.0, 2.0, 50.0, 6.0], dtype=torch.float64), open_N)[open_N]
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-15)
    assert float(found.std(correction=0)) == pytest.approx(1.0, rel=1e-14)
    assert standardised(torch.ones(4, dtype=torch.float64), open_N).tolist() == [0.0] * 4


def test_unknown_filter_lists_the_known() -> None:
    with pytest.raises(InputError, match=", ".join(FILTERS)):
        get_filter("best")
