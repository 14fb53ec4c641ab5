"""Policies in a step and in a training: what they are told is what they ask for, and every one of them trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.errors import InputError, LehrError
from schemas.run import Run
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy, policy_names
from selection_ops.online.policy_full import Full
from tests.reference.online import sample_gradients
from tests.tiny import save_tiny_model
from tests.trainer.streams import make_run
from tests.trainer.test_loop import Stop, journal, results, settings, stopping
from tests.trainer.test_step import offer, trainable
from trainer.loop import train
from trainer.step import OnlineStep


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("policies"), samples=16)


class Seeing(Policy):
    """Keeps everything and remembers what it was shown."""

    def __init__(self, **needs: bool) -> None:
        for name, value in needs.items():
            setattr(self, name, value)
        self.seen: list[Candidates] = []

    def choose(self, candidates: Candidates) -> Decision:
        self.seen.append(candidates)
        return Full(PolicyOptions()).choose(candidates)


def shown(model: Any, seed: int = 0, proj_rank: int = 4, **needs: Any) -> tuple[Candidates, Any]:
    """What a policy of these needs is shown of six candidates, and what the step says."""
    reference = needs.pop("reference", None)
    policy = Seeing(**needs)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    settings: dict[str, Any] = {"dtype": "float64", "proj_rank": proj_rank, "batch_tokens": 40, "seed": seed}
    online = OnlineStep(model, optimizer, policy, reference_model=reference, **settings)
    result = online.step(offer())
    return policy.seen[0], result


def test_losses_before_the_choice_are_those_of_dense_forwards() -> None:
    """float64 sums of some ten logarithms; the step's own losses are the same numbers, and nothing else is computed."""
    candidates = offer()
    live, other = trainable(), trainable(seed=5)
    losses = [sample_gradients(live, item.encoded)[1] for item in candidates]
    reference = [sample_gradients(other, item.encoded)[1] for item in candidates]
    before = [p.detach().clone() for p in other.parameters()]
    found, result = shown(live, needs_losses=True, needs_reference_losses=True, reference=other)
    assert found.loss_N == pytest.approx(losses, rel=1e-11)
    assert found.reference_loss_N == pytest.approx(reference, rel=1e-11)
    assert list(found.loss_tokens_N or []) == [item.loss_tokens for item in candidates]
    assert result.sample_loss_N == pytest.approx(losses, rel=1e-11)
    assert (found.geometry, found.norm_N, result.mode) == (None, None, "plain")
    assert all(torch.equal(p, q) for p, q in zip(other.parameters(), before))
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_norms_are_those_of_the_sketches_under_plain_gradients(seed: int) -> None:
    """Square roots of K_jj, which is tested against dense gradients, and no target is needed."""
    found, result = shown(trainable(), seed, needs_norms=True)
    settings: dict[str, Any] = {"dtype": "float64", "proj_rank": 4, "batch_tokens": 40, "seed": seed}
    model = trainable()
    online = OnlineStep(model, torch.optim.SGD(model.parameters(), lr=1.0), "tracin", **settings)
    space = online.step(offer(), [item.encoded for item in offer(2, 9)]).geometry
    assert space is not None
    assert found.norm_N == pytest.approx(space.gram_NN.diagonal().sqrt().tolist(), rel=1e-12)
    assert (found.geometry, result.mode, result.metric) == (None, "two-pass", "")


def test_a_loss_that_is_not_finite_stops_the_step_before_the_choice() -> None:
    model = trainable()
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(LehrError, match="step 1: loss is not finite"):
        shown(model, needs_losses=True)


def test_a_policy_that_needs_a_reference_says_so_in_a_loop_of_ones_own() -> None:
    model = trainable()
    online = OnlineStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "rho", dtype="float64")
    with pytest.raises(InputError, match="policy rho needs a reference loss of every candidate"):
        online.step(offer())


def test_signed_weights_pull_and_push() -> None:
    """The gradient handed over is sum w g / sum |w| n: with weights 1 and -1 of one sample there is none."""
    model = trainable()
    item = offer()[0]
    twice = [item, item]

    class Against(Policy):
        def choose(self, candidates: Candidates) -> Decision:
            weight_S = torch.tensor([1.0, -1.0], dtype=torch.float64)
            return Decision(kept=(0, 1), weight_S=weight_S, reasons=("", ""))

    before = [p.detach().clone() for p in model.parameters()]
    result = OnlineStep(model, torch.optim.SGD(model.parameters(), lr=1.0), Against(), dtype="float64").step(twice)
    assert result.weight_N == (1.0, -1.0)
    # Two equal gradients less each other: rounding of float64 sums.
    assert result.grad_norm <= 1e-12
    assert all(torch.allclose(p, q, rtol=0, atol=1e-12) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("name", policy_names())
def test_every_policy_trains_and_says_what_it_did(world: tuple[Run, Path], name: str) -> None:
    run, folder = world
    given: dict[str, Any] = {"reference_model": str(folder)} if name == "rho" else {"warmup_select": 1}
    summary = train(run, settings(folder, name, policy=name, **given))
    assert summary["steps"] == 2
    rows, decisions = journal(run, name), journal(run, name, "decisions")
    assert {row["policy"] for row in rows} == {name}
    for row in rows:
        mine = [d for d in decisions if d["step"] == row["step"]]
        assert 0 < row["kept"] == sum(d["kept"] for d in mine)
        assert row["kept"] <= 4 or name in ("full", "hard-filter")
        if name not in ("full", "random"):
            assert all(d["score"] is not None for d in mine)
    metric = {"opus": "opus", "less-online": "opus", "match": "target", "filter-then-weight": "target", "tracin": "sgd"}
    if name in metric:
        assert [row["metric"] for row in rows] == ["sgd", metric[name]]
    spec = run.manifest("train", name).spec
    assert spec["preconditioner"] == ("less" if name == "less-online" else "auto")
    assert spec["filter"] == {
        "tracin": "top-k",
        "match": "set-cosine",
        "hard-filter": "threshold",
        "opus": "boltzmann",
        "less-online": "cosine",
    }.get(name, "omp" if name in ("grad-match", "hard-filter-omp") else "greedy")


def test_reference_model_is_part_of_the_spec_and_changes_what_is_kept(world: tuple[Run, Path], tmp_path: Path) -> None:
    """Against itself nothing is reducible at the first step; another model's losses decide otherwise."""
    run, folder = world
    other = save_tiny_model(tmp_path / "other", "llama")
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    model.save_pretrained(other)
    for name, reference in (("self", folder), ("other", other)):
        train(run, settings(folder, f"rho-{name}", policy="rho", reference_model=str(reference)))
    first = {
        name: [d for d in journal(run, f"rho-{name}", "decisions") if d["step"] == 1] for name in ("self", "other")
    }
    # float32 losses of the same weights, by the same kernels.
    assert all(abs(d["score"]) < 1e-5 for d in first["self"])
    assert [d["kept"] for d in first["self"]] != [d["kept"] for d in first["other"]]
    specs = [run.manifest("train", f"rho-{name}").spec["reference_model"] for name in ("self", "other")]
    assert specs[0] != specs[1]
    assert specs[0] == run.manifest("train", "rho-self").spec["model"]


def test_a_reference_model_of_another_tokenizer_is_refused(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = world
    other = save_tiny_model(tmp_path / "other", "llama")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"q"', '"\\u00e9"', 1))
    with pytest.raises(InputError, match=r"the reference model .* has a tokenizer of fingerprint"):
        train(run, settings(folder, "no", policy="rho", reference_model=str(other)))


@pytest.mark.parametrize("changes", [{"policy": "rho"}, {"filter": "boltzmann"}])
def test_policies_resume_bitwise(tmp_path: Path, changes: dict[str, Any]) -> None:
    given = {"policy": "filter-then-weight", "checkpoint_every": 1, **changes}
    found = []
    for name in ("whole", "cut"):
        run, folder = make_run(tmp_path / name, samples=24)
        wanted = settings(folder, "t", reference_model=str(folder), **given)
        if name == "cut":
            with pytest.raises(Stop):
                train(run, wanted, stopping(2))
            assert not Path(run.path(run.manifest_path("train", "t"))).exists()
        train(run, wanted)
        found.append(results(run, "t"))
    assert found[0] == found[1]
