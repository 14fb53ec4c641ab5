"""The one-step oracle: what it measures, against steps really taken, and that it leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from schemas.errors import InputError
from schemas.run import Run
from selection_ops.online.filters import Draw
from selection_ops.online.metrics import geometry
from selection_ops.online.options import PolicyOptions
from selection_ops.online.oracle import judge, predicted_drops
from tests.reference.online import sample_gradients
from tests.trainer.streams import make_run
from tests.trainer.test_loop import journal, settings, weights
from tests.trainer.test_step import encoded, offer, trainable
from trainer.loop import train
from trainer.oracle import untouched
from trainer.step import OnlineStep

COLUMNS = ("oracle_drop", "oracle_random_drop", "oracle_beaten", "oracle_correlation")


def online(model: Any, policy: str = "filter-then-weight", **changes: Any) -> OnlineStep:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = {"dtype": "float64", "proj_rank": 4, "warmup_select": 1, "options": PolicyOptions(n_keep=3), **changes}
    return OnlineStep(model, optimizer, policy, **given)


def loss_of(model: Any, target: list[Any]) -> float:
    return sum(sample_gradients(model, item)[1] for item in target) / sum(sum(item.loss_mask) for item in target)


@pytest.mark.parametrize(
    "policy,granularity", [("filter-then-weight", "sample"), ("filter-then-weight", "token-mask"), ("random", "sample")]
)
def test_the_drop_is_that_of_the_step_really_taken(policy: str, granularity: str) -> None:
    """Three steps: the target's loss before and after, by dense forwards of the model itself; float64, some ten logarithms."""
    model, target = trainable(), encoded(3, seed=5)
    options = PolicyOptions(n_keep=3, granularity=granularity)
    exact = {"alignment": "exact"} if granularity == "token-mask" else {}
    step = online(model, policy, oracle_every=2, oracle_draws=3, options=options, **exact)
    for number in range(1, 5):
        before = loss_of(model, target)
        report = step.step(offer(6, number), target).oracle
        if number % 2:
            assert report is None
        else:
            assert report is not None
            assert report.drop == pytest.approx(before - loss_of(model, target), abs=1e-11)
            assert (report.correlation is None) == (policy == "random")


@pytest.mark.parametrize("granularity", ["sample", "token-mean"])
def test_random_drops_are_those_of_steps_on_the_drawn(granularity: str) -> None:
    """Each draw taken for real by a copy that keeps just those: the mean, the share beaten and the correlation by another library."""
    model, target, candidates = trainable(), encoded(3, seed=5), offer(6, 2, (1.0, 2.0, 1.0, 1.0, 3.0, 1.0))
    options = PolicyOptions(n_keep=3, granularity=granularity)
    step = online(model, oracle_every=2, oracle_draws=5, options=options)
    step.step(offer(6, 1), target)
    twin, state = copy.deepcopy(model), copy.deepcopy(step.optimizer.state_dict())
    before = loss_of(twin, target)
    result = step.step(candidates, target)
    report, space = result.oracle, result.geometry
    assert report is not None and space is not None
    size = len(result.decision.kept)
    drops, shares = [report.drop], [np.array(result.weight_N)]
    for number in range(5):
        keys = Draw(seed=0, step=2, sample_ids=[item.sample_id for item in candidates]).keys(b"oracle %d" % number)
        some = sorted(sorted(range(6), key=lambda place: keys[place])[:size])
        other = copy.deepcopy(twin)
        taken = online(other, "full", options=options)
        taken.optimizer.load_state_dict(copy.deepcopy(state))
        weight = np.zeros(6)
        weight[some] = taken.step([candidates[place] for place in some]).weight_N
        shares.append(weight)
        drops.append(before - loss_of(other, target))
    assert report.random_drop == pytest.approx(np.mean(drops[1:]), abs=1e-11)
    assert report.beaten == np.mean([drops[0] > drop for drop in drops[1:]])
    tokens = np.array([item.loss_tokens for item in candidates])
    rows = np.stack([weight / (weight * tokens).sum() for weight in shares])
    gram, align = space.gram_NN.numpy(), space.align_N.numpy()
    if granularity == "token-mean":
        gram, align = gram * np.outer(tokens, tokens), align * tokens
    scale = (rows[0] @ align) / (rows[0] @ gram @ rows[0])
    predicted = [scale * w @ align - 0.5 * scale**2 * w @ gram @ w for w in rows]
    assert report.correlation == pytest.approx(spearmanr(predicted, drops).statistic, rel=1e-12)


def test_predictions_are_the_quadratic_and_alignment_alone_where_the_choice_points_away() -> None:
    """By whole vectors: |Zw|^2 and <Zw, u>; float64 sums over four entries."""
    rng = np.random.default_rng(0)
    z, u, w = rng.normal(size=(5, 4)), rng.normal(size=4), rng.uniform(size=(3, 5))
    u = u if w[0] @ z @ u > 0 else -u
    found = {
        sign: predicted_drops(geometry("target", torch.tensor(z), torch.tensor(sign * u)), torch.tensor(w)).numpy()
        for sign in (1, -1)
    }
    moved = w @ z
    scale = moved[0] @ u / (moved[0] @ moved[0])
    assert found[1] == pytest.approx([scale * m @ u - (scale * m) @ (scale * m) / 2 for m in moved], rel=1e-12)
    assert found[-1] == pytest.approx(list(-moved @ u), rel=1e-12)


def test_judgement_counts_ties_half_and_has_no_correlation_of_equal_drops() -> None:
    report = judge([2.0, 1.0, 2.0, 3.0, 0.0], torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0]))
    assert (report.drop, report.random_drop, report.beaten) == (2.0, 1.5, 0.625)
    assert judge([1.0, 1.0, 1.0], torch.tensor([1.0, 2.0, 3.0])).correlation is None
    assert judge([1.0, 2.0], None).correlation is None


def test_untouched_restores_everything_bitwise() -> None:
    """Parameters, moments (and their absence before a first step), modes, random numbers; also behind an error."""
    model = trainable("gpt2", torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.train()
    model.transformer.h[0].eval()
    for steps in range(2):
        before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()["state"]))
        modes, random = [m.training for m in model.modules()], torch.get_rng_state()
        with pytest.raises(RuntimeError, match="on purpose"), untouched(model, optimizer):
            model.eval()
            torch.rand(3)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            assert not torch.equal(model.state_dict()["lm_head.weight"], before[0]["lm_head.weight"])
            raise RuntimeError("on purpose")
        assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
        after = optimizer.state_dict()["state"]
        assert after.keys() == before[1].keys() and bool(after) == bool(steps)
        assert all(torch.equal(after[p][k], before[1][p][k]) for p in after for k in after[p])
        assert [m.training for m in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
        assert all(parameter.grad is None for parameter in model.parameters())
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    run, folder = make_run(tmp_path_factory.mktemp("oracle"), samples=24, kind="gpt2")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('pdrop": 0.0', 'pdrop": 0.2'))
    return run, folder


@pytest.mark.parametrize("policy", ["filter-then-weight", "full", "loss"])
def test_a_training_is_bitwise_the_same_with_and_without(world: tuple[Run, Path], policy: str) -> None:
    """Weights, moments, decisions and every column of the journal but the oracle's own, dropout included."""
    run, folder = world
    for name, every in (("without", 0), ("with", 2)):
        train(run, settings(folder, f"{policy}-{name}", policy=policy, oracle_every=every, oracle_draws=2))
    plain, asked = (journal(run, f"{policy}-{name}") for name in ("without", "with"))
    for row, other in zip(plain, asked, strict=True):
        assert {k: v for k, v in row.items() if k not in COLUMNS} == {
            k: v for k, v in other.items() if k not in COLUMNS
        }
        assert all(row[column] is None for column in COLUMNS)
        assert (other["oracle_drop"] is not None) == (other["step"] % 2 == 0)
    assert journal(run, f"{policy}-without", "decisions") == journal(run, f"{policy}-with", "decisions")
    first, second = (weights(run, f"{policy}-{name}", 3) for name in ("without", "with"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    moments = [
        Path(run.path(f"{run.training_folder(f'{policy}-{name}')}/checkpoints/step-00000003/optimizer.safetensors"))
        for name in ("without", "with")
    ]
    assert moments[0].read_bytes() == moments[1].read_bytes()
    assert all(t["oracle_seconds"] > 0 for t in journal(run, f"{policy}-with", "timings") if t["step"] == 2)


def test_draws_are_an_option_and_a_target_is_needed(world: tuple[Run, Path]) -> None:
    run, folder = world
    for draws in (1, 6):
        train(run, settings(folder, f"draws-{draws}", policy="random", oracle_every=3, oracle_draws=draws))
    found = [journal(run, f"draws-{draws}")[2] for draws in (1, 6)]
    assert found[0]["oracle_drop"] == found[1]["oracle_drop"]
    assert found[0]["oracle_random_drop"] != found[1]["oracle_random_drop"]
    with pytest.raises(InputError, match="the oracle measures the loss of target samples"):
        online(trainable(), "random", oracle_every=1).step(offer())
