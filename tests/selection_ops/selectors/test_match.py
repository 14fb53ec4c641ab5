import itertools

import numpy as np
import pytest
import torch

from schemas.errors import InfeasibleError, InputError
from selection_ops.curvature import describe_target
from selection_ops.selectors import Budget, SelectorSettings, select
from selection_ops.selectors.greedy import greedy
from selection_ops.selectors.relaxed import SetCosine, exact_step
from selection_ops.selectors.threshold import FeasibleSet
from tests.reference import selection as exact
from tests.selection_ops.selectors.worlds import candidate_set, full_rows, permuted, unit_rows, world

MEAN_ONLY = {"two_fold": False}


def run(candidates, geometry, budget, **settings):
    return select(candidates, geometry, budget, SelectorSettings(**settings))


def tiny(seed: int, n: int = 9, k: int = 5):
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=k)
    return candidate_set(rng.normal(size=(n, k)) + 0.5 * mean), describe_target(torch.from_numpy(mean[None]))


@pytest.mark.parametrize("seed", range(12))
def test_greedy_is_greedy_by_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, direction = rng.normal(size=(40, 7)), rng.normal(size=7)
    direction /= np.linalg.norm(direction)
    unit = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).float()
    scale = np.linalg.norm(rows, axis=1)
    stored = unit.double().numpy() * scale[:, None]
    gain = unit.double().numpy() @ direction
    objective = SetCosine(torch.from_numpy(direction))
    path = greedy(unit, scale, gain * scale, FeasibleSet(size_n=np.ones(40), budget=15.0), objective)
    assert path.order_m.tolist() == exact.greedy_set(stored, direction, 15)
    for count in (1, 7, 15):
        chosen = stored[path.order_m[:count]]
        # Gram columns are float32 dots of unit rows: 7 eps, summed over 15 additions of norms up to 5.
        assert path.objective[count - 1] == pytest.approx(exact.cosine(chosen, direction), abs=1e-5)
        assert path.square_m[count - 1] == pytest.approx((chosen.sum(axis=0) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize("seed", range(15))
def test_set_lies_between_top_cosine_and_the_best_set_and_the_bound_above(seed: int) -> None:
    candidates, geometry = tiny(seed)
    rows, mean = full_rows(candidates), geometry.mean_K.numpy()
    found = run(candidates, geometry, Budget(samples=4), shortlist=0.0, max_iterations=400, **MEAN_ONLY)
    best, _ = exact.best_set(rows, mean, 4)
    top = exact.cosine(rows[np.argsort(-(rows @ mean) / np.linalg.norm(rows, axis=1))[:4]], mean)
    relaxed = exact.relaxed_cosine(rows, mean, 4)
    reached = exact.cosine(rows[found.order_n], mean)
    bound = found.certificate["bound"]
    assert top - 1e-9 <= reached <= best + 1e-9
    assert found.diagnostics["set_cosine"] == pytest.approx(reached, abs=1e-6)  # float32 rows of 4
    assert best <= bound + 1e-9
    # The true relaxed optimum is below the bound too, and Frank-Wolfe has come near it (error 2 C / passes).
    assert relaxed <= bound + 1e-6
    assert found.certificate["objective_relaxed"] <= relaxed + 1e-6
    assert bound - relaxed <= 0.02


def test_where_greedy_is_provably_best_it_is_found() -> None:
    # Orthogonal rows of equal norm: f = sum of alpha / root of K, so the K largest alpha are best, and greedy takes them.
    rows = np.eye(8)
    mean = np.array([3.0, 1.0, 7.0, 2.0, 5.0, -1.0, 4.0, 6.0])
    candidates, geometry = candidate_set(rows), describe_target(torch.from_numpy(mean[None]))
    for count in range(1, 8):
        found = run(candidates, geometry, Budget(samples=count), **MEAN_ONLY)
        _, best = exact.best_set(rows, mean, count)
        assert sorted(found.order_n.tolist()) == sorted(best)
    single, one = tiny(3)
    assert (
        tuple(run(single, one, Budget(samples=1), **MEAN_ONLY).order_n)
        == exact.best_set(full_rows(single), one.mean_K.numpy(), 1)[1]
    )


def test_complementary_rows_beat_the_top_by_cosine() -> None:
    mean = np.array([1.0, 0.0, 0.0])
    rows = np.array([[1.0, 0.50, 0], [1.0, 0.51, 0], [1.0, 0.52, 0], [1.0, -0.9, 0], [0.0, 0, 1.0], [-1, 0, 0]])
    candidates, geometry = candidate_set(rows), describe_target(torch.from_numpy(mean[None]))
    found = run(candidates, geometry, Budget(samples=2), **MEAN_ONLY)
    assert sorted(found.order_n.tolist()) == [0, 3]
    assert found.certificate["chosen_by"] == "greedy"
    assert found.certificate["objective"] > found.certificate["objective_top_cosine"] + 0.03


@pytest.mark.parametrize("budget", [Budget(samples=60), Budget(tokens=2000)])
@pytest.mark.parametrize("seed", range(4))
def test_long_shortlists_go_through_frank_wolfe_and_come_near_greedy(seed: int, budget: Budget) -> None:
    candidates, geometry, _ = world(seed=seed)
    by_greedy = run(candidates, geometry, budget, shortlist=0.0, **MEAN_ONLY)
    by_wolfe = run(candidates, geometry, budget, shortlist=0.0, greedy_rows=280, **MEAN_ONLY)
    assert by_wolfe.certificate["greedy_rows"] < 280 < by_greedy.certificate["greedy_rows"]
    mean = geometry.mean_K.numpy()
    full, proposed = (exact.cosine(full_rows(candidates)[s.order_n], mean) for s in (by_greedy, by_wolfe))
    assert proposed >= by_wolfe.certificate["objective_top_cosine"] - 1e-6
    assert proposed >= full - 0.01  # measured: at most 0.004 on these pools
    for solution in (by_greedy, by_wolfe):
        assert max(full, proposed) <= solution.certificate["bound"] + 1e-9
        steps = solution.certificate["objective_per_iteration"]
        assert all(after >= before - 1e-7 for before, after in itertools.pairwise(steps))  # exact line search


def test_exact_step_is_the_best_step() -> None:
    rng = np.random.default_rng(0)
    grid = np.linspace(0.0, 1.0, 2001)
    for _ in range(100):
        s, d, g = (torch.from_numpy(rng.normal(size=6)) for _ in range(3))
        g = g / g.norm()
        s = s + 1.5 * g  # <s, g> > 0, where f is quasi-concave

        def f(step: float, s: torch.Tensor = s, d: torch.Tensor = d, g: torch.Tensor = g) -> float:
            moved = s + step * d
            return float(moved @ g / moved.norm())

        if float(s @ g) > 0:
            assert f(exact_step(s, d, g)) >= max(f(step) for step in grid) - 1e-12


def test_bound_holds_for_a_token_budget() -> None:
    for seed in range(10):
        candidates, geometry = tiny(seed)
        tokens = np.random.default_rng(seed).integers(3, 9, 9)
        candidates = candidate_set(full_rows(candidates), tokens_N=tokens)
        found = run(candidates, geometry, Budget(tokens=20), shortlist=0.0, **MEAN_ONLY)
        spent = tokens[found.order_n].sum()
        assert spent <= 20
        rows, mean = full_rows(candidates), geometry.mean_K.numpy()
        for mask in range(1, 2**9):
            chosen = [i for i in range(9) if mask >> i & 1]
            if spent <= tokens[chosen].sum() <= 20:
                assert exact.cosine(rows[chosen], mean) <= found.certificate["bound"] + 1e-9


def test_shortlist_limits_what_is_considered() -> None:
    candidates, geometry, _ = world()
    near = run(candidates, geometry, Budget(samples=20), shortlist=1.0, **MEAN_ONLY)
    wide = run(candidates, geometry, Budget(samples=20), shortlist=4.0, **MEAN_ONLY)
    cosine = run(candidates, geometry, Budget(samples=20), selector="target-cosine", **MEAN_ONLY)
    assert set(near.order_n) == set(cosine.order_n) and set(near.order_n) != set(wide.order_n)
    assert (near.reason_N == "outside_shortlist").sum() == 280 and (wide.reason_N == "outside_shortlist").sum() == 220
    assert wide.certificate["objective"] > near.certificate["objective"]


def test_rows_sum_counts_magnitude_and_rows_unit_does_not() -> None:
    mean = np.array([1.0, 0.0])
    rows = np.array([[8.0, 4.0], [1.0, -0.6], [8.0, -4.9], [0.1, -0.05]])
    candidates, geometry = candidate_set(rows), describe_target(torch.from_numpy(mean[None]))
    loud = run(candidates, geometry, Budget(samples=2), rows="sum", shortlist=0.0, **MEAN_ONLY)
    quiet = run(candidates, geometry, Budget(samples=2), rows="unit", shortlist=0.0, **MEAN_ONLY)
    assert set(loud.order_n) == {0, 2}  # (16, -0.9) is the best sum
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert exact.cosine(unit[quiet.order_n], mean) == pytest.approx(exact.best_set(unit, mean, 2)[0], abs=1e-6)
    assert set(quiet.order_n) == {0, 3}


@pytest.mark.parametrize("gain", ["flat+null", "flat", "damped"])
def test_gain_changes_the_direction_as_stated(gain: str) -> None:
    candidates, geometry, target = world(m=200)
    found = run(candidates, geometry, Budget(samples=20), gain=gain, **MEAN_ONLY)
    values, vectors, k_star = exact.dense_spectrum(target, centred=True, energy=0.945, floor=1e-6)
    mean = target.mean(axis=0)
    stiff, flat = vectors[:, :k_star], vectors[:, k_star:]
    fisher = exact.dense_fisher(target, centred=True)
    direction = {
        "flat+null": mean - stiff @ (stiff.T @ mean),
        "flat": flat @ (flat.T @ mean),
        "damped": np.linalg.solve(fisher + values.mean() * np.eye(len(mean)), mean),
    }[gain]
    plain = run(candidates, geometry, Budget(samples=20), **MEAN_ONLY)
    rows = full_rows(candidates)
    assert found.certificate["objective"] == pytest.approx(exact.cosine(rows[found.order_n], direction), abs=1e-5)
    assert exact.cosine(rows[found.order_n], direction) > exact.cosine(rows[plain.order_n], direction)


def test_contrast_pulls_away_from_the_swapped_target() -> None:
    candidates, _, target = world()
    swapped = target.mean(axis=0) + 0.8 * np.random.default_rng(1).normal(size=48)
    geometry = describe_target(torch.from_numpy(target), swapped_mean_K=torch.from_numpy(swapped))
    away = target.mean(axis=0) - swapped
    rows = full_rows(candidates)
    reached = [
        exact.cosine(
            rows[run(candidates, geometry, Budget(samples=20), contrast=c, contrast_weight=w, **MEAN_ONLY).order_n],
            away,
        )
        for c, w in (("none", 1.0), ("swap", 0.5), ("swap", 2.0))
    ]
    assert reached[0] < reached[1] < reached[2]
    without = describe_target(torch.from_numpy(target))
    with pytest.raises(InputError, match="swapped"):
        run(candidates, without, Budget(samples=20), contrast="swap", **MEAN_ONLY)


@pytest.mark.parametrize("budget", [Budget(samples=25), Budget(tokens=600)])
@pytest.mark.parametrize("rows", ["sum", "unit"])
def test_stiff_limit_is_kept_and_costs_objective(budget: Budget, rows: str) -> None:
    candidates, geometry, target = world()
    free = run(candidates, geometry, budget, rows=rows, **MEAN_ONLY)
    dense = exact.dense_columns(unit_rows(candidates).double().numpy(), target, energy=0.945, floor=1e-6)["stiff_cost"]
    cost = dense * (candidates.norm_N.astype(float) ** 2 if rows == "sum" else 1.0)
    limit = 0.7 * cost[free.order_n].sum()
    settings = {"rows": rows, "stiff_limit": limit, "stiff_limit_kind": "absolute", **MEAN_ONLY}
    tight = run(candidates, geometry, budget, **settings)
    assert cost[tight.order_n].sum() <= limit * (1 + 1e-5)  # float32 columns against float64
    assert tight.certificate["cost"] <= limit
    assert tight.certificate["objective"] < free.certificate["objective"]
    assert len(tight.order_n) == 25 or budget.unit == "tokens"
    assert tight.certificate["bound"] >= tight.certificate["objective"]


def test_infeasible_limits_stop_or_are_raised() -> None:
    candidates, geometry, _ = world()
    settings = {"stiff_limit": 1e-3, "stiff_limit_kind": "absolute", **MEAN_ONLY}
    with pytest.raises(InfeasibleError, match="smallest feasible limit"):
        run(candidates, geometry, Budget(samples=20), **settings)
    found = run(candidates, geometry, Budget(samples=20), if_infeasible="raise", **settings)
    assert found.certificate["cost"] <= found.certificate["limit"]
    assert found.certificate["limit_raised_by"] == pytest.approx(found.certificate["smallest_feasible_limit"] / 1e-3)
    assert any("raised by a factor" in warning for warning in found.diagnostics["warnings"])
    # Only one set meets the raised limit, and greedy reaches it without help.
    assert found.certificate["chosen_by"] == "greedy" and found.certificate["greedy_steps"] == 20


def test_allow_short_stops_at_the_peak() -> None:
    candidates, geometry, _ = world()
    full = run(candidates, geometry, Budget(samples=250), shortlist=0.0, **MEAN_ONLY)
    short = run(candidates, geometry, Budget(samples=250), shortlist=0.0, allow_short=True, **MEAN_ONLY)
    assert len(full.order_n) == 250 and 1 <= len(short.order_n) < 250
    assert short.certificate["objective"] > full.certificate["objective"]
    assert short.certificate["bound"] >= short.certificate["objective"]


def test_fractional_weights_are_those_of_the_relaxed_problem() -> None:
    candidates, geometry, _ = world(n=120, k=24)
    whole = run(candidates, geometry, Budget(samples=20), **MEAN_ONLY)
    found = run(candidates, geometry, Budget(samples=20), fractional=True, **MEAN_ONLY)
    assert ((found.weights_n > 0) & (found.weights_n <= 1)).all() and (found.weights_n < 1).any()
    # Weights below 1e-3 are dropped, at most 120 of them.
    assert found.weights_n.sum() == pytest.approx(20.0, abs=0.12)
    assert found.certificate["objective"] > whole.certificate["objective"]
    assert found.certificate["bound"] >= found.certificate["objective"]
    assert (whole.weights_n == 1.0).all()


def test_quotas_and_floors_shape_the_set() -> None:
    candidates, geometry, _ = world()
    for budget in (Budget(samples=20), Budget(tokens=700)):
        size = candidates.tokens_N if budget.unit == "tokens" else np.ones(300)
        capped = run(candidates, geometry, budget, quotas={"a": 0.25}, **MEAN_ONLY)
        in_a = candidates.domain[capped.order_n] == "a"
        assert size[capped.order_n][in_a].sum() <= 0.25 * budget.amount
        floored = run(candidates, geometry, budget, floors={"a": 0.8}, **MEAN_ONLY)
        in_a = candidates.domain[floored.order_n] == "a"
        slack = 60 if budget.unit == "tokens" else 0  # one sample
        assert size[floored.order_n][in_a].sum() >= 0.8 * budget.amount - slack
    with pytest.raises(InputError, match="known: a, b"):
        run(candidates, geometry, Budget(samples=20), quotas={"c": 0.5}, **MEAN_ONLY)
    with pytest.raises(InfeasibleError, match="quotas"):
        run(candidates, geometry, Budget(samples=20), quotas={"a": 0.1, "b": 0.1}, **MEAN_ONLY)


@pytest.mark.parametrize("seed", range(4))
def test_floors_are_reached_under_a_tight_limit(seed: int) -> None:
    candidates, geometry, _ = world(seed=seed)
    for factor in (0.1, 0.3, 0.5):
        limit = {"stiff_limit": factor, "stiff_limit_kind": "pool", "if_infeasible": "raise"}
        found = run(candidates, geometry, Budget(tokens=600), floors={"b": 0.6}, **limit, **MEAN_ONLY)
        in_b = candidates.domain[found.order_n] == "b"
        assert candidates.tokens_N[found.order_n][in_b].sum() > 360 - 60  # to within one sample
        assert found.certificate["cost"] <= found.certificate["limit"]


@pytest.mark.parametrize("budget", [Budget(samples=25), Budget(tokens=500)])
def test_order_of_rows_does_not_matter(budget: Budget) -> None:
    candidates, geometry, _ = world()
    found = run(candidates, geometry, budget)
    order = np.random.default_rng(7).permutation(300)
    other = run(permuted(candidates, order), geometry, budget)
    assert candidates.sample_id[found.order_n].tolist() == candidates.sample_id[order][other.order_n].tolist()
    assert (found.reason_N[order] == other.reason_N).all()


def test_equal_rows_are_taken_in_the_order_of_ids() -> None:
    rows = np.tile([[1.0, 0.2], [1.0, -0.2]], (4, 1))
    ids = np.array(["h", "c", "b", "e", "d", "a", "f", "g"])
    candidates = candidate_set(rows, sample_id=ids)
    geometry = describe_target(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    found = run(candidates, geometry, Budget(samples=4), shortlist=0.0, **MEAN_ONLY)
    # Odd rows are mirror images of even ones: two of each, of smallest id.
    assert sorted(ids[found.order_n].tolist()) == ["a", "b", "c", "d"]


def test_rows_may_lie_in_a_memory_mapped_file(tmp_path) -> None:
    candidates, geometry, _ = world(n=1300, seed=2)
    path = tmp_path / "unit.npy"
    np.save(path, unit_rows(candidates).half().numpy())
    mapped = torch.from_numpy(np.load(path, mmap_mode="r+"))
    held = unit_rows(candidates).half()
    results = [
        run(candidate_set(full_rows(candidates), unit_NK=unit), geometry, Budget(samples=40), **MEAN_ONLY)
        for unit in (mapped, held)
    ]
    assert results[0].order_n.tolist() == results[1].order_n.tolist()
