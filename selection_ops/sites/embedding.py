"""Embeddings: y = c W[id]. The gradient of W [V, I] is the sum over tokens of c e_id (gradient of y)'."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from selection_ops.sites.base import Forward, MatrixParameter, Parameter, SiteType, Tape, first_argument, site_type


@site_type()
class Embedding(SiteType):
    """torch.nn.Embedding, and subclasses that multiply what is looked up by a constant (Gemma's)."""

    @staticmethod
    def matches(module: Any) -> bool:
        plain = isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq
        return plain and _scale(module) is not None

    @staticmethod
    def parameters(module: Any) -> tuple[Parameter, ...]:
        return (MatrixParameter(name="weight", outputs=module.num_embeddings, inputs=module.embedding_dim),)

    @staticmethod
    def forward(module: Any, call: Forward, tape: Tape) -> Forward:
        scale = _scale(module) or 1.0

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = call(*args, **kwargs)
            ids_BT = first_argument(args, kwargs)
            if not tape.wants("weight"):
                return output
            ids_BT = tape.rows(ids_BT[..., None])[..., 0]
            output = output.expand(*ids_BT.shape, -1).detach().requires_grad_()
            scale_BT = torch.full(ids_BT.shape, scale, dtype=output.dtype, device=output.device)
            if module.padding_idx is not None:  # autograd leaves that row out
                scale_BT = scale_BT.masked_fill(ids_BT == module.padding_idx, 0.0)
            tape.lookup("weight", output, ids_BT, scale_BT)
            return output

        return forward


@torch.no_grad()
def _scale(module: Any) -> float | None:
    """c, or None where the module is no constant times a look-up."""
    if type(module) is nn.Embedding:
        return 1.0
    ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
    rows = module.weight[ids].double()
    try:
        found = nn.Module.__call__(module, ids).double()
    except (TypeError, RuntimeError, ValueError, IndexError):
        return None
    if found.shape != rows.shape or not float(rows.norm()) > 0:
        return None
    scale = float((found * rows).sum() / (rows * rows).sum())
    # A product in the width of the weights: half a unit in the last place of bfloat16 at most.
    return scale if float((found - scale * rows).norm()) <= 4e-3 * abs(scale) * float(rows.norm()) else None
