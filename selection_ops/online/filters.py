"""The filter: which candidates survive a step, before they are weighted.

Legend: N candidates; K = gram_NN interactions, b = align_N alignments, S the chosen set, 1 the vector of ones on it,
r = b - K_{:,S} w_S what is left of the alignments once S has been taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from schemas.errors import InputError
from schemas.fingerprint import canonical_json, hash128
from selection_ops.online.weights import bounded_nnls, regularised


def _decrease(residual_N: Tensor, diagonal_N: Tensor) -> Tensor:
    positive = residual_N.clamp(min=0)
    return torch.where(diagonal_N > 0, positive * positive / (2 * diagonal_N), torch.zeros_like(residual_N))


def _residual(residual_N: Tensor, diagonal_N: Tensor) -> Tensor:
    return residual_N


def _normalised(residual_N: Tensor, diagonal_N: Tensor) -> Tensor:
    return torch.where(diagonal_N > 0, residual_N / diagonal_N.sqrt(), torch.zeros_like(residual_N))


Score = Callable[[Tensor, Tensor], Tensor]
SCORES: dict[str, Score] = {
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """What chance depends on: the same (seed, step, sample_id) draws the same number, in any order of candidates."""

    seed: int
    step: int
    sample_ids: Sequence[str]

    def keys(self, purpose: bytes) -> list[str]:
        """A hash of every candidate, 128 bit in hex."""
        return [hash128(purpose, canonical_json([self.seed, self.step, sample_id])) for sample_id in self.sample_ids]

    def among(self, indices: Sequence[int]) -> Draw:
        """The same of some candidates."""
        return dataclasses.replace(self, sample_ids=[self.sample_ids[index] for index in indices])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filtering:
    """What a filter chooses by: at most `n_keep` by a score of `SCORES`; chance, temperature and ridge where it has them."""

    n_keep: int
    draw: Draw
    score: str = "decrease"
    temperature: float = 0.9
    ridge: float = 1e-3


def get_score(name: str) -> Score:
    """The score called `name`; raises `InputError` listing the known ones."""
    if name not in SCORES:
        raise InputError(f"unknown filter score {name!r}: choose one of {', '.join(SCORES)}")
    return SCORES[name]


def line_search(gram_NN: Tensor, align_N: Tensor, chosen: tuple[int, ...] | list[int]) -> float:
    """The uniform coefficient that matches best: alpha* = max(0, 1'b_S / 1'K_SS 1); 0 for an empty set."""
    if not chosen:
        return 0.0
    index_S = torch.tensor(chosen)
    curvature = float(gram_NN[index_S][:, index_S].sum())
    slope = float(align_N[index_S].sum())
    return max(0.0, slope / curvature) if curvature > 0 else 0.0


def _uniform(gram_NN: Tensor, align_N: Tensor) -> Callable[[list[int]], Tensor]:
    """r with w_S = alpha* 1, carried from one addition to the next."""
    pull_N = torch.zeros_like(align_N)  # K_{:,S} 1

    def residual(chosen: list[int]) -> Tensor:
        nonlocal pull_N
        pull_N = pull_N + gram_NN[:, chosen[-1]]
        index_S = torch.tensor(chosen)
        curvature = float(pull_N[index_S].sum())
        alpha = max(0.0, float(align_N[index_S].sum()) / curvature) if curvature > 0 else 0.0
        return align_N - alpha * pull_N

    return residual


def _refit(gram_NN: Tensor, align_N: Tensor, ridge: float) -> Callable[[list[int]], Tensor]:
    """r with w_S the non-negative least squares fit on S under the ridge of the weights."""

    def residual(chosen: list[int]) -> Tensor:
        index_S = torch.tensor(chosen)
        gram_SS = regularised(gram_NN[index_S][:, index_S], ridge)
        return align_N - gram_NN[:, index_S] @ bounded_nnls(gram_SS, align_N[index_S], upper=math.inf)

    return residual


def _greedily(
    gram_NN: Tensor,
    align_N: Tensor,
    how: Filtering,
    residual: Callable[[list[int]], Tensor],
    noise: Callable[[int], Tensor] | None = None,
) -> Filtered:
    rule = get_score(how.score)
    diagonal_N = gram_NN.diagonal()
    final_N = torch.zeros_like(align_N)
    open_N = torch.ones(len(align_N), dtype=torch.bool)
    residual_N = align_N.clone()
    chosen: list[int] = []
    while len(chosen) < min(how.n_keep, len(align_N)):
        score_N = rule(residual_N, diagonal_N)
        final_N = torch.where(open_N, score_N, final_N)
        if noise is None:
            worth_N = score_N
            if not float(worth_N[open_N].max()) > 0:
                break
        else:
            worth_N = standardised(score_N, open_N) + how.temperature * noise(len(chosen))
        best = worth_N[open_N].max()
        pick = int(torch.nonzero(open_N & (worth_N == best))[0])
        chosen.append(pick)
        open_N[pick] = False
        residual_N = residual(chosen)
    return Filtered(chosen=tuple(chosen), score_N=final_N)


def greedy_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """Up to `n_keep` candidates, each the best given those before it; ties go to the candidate offered first.

    r = b at first; then j* = argmax score_j outside S, S grows by j*, r = b - K_{:,S} w_S with w_S = alpha* 1. Stops when
    the best score is not positive. K and b in float64. Raises `InputError` for an unknown score.
    """
    return _greedily(gram_NN, align_N, how, _uniform(gram_NN, align_N))


def pursuit_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """Orthogonal matching pursuit: the greedy filter with w_S refit by non-negative least squares after every addition.

    As in GRAD-MATCH (Killamsetty et al. 2021, arXiv 2103.00123, algorithm 2), with the score `residual`.
    """
    return _greedily(gram_NN, align_N, how, _refit(gram_NN, align_N, how.ridge))


def boltzmann_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """`n_keep` candidates, each drawn with probability proportional to exp(s_j / temperature) among those still open.

    s is the greedy score of what is left of the alignments, standardised over the open candidates before every draw: on raw
    scores a temperature would mean something else in every step (after OPUS, arXiv 2602.05400). Drawn by adding temperature *
    Gumbel noise, a function of (seed, step, sample_id), and taking the largest. It does not stop at scores that are not positive.
    """

    def noise(draw: int) -> Tensor:
        keys = how.draw.keys(b"boltzmann filter %d" % draw)
        return torch.tensor([-math.log(-math.log(_open_unit(key))) for key in keys], dtype=torch.float64)

    return _greedily(gram_NN, align_N, how, _uniform(gram_NN, align_N), noise)


def _open_unit(key: str) -> float:
    return (int(key[:13], 16) + 0.5) / 16**13


def standardised(score_N: Tensor, open_N: Tensor) -> Tensor:
    """Scores less their mean, over their standard deviation, both over the open ones; zero where those are all alike."""
    spread = float(score_N[open_N].std(correction=0))
    return (score_N - score_N[open_N].mean()) / spread if spread > 0 else torch.zeros_like(score_N)


def set_cosine_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """`n_keep` candidates, each the one that makes <s, u> / |s| largest, s being the sum of the sketches chosen.

    That is (sum b_S + b_j) / sqrt(1'K_SS 1 + 2 (K 1_S)_j + K_jj), the cosine of s and the target up to the constant |u|: the greedy
    of the selector `match`, on the candidates of a step.
    """
    diagonal_N = gram_NN.diagonal()
    open_N = torch.ones(len(align_N), dtype=torch.bool)
    final_N, pull_N = torch.zeros_like(align_N), torch.zeros_like(align_N)
    total = square = 0.0
    chosen: list[int] = []
    while len(chosen) < min(how.n_keep, len(align_N)):
        square_N = square + 2 * pull_N + diagonal_N
        value_N = torch.where(square_N > 0, (total + align_N) / square_N.clamp(min=0).sqrt(), torch.zeros_like(align_N))
        final_N = torch.where(open_N, value_N, final_N)
        pick = int(torch.nonzero(open_N & (value_N == value_N[open_N].max()))[0])
        total, square = total + float(align_N[pick]), float(square_N[pick])
        pull_N = pull_N + gram_NN[:, pick]
        chosen.append(pick)
        open_N[pick] = False
    return Filtered(chosen=tuple(chosen), score_N=final_N)


def top_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """The `n_keep` largest alignments, best first."""
    return Filtered(chosen=top_by_score(align_N, how.n_keep), score_N=align_N)


def cosine_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """The `n_keep` largest cosines with the target, b / sqrt(K_jj) up to the constant |u|, best first."""
    score_N = _normalised(align_N, gram_NN.diagonal())
    return Filtered(chosen=top_by_score(score_N, how.n_keep), score_N=score_N)


def threshold_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """Every candidate with b > 0, best first, however many there are."""
    return Filtered(chosen=top_by_score(align_N, int((align_N > 0).sum())), score_N=align_N)


def random_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """`n_keep` candidates drawn by a hash of (seed, step, sample_id)."""
    keys = how.draw.keys(b"random filter")
    order = sorted(range(len(keys)), key=lambda index: (keys[index], index))
    return Filtered(chosen=tuple(order[: how.n_keep]), score_N=torch.zeros_like(align_N))


def no_filter(gram_NN: Tensor, align_N: Tensor, how: Filtering) -> Filtered:
    """Every candidate, in the order offered; the weights decide."""
    return Filtered(chosen=tuple(range(len(align_N))), score_N=align_N)


Filter = Callable[[Tensor, Tensor, Filtering], Filtered]
FILTERS: dict[str, Filter] = {
    "greedy": greedy_filter,
    "omp": pursuit_filter,
    "boltzmann": boltzmann_filter,
    "set-cosine": set_cosine_filter,
    "top-k": top_filter,
    "cosine": cosine_filter,
    "threshold": threshold_filter,
    "random": random_filter,
    "none": no_filter,
}
UNBOUND = ("threshold", "none")
"""Filters that `n_keep` does not bind."""


def get_filter(name: str) -> Filter:
    """The filter called `name`; raises `InputError` listing the known ones."""
    if name not in FILTERS:
        raise InputError(f"unknown filter {name!r}: choose one of {', '.join(FILTERS)}")
    return FILTERS[name]


def top_by_score(score_N: Tensor, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest scores, best first; ties go to the candidate offered first."""
    order = sorted(range(len(score_N)), key=lambda index: (-float(score_N[index]), index))
    return tuple(order[:count])
