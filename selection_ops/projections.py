"""Projections of a site's two sides, and the fold of all sites' sketches to k numbers.

P_in [r, I] is a function of (seed, version, input group), P_out [r, O] of (seed, version, site); entries are +-1/sqrt(r), so that
E[P^T P] = 1 and the sketch P_out G P_in^T keeps inner products of gradients G in expectation. The fold is a CountSketch: number
`index` of a site goes to a bucket with a sign, both functions of (seed, version, site, index).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from schemas.spec import InputGroup
from selection_ops.signs import buckets, signs


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectionSpec:
    """What all signs are a function of."""

    proj_rank: int
    seed: int
    version: int
    k: int


def input_projection(spec: ProjectionSpec, group: str, size: int) -> torch.Tensor:
    """P_in [r, I] of an input group, float64."""
    return _scaled(spec, group, "in", size)


def output_projection(spec: ProjectionSpec, site: str, size: int) -> torch.Tensor:
    """P_out [r, O] of a site, float64."""
    return _scaled(spec, site, "out", size)


def _scaled(spec: ProjectionSpec, name: str, side: str, size: int) -> torch.Tensor:
    shape = (spec.proj_rank, size)
    return signs(spec.seed, spec.version, name, side, shape).to(torch.float64) / math.sqrt(spec.proj_rank)


class Fold:
    """CountSketch of the sites' r x r sketches, laid side by side in model order, to k numbers; k = 0 keeps them."""

    def __init__(
        self, spec: ProjectionSpec, groups: tuple[InputGroup, ...], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.k = spec.k
        self.sites = tuple(site for group in groups for site in group.sites)
        if not spec.k:
            return
        pieces = [buckets(spec.seed, spec.version, site, spec.proj_rank**2, spec.k) for site in self.sites]
        self._bucket = torch.cat([bucket for bucket, _ in pieces]).to(device)
        self._sign = torch.cat([sign for _, sign in pieces]).to(device, dtype)

    def __call__(self, flat_BS: torch.Tensor) -> torch.Tensor:
        """[B, sites * r * r] to [B, k]."""
        if not self.k:
            return flat_BS
        folded_BK = flat_BS.new_zeros(flat_BS.shape[0], self.k)
        return folded_BK.index_add_(1, self._bucket, flat_BS * self._sign)
