"""The search for the multipliers of the linear subproblem over rows that lie in many places.

    maximise c.w   subject to   w in [0, 1]^n,   size.w = budget (or <= budget),   cost.w <= limit,
                                floor_d <= sum over domain d of size_i w_i <= cap_d

Its optimum takes a row of domain d whole where its key (c_i - mu cost_i) / size_i lies above T_d = max(cap_d, min(nu, floor_d)),
each of the three the key at which the rows above add up to the cap, the budget or the floor. Keys fall as mu rises, so
every T_d does, and so does the cost of the optimum. A histogram of sizes and costs over keys, for some values of mu, therefore
brackets mu and every T_d: rows above the brackets are surely in, rows below surely out, and the rest is undecided. Where the edges
of a histogram lie decides how much is learnt, never whether it is true. After a few rounds the undecided rows fit into one
place, and `solve_threshold` decides them under what the sure rows leave of budget, limit, caps and floors: the optimum of the whole.

Histograms hold integers alone, so they add up alike in any order. Costs count in units of 2^-shift, rounded down; a row is at least one
unit of size, so sizes bound what was rounded off.

Shape legend: n rows of one place, D groups (domains with a cap or a floor; group 0 is all others), G values of mu, B edges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from schemas.errors import InputError
from selection_ops.selectors.threshold import FeasibleSet

_ABOVE_ZERO = float(np.nextafter(0.0, 1.0))
_COST_BITS = 61
"""Costs of all rows together stay below 2^61 units."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScalarRows:
    """What a search reads of the rows of one place."""

    gain_n: np.ndarray
    """c, float64, finite."""
    size_n: np.ndarray
    """What a row takes of the budget, int64, at least 1."""
    group_n: np.ndarray
    """Group of each row, integer."""
    cost_n: np.ndarray | None = None
    """Stiff cost, float64, not negative; None without a limit."""

    def __len__(self) -> int:
        return len(self.gain_n)

    def at(self, index: np.ndarray) -> ScalarRows:
        """Some of the rows."""
        return ScalarRows(
            gain_n=self.gain_n[index],
            size_n=self.size_n[index],
            group_n=self.group_n[index],
            cost_n=None if self.cost_n is None else self.cost_n[index],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """What a selection may spend, in whole numbers, and whether its keys are gains per size or gains."""

    budget: float
    """Samples or tokens; a whole number, but where weights that are none say what may be spent."""
    size_D: np.ndarray
    """Size of all rows of each group, int64."""
    caps_D: np.ndarray
    """Largest size of each group, infinity where free."""
    floors_D: np.ndarray
    """Smallest size of each group, 0 where free."""
    limit: float | None = None
    """Largest cost."""
    shift: int = 0
    """Costs count in units of 2^-shift."""
    per_size: bool = True
    """Whether keys are per unit of size, as in the linear subproblem, or not, as in rankings."""
    positive: bool = False
    """Whether keys at or below 0 are only taken to reach floors."""

    @property
    def groups(self) -> int:
        """D."""
        return len(self.size_D)


@dataclass(frozen=True, kw_only=True, eq=False)
class Bracket:
    """What is known of an optimum: mu_low <= mu <= mu_high and low_D <= T_D <= high_D."""

    mu_low: float
    mu_high: float
    low_D: np.ndarray
    """Rows whose key at mu_low lies below it are surely out."""
    high_D: np.ndarray
    """Rows whose key at mu_high reaches it are surely in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Where a histogram counts."""

    mu_G: np.ndarray
    """Ascending, finite."""
    edges_GDB: np.ndarray
    """Ascending along B; infinity fills up."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Sizes and costs by group: of the surely-in rows, and of the undecided ones by key; adds up."""

    in_size_D: np.ndarray
    in_cost_D: np.ndarray
    size_GDB: np.ndarray
    """Bin b holds the rows with exactly b edges at or below their key; int64 [G, D, B + 1]."""
    cost_GDB: np.ndarray

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            in_size_D=self.in_size_D + other.in_size_D,
            in_cost_D=self.in_cost_D + other.in_cost_D,
            size_GDB=self.size_GDB + other.size_GDB,
            cost_GDB=self.cost_GDB + other.cost_GDB,
        )


def cost_shift(total: float, rows: int) -> int:
    """The largest shift for which the costs of all rows fit into 61 bits; `total` may be off by roundings."""
    if not math.isfinite(total):
        raise InputError("the stiff costs of the candidates do not add up to a finite number")
    # Costs smaller than the least normal number count as nothing, which the sizes make up for.
    return min(_COST_BITS - 1 - math.frexp(total)[1], 1021) if total > 0.0 and rows else 0


def first_bracket(terms: Terms) -> Bracket:
    """Nothing is known: any price where there is a limit, and any threshold."""
    return Bracket(
        mu_low=0.0,
        mu_high=0.0 if terms.limit is None else math.inf,
        low_D=np.full(terms.groups, -math.inf),
        high_D=np.full(terms.groups, math.inf),
    )


def keys(rows: ScalarRows, mu: float, *, per_size: bool) -> np.ndarray:
    """(c - mu cost) / size or c - mu cost, rounded as `solve_threshold` rounds it, so that both draw the same lines; float64 [n]."""
    price_n = rows.gain_n
    if rows.cost_n is not None and mu > 0.0:
        if math.isinf(mu):
            price_n = np.where(rows.cost_n > 0.0, -math.inf, rows.gain_n)
        else:
            price_n = rows.cost_n * -mu
            price_n += rows.gain_n
    return price_n / rows.size_n if per_size else price_n


def classify(rows: ScalarRows, bracket: Bracket, terms: Terms) -> np.ndarray:
    """1 where a row is surely taken whole, -1 where it surely is not taken, 0 where it is undecided; int8 [n]."""
    highest_n = keys(rows, bracket.mu_low, per_size=terms.per_size)
    lowest_n = highest_n if bracket.mu_high == bracket.mu_low else keys(rows, bracket.mu_high, per_size=terms.per_size)
    state_n = np.zeros(len(rows), dtype=np.int8)
    state_n[highest_n < bracket.low_D[rows.group_n]] = -1
    state_n[lowest_n >= bracket.high_D[rows.group_n]] = 1
    return state_n


def count(rows: ScalarRows, bracket: Bracket, grid: Grid, terms: Terms) -> Counts:
    """The histogram of one place.

    Surely-in rows count above every edge and surely-out rows nowhere, whatever their keys: they are so at every mu of the bracket.
    """
    state_n = classify(rows, bracket, terms)
    sure = rows.at(state_n == 1)
    rows = rows.at(state_n == 0)
    groups = terms.groups
    shape = (len(grid.mu_G), groups, grid.edges_GDB.shape[2] + 1)
    size_GDB, cost_GDB = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    size_n, cost_n = rows.size_n.astype(np.int64), cost_units(rows, terms)
    member_D = [np.flatnonzero(rows.group_n == group) for group in range(groups)]
    for g, mu in enumerate(grid.mu_G):
        key_n = keys(rows, float(mu), per_size=terms.per_size)
        for d, member in enumerate(member_D):
            bin_n = np.searchsorted(grid.edges_GDB[g, d], key_n[member], side="right")
            np.add.at(size_GDB[g, d], bin_n, size_n[member])
            np.add.at(cost_GDB[g, d], bin_n, cost_n[member])
    in_size_D, in_cost_D = np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    np.add.at(in_size_D, sure.group_n, sure.size_n.astype(np.int64))
    np.add.at(in_cost_D, sure.group_n, cost_units(sure, terms))
    return Counts(in_size_D=in_size_D, in_cost_D=in_cost_D, size_GDB=size_GDB, cost_GDB=cost_GDB)


def narrow(bracket: Bracket, grid: Grid, counts: Counts, terms: Terms) -> Bracket:
    """What is known after a histogram of all rows; never less than before."""
    found = [_thresholds(g, grid, counts, terms) for g in range(len(grid.mu_G))]
    best = bracket
    limit = math.inf if terms.limit is None else math.ldexp(terms.limit, terms.shift)
    for g, (low_D, high_D, least, most) in enumerate(found):
        mu = float(grid.mu_G[g])
        if mu < best.mu_low or mu > best.mu_high:
            continue
        # The cost falls as mu rises, so grid points in ascending order leave mu_low at the last one that is surely too dear.
        if terms.limit is not None and least > limit:
            best = replace(best, mu_low=mu, high_D=np.minimum(best.high_D, high_D))
        elif mu == best.mu_low:
            best = replace(best, high_D=np.minimum(best.high_D, high_D))
        if terms.limit is not None and most <= limit:
            best = replace(best, mu_high=mu)
        if mu == best.mu_high:
            best = replace(best, low_D=np.maximum(best.low_D, low_D))
            break
    return best


def remaining(terms: Terms, sure_D: np.ndarray, sure_cost: float, undecided: ScalarRows) -> FeasibleSet:
    """What the surely-in rows leave to the undecided ones, for `solve_threshold`; these must be in the order of ties."""
    free = not np.any(terms.floors_D > 0.0) and not np.any(np.isfinite(terms.caps_D))
    return FeasibleSet(
        size_n=undecided.size_n.astype(np.float64),
        budget=float(terms.budget - int(sure_D.sum())),
        equality=not terms.positive,
        cost_n=None if terms.limit is None else undecided.cost_n,
        limit=None if terms.limit is None else terms.limit - sure_cost,
        group_n=None if free else undecided.group_n.astype(np.int64),
        caps_D=None if free else terms.caps_D - sure_D,
        floors_D=None if free else np.maximum(terms.floors_D - sure_D, 0.0),
    )


def cost_units(rows: ScalarRows, terms: Terms) -> np.ndarray:
    """Costs in units of 2^-shift, rounded down; int64 [n]."""
    if rows.cost_n is None or terms.limit is None:
        return np.zeros(len(rows), np.int64)
    return np.floor(np.ldexp(rows.cost_n, terms.shift)).astype(np.int64)


def _thresholds(g: int, grid: Grid, counts: Counts, terms: Terms) -> tuple[np.ndarray, np.ndarray, int, int]:
    """At one price: brackets of T_D, and the least and the most that the rows above them cost, in units."""
    above = [_above(counts.size_GDB[g, d], counts.in_size_D[d]) for d in range(terms.groups)]
    edges = [np.concatenate([[-math.inf], grid.edges_GDB[g, d], [math.inf]]) for d in range(terms.groups)]
    low_nu, used_nu, high_nu = _common(edges, above, terms)
    if terms.positive:
        low_nu, used_nu, high_nu = (max(nu, _ABOVE_ZERO) for nu in (low_nu, used_nu, high_nu))
    low_D, used_D, high_D = np.empty(terms.groups), np.empty(terms.groups), np.empty(terms.groups)
    least = most = 0
    for d in range(terms.groups):
        floor, cap = float(terms.floors_D[d]), float(terms.caps_D[d])
        floor_at = (math.inf,) * 3 if floor <= 0.0 else _crossing(edges[d], above[d], above[d], floor)
        cap_at = _crossing(edges[d], above[d], above[d], cap)
        low_D[d] = max(cap_at[0], min(low_nu, floor_at[0]))
        used_D[d] = max(cap_at[1], min(used_nu, floor_at[1]))
        high_D[d] = max(cap_at[2], min(high_nu, floor_at[2]))
        cost = _above(counts.cost_GDB[g, d], counts.in_cost_D[d])
        least += int(cost[np.searchsorted(edges[d], high_D[d], side="left")])
        at_low = np.searchsorted(edges[d], used_D[d], side="right") - 1
        most += int(cost[at_low]) + int(above[d][at_low])
    return low_D, high_D, least, most


def _above(bin_B: np.ndarray, sure: int) -> np.ndarray:
    """What lies at or above -infinity, each edge, and infinity."""
    from_top = np.cumsum(bin_B[::-1])[::-1]
    return np.concatenate([from_top, [0]]) + sure


def _crossing(at: np.ndarray, least: np.ndarray, most: np.ndarray, amount: float) -> tuple[float, float, float]:
    """Largest edges at or above which surely lies more than the amount, and at least it; smallest one with surely less.

    The first and the last keep the last row that is taken whole and the first one left out between them.
    """
    more, enough, less = (np.flatnonzero(found) for found in (least > amount, least >= amount, most < amount))
    return (
        float(at[more[-1]]) if more.size else -math.inf,
        float(at[enough[-1]]) if enough.size else -math.inf,
        float(at[less[0]]) if less.size else math.inf,
    )


def _common(edges: list[np.ndarray], above: list[np.ndarray], terms: Terms) -> tuple[float, float, float]:
    """The same for the price of the budget, which all groups share within their floors and caps."""
    at = np.unique(np.concatenate(edges))
    most_at, least_at = np.zeros(len(at)), np.zeros(len(at))
    for d, (edges_B, above_B) in enumerate(zip(edges, above)):
        floor = min(float(terms.floors_D[d]), float(above_B[0]))
        upper = above_B[np.searchsorted(edges_B, at, side="right") - 1]
        lower = above_B[np.searchsorted(edges_B, at, side="left")]
        most_at += np.clip(upper, floor, terms.caps_D[d])
        least_at += np.clip(lower, floor, terms.caps_D[d])
    return _crossing(at, least_at, most_at, terms.budget)
