"""What weighted rows of a distributed selection add up to: their summed gradient and some numbers beside it.

Summed gradients of units are added as whole numbers, in units that the sum over all rows fits 60 bits of; other numbers as lists with
exactly the same sum. So sums do not depend on workers, on their number, or on the order in which units come.

Shape legend: n rows of a unit that may be chosen, K sketch dimension, D groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import torch
from apache_beam.pvalue import PCollection
from apache_beam.utils.shared import Shared

from pipelines.beam_selection.decide import Limit, Totals
from pipelines.beam_selection.rows import SelectionTask, TaskStep, UnitRows
from pipelines.beam_selection.search import added, exact_parts, one
from selection_ops.selectors.rows import sum_rows
from selection_ops.selectors.search import Terms

_VECTOR_BITS = 60
"""A sum over all rows stays below 2^60 units."""

Weigh = Callable[..., tuple[np.ndarray, dict[str, float]] | None]
"""(rows, task, and a side input where there is one) to weights over the n and numbers to be added up; None where nothing is to be summed."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SetSum:
    """A weighted set; adds up."""

    units_K: np.ndarray
    """Summed gradient in units of 2^-shift, int64."""
    shift: int
    rows: int
    """Rows of positive weight."""
    size_D: np.ndarray
    """Their size by group, whatever their weights; int64."""
    parts: Mapping[str, tuple[float, ...]]
    """Numbers whose exact sums are wanted, by name."""

    def __add__(self, other: SetSum) -> SetSum:
        return SetSum(
            units_K=self.units_K + other.units_K,
            shift=self.shift,
            rows=self.rows + other.rows,
            size_D=self.size_D + other.size_D,
            parts={name: exact_parts(values + other.parts[name]) for name, values in self.parts.items()},
        )

    @property
    def sum_K(self) -> torch.Tensor:
        """Summed gradient, float64 [K]."""
        return torch.from_numpy(np.ldexp(self.units_K.astype(np.float64), -self.shift))

    def number(self, name: str) -> float:
        """One of the numbers."""
        return math.fsum(self.parts[name])


def vector_shift(total: Totals) -> int:
    """Units of 2^-shift in which no sum of rows with weights of at most 1 passes 60 bits."""
    mass = math.fsum(total.scales)
    # A stored unit row is one to within the rounding of float16.
    return min(_VECTOR_BITS - 1 - math.frexp(mass)[1], 1021) if mass > 0.0 else 0


def sums_of(
    rows: PCollection,
    weigh: Weigh,
    total: PCollection,
    task: SelectionTask,
    shared: Shared,
    label: str,
    side: Any = None,
) -> PCollection:
    """One `SetSum` over all units; nothing where `weigh` gives none. `side`: a side input of `weigh`."""
    found = rows | f"{label}Sums" >> beam.ParDo(_Sums(task, shared, weigh), one(total), side)
    return added(found, f"{label}Sum")


class _Sums(TaskStep):
    def __init__(self, task: SelectionTask, shared: Shared, weigh: Weigh) -> None:
        super().__init__(task, shared)
        self._weigh = weigh

    def process(self, element: tuple[int, UnitRows], total: Totals, side: Any) -> Iterator[SetSum]:
        rows, task = element[1], self._task
        weighed = self._weigh(rows, task) if side is None else self._weigh(rows, task, side)
        if weighed is None:
            return
        weight_n, numbers = weighed
        held_n = np.flatnonzero(weight_n)
        shift = vector_shift(total)
        units_K = np.zeros(self._context.spec.sketch_size, np.int64)
        if len(held_n):
            factor_n = weight_n[held_n] * rows.scale_n[held_n]
            sum_K = sum_rows(self._context.sketches(rows.unit), rows.position_n[held_n], factor_n)
            units_K = np.rint(np.ldexp(sum_K.numpy(), shift)).astype(np.int64)
        size_n = rows.scalars(task.budget.unit).size_n
        size_D = np.zeros(len(task.domains) + 1, np.int64)
        np.add.at(size_D, rows.group_n[held_n], size_n[held_n])
        numbers = dict(numbers)
        numbers["weight"] = math.fsum(weight_n[held_n])
        numbers["size"] = math.fsum(weight_n[held_n] * size_n[held_n])
        numbers["cost"] = 0.0 if rows.cost_n is None else math.fsum(weight_n[held_n] * rows.cost_n[held_n])
        numbers["fractional"] = float(((weight_n > 0.0) & (weight_n < 1.0)).sum())
        parts = {name: (value,) for name, value in numbers.items()}
        yield SetSum(units_K=units_K, shift=shift, rows=len(held_n), size_D=size_D, parts=parts)


def meets(held: SetSum, total: Totals, terms: Terms, limit: Limit, task: SelectionTask) -> bool:
    """Whether whole samples spend the budget as they must, keep the limit and reach the floors to within a sample.

    As `selection_ops.selectors.rounding.meets`.
    """
    if task.equality and held.rows != task.budget.amount:
        return False
    if limit.value is not None and held.number("cost") > limit.value:
        return False
    return bool(np.all((terms.floors_D <= held.size_D) | (terms.floors_D - held.size_D < total.largest_D)))
