"""The target's direction over steps: kept, averaged, of several targets; and that a resumed training has it bitwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from schemas.errors import InputError
from schemas.run import Run
from selection_ops.encoding import Encoded, Encoder
from selection_ops.online.metrics import Metric, get_metric
from selection_ops.online.options import PolicyOptions
from tests.reference.online import sample_gradients
from tests.tiny import tiny_tokenizer
from tests.trainer.streams import ENCODING, make_run, ranked, sample, texts, write_stream
from tests.trainer.test_loop import Stop, journal, results, settings, stopping
from tests.trainer.test_step import encoded, offer, trainable
from trainer.batches import StepBatches
from trainer.checkpoints import TARGET_FILE
from trainer.loop import train
from trainer.step import OnlineStep
from trainer.target_direction import TargetDirection
from trainer.target_memory import TargetMemory, Targets

BATCHES = StepBatches(batch_tokens=8, dtype="float64", device=torch.device("cpu"))
ONE = Encoded(ids=[1, 2], loss_mask=[False, True])
SGD, TARGET = get_metric("sgd"), get_metric("target")


class Taken:
    """Random directions, one of every (step, first token of the target), and a note of each that was taken."""

    def __init__(self, whole: bool = False) -> None:
        self.notes: list[int] = []
        self.whole = whole

    def direction(self, number: int, token: int = 1) -> np.ndarray:
        return np.random.default_rng([number, token]).normal(size=5)

    def __call__(self, metric: Metric, target: Sequence[Encoded], batches: StepBatches, number: int) -> TargetDirection:
        self.notes.append(number)
        sketch_K = torch.tensor(self.direction(number, target[0].ids[0]))
        if self.whole:
            return TargetDirection(loss=number, whole={"a.b": sketch_K.view(5, 1)}, square=2.0 + number, formed=True)
        return TargetDirection(loss=number, sketch_K=sketch_K)


def acting(memory: TargetMemory, number: int, target: Targets = (ONE,), metric: Metric = SGD) -> np.ndarray:
    (part,) = memory(metric, target, BATCHES, number).parts
    assert part.sketch_K is not None
    return part.sketch_K.numpy()


def test_without_options_every_step_takes_its_own_and_nothing_survives() -> None:
    taken = Taken()
    memory = TargetMemory(taken)
    for number in range(1, 4):
        assert np.array_equal(acting(memory, number), taken.direction(number))
    assert taken.notes == [1, 2, 3]
    assert memory.state() == {}


def test_a_direction_is_kept_for_as_many_steps_as_told() -> None:
    taken = Taken()
    memory = TargetMemory(taken, refresh=3)
    losses = []
    for number in range(1, 9):
        assert np.array_equal(acting(memory, number), taken.direction((number - 1) // 3 * 3 + 1))
        losses.append(memory(SGD, [ONE], BATCHES, number).loss)
    assert taken.notes == [1, 4, 7]
    assert losses == [None] * 8  # asked a second time in the same step


@pytest.mark.parametrize("refresh", [1, 2])
def test_the_average_is_exponential_and_its_weights_add_up_to_one(refresh: int) -> None:
    """sum of 0.3 * 0.7^(n - i) u_i over i <= n, over the sum of those weights; float64 over some ten terms."""
    taken = Taken()
    memory = TargetMemory(taken, decay=0.7, refresh=refresh)
    for number in range(1, 9):
        found = acting(memory, number)
        seen = [taken.direction(step) for step in range(1, number + 1, refresh)]
        weights = np.array([0.3 * 0.7 ** (len(seen) - 1 - i) for i in range(len(seen))])
        assert found == pytest.approx(weights @ np.stack(seen) / weights.sum(), rel=1e-12)


def test_another_metric_starts_anew() -> None:
    """Directions before and behind the optimizer's preconditioner differ in scale by orders of magnitude."""
    for memory in (TargetMemory(Taken(), decay=0.7), TargetMemory(Taken(), refresh=100)):
        for number in range(1, 4):
            acting(memory, number)
        assert acting(memory, 4, metric=TARGET) == pytest.approx(Taken().direction(4), rel=1e-12)


def test_several_targets_are_averaged_or_stand_side_by_side() -> None:
    taken = Taken()
    two = {"b": [Encoded(ids=[2, 2], loss_mask=[False, True])], "a": [ONE]}
    rows = np.stack([taken.direction(1, 1), taken.direction(1, 2)])
    assert acting(TargetMemory(taken, several="mean"), 1, two) == pytest.approx(rows.mean(0), rel=1e-14)
    parts = TargetMemory(taken, several="max")(SGD, two, BATCHES, 1).parts
    assert [part.sketch_K.tolist() for part in parts if part.sketch_K is not None] == rows.tolist()
    together = Taken()
    acting(TargetMemory(together), 1, two)
    assert together.notes == [1]  # one direction, of all samples in a row
    with pytest.raises(InputError, match="give a step their samples by name"):
        acting(TargetMemory(taken, several="max"), 1)


@pytest.mark.parametrize(
    "given", [{"refresh": 3}, {"decay": 0.7}, {"decay": 0.7, "refresh": 2}, {"several": "max", "decay": 0.5}, {"whole": True, "refresh": 3}]
)  # fmt: skip
def test_state_goes_on_bitwise(given: dict[str, Any]) -> None:
    whole = given.pop("whole", False)
    target: Targets = (
        {"x:y": [ONE], "": [Encoded(ids=[9, 2], loss_mask=[False, True])]} if "several" in given else [ONE]
    )

    def run(memory: TargetMemory, numbers: range) -> list[list[Tensor]]:
        found = []
        for number in numbers:
            parts = memory(SGD, target, BATCHES, number).parts
            found.append([part.sketch_K if part.whole is None else part.whole["a.b"] for part in parts])
            squares = {part.square for part in parts}
            assert squares == {2.0 + (number - 1) // 3 * 3 + 1} if whole else {None}
        return found  # type: ignore[return-value]

    straight = run(TargetMemory(Taken(whole), **given), range(1, 9))
    for cut in range(1, 8):
        first, second = TargetMemory(Taken(whole), **given), TargetMemory(Taken(whole), **given)
        run(first, range(1, cut + 1))
        state = first.state()
        assert all(tensor.device.type == "cpu" for tensor in state.values())
        second.restore(state, torch.device("cpu"))
        for parts, wanted in zip(run(second, range(cut + 1, 9)), straight[cut:], strict=True):
            assert all(torch.equal(part, true) for part, true in zip(parts, wanted, strict=True))


@pytest.mark.parametrize(("given", "message"), [({"refresh": 0}, "at least 1"), ({"decay": 1.0}, "must lie"), ({"several": "min"}, "mean, max")])  # fmt: skip
def test_impossible_memories_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TargetMemory(Taken(), **given)


# In a step.


def aligned(target: Targets, **changes: Any) -> tuple[Any, np.ndarray]:
    """(result, alignments) of a step of a fresh model."""
    model = trainable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = PolicyOptions(n_keep=3, metric="sgd")
    online = OnlineStep(model, optimizer, options=options, dtype="float64", proj_rank=4, **changes)
    result = online.step(offer(), target)
    assert result.geometry is not None
    return result, result.geometry.align_N.numpy()


def test_alignments_with_several_targets_are_the_mean_or_the_largest_of_those_with_each() -> None:
    """Each target alone by a step of its own; float64, some thousand terms."""
    parts = {"a": encoded(2, seed=5), "b": encoded(3, seed=6)}
    alone = np.stack([aligned(part)[1] for part in parts.values()])
    for several, wanted in (("mean", alone.mean(0)), ("max", alone.max(0))):
        result, found = aligned(parts, targets=several)
        assert found == pytest.approx(wanted, rel=1e-10)
        losses = [aligned(part)[0].target_loss for part in parts.values()]
        assert result.target_loss == pytest.approx(np.mean(losses), rel=1e-12)
        assert (result.decision.diagnostics.matching_error is None) == (several == "max")
    assert (alone.argmax(0) == 0).any() and (alone.argmax(0) == 1).any()
    together = aligned([*parts["a"], *parts["b"]])[1]
    assert aligned(parts)[1] == pytest.approx(together, rel=1e-12)
    assert together != pytest.approx(alone.mean(0), rel=1e-3)  # token by token, not target by target


def test_exact_alignments_can_be_kept_but_not_averaged() -> None:
    for changes in ({"target_decay": 0.5}, {"targets": "max"}):
        with pytest.raises(InputError, match="use alignment sketched"):
            aligned({"a": encoded(2)}, alignment="exact", **changes)
    model = trainable()
    online = OnlineStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        "tracin",
        alignment="exact",
        target_refresh=2,
        dtype="float64",
    )
    first, second = (online.step(offer(), encoded(2, seed=seed)) for seed in (1, 2))
    assert second.target_loss is None and first.target_loss is not None
    assert first.geometry is not None and second.geometry is not None
    assert torch.equal(
        first.geometry.align_N, second.geometry.align_N
    )  # nothing moved, the other batch was not looked at


# In a training.


@pytest.mark.parametrize(
    "changes",
    [
        {"target_mode": "ema", "target_refresh": 2, "targets": "max"},
        pytest.param({"target_mode": "ema"}, marks=pytest.mark.slow),
        pytest.param({"target_refresh": 3}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_training_goes_on_bitwise(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Stopped behind step 5, whose checkpoint is that of step 4; metric `target` from step 3 on."""
    found = []
    for name in ("whole", "cut"):
        run, folder = make_run(tmp_path / name)
        wanted = settings(folder, "t", policy="filter-then-weight", checkpoint_every=2, keep_checkpoints=9, **changes)
        if name == "cut":
            with pytest.raises(Stop):
                train(run, wanted, stopping(5))
            assert not Path(run.path(run.manifest_path("train", "t"))).exists()
        train(run, wanted)
        found.append(results(run, "t"))
    assert found[0] == found[1]
    assert any(name.endswith(f"step-00000004/{TARGET_FILE}") for name in found[0])
    without = settings(folder, "plain", policy="filter-then-weight", checkpoint_every=2, keep_checkpoints=9)
    train(run, without)
    assert not any(name.endswith(TARGET_FILE) for name in results(run, "plain"))
    assert [r["alpha"] for r in journal(run, "plain")] != [r["alpha"] for r in journal(run, "t")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    return make_run(tmp_path_factory.mktemp("target"), samples=24)


def test_fixed_targets_are_the_first_ones_drawn(world: tuple[Run, Path]) -> None:
    """At rate 0 the loss of the same batch is the same in every step."""
    run, folder = world
    given: dict[str, Any] = {"policy": "filter-then-weight", "lr": 0.0}
    for mode in ("fixed", "redrawn"):
        train(run, settings(folder, mode, target_mode=mode, **given))
    fixed, redrawn = ([row["target_loss"] for row in journal(run, mode)] for mode in ("fixed", "redrawn"))
    # float32 by other kernels once the metric is another.
    assert fixed == pytest.approx([fixed[0]] * 3, rel=1e-5)
    assert redrawn[1:] != pytest.approx([redrawn[0]] * 2, rel=1e-3)
    assert fixed[0] == redrawn[0]


def test_every_target_is_drawn_from(world: tuple[Run, Path]) -> None:
    """Two domains: the step's target loss is the mean of their own, by dense forwards; of two samples each, another one. float32."""
    run, folder = world
    given: dict[str, Any] = {"policy": "filter-then-weight", "lr": 0.0, "steps": 1}
    for name, more in (("all", {"target_batch": 99}), ("some", {"target_batch": 2})):
        train(run, settings(folder, f"several-{name}", targets="mean", **given, **more))
    found = [journal(run, f"several-{name}")[0]["target_loss"] for name in ("all", "some")]
    model, encoder = AutoModelForCausalLM.from_pretrained(folder), Encoder(tiny_tokenizer(), ENCODING)
    means = []
    for domain in (0, 1):
        items = [encoder.encode(text, ((0, len(text)),)) for text in texts(9, seed=1)[domain::2]]
        losses = sum(sample_gradients(model, item)[1] for item in items)
        means.append(losses / sum(sum(item.loss_mask) for item in items))
    assert found[0] == pytest.approx(np.mean(means), rel=1e-5)
    assert found[1] != pytest.approx(found[0], rel=1e-4)


def test_one_domain_is_not_several_targets(world: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = world
    index = write_stream(
        str(tmp_path / "one"),
        ranked([sample("words", row, text) for row, text in enumerate(texts(8))]),
        target=[
            dataclasses.replace(item, sample=dataclasses.replace(item.sample, domain="math"))
            for item in ranked([sample("target", row, text) for row, text in enumerate(texts(4, seed=1))])
        ],
    )
    assert index.target
    with pytest.raises(InputError, match=r"are of one domain \(math\): name domains"):
        train(run, settings(folder, "one", policy="match", targets="max", stream=str(tmp_path / "one")))
