import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.curvature import curvature_columns, describe_target
from selection_ops.quality import Products, choose_pairs, overlap, pair_errors, rms, spearman, top
from tests.reference import selection as exact

torch.set_num_threads(1)


def world(seed: int = 0, n: int = 25, m: int = 12, k: int = 40) -> tuple[np.ndarray, np.ndarray, Products]:
    rng = np.random.default_rng(seed)
    scale = 0.9 ** np.arange(k)
    rows, target = rng.normal(size=(n, k)) * scale + 0.2, rng.normal(size=(m, k)) * scale + 0.3
    both = np.concatenate([rows, target])
    return rows, target, Products.of_gram(torch.from_numpy(both @ both.T), n)


def test_alignment_is_the_cosine_with_the_mean() -> None:
    rows, target, products = world()
    mean = target.mean(axis=0)
    expected = rows @ mean / np.linalg.norm(rows, axis=1) / np.linalg.norm(mean)
    np.testing.assert_allclose(products.alignment_N.numpy(), expected, rtol=1e-12)  # float64, some 40 terms


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("energy", [0.6, 0.945])
def test_stiff_costs_from_inner_products_are_those_of_the_dense_vectors(centred: bool, energy: float) -> None:
    rows, target, products = world()
    values, vectors, k_star = exact.dense_spectrum(target, centred=centred, energy=energy, floor=1e-6)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found, found_k = products.stiff_costs(centred=centred, energy=energy)
    assert found_k == k_star
    # eigh of a matrix of condition 1e6 at most: 1e-16 x 1e6 on the smallest, far less on the stiff ones.
    np.testing.assert_allclose(found.numpy(), (unit @ vectors[:, :k_star]) ** 2 @ values[:k_star], rtol=1e-9)


def test_stiff_costs_are_those_of_the_stored_column() -> None:
    rows, target, products = world()
    unit = torch.nn.functional.normalize(torch.from_numpy(rows), dim=1)
    columns = curvature_columns(unit, np.ones(len(rows)), describe_target(torch.from_numpy(target)))
    # The column is float32 and carries the factor k.
    np.testing.assert_allclose(products.stiff_costs()[0].numpy() * 40, columns["stiff_cost"], rtol=1e-5)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_match_is_greedy_by_definition(unit_rows: bool) -> None:
    rows, target, products = world(3)
    used = rows / np.linalg.norm(rows, axis=1, keepdims=True) if unit_rows else rows
    assert products.match(9, unit_rows=unit_rows) == exact.greedy_set(used, target.mean(axis=0), 9)
    assert products.match(9, unit_rows=True) != products.match(9)


def test_spearman_against_ranks_by_hand() -> None:
    assert spearman(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 25.0, 99.0])) == pytest.approx(1.0)
    assert spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, -1.0])) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5 over sqrt(4.5 x 5).
    ties = spearman(torch.tensor([1.0, 5.0, 5.0, 9.0]), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert ties == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))
    with pytest.raises(InputError, match="3 with 2"):
        spearman(torch.ones(3), torch.ones(2))


def test_top_overlap_pairs_and_errors() -> None:
    assert top(torch.tensor([0.1, 3.0, 2.0, 3.0]), 2) == [1, 3]
    assert overlap([1, 3], [3, 2]) == 0.5
    assert len(choose_pairs(5, 100, 0)) == 10
    some = choose_pairs(40, 30, 1)
    assert len(some) == 30 and bool((some[:, 0] < some[:, 1]).all()) and len({tuple(p) for p in some.tolist()}) == 30
    assert not torch.equal(some, choose_pairs(40, 30, 2))
    gram = torch.tensor([[4.0, 1.0], [1.0, 9.0]])
    found = pair_errors(gram + torch.tensor([[0.0, 3.0], [3.0, 0.0]]), gram, torch.tensor([[0, 1]]))
    assert float(found[0]) == pytest.approx(3.0 / 6.0)
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(np.sqrt(12.5))
