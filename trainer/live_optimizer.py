"""What the live optimizer's next step will multiply a gradient by, read from its state, parameter by parameter.

An optimizer may have `parts`, optimizers for some of the parameters each (`trainer.optimizers`).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from schemas.errors import InputError
from selection_ops.muon import SidedFactor, muon_preconditioner, rate_share
from selection_ops.preconditioning import LessForm
from selection_ops.second_moment import RootScale
from selection_ops.sites import MatrixParameter, Site
from trainer.sharding import whole

Kind = Literal["adamw", "muon", "scalar", "none", "less"]
Asked = Literal["auto", "adamw", "muon", "scalar", "none", "less"]

_OF_ADAM = (torch.optim.Adam, torch.optim.AdamW)
_WAY_OUT = "use preconditioner none, or metric sgd"


class LiveOptimizer:
    """Reads what a step of an optimizer does from its state.

    Kinds: `adamw` (elementwise, from the second moment), `muon` (a matrix from one side, from the momentum), `scalar` (one number a
    parameter: what SGD's step multiplies a gradient by, or of Adam by way of the mean second moment), `less` (Adam's step for one sample
    alone), `none`. `auto` takes for every parameter what its optimizer is. Raises `InputError` naming an optimizer that is not of the kind.
    """

    def __init__(self, optimizer: Any, asked: Asked = "auto") -> None:
        if asked not in get_args(Asked):
            raise InputError(f"unknown preconditioner {asked!r}: choose one of {', '.join(get_args(Asked))}")
        self._parts: tuple[torch.optim.Optimizer, ...] = tuple(getattr(optimizer, "parts", (optimizer,)))
        self._asked = asked

    def _place(self, parameter: Tensor) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        """The optimizer of a parameter, and its group there."""
        for part in self._parts:
            for group in part.param_groups:
                if any(held is parameter for held in group["params"]):
                    return part, group
        raise InputError(
            "a matrix that takes part in choosing is in no parameter group of the optimizer; give it all of them"
        )

    def kind(self, parameter: Tensor) -> Kind:
        """How gradients of a parameter are preconditioned."""
        if self._asked == "none":
            return "none"
        part, group = self._place(parameter)
        name = type(part).__name__
        own: Kind | None = None
        if isinstance(part, torch.optim.Muon):
            own = "muon"
        elif isinstance(part, torch.optim.SGD):
            own = "scalar"
        elif isinstance(part, _OF_ADAM):
            own = "adamw"
        elif not type(part).__module__.startswith("torch.optim") and {"betas", "eps"} <= group.keys():
            own = "adamw"  # somebody else's; its state says whether it is
        allowed = {"adamw": ("adamw", "scalar", "less"), "muon": ("muon",), "scalar": ("scalar",)}
        if own is None:
            known = "AdamW, Adam, Muon and SGD"
            raise InputError(f"no preconditioner fits {name}: its steps are none of those of {known}; {_WAY_OUT}")
        asked = own if self._asked == "auto" else self._asked
        if asked not in allowed[own]:
            raise InputError(f"preconditioner {asked} does not fit {name}; use {' or '.join(allowed[own])}, or auto")
        return asked

    def seen(self, parameter: Tensor, steps_taken: int) -> int | None:
        """Gradients that the state of a parameter has seen; None where its preconditioner needs no state.

        Muon does not count: there it is the steps taken since its momentum exists in this training.
        """
        kind = self.kind(parameter)
        part, _ = self._place(parameter)
        if kind == "none" or isinstance(part, torch.optim.SGD):
            return None
        state = part.state.get(parameter)
        if not state:
            return 0
        if kind == "muon":
            return steps_taken if "momentum_buffer" in state else 0
        if "exp_avg_sq" not in state or "step" not in state:
            raise InputError(
                f"no preconditioner fits {type(part).__name__}: its state holds no exp_avg_sq and step, as AdamW's does; {_WAY_OUT}"
            )
        return int(state["step"])

    def second_moment(self, parameter: Tensor) -> Tensor:
        """AdamW's, in the shape of the parameter; of AMSGrad the largest."""
        state = self._place(parameter)[0].state[parameter]
        return whole(state.get("max_exp_avg_sq", state["exp_avg_sq"]))

    def scale(self, parameter: Tensor) -> RootScale:
        """How AdamW's preconditioner comes from its second moment, at the step about to be taken."""
        part, group = self._place(parameter)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        step = int(part.state[parameter]["step"]) + 1
        return RootScale.of(self.second_moment(parameter), step=step, beta1=beta1, beta2=beta2, eps=group["eps"])

    def scalar(self, parameter: Tensor) -> float:
        """What SGD's step multiplies a gradient by, without its rate; of Adam P at the root mean square of the second moment's root."""
        part, group = self._place(parameter)
        if isinstance(part, torch.optim.SGD):
            momentum = float(group["momentum"])
            share = 1.0 - float(group["dampening"]) if momentum else 1.0
            return 1.0 + momentum * share if group["nesterov"] else share
        scale = self.scale(parameter)
        return scale.numerator / (scale.mean_root + scale.eps)

    def sided(self, site: Site, parameter: Tensor, power: float) -> SidedFactor:
        """Muon's, of one matrix."""
        part, group = self._place(parameter)
        assert isinstance(site.shape, MatrixParameter)
        matrix = site.shape.matrix(whole(part.state[parameter]["momentum_buffer"]))
        turned = site.shape.transposed  # Muon sees the parameter as it is held
        held = matrix.T if turned else matrix
        found = muon_preconditioner(
            held,
            momentum=float(group["momentum"]),
            nesterov=bool(group["nesterov"]),
            coefficients=group["ns_coefficients"],
            rate=rate_share(held.shape[0], held.shape[1], group["adjust_lr_fn"]),
            eps=group["eps"],
            power=power,
        )
        return SidedFactor(matrix=found.matrix, from_left=found.from_left != turned)

    def less(self, site: Site, parameter: Tensor) -> LessForm:
        """Adam's step for one sample alone, of one matrix."""
        part, group = self._place(parameter)
        assert isinstance(site.shape, MatrixParameter)
        state = part.state[parameter]
        beta1, beta2 = (float(beta) for beta in group["betas"])
        return LessForm(
            first_OI=site.shape.matrix(whole(state["exp_avg"])),
            second_OI=site.shape.matrix(self.second_moment(parameter)),
            beta1=beta1,
            beta2=beta2,
            eps=float(group["eps"]),
        )
