import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.curvature import curvature_columns, describe_target
from selection_ops.selectors import Budget, SelectorSettings, select
from selection_ops.selectors.greedy import greedy
from selection_ops.selectors.redundancy import PenalisedGain, nearest_samples
from selection_ops.selectors.relaxed import Relaxed
from selection_ops.selectors.threshold import FeasibleSet
from tests.reference import selection as exact
from tests.selection_ops.selectors.worlds import candidate_set, full_rows, permuted, unit_rows, world

FREE: dict[str, Any] = {"stiff_limit": 1e6, "stiff_limit_kind": "absolute"}
TIGHT: dict[str, Any] = {"stiff_limit": 0.7, "stiff_limit_kind": "pool", "if_infeasible": "raise"}
BUDGETS = [Budget(samples=25), Budget(tokens=600)]


def run(candidates, geometry, budget, **settings):
    defaults: dict[str, Any] = {"selector": "direct-signed", "two_fold": False, "bound": False, "few_targets": True}
    return select(candidates, geometry, budget, SelectorSettings(**(defaults | settings)))


def tiny(seed: int, n: int = 10, k: int = 5, tokens: bool = False):
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=k)
    geometry = describe_target(torch.from_numpy(mean + rng.normal(size=(12, k)) * np.geomspace(1.5, 0.1, k)))
    lengths = rng.integers(3, 9, n) if tokens else np.full(n, 10)
    return candidate_set(rng.normal(size=(n, k)) + 0.5 * mean, tokens_N=lengths), geometry


def unit(candidates) -> np.ndarray:
    return unit_rows(candidates).double().numpy()


def stiff_cost(candidates, geometry) -> np.ndarray:
    target = geometry.target_MK.numpy()
    return exact.dense_columns(unit(candidates), target, energy=0.945, floor=1e-6)["stiff_cost"]


@pytest.mark.parametrize("limit", ["free", "tight"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_relaxed_optimum_is_that_of_the_quadratic_program(seed: int, tokens: bool, limit: str) -> None:
    candidates, geometry = tiny(seed, n=14, tokens=tokens)
    budget = Budget(tokens=30) if tokens else Budget(samples=5)
    size = candidates.tokens_N.astype(float) if tokens else np.ones(14)
    binding = 0
    for redundancy in (0.3, 1.0, 3.0):
        settings = FREE if limit == "free" else TIGHT
        found = run(candidates, geometry, budget, redundancy=redundancy, max_iterations=4000, **settings).certificate
        best, weights = exact.relaxed_penalised_gain(
            unit(candidates),
            geometry.mean_K.numpy(),
            found["redundancy_rho"],
            size,
            float(budget.amount),
            equality=not tokens,
            cost=stiff_cost(candidates, geometry),
            limit=found["limit"],
        )
        gain = np.abs(unit(candidates) @ geometry.mean_K.numpy()).max() / np.linalg.norm(geometry.mean_K.numpy()) * 5
        # Gains and costs are float32 dots here, 1e-6 of the largest sum; the limit may move the optimum by as much.
        assert found["objective_relaxed"] <= best + 1e-5 * gain
        assert best <= found["bound"] + 1e-5 * gain
        # Frank-Wolfe falls as 1/passes: 4000 of them leave less than this of the curvature constant rho diameter^2.
        assert found["bound"] - best <= 5e-3 * max(1.0, redundancy) * gain
        assert found["frank_wolfe_gap"] == pytest.approx(found["bound"] - found["objective_relaxed"], abs=1e-12)
        steps = found["objective_per_iteration"]
        assert all(after >= before - 1e-9 for before, after in itertools.pairwise(steps))  # exact line search
        binding += stiff_cost(candidates, geometry) @ weights > found["limit"] * (1 - 1e-4)
    assert binding or limit == "free" or tokens


def test_quotas_and_floors_hold_in_the_relaxed_problem() -> None:
    for seed, (name, share) in itertools.product(range(4), (("quotas", 0.2), ("floors", 0.8))):
        candidates, geometry = tiny(seed, n=14)
        settings = {name: {"a": share}, "redundancy": 1.0, "max_iterations": 4000}
        found = run(candidates, geometry, Budget(samples=5), **FREE, **settings)
        chosen = (candidates.domain[found.order_n] == "a").sum()
        assert chosen <= 1 if name == "quotas" else chosen >= 4
        member = candidates.domain == "a"
        bounds: dict[str, Any] = {"cap": 1.0} if name == "quotas" else {"floor": 4.0}
        rho, mean = found.certificate["redundancy_rho"], geometry.mean_K.numpy()
        best, _ = exact.relaxed_penalised_gain(
            unit(candidates), mean, rho, np.ones(14), 5.0, equality=True, member=member, **bounds
        )
        assert found.certificate["objective_relaxed"] <= best + 1e-5  # float32 dots of 5 unit rows
        assert best - 1e-5 <= found.certificate["bound"] <= best + 0.02  # 4000 passes of Frank-Wolfe


@pytest.mark.parametrize("rows", ["unit", "sum"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_set_lies_between_the_plain_set_and_the_best_and_the_bound_above(seed: int, tokens: bool, rows: str) -> None:
    candidates, geometry = tiny(seed, tokens=tokens)
    budget = Budget(tokens=21) if tokens else Budget(samples=4)
    z = unit(candidates) if rows == "unit" else full_rows(candidates)
    mean = geometry.mean_K.numpy()
    cost = stiff_cost(candidates, geometry) * (1.0 if rows == "unit" else candidates.norm_N.astype(float) ** 2)
    for redundancy, limits in itertools.product((0.3, 1.0, 3.0), (FREE, TIGHT)):
        settings = {"rows": rows, "redundancy": redundancy} | limits
        found = run(candidates, geometry, budget, **settings)
        plain = run(candidates, geometry, budget, **(settings | {"redundancy": 0.0}))
        certificate = found.certificate
        rho, limit = certificate["redundancy_rho"], certificate["limit"]
        best = -np.inf
        for mask in range(2 ** len(z)):
            chosen = [i for i in range(len(z)) if mask >> i & 1]
            fits = candidates.tokens_N[chosen].sum() <= 21 if tokens else len(chosen) == 4
            if fits and cost[chosen].sum() <= limit * (1 + 1e-6):
                best = max(best, exact.penalised_gain(z[chosen], mean, rho))
        reached = exact.penalised_gain(z[found.order_n], mean, rho)
        scale = np.linalg.norm(z, axis=1).sum()
        rounding = 1e-6 * scale * (1.0 + rho * scale)  # float32 rows in float32 sums
        assert certificate["objective"] == pytest.approx(reached, abs=rounding)
        assert exact.penalised_gain(z[plain.order_n], mean, rho) - rounding <= reached <= best + rounding
        assert best <= certificate["bound"] + rounding
        assert cost[found.order_n].sum() <= limit * (1 + 1e-6)
        total = z[found.order_n].sum(axis=0)
        assert certificate["gain"] == pytest.approx(total @ mean / np.linalg.norm(mean), abs=rounding)
        assert certificate["sum_norm"] == pytest.approx(np.linalg.norm(total), abs=rounding)


@pytest.mark.parametrize("rows", ["unit", "sum"])
def test_redundancy_is_measured_by_the_selection_without_it(rows: str) -> None:
    candidates, geometry, target = world()
    z, mean = unit(candidates) if rows == "unit" else full_rows(candidates), target.mean(axis=0)
    total = z[np.argsort(-(z @ mean))[:25]].sum(axis=0)
    gain = total @ mean / np.linalg.norm(mean)
    for redundancy in (0.5, 1.0, 2.0):
        found = run(candidates, geometry, Budget(samples=25), rows=rows, redundancy=redundancy, **FREE).certificate
        # Sums of float32 rows: 1e-6 relative, and twice that in a square.
        assert found["redundancy_rho"] == pytest.approx(redundancy * gain / (total @ total), rel=1e-5)
        assert found["objective_without_redundancy"] == pytest.approx(gain * (1 - redundancy / 2), abs=1e-5 * gain)
    longer = replace(candidates, norm_N=candidates.norm_N * np.float32(8.0), grad_norm_N=candidates.grad_norm_N * 8)
    settings = {"rows": rows, "redundancy": 1.0, "stiff_limit": 1.0, "stiff_limit_kind": "pool"}
    first, second = (run(c, geometry, Budget(samples=25), **settings).order_n.tolist() for c in (candidates, longer))
    assert first == second


def test_a_larger_redundancy_never_lengthens_the_relaxed_sum() -> None:
    for seed, limits, budget in itertools.product(range(3), (FREE, TIGHT), BUDGETS):
        candidates, geometry, _ = world(seed=seed)
        runs = [
            run(candidates, geometry, budget, redundancy=r, max_iterations=60, **limits).certificate
            for r in (0.1, 0.3, 1.0, 3.0, 10.0)
        ]
        for low, high in itertools.pairwise(runs):
            # Adding F_low(w_low) >= F_low(w_high) - gap_low to the same of `high` leaves
            # (rho_high - rho_low) / 2 (||s_high||^2 - ||s_low||^2) <= gap_low + gap_high.
            slack = 2.0 * (low["frank_wolfe_gap"] + high["frank_wolfe_gap"])
            slack /= high["redundancy_rho"] - low["redundancy_rho"]
            assert high["sum_norm_relaxed"] ** 2 <= low["sum_norm_relaxed"] ** 2 + slack
        norms = [found["sum_norm_relaxed"] for found in runs]
        assert norms[-1] < 0.5 * norms[0]  # and it does shorten


def test_every_rounding_is_the_best_somewhere_under_a_tight_limit() -> None:
    wins: dict[str, int] = {}
    for seed, redundancy, factor, budget in itertools.product(range(4), (0.1, 1.0, 3.0), (0.4, 0.7), BUDGETS):
        candidates, geometry, _ = world(seed=seed)
        settings = TIGHT | {"stiff_limit": factor}
        certificate = run(candidates, geometry, budget, redundancy=redundancy, **settings).certificate
        if certificate["mu"] > 0:
            wins[certificate["chosen_by"]] = wins.get(certificate["chosen_by"], 0) + 1
    assert wins["greedy"] > 10 and wins["nearest to the relaxed weights"] > 4 and wins["without redundancy"] > 0, wins


def test_nearest_samples_spend_no_more_than_the_weights_and_keep_the_limit() -> None:
    weights = np.array([0.9, 0.1, 1.0, 0.6, 0.4, 0.8])
    relaxed = Relaxed(
        weights_n=weights, sum_K=torch.zeros(2), price_n=weights, objective=[0.0], bound=0.0, mu=0.0, nu=0.0
    )
    size = np.array([5.0, 5, 5, 5, 5, 5])
    tokens = FeasibleSet(size_n=size, budget=28.0, equality=False)
    # 19 of 28 tokens are spent by the weights: three samples of 5, those of the largest weights.
    assert np.flatnonzero(nearest_samples(relaxed, tokens)).tolist() == [0, 2, 5]
    samples = FeasibleSet(size_n=np.ones(6), budget=4.0)
    assert np.flatnonzero(nearest_samples(relaxed, samples)).tolist() == [0, 2, 3, 5]
    limited = replace(samples, cost_n=np.array([1.0, 1, 1, 3, 1, 1]), limit=4.0)
    assert np.flatnonzero(nearest_samples(relaxed, limited)).tolist() == [0, 2, 4, 5]


def test_of_two_alike_only_one_is_chosen() -> None:
    # Eight directions that lean alike towards the target, each there twice under other ids.
    rng = np.random.default_rng(0)
    lean = np.concatenate([np.eye(8) * 0.8, np.linspace(0.60, 0.63, 8)[:, None]], axis=1)
    mean = np.eye(9)[8]
    geometry = describe_target(torch.from_numpy(mean + 0.3 * rng.normal(size=(60, 9))))
    geometry = replace(geometry, mean_K=torch.from_numpy(mean))
    candidates = candidate_set(np.repeat(lean, 2, axis=0))
    plain = run(candidates, geometry, Budget(samples=8), **FREE)
    assert sorted(plain.order_n // 2) == [4, 4, 5, 5, 6, 6, 7, 7]
    for redundancy in (1.0, 4.0):
        found = run(candidates, geometry, Budget(samples=8), redundancy=redundancy, **FREE)
        assert sorted(found.order_n // 2) == list(range(8))
        assert found.certificate["objective"] > found.certificate["objective_without_redundancy"]
        assert found.diagnostics["effective_rank"] > plain.diagnostics["effective_rank"]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "further",
    [{}, {"allow_short": True}, {"rows": "sum"}, {"gain": "damped"}, {"quotas": {"a": 0.3}, "floors": {"b": 0.4}}],
)
def test_gap_is_never_negative_and_the_limit_never_exceeded(budget: Budget, further: dict[str, Any]) -> None:
    for seed, redundancy, factor in itertools.product(range(2), (1e-6, 0.3, 1.0, 5.0, 100.0), (0.1, 0.5, 1.0)):
        candidates, geometry, _ = world(seed=seed)
        settings = {"stiff_limit": factor, "stiff_limit_kind": "pool", "if_infeasible": "raise"} | further
        found = run(candidates, geometry, budget, redundancy=redundancy, **settings)
        certificate = found.certificate
        assert certificate["frank_wolfe_gap"] >= 0.0 and certificate["frank_wolfe_gap_share"] >= 0.0
        assert certificate["bound"] >= certificate["objective_relaxed"]
        assert certificate["objective"] >= certificate["objective_without_redundancy"]
        assert certificate["cost"] <= certificate["limit"]
        scale = candidates.norm_N.astype(float) ** 2 if further.get("rows") == "sum" else 1.0
        cost = stiff_cost(candidates, geometry) * scale
        assert cost[found.order_n].sum() <= certificate["limit"] * (1 + 1e-5)  # float32 columns against float64
        size = candidates.tokens_N if budget.unit == "tokens" else np.ones(300)
        spent = size[found.order_n].sum()
        assert spent <= budget.amount
        assert budget.unit == "tokens" or "allow_short" in further or spent == budget.amount
        if "quotas" in further:
            in_a = candidates.domain[found.order_n] == "a"
            assert size[found.order_n][in_a].sum() <= 0.3 * budget.amount
            owed = 0.4 * budget.amount - size[found.order_n][~in_a].sum()
            assert owed < (60 if budget.unit == "tokens" else 1)  # to within one sample
            if owed > 0:
                continue  # the bound is that of sets that reach the floor
        assert certificate["bound"] >= certificate["objective"]
        json.dumps([found.certificate, found.diagnostics], allow_nan=False)


def test_what_adds_nothing_more_is_not_bought() -> None:
    candidates, geometry, _ = world()
    spent = [
        int(candidates.tokens_N[run(candidates, geometry, Budget(tokens=600), redundancy=r, **FREE).order_n].sum())
        for r in (0.0, 1.0, 10.0)
    ]
    assert spent[1] > 500 and spent[2] < 300
    full = run(candidates, geometry, Budget(samples=25), redundancy=10.0, **FREE)
    short = run(candidates, geometry, Budget(samples=25), redundancy=10.0, allow_short=True, **FREE)
    assert len(full.order_n) == 25 > len(short.order_n)
    assert short.certificate["objective"] > full.certificate["objective"]


def test_no_redundancy_is_the_linear_program_and_reads_no_sketches() -> None:
    candidates, geometry, _ = world()
    plain = run(candidates, geometry, Budget(samples=25), **TIGHT)
    zero = run(candidates, geometry, Budget(samples=25), redundancy=0.0, **TIGHT)
    assert plain.order_n.tolist() == zero.order_n.tolist() and plain.certificate == zero.certificate
    assert "frank_wolfe_gap" not in zero.certificate
    columns: dict[str, Any] = curvature_columns(unit_rows(candidates), candidates.norm_N, geometry)
    scalars = replace(candidates, unit_NK=None, **columns)
    assert set(run(scalars, geometry, Budget(samples=25), **TIGHT).order_n) == set(plain.order_n)
    with pytest.raises(InputError, match="sketches"):
        run(scalars, geometry, Budget(samples=25), redundancy=1.0, **TIGHT)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="redundancy must be"):
            SelectorSettings(redundancy=bad)


@pytest.mark.parametrize("budget", BUDGETS)
def test_order_of_rows_does_not_matter(budget: Budget) -> None:
    candidates, geometry, _ = world(seed=5)
    order = np.random.default_rng(3).permutation(300)
    first = run(candidates, geometry, budget, redundancy=1.0, **TIGHT)
    second = run(permuted(candidates, order), geometry, budget, redundancy=1.0, **TIGHT)
    assert candidates.sample_id[first.order_n].tolist() == candidates.sample_id[order][second.order_n].tolist()
    assert (first.reason_N[order] == second.reason_N).all()


def test_fractional_weights_are_those_of_the_relaxed_problem() -> None:
    candidates, geometry, _ = world()
    found = run(candidates, geometry, Budget(samples=25), redundancy=1.0, fractional=True, **TIGHT)
    certificate = found.certificate
    assert ((found.weights_n > 0) & (found.weights_n <= 1)).all() and (found.weights_n < 1).sum() > 2
    # Weights below 1e-3 are dropped, at most 300 of them.
    assert found.weights_n.sum() == pytest.approx(25.0, abs=0.3)
    assert certificate["cost"] <= certificate["limit"] * (1 + 1e-9)
    assert certificate["objective"] == pytest.approx(certificate["objective_relaxed"], rel=0.02)
    total = found.weights_n @ unit(candidates)[found.order_n]
    assert certificate["sum_norm"] == pytest.approx(np.linalg.norm(total), rel=1e-5)


def test_without_any_gain_redundancy_says_that_it_weighed_nothing() -> None:
    candidates, geometry = tiny(0)
    away = candidate_set(-np.abs(full_rows(candidates)) * np.sign(geometry.mean_K.numpy()))
    plain = run(away, geometry, Budget(samples=4), **FREE)
    found = run(away, geometry, Budget(samples=4), redundancy=1.0, **FREE)
    assert set(found.order_n) == set(plain.order_n) and found.certificate["redundancy_rho"] == 0.0
    assert any("weighed nothing" in warning for warning in found.diagnostics["warnings"])
    json.dumps([found.certificate, found.diagnostics], allow_nan=False)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_on_the_penalised_gain_is_greedy_by_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, direction = rng.normal(size=(40, 7)), rng.normal(size=7)
    direction /= np.linalg.norm(direction)
    scale, size = np.linalg.norm(rows, axis=1), rng.integers(1, 9, 40).astype(float)
    stored = torch.from_numpy(rows / scale[:, None]).float()
    z = stored.double().numpy() * scale[:, None]
    objective = PenalisedGain(direction_K=torch.from_numpy(direction), rho=0.05, tolerance=0.0)
    path = greedy(stored, scale, z @ direction, FeasibleSet(size_n=size, budget=40.0, equality=False), objective)
    assert path.order_m.tolist() == exact.greedy_penalised_set(z, direction, 0.05, size, 40.0)
    # Gram columns are float32 dots of unit rows, summed over 20 additions of norms up to 5.
    expected = exact.penalised_gain(z[path.order_m], direction, 0.05)
    assert path.objective[-1] == pytest.approx(expected, abs=1e-4)
    total = torch.from_numpy(z[path.order_m].sum(axis=0))
    assert objective.value(total) == pytest.approx(expected, abs=1e-12)


def test_step_is_the_best_step() -> None:
    rng = np.random.default_rng(0)
    grid = np.linspace(0.0, 1.0, 2001)
    inside = 0
    for _ in range(100):
        s, d, g = (torch.from_numpy(rng.normal(size=6)) for _ in range(3))
        objective = PenalisedGain(direction_K=g / g.norm(), rho=0.4, tolerance=0.0)
        step = objective.step(s, d)
        inside += 0.0 < step < 1.0
        assert objective.value(s + step * d) >= max(objective.value(s + t * d) for t in grid.tolist()) - 1e-12
    assert inside > 10
