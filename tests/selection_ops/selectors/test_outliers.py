import json
from typing import Any

import numpy as np
import pytest

from schemas.errors import InfeasibleError, InputError
from selection_ops.selectors import Budget, SelectorSettings, known_selectors, select
from tests.selection_ops.selectors.worlds import candidate_set, full_rows, permuted, unit_rows, world

NAMES = known_selectors()


def run(candidates, geometry=None, budget=None, **settings):
    settings = {"if_infeasible": "raise"} | settings
    return select(candidates, geometry, budget or Budget(samples=40), SelectorSettings(**settings))


def measured(count: int, loss: np.ndarray, norm: np.ndarray, **columns: Any):
    """Candidates of one-hot sketches whose mean loss and length-free gradient norm are given, 16 loss tokens each."""
    tokens = np.full(count, 16)
    given = {"loss_tokens_N": tokens, "loss_N": loss * 16, "grad_norm_N": norm * 4} | columns
    return candidate_set(np.ones((count, 3)), **given)


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_leaves_outliers_out_and_says_why(name: str) -> None:
    candidates, geometry, _ = world()
    rng = np.random.default_rng(0)
    length = rng.integers(1, 500, 300)
    loss, norm = rng.gamma(2.0, size=300), rng.gamma(2.0, size=300)
    given = candidate_set(
        full_rows(candidates),
        unit_NK=unit_rows(candidates),
        loss_tokens_N=length,
        loss_N=loss * length,
        grad_norm_N=norm * np.sqrt(length),
    )
    free = run(given, geometry, selector=name)
    assert {"loss_outlier", "grad_norm_outlier"}.isdisjoint(free.reason_N) and "outlier_caps" not in free.diagnostics
    found = run(given, geometry, selector=name, max_loss_quantile=0.9, max_grad_norm_quantile=0.8)
    loud = np.argsort(-loss)[:30]
    steep = np.setdiff1d(np.argsort(-norm)[:60], loud)
    assert set(np.flatnonzero(found.reason_N == "loss_outlier")) == set(loud)
    assert set(np.flatnonzero(found.reason_N == "grad_norm_outlier")) == set(steep)
    assert set(found.order_n).isdisjoint([*loud, *steep]) and len(found.order_n) == 40
    assert all(np.isnan(values[[*loud, *steep]]).all() for values in found.scores.values())
    caps = found.diagnostics["outlier_caps"]
    assert caps["loss_outlier"] == {"quantile": 0.9, "cap": pytest.approx(np.sort(loss)[269]), "left_out": 30}
    assert caps["grad_norm_outlier"]["cap"] == pytest.approx(np.sort(norm)[239])
    assert caps["grad_norm_outlier"]["left_out"] == len(steep) and found.diagnostics["pool"] == 270 - len(steep)
    json.dumps(found.diagnostics, allow_nan=False)
    left = 270 - len(steep)
    with pytest.raises(InfeasibleError, match=f"only {left} of 300"):
        run(
            given,
            geometry,
            Budget(samples=left + 1),
            selector=name,
            max_loss_quantile=0.9,
            max_grad_norm_quantile=0.8,
        )


def test_each_cap_is_an_option_of_its_own() -> None:
    rng = np.random.default_rng(1)
    loss, norm = rng.permutation(100.0 + np.arange(100)), rng.permutation(100.0 + np.arange(100))
    candidates = measured(100, loss, norm)
    for option, reason, value in (
        ("max_loss_quantile", "loss_outlier", loss),
        ("max_grad_norm_quantile", "grad_norm_outlier", norm),
    ):
        for quantile, count in ((0.95, 5), (0.5, 50), (1.0, 0)):
            settings: dict[str, Any] = {option: quantile}
            found = run(candidates, selector="random", **settings)
            assert set(np.flatnonzero(found.reason_N == reason)) == set(np.argsort(-value)[:count])
            assert list(found.diagnostics["outlier_caps"]) == [reason]


def test_length_alone_makes_no_outlier() -> None:
    # Loss grows as the length, the norm of a sum of unrelated token gradients as its root.
    rng = np.random.default_rng(0)
    length = np.tile([4, 16, 64, 256, 1024], 60)
    rows = np.stack([rng.normal(size=(n, 32)).sum(axis=0) for n in length])
    losses = np.array([rng.gamma(4.0, size=n).sum() for n in length])
    losses[:20] += 3.0 * length[:20]
    rows[20:40] *= 2.0
    candidates = candidate_set(rows, loss_tokens_N=length, loss_N=losses)
    found = run(candidates, selector="random", max_loss_quantile=0.95, max_grad_norm_quantile=0.95)
    for reason, planted in (("loss_outlier", np.arange(20)), ("grad_norm_outlier", np.arange(20, 40))):
        left_out = np.flatnonzero(found.reason_N == reason)
        # Every length has its four planted ones; 15 of 300 are left out, whichever lengths they have.
        assert np.isin(left_out, planted).mean() >= 0.7
        assert len(np.unique(length[left_out])) >= 4
        assert max(np.bincount(np.searchsorted([4, 16, 64, 256, 1024], length[left_out]))) <= 8


def test_copies_and_left_out_samples_do_not_move_a_cap() -> None:
    loss = np.arange(1.0, 101.0)
    alone = run(measured(100, loss, np.ones(100)), selector="random", max_loss_quantile=0.9)
    # Forty more: copies of the largest, excluded ones and broken ones.
    extra = np.concatenate([np.full(20, 100.0), np.full(10, 500.0), np.full(10, np.nan)])
    excluded = np.full(140, "", dtype=object)
    excluded[120:130] = "overlap"
    content = np.array([f"c{i}" for i in range(140)])
    content[100:120] = "c99"
    more = measured(140, np.append(loss, extra), np.ones(140), excluded_N=excluded, content_id=content)
    found = run(more, selector="random", max_loss_quantile=0.9)
    assert found.diagnostics["outlier_caps"] == alone.diagnostics["outlier_caps"]
    assert set(np.flatnonzero(found.reason_N == "loss_outlier")) == set(range(90, 100))
    assert set(found.reason_N[100:120]) == {f"duplicate_of {more.sample_id[99]}"}
    assert set(found.reason_N[120:130]) == {"overlap"} and set(found.reason_N[130:]) == {"non_finite"}


def test_values_at_the_cap_stay_and_rows_without_loss_tokens_are_not_judged() -> None:
    loss = np.array([1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 9.0])
    tokens = np.full(10, 16)
    tokens[0] = 0
    candidates = measured(10, loss, np.ones(10), loss_tokens_N=tokens)
    found = run(candidates, budget=Budget(samples=3), selector="random", max_loss_quantile=0.5)
    assert np.flatnonzero(found.reason_N == "loss_outlier").tolist() == [9]
    assert found.diagnostics["outlier_caps"]["loss_outlier"]["cap"] == 2.0
    none = measured(10, loss, np.ones(10), loss_tokens_N=np.zeros(10, int))
    found = run(none, budget=Budget(samples=3), selector="random", max_loss_quantile=0.5)
    assert found.diagnostics["outlier_caps"]["loss_outlier"] == {"quantile": 0.5, "cap": None, "left_out": 0}


def test_order_of_rows_does_not_matter() -> None:
    candidates, geometry, _ = world(seed=5)
    order = np.random.default_rng(3).permutation(300)
    caps = {"max_loss_quantile": 0.9, "max_grad_norm_quantile": 0.9}
    first, second = (run(c, geometry, **caps) for c in (candidates, permuted(candidates, order)))
    assert (first.reason_N[order] == second.reason_N).all() and "grad_norm_outlier" in first.reason_N
    assert first.diagnostics["outlier_caps"] == second.diagnostics["outlier_caps"]


def test_quantiles_that_mean_nothing_are_refused() -> None:
    for name in ("max_loss_quantile", "max_grad_norm_quantile"):
        for quantile in (0.0, 1.1, 99.0, float("nan")):
            bad: dict[str, Any] = {name: quantile}
            with pytest.raises(InputError, match=name):
                SelectorSettings(**bad)
    both = measured(2, np.array([1.0, 2.0]), np.array([2.0, 1.0]))
    with pytest.raises(InputError, match=r"none of the 2 .*\(grad_norm_outlier, loss_outlier\)"):
        run(both, selector="random", max_loss_quantile=0.5, max_grad_norm_quantile=0.5)
