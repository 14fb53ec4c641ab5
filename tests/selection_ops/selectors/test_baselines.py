from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from schemas.errors import InfeasibleError, InputError
from selection_ops.curvature import curvature_columns
from selection_ops.selectors import Budget, SelectorSettings, known_selectors, select
from tests.reference import selection as exact
from tests.selection_ops.selectors.worlds import candidate_set, full_rows, permuted, unit_rows, world

ALONE = {"two_fold": False, "bound": False}


def run(candidates, geometry, budget, **settings):
    return select(candidates, geometry, budget, SelectorSettings(**(ALONE | settings)))


def expected_scores(candidates, target) -> dict[str, np.ndarray]:
    unit = unit_rows(candidates).double().numpy()
    norm = candidates.norm_N.astype(float)
    mean = target.mean(axis=0)
    columns = exact.dense_columns(unit, target, energy=0.945, floor=1e-6)
    cosine = unit @ mean / np.linalg.norm(mean)
    return {
        "loss": candidates.loss_N / candidates.loss_tokens_N,
        "grad-norm": candidates.grad_norm_N,
        "target-cosine": cosine,
        "target-dot": cosine * norm,
        "influence": columns["influence"] * norm,
        "influence-cos": columns["influence"] / np.sqrt(columns["quad"]),
    }


@pytest.mark.parametrize("selector", ["loss", "grad-norm", "target-cosine", "target-dot", "influence", "influence-cos"])
def test_rankings_are_by_their_formula(selector: str) -> None:
    rng = np.random.default_rng(0)
    candidates, geometry, target = world(loss_N=rng.random(300) * 9, loss_tokens_N=rng.integers(1, 9, 300))
    score = expected_scores(candidates, target)[selector]
    found = run(candidates, geometry, Budget(samples=40), selector=selector)
    assert found.order_n.tolist() == np.argsort(-score)[:40].tolist()
    np.testing.assert_allclose(found.scores["score"], score, rtol=1e-4, atol=1e-5 * np.abs(score).max())  # float32 dots
    # A token budget follows the ranking and passes over what no longer fits.
    by_tokens = run(candidates, geometry, Budget(tokens=500), selector=selector)
    left, expected = 500, []
    for at in np.argsort(-score):
        if candidates.tokens_N[at] <= left:
            expected.append(at)
            left -= candidates.tokens_N[at]
    assert by_tokens.order_n.tolist() == expected


def test_lowest_turns_loss_and_norm_around() -> None:
    candidates, geometry, _ = world()
    for selector, values in (("loss", candidates.loss_N), ("grad-norm", candidates.grad_norm_N)):
        found = run(candidates, geometry, Budget(samples=10), selector=selector, lowest=True)
        assert found.order_n.tolist() == np.argsort(values)[:10].tolist()


def test_random_depends_on_seed_and_id_alone() -> None:
    candidates, _geometry, _ = world()
    order = np.random.default_rng(1).permutation(300)

    def ids(c, **settings):
        return c.sample_id[run(c, None, Budget(samples=50), selector="random", **settings).order_n].tolist()

    assert ids(candidates) == ids(permuted(candidates, order))
    assert ids(candidates) != ids(candidates, seed=1)
    # A sample's draw does not change when others leave.
    kept = permuted(candidates, np.arange(0, 300, 2))
    full = run(candidates, None, Budget(samples=50), selector="random").scores["score"]
    half = run(kept, None, Budget(samples=50), selector="random").scores["score"]
    assert (full[::2] == half).all()
    # Uniform: the mean of 300 draws is off by 1 / sqrt(12 * 300) = 0.017; four of those.
    assert abs(full.mean() - 0.5) < 0.067 and full.min() >= 0.0 and full.max() < 1.0


@pytest.mark.parametrize("selector", sorted(set(known_selectors()) - {"match", "direct"}))
def test_rankings_read_scalar_columns_only(selector: str) -> None:
    candidates, geometry, _ = world()
    columns: dict[str, Any] = curvature_columns(unit_rows(candidates), candidates.norm_N, geometry)
    scalars = replace(candidates, unit_NK=None, **columns)
    settings = {"selector": selector, "if_infeasible": "raise"}
    first = run(replace(candidates, **columns), geometry, Budget(samples=30), **settings)
    second = run(scalars, geometry, Budget(samples=30), **settings)
    assert first.order_n.tolist() == second.order_n.tolist()
    assert "set_cosine" in first.diagnostics and "set_cosine" not in second.diagnostics
    assert any("need sketches" in warning for warning in second.diagnostics["warnings"])


def test_missing_columns_and_sketches_are_named() -> None:
    candidates, geometry, _ = world()
    bare = replace(candidates, unit_NK=None)
    for selector in ("match", "direct"):
        with pytest.raises(InputError, match="reads sketches"):
            run(bare, geometry, Budget(samples=3), selector=selector)
    with pytest.raises(InputError, match="'influence' was not kept"):
        run(bare, geometry, Budget(samples=3), selector="influence")
    with pytest.raises(InputError, match="needs a target"):
        run(candidates, None, Budget(samples=3), selector="target-cosine")


def test_allow_short_stops_where_the_target_is_opposed() -> None:
    candidates, geometry, target = world()
    found = run(candidates, geometry, Budget(samples=290), selector="target-cosine", allow_short=True)
    cosine = expected_scores(candidates, target)["target-cosine"]
    assert len(found.order_n) == (cosine > 0).sum() < 290
    assert len(run(candidates, geometry, Budget(samples=290), selector="target-cosine").order_n) == 290


def test_a_score_that_is_not_finite_is_never_chosen() -> None:
    counts = np.full(300, 5)
    counts[:20] = 0  # no loss tokens, no mean loss
    candidates, geometry, _ = world(loss_tokens_N=counts)
    found = run(candidates, geometry, Budget(samples=280), selector="loss")
    assert set(found.order_n) == set(range(20, 300))
    assert set(found.reason_N[:20]) == {"non_finite"}
    with pytest.raises(InfeasibleError, match="finite scores for 280"):
        run(candidates, geometry, Budget(samples=281), selector="loss")


def test_quotas_hold_in_rankings() -> None:
    candidates, geometry, _ = world()
    found = run(
        candidates, geometry, Budget(samples=20), selector="target-cosine", quotas={"a": 0.2}, floors={"b": 0.9}
    )
    assert (candidates.domain[found.order_n] == "b").sum() >= 18 and len(found.order_n) == 20


def test_zero_rows_rank_in_the_middle() -> None:
    candidates, geometry, _ = world()
    rows = full_rows(candidates)
    rows[7] = 0.0
    found = run(candidate_set(rows), geometry, Budget(samples=300), selector="influence-cos")
    assert found.scores["score"][7] == 0.0 and len(found.order_n) == 300
