"""The filter: which candidates survive a step, before they are weighted.

Legend: N candidates; K = gram_NN interactions, b = align_N alignments, S the chosen set, 1 the vector of ones on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from schemas.errors import InputError


def _decrease(residual_N: Tensor, diagonal_N: Tensor) -> Tensor:
    positive = residual_N.clamp(min=0)
    return torch.where(diagonal_N > 0, positive * positive / (2 * diagonal_N), torch.zeros_like(residual_N))


def _residual(residual_N: Tensor, diagonal_N: Tensor) -> Tensor:
    return residual_N


def _normalised(residual_N: Tensor, diagonal_N: Tensor) -> Tensor:
    return torch.where(diagonal_N > 0, residual_N / diagonal_N.sqrt(), torch.zeros_like(residual_N))


SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "decrease": _decrease,
    "residual": _residual,
    "normalised": _normalised,
}
"""`decrease`: max(r, 0)^2 / 2K_jj, the exact gain of one optimally weighted addition; `residual`: r; `normalised`: r / sqrt(K_jj)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filtered:
    """Indices chosen, in the order of choice, and every candidate's score at the moment it was chosen or last refused."""

    chosen: tuple[int, ...]
    score_N: Tensor


def line_search(gram_NN: Tensor, align_N: Tensor, chosen: tuple[int, ...] | list[int]) -> float:
    """The uniform coefficient that matches best: alpha* = max(0, 1'b_S / 1'K_SS 1); 0 for an empty set."""
    if not chosen:
        return 0.0
    index_S = torch.tensor(chosen)
    curvature = float(gram_NN[index_S][:, index_S].sum())
    slope = float(align_N[index_S].sum())
    return max(0.0, slope / curvature) if curvature > 0 else 0.0


def greedy_filter(gram_NN: Tensor, align_N: Tensor, n_keep: int, score: str = "decrease") -> Filtered:
    """Up to `n_keep` candidates, each the best given those before it; ties go to the candidate offered first.

    r = b at first; then j* = argmax score_j outside S, S grows by j*, r = b - K_{:,S} w_S with w_S = alpha* 1. Stops when
    the best score is not positive. K and b in float64. Raises `InputError` for an unknown score.
    """
    if score not in SCORES:
        raise InputError(f"unknown filter score {score!r}: choose one of {', '.join(SCORES)}")
    rule = SCORES[score]
    diagonal_N = gram_NN.diagonal()
    final_N = torch.zeros_like(align_N)
    open_N = torch.ones(len(align_N), dtype=torch.bool)
    pull_N = torch.zeros_like(align_N)  # K_{:,S} 1
    residual_N = align_N.clone()
    chosen: list[int] = []
    while len(chosen) < min(n_keep, len(align_N)):
        score_N = rule(residual_N, diagonal_N)
        final_N = torch.where(open_N, score_N, final_N)
        best = score_N[open_N].max()
        if not float(best) > 0:
            break
        pick = int(torch.nonzero(open_N & (score_N == best))[0])
        chosen.append(pick)
        open_N[pick] = False
        pull_N = pull_N + gram_NN[:, pick]
        index_S = torch.tensor(chosen)
        curvature = float(pull_N[index_S].sum())
        alpha = max(0.0, float(align_N[index_S].sum()) / curvature) if curvature > 0 else 0.0
        residual_N = align_N - alpha * pull_N
    return Filtered(chosen=tuple(chosen), score_N=final_N)


def top_by_alignment(align_N: Tensor, n_keep: int) -> tuple[int, ...]:
    """Indices of the `n_keep` largest alignments, best first; ties go to the candidate offered first."""
    order = sorted(range(len(align_N)), key=lambda index: (-float(align_N[index]), index))
    return tuple(order[:n_keep])
