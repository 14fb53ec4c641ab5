"""What sketching may cost: variances of the inner product of two sketches, from the gradients themselves.

A matrix gradient G [O, I] is sketched to P_out G P_in^T with independent signs / sqrt(R) on both sides (LoGra, arXiv 2405.13954,
section 3); all sites' sketches x side by side are folded to k numbers by a CountSketch (Charikar, Chen, Farach-Colton, ICALP
2002; Weinberger et al., ICML 2009). Both keep inner products in expectation. Their variances, exactly:

Projection. With M = G H^T, N = G^T H, c = <G, H>, and for a random sign vector p: Var(p^T M p) = C(M) = |M|^2 + tr(M^2) - 2 sum_i M_ii^2,
one pair of rows (p of P_out, q of P_in) has

    v = |G|^2 |H|^2 + c^2 + 2 C(M) + 2 |N|^2 - 2 sum_o |G_o|^2 |H_o|^2 - 2 sum_i |G_i|^2 |H_i|^2 - 4 sum_i N_ii^2 + 4 sum G^2 H^2

and pairs that share a row of one side are correlated by C(M) or C(N). So a site has (v + (R - 1) (C(M) + C(N))) / R^2, and sites
a, b of one input group, whose P_in is one, add (C(sum N_a) - sum C(N_a)) / R. Input groups are independent. A parameter whose gradient
is taken as it is has no variance.

Fold. Given x and y: (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / k.

float16. Rounding a number to 11 bits moves it by at most 2^-11 of itself, about uniformly: the inner product of two rounded unit rows
has variance at most 2/3 * 2^-22 * sum u_i^2 v_i^2.

Legend: P pairs of samples, N samples, O outputs and I inputs of a site, Q probes, K numbers of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_NUMBERS = 1 << 20
"""Numbers of a site's gradients that are gathered at a time, over pairs: larger temporaries cost more in page faults than in arithmetic."""


def projection_variance(
    gradients: Mapping[str, torch.Tensor], pairs_P2: torch.Tensor, rank: int, *, probes: int = 0, seed: int = 0
) -> torch.Tensor:
    """Variance of <sketch_i, sketch_j> for pairs (i, j) of samples at the sites of one input group; [P] float64.

    `gradients` holds [N, O, I] by site. |M|^2, tr(M^2) and their like take O I max(O, I) operations a pair; with `probes` they are
    estimated from that many random sign vectors, in O I each (Hutchinson 1990), without bias; 0 takes them exactly.
    """
    matrices = {name: value for name, value in gradients.items() if value.dim() == 3}
    out_P = torch.zeros(len(pairs_P2), dtype=torch.float64)
    if not matrices:
        return out_P
    some = next(iter(matrices.values()))
    generator = torch.Generator().manual_seed(seed)
    y_IQ = _probes(some.shape[2], probes, generator, some)
    x_OQ = {name: _probes(value.shape[1], probes, generator, some) for name, value in matrices.items()}
    step = max(1, min(16, _NUMBERS // max(value[0].numel() for value in matrices.values())))
    for start in range(0, len(pairs_P2), step):
        part = slice(start, start + step)
        out_P[part] = _group_variance(matrices, pairs_P2[part].to(some.device), rank, x_OQ, y_IQ).cpu()
    return out_P.clamp_min_(0.0)


def _probes(size: int, probes: int, generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Columns q with E[q q^T] = 1; without probes all unit vectors, scaled so that the mean over columns is the sum."""
    if not probes:
        return torch.eye(size, dtype=like.dtype, device=like.device) * size**0.5
    signs = torch.randint(0, 2, (size, probes), generator=generator) * 2 - 1
    return signs.to(like)


def _group_variance(
    matrices: Mapping[str, torch.Tensor],
    pairs_p2: torch.Tensor,
    rank: int,
    x_OQ: Mapping[str, torch.Tensor],
    y_IQ: torch.Tensor,
) -> torch.Tensor:
    total_p = torch.zeros(len(pairs_p2), dtype=torch.float64, device=y_IQ.device)
    alone_p = torch.zeros_like(total_p)
    shared: list[torch.Tensor] = []
    for name, gradient_NOI in matrices.items():
        g_pOI, h_pOI = gradient_NOI[pairs_p2[:, 0]], gradient_NOI[pairs_p2[:, 1]]
        gt_pIO, ht_pIO = g_pOI.transpose(1, 2), h_pOI.transpose(1, 2)
        product_pOI = g_pOI * h_pOI
        diagonal_pO, diagonal_pI = product_pOI.sum(2), product_pOI.sum(1)
        g2_pOI, h2_pOI = g_pOI.square(), h_pOI.square()
        x = x_OQ[name]
        out_p, _ = _form(g_pOI @ (ht_pIO @ x), h_pOI @ (gt_pIO @ x), diagonal_pO)
        ny_pIQ, nty_pIQ = gt_pIO @ (h_pOI @ y_IQ), ht_pIO @ (g_pOI @ y_IQ)
        in_p, square_p = _form(ny_pIQ, nty_pIQ, diagonal_pI)
        one_p = (
            _sum(g2_pOI) * _sum(h2_pOI)
            + _sum(product_pOI) ** 2
            + 2 * out_p
            + 2 * square_p
            - 2 * _sum(g2_pOI.sum(2) * h2_pOI.sum(2))
            - 2 * _sum(g2_pOI.sum(1) * h2_pOI.sum(1))
            - 4 * _sum(diagonal_pI.square())
            + 4 * _sum(g2_pOI * h2_pOI)
        )
        total_p += (one_p + (rank - 1) * (out_p + in_p)) / rank**2
        alone_p += in_p
        held = [ny_pIQ, nty_pIQ, diagonal_pI]
        shared = [a + b for a, b in zip(shared, held)] if shared else held
    together_p, _ = _form(*shared)
    return total_p + (together_p - alone_p) / rank


def _form(mx_pnQ: torch.Tensor, mtx_pnQ: torch.Tensor, diagonal_pn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(C(M), |M|^2) from M x, M^T x and the diagonal of M."""
    probes = mx_pnQ.shape[2]
    square_p = _sum(mx_pnQ.square()) / probes
    return square_p + _sum(mx_pnQ * mtx_pnQ) / probes - 2 * _sum(diagonal_pn.square()), square_p


def _sum(value: torch.Tensor) -> torch.Tensor:
    return value.flatten(1).sum(1, dtype=torch.float64)


def fold_variance(x_NK: torch.Tensor, pairs_P2: torch.Tensor, k: int) -> torch.Tensor:
    """Variance of the inner products of folded rows, given the rows before the fold; [P] float64. k = 0 has none."""
    if not k:
        return torch.zeros(len(pairs_P2), dtype=torch.float64)
    x_NK = x_NK.double()
    square_NK = x_NK.square()
    norms_N = square_NK.sum(1)
    found = [
        norms_N[i] * norms_N[j] + (x_NK[i] @ x_NK[j]) ** 2 - 2 * (square_NK[i] @ square_NK[j])
        for i, j in pairs_P2.tolist()
    ]
    return torch.stack(found).cpu() / k


def float16_variance(unit_NK: torch.Tensor, pairs_P2: torch.Tensor) -> torch.Tensor:
    """Bound on the variance that float16 storage adds to the inner products of unit rows; [P] float64."""
    square_NK = unit_NK.double().square()
    crossed_P = torch.stack([square_NK[i] @ square_NK[j] for i, j in pairs_P2.tolist()])
    return crossed_P * (2.0 / 3.0) * 2.0**-22
