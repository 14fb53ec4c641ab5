"""What a training takes from one before it in the same run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import median_filter

from schemas.errors import InputError
from schemas.run import Run
from tests.trainer.streams import make_run
from tests.trainer.test_loop import journal, settings
from trainer.loop import train


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    run, folder = make_run(tmp_path_factory.mktemp("earlier"))
    train(run, settings(folder, "earlier", checkpoint_every=2))
    return run, folder


@pytest.mark.parametrize("norm,column,power", [("l1", "grad_norm_l1", 1), ("l2", "grad_norm", 2)])
def test_a_schedule_refined_from_an_earlier_journal(
    world: tuple[Run, Path], norm: str, column: str, power: int
) -> None:
    """The rates of every step against the formula on what the earlier journal says, whose parts are cut at checkpoints."""
    run, folder = world
    smooth = median_filter(np.array([row[column] for row in journal(run, "earlier")]), size=3, mode="reflect")
    weight = np.append(smooth, smooth[-1]) ** -float(power)
    eta = np.array([weight[t] * weight[t + 1 :].sum() for t in range(6)])
    chosen = settings(
        folder,
        f"refined-{norm}",
        schedule="refined",
        schedule_from="earlier",
        schedule_norm=norm,
        schedule_smoothing=0.5,
    )
    train(run, chosen)
    found = [row["learning_rate"] for row in journal(run, f"refined-{norm}")]
    assert found == pytest.approx(1e-2 * eta / eta.max(), rel=1e-12)


def test_norms_are_those_of_the_gradient_before_clipping(world: tuple[Run, Path]) -> None:
    """L2 <= L1 <= sqrt(parameters) L2, and both as without a bound."""
    run, folder = world
    train(run, settings(folder, "unclipped", clip=0.0, steps=1))
    first, free = journal(run, "earlier")[0], journal(run, "unclipped")[0]
    assert first["clip_factor"] < 1 == free["clip_factor"]
    assert (first["grad_norm"], first["grad_norm_l1"]) == (free["grad_norm"], free["grad_norm_l1"])
    assert first["grad_norm"] < first["grad_norm_l1"] < 300 * first["grad_norm"]


def test_what_was_read_is_part_of_the_spec(world: tuple[Run, Path]) -> None:
    run, folder = world
    train(run, settings(folder, "other", seed=1, steps=4))
    refined = {"schedule": "refined", "steps": 3}
    train(run, settings(folder, "named", schedule_from="earlier", **refined))
    assert run.manifest("train", "named").spec["schedule_from"]
    with pytest.raises(InputError, match="'named' exists with another spec: schedule_from was"):
        train(run, settings(folder, "named", schedule_from="other", **refined))


def test_a_token_budget_follows_the_tokens_of_the_earlier_training(world: tuple[Run, Path]) -> None:
    """With the same samples in the same order, and the whole of their tokens as the budget, rates are those by steps."""
    run, folder = world
    refined = {"schedule": "refined", "schedule_from": "earlier"}
    train(run, settings(folder, "by-steps", **refined))
    train(
        run, settings(folder, "by-tokens", token_budget=journal(run, "earlier")[-1]["total_trained_tokens"], **refined)
    )
    rates = [[row["learning_rate"] for row in journal(run, name)] for name in ("by-steps", "by-tokens")]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
