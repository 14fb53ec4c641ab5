"""The end of a distributed selection: ranks by range partition, the parts, and the sums over the sketches of what was chosen.

Shape legend: N rows of a unit, n of them that may be chosen, K sketch dimension.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import torch
from apache_beam.pvalue import AsSingleton, PCollection
from apache_beam.utils.shared import Shared

from pipelines.beam_selection.choice import UnitChoice
from pipelines.beam_selection.rows import SelectionContext, SelectionTask
from pipelines.beam_selection.search import added
from pipelines.select import selection_footer, selection_table
from schemas.parquet import write_table
from selection_ops.selectors import effective_rank
from selection_ops.selectors.diagnostics import RANK_ROWS
from selection_ops.selectors.ordering import text_order
from selection_ops.selectors.relaxed import cosine_of
from selection_ops.selectors.rows import gather_rows, sum_rows
from selection_ops.selectors.solve import Solution

RANGE_ROWS = 500_000
"""Chosen rows that are sorted in one place."""
_SAMPLED_KEYS = 1 << 14
_SUM_UNITS = 64
"""Sums of so many neighbouring units are added in one place, in their order, so that rounding does not depend on workers."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Keys:
    """A sample of the keys of whole chosen rows, and how many there are."""

    count: int
    key_n: np.ndarray
    tag_n: np.ndarray

    def __add__(self, other: _Keys) -> _Keys:
        key_n, tag_n = np.concatenate([self.key_n, other.key_n]), np.concatenate([self.tag_n, other.tag_n])
        kept = np.lexsort((key_n, tag_n))[:_SAMPLED_KEYS]
        return _Keys(count=self.count + other.count, key_n=key_n[kept], tag_n=tag_n[kept])

    def bounds(self) -> np.ndarray:
        """Negated keys at which ranges end, ascending."""
        ranges = -(-self.count // RANGE_ROWS)
        if ranges <= 1 or not len(self.key_n):
            return np.zeros(0)
        return np.unique(np.quantile(-self.key_n, np.arange(1, ranges) / ranges, method="inverted_cdf"))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Ranged:
    """Chosen rows of one unit in one range, or their ranks."""

    index: int
    slot_n: np.ndarray
    """Which of the unit's chosen rows."""
    weight_n: np.ndarray
    key_n: np.ndarray
    sample_id_n: np.ndarray


def ranks_of(choices: PCollection, label: str = "") -> tuple[PCollection, PCollection]:
    """Pairs of unit and (slots, ranks), some for every unit, and one Counter of chosen rows by range."""
    keys = added(choices | f"{label}Keys" >> beam.Map(_keys), f"{label}SampleKeys") | f"{label}Ranges" >> beam.Map(
        _Keys.bounds
    )
    sorted_ranges = (
        choices
        | f"{label}ByRange" >> beam.FlatMap(_by_range, AsSingleton(keys))
        | f"{label}GroupRange" >> beam.GroupByKey()
        | f"{label}SortRange" >> beam.Map(_sorted)
    )
    counts = added(sorted_ranges | f"{label}CountRange" >> beam.Map(_count_range), f"{label}CountRanges")
    return sorted_ranges | f"{label}Offset" >> beam.FlatMap(_offset, AsSingleton(counts)), counts


def _keys(element: tuple[int, UnitChoice]) -> _Keys:
    choice = element[1]
    whole = choice.weight_n == 1.0
    key_n, tag_n = choice.key_n[whole], choice.rows.tag_n[choice.chosen_n[whole]]
    kept = np.lexsort((key_n, tag_n))[:_SAMPLED_KEYS]
    return _Keys(count=int(whole.sum()), key_n=key_n[kept], tag_n=tag_n[kept])


def _by_range(element: tuple[int, UnitChoice], bounds: np.ndarray) -> Iterator[tuple[int, _Ranged]]:
    choice = element[1]
    range_n = np.searchsorted(bounds, -choice.key_n, side="left")
    # Fractional rows stand behind all whole ones.
    range_n[choice.weight_n < 1.0] = len(bounds) + 1
    # The first range hears of every unit, so that a unit without chosen rows is written too.
    for number in sorted({0, *range_n.tolist()}):
        slot_n = np.flatnonzero(range_n == number)
        yield (
            int(number),
            _Ranged(
                index=choice.rows.index,
                slot_n=slot_n,
                weight_n=choice.weight_n[slot_n],
                key_n=choice.key_n[slot_n],
                sample_id_n=choice.rows.sample_id_n[choice.chosen_n[slot_n]],
            ),
        )


def _sorted(element: tuple[int, Iterable[_Ranged]]) -> tuple[int, int, list[tuple[int, np.ndarray, np.ndarray]]]:
    pieces = sorted(element[1], key=lambda piece: piece.index)
    sample_id = np.concatenate([piece.sample_id_n for piece in pieces])
    by_id = text_order(sample_id)[0]
    weight = np.concatenate([piece.weight_n for piece in pieces])[by_id]
    key = np.concatenate([piece.key_n for piece in pieces])[by_id]
    rank = np.empty(len(sample_id), np.int64)
    rank[by_id[np.lexsort((-key, -weight))]] = np.arange(len(sample_id))
    ends = np.cumsum([len(piece.slot_n) for piece in pieces])
    ranks = np.split(rank, ends[:-1])
    return element[0], len(rank), [(piece.index, piece.slot_n, own) for piece, own in zip(pieces, ranks, strict=True)]


def _count_range(element: tuple[int, int, Any]) -> Counter[int]:
    # One more in each, because counters forget zeros.
    return Counter({element[0]: element[1] + 1})


def selected_of(counts: Counter[int]) -> int:
    """How many rows are chosen."""
    return sum(counts.values()) - len(counts)


def _offset(
    element: tuple[int, int, list[tuple[int, np.ndarray, np.ndarray]]], counts: Counter[int]
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    number, _, ranks = element
    before = sum(held - 1 for other, held in counts.items() if other < number)
    for index, slot_n, own in ranks:
        yield index, (slot_n, own + before)


class WriteUnit(beam.DoFn):
    """(unit, its choice and its ranks) in; ("part", record), ("sum", ...) and ("spread", ...) out."""

    def __init__(self, task: SelectionTask, shared: Shared, footer_spec: str, score: str) -> None:
        self._task, self._shared = task, shared
        self._footer = selection_footer(footer_spec, score)

    def setup(self) -> None:
        task = self._task
        self._context = self._shared.acquire(lambda: SelectionContext(task))

    def process(self, element: tuple[int, dict[str, Any]], counts: Counter[int]) -> Iterator[tuple[str, Any]]:
        index, grouped = element
        (choice,) = grouped["choice"]
        context, rows = self._context, choice.rows
        rank_n = np.empty(len(choice.chosen_n), np.int64)
        for slot_n, own in grouped["ranks"]:
            rank_n[slot_n] = own
        table = context.table(rows.unit, everything=True)
        at_n = rows.position_n[choice.chosen_n]
        order = np.argsort(rank_n)
        solution = _solution(choice, table.num_rows)
        path = f"{context.run.selection_folder(self._task.name)}/part-{index:05d}.parquet"
        rank_N = np.full(table.num_rows, -1, np.int64)
        rank_N[at_n] = rank_n
        part = write_table(context.run.url, path, selection_table(table, solution, rank_N), self._footer)
        yield "part", _record(index, part, choice, solution, table)
        if self._task.columns_only or not len(at_n):
            return
        unit_NK = context.sketches(rows.unit)
        norm_n = table["sketch_norm"].to_numpy().astype(np.float64)[at_n]
        yield "sum", (index, sum_rows(unit_NK, at_n, choice.weight_n * norm_n))
        selected = selected_of(counts)
        spread = np.unique(np.linspace(0, max(selected - 1, 0), min(RANK_ROWS, selected)).astype(np.int64))
        shown = order[np.isin(rank_n[order], spread)]
        if len(shown):
            yield "spread", (rank_n[shown], gather_rows(unit_NK, at_n[shown]))


def _solution(choice: UnitChoice, count: int) -> Solution:
    """The unit's part of a solution, over its N rows."""
    rows = choice.rows
    at_n = rows.position_n[choice.chosen_n]
    scores = {}
    for name, values in choice.scores.items():
        scores[name] = np.full(count, np.nan)
        scores[name][rows.position_n] = values
    reason_N = rows.reason_N.copy()
    reason_N[rows.position_n] = "not_chosen"
    if choice.outside_n is not None:
        reason_N[rows.position_n[choice.outside_n]] = "outside_shortlist"
    reason_N[rows.position_n[~np.isfinite(choice.scores["score"])]] = "non_finite"
    reason_N[at_n] = "selected"
    return Solution(
        order_n=at_n, weights_n=choice.weight_n, scores=scores, reason_N=reason_N, certificate={}, diagnostics={}
    )


def _record(index: int, part: Any, choice: UnitChoice, solution: Solution, table: Any) -> dict[str, Any]:
    tokens = table["tokens"].to_numpy()[solution.order_n]
    domains: dict[str, list[int]] = {}
    for domain, size in zip(table["domain"].take(solution.order_n).to_pylist(), tokens.tolist()):
        held = domains.setdefault(domain, [0, 0])
        held[0] += 1
        held[1] += size
    return {
        "key": f"part-{index:05d}",
        "part": dataclasses.asdict(part),
        "selected": len(solution.order_n),
        "tokens": int(tokens.sum()),
        "weights": float(choice.weight_n.sum()),
        "reasons": dict(Counter(reason.split(" ")[0] for reason in solution.reason_N)),
        "domains": domains,
    }


def sketch_records(written: PCollection, task: SelectionTask, shared: Shared) -> tuple[PCollection, PCollection]:
    """Records `cosines` and `spread` of what was chosen; none where nothing was."""
    cosines = (
        written
        | "Sums" >> beam.FlatMap(_of_kind, "sum")
        | "BySumUnits" >> beam.Map(lambda pair: (pair[0] // _SUM_UNITS, pair))
        | "GroupSums" >> beam.GroupByKey()
        | "AddUnits" >> beam.MapTuple(lambda block, pairs: (None, (block, _ordered_sum(pairs))))
        | "GroupBlocks" >> beam.GroupByKey()
        | "Cosines" >> beam.ParDo(_Cosines(task, shared))
    )
    spread = (
        written
        | "Spread" >> beam.FlatMap(_of_kind, "spread")
        | "PairSpread" >> beam.Map(lambda pair: (None, pair))
        | "GroupSpread" >> beam.GroupByKey()
        | "EffectiveRank" >> beam.MapTuple(lambda _, pairs: _effective_rank(pairs))
    )
    return cosines, spread


def _of_kind(element: tuple[str, Any], kind: str) -> Iterator[Any]:
    if element[0] == kind:
        yield element[1]


def part_records(written: PCollection) -> PCollection:
    """Records of the parts."""
    return written | "Parts" >> beam.FlatMap(_of_kind, "part")


def _ordered_sum(pairs: Iterable[tuple[int, torch.Tensor]]) -> torch.Tensor:
    ordered = [value for _, value in sorted(pairs, key=lambda pair: pair[0])]
    total_K = torch.zeros_like(ordered[0])
    for value in ordered:
        total_K += value
    return total_K


class _Cosines(beam.DoFn):
    def __init__(self, task: SelectionTask, shared: Shared) -> None:
        self._task, self._shared = task, shared

    def setup(self) -> None:
        task = self._task
        self._context = self._shared.acquire(lambda: SelectionContext(task))

    def process(self, element: tuple[None, Iterable[tuple[int, torch.Tensor]]]) -> Iterator[dict[str, Any]]:
        sum_K = _ordered_sum(element[1])
        record: dict[str, Any] = {"key": "cosines"}
        target = self._context.target
        if target is not None:
            mean_K = target.geometry.mean_K
            record["set_cosine"] = cosine_of(sum_K, mean_K / mean_K.norm())
            if len(target.sketches["evaluation"]):
                mean_K = target.sketches["evaluation"].mean(dim=0)
                norm = float(mean_K.norm())
                record["set_cosine_evaluation"] = cosine_of(sum_K, mean_K / norm) if norm > 0.0 else 0.0
        yield record


def _effective_rank(pairs: Iterable[tuple[np.ndarray, torch.Tensor]]) -> dict[str, Any]:
    pieces = list(pairs)
    rank_n = np.concatenate([rank for rank, _ in pieces])
    unit_nK = torch.cat([unit for _, unit in pieces])[torch.from_numpy(np.argsort(rank_n))]
    return {"key": "spread", "effective_rank": effective_rank(unit_nK), "effective_rank_rows": len(rank_n)}
