"""Interactions of samples without projection: whole gradients from held factors, one site and one block of rows at a time.

K_ij = sum over sites of <P G_i, P G_j> with G_i = sum over i's tokens of d a'. A block's products are taken in the arithmetic of the
factors and added up over blocks and sites in float64: a flat float32 sum over 3e7 products is wrong in the third digit.

Legend: S samples, O outputs and I inputs of a site, t tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from selection_ops.held import HeldBatch
from selection_ops.preconditioning import SiteForm
from selection_ops.sites import MatrixParameter, Site

BLOCK_NUMBERS = 1 << 22
"""Numbers of gradients that stand at a time, over all samples."""


def exact_gram(
    held: Sequence[tuple[HeldBatch, int]],
    sites: Sequence[Site],
    form: Callable[[Site], SiteForm],
    loss_tokens: Sequence[int],
) -> Tensor:
    """K [S, S], float64, of samples given as (batch, place in it); `form` says what the gradient of a site is multiplied by."""
    size = len(held)
    gram_SS = torch.zeros(size, size, dtype=torch.float64)
    for site in sites:
        assert isinstance(site.shape, MatrixParameter)
        moved = form(site)
        factors = [[moved.factors(*pair) for pair in batch.pairs(site, place)] for batch, place in held]
        outputs, inputs = site.shape.outputs, site.shape.inputs
        step = max(1, BLOCK_NUMBERS // (size * inputs))
        for start in range(0, outputs, step):
            rows = slice(start, min(start + step, outputs))
            count = rows.stop - rows.start
            block_SoI = _block(factors, rows, (size, count, inputs))
            if block_SoI is None:
                continue
            moved.multiply(block_SoI, rows, loss_tokens)
            flat = block_SoI.view(size, -1)
            gram_SS += (flat @ flat.T).to("cpu", torch.float64)
    return (gram_SS + gram_SS.T) / 2


def _block(factors: list[list[tuple[Tensor, Tensor]]], rows: slice, shape: tuple[int, int, int]) -> Tensor | None:
    """Rows of every sample's gradient, float32 (float64 for float64 factors); None where no sample met the site (an idle expert)."""
    first = next((pair[0] for pairs in factors for pair in pairs), None)
    if first is None:
        return None
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    block_SoI = torch.zeros(shape, dtype=wide, device=first.device)
    for place, pairs in enumerate(factors):
        for left_tO, right_tI in pairs:
            if left_tO.dtype == wide and right_tI.dtype == wide:
                block_SoI[place].addmm_(left_tO[:, rows].T, right_tI)
            else:
                block_SoI[place] += left_tO[:, rows].T @ right_tI.to(left_tO.dtype)
    return block_SoI
