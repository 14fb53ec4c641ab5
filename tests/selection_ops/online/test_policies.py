"""Policies through their interface: what is kept, with which weight, why."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.online.metrics import METRICS, geometry, get_metric
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, make_policy, policy_names
from tests.reference.online import box_quadratic, greedy


def offer(n: int = 10, *, seed: int = 0, sign: float = 1.0, limit: int | None = None) -> Candidates:
    rng = np.random.default_rng(seed)
    z, u = rng.normal(size=(n, 6)), rng.normal(size=6)
    if sign < 0:
        z = -np.abs(z) * np.sign(u)  # every candidate points away from the target
    return Candidates(
        step=3,
        seed=seed,
        sample_ids=[f"{i:032x}" for i in range(n)],
        tokens_N=[10] * n,
        token_limit=limit,
        geometry=geometry("target", torch.tensor(z), torch.tensor(u)),
    )


def gram_and_align(candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
    assert candidates.geometry is not None
    return candidates.geometry.gram_NN.numpy(), candidates.geometry.align_N.numpy()


def test_names() -> None:
    assert policy_names() == ["filter-then-weight", "full", "random"]
    with pytest.raises(InputError, match="filter-then-weight, full, random"):
        make_policy("best", PolicyOptions())


def test_full_keeps_all_whatever_n_keep_is() -> None:
    decision = make_policy("full", PolicyOptions(n_keep=2)).choose(offer())
    assert decision.kept == tuple(range(10))
    assert decision.weight_S.tolist() == [1.0] * 10


def test_random_is_a_function_of_seed_step_and_sample() -> None:
    policy = make_policy("random", PolicyOptions(n_keep=4))
    first = policy.choose(offer())
    assert len(first.kept) == 4
    assert policy.choose(offer()).kept == first.kept
    assert policy.choose(dataclasses.replace(offer(), step=4)).kept != first.kept
    assert policy.choose(dataclasses.replace(offer(), seed=1)).kept != first.kept
    # The order of the offer does not matter: the same samples are drawn.
    turned = offer()
    reverse = dataclasses.replace(turned, sample_ids=list(reversed(turned.sample_ids)))
    drawn = {reverse.sample_ids[i] for i in policy.choose(reverse).kept}
    assert drawn == {turned.sample_ids[i] for i in first.kept}


def test_random_draws_evenly() -> None:
    """400 draws of 3 from 10: each sample 120 times expected, standard deviation sqrt(400 * 0.3 * 0.7) = 9.2; five of them."""
    policy = make_policy("random", PolicyOptions(n_keep=3))
    counts = np.zeros(10)
    for step in range(400):
        counts[list(policy.choose(dataclasses.replace(offer(), step=step)).kept)] += 1
    assert np.abs(counts - 120).max() < 5 * 9.2


@pytest.mark.parametrize("seed", range(15))
def test_filter_then_weight_is_greedy_then_bounded_least_squares(seed: int) -> None:
    """Every step of the formula by the slow implementations; weights agree to the solver's tolerance over the ridge."""
    candidates = offer(seed=seed)
    gram, align = gram_and_align(candidates)
    decision = make_policy("filter-then-weight", PolicyOptions(n_keep=5)).choose(candidates)
    chosen = greedy(gram, align, 5, "decrease")
    k = gram[np.ix_(chosen, chosen)]
    alpha = max(0.0, align[chosen].sum() / k.sum())
    ridge = 1e-3 * np.trace(k) / len(chosen)
    raw = box_quadratic(k + ridge * np.eye(len(chosen)), align[chosen], 3 * alpha)
    support = [i for i, w in zip(chosen, raw) if w > 0]
    weights = raw[raw > 0] / raw[raw > 0].mean()
    assert decision.alpha == pytest.approx(alpha, rel=1e-12)
    assert list(decision.kept) == support
    # KKT residual 1e-10 |b| over the smallest eigenvalue, which the ridge bounds below.
    slack = 1e-10 * np.abs(align).max() * 5 / ridge / raw[raw > 0].mean() * 2
    assert np.abs(decision.weight_S.numpy() - weights).max() <= slack
    assert decision.fallback == ""
    assert float(decision.weight_S.mean()) == pytest.approx(1.0, rel=1e-14)


def test_diagnostics_are_what_they_say() -> None:
    rng = np.random.default_rng(2)
    z, u = rng.normal(size=(6, 9)), rng.normal(size=9)
    candidates = dataclasses.replace(
        offer(6), geometry=geometry("target", torch.tensor(z), torch.tensor(u)), sample_ids=list("abcdef")
    )
    decision = make_policy("filter-then-weight", PolicyOptions(n_keep=6, weights="uniform")).choose(candidates)
    assert decision.diagnostics is not None
    assert decision.alpha is not None
    w = np.zeros(6)
    w[list(decision.kept)] = decision.alpha
    update = z.T @ w
    # Identities of linear algebra in float64 at size 9: rounding of some tens of operations, 1e-12.
    assert decision.diagnostics.matching_error == pytest.approx(
        float(((update - u) ** 2).sum() / (u**2).sum()), rel=1e-12
    )
    cosine = update @ u / np.linalg.norm(update) / np.linalg.norm(u)
    assert decision.diagnostics.update_target_cosine == pytest.approx(cosine, rel=1e-12)
    assert decision.diagnostics.interaction_to_alignment == pytest.approx(0.5, rel=1e-12)


def test_falls_back_to_the_best_aligned_and_says_so() -> None:
    candidates = offer(sign=-1.0)
    _, align = gram_and_align(candidates)
    assert (align < 0).all()
    decision = make_policy("filter-then-weight", PolicyOptions(n_keep=3)).choose(candidates)
    assert list(decision.kept) == list(np.argsort(-align)[:3])
    assert decision.weight_S.tolist() == [1.0] * 3
    assert decision.fallback == "no candidate is aligned with the target"
    assert sum("fallback" in reason for reason in decision.reasons) == 3


@pytest.mark.parametrize("name", ["full", "random", "filter-then-weight"])
def test_never_over_the_token_budget(name: str) -> None:
    policy = make_policy(name, PolicyOptions(n_keep=4))
    decision = policy.choose(offer(seed=1, limit=25))
    assert 0 < len(decision.kept) <= 2
    assert "over the token budget" in decision.reasons
    assert policy.choose(offer(limit=9)).kept == ()
    short = dataclasses.replace(offer(limit=9), tokens_N=[10] * 9 + [9])
    if name != "random":
        assert policy.choose(short).kept == (9,)


@pytest.mark.parametrize(
    "changes",
    [{"filter_score": "residual"}, {"weights": "uniform"}, {"ridge": 5.0}, {"weight_bound": 1.01}, {"n_keep": 3}],
)
def test_each_option_changes_the_decision(changes: dict[str, Any]) -> None:
    """Some of ten random steps must come out otherwise, in what is kept or in a weight."""

    def outcome(options: PolicyOptions) -> list[tuple[object, ...]]:
        policy = make_policy("filter-then-weight", options)
        return [(d.kept, tuple(d.weight_S.tolist())) for d in (policy.choose(offer(seed=seed)) for seed in range(10))]

    assert outcome(PolicyOptions(n_keep=5)) != outcome(dataclasses.replace(PolicyOptions(n_keep=5), **changes))


def test_every_candidate_has_a_reason() -> None:
    for name in policy_names():
        decision = make_policy(name, PolicyOptions(n_keep=3)).choose(offer())
        assert len(decision.reasons) == 10
        assert [decision.reasons[i] for i in decision.kept] == ["kept"] * len(decision.kept)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"n_keep": 0}, "n_keep"),
        ({"filter_score": "x"}, "decrease"),
        ({"weights": "x"}, "nnls"),
        ({"metric": "x"}, "sgd, natural, target"),
        ({"ridge": 0.0}, "ridge"),
        ({"weight_bound": -1.0}, "weight_bound"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_policy("full", PolicyOptions(**changes))


def test_metrics() -> None:
    assert get_metric("target").needs_preconditioner
    assert not get_metric("sgd").needs_preconditioner
    gradient, p = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.5])
    assert get_metric("target").precondition_target(gradient, p).tolist() == [3.0, 1.0]
    assert {name: (m.candidate_power, m.target_power) for name, m in METRICS.items()} == {
        "sgd": (0, 0), "natural": (0.5, 0.5), "target": (0, 1), "update": (1, 1), "opus": (1, 0),
    }  # fmt: skip
    with pytest.raises(InputError, match="sgd, natural, target"):
        get_metric("hessian")
