"""Policies through their interface: what is kept, with which weight, why."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from schemas.errors import InputError
from selection_ops.online.filters import FILTERS, Draw
from selection_ops.online.metrics import METRICS, geometry, get_metric
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, make_policy, policy_names, resolve_options
from tests.reference.online import box_quadratic, greedy
from tests.reference.policies import highest, non_negative, pursuit, set_cosine


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
        loss_tokens_N=rng.integers(1, 40, n).tolist(),
        loss_N=rng.uniform(1, 90, n).tolist(),
        reference_loss_N=rng.uniform(1, 90, n).tolist(),
        norm_N=rng.uniform(0, 3, n).tolist(),
    )


def gram_and_align(candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
    assert candidates.geometry is not None
    return candidates.geometry.gram_NN.numpy(), candidates.geometry.align_N.numpy()


def vectors(seed: int, n: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Sketches and target that `offer` makes its geometry of."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, 6)), rng.normal(size=6)


NAMES = [
    "filter-only",
    "filter-then-weight",
    "full",
    "grad-match",
    "grad-norm",
    "greats",
    "hard-filter",
    "hard-filter-omp",
    "high-perplexity",
    "less-online",
    "loss",
    "match",
    "opus",
    "random",
    "rho",
    "tracin",
    "unbounded-weights",
    "vanilla-filter",
    "vanilla-filter-then-weight",
]


def test_names() -> None:
    assert policy_names() == NAMES
    with pytest.raises(InputError, match="filter-then-weight, full, grad-match"):
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


@pytest.mark.parametrize("name", NAMES)
def test_never_over_the_token_budget(name: str) -> None:
    policy = make_policy(name, PolicyOptions(n_keep=4))
    decision = policy.choose(offer(seed=3, limit=25))
    assert 0 < len(decision.kept) <= 2
    assert "over the token budget" in decision.reasons
    assert policy.choose(offer(limit=9)).kept == ()
    short = dataclasses.replace(offer(limit=9), tokens_N=[10] * 9 + [9])
    if "random" not in name:
        assert policy.choose(short).kept == (9,)


@pytest.mark.parametrize(
    "changes",
    [
        {"filter_score": "residual"},
        {"weights": "uniform"},
        {"weights": "simplex"},
        {"weights": "unbounded", "weight_bound": 1.01},
        {"weights": "signed", "filter": "none"},
        {"ridge": 5.0},
        {"weight_bound": 1.01},
        {"n_keep": 3},
        *({"filter": name} for name in FILTERS if name != "greedy"),
    ],
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
        ({"filter": "x"}, "greedy, omp, boltzmann"),
        ({"filter_temperature": 0.0}, "filter_temperature"),
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
    assert {name: (m.candidate_power, m.target_power) for name, m in METRICS.items()} == {
        "sgd": (0, 0), "natural": (0.5, 0.5), "target": (0, 1), "update": (1, 1), "opus": (1, 0),
    }  # fmt: skip
    with pytest.raises(InputError, match="sgd, natural, target"):
        get_metric("hessian")


def equal(decision: Decision, wanted: list[int]) -> None:
    """These, in this order, equally weighted."""
    assert list(decision.kept) == wanted
    assert decision.weight_S.tolist() == pytest.approx([1.0] * len(wanted), rel=1e-15)
    assert decision.fallback == ""


@pytest.mark.parametrize("seed", range(10))
def test_policies_of_losses_and_norms_by_their_formulas(seed: int) -> None:
    offered = offer(seed=seed)
    loss, tokens, reference = offered.loss_N, offered.loss_tokens_N, offered.reference_loss_N
    assert loss is not None and tokens is not None and reference is not None and offered.norm_N is not None
    wanted = {
        "loss": list(loss),
        "high-perplexity": [np.exp(x / n) for x, n in zip(loss, tokens)],  # type: ignore[operator]
        "grad-norm": list(offered.norm_N),
        "rho": [x / n - r / n for x, r, n in zip(loss, reference, tokens)],  # type: ignore[operator]
    }
    chosen = {}
    for name, scores in wanted.items():
        decision = make_policy(name, PolicyOptions(n_keep=4)).choose(dataclasses.replace(offered, geometry=None))
        equal(decision, highest(scores, 4))  # type: ignore[arg-type]
        assert decision.score_N is not None
        chosen[name] = decision.kept
    assert len(set(chosen.values())) > 1


@pytest.mark.parametrize("seed", range(10))
def test_policies_of_equal_weights_by_their_formulas(seed: int) -> None:
    """On whole vectors; the greedy ones by the slow greedy of the paper's section."""
    z, u = vectors(seed)
    offered = offer(seed=seed)
    options = PolicyOptions(n_keep=4)
    equal(make_policy("match", options).choose(offered), set_cosine(z, u, 4))
    equal(make_policy("tracin", options).choose(offered), highest([float(row @ u) for row in z], 4))
    cosines = [float(row @ u) / float(np.linalg.norm(row)) for row in z]
    equal(make_policy("less-online", options).choose(offered), highest(cosines, 4))
    equal(make_policy("greats", options).choose(offered), greedy(z @ z.T, z @ u, 4, "residual"))
    for name in ("filter-only", "vanilla-filter"):
        equal(make_policy(name, options).choose(offered), greedy(z @ z.T, z @ u, 4, "decrease"))


def raw_in_order(chosen: list[int], raw: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Those of positive weight, and their weights of mean 1."""
    return [i for i, w in zip(chosen, raw) if w > 0], raw[raw > 0] / raw[raw > 0].mean()


@pytest.mark.parametrize("seed", range(10))
def test_policies_of_fitted_weights_by_their_formulas(seed: int) -> None:
    z, u = vectors(seed)
    options = PolicyOptions(n_keep=4, ridge=0.02)
    gram, align = z @ z.T, z @ u
    greedily, pursued = greedy(gram, align, 4, "decrease"), pursuit(z, u, 4, "decrease", 0.02)
    hard = highest([float(b) for b in align], int((align > 0).sum()))

    def boxed(chosen: list[int]) -> np.ndarray:
        k, b = gram[np.ix_(chosen, chosen)], align[chosen]
        lift = 0.02 * np.trace(k) / len(chosen)
        return box_quadratic(k + lift * np.eye(len(chosen)), b, 3 * max(0.0, b.sum() / k.sum()))

    wanted = {
        "grad-match": raw_in_order(support := pursuit(z, u, 4, "residual", 0.02), non_negative(z[support], u, 0.02)),
        "unbounded-weights": raw_in_order(greedily, non_negative(z[greedily], u, 0.02)),
        "hard-filter": raw_in_order(hard, boxed(hard)),
        "hard-filter-omp": raw_in_order(pursued, boxed(pursued)),
        "vanilla-filter-then-weight": raw_in_order(greedily, boxed(greedily)),
    }
    for name, (kept, weights) in wanted.items():
        decision = make_policy(name, options).choose(offer(seed=seed))
        assert list(decision.kept) == kept, name
        # KKT residual 1e-10 |b| over a smallest eigenvalue of at least the ridge's 0.02 of some 6, times mean weights of some 0.1.
        assert np.abs(decision.weight_S.numpy() - weights).max() <= 1e-6, name


def test_opus_draws_and_every_draw_is_of_its_step() -> None:
    policy = make_policy("opus", PolicyOptions(n_keep=4))
    first = policy.choose(offer())
    assert len(first.kept) == 4 and first.weight_S.tolist() == [1.0] * 4
    assert policy.choose(offer()).kept == first.kept
    assert any(policy.choose(dataclasses.replace(offer(), step=step)).kept != first.kept for step in range(4, 8))
    z, u = vectors(0)
    hot = make_policy("opus", PolicyOptions(n_keep=4, filter_temperature=1e-9)).choose(offer())
    assert list(hot.kept) == greedy(z @ z.T, z @ u, 4, "residual")
    assert hot.kept != first.kept


def test_a_policy_says_what_it_needs_and_fixes() -> None:
    """Metrics and flags as declared; everything else is left to the options."""
    options = PolicyOptions()
    metrics = {name: resolve_options(name, options).metric for name in NAMES}
    assert {name for name, metric in metrics.items() if metric == "sgd"} == {
        "tracin", "grad-match", "greats", "vanilla-filter", "vanilla-filter-then-weight",
    }  # fmt: skip
    assert {name for name, metric in metrics.items() if metric == "opus"} == {"opus", "less-online"}
    assert {name for name in NAMES if resolve_options(name, options).preconditioner != "auto"} == {"less-online"}
    needs = {
        name: {flag for flag in ("sketches", "losses", "reference_losses", "norms") if getattr(policy, f"needs_{flag}")}
        for name in NAMES
        for policy in [make_policy(name, options)]
    }
    assert needs["full"] == needs["random"] == set()
    assert needs["loss"] == needs["high-perplexity"] == {"losses"}
    assert needs["rho"] == {"losses", "reference_losses"}
    assert needs["grad-norm"] == {"norms"}
    assert [name for name, flags in needs.items() if flags == {"sketches"}] == [
        name for name in NAMES if name not in ("full", "random", "loss", "high-perplexity", "rho", "grad-norm")
    ]


def test_an_option_that_a_policy_fixes_cannot_be_set() -> None:
    with pytest.raises(InputError, match="policy tracin fixes weights to uniform; it cannot be simplex"):
        make_policy("tracin", PolicyOptions(weights="simplex"))
    make_policy("tracin", PolicyOptions(weights="uniform", ridge=1.0))


def test_uniform_weights_of_a_filter_that_draws_are_no_fallback() -> None:
    """Where the drawn ones point away on the whole there is no scale, but equal weights are equal whatever their size."""
    policy = make_policy("filter-then-weight", PolicyOptions(n_keep=3, filter="random", weights="uniform"))
    draw = Draw(seed=0, step=0, sample_ids=offer().sample_ids)
    away = 0
    for step in range(30):
        offered = dataclasses.replace(offer(), step=step)
        decision = policy.choose(offered)
        keys = dataclasses.replace(draw, step=step).keys(b"random filter")
        assert set(decision.kept) == set(sorted(range(10), key=lambda i: keys[i])[:3])
        assert decision.fallback == ""
        away += decision.alpha == 0
    assert away > 0


@pytest.mark.parametrize("name", ["loss", "high-perplexity", "rho", "grad-norm"])
def test_what_a_policy_needs_and_does_not_get_is_refused_by_name(name: str) -> None:
    bare = dataclasses.replace(offer(), loss_N=None, norm_N=None, reference_loss_N=None)
    with pytest.raises(InputError, match=f"policy {name} needs"):
        make_policy(name, PolicyOptions()).choose(bare)


@pytest.mark.parametrize("hole", [None, float("nan")])
def test_a_missing_reference_loss_is_refused_with_the_sample_and_the_way_out(hole: float | None) -> None:
    offered = offer()
    assert offered.reference_loss_N is not None
    losses = [*offered.reference_loss_N]
    losses[3] = hole
    with pytest.raises(
        InputError, match=r"a reference loss .*none of 0+3 \(1 of 10\): name a model .*--reference-model"
    ):
        make_policy("rho", PolicyOptions()).choose(dataclasses.replace(offered, reference_loss_N=losses))
    with pytest.raises(InputError, match="--reference-model"):
        make_policy("rho", PolicyOptions()).choose(dataclasses.replace(offered, reference_loss_N=None))
