"""What the live optimizer's next step will multiply a gradient by, read from its state."""

from __future__ import annotations

import torch
from torch import Tensor

from schemas.errors import InputError
from selection_ops.preconditioning import adamw_preconditioner


class LiveOptimizer:
    """Reads the second moment of AdamW; `metric` is named where a state has none."""

    def __init__(self, optimizer: torch.optim.Optimizer, metric: str) -> None:
        self._optimizer, self._metric = optimizer, metric

    def seen(self, parameter: Tensor) -> int:
        """Gradients that the second moment of a parameter has seen."""
        state = self._optimizer.state.get(parameter)
        if not state:
            return 0
        if "exp_avg_sq" not in state:
            raise InputError(
                f"metric {self._metric} needs the second moment of AdamW, and {type(self._optimizer).__name__} keeps none; "
                "use metric sgd"
            )
        return int(state["step"])

    def preconditioner(self, parameter: Tensor) -> Tensor:
        """P in the shape of the parameter (`adamw_preconditioner`)."""
        group = next(g for g in self._optimizer.param_groups if any(p is parameter for p in g["params"]))
        beta1, beta2 = group["betas"]
        return adamw_preconditioner(
            self._optimizer.state[parameter]["exp_avg_sq"],
            step=self.seen(parameter) + 1,
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
        )
