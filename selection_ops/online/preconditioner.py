"""The diagonal that AdamW's next step will multiply a gradient by, from its live state.

Legend: any shape; a site is one weight matrix. t is the number of the step about to be taken, from 1; the second moment
is the state before that step, so it has seen t - 1 gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.errors import InputError

FLOOR_SHARE = 0.01
"""sqrt(second moment) is floored at this share of its site's root mean square: entries that were never touched would
otherwise be multiplied by 10^4 times a typical factor and own every alignment."""


def adamw_preconditioner(
    second_moment: Tensor, *, step: int, beta1: float, beta2: float, eps: float, floor_share: float = FLOOR_SHARE
) -> Tensor:
    """P of one site, same shape as `second_moment`: step `step` of AdamW moves it by -learning_rate * (P * g + shift).

    P = (1 - beta1) / (1 - beta1^t) / (sqrt(vhat) + eps) with vhat = v / (1 - beta2^(t - 1)), v frozen before the step and
    sqrt(vhat) floored at `floor_share` times its root mean square over the site. The shift (momentum, weight decay) does
    not depend on the batch. Raises `InputError` where v has seen no gradient (step < 2).
    """
    if step < 2:
        raise InputError(f"the second moment has seen no gradient before step {step}; the preconditioner needs one")
    root = (second_moment / (1.0 - beta2 ** (step - 1))).sqrt()
    # The mean over a site of 1e7 entries is taken in float64: a flat float32 sum loses three digits.
    floor = floor_share * root.to(torch.float64).square().mean().sqrt()
    return (1.0 - beta1) / (1.0 - beta1**step) / (root.clamp(min=float(floor)) + eps)
