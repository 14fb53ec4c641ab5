"""The rows of a distributed selection that may be chosen: without exact copies, and within the caps on outliers.

Shape legend: n rows of a unit that may be chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsSingleton, PCollection

from pipelines.beam_selection.rows import SelectionTask, UnitRows
from pipelines.beam_selection.search import Known, Rest, Sure, View, added, leaders_of, search, sure_of
from schemas.errors import InputError
from selection_ops.selectors.guesses import tags
from selection_ops.selectors.ordering import as_text, text_order
from selection_ops.selectors.rounding import fill_ranked
from selection_ops.selectors.search import Terms, remaining

COPY_ROWS = 500_000
"""Rows whose copies are looked for in one place."""


def without_copies(rows: PCollection, places: int) -> PCollection:
    """Rows but for exact copies of a row of smaller id."""
    copies = (
        rows
        | "Contents" >> beam.FlatMap(_contents, places)
        | "GroupContents" >> beam.GroupByKey()
        | "Copies" >> beam.FlatMap(_copies)
    )
    return {"rows": rows, "copies": copies} | "WithCopies" >> beam.CoGroupByKey() | "Uncopied" >> beam.Map(_uncopied)


def _contents(
    element: tuple[int, UnitRows], places: int
) -> Iterator[tuple[int, tuple[int, np.ndarray, np.ndarray, np.ndarray]]]:
    index, rows = element
    assert rows.content_id_n is not None
    content_n = as_text(rows.content_id_n)
    held = np.flatnonzero(np.char.str_len(content_n) > 0)
    # Of the text, whichever way numpy holds it here.
    place = (tags(content_n[held].astype("U")) if places > 1 else np.zeros(len(held), np.uint64)) % np.uint64(places)
    for number in np.unique(place):
        own = held[place == number]
        yield int(number), (index, own, content_n[own].astype("U"), rows.sample_id_n[own])


def _copies(
    element: tuple[int, Iterable[tuple[int, np.ndarray, np.ndarray, np.ndarray]]],
) -> Iterator[tuple[int, tuple[np.ndarray, list[str]]]]:
    pieces = sorted(element[1], key=lambda piece: piece[0])
    index = np.concatenate([np.full(len(piece[1]), piece[0]) for piece in pieces])
    own, content, sample_id = (np.concatenate([piece[field] for piece in pieces]) for field in (1, 2, 3))
    by_id, repeats = text_order(sample_id)
    if repeats.any():
        twice = str(sample_id[by_id[int(repeats.argmax())]])
        raise InputError(f"sample id {twice} occurs more than once; ids must be unique")
    order, repeats = text_order(content[by_id])
    order = by_id[order]
    first = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order))))
    copy, original = order[repeats], order[first[repeats]]
    for unit in np.unique(index[copy]):
        mine = index[copy] == unit
        yield int(unit), (own[copy[mine]], [str(name) for name in sample_id[original[mine]]])


def _uncopied(element: tuple[int, dict[str, Any]]) -> tuple[int, UnitRows]:
    index, grouped = element
    (rows,) = grouped["rows"]
    reasons = {
        int(at): f"duplicate_of {original}"
        for own, originals in grouped["copies"]
        for at, original in zip(own, originals)
    }
    kept_n = np.ones(len(rows), dtype=bool)
    kept_n[list(reasons)] = False
    return index, dataclasses.replace(rows.kept(kept_n, reasons), content_id_n=None)


def without_outliers(
    pipeline: beam.Pipeline, rows: PCollection, task: SelectionTask
) -> tuple[PCollection, PCollection]:
    """Rows within the caps, and one dictionary of caps by reason."""
    caps: PCollection = pipeline | "NoCaps" >> beam.Create([{}])
    whole, quantiles = rows, (task.settings.max_loss_quantile, task.settings.max_grad_norm_quantile)
    for reason, quantile in zip(("loss_outlier", "grad_norm_outlier"), quantiles):
        if quantile is None:
            continue
        view = View(kind=reason)
        measured = added(whole | f"{reason}Measured" >> beam.Map(_measured, reason), f"{reason}Sum")
        terms = measured | f"{reason}Terms" >> beam.Map(_quantile_terms, quantile)
        known = search(whole, terms, view, reason, task.rounds)
        sure = sure_of(whole, known, view, reason)
        rest = leaders_of(whole, known, sure, view, reason)
        caps = rest | f"{reason}Cap" >> beam.Map(
            _cap, AsSingleton(known), AsSingleton(sure), AsSingleton(caps), reason, quantile
        )
    if task.settings.max_loss_quantile is None and task.settings.max_grad_norm_quantile is None:
        return rows, caps
    return whole | "Uncapped" >> beam.Map(_within_caps, AsSingleton(caps)), caps


def _measured(element: tuple[int, UnitRows], reason: str) -> int:
    return len(View(kind=reason)(element[1])[0])


def _quantile_terms(count: int, quantile: float) -> Terms:
    # numpy's `inverted_cdf`: the value at position ceil(count quantile - 1) of the ascending order.
    smallest = min(count, max(0, math.ceil(count * quantile - 1)) + 1)
    return Terms(
        budget=smallest, size_D=np.array([count]), caps_D=np.array([math.inf]), floors_D=np.zeros(1), per_size=False
    )


def _cap(rest: Rest, known: Known, sure: Sure, caps: dict[str, Any], reason: str, quantile: float) -> dict[str, Any]:
    rows = rest.ordered().rows
    order = fill_ranked(np.argsort(-rows.gain_n, kind="stable"), remaining(known.terms, sure.size_D, 0.0, rows))
    lowest = min(sure.lowest, float(rows.gain_n[order].min(initial=math.inf)))
    return caps | {reason: {"quantile": quantile, "cap": -lowest if known.terms.budget else None}}


def _within_caps(element: tuple[int, UnitRows], caps: dict[str, Any]) -> tuple[int, UnitRows]:
    index, rows = element
    for reason in ("loss_outlier", "grad_norm_outlier"):
        if reason in caps and caps[reason]["cap"] is not None and len(rows):
            rows = rows.kept(~(rows.measures[reason] > caps[reason]["cap"]), reason)
    return index, rows
