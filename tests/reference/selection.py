"""Exact, slow answers to the selection problems; numpy and scipy in float64 only."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from scipy.optimize import linprog, minimize


def linear_program(
    c: np.ndarray,
    size: np.ndarray,
    budget: float,
    *,
    equality: bool,
    cost: np.ndarray | None = None,
    limit: float | None = None,
    group: np.ndarray | None = None,
    caps: np.ndarray | None = None,
    floors: np.ndarray | None = None,
) -> float | None:
    """The largest c.w by HiGHS; None where infeasible."""
    rows, bounds = [], []
    if cost is not None:
        rows.append(cost)
        bounds.append(limit)
    if group is not None:
        assert caps is not None and floors is not None
        for code in range(len(caps)):
            member = np.where(group == code, size, 0.0)
            if np.isfinite(caps[code]):
                rows.append(member)
                bounds.append(caps[code])
            rows.append(-member)
            bounds.append(-floors[code])
    if not equality:
        rows.append(size)
        bounds.append(budget)
    found = linprog(
        -c,
        A_ub=np.array(rows) if rows else None,
        b_ub=np.array(bounds) if rows else None,
        A_eq=size[None] if equality else None,
        b_eq=np.array([budget]) if equality else None,
        bounds=(0.0, 1.0),
        method="highs",
    )
    return -float(found.fun) if found.status == 0 else None


def cosine(rows: np.ndarray, direction: np.ndarray) -> float:
    """Cosine of the sum of rows with a direction; 0 for a zero sum."""
    total = rows.sum(axis=0)
    norm = np.linalg.norm(total)
    return float(total @ direction / (norm * np.linalg.norm(direction))) if norm > 0 else 0.0


def best_set(rows: np.ndarray, direction: np.ndarray, count: int) -> tuple[float, tuple[int, ...]]:
    """The set of `count` rows of largest cosine, by trying all."""
    return max((cosine(rows[list(chosen)], direction), chosen) for chosen in combinations(range(len(rows)), count))


def relaxed_cosine(rows: np.ndarray, direction: np.ndarray, count: int) -> float:
    """The largest cosine over w in [0, 1]^n with sum w = count.

    f ignores scale, so with w = v / y it is the convex program: minimise ||sum v_i z_i||^2 subject to
    <sum v_i z_i, g> = 1, 0 <= v_i <= y, sum v = count y; and f = 1 / root of the minimum.
    """
    unit = direction / np.linalg.norm(direction)
    n = len(rows)
    gram, gain = rows @ rows.T, rows @ unit
    best = np.argsort(-gain)[:count]
    start = np.zeros(n + 1)
    start[best] = start[n] = 1.0 / gain[best].sum()
    found = minimize(
        lambda x: x[:n] @ gram @ x[:n],
        start,
        jac=lambda x: np.append(2.0 * gram @ x[:n], 0.0),
        bounds=[(0.0, None)] * (n + 1),
        constraints=[
            {"type": "eq", "fun": lambda x: x[:n] @ gain - 1.0},
            {"type": "eq", "fun": lambda x: x[:n].sum() - count * x[n]},
            {"type": "ineq", "fun": lambda x: x[n] - x[:n]},
        ],
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-14},
    )
    return 1.0 / np.sqrt(found.fun)


def greedy_set(rows: np.ndarray, direction: np.ndarray, count: int) -> list[int]:
    """Greedy set cosine by the definition: every candidate is tried at every addition."""
    chosen: list[int] = []
    for _ in range(count):
        rest = [j for j in range(len(rows)) if j not in chosen]
        chosen.append(max(rest, key=lambda j: cosine(rows[[*chosen, j]], direction)))
    return chosen


def dense_fisher(z: np.ndarray, *, centred: bool) -> np.ndarray:
    """The sketched Fisher as a dense matrix."""
    rows = z - z.mean(axis=0) if centred else z
    return rows.T @ rows / len(z)


def dense_spectrum(z: np.ndarray, *, centred: bool, energy: float, floor: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Eigenvalues above the floor, eigenvectors in columns, elbow; from the dense matrix."""
    values, vectors = np.linalg.eigh(dense_fisher(z, centred=centred))
    values, vectors = values[::-1], vectors[:, ::-1]
    above = int((values > floor * values[0]).sum())
    shares = np.cumsum(values) / values.sum()
    return values[:above], vectors[:, :above], min(int(np.argmax(shares >= energy)) + 1, above)


def dense_columns(unit: np.ndarray, z: np.ndarray, *, energy: float, floor: float) -> dict[str, np.ndarray]:
    """The curvature columns from their formulas, with dense inverses."""
    k = z.shape[1]
    mean = z.mean(axis=0)
    values, vectors, k_star = dense_spectrum(z, centred=True, energy=energy, floor=floor)
    inverse = np.linalg.inv(vectors @ np.diag(values) @ vectors.T + values.mean() * np.eye(k))
    coordinate = unit @ vectors
    square = (unit**2).sum(axis=1)
    own_values, own_vectors, own_star = dense_spectrum(z, centred=False, energy=energy, floor=floor)
    own = unit @ own_vectors[:, :own_star]
    return {
        "alignment": unit @ mean / np.linalg.norm(mean),
        "influence": unit @ inverse @ mean,
        "quad": np.einsum("ij,jk,ik->i", unit, inverse, unit),
        "stiff_cost": (coordinate[:, :k_star] ** 2) @ values[:k_star] * k,
        "flat_energy": (coordinate[:, k_star:] ** 2).sum(axis=1) / square,
        "null_energy": 1.0 - (coordinate**2).sum(axis=1) / square,
        "stiff_cost_empirical": (own**2) @ own_values[:own_star] * k,
    }


def penalised_gain(rows: np.ndarray, direction: np.ndarray, rho: float) -> float:
    """<s, g> - rho / 2 ||s||^2 for the sum s of the rows and the unit direction g."""
    total = rows.sum(axis=0)
    return float(total @ direction / np.linalg.norm(direction) - 0.5 * rho * total @ total)


def relaxed_penalised_gain(
    rows: np.ndarray,
    direction: np.ndarray,
    rho: float,
    size: np.ndarray,
    budget: float,
    *,
    equality: bool,
    cost: np.ndarray | None = None,
    limit: float = np.inf,
    member: np.ndarray | None = None,
    cap: float = np.inf,
    floor: float = 0.0,
) -> tuple[float, np.ndarray]:
    """The largest penalised gain over w in [0, 1]^n within the budget, and its weights: a convex quadratic program.

    `cap` and `floor` hold for the size of the rows in `member`.
    """
    gram, gain = rows @ rows.T, rows @ direction / np.linalg.norm(direction)
    constraints: list[dict] = [
        {"type": "eq" if equality else "ineq", "fun": lambda w: budget - size @ w, "jac": lambda w: -size}
    ]
    if cost is not None and np.isfinite(limit):
        constraints.append({"type": "ineq", "fun": lambda w: limit - cost @ w, "jac": lambda w: -cost})
    if member is not None:
        held = np.where(member, size, 0.0)
        if np.isfinite(cap):
            constraints.append({"type": "ineq", "fun": lambda w: cap - held @ w, "jac": lambda w: -held})
        if floor > 0.0:
            constraints.append({"type": "ineq", "fun": lambda w: held @ w - floor, "jac": lambda w: held})
    found = minimize(
        lambda w: 0.5 * rho * w @ gram @ w - gain @ w,
        np.full(len(rows), budget / size.sum()),
        jac=lambda w: rho * gram @ w - gain,
        bounds=[(0.0, 1.0)] * len(rows),
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-14},
    )
    assert found.success, found.message
    return -float(found.fun), found.x


def greedy_penalised_set(
    rows: np.ndarray, direction: np.ndarray, rho: float, size: np.ndarray, budget: float
) -> list[int]:
    """Greedy by the definition: at every addition, the row that fits and raises the penalised gain most per size."""
    chosen: list[int] = []
    while True:
        left = budget - size[chosen].sum()
        rest = [j for j in range(len(rows)) if j not in chosen and size[j] <= left]
        if not rest:
            return chosen
        now = penalised_gain(rows[chosen], direction, rho)
        chosen.append(max(rest, key=lambda j: (penalised_gain(rows[[*chosen, j]], direction, rho) - now) / size[j]))
