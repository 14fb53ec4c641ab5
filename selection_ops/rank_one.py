"""Rank-one fits of positive matrices that share their columns: of any, and of AdamW's preconditioner straight from its second moments.

Legend: O rows (outputs) and I columns (inputs) of a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from selection_ops.second_moment import RootScale, inverse_power, is_turned, root_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankOneFit:
    """u_O v_I' for every matrix of a group, v shared, and how well it does."""

    outputs: tuple[Tensor, ...]
    inputs: Tensor
    correlation: tuple[float, ...]
    """Pearson correlation of the fitted and the exact entries of every matrix; 1 where the exact ones are all alike. Empty where it was
    not measured."""


def fit_rank_one(matrices: Sequence[Tensor], *, measured: bool = True) -> RankOneFit:
    """Least squares in log P over matrices [O, I] that share their columns, each then scaled to least squares in P.

    The root of the fit's logarithm part is that of the root, so that it serves every power of P. On the second moments of a 135M
    model after 4 steps it correlates with P by 0.68, the means of rows and columns that Adafactor keeps (arXiv 1804.04235, section 3)
    by 0.64, the best least squares in P by 0.69 (but by 0.71 against 0.72 with the root of P). `matrices` are positive. Without `measured` the
    correlation is not taken, which costs as much as the fit.
    """
    logs = [matrix.log() for matrix in matrices]
    rows = sum(len(log) for log in logs)
    inputs_I = torch.stack([log.sum(0, dtype=torch.float64) for log in logs]).sum(0) / rows
    centre = inputs_I.mean()
    outputs, correlation = [], []
    inputs = inputs_I.exp()
    for matrix, log in zip(matrices, logs):
        output = (log.mean(1, dtype=torch.float64) - centre).exp()
        fitted = (output[:, None] * inputs).to(matrix.dtype)
        output = output * (_sum(matrix * fitted) / _sum(fitted * fitted))
        outputs.append(output)
        if measured:
            correlation.append(_correlation(matrix, fitted))
    return RankOneFit(outputs=tuple(outputs), inputs=inputs, correlation=tuple(correlation))


def _sum(value: Tensor) -> float:
    return float(value.sum(dtype=torch.float64))


def _correlation(exact: Tensor, fitted: Tensor) -> float:
    exact, fitted = exact - exact.mean(dtype=torch.float64), fitted - fitted.mean(dtype=torch.float64)
    square = _sum(exact * exact)
    if square <= 1e-24 * exact.numel() * float(exact.abs().max()):
        return 1.0
    other = _sum(fitted * fitted)
    return _sum(exact * fitted) / (square * other) ** 0.5 if other > 0 else 0.0


def fit_rank_one_adamw(second: Sequence[tuple[Tensor, RootScale]], power: float) -> RankOneFit:
    """The fit of `fit_rank_one` of P^power over matrices [O, I] given by their second moments, without P ever standing whole.

    Two sweeps in blocks of rows that stay in the cache, one of logarithms and one of quotients, against some ten over memory:
    a fifth of the time. Not measured: `correlation` is empty.
    """
    rows = sum(len(matrix) for matrix, _ in second)
    sums = [_log_sums(matrix, scale) for matrix, scale in second]
    # log P^p = p (log numerator - log root)
    shift = [power * torch.tensor(scale.numerator, dtype=torch.float64).log() for _, scale in second]
    inputs_I = sum(((s * len(matrix)) - power * column for (matrix, _), (_, column), s in zip(second, sums, shift)))
    assert isinstance(inputs_I, Tensor)
    inputs_I = inputs_I / rows
    centre, inputs = inputs_I.mean(), inputs_I.exp()
    outputs = []
    for (matrix, scale), (row_O, _), s in zip(second, sums, shift):
        output = (s - power * row_O / matrix.shape[1] - centre).exp()
        # Least squares in P: <P, u v'> / <u v', u v'>; the latter is a product of two norms.
        taken_O = _times(matrix, scale, power, inputs)
        output = output * (output @ taken_O / (output.square().sum() * inputs.square().sum()))
        outputs.append(output)
    return RankOneFit(outputs=tuple(outputs), inputs=inputs, correlation=())


def _log_sums(matrix: Tensor, scale: RootScale) -> tuple[Tensor, Tensor]:
    """Sums over columns [O] and over rows [I] of the root's logarithm, float64."""
    if is_turned(matrix):
        column, row = _log_sums(matrix.T, scale)
        return row, column
    row_O = matrix.new_empty(len(matrix), dtype=torch.float64)
    column_I = matrix.new_zeros(matrix.shape[1], dtype=torch.float64)
    for rows, root in root_blocks(matrix, scale):
        log = root.log_()
        row_O[rows] = log.sum(1).double()
        column_I += log.sum(0)
    return row_O, column_I


def _times(matrix: Tensor, scale: RootScale, power: float, inputs_I: Tensor) -> Tensor:
    """P^power @ inputs [O], float64."""
    wide = inputs_I.to(matrix.dtype)
    turned = is_turned(matrix)
    held = matrix.T if turned else matrix
    out_O = matrix.new_zeros(len(matrix), dtype=torch.float64)
    for rows, root in root_blocks(held, scale):
        factor = inverse_power(root, power)
        if turned:
            out_O += wide[rows] @ factor
        else:
            out_O[rows] = (factor @ wide).double()
    return out_O * scale.numerator**power
