"""Where a search should look next: a sample of the undecided rows is solved, and prices and edges are laid around its optimum.

A guess decides how much a histogram teaches, never what is true; see `selection_ops.selectors.search`.

Shape legend: n rows of one place or of the sample, D groups, G values of mu, B edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from selection_ops.selectors.search import Bracket, Grid, ScalarRows, Terms, classify, cost_units, keys
from selection_ops.selectors.threshold import FeasibleSet, solve_threshold

SAMPLE_ROWS = 1 << 15
"""Undecided rows that a guess is made from, over all groups."""
EDGES = 256
"""Edges of each group at each price, next to the threshold of the sample; half as many again lie far from it."""
_SPREADS = (0.0, 0.25, 1.0, 3.0, 9.0)
"""Distances from the guess, in typical errors of a sample of its size."""
_FACTORS = (1.0 / 256.0, 1.0 / 16.0, 1.0 / 3.0, 3.0, 16.0, 256.0, 2.0**16, 2.0**30)
"""Prices over the guess that are tried too, should the sample mislead."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The undecided rows of smallest tag in each group, and how many there are; adds up, in any order, to the same."""

    rows: ScalarRows
    tag_n: np.ndarray
    """uint64: a hash of the id."""
    count_D: np.ndarray
    """Undecided rows of each group."""
    in_size_D: np.ndarray
    """Size of the surely-in rows of each group."""
    in_cost: int
    """Their cost, in the units of the terms."""

    def __add__(self, other: Sample) -> Sample:
        a, b = self.rows, other.rows
        costs = None
        if a.cost_n is not None and b.cost_n is not None:
            costs = np.concatenate([a.cost_n, b.cost_n])
        rows = ScalarRows(
            gain_n=np.concatenate([a.gain_n, b.gain_n]),
            size_n=np.concatenate([a.size_n, b.size_n]),
            group_n=np.concatenate([a.group_n, b.group_n]),
            cost_n=costs,
        )
        tag_n = np.concatenate([self.tag_n, other.tag_n])
        kept = _lowest(tag_n, rows, len(self.count_D))
        return Sample(
            rows=rows.at(kept),
            tag_n=tag_n[kept],
            count_D=self.count_D + other.count_D,
            in_size_D=self.in_size_D + other.in_size_D,
            in_cost=self.in_cost + other.in_cost,
        )


def draw(rows: ScalarRows, tag_n: np.ndarray, bracket: Bracket, terms: Terms) -> Sample:
    """The sample of one place."""
    state_n = classify(rows, bracket, terms)
    open_n = np.flatnonzero(state_n == 0)
    sure = rows.at(state_n == 1)
    undecided, tag_n = rows.at(open_n), tag_n[open_n]
    kept = _lowest(tag_n, undecided, terms.groups)
    in_size_D = np.zeros(terms.groups, np.int64)
    np.add.at(in_size_D, sure.group_n, sure.size_n.astype(np.int64))
    return Sample(
        rows=undecided.at(kept),
        tag_n=tag_n[kept],
        count_D=np.bincount(undecided.group_n, minlength=terms.groups),
        in_size_D=in_size_D,
        in_cost=int(cost_units(sure, terms).sum()),
    )


def tags(text_N: np.ndarray) -> np.ndarray:
    """A hash of each text, uint64, by eight letters at a time; ids that are counters are spread as well as hashes are."""
    words = np.ascontiguousarray(text_N if text_N.dtype.kind in "SU" else text_N.astype(str))
    width = -(-words.dtype.itemsize // 8) * 8
    letters = np.zeros((len(words), width), np.uint8)
    letters[:, : words.dtype.itemsize] = words.view(np.uint8).reshape(len(words), -1)
    tag_N = np.zeros(len(words), np.uint64)
    for word_N in letters.view("<u8").T:
        # The finaliser of splitmix64.
        mixed_N = (tag_N ^ word_N) + np.uint64(0x9E3779B97F4A7C15)
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed_N ^= mixed_N >> np.uint64(31)
        # What numpy fills up short texts with changes nothing.
        tag_N = np.where(word_N == 0, tag_N, mixed_N)
    return tag_N


def lay_grid(sample: Sample, bracket: Bracket, terms: Terms) -> Grid:
    """Prices around the optimum of the sample, and for each of them edges around the thresholds that the sample has there."""
    feasible = _feasible(sample, terms)
    mu_G = np.array([0.0]) if terms.limit is None else _prices(sample, feasible, bracket, terms)
    edges_GDB = np.full((len(mu_G), terms.groups, EDGES + EDGES // 2), math.inf)
    for g, mu in enumerate(mu_G):
        key_n = keys(sample.rows, float(mu), per_size=terms.per_size)
        taken_n = solve_threshold(key_n * feasible.size_n, feasible).weights_n > 0.0
        for d in range(terms.groups):
            member_n = sample.rows.group_n == d
            # Keys above and below the threshold, densest next to it, where the sample is most likely to be right.
            above, below = np.unique(key_n[member_n & taken_n]), np.unique(key_n[member_n & ~taken_n])
            edges = np.union1d(_nearest(above[::-1], EDGES // 2), _nearest(below[::-1], EDGES // 2))
            if above.size:
                edges = np.union1d(edges, _nearest(above, EDGES // 2))
            edges_GDB[g, d, : len(edges)] = edges
    return Grid(mu_G=mu_G, edges_GDB=edges_GDB)


def _nearest(ranked: np.ndarray, most: int) -> np.ndarray:
    """At most so many of a sequence: its first ones, and then ever fewer."""
    count = len(ranked)
    if count > most:
        ranked = ranked[np.unique(np.geomspace(1, count, most).round().astype(np.int64)) - 1]
    return ranked


def _feasible(sample: Sample, terms: Terms) -> FeasibleSet:
    """What is left to the undecided rows, over the sample, of which every row stands for as many as there are to one."""
    rows = sample.rows
    held_D = np.bincount(rows.group_n, minlength=terms.groups)
    size_n = rows.size_n * (sample.count_D / np.maximum(held_D, 1))[rows.group_n]
    size_D = np.bincount(rows.group_n, size_n, minlength=terms.groups)
    caps_D = np.maximum(terms.caps_D - sample.in_size_D, 0.0)
    floors_D = np.minimum(np.maximum(terms.floors_D - sample.in_size_D, 0.0), np.minimum(size_D, caps_D))
    budget = float(terms.budget - sample.in_size_D.sum())
    return FeasibleSet(
        size_n=size_n,
        budget=max(budget, float(floors_D.sum())),
        equality=False,
        group_n=rows.group_n,
        caps_D=caps_D,
        floors_D=floors_D,
    )


def _prices(sample: Sample, feasible: FeasibleSet, bracket: Bracket, terms: Terms) -> np.ndarray:
    rows = sample.rows
    points = {bracket.mu_low}
    if math.isfinite(bracket.mu_high):
        points |= {bracket.mu_high, 0.5 * (bracket.mu_low + bracket.mu_high)}
    if len(rows) and rows.cost_n is not None and terms.limit is not None:
        times_n = feasible.size_n / rows.size_n
        room = terms.limit - math.ldexp(sample.in_cost, -terms.shift)
        error = 1.0 / math.sqrt(len(rows))
        for spread in sorted({sign * spread * error for spread in _SPREADS for sign in (-1.0, 1.0)}):
            at = replace(feasible, cost_n=rows.cost_n * times_n, limit=max(room * (1.0 + spread), 0.0))
            guess = solve_threshold(rows.gain_n * times_n, at).mu
            points.add(guess)
            if spread == 0.0:
                around = guess if guess > 0.0 else _typical_price(rows)
                points |= {around * factor for factor in _FACTORS}
    inside = [mu for mu in points if bracket.mu_low <= mu <= bracket.mu_high and math.isfinite(mu)]
    return np.array(sorted(inside))


def _typical_price(rows: ScalarRows) -> float:
    assert rows.cost_n is not None
    dear = rows.cost_n > 0.0
    ratio = np.abs(rows.gain_n[dear]) / rows.cost_n[dear]
    ratio = ratio[(ratio > 0.0) & np.isfinite(ratio)]
    return float(np.median(ratio)) if ratio.size else 1.0


def _lowest(tag_n: np.ndarray, rows: ScalarRows, groups: int) -> np.ndarray:
    """Positions of the rows of smallest tag in each group, in an order that depends on the rows alone."""
    order = np.lexsort((rows.size_n, rows.gain_n, tag_n, rows.group_n))
    starts = np.searchsorted(rows.group_n[order], np.arange(groups + 1))
    most = max(SAMPLE_ROWS // groups, 64)
    return np.concatenate([order[starts[d] : min(starts[d] + most, starts[d + 1])] for d in range(groups)])
