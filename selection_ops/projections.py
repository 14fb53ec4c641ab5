"""Projections of a matrix site's two sides, and the fold of all sites' numbers to k.

P_in [R, I] is a function of (seed, version, input group), P_out [R, O] of (seed, version, site); entries are +-1/sqrt(R), so that
E[P^T P] = 1 and the sketch P_out G P_in^T keeps inner products of gradients G in expectation. The fold is a CountSketch: number
`index` of a site goes to a bucket with a sign, both functions of (seed, version, site, index). A small site is folded as it is.

Legend: B samples, S all numbers side by side (the matrices' R x R, then the small sites'), K sketch dimension, L most numbers in a bucket.
"""

from __future__ import annotations

import dataclasses

import torch

from schemas.spec import InputGroup, SmallSite
from selection_ops.signs import buckets, signs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionSpec:
    """What all signs are a function of."""

    proj_rank: int
    seed: int
    version: int
    k: int


def input_signs(spec: ProjectionSpec, group: str, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """sqrt(R) P_in [R, I] of an input group: +-1 as int64."""
    return signs(spec.seed, spec.version, group, "in", (spec.proj_rank, size), device)


def output_signs(spec: ProjectionSpec, site: str, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """sqrt(R) P_out [R, O] of a site: +-1 as int64."""
    return signs(spec.seed, spec.version, site, "out", (spec.proj_rank, size), device)


def input_projection(spec: ProjectionSpec, group: str, size: int) -> torch.Tensor:
    """P_in [R, I] of an input group, float64."""
    return input_signs(spec, group, size).to(torch.float64) / spec.proj_rank**0.5


def output_projection(spec: ProjectionSpec, site: str, size: int) -> torch.Tensor:
    """P_out [R, O] of a site, float64."""
    return output_signs(spec, site, size).to(torch.float64) / spec.proj_rank**0.5


class Fold:
    """CountSketch of the sites' numbers, laid side by side in model order, to k numbers; k = 0 keeps them."""

    def __init__(
        self,
        spec: ProjectionSpec,
        groups: tuple[InputGroup, ...],
        device: torch.device,
        dtype: torch.dtype,
        small: tuple[SmallSite, ...] = (),
    ) -> None:
        self.k = spec.k
        if not spec.k:
            return
        sizes = [(site, spec.proj_rank**2) for group in groups for site in group.sites]
        sizes += [(site.name, site.size) for site in small]
        pieces = [buckets(spec.seed, spec.version, site, size, spec.k) for site, size in sizes]
        bucket_S = torch.cat([bucket for bucket, _ in pieces])
        sign_S = torch.cat([sign for _, sign in pieces])
        # The members of every bucket in a padded row: a gather and a sum add in one order on every device, where
        # index_add_ on an accelerator adds in the order in which its threads arrive.
        order_S = torch.argsort(bucket_S, stable=True)
        counts_K = torch.bincount(bucket_S, minlength=spec.k)
        starts_K = counts_K.cumsum(0) - counts_K
        place_S = torch.arange(len(bucket_S)) - starts_K[bucket_S[order_S]]
        member_KL = torch.zeros(spec.k, int(counts_K.max()), dtype=torch.int64)
        sign_KL = torch.zeros(member_KL.shape, dtype=dtype)
        member_KL[bucket_S[order_S], place_S] = order_S
        sign_KL[bucket_S[order_S], place_S] = sign_S[order_S].to(dtype)
        self._member_KL, self._sign_KL = member_KL.to(device), sign_KL.to(device)

    def __call__(self, flat_BS: torch.Tensor) -> torch.Tensor:
        """[B, S] to [B, K]."""
        if not self.k:
            return flat_BS
        # One sample at a time: [K, L] numbers stand, not [B, K, L]. A non-finite number reaches padded places too, but
        # then its sample is non-finite anyway.
        return torch.stack([(flat_S[self._member_KL] * self._sign_KL).sum(1) for flat_S in flat_BS])
