"""From trainings to arms: paired differences to the control, their intervals, verdicts. Pure functions on rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selection_ops.paired import Interval, judge, mean_interval

Row = dict[str, Any]


def arm_rows(
    trainings: Sequence[Mapping[str, Any]], spec: Mapping[str, Any], offline_flops: Mapping[str, float | None]
) -> list[Row]:
    """Rows of `arms`, the control first, from rows of `arm_trainings` and the spec of a comparison."""
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in trainings:
        by_arm.setdefault(row["arm"], {})[row["seed"]] = row
    control = by_arm[spec["control"]]
    rows = []
    for label in spec["arms"]:
        own = by_arm[label]
        is_control = label == spec["control"]
        rows.append(
            {
                "arm": label,
                "control": is_control,
                "seeds": len(own),
                "eval_loss": _mean(own, "eval_loss"),
                "guard_loss": _mean(own, "guard_loss"),
                "least_tokens": min(row["trained_tokens"] for row in own.values()),
                "most_tokens": max(row["trained_tokens"] for row in own.values()),
                "flops": _mean(own, "flops"),
                "selection_flops": _mean(own, "selection_flops"),
                "offline_flops": offline_flops[label],
                **(_untold() if is_control else _judged(own, control, spec)),
            }
        )
    return rows


def _mean(rows: Mapping[int, Mapping[str, Any]], name: str) -> float | None:
    values = [rows[seed][name] for seed in sorted(rows)]
    return None if any(value is None for value in values) else sum(values) / len(values)


def differences(
    own: Mapping[int, Mapping[str, Any]], control: Mapping[int, Mapping[str, Any]], name: str
) -> list[float]:
    """Differences to the control by seed, in the order of the seeds; empty where there is no such figure."""
    values = [(own[seed][name], control[seed][name]) for seed in sorted(own)]
    return [] if any(value is None for pair in values for value in pair) else [mine - other for mine, other in values]


def _judged(
    own: Mapping[int, Mapping[str, Any]], control: Mapping[int, Mapping[str, Any]], spec: Mapping[str, Any]
) -> Row:
    kind, level = spec["interval"], spec["level"]
    lost, guarded = differences(own, control, "eval_loss"), differences(own, control, "guard_loss")
    target = mean_interval(lost, kind, level=level)
    bootstrap = mean_interval(lost, "percentile", level=level)
    guard: Interval | None = mean_interval(guarded, kind, level=level) if guarded else None
    verdict, reason = judge(target, guard, margin=spec["margin"], tolerance=spec["tolerance"])
    return {
        "difference": target.mean,
        "difference_low": target.low,
        "difference_high": target.high,
        "bootstrap_low": bootstrap.low,
        "bootstrap_high": bootstrap.high,
        "guard_difference": guard.mean if guard else None,
        "guard_low": guard.low if guard else None,
        "guard_high": guard.high if guard else None,
        "verdict": verdict,
        "reason": reason,
    }


def _untold() -> Row:
    names = ("difference", "difference_low", "difference_high", "bootstrap_low", "bootstrap_high")
    return {
        **dict.fromkeys((*names, "guard_difference", "guard_low", "guard_high")),
        "verdict": "",
        "reason": "control",
    }
