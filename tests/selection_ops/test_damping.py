import json

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.curvature import curvature_columns, describe_target
from selection_ops.damping import FACTORS, damping_report
from tests.reference import damping as exact

torch.set_num_threads(1)


def world(m: int = 40, k: int = 12, seed: int = 0, draws: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    scale = 0.8 ** np.arange(k)
    z = rng.normal(size=(m, k)) * scale + 0.4
    return torch.from_numpy(z), torch.from_numpy(rng.normal(size=(m, draws, k)) * scale[::-1].copy())


@pytest.mark.parametrize("kind", ["centred", "empirical", "gauss-newton"])
@pytest.mark.parametrize(("m", "k"), [(40, 12), (16, 30)])
def test_every_figure_is_that_of_the_dense_matrices(kind: str, m: int, k: int) -> None:
    z, sampled = world(m, k)
    geometry = describe_target(z, curvature=kind, sampled_MDK=sampled, floor=0.0)  # type: ignore[arg-type]
    report = damping_report(geometry, sampled)
    rows = sampled.numpy() if kind == "gauss-newton" else z.numpy()[:, None]
    assert len(report["rows"]) == len(FACTORS) + 3
    for row in report["rows"]:
        for name, value in exact.figures(z.numpy(), rows, row["damping"], kind == "centred").items():
            # float64; the inverse of C + lambda I has a condition of at most some 1e4, 1e5 times eps for sums.
            assert row[name] == pytest.approx(value, rel=1e-8), (name, row["at"])
    assert json.loads(json.dumps(report)) == report


def test_recommended_is_where_unseen_samples_gain_most() -> None:
    z, _ = world(60, 30, seed=3)
    report = damping_report(describe_target(z))
    trusted = [row for row in report["rows"] if row["trusted"]]
    assert 0 < len(trusted) < len(report["rows"])
    best = max(row["signal_heldout"] for row in trusted)
    near = [row["damping"] for row in trusted if row["signal_heldout"] >= 0.99 * best]
    assert report["recommended"] == near[-1]
    assert report["recommended_factor"] == pytest.approx(report["recommended"] / report["mean_eigenvalue"])
    # What overfits is marked: with M < k, next to no damping promises gains that unseen samples do not keep.
    few = damping_report(describe_target(world(16, 200, seed=1)[0]))["rows"]
    assert not few[0]["trusted"] and few[-1]["trusted"] and few[0]["cost_ratio"] > 2
    signals = [row["signal_in_sample"] for row in few]
    assert signals == sorted(signals, reverse=True)  # in sample, less damping always looks better


def test_many_samples_recommend_whitening_and_few_do_not() -> None:
    """One direction of large variance carries as much mean as a quiet one: whitening pays as soon as it can be estimated."""
    rng = np.random.default_rng(0)
    scale = np.array([10.0] + [1.0] * 59)
    mean = np.zeros(60)
    mean[:2] = 1.0
    many = damping_report(describe_target(torch.from_numpy(rng.normal(size=(4000, 60)) * scale + mean)))
    few = damping_report(describe_target(torch.from_numpy(rng.normal(size=(24, 60)) * scale + 3 * mean)))
    assert many["recommended_factor"] <= 3
    assert many["rows"][-1]["signal_heldout"] < 0.5 * max(row["signal_heldout"] for row in many["rows"])
    assert few["recommended_factor"] > many["recommended_factor"]


def test_too_few_and_flat_targets_say_why_nothing_is_recommended() -> None:
    few = damping_report(describe_target(world(6)[0]))
    assert few["recommended"] is None and "8 are needed" in few["reason"]
    assert few["rows"][0]["gain_ratio"] is None and few["rows"][0]["effective_dimension"] > 0
    flat = damping_report(describe_target(torch.ones(10, 4, dtype=torch.float64)))
    assert flat["rows"] == [] and "zero" in flat["reason"]
    faint = damping_report(describe_target(torch.from_numpy(np.random.default_rng(2).normal(size=(20, 50)) + 0.12)))
    assert faint["recommended"] is not None and "no damping is trusted" in faint["reason"]
    apart = torch.from_numpy(np.random.default_rng(0).normal(size=(20, 5)))
    apart[0::2] += 5.0
    apart[1::2] -= 5.0
    against = damping_report(describe_target(apart, curvature="empirical"))
    assert against["recommended"] is None and "apart" in against["reason"]


def test_damping_factor_and_curvature_change_the_columns_as_their_formulas_say() -> None:
    z, sampled = world(60, 20)
    unit = torch.nn.functional.normalize(world(30, 20, seed=9)[0], dim=1).float()

    def columns(**choice: object) -> dict[str, np.ndarray]:
        return curvature_columns(unit, np.ones(30), describe_target(z, sampled_MDK=sampled, **choice))  # type: ignore[arg-type]

    rows = {"centred": z - z.mean(0), "empirical": z, "gauss-newton": sampled.flatten(0, 1)}
    for kind, some in rows.items():
        for factor in (1.0, 0.1):
            found = columns(curvature=kind, damping_factor=factor)
            c = (some.T @ some / len(some)).numpy()
            values, vectors = np.linalg.eigh(c)
            values, vectors = values[::-1], vectors[:, ::-1]
            keep = values > 1e-6 * values[0]
            inverse = np.linalg.inv(c + factor * values[keep].mean() * np.eye(20))
            u = unit.double().numpy()
            # float32 columns of 20 products.
            np.testing.assert_allclose(found["influence"], u @ inverse @ z.mean(0).numpy(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found["quad"], np.einsum("nk,kl,nl->n", u, inverse, u), rtol=1e-4)
            k_star = int(np.searchsorted(values.cumsum(), 0.945 * values.sum())) + 1
            cost = (u @ vectors[:, :k_star]) ** 2 @ (values[:k_star] * 20)
            np.testing.assert_allclose(found["stiff_cost"], cost, rtol=1e-4)
            np.testing.assert_allclose(found["stiff_cost_empirical"], columns()["stiff_cost_empirical"])
    np.testing.assert_allclose(
        columns(curvature="empirical")["stiff_cost"], columns()["stiff_cost_empirical"], rtol=1e-5
    )


def test_heldout_cost_of_gauss_newton_is_of_the_other_halfs_own_gradients() -> None:
    z, sampled = world(40, 12)
    spectrum = describe_target(z, curvature="gauss-newton", sampled_MDK=sampled).spectrum
    assert spectrum.kind == "gauss-newton"
    expected = 0.0
    for own, other in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):
        rows = sampled[own].flatten(0, 1).numpy()
        values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
        values, vectors = values[::-1], vectors[:, ::-1]
        k_star = int(np.searchsorted(values.cumsum(), 0.945 * values.sum())) + 1
        expected += float(((z[other].numpy() @ vectors[:, :k_star]) ** 2 @ (values[:k_star] * 12)).sum()) / 40
    assert spectrum.heldout_cost_sum == pytest.approx(expected, rel=1e-9)


def test_part_of_a_target_keeps_how_it_is_described() -> None:
    z, sampled = world(40, 12)
    for kind in ("centred", "empirical", "gauss-newton"):
        whole = describe_target(z, curvature=kind, sampled_MDK=sampled, damping_factor=0.5)
        half = whole.of_rows(z[::2])
        assert (half.curvature, half.damping_factor, half.sample_count) == (kind, 0.5, 20)
        assert (half.spectrum is whole.spectrum) == (kind == "gauss-newton")


def test_bad_choices_are_refused() -> None:
    z, sampled = world(10, 5)
    with pytest.raises(InputError, match="sampled labels; describe"):
        describe_target(z, curvature="gauss-newton")
    with pytest.raises(InputError, match="centred, empirical, gauss-newton"):
        describe_target(z, curvature="hessian")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="positive multiple"):
        describe_target(z, damping_factor=0.0)
    with pytest.raises(InputError, match="shape"):
        describe_target(z, sampled_MDK=sampled[:5], curvature="gauss-newton")
    with pytest.raises(InputError, match="all zero"):
        describe_target(z, sampled_MDK=sampled * 0, curvature="gauss-newton")
