"""Monte-Carlo Gauss-Newton against the exact one, that against Hessians, and Lanczos as their oracle. All in float64."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine
from selection_ops.sampling import sampled_labels, uniforms
from selection_ops.sites import find_sites
from tests.reference import second_order as exact
from tests.reference.gradients import sample_loss, sketch
from tests.tiny import widen_norms

torch.set_num_threads(1)
ITEM = Encoded(ids=[3, 7, 1, 9, 4, 2, 8], loss_mask=[False, False, True, True, True, False, True])
RANK = 4


def micro(seed: int = 0) -> Any:
    """One block over 12 tokens: 480 parameters in its linear maps."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return widen_norms(LlamaForCausalLM(config).double().eval())


@cache
def sites() -> list[str]:
    return [site for group in find_sites(micro()).input_groups for site in group.sites]


def weights(model: Any) -> list[torch.Tensor]:
    found = dict(model.named_parameters())
    return [found[f"{site}.weight"] for site in sites()]


def projection(model: Any) -> np.ndarray:
    """The sketch as a matrix on the weights, [numbers of a sketch, parameters], from its definition."""
    groups = [(group.name, list(group.sites)) for group in find_sites(model).input_groups]
    columns = []
    shapes = [tuple(w.shape) for w in weights(model)]
    for place, shape in enumerate(shapes):
        for index in range(shape[0] * shape[1]):
            unit = {f"{site}.weight": np.zeros(s) for site, s in zip(sites(), shapes)}
            unit[f"{sites()[place]}.weight"].flat[index] = 1.0
            columns.append(unit)
    return np.stack([sketch(unit, groups, set(), rank=RANK, seed=0, version=1) for unit in columns], axis=1)


@cache
def brute() -> tuple[Any, np.ndarray, np.ndarray]:
    model = micro()
    return (model, *exact.label_gradients(model, ITEM.ids, ITEM.loss_mask, weights(model)))


def monte_carlo(draws: int, seed: int = 0) -> np.ndarray:
    """Mean of s s^T over draws, s the engine's sketches at sampled labels."""
    model = brute()[0]
    labels = sampled_labels(model, ITEM, seed=seed, sample_id="micro", draws=draws)
    rows = []
    with GradientEngine(model, find_sites(model).input_groups, proj_rank=RANK, k=0, seed=0, version=1) as engine:
        for start in range(0, draws, 64):
            part = labels[start : start + 64]
            batch = dataclasses.replace(collate([ITEM] * len(part)), labels_BT=torch.tensor(part))
            rows.append(engine.features(batch).sketch_BK)
    s = torch.cat(rows).numpy()
    return s.T @ s / draws


def test_lanczos_is_the_dense_spectrum_of_the_hessian() -> None:
    model = micro()

    def loss() -> torch.Tensor:
        return -exact.log_probabilities(model, ITEM.ids, ITEM.loss_mask)[:, 5].sum()

    dense = exact.dense_hessian(loss, weights(model))
    values, vectors = np.linalg.eigh((dense + dense.T) / 2)
    found, ritz = exact.lanczos(
        lambda v: exact.hessian_vector(loss, weights(model), torch.from_numpy(v)).numpy(), len(dense), 90
    )
    # A Hessian has both signs; its ends converge first. Eigenvalues err by the square of the vectors' error.
    np.testing.assert_allclose(found[:4], values[::-1][:4], rtol=1e-9)
    np.testing.assert_allclose(found[-3:], values[:3][::-1], rtol=1e-9)
    assert min(abs(ritz[:, i] @ vectors[:, -1 - i]) for i in range(4)) > 1 - 1e-8


def test_gauss_newton_is_the_hessian_where_labels_come_from_the_model() -> None:
    model, p, g = brute()
    whole = exact.gauss_newton(p, g)
    q = torch.from_numpy(p)
    hessian = exact.dense_hessian(lambda: exact.expected_loss(model, ITEM.ids, ITEM.loss_mask, q), weights(model))
    # The rotary embedding is made in float32, on both sides alike; the rest is float64: some thousand roundings of 1e-16.
    assert np.linalg.norm(hessian - whole) < 1e-10 * np.linalg.norm(whole)
    # Labels that are not the model's leave the residual term: H - GGN = sum (p - q) d2f, linear in the distance.
    other = torch.softmax(torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 1)
    distance = []
    for share in (0.1, 0.01):
        mixed = (1 - share) * q + share * other
        hessian = exact.dense_hessian(
            lambda mixed=mixed: exact.expected_loss(model, ITEM.ids, ITEM.loss_mask, mixed),  # type: ignore[misc]
            weights(model),
        )
        distance.append(np.linalg.norm(hessian - whole) / np.linalg.norm(whole))
    assert distance[0] / distance[1] == pytest.approx(10.0, rel=1e-6)


def test_sampled_gradients_have_mean_zero_and_the_empirical_fisher_is_another_matrix() -> None:
    model, p, g = brute()
    assert np.abs(np.einsum("ty,typ->tp", p, g)).max() < 1e-12 * np.abs(g).max()
    own = exact.flat(torch.autograd.grad(sample_loss(model, ITEM.ids, ITEM.loss_mask), weights(model))).numpy()
    whole = exact.gauss_newton(p, g)
    assert np.linalg.norm(np.outer(own, own) - whole) > 0.5 * np.linalg.norm(whole)


def test_monte_carlo_converges_to_the_projected_gauss_newton_matrix_as_one_over_the_root_of_draws() -> None:
    model, p, g = brute()
    s = np.einsum("sp,typ->tys", projection(model), g)
    whole = exact.gauss_newton(p, s)
    errors = {}
    for draws in (64, 1024):
        runs = [np.linalg.norm(monte_carlo(draws, seed) - whole) / np.linalg.norm(whole) for seed in range(6)]
        errors[draws] = np.sqrt(np.mean(np.square(runs)))
    # Independent draws: sixteen times as many, a quarter of the error; six runs each give it to about a third.
    assert 2.4 < errors[64] / errors[1024] < 6.5
    assert errors[1024] < 0.15


def test_its_first_directions_are_those_that_lanczos_finds_in_the_hessian() -> None:
    model, p, _ = brute()
    q = torch.from_numpy(p)
    matrix = projection(model)

    def product(v: np.ndarray) -> np.ndarray:
        pulled = torch.from_numpy(matrix.T @ v)
        loss = lambda: exact.expected_loss(model, ITEM.ids, ITEM.loss_mask, q)  # noqa: E731
        return matrix @ exact.hessian_vector(loss, weights(model), pulled).numpy()

    values, vectors = exact.lanczos(product, len(matrix), 40)
    found, directions = np.linalg.eigh(monte_carlo(2048))
    found, directions = found[::-1], directions[:, ::-1]
    np.testing.assert_allclose(found[:3], values[:3], rtol=0.15)  # 2048 draws: 2 % each, more where values are close
    # Energy of the three first directions of one inside those of the other; chance would leave 3 of 112.
    assert np.linalg.norm(vectors[:, :3].T @ directions[:, :3]) ** 2 / 3 > 0.95


def test_labels_are_drawn_from_the_softmax_at_loss_tokens_alone() -> None:
    model, p, _ = brute()
    labels = np.array(sampled_labels(model, ITEM, seed=0, sample_id="a", draws=4000))
    places = np.flatnonzero(ITEM.loss_mask)
    fixed = np.flatnonzero(~np.array(ITEM.loss_mask))
    assert (labels[:, fixed] == np.array(ITEM.ids)[fixed]).all()
    for t, place in enumerate(places):
        frequencies = np.bincount(labels[:, place], minlength=12) / 4000
        # A frequency is off by sqrt(p (1 - p) / 4000) < 0.008; five times that over 48 cells.
        assert np.abs(frequencies - p[t]).max() < 0.04
    # Independent over tokens: no correlation beyond 1/sqrt(4000), five times.
    first, second = (labels[:, place].astype(float) for place in places[:2])
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.08


def test_draws_are_a_function_of_seed_sample_and_number() -> None:
    model = micro()
    base = sampled_labels(model, ITEM, seed=0, sample_id="a", draws=40)
    assert base == sampled_labels(model, ITEM, seed=0, sample_id="a", draws=40)
    assert base[:7] == sampled_labels(model, ITEM, seed=0, sample_id="a", draws=7)
    assert base != sampled_labels(model, ITEM, seed=1, sample_id="a", draws=40)
    assert base != sampled_labels(model, ITEM, seed=0, sample_id="b", draws=40)
    assert len({tuple(row) for row in base}) > 20
    values = uniforms(0, "a", 0, 10_000)
    assert float(values.min()) >= 0 and float(values.max()) < 1
    assert float(values.mean()) == pytest.approx(0.5, abs=0.015)  # five times 0.29 / 100
