"""Every documented option changes the result in the stated way."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import CorruptFile, InputError
from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import journal, results, settings, weights
from trainer.loop import train
from trainer.settings import EXECUTION, TrainSettings

WEIGHTS = [1.0 + (row % 3) for row in range(24)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    run, folder = make_run(tmp_path_factory.mktemp("options"), samples=24, weights=WEIGHTS)
    train(run, settings(folder, "earlier", policy="full", epochs=4, checkpoint_every=6))
    return run, folder


@dataclasses.dataclass(frozen=True)
class Outcome:
    steps: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    summary: dict[str, Any]
    weights: dict[str, torch.Tensor]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.steps]

    def rates(self) -> list[float]:
        return [row["learning_rate"] for row in self.steps]

    def kept(self) -> list[tuple[int, ...]]:
        return [tuple(d["rank"] for d in self.decisions if d["kept"] and d["step"] == r["step"]) for r in self.steps]

    def norm(self) -> float:
        return float(torch.cat([w.flatten().double() for w in self.weights.values()]).norm())


@pytest.fixture(scope="module")
def outcome(world: tuple[Run, Path]) -> Callable[..., Outcome]:
    run, folder = world
    known: dict[str, Outcome] = {}

    def of(**changes: Any) -> Outcome:
        key = repr(sorted(changes.items()))
        if key not in known:
            name = f"o{len(known)}"
            chosen = settings(folder, name, **{"policy": "filter-then-weight", "warmup_select": 1, **changes})
            summary = train(run, chosen)
            known[key] = Outcome(
                journal(run, name), journal(run, name, "decisions"), summary, weights(run, name, summary["steps"])
            )
        return known[key]

    return of


Pair = tuple[Outcome, Outcome]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Outcome, Outcome], bool]]] = {
    "lora": (
        {"policy": "full", "lora": 2},
        {"policy": "full", "lora": 4},
        lambda a, b: [{min(w.shape) for n, w in x.weights.items() if "lora_A" in n} for x in (a, b)] == [{2}, {4}],
    ),
    "lora_alpha": (
        # B is zero at the start, so that the first loss is the model's own.
        {"policy": "full", "lora": 2},
        {"policy": "full", "lora": 2, "lora_alpha": 1.0},
        lambda a, b: a.losses()[0] == b.losses()[0] and a.losses()[1] < b.losses()[1],
    ),
    "lora_dropout": (
        {"policy": "full", "lora": 2},
        {"policy": "full", "lora": 2, "lora_dropout": 0.5},
        lambda a, b: a.losses()[0] == b.losses()[0] and a.losses()[1] != b.losses()[1],
    ),
    "lora_targets": (
        {"policy": "full", "lora": 2},
        {"policy": "full", "lora": 2, "lora_targets": ("q_proj",)},
        lambda a, b: (
            {n.split(".")[-4] for n in b.weights if "lora_A" in n} == {"q_proj"}
            and len({n.split(".")[-4] for n in a.weights if "lora_A" in n}) == 7
        ),
    ),
    "policy": ({}, {"policy": "random"}, lambda a, b: a.kept() != b.kept() and b.steps[0]["mode"] == "plain"),
    "candidates": ({}, {"candidates": 4}, lambda a, b: (len(a.steps), len(b.steps)) == (3, 6)),
    "n_keep": ({}, {"n_keep": 2}, lambda a, b: max(map(len, a.kept())) > 2 >= max(map(len, b.kept()))),
    "batch_schedule": (
        {},
        {"batch_schedule": "0.5:2/1"},
        lambda a, b: (
            [r["offered"] for r in a.steps] == [8, 8, 8]
            and {r["offered"] for r in b.steps} == {8, 2}
            and all(r["kept"] == 1 for r in b.steps if r["offered"] == 2)
        ),
    ),
    "target_batch": (
        {},
        {"target_batch": 8},
        lambda a, b: a.steps[0]["target_loss"] != b.steps[0]["target_loss"],
    ),
    "target_mode": (
        {"metric": "sgd"},
        {"metric": "sgd", "target_mode": "fixed"},
        lambda a, b: (
            a.steps[0]["target_loss"] == b.steps[0]["target_loss"] and a.steps[1]["alpha"] != b.steps[1]["alpha"]
        ),
    ),
    "target_decay": (
        {"target_mode": "ema", "metric": "sgd"},
        {"target_mode": "ema", "metric": "sgd", "target_decay": 0.1},
        # The average of one direction is that direction, to rounding.
        lambda a, b: (
            a.steps[0]["alpha"] == pytest.approx(b.steps[0]["alpha"], rel=1e-4)
            and a.steps[1]["alpha"] != pytest.approx(b.steps[1]["alpha"], rel=1e-4)
        ),
    ),
    "target_refresh": (
        {"metric": "sgd"},
        {"metric": "sgd", "target_refresh": 2},
        lambda a, b: (
            [[r["target_loss"] is None for r in x.steps] for x in (a, b)] == [[False] * 3, [False, True, False]]
        ),
    ),
    "targets": (
        {},
        {"targets": "max"},
        lambda a, b: a.steps[0]["matching_error"] is not None and b.steps[0]["matching_error"] is None,
    ),
    "metric": ({}, {"metric": "sgd"}, lambda a, b: [r["metric"] for r in b.steps] == ["sgd"] * 3),
    "warmup_select": (
        {},
        {"warmup_select": 2},
        lambda a, b: (
            [r["metric"] for r in a.steps] == ["sgd", "target", "target"]
            and [r["metric"] for r in b.steps] == ["sgd", "sgd", "target"]
        ),
    ),
    "filter_score": (
        {"n_keep": 1, "epochs": 3},
        {"n_keep": 1, "epochs": 3, "filter_score": "residual"},
        lambda a, b: [d["score"] for d in a.decisions] != [d["score"] for d in b.decisions],
    ),
    "filter": (
        {},
        {"filter": "none", "weights": "uniform"},
        # No filter and equal weights: everything is trained on, where the greedy keeps half.
        lambda a, b: max(map(len, a.kept())) <= 4 and [len(kept) for kept in b.kept()] == [8, 8, 8],
    ),
    "filter_temperature": (
        {"filter": "boltzmann", "filter_temperature": 1e-9},
        {"filter": "boltzmann", "filter_temperature": 50.0},
        lambda a, b: a.kept()[0] != b.kept()[0],
    ),
    "weights": (
        {"selection_weights": False},
        {"weights": "uniform", "selection_weights": False},
        lambda a, b: (
            {round(d["step_weight"], 12) for d in b.decisions} == {0.0, 1.0}
            and len({round(d["step_weight"], 12) for d in a.decisions}) > 2
        ),
    ),
    "ridge": (
        {"selection_weights": False},
        {"ridge": 1000.0, "weight_bound": 1e9, "selection_weights": False},
        lambda a, b: [d["step_weight"] for d in a.decisions] != [d["step_weight"] for d in b.decisions],
    ),
    "weight_bound": (
        {"selection_weights": False},
        {"weight_bound": 1e-3, "selection_weights": False},
        # A bound far below every free weight makes all of them equal.
        lambda a, b: {round(d["step_weight"], 9) for d in b.decisions} == {0.0, 1.0},
    ),
    "proj_rank": (
        {},
        {"proj_rank": 8},
        lambda a, b: a.decisions[0]["self_interaction"] != b.decisions[0]["self_interaction"],
    ),
    "mode": (
        {},
        {"mode": "one-pass"},
        # Another order of sums, the same step: float32 rounding over three steps.
        lambda a, b: (
            [{r["mode"] for r in x.steps} for x in (a, b)] == [{"two-pass"}, {"one-pass"}]
            and a.losses() == pytest.approx(b.losses(), rel=1e-3)
        ),
    ),
    "precondition": (
        {"warmup_select": 1},
        {"warmup_select": 1, "precondition": "rank-one"},
        # In the first step the second moment has seen nothing, and the metric is sgd.
        lambda a, b: (
            a.steps[0]["update_target_cosine"] == pytest.approx(b.steps[0]["update_target_cosine"], rel=1e-4)
            and a.steps[1]["metric"] == "target"
            and a.steps[1]["update_target_cosine"] != b.steps[1]["update_target_cosine"]
        ),
    ),
    "preconditioner": (
        {"metric": "opus"},
        {"metric": "opus", "preconditioner": "scalar"},
        lambda a, b: (
            [r["metric"] for r in b.steps] == ["sgd", "opus", "opus"]
            and a.decisions[0]["self_interaction"] == b.decisions[0]["self_interaction"]
            and a.decisions[8]["self_interaction"] != b.decisions[8]["self_interaction"]
        ),
    ),
    "gram": (
        {"mode": "one-pass"},
        {"mode": "one-pass", "gram": "exact"},
        # Other interactions, the same alignments.
        lambda a, b: (
            a.decisions[0]["self_interaction"] != b.decisions[0]["self_interaction"]
            and a.decisions[0]["alignment"] == b.decisions[0]["alignment"]
        ),
    ),
    "optimizer": (
        {"policy": "full"},
        {"policy": "full", "optimizer": "muon"},
        # The same first loss; then another way down. Muon's moments are one a matrix.
        lambda a, b: a.losses()[0] == b.losses()[0] and a.losses()[1:] != b.losses()[1:],
    ),
    "granularity": (
        {},
        {"granularity": "token-mean"},
        # The same gradients in the first step, over their loss tokens.
        lambda a, b: (
            [d["alignment"] / d["loss_tokens"] for d in a.decisions[:8]]
            == pytest.approx([d["alignment"] for d in b.decisions[:8]], rel=1e-12)
            and len({d["loss_tokens"] for d in a.decisions[:8]}) > 1
        ),
    ),
    "alignment": (
        {},
        {"alignment": "exact"},
        # Other alignments, of the same candidates' sketches.
        lambda a, b: (
            a.decisions[0]["alignment"] != b.decisions[0]["alignment"]
            and a.decisions[0]["self_interaction"] == b.decisions[0]["self_interaction"]
        ),
    ),
    "oracle_every": (
        {},
        {"oracle_every": 2},
        lambda a, b: [[r["oracle_drop"] is None for r in x.steps] for x in (a, b)] == [[True] * 3, [True, False, True]],
    ),
    "oracle_draws": (
        {"oracle_every": 1, "oracle_draws": 1},
        {"oracle_every": 1, "oracle_draws": 5},
        lambda a, b: (
            a.steps[0]["oracle_drop"] == b.steps[0]["oracle_drop"]
            and a.steps[0]["oracle_random_drop"] != b.steps[0]["oracle_random_drop"]
        ),
    ),
    "selection_weights": (
        {"policy": "full"},
        {"policy": "full", "selection_weights": False},
        lambda a, b: (
            {d["step_weight"] for d in b.decisions} == {1.0}
            and all(
                abs(d["step_weight"] / e["step_weight"] - WEIGHTS[d["rank"]] / WEIGHTS[e["rank"]]) < 1e-12
                for d in a.decisions
                for e in a.decisions
                if d["step"] == e["step"]
            )
        ),
    ),
    "steps": ({}, {"steps": 2}, lambda a, b: (a.summary["steps"], b.summary["steps"]) == (3, 2)),
    "token_budget": (
        {"policy": "full"},
        {"policy": "full", "token_budget": 100},
        lambda a, b: b.summary["trained_tokens"] <= 100 < a.summary["trained_tokens"],
    ),
    "epochs": (
        {"policy": "full"},
        {"policy": "full", "epochs": 2},
        lambda a, b: b.summary["trained_tokens"] == 2 * a.summary["trained_tokens"],
    ),
    "order": (
        {"policy": "full"},
        {"policy": "full", "order": "ranked"},
        lambda a, b: [d["rank"] for d in b.decisions] == list(range(24)) != [d["rank"] for d in a.decisions],
    ),
    "seed": ({}, {"seed": 1}, lambda a, b: [d["rank"] for d in a.decisions] != [d["rank"] for d in b.decisions]),
    "lr": (
        {"policy": "full"},
        {"policy": "full", "lr": 0.0},
        lambda a, b: b.summary["eval_loss"] == b.summary["initial_eval_loss"] != a.summary["eval_loss"],
    ),
    "schedule": (
        {"policy": "full"},
        {"policy": "full", "schedule": "constant"},
        lambda a, b: {r["learning_rate"] for r in b.steps} == {1e-2} and a.steps[-1]["learning_rate"] < 1e-2,
    ),
    "final_lr": (
        {"policy": "full"},
        {"policy": "full", "final_lr": 0.5},
        lambda a, b: b.rates() == pytest.approx([(1e-2 + r) / 2 for r in a.rates()], rel=1e-12),
    ),
    "decay_from": (
        {"policy": "full", "epochs": 2},
        {"policy": "full", "epochs": 2, "decay_from": 0.5},
        lambda a, b: b.rates() == pytest.approx([1e-2] * 3 + a.rates()[::2], rel=1e-12),
    ),
    "half_life": (
        {"policy": "full", "schedule": "exponential"},
        {"policy": "full", "schedule": "exponential", "half_life": 1 / 3},
        lambda a, b: b.rates() == pytest.approx([1e-2, 5e-3, 2.5e-3], rel=1e-12) != a.rates(),
    ),
    "schedule_norm": (
        {"policy": "full", "schedule": "refined", "schedule_from": "earlier"},
        {"policy": "full", "schedule": "refined", "schedule_from": "earlier", "schedule_norm": "l2"},
        lambda a, b: a.rates() != b.rates(),
    ),
    "schedule_smoothing": (
        {"policy": "full", "schedule": "refined", "schedule_from": "earlier", "schedule_smoothing": 0.0},
        {"policy": "full", "schedule": "refined", "schedule_from": "earlier", "schedule_smoothing": 1.0},
        lambda a, b: a.rates() != b.rates(),
    ),
    "warmup_steps": (
        {"policy": "full"},
        {"policy": "full", "warmup_steps": 2},
        lambda a, b: b.steps[0]["learning_rate"] == 0.0 and b.steps[2]["learning_rate"] == a.steps[2]["learning_rate"],
    ),
    "warmup_from": (
        {"policy": "full", "warmup_steps": 2},
        {"policy": "full", "warmup_steps": 2, "warmup_from": 0.5},
        lambda a, b: (a.rates()[0], b.rates()[0], b.rates()[2]) == (0.0, 5e-3, a.rates()[2]),
    ),
    "from_cursor": (
        {"policy": "full", "epochs": 4, "model": "", "start_from": "earlier@6"},
        {"policy": "full", "epochs": 4, "model": "", "start_from": "earlier@6", "from_cursor": True},
        lambda a, b: (
            (len(a.steps), len(b.steps)) == (12, 6)
            and [d["position"] for d in b.decisions] == [d["position"] for d in a.decisions][48:]
        ),
    ),
    "weight_decay": (
        {"policy": "full"},
        {"policy": "full", "weight_decay": 5.0},
        lambda a, b: b.norm() < a.norm() and a.losses()[0] == b.losses()[0],
    ),
    "beta1": (
        {"policy": "full"},
        {"policy": "full", "beta1": 0.0},
        lambda a, b: a.losses()[:2] == pytest.approx(b.losses()[:2], rel=1e-6),
    ),
    "beta2": ({"policy": "full"}, {"policy": "full", "beta2": 0.5}, lambda a, b: a.losses()[2] != b.losses()[2]),
    "eps": (
        # An eps far above the root of the second moment leaves next to no update.
        {"policy": "full"},
        {"policy": "full", "eps": 1e6},
        lambda a, b: abs(b.summary["eval_loss"] - b.summary["initial_eval_loss"]) < 1e-4,
    ),
    "clip": (
        {"policy": "full"},
        {"policy": "full", "clip": 0.0},
        lambda a, b: {r["clip_factor"] for r in b.steps} == {1.0} and all(r["clip_factor"] < 1 for r in a.steps),
    ),
    "ema_decay": (
        {"policy": "full", "ema_decay": 0.5},
        {"policy": "full", "ema_decay": 0.9},
        lambda a, b: (
            a.summary["eval_loss"] == b.summary["eval_loss"]
            and a.summary["averages"]["ema"]["eval_loss"] != b.summary["averages"]["ema"]["eval_loss"]
        ),
    ),
    "average_tail": (
        {"policy": "full", "average_tail": 0.4},
        {"policy": "full", "average_tail": 0.7},
        lambda a, b: [x.summary["averages"]["tail"]["steps"] for x in (a, b)] == [1, 2],
    ),
    "evaluate": (
        {"policy": "full"},
        {"policy": "full", "evaluate": "end"},
        lambda a, b: (
            b.summary["initial_eval_loss"] is None is not a.summary["initial_eval_loss"]
            and b.summary["eval_loss"] == a.summary["eval_loss"]
        ),
    ),
    "eval_every": (
        {"policy": "full"},
        {"policy": "full", "eval_every": 1},
        lambda a, b: [[r["eval_loss"] is None for r in x.steps] for x in (a, b)] == [[True, True, False], [False] * 3],
    ),
    "dtype": (
        {"policy": "full"},
        {"policy": "full", "dtype": "bfloat16"},
        lambda a, b: a.losses() != b.losses() and {w.dtype for w in b.weights.values()} == {torch.float32},
    ),
    "attention": (
        {"policy": "full"},
        {"policy": "full", "attention": "eager"},
        # Other kernels, the same mathematics: float32 rounding over three steps.
        lambda a, b: a.losses() == pytest.approx(b.losses(), rel=1e-3),
    ),
    "layout": (
        {"policy": "full"},
        {"policy": "full", "layout": "packed"},
        # Without padding, the same mathematics.
        lambda a, b: (
            b.steps[0]["padding_share"] == 0 < a.steps[0]["padding_share"]
            and a.losses() == pytest.approx(b.losses(), rel=1e-3)
        ),
    ),
    "batch_tokens": (
        {"policy": "full"},
        {"policy": "full", "batch_tokens": 1},
        # Sample by sample there is no padding, and the step stays the step: float32 rounding over three steps.
        lambda a, b: (
            b.steps[0]["padding_share"] == 0 < a.steps[0]["padding_share"]
            and a.losses() == pytest.approx(b.losses(), rel=1e-3)
        ),
    ),
}


@pytest.mark.parametrize("option", sorted(CASES))
def test_option_changes_the_result_as_stated(outcome: Callable[..., Outcome], option: str) -> None:
    base, changed, stated = CASES[option]
    first, second = outcome(**base), outcome(**changed)
    assert stated(first, second)
    if option == "lora_targets":
        return  # an adapter elsewhere is other parameters
    assert first.weights.keys() == second.weights.keys()
    if option not in ("evaluate", "eval_every", "ema_decay", "average_tail", "oracle_every", "oracle_draws"):
        different = any(not torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
        assert different or first.kept() != second.kept()


def test_every_option_has_a_case() -> None:
    """`optimizer_state`, `reference_model` and the execution options have tests of their own below and in test_loop.py; what
    needs further streams or generations has them in test_follow.py."""
    elsewhere = {"mix", "follow", "follow_every"}
    assert set(CASES) == {field.name for field in dataclasses.fields(TrainSettings)} - EXECUTION - elsewhere


def test_evaluate_never_takes_no_loss(outcome: Callable[..., Outcome]) -> None:
    first, second = outcome(policy="full"), outcome(policy="full", evaluate="never")
    assert second.summary["initial_eval_loss"] is second.summary["eval_loss"] is None
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_final_optimizer_false_leaves_the_moments_out_of_the_last_checkpoint_alone(world: tuple[Run, Path]) -> None:
    """A training whose manifest is lost after that ends as it did, without the moments."""
    run, folder = world
    given = {"policy": "full", "checkpoint_every": 2, "final_optimizer": False}
    whole = train(run, settings(folder, "whole", policy="full"))
    summary = train(run, settings(folder, "light", **given))
    assert summary["eval_loss"] == whole["eval_loss"]
    checkpoints = Path(run.path(summary["checkpoint"])).parent
    held = {folder.name: (folder / "optimizer.safetensors").exists() for folder in checkpoints.iterdir()}
    assert held == {"step-00000002": True, "step-00000003": False}
    manifest = Path(run.path(run.manifest_path("train", "light")))
    before = manifest.read_bytes()
    manifest.unlink()
    assert train(run, settings(folder, "light", **given)) == summary
    assert manifest.read_bytes() == before
    with pytest.raises(InputError, match=r"optimizer\.safetensors does not exist"):
        train(run, settings(folder, "after", policy="full", optimizer_state=str(checkpoints / "step-00000003")))


def test_optimizer_state_is_where_the_moments_start(world: tuple[Run, Path]) -> None:
    """A state warmed at rate 0 lets metric `target` act at once and changes the update, not the first loss."""
    run, folder = world
    warm = train(run, settings(folder, "warm", lr=0.0, schedule="constant"))
    place = run.path(warm["checkpoint"])
    assert warm["initial_eval_loss"] == warm["eval_loss"]
    cold = train(run, settings(folder, "cold", policy="filter-then-weight", warmup_select=3))
    hot = train(run, settings(folder, "hot", policy="filter-then-weight", warmup_select=3, optimizer_state=place))
    assert [row["metric"] for row in journal(run, "cold")] == ["sgd"] * 3
    assert [row["metric"] for row in journal(run, "hot")] == ["target"] * 3
    assert cold["initial_eval_loss"] == hot["initial_eval_loss"]
    assert cold["eval_loss"] != hot["eval_loss"]
    by_file = settings(
        folder,
        "hot-file",
        policy="filter-then-weight",
        warmup_select=3,
        optimizer_state=f"{place}/optimizer.safetensors",
    )
    assert train(run, by_file)["eval_loss"] == hot["eval_loss"]
    assert run.manifest("train", "hot").spec["optimizer_state"] != run.manifest("train", "cold").spec["optimizer_state"]


def test_optimizer_state_of_another_model_is_refused(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = world
    other_run, other = make_run(tmp_path, kind="gpt2", samples=8)
    state = other_run.path(train(other_run, settings(other, "t"))["checkpoint"])
    with pytest.raises(InputError, match="it belongs to another model"):
        train(run, settings(folder, "wrong", optimizer_state=state))
    with pytest.raises(InputError, match=r"name a checkpoint folder, an optimizer\.pt or an optimizer\.safetensors"):
        train(run, settings(folder, "none", optimizer_state=str(tmp_path / "nothing")))
    with pytest.raises(InputError, match="it is not an optimizer state"):
        train(run, settings(folder, "weights", optimizer_state=f"{state}/model.safetensors"))
    damaged = Path(state) / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(bytes(data))
    with pytest.raises(CorruptFile, match=r"optimizer.safetensors differs from the manifest"):
        train(other_run, settings(other, "damaged", optimizer_state=state))
    damaged.write_bytes(b"no safetensors")
    with pytest.raises(CorruptFile, match=r"not a readable safetensors file"):
        train(other_run, settings(other, "damaged", optimizer_state=str(damaged)))


def test_a_training_by_muon_resumes_exactly(world: tuple[Run, Path], tmp_path: Path) -> None:
    """From its middle checkpoint, the same bytes: the momentum of some, the moments of others."""
    run, folder = world
    given = {
        "policy": "filter-then-weight",
        "optimizer": "muon",
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "warmup_select": 1,
    }
    train(run, settings(folder, "muon", **given))
    assert [row["metric"] for row in journal(run, "muon")] == ["sgd", "target", "target"]
    before = results(run, "muon")
    kept = Path(run.path(f"{run.training_folder('muon')}/checkpoints"))
    shutil.rmtree(kept / "step-00000003")
    Path(run.path(run.manifest_path("train", "muon"))).unlink()
    train(run, settings(folder, "muon", **given))
    assert results(run, "muon") == before


def noting(begun: list[dict[str, str]]) -> type:
    """A console that writes down what was decided at the start of a training, and nothing else."""

    class Noting:
        def __init__(self, found: Any) -> None:
            begun.append(dict(found.choices))

        def step(self, event: Any) -> None:
            pass

        def close(self) -> None:
            pass

    return Noting


def test_activation_checkpointing_is_no_part_of_the_spec(world: tuple[Run, Path]) -> None:
    """The same weights and losses; `auto` then takes two passes, which the journal and what is printed say."""
    run, folder = world
    given = {"policy": "filter-then-weight", "checkpoint_every": 1, "loggers": ("console",)}
    train(run, settings(folder, "stored", **given))
    begun: list[dict[str, str]] = []

    train(run, settings(folder, "recomputed", activation_checkpointing=True, **given), console=noting(begun))
    assert journal(run, "stored") == journal(run, "recomputed")
    first, second = (weights(run, name, 3) for name in ("stored", "recomputed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    train(
        run, settings(folder, "auto", activation_checkpointing=True, **{**given, "mode": "auto"}), console=noting(begun)
    )
    assert {row["mode"] for row in journal(run, "auto")} == {"two-pass"}
    assert "checkpoints activations" in begun[-1]["mode"]


def test_token_masks_take_two_passes_and_say_what_they_cleared(world: tuple[Run, Path]) -> None:
    """The first choice is that of whole samples; fewer tokens make up its loss, and the budget counts whole samples."""
    run, folder = world
    begun: list[dict[str, str]] = []

    given = {"policy": "filter-then-weight", "alignment": "exact", "mode": "auto", "loggers": ("console",)}
    for name, granularity in (("unmasked", "sample"), ("masked", "token-mask")):
        train(run, settings(folder, name, granularity=granularity, **given), console=noting(begun))
    assert begun[0]["mode"].startswith("one-pass") and "token-mask clears the loss" in begun[1]["mode"]
    assert {row["mode"] for row in journal(run, "masked")} == {"two-pass"}
    first, second = (journal(run, name, "decisions")[:8] for name in ("unmasked", "masked"))
    assert [d["kept"] for d in first] == [d["kept"] for d in second]
    assert sum(d["masked_tokens"] for d in second) > 0 == sum(d["masked_tokens"] for d in first)
    assert all(0 <= d["masked_tokens"] < d["loss_tokens"] for d in second if d["kept"])
    steps = [journal(run, name)[0] for name in ("unmasked", "masked")]
    assert steps[0]["trained_tokens"] == steps[1]["trained_tokens"] and steps[0]["loss"] != steps[1]["loss"]


def test_keep_checkpoints_and_checkpoint_every(world: tuple[Run, Path]) -> None:
    run, folder = world
    for every, keep, expected in ((1, 1, [5, 6]), (2, 5, [2, 4, 6]), (50, 2, [6])):
        name = f"kept-{every}"
        train(run, settings(folder, name, candidates=4, checkpoint_every=every, keep_checkpoints=keep))
        found = run.folders(f"{run.training_folder(name)}/checkpoints")
        assert found == [f"step-{step:08d}" for step in expected]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"policy": "best"}, "filter-then-weight, full, grad-match"),
        ({"policy": "tracin", "weights": "simplex"}, "policy tracin fixes weights to uniform"),
        ({"policy": "rho"}, "name it with --reference-model"),
        ({"filter": "best"}, "greedy, omp, boltzmann"),
        ({"target_mode": "moving"}, "redrawn, fixed, ema"),
        ({"target_decay": 1.0}, "target_decay must lie in"),
        ({"targets": "both"}, "together, mean, max"),
        ({"target_refresh": 0}, "target_refresh must be at least 1"),
        ({"schedule": "exp"}, "linear, sqrt, cosine"),
        ({"schedule": "refined"}, "belong together"),
        ({"schedule_from": "earlier"}, "belong together"),
        ({"schedule": "refined", "schedule_from": "nobody"}, "nobody.json does not exist"),
        ({"schedule_norm": "l3"}, "l1, l2"),
        ({"schedule_smoothing": 2.0}, r"in \[0, 1\], not 2.0"),
        ({"final_lr": -0.1}, "final_lr is a share"),
        ({"schedule": "constant", "decay_from": 0.5}, "never decays"),
        ({"precondition": "half"}, "exact, rank-one"),
        ({"mode": "no-pass"}, "two-pass, one-pass, auto"),
        ({"policy": "filter-then-weight", "metric": "natural", "preconditioner": "less"}, "takes a root"),
        ({"preconditioner": "newton"}, "auto, adamw, muon"),
        ({"alignment": "close"}, "sketched, exact"),
        ({"granularity": "token"}, "sample, token-mean, token-mask"),
        ({"granularity": "token-mask"}, "use alignment exact"),
        (
            {"granularity": "token-mask", "alignment": "exact", "mode": "one-pass"},
            "token-mask and mode one-pass exclude",
        ),
        ({"granularity": "token-mask", "alignment": "exact", "policy": "loss"}, "policy loss looks at none"),
        ({"optimizer": "sgd"}, "adamw, muon"),
        ({"optimizer": "muon", "shard": "fsdp2"}, "Muon steps whole matrices"),
        ({"gram": "close"}, "sketched, survivors, exact"),
        ({"weights": "softmax"}, "nnls, uniform"),
        ({"filter_score": "best"}, "decrease"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"average_tail": 1.5}, "average_tail is a share"),
        ({"lora": -1}, "lora must be at least 0"),
        ({"lora": 2, "lora_alpha": 0.0}, "lora_alpha must be positive"),
        ({"lora": 2, "lora_dropout": 1.0}, "lora_dropout must lie in"),
        ({"beta2": 1.0}, "beta2 must lie in"),
        ({"steps": 1, "token_budget": 1}, "not both"),
        ({"order": "best"}, "shuffled, ranked"),
        ({"dtype": "float16"}, "float32, bfloat16, float64"),
        ({"stream": "match", "generation": 7}, "no generation 7"),
        ({"name": "../x"}, "not usable"),
    ],
)
def test_impossible_settings_are_refused(world: tuple[Run, Path], changes: dict[str, Any], message: str) -> None:
    run, folder = world
    with pytest.raises(InputError, match=message):
        train(run, settings(folder, "x", **changes) if "name" not in changes else settings(folder, **changes))


def test_auto_takes_one_pass_where_memory_allows_it(world: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decided enters the spec, so that a resumed training cannot decide otherwise."""
    run, folder = world
    train(run, settings(folder, "auto-fits", policy="filter-then-weight", mode="auto"))
    assert run.manifest("train", "auto-fits").spec["mode"] == "one-pass"
    monkeypatch.setattr("trainer.modes.held_bytes_per_token", lambda model, dtype: 2**40)
    # What was decided stands, whatever memory the machine has that goes on.
    Path(run.path(run.manifest_path("train", "auto-fits"))).unlink()
    train(run, settings(folder, "auto-fits", policy="filter-then-weight", mode="auto"))
    assert run.manifest("train", "auto-fits").spec["mode"] == "one-pass"
    train(run, settings(folder, "auto-large", policy="filter-then-weight", mode="auto"))
    assert run.manifest("train", "auto-large").spec["mode"] == "two-pass"
