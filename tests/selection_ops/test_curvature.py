import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.curvature import CURVATURE_COLUMNS, Spectrum, curvature_columns, describe_target, rebuild_target
from tests.reference import selection as exact

torch.set_num_threads(1)


def sketches(m: int, k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(m, k)) * (0.8 ** np.arange(k)) + 0.3 * rng.normal(size=k)


SHAPES = [(30, 64), (64, 30), (200, 40), (40, 40)]


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["centred", "empirical"])
def test_spectrum_is_that_of_the_dense_matrix(m: int, k: int, kind: str) -> None:
    z = sketches(m, k)
    spectrum = getattr(describe_target(torch.from_numpy(z)), kind)
    values, vectors, k_star = exact.dense_spectrum(z, centred=kind == "centred", energy=0.945, floor=1e-6)
    assert spectrum.k_star == k_star
    # eigh is backward stable: eigenvalues move by a few eps ||H||, here against the smallest kept, 1e-6 of the largest.
    np.testing.assert_allclose(spectrum.values_J.numpy(), values, rtol=1e-8)
    # A vector is off by eps ||H|| / gap; the projectors onto stiff need only the gap at the elbow (> 1e-3 ||H||).
    stiff = spectrum.stiff_vectors.numpy()
    np.testing.assert_allclose(stiff.T @ stiff, vectors[:, :k_star] @ vectors[:, :k_star].T, atol=1e-10)
    every = spectrum.vectors_JK.numpy()
    np.testing.assert_allclose(every @ every.T, np.eye(len(every)), atol=1e-9)  # eps x condition 1e6


def test_eigenvectors_have_their_largest_entry_positive() -> None:
    for m, k in SHAPES:
        for sign in (1.0, -1.0):
            vectors = describe_target(torch.from_numpy(sign * sketches(m, k))).centred.vectors_JK
            assert bool((vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)) > 0).all())


def test_floor_and_energy_move_null_and_elbow() -> None:
    z = torch.from_numpy(sketches(64, 30))
    strict, loose = describe_target(z, floor=1e-2), describe_target(z, floor=1e-6)
    assert strict.null_dimension > loose.null_dimension
    assert describe_target(z, energy=0.5).centred.k_star < describe_target(z, energy=0.99).centred.k_star
    assert describe_target(z, energy=1.0).centred.k_star == loose.centred.values_J.numel()


def test_centring_removes_the_mean_from_the_spectrum() -> None:
    z = sketches(100, 20)
    z += 10.0 * np.ones(20)
    geometry = describe_target(torch.from_numpy(z))
    mean = geometry.mean_K / geometry.mean_K.norm()
    # The first direction of the uncentred Fisher is the mean itself (its energy is 100 times all others').
    assert abs(float(geometry.empirical.vectors_JK[0] @ mean)) > 0.999
    assert abs(float(geometry.centred.vectors_JK[0] @ mean)) < 0.9
    assert geometry.centred.values_J.numel() == 20


def test_shares_of_the_mean_add_up() -> None:
    geometry = describe_target(torch.from_numpy(sketches(20, 64)))
    values, vectors, k_star = exact.dense_spectrum(sketches(20, 64), centred=True, energy=0.945, floor=1e-6)
    mean = sketches(20, 64).mean(axis=0)
    share = ((vectors[:, :k_star].T @ mean) ** 2).sum() / (mean @ mean)
    assert geometry.share_stiff == pytest.approx(share, rel=1e-9)  # float64, condition as above
    assert geometry.share_stiff + geometry.share_flat + geometry.share_null == pytest.approx(1.0, abs=1e-12)
    assert geometry.null_dimension == 64 - len(values)
    assert geometry.damping == pytest.approx(values.mean(), rel=1e-9)


def test_heldout_stiff_cost_uses_the_basis_of_the_other_half() -> None:
    z = sketches(40, 64)
    expected = expected_unit = in_sample = 0.0
    for own, other in ((z[0::2], z[1::2]), (z[1::2], z[0::2])):
        values, vectors, k_star = exact.dense_spectrum(own, centred=True, energy=0.945, floor=1e-6)
        weights = values[:k_star] * 64
        cost = (other @ vectors[:, :k_star]) ** 2 @ weights
        expected += cost.sum() / 40
        expected_unit += (cost / (other**2).sum(axis=1)).sum() / 40
        in_sample += ((own @ vectors[:, :k_star]) ** 2 @ weights).sum() / 40
    spectrum = describe_target(torch.from_numpy(z)).centred
    assert spectrum.heldout_cost_sum == pytest.approx(expected, rel=1e-9)
    assert spectrum.heldout_cost_unit == pytest.approx(expected_unit, rel=1e-9)
    assert abs(spectrum.heldout_cost_sum / in_sample - 1.0) > 0.01  # the two are told apart
    values, vectors, k_star = exact.dense_spectrum(z, centred=True, energy=0.945, floor=1e-6)
    cost = ((z @ vectors[:, :k_star]) ** 2 @ (values[:k_star] * 64)).mean()
    assert spectrum.in_sample_cost_sum == pytest.approx(cost, rel=1e-9)


@pytest.mark.parametrize(("m", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_curvature_columns_are_their_formulas(m: int, k: int, dtype: torch.dtype) -> None:
    z = sketches(m, k)
    geometry = describe_target(torch.from_numpy(z))
    raw = torch.from_numpy(sketches(700, k, seed=1))
    unit = (raw / raw.norm(dim=1, keepdim=True)).to(dtype)
    found = curvature_columns(unit, np.ones(700, np.float32), geometry)
    expected = exact.dense_columns(unit.double().numpy(), z, energy=0.945, floor=1e-6)
    assert set(found) == set(CURVATURE_COLUMNS)
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        # A float32 dot of k <= 64 products of unit vectors is off by at most k eps = 4e-6 of the largest value there is.
        # A share is a difference of numbers near 1, so its error is on that scale.
        scale = 1.0 if name.endswith("_energy") else np.abs(values).max()
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=5e-6 * scale, err_msg=name)


def test_columns_of_a_row_depend_on_that_row_alone() -> None:
    geometry = describe_target(torch.from_numpy(sketches(60, 32)))
    raw = torch.from_numpy(sketches(1100, 32, seed=2))
    unit = (raw / raw.norm(dim=1, keepdim=True)).half()
    together = curvature_columns(unit, np.ones(1100), geometry)
    reversed_rows = curvature_columns(unit.flip(0), np.ones(1100), geometry)
    for at in (0, 511, 512, 1099):
        alone = curvature_columns(unit[at : at + 1], np.ones(1), geometry)
        for name in CURVATURE_COLUMNS:
            scale = 1.0 if name.endswith("_energy") else np.abs(together[name]).max()
            # Kernels may sum in another order: 32 eps of float32.
            assert abs(alone[name][0] - together[name][at]) <= 4e-6 * scale
            assert abs(reversed_rows[name][1099 - at] - together[name][at]) <= 4e-6 * scale


def test_bad_and_zero_rows() -> None:
    geometry = describe_target(torch.from_numpy(sketches(60, 32)))
    unit = torch.nn.functional.normalize(torch.from_numpy(sketches(5, 32, seed=3)), dim=1).half()
    unit[1, 3] = float("nan")
    unit[2] = 0.0
    unit[3, 0] = float("inf")
    norm = np.array([1.0, 1.0, 0.0, 1.0, np.nan], np.float32)
    for name, values in curvature_columns(unit, norm, geometry).items():
        assert np.isfinite(values[0]) and values[2] == 0.0, name
        assert np.isnan(values[[1, 3, 4]]).all(), name
    assert all(len(v) == 0 for v in curvature_columns(unit[:0], norm[:0], geometry).values())


def test_geometry_is_rebuilt_from_stored_parts() -> None:
    z = torch.from_numpy(sketches(60, 32))
    made = describe_target(z)
    again = rebuild_target(z, centred=made.centred, empirical=made.empirical)
    assert again.summary() == made.summary()
    with pytest.raises(InputError, match="shape"):
        short = Spectrum(**{**vars(made.centred), "vectors_JK": made.centred.vectors_JK[:, :5]})
        rebuild_target(z, centred=short, empirical=made.empirical)


def test_small_and_degenerate_targets() -> None:
    one = describe_target(torch.from_numpy(sketches(1, 16)))
    assert one.centred.values_J.numel() == 0 and one.centred.k_star == 0 and one.null_dimension == 16
    assert one.share_null == pytest.approx(1.0)
    unit = torch.nn.functional.normalize(torch.from_numpy(sketches(4, 16, seed=1)), dim=1).float()
    columns = curvature_columns(unit, np.ones(4), one)
    # Without curvature the damped inverse is the identity.
    np.testing.assert_allclose(columns["influence"], columns["alignment"] * float(one.mean_K.norm()), rtol=1e-5)
    equal = describe_target(torch.from_numpy(np.repeat(sketches(1, 16), 6, axis=0)))
    assert equal.centred.values_J.numel() == 0 and equal.empirical.values_J.numel() == 1
    assert np.isnan(describe_target(torch.from_numpy(sketches(3, 16))).centred.heldout_cost_unit)
    assert any("M < k" in w for w in one.warnings) and any("< 50" in w for w in one.warnings)
    assert not any("M < k" in w for w in describe_target(torch.from_numpy(sketches(200, 16))).warnings)


def test_bad_targets_are_refused_with_the_reason() -> None:
    z = torch.from_numpy(sketches(6, 8))
    with pytest.raises(InputError, match="zero"):
        describe_target(torch.zeros(4, 8))
    with pytest.raises(InputError, match="mean gradient"):
        describe_target(torch.cat([z, -z]) * 0.0 + torch.tensor([[1.0], [-1.0]]).repeat(6, 8))
    bad = z.clone()
    bad[2, 1] = float("nan")
    with pytest.raises(InputError, match="row 2"):
        describe_target(bad)
    with pytest.raises(InputError, match="energy"):
        describe_target(z, energy=1.5)
    with pytest.raises(InputError, match="dimension 5"):
        curvature_columns(torch.ones(2, 5), np.ones(2), describe_target(z))
