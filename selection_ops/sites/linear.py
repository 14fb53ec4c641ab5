"""Linear maps, y = W a + b: the gradient of W is the sum over tokens of (gradient of y) a', that of b the sum of the former."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from selection_ops.sites.base import (
    Forward,
    MatrixParameter,
    Parameter,
    SiteType,
    SmallParameter,
    Tape,
    first_argument,
    site_type,
)


@site_type(nn.Linear)
class Linear(SiteType):
    """torch.nn.Linear: weight [O, I]."""

    transposed = False
    blocks = True

    @classmethod
    def parameters(cls, module: Any) -> tuple[Parameter, ...]:
        outputs, inputs = module.weight.shape[::-1] if cls.transposed else module.weight.shape
        weight = MatrixParameter(name="weight", outputs=outputs, inputs=inputs, transposed=cls.transposed)
        bias = () if module.bias is None else (SmallParameter(name="bias", size=module.bias.numel()),)
        return (weight, *bias)

    @staticmethod
    def forward(module: Any, call: Forward, tape: Tape) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            output = call(*args, **kwargs)
            tape.outer("weight", output, first_argument(args, kwargs))
            tape.small("bias", output, lambda delta_BtO: delta_BtO.sum(1))
            return output

        return forward


@site_type(Conv1D)
class TransposedLinear(Linear):
    """transformers' Conv1D: weight [I, O]."""

    transposed = True
