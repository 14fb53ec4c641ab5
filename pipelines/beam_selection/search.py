"""Beam transforms of a distributed selection: what all units add up to, and the search for the prices of budget and limit.

A round of a search is two passes over scalars: one draws a sample of the undecided rows, one fills the histogram laid around
its optimum. Rounds are unrolled in the job; what travels between them is one small record, a side input. Everything that is added up is
a whole number, a set, or a list of sums of units that is added exactly, so results do not depend on workers or their number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton, PCollection

from pipelines.beam_selection.rows import UnitRows
from schemas.errors import LehrError
from selection_ops.selectors.guesses import Sample, draw, lay_grid
from selection_ops.selectors.leaders import PlacedRows, in_order, leading, room_of
from selection_ops.selectors.search import (
    Bracket,
    Counts,
    Grid,
    ScalarRows,
    Terms,
    classify,
    count,
    first_bracket,
    narrow,
)

MOST_UNDECIDED = 4_000_000
"""Rows that are decided in one place; some 100 bytes each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """Which rows of a unit a search is over, and what they gain."""

    kind: str
    """`linear`, `cheapest` (gains are negative costs), `nearest` (gains are weights after passes, by size), `ranked`, or the
    reason that a cap on a measure gives."""
    unit: str = "samples"
    """Unit of the budget."""
    positive: bool = False
    """ranked: whether rows of no positive score are left out."""
    level: int | None = None
    """cheapest: only rows of a shortlist that has doubled so many times."""

    def __call__(self, rows: UnitRows) -> tuple[np.ndarray, ScalarRows]:
        """Positions among the n, and the scalars there."""
        whole = rows.scalars(self.unit)
        every = np.arange(len(rows))
        if self.kind == "linear":
            return every, whole
        if self.kind == "cheapest":
            costs = np.zeros(len(rows)) if whole.cost_n is None else whole.cost_n
            whole = dataclasses.replace(whole, gain_n=-costs, cost_n=None)
            if self.level is None:
                return every, whole
            assert rows.level_n is not None
            position = np.flatnonzero(rows.level_n <= self.level)
            return position, whole.at(position)
        if self.kind == "nearest":
            assert rows.weight_n is not None
            return every, dataclasses.replace(whole, gain_n=rows.weight_n * whole.size_n)
        gain_n = whole.gain_n
        if self.kind != "ranked":
            # An empty unit has no measures; domains have no part in a cap.
            gain_n = -rows.measures.get(self.kind, np.full(len(rows), np.nan))
            whole = dataclasses.replace(whole, group_n=np.zeros(len(rows), np.int64))
        kept = np.isfinite(gain_n) if self.kind == "ranked" else ~np.isnan(gain_n)
        if self.positive:
            kept &= gain_n > 0.0
        position = np.flatnonzero(kept)
        chosen = ScalarRows(gain_n=gain_n, size_n=whole.size_n, group_n=whole.group_n).at(position)
        return position, chosen


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What a search knows."""

    terms: Terms
    bracket: Bracket


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sure:
    """What the surely chosen rows add up to."""

    rows: int
    size_D: np.ndarray
    gains: tuple[float, ...]
    """Numbers whose exact sum it is."""
    costs: tuple[float, ...]
    without_gain: int
    lowest: float

    def __add__(self, other: Sure) -> Sure:
        return Sure(
            rows=self.rows + other.rows,
            size_D=self.size_D + other.size_D,
            gains=exact_parts(self.gains + other.gains),
            costs=exact_parts(self.costs + other.costs),
            without_gain=self.without_gain + other.without_gain,
            lowest=min(self.lowest, other.lowest),
        )

    @property
    def cost(self) -> float:
        """Added exactly, in any order."""
        return math.fsum(self.costs)

    @property
    def gain(self) -> float:
        """Added exactly, in any order."""
        return math.fsum(self.gains)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rest:
    """Rows that one place decides: all undecided ones, or the leaders beyond a ranking's sure prefix."""

    pieces: tuple[PlacedRows, ...]
    room_D: np.ndarray | None = None
    """Where only leaders count: what is left to them."""

    def __add__(self, other: Rest) -> Rest:
        both = Rest(pieces=self.pieces + other.pieces, room_D=self.room_D)
        total = sum(len(piece) for piece in both.pieces)
        if self.room_D is not None and total > 2 * max(1 << 16, max(len(piece) for piece in both.pieces)):
            ordered = in_order(both.pieces)
            both = Rest(pieces=(ordered.at(leading(ordered.rows, self.room_D)),), room_D=self.room_D)
            total = len(both.pieces[0])
        if total > MOST_UNDECIDED:
            raise LehrError(
                f"more than {MOST_UNDECIDED} candidates have so nearly equal scores that their ids would have to decide; use a selector "
                "or a budget that tells them apart, or select by `--engine memory`"
            )
        return both

    def ordered(self) -> PlacedRows:
        """In the order of ids."""
        ordered = in_order(self.pieces)
        return ordered if self.room_D is None else ordered.at(leading(ordered.rows, self.room_D))


@dataclasses.dataclass(frozen=True, eq=False)
class Many:
    """The same of several searches, which go through the same passes; adds up."""

    items: tuple[Any, ...]

    def __add__(self, other: Many) -> Many:
        return Many(tuple(one + another for one, another in zip(self.items, other.items, strict=True)))


class Added(beam.CombineFn):
    """The sum of all elements, by their own `+`; there must be one."""

    def create_accumulator(self) -> Any:
        return None

    def add_input(self, accumulator: Any, element: Any) -> Any:
        return element if accumulator is None else accumulator + element

    def merge_accumulators(self, accumulators: Iterable[Any]) -> Any:
        total = None
        for accumulator in accumulators:
            if accumulator is not None:
                total = accumulator if total is None else total + accumulator
        return total

    def extract_output(self, accumulator: Any) -> Any:
        return accumulator


def exact_parts(values: tuple[float, ...]) -> tuple[float, ...]:
    """At most a few dozen numbers with exactly the same sum, whatever the order. Source: Shewchuk 1997, as `math.fsum`."""
    if len(values) <= 64:
        return values
    parts: list[float] = []
    for value in values:
        kept = 0
        for part in parts:
            high, low = (value, part) if abs(value) >= abs(part) else (part, value)
            value = high + low
            rest = low - (value - high)
            if rest:
                parts[kept] = rest
                kept += 1
        parts[kept:] = [value]
    return tuple(parts)


def one(records: PCollection) -> AsSingleton:
    """The one element as a side input; None where there is none, because the step before it had nothing left to do."""
    return AsSingleton(records, None)


def added(records: PCollection, label: str) -> PCollection:
    """The sum of all records, as one element; nothing where there are none."""
    return records | label >> beam.CombineGlobally(Added()).without_defaults()


def search(rows: PCollection, terms: PCollection, view: View, label: str, rounds: int) -> PCollection:
    """`Known` after so many rounds over `rows`, pairs of unit and UnitRows; `terms` holds one `Terms`.

    `Many` terms are as many searches, each over the rows of its level; what they find is `Many` too.
    """
    known = terms | f"{label}Start" >> beam.Map(_start)
    for number in range(1, rounds + 1):
        drawn = rows | f"{label}Draw{number}" >> beam.Map(_draw, view, one(known))
        grid = added(drawn, f"{label}Sample{number}") | f"{label}Grid{number}" >> beam.Map(_lay, one(known))
        counted = rows | f"{label}Count{number}" >> beam.Map(_count, view, one(known), one(grid))
        known = added(counted, f"{label}Histogram{number}") | f"{label}Narrow{number}" >> beam.Map(
            _narrow, one(known), one(grid)
        )
    return known


def sure_of(rows: PCollection, known: PCollection, view: View, label: str) -> PCollection:
    """One `Sure`."""
    return added(rows | f"{label}Sure" >> beam.Map(_sure, view, one(known)), f"{label}SureSum")


def undecided_of(rows: PCollection, known: PCollection, view: View, label: str) -> PCollection:
    """One `Rest` of all undecided rows."""
    return added(rows | f"{label}Undecided" >> beam.Map(_undecided, view, one(known)), f"{label}Rest")


def leaders_of(rows: PCollection, known: PCollection, sure: PCollection, view: View, label: str) -> PCollection:
    """One `Rest` of the leaders beyond what is sure."""
    found = rows | f"{label}Leaders" >> beam.Map(_leaders, view, one(known), one(sure))
    return added(found, f"{label}Rest")


def placed(unit: UnitRows, position: np.ndarray, rows: ScalarRows) -> PlacedRows:
    """Rows of a unit with their ids and places."""
    return PlacedRows(
        rows=rows,
        sample_id_n=unit.sample_id_n[position],
        place_n=np.full(len(position), unit.index, np.int64),
        position_n=unit.position_n[position],
    )


def find(rows: UnitRows, position_n: np.ndarray) -> np.ndarray:
    """Where these rows of the unit stand among the n."""
    order = np.argsort(rows.position_n)
    return order[np.searchsorted(rows.position_n[order], position_n)]


def by_unit(place_m: np.ndarray, position_m: np.ndarray) -> dict[int, np.ndarray]:
    """Rows of units, ascending, by unit."""
    return {int(place): np.sort(position_m[place_m == place]) for place in np.unique(place_m)}


def _by_level(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step, or where it is given `Many` of something, the step of each with the view of its level."""

    @functools.wraps(step)
    def run(*given: Any) -> Any:
        counts = {len(value.items) for value in given if isinstance(value, Many)}
        if not counts:
            return step(*given)
        (count,) = counts
        return Many(tuple(step(*(_at_level(value, level) for value in given)) for level in range(count)))

    return run


def _at_level(value: Any, level: int) -> Any:
    if isinstance(value, Many):
        return value.items[level]
    return dataclasses.replace(value, level=level) if isinstance(value, View) else value


@_by_level
def _start(terms: Terms) -> Known:
    return Known(terms=terms, bracket=first_bracket(terms))


@_by_level
def _draw(element: tuple[int, UnitRows], view: View, known: Known) -> Sample:
    position, rows = view(element[1])
    return draw(rows, element[1].tag_n[position], known.bracket, known.terms)


@_by_level
def _lay(sample: Sample, known: Known) -> Grid:
    return lay_grid(sample, known.bracket, known.terms)


@_by_level
def _count(element: tuple[int, UnitRows], view: View, known: Known, grid: Grid) -> Counts:
    return count(view(element[1])[1], known.bracket, grid, known.terms)


@_by_level
def _narrow(counts: Counts, known: Known, grid: Grid) -> Known:
    return Known(terms=known.terms, bracket=narrow(known.bracket, grid, counts, known.terms))


@_by_level
def _sure(element: tuple[int, UnitRows], view: View, known: Known) -> Sure:
    _, rows = view(element[1])
    rows = rows.at(classify(rows, known.bracket, known.terms) == 1)
    size_D = np.zeros(known.terms.groups, np.int64)
    np.add.at(size_D, rows.group_n, rows.size_n.astype(np.int64))
    return Sure(
        rows=len(rows),
        size_D=size_D,
        gains=(math.fsum(rows.gain_n),),
        costs=(0.0 if rows.cost_n is None else math.fsum(rows.cost_n),),
        without_gain=int((rows.gain_n <= 0.0).sum()),
        lowest=float(rows.gain_n.min(initial=math.inf)),
    )


@_by_level
def _undecided(element: tuple[int, UnitRows], view: View, known: Known) -> Rest:
    position, rows = view(element[1])
    index = np.flatnonzero(classify(rows, known.bracket, known.terms) == 0)
    return Rest(pieces=(placed(element[1], position[index], rows.at(index)),))


def _leaders(element: tuple[int, UnitRows], view: View, known: Known, sure: Sure) -> Rest:
    position, rows = view(element[1])
    index = np.flatnonzero(classify(rows, known.bracket, known.terms) != 1)
    room_D = room_of(known.terms, sure.size_D)
    index = index[leading(rows.at(index), room_D)]
    return Rest(pieces=(placed(element[1], position[index], rows.at(index)),), room_D=room_D)
