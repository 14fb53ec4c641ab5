"""AdamW's preconditioner straight from its second moment, in blocks of rows that stay in the cache: P never stands whole.

Legend: O rows (outputs) and I columns (inputs) of a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from schemas.errors import InputError

FLOOR_SHARE = 0.01
"""sqrt(second moment) is floored at this share of its site's root mean square: entries that were never touched would
otherwise be multiplied by 10^4 times a typical factor and own every alignment."""

BLOCK_NUMBERS = 1 << 16
"""Entries worked on at a time: what a few temporaries of that size leave in a core's cache."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootScale:
    """How AdamW's preconditioner comes from a second moment v: P = numerator / (max(sqrt(v / correction), floor) + eps)."""

    correction: float
    floor: float
    eps: float
    numerator: float

    @classmethod
    def of(
        cls,
        second: Tensor,
        *,
        step: int,
        beta1: float,
        beta2: float,
        eps: float,
        floor_share: float = FLOOR_SHARE,
    ) -> RootScale:
        """That of a parameter's second moment before step `step` (`preconditioning.adamw_preconditioner`).

        Raises `InputError` where v has seen no gradient (step < 2).
        """
        if step < 2:
            raise InputError(f"the second moment has seen no gradient before step {step}; the preconditioner needs one")
        correction = 1.0 - beta2 ** (step - 1)
        # The mean over a site of 1e7 entries is taken over rows in float64: a flat float32 sum loses three digits.
        mean = float(second.flatten(0, -2).sum(-1).double().sum() if second.dim() > 1 else second.double().sum())
        floor = floor_share * (mean / second.numel() / correction) ** 0.5
        return cls(correction=correction, floor=floor, eps=eps, numerator=(1.0 - beta1) / (1.0 - beta1**step))

    @property
    def mean_root(self) -> float:
        """Root mean square of sqrt(v / correction) over the parameter, where the floor is the default share of it."""
        return self.floor / FLOOR_SHARE


def is_turned(matrix: Tensor) -> bool:
    """Whether a matrix is the view of a transposed one."""
    return matrix.stride(0) == 1 and matrix.stride(1) > 1


def root_blocks(matrix: Tensor, scale: RootScale) -> Iterator[tuple[slice, Tensor]]:
    """(rows, max(sqrt(v / correction), floor) + eps there), in one buffer that the caller may overwrite."""
    step = max(1, BLOCK_NUMBERS // matrix.shape[1])
    buffer = matrix.new_empty(min(step, len(matrix)), matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        part = matrix[rows]
        root = torch.mul(part, 1.0 / scale.correction, out=buffer[: len(part)])
        yield rows, root.sqrt_().clamp_(min=scale.floor).add_(scale.eps)


def inverse_power(root: Tensor, power: float) -> Tensor:
    """root^-power, in place."""
    if power == 0.5:
        return root.rsqrt_()
    return root.reciprocal_() if power == 1.0 else root.pow_(-power)


def multiply(gradient_SOI: Tensor, second_OI: Tensor, scale: RootScale, power: float) -> None:
    """Multiply gradients of some samples by P^power, elementwise, in place."""
    if is_turned(second_OI):
        gradient_SOI, second_OI = gradient_SOI.transpose(1, 2), second_OI.T
    for rows, root in root_blocks(second_OI, scale):
        gradient_SOI[:, rows] *= inverse_power(root, power).mul_(scale.numerator**power)
