"""The last of a step before the optimizer's: the norm of the gradient, clipping by it, and what is said where a number is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from schemas.errors import LehrError
from trainer.candidate import Candidate
from trainer.sharding import whole


def clip_gradients(
    parameters: Sequence[Tensor], limit: float, kept: Sequence[Candidate], number: int
) -> tuple[float, float, float]:
    """Clip gradients by their global L2 norm where it exceeds `limit` (0: never); returns that and the L1 norm, both before, and the factor.

    Raises `LehrError` naming step and samples where the norm is not finite; there are no gradients then.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = float(whole(torch.nn.utils.get_total_norm(gradients)))
    if not norm < float("inf"):
        for parameter in parameters:
            parameter.grad = None
        raise LehrError(not_finite(number, f"norm of the gradient ({norm})", kept))
    norm_l1 = float(whole(torch.nn.utils.get_total_norm(gradients, norm_type=1.0)))
    # The constant is torch's and transformers': a zero gradient is not divided by zero.
    factor = min(1.0, limit / (norm + 1e-6)) if limit else 1.0
    if factor < 1.0:
        for gradient in gradients:
            gradient.mul_(factor)
    return norm, norm_l1, factor


def not_finite(number: int, what: str, items: Sequence[Candidate]) -> str:
    """What is said of a step that was not taken."""
    return (
        f"step {number}: {what} is not finite; nothing was updated. Samples: {names_of(items)}. Lower the learning rate, use "
        "--dtype float32, or leave these samples out"
    )


def names_of(items: Sequence[Candidate], most: int = 8) -> str:
    """Ids of the first samples, and how many more there are."""
    names = [item.sample_id for item in items]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
