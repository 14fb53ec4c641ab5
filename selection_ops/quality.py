"""How far what is decided from sketches agrees with what exact gradients decide. Everything here is a function of inner products.

Legend: N candidates, M target samples, P pairs.
"""

from __future__ import annotations

import dataclasses

import torch

from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """Inner products of N candidates and M target samples, from any representation of their gradients; float64."""

    candidates_NN: torch.Tensor
    cross_NM: torch.Tensor
    target_MM: torch.Tensor

    @classmethod
    def of_gram(cls, gram: torch.Tensor, candidates: int) -> Products:
        """From one Gram matrix [N + M, N + M] with the candidates first."""
        gram = gram.to(torch.float64).cpu()
        n = candidates
        return cls(candidates_NN=gram[:n, :n], cross_NM=gram[:n, n:], target_MM=gram[n:, n:])

    @property
    def norm_N(self) -> torch.Tensor:
        """Norms of the candidates."""
        return self.candidates_NN.diagonal().clamp_min(0.0).sqrt()

    @property
    def alignment_N(self) -> torch.Tensor:
        """Cosine of every candidate with the mean target gradient."""
        mean = self.target_MM.mean().clamp_min(0.0).sqrt()
        return self.cross_NM.mean(1) / (self.norm_N * mean)

    def stiff_costs(
        self, *, centred: bool = True, energy: float = 0.945, floor: float = 1e-6
    ) -> tuple[torch.Tensor, int]:
        """(stiff cost of every unit-norm candidate [N] but for the factor k, number k* of stiff directions).

        The eigenvectors are v_j = sum_m a_mj z_m / sqrt(M lambda_j), a_j those of the (centred) M x M Gram over M, so that <u, v_j> needs
        inner products alone. Elbow and floor as in `curvature.describe_target`.
        """
        count = len(self.target_MM)
        gram_MM, cross_NM = self.target_MM, self.cross_NM / self.norm_N[:, None]
        if centred:
            rows_M = gram_MM.mean(1)
            # The cross products need no centring: eigenvectors a_j of a centred Gram sum to zero.
            gram_MM = gram_MM - rows_M[:, None] - rows_M[None] + rows_M.mean()
        values_M, vectors_MM = torch.linalg.eigh(gram_MM / count)
        values_M, vectors_MM = values_M.flip(0), vectors_MM.flip(1)
        keep = (values_M > floor * values_M[0]) & (values_M > 0)
        values_J, vectors_MJ = values_M[keep], vectors_MM[:, keep]
        reached = torch.nonzero(values_J.cumsum(0) >= energy * values_M.clamp_min(0.0).sum()).flatten()
        k_star = int(reached[0]) + 1 if reached.numel() else len(values_J)
        # lambda_j <u, v_j>^2 = (sum_m a_mj <u, z_m>)^2 / M: the eigenvalue cancels.
        return ((cross_NM @ vectors_MJ[:, :k_star]).square() / count).sum(1), k_star

    def match(self, count: int, *, unit_rows: bool = False) -> list[int]:
        """Greedy `match` of `count` candidates: each addition raises the cosine of the set's sum with the mean target gradient most."""
        norm_N = self.norm_N if unit_rows else torch.ones_like(self.norm_N)
        gain_N = self.cross_NM.mean(1) / norm_N
        gram_NN = self.candidates_NN / (norm_N[:, None] * norm_N[None])
        chosen: list[int] = []
        sum_gain = sum_square = 0.0
        with_sum_N = torch.zeros_like(gain_N)
        for _ in range(count):
            square_N = sum_square + 2 * with_sum_N + gram_NN.diagonal()
            score_N = (sum_gain + gain_N) / square_N.clamp_min(1e-300).sqrt()
            score_N[chosen] = -torch.inf
            best = int(score_N.argmax())
            chosen.append(best)
            sum_gain, sum_square = float(sum_gain + gain_N[best]), float(square_N[best])
            with_sum_N = with_sum_N + gram_NN[best]
        return chosen


def spearman(one_N: torch.Tensor, other_N: torch.Tensor) -> float:
    """Rank correlation, ties at their mean rank; nan where one side is constant or shorter than two."""
    if len(one_N) != len(other_N):
        raise InputError(f"rank correlation of {len(one_N)} with {len(other_N)} numbers")
    one_N, other_N = (_ranks(values) for values in (one_N, other_N))
    one_N, other_N = one_N - one_N.mean(), other_N - other_N.mean()
    return float(one_N @ other_N / (one_N.norm() * other_N.norm()))


def _ranks(values_N: torch.Tensor) -> torch.Tensor:
    _, place_N, counts = torch.unique(values_N.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place_N]


def top(values_N: torch.Tensor, count: int) -> list[int]:
    """Indices of the `count` largest, ties by index."""
    return torch.argsort(values_N, descending=True, stable=True)[:count].tolist()


def overlap(one: list[int], other: list[int]) -> float:
    """Share of one set that is in the other of the same size."""
    return len(set(one) & set(other)) / len(one) if one else float("nan")


def pair_errors(found: torch.Tensor, exact: torch.Tensor, pairs_P2: torch.Tensor) -> torch.Tensor:
    """(found - exact) inner product over the product of the exact norms, for pairs of rows of two Gram matrices; [P]."""
    exact = exact.double().cpu()
    norm = exact.diagonal().clamp_min(0.0).sqrt()
    i, j = pairs_P2[:, 0], pairs_P2[:, 1]
    return (found.double().cpu()[i, j] - exact[i, j]) / (norm[i] * norm[j])


def rms(values: torch.Tensor) -> float:
    """Root mean square; nan for none."""
    return float(values.double().square().mean().sqrt())


def choose_pairs(samples: int, count: int, seed: int) -> torch.Tensor:
    """`count` random pairs i < j (all where there are fewer), by seed; [P, 2]."""
    every = torch.triu_indices(samples, samples, 1).T
    if len(every) <= count:
        return every
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return every[order[:count].sort().values]
