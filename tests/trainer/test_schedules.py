"""Learning rates, against transformers' schedules and closed forms."""

from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from schemas.errors import InputError
from trainer.schedules import SCHEDULES, learning_rate


def rates(name: str, total: int, warmup: int = 0) -> list[float]:
    return [
        learning_rate(0.5, name, progress=(step - 1) / total, step=step, warmup_steps=warmup)
        for step in range(1, total + 1)
    ]


@pytest.mark.parametrize(
    "name,theirs", [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)]
)
def test_without_warmup_as_in_transformers(name: str, theirs) -> None:  # type: ignore[no-untyped-def]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    schedule = theirs(optimizer, 0, 10)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    # Two float64 operations.
    assert rates(name, 10) == pytest.approx(expected, rel=1e-14)


def test_shapes() -> None:
    assert rates("constant", 4) == [0.5] * 4
    assert rates("sqrt", 4) == pytest.approx([0.5, 0.25, 0.5 * (1 - 0.5**0.5), 0.5 * (1 - 0.75**0.5)], rel=1e-15)
    for name in SCHEDULES:
        found = rates(name, 20)
        assert found[0] == 0.5
        assert found == sorted(found, reverse=True)
        assert name == "constant" or learning_rate(0.5, name, progress=1.0, step=21) == pytest.approx(0, abs=1e-16)


def test_warmup_rises_from_zero_on_top() -> None:
    bare, warm = rates("linear", 10), rates("linear", 10, warmup=4)
    assert warm == pytest.approx([b * f for b, f in zip(bare, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1])], rel=1e-15)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match="linear, constant, cosine, sqrt"):
        learning_rate(0.5, "exp", progress=0, step=1)
