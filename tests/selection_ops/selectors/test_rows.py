"""Passes over sketches: exact to float32, the same for any number of threads, and a block of memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from selection_ops.selectors import rows
from selection_ops.selectors.blocks import in_blocks
from selection_ops.selectors.greedy import greedy
from selection_ops.selectors.relaxed import SetCosine
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrix(count: int, k: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(count, k, generator=draw), dim=1).half()
    return unit, torch.randn(2, k, generator=draw, dtype=torch.float64)


def passes(unit: torch.Tensor, vectors: torch.Tensor) -> list[np.ndarray]:
    index = np.random.default_rng(0).permutation(len(unit))[: len(unit) // 2]
    return [
        rows.dot_rows(unit, vectors),
        rows.dot_rows(unit, vectors[:1]),
        rows.square_rows(unit),
        rows.gather_rows(unit, index).numpy(),
        rows.sum_rows(unit, index, np.linspace(-1, 3, len(index))).numpy(),
        rows.dot_chosen(unit, index, vectors[0]),
    ]


@pytest.mark.parametrize("count", [1, 700, 30_000])
def test_number_of_threads_changes_nothing(count: int) -> None:
    unit, vectors = matrix(count)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(passes(unit, vectors))
        assert torch.get_num_threads() == threads
    for other in found[1:]:
        assert all(np.array_equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_passes_agree_with_float64() -> None:
    unit, vectors = matrix(20_000)
    torch.set_num_threads(2)
    index = np.random.default_rng(0).permutation(len(unit))[: len(unit) // 2]
    exact = unit.double()
    dots, first, squares, gathered, total, chosen = passes(unit, vectors)
    # A float32 dot of 64 products is off by a few roundings of 6e-8 times the norms (1 and about 8).
    assert np.abs(dots - (exact @ vectors.T).numpy()).max() < 1e-5
    assert np.abs(first - (exact @ vectors[:1].T).numpy()).max() < 1e-5
    assert np.abs(squares - exact.square().sum(dim=1).numpy()).max() < 1e-6
    assert np.array_equal(gathered, unit.float().numpy()[index])
    factor = torch.linspace(-1, 3, len(index), dtype=torch.float64)
    # Blocks of 512 rows of entries near 1/8, weights up to 3: roundings of 6e-8 x 200 a block, 20 blocks.
    assert np.abs(total - (factor @ exact[index]).numpy()).max() < 1e-3
    assert np.abs(chosen - (exact[index] @ vectors[0]).numpy()).max() < 1e-5


def test_an_error_in_a_thread_is_raised_and_threads_are_restored() -> None:
    torch.set_num_threads(2)

    def work(begin: int, end: int) -> None:
        raise ValueError(f"rows {begin} to {end}")

    with pytest.raises(ValueError, match="rows 0 to"):
        rows._in_groups(30_000, work)
    assert torch.get_num_threads() == 2


def test_blocks_of_greedy_take_every_row_once_and_count_as_greedy_does() -> None:
    unit, vectors = matrix(900)
    scale = np.exp(0.5 * np.random.default_rng(0).normal(size=900))
    direction = vectors[0] / vectors[0].norm()
    alpha = (unit.double() @ direction).numpy() * scale
    index = np.arange(900)
    objective = SetCosine(direction)
    path = in_blocks(unit, index, scale, alpha, rows.square_rows(unit), objective)
    assert np.array_equal(np.sort(path.order_m), index)
    z = unit.double().numpy() * scale[:, None]
    running = np.cumsum(z[path.order_m], axis=0)
    norm = np.linalg.norm(running, axis=1)
    assert path.square_m == pytest.approx(norm**2, rel=1e-9)  # float64 sums of float32 products with 1
    assert path.objective == pytest.approx(running @ direction.numpy() / norm, rel=1e-9, abs=1e-9)
    exact = greedy(unit.float(), scale, alpha, FeasibleSet(size_n=np.ones(900), budget=900.0), objective)
    cosine = (alpha / scale)[exact.order_m]
    ranked = np.argsort(-cosine, kind="stable")
    by_cosine = np.cumsum(z[exact.order_m][ranked], axis=0)
    plain = by_cosine @ direction.numpy() / np.linalg.norm(by_cosine, axis=1)
    # A quarter of the way, blocks of a tenth have lost a small part of what exact greedy is above an order by cosine alone.
    quarter = 225
    gained = exact.objective[quarter] - plain[quarter]
    assert gained > 0.01
    assert path.objective[quarter] > plain[quarter] + 0.8 * gained


def test_cheapest_samples_are_those_of_a_full_sort() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        cost, gain = rng.integers(0, 6, 40).astype(float), rng.integers(-2, 3, 40).astype(float)
        count = int(rng.integers(1, 41))
        order = np.lexsort((-gain, cost))
        feasible = FeasibleSet(size_n=np.ones(40), budget=float(count), cost_n=cost, limit=-1.0)
        found = solve_threshold(gain, feasible)
        assert not found.feasible
        assert set(np.flatnonzero(found.weights_n)) == set(order[:count])
        assert found.smallest_limit == cost[order[:count]].sum()
