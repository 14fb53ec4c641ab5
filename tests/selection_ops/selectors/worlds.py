"""Small candidate sets and targets with a known structure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from selection_ops.curvature import TargetGeometry, describe_target
from selection_ops.selectors import CandidateSet

torch.set_num_threads(1)


def candidate_set(z: np.ndarray, *, dtype: torch.dtype = torch.float32, **columns: Any) -> CandidateSet:
    """Candidates with the given full sketches, ids in row order, no duplicates, 10 tokens each."""
    count = len(z)
    norm = np.linalg.norm(z, axis=1)
    unit = z / np.where(norm > 0, norm, 1.0)[:, None]
    ids = np.array([f"{i:08x}" for i in range(count)])
    values: dict[str, Any] = {
        "sample_id": ids,
        "content_id": np.array([f"c{i}" for i in ids]),
        "domain": np.array(["a", "b"])[np.arange(count) % 2],
        "tokens_N": np.full(count, 10),
        "loss_tokens_N": np.full(count, 5),
        "loss_N": np.linspace(1.0, 2.0, count),
        "grad_norm_N": norm,
        "norm_N": norm.astype(np.float32),
        "unit_NK": torch.from_numpy(unit).to(dtype),
    }
    return CandidateSet(**(values | columns))


def unit_rows(candidates: CandidateSet) -> torch.Tensor:
    """The unit sketches, which a test set always has."""
    assert candidates.unit_NK is not None
    return candidates.unit_NK


def permuted(candidates: CandidateSet, order: np.ndarray) -> CandidateSet:
    """The same candidates in another order of rows."""
    changed = {name: value[order] for name, value in vars(candidates).items() if value is not None}
    return replace(candidates, **changed)


def full_rows(candidates: CandidateSet) -> np.ndarray:
    """The full sketches as stored, float64."""
    return unit_rows(candidates).double().numpy() * candidates.norm_N.astype(np.float64)[:, None]


def world(
    n: int = 300, k: int = 48, m: int = 80, seed: int = 0, **columns: Any
) -> tuple[CandidateSet, TargetGeometry, np.ndarray]:
    """A pool of which a fifth leans along the target, with magnitudes spread over a factor of eight; and the target."""
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=k)
    target = mean + 1.5 * rng.normal(size=(m, k)) * (0.9 ** np.arange(k))
    pool = rng.normal(size=(n, k))
    pool[: n // 5] += 0.6 * mean
    pool = pool[rng.permutation(n)] * np.exp2(rng.uniform(-1.5, 1.5, size=(n, 1)))
    columns.setdefault("tokens_N", rng.integers(5, 60, n))
    return candidate_set(pool, **columns), describe_target(torch.from_numpy(target)), target
