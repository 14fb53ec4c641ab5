"""The journal of a training before, and the schedule that is refined from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from schemas.errors import InputError
from schemas.fingerprint import fingerprint
from schemas.parquet import Part, decode_table, read_part
from schemas.run import Run
from trainer.schedules import Refined, refine
from trainer.settings import TrainSettings

_NORMS = {"l1": ("grad_norm_l1", 1.0), "l2": ("grad_norm", 2.0)}
"""Column of the journal and power of a schedule refined from it (arXiv 2310.07831: L1 norms under Adam, squares under SGD)."""


def refined_schedule(run: Run, settings: TrainSettings) -> tuple[Refined, str]:
    """The schedule from the journal of training `schedule_from`, and the fingerprint of what was read.

    A training that ends by tokens follows the tokens that the earlier one had trained on at each step.
    """
    name = settings.schedule_from
    column, power = _NORMS[settings.schedule_norm]
    steps = read_steps(run, name, run.manifest("train", name).parts)
    if column not in steps.column_names or steps[column].null_count:
        raise InputError(
            f"the journal of training {name!r} holds no {column}; use another schedule_norm, or train it again"
        )
    norms = steps[column].to_pylist()
    starts = None
    if settings.token_budget:
        ends = steps["total_trained_tokens"].to_pylist()
        starts = [end / ends[-1] for end in [0, *ends[:-1]]]
    refined = refine(norms, power=power, smoothing=settings.schedule_smoothing, starts=starts)
    return refined, fingerprint([norms, starts])


def read_steps(run: Run, training: str, parts: Sequence[Part]) -> pa.Table:
    """Rows of the steps of a training, in order, from the parts that vouch for them."""
    prefix = f"{run.training_folder(training)}/steps/"
    listed = sorted((part for part in parts if part.path.startswith(prefix)), key=lambda part: part.path)
    tables: list[Any] = [decode_table(read_part(run.url, part), part.path, schema="steps")[0] for part in listed]
    if not tables:
        raise InputError(f"training {training!r} has no journal of steps")
    return pa.concat_tables(tables, promote_options="default")
