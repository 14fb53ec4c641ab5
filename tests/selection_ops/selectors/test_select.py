import json
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import InfeasibleError, InputError
from selection_ops.curvature import describe_target
from selection_ops.selectors import (
    Budget,
    Selector,
    SelectorSettings,
    get_selector,
    known_selectors,
    select,
    selector,
)
from tests.selection_ops.selectors.worlds import candidate_set, full_rows, unit_rows, world

NAMES = known_selectors()


def run(candidates, geometry, budget, **settings):
    return select(candidates, geometry, budget, SelectorSettings(**({"if_infeasible": "raise"} | settings)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [Budget(samples=40), Budget(tokens=900)])
def test_every_selector_meets_the_budget_and_explains_itself(name: str, budget: Budget) -> None:
    candidates, geometry, _ = world()
    found = run(candidates, geometry, budget, selector=name)
    spent = len(found.order_n) if budget.unit == "samples" else candidates.tokens_N[found.order_n].sum()
    assert spent == 40 if budget.unit == "samples" else 0.9 * 900 <= spent <= 900
    assert len(set(found.order_n)) == len(found.order_n)
    assert (found.weights_n == 1.0).all()
    assert ((found.reason_N == "selected").nonzero()[0] == np.sort(found.order_n)).all()
    assert all(len(values) == 300 for values in found.scores.values()) and "score" in found.scores
    json.dumps([found.certificate, found.diagnostics], allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_bad_rows_are_never_chosen(name: str) -> None:
    candidates, geometry, _ = world()
    rows = full_rows(candidates)
    unit = unit_rows(candidates).clone()
    unit[3, 5], unit[4, 0] = float("nan"), float("inf")
    norm, loss, grad = candidates.norm_N.copy(), candidates.loss_N.copy(), candidates.grad_norm_N.copy()
    norm[5], loss[6], grad[7] = np.nan, np.nan, np.inf
    excluded = np.full(300, "", dtype=object)
    excluded[8:12] = "overlap"
    content = candidates.content_id.copy()
    content[20:24] = "same"
    bad = candidate_set(
        rows, unit_NK=unit, norm_N=norm, loss_N=loss, grad_norm_N=grad, excluded_N=excluded, content_id=content
    )
    found = run(bad, geometry, Budget(samples=288), selector=name)  # all that may be chosen
    assert set(found.reason_N[3:8]) == {"non_finite"} and set(found.reason_N[8:12]) == {"overlap"}
    assert found.reason_N[20] == "selected"
    assert set(found.reason_N[21:24]) == {f"duplicate_of {bad.sample_id[20]}"}
    assert set(found.order_n).isdisjoint([*range(3, 12), 21, 22, 23])
    assert all(np.isnan(values[3:12]).all() for values in found.scores.values())
    assert found.diagnostics["duplicates_dropped"] == 3 and found.diagnostics["non_finite"] == 5
    json.dumps([found.certificate, found.diagnostics], allow_nan=False)
    with pytest.raises(InfeasibleError, match="only 288 of 300"):
        run(bad, geometry, Budget(samples=289), selector=name)
    assert len(run(bad, geometry, Budget(samples=10_000), selector=name, allow_short=True).order_n) <= 288


def test_the_representative_of_duplicates_is_the_smallest_id_that_may_be_chosen() -> None:
    ids = np.array(["d", "b", "c", "a", "e"])
    candidates = candidate_set(
        np.ones((5, 3)),
        sample_id=ids,
        content_id=np.array(["x", "x", "x", "x", ""]),
        excluded_N=np.array(["", "", "", "overlap", ""]),
    )
    found = run(candidates, None, Budget(samples=2), selector="random")
    assert found.reason_N.tolist() == ["duplicate_of b", "selected", "duplicate_of b", "overlap", "selected"]


@pytest.mark.parametrize("name", NAMES)
def test_single_rows_and_zero_rows(name: str) -> None:
    _, geometry, _ = world()
    one = candidate_set(np.random.default_rng(0).normal(size=(1, 48)))
    assert run(one, geometry, Budget(samples=1), selector=name).order_n.tolist() == [0]
    zeros = candidate_set(np.zeros((3, 48)))
    assert len(run(zeros, geometry, Budget(samples=2), selector=name).order_n) == 2
    too_long = run(one, geometry, Budget(tokens=9), selector=name)
    assert len(too_long.order_n) == 0 and any("nothing fits" in w for w in too_long.diagnostics["warnings"])


def test_inputs_that_cannot_be_used_are_named() -> None:
    candidates, geometry, _ = world()
    with pytest.raises(InputError, match="unknown selector 'best'; known: direct, direct-signed"):
        run(candidates, geometry, Budget(samples=3), selector="best")
    with pytest.raises(InputError, match="dimension 8"):
        run(candidate_set(np.ones((4, 8))), geometry, Budget(samples=3))
    with pytest.raises(InputError, match="no candidates"):
        run(candidate_set(np.ones((0, 48))), geometry, Budget(samples=3))
    with pytest.raises(InputError, match="00000001 occurs more than once"):
        ids = np.array(["00000001", "00000001", "2"])
        run(candidate_set(np.ones((3, 48)), sample_id=ids), geometry, Budget(samples=3))
    with pytest.raises(InputError, match="none of the 3 candidates may be chosen \\(overlap\\)"):
        run(candidate_set(np.ones((3, 48)), excluded_N=np.full(3, "overlap")), geometry, Budget(samples=3))
    with pytest.raises(InputError, match="3 sample ids but 2 values of domain"):
        candidate_set(np.ones((3, 48)), domain=np.array(["a", "b"]))
    bad: dict[str, Any]
    for bad in ({}, {"samples": 3, "tokens": 4}, {"samples": 0}, {"tokens": -2}):
        with pytest.raises(InputError):
            Budget(**bad)
    for bad in (
        {"shortlist": 0.5},
        {"gain": "loss"},
        {"rows": "mean"},
        {"stiff_limit": -1.0},
        {"quotas": {"a": 1.5}},
        {"max_iterations": 0},
        {"if_infeasible": "ignore"},
        {"contrast_weight": float("nan")},
    ):
        with pytest.raises(InputError, match=next(iter(bad))):
            SelectorSettings(**bad)


def test_selectors_register_under_one_name() -> None:
    assert get_selector("match").needs_sketches and not get_selector("influence").needs_sketches
    assert not get_selector("random").needs_target
    with pytest.raises(InputError, match="registered twice"):

        @selector("match")
        class Other(Selector):
            pass


def test_rows_without_tokens_are_not_bought_with_tokens() -> None:
    tokens = np.full(5, 10)
    tokens[2] = 0
    _, geometry, _ = world()
    candidates = candidate_set(np.random.default_rng(0).normal(size=(5, 48)), tokens_N=tokens)
    found = run(candidates, geometry, Budget(tokens=50))
    assert found.reason_N[2] == "no_tokens" and len(found.order_n) == 4


def test_swapped_halves_share_a_target_row_order() -> None:
    # Two-fold splits by parity of the row, so the same target gives the same numbers twice.
    candidates, geometry, target = world()
    again = describe_target(torch.from_numpy(target))
    first, second = (run(candidates, g, Budget(samples=30)).diagnostics for g in (geometry, again))
    assert first == second
