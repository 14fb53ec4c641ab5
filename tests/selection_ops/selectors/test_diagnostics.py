import numpy as np
import pytest
import torch

from selection_ops.curvature import describe_target
from selection_ops.selectors import Budget, SelectorSettings, effective_rank, known_selectors, select, set_cosine
from tests.reference import selection as exact
from tests.selection_ops.selectors.worlds import candidate_set, full_rows, unit_rows, world


def run(candidates, geometry, budget, **settings):
    return select(candidates, geometry, budget, SelectorSettings(**({"if_infeasible": "raise"} | settings)))


def test_set_cosine_is_that_of_the_weighted_sum() -> None:
    candidates, geometry, _ = world()
    rng = np.random.default_rng(0)
    index, weights = rng.permutation(300)[:50], rng.random(50)
    rows = full_rows(candidates)[index] * weights[:, None]
    found = set_cosine(unit_rows(candidates), candidates.norm_N, index, weights, geometry.mean_K)
    # 50 float32 products a coordinate: 50 eps.
    assert found == pytest.approx(exact.cosine(rows, geometry.mean_K.numpy()), abs=6e-6)
    assert set_cosine(unit_rows(candidates), candidates.norm_N, index[:0], weights[:0], geometry.mean_K) == 0.0
    assert set_cosine(unit_rows(candidates), candidates.norm_N, index, weights, torch.zeros(48)) == 0.0


@pytest.mark.parametrize("name", known_selectors())
@pytest.mark.parametrize("budget", [Budget(samples=30), Budget(tokens=700)])
def test_every_selection_is_judged_alike(name: str, budget: Budget) -> None:
    candidates, geometry, target = world()
    found = run(candidates, geometry, budget, selector=name)
    report, rows = found.diagnostics, full_rows(candidates)
    cosine = exact.cosine(rows[found.order_n], target.mean(axis=0))
    assert report["set_cosine"] == pytest.approx(cosine, abs=1e-5)
    assert cosine <= report["set_cosine_bound"] <= 1.0
    assert len(report["set_cosine_heldout_folds"]) == 2
    unit = unit_rows(candidates).double().numpy()[found.order_n]
    gram = unit @ unit.T
    assert report["effective_rank"] == pytest.approx(np.trace(gram) ** 2 / (gram**2).sum(), rel=1e-4)
    share = (candidates.domain[found.order_n] == "a").mean()
    assert report["domains"]["a"]["after"] == pytest.approx(share) and report["domains"]["a"]["before"] == 0.5
    tokens = candidates.tokens_N
    in_a = candidates.domain == "a"
    assert report["domains"]["a"]["before_tokens"] == pytest.approx(tokens[in_a].sum() / tokens.sum())
    assert report["share_stiff"] + report["share_flat"] + report["share_null"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["target-cosine", "random", "match", "direct-signed"])
def test_two_fold_judges_by_rows_the_selection_has_not_seen(name: str) -> None:
    candidates, geometry, target = world()
    rows = full_rows(candidates)
    found = run(candidates, geometry, Budget(samples=30), selector=name).diagnostics
    expected = []
    for own, other in ((target[0::2], target[1::2]), (target[1::2], target[0::2])):
        half = describe_target(torch.from_numpy(own))
        chosen = run(candidates, half, Budget(samples=30), selector=name, two_fold=False, few_targets=True)
        expected.append(exact.cosine(rows[chosen.order_n], other.mean(axis=0)))
    assert found["set_cosine_heldout_folds"] == pytest.approx(expected, abs=1e-5)
    assert found["set_cosine_heldout"] == pytest.approx(np.mean(expected), abs=1e-5)


def test_two_fold_does_not_believe_columns_of_the_whole_target() -> None:
    candidates, geometry, _ = world()
    stored = candidate_set(
        full_rows(candidates),
        unit_NK=candidates.unit_NK,
        norm_N=candidates.norm_N,
        tokens_N=candidates.tokens_N,
        alignment=np.random.default_rng(0).normal(size=300),
    )
    fresh, misled = (
        run(c, geometry, Budget(samples=30), selector="target-cosine", bound=False) for c in (candidates, stored)
    )
    assert set(fresh.order_n) != set(misled.order_n)
    assert fresh.diagnostics["set_cosine_heldout"] == misled.diagnostics["set_cosine_heldout"]


def supply_world(clean: int = 40, seed: int = 0):
    """`clean` rows along the target, each with noise of its own; the rest share a little of it and more of something else."""
    rng = np.random.default_rng(seed)
    mean = np.zeros(64)
    mean[0] = 1.0
    rows = 0.2 * rng.normal(size=(400, 64)) / 8
    rows[:clean] += mean
    rows[clean:, 0] += 0.15
    rows[clean:, 1] += 1.0
    target = mean + 0.5 * rng.normal(size=(60, 64)) / 8
    return candidate_set(rows / np.linalg.norm(rows, axis=1)[:, None]), describe_target(torch.from_numpy(target))


def test_supply_peak_is_found_and_passing_it_is_warned_of() -> None:
    candidates, geometry = supply_world()
    far = run(candidates, geometry, Budget(samples=120)).diagnostics
    assert 30 <= far["supply_peak"] <= 42
    assert any("far past the supply" in warning for warning in far["warnings"])
    within = run(candidates, geometry, Budget(samples=40)).diagnostics
    assert not any("far past the supply" in warning for warning in within["warnings"])
    in_tokens = run(candidates, geometry, Budget(tokens=1200)).diagnostics
    assert in_tokens["supply_peak_tokens"] == pytest.approx(10 * in_tokens["supply_peak"])
    assert any("tokens" in warning for warning in in_tokens["warnings"] if "far past" in warning)


def test_supply_curve_is_the_mean_of_both_folds() -> None:
    candidates, geometry = supply_world()
    found = run(candidates, geometry, Budget(samples=50)).diagnostics
    rows, target = full_rows(candidates), geometry.target_MK.numpy()
    halves = target[0::2].mean(axis=0), target[1::2].mean(axis=0)
    curve = np.zeros(50)
    for own, other in (halves, halves[::-1]):
        near = np.sort(np.argsort(-(rows @ own))[:100])
        path = near[exact.greedy_set(rows[near], own, 50)]
        curve += [exact.cosine(rows[path[: n + 1]], other) / 2 for n in range(50)]
    for at, value in found["supply_curve"]:
        assert value == pytest.approx(curve[at - 1], abs=1e-4)  # near ties may be taken in another order
    assert found["supply_peak_cosine"] == pytest.approx(curve.max(), abs=1e-4)


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7.0)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1.0, rel=1e-6)
    assert effective_rank(torch.eye(3).repeat(4, 1)) == pytest.approx(3.0)
    assert effective_rank(torch.zeros(0, 3)) == 0.0 and effective_rank(torch.zeros(2, 3)) == 0.0


def test_what_cannot_be_computed_is_said() -> None:
    candidates, _, target = world()
    alone = run(candidates, describe_target(torch.from_numpy(target[:1])), Budget(samples=10)).diagnostics
    assert alone["set_cosine_heldout"] is None and any("cannot be split" in w for w in alone["warnings"])
    none = run(candidates, None, Budget(samples=10), selector="random").diagnostics
    assert "set_cosine" not in none and none["effective_rank"] > 1
    off = run(candidates, describe_target(torch.from_numpy(target)), Budget(samples=10), bound=False, two_fold=False)
    assert "set_cosine_bound" not in off.diagnostics and "set_cosine_heldout" not in off.diagnostics


def test_fractional_token_selections_warn_of_what_they_read() -> None:
    candidates, geometry, _ = world()
    found = run(candidates, geometry, Budget(tokens=700), fractional=True)
    assert candidates.tokens_N[found.order_n] @ found.weights_n <= 700 + 1e-6
    assert found.diagnostics["selected_tokens"] > 700
    assert any("training reads" in warning for warning in found.diagnostics["warnings"])
