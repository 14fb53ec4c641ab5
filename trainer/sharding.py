"""Where a model's parameters lie: whole in every process, or each process a shard of every one (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from schemas.errors import InputError
from schemas.spec import InputGroup
from selection_ops.engine import GradientEngine
from selection_ops.losses import HeadRoute
from selection_ops.model import causal_model
from selection_ops.sites import find_sites, search
from trainer.parallel import OneProcess


class WholeModel:
    """Every process holds all of the model, and computes gradients of its share alone."""

    even = False
    """Whether every process has to run the model equally often."""
    sums_gradients = False
    """Whether gradients that reach parameters are sums over processes already."""

    def __init__(self, model: Any, processes: OneProcess | None = None) -> None:
        self.model, self.processes = model, processes or OneProcess()
        self.route = HeadRoute(model)

    def engine(self, groups: tuple[InputGroup, ...] | None = None, **options: Any) -> GradientEngine:
        """A gradient engine of the model."""
        return GradientEngine(self.model, groups, **options)

    def gradients(self, losses: Iterable[Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradients of the sum of `losses`, of these parameters alone; `sums_gradients` says of whose losses."""
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for loss in losses:
            for held, gradient in zip(sums, torch.autograd.grad(loss, parameters)):
                held += gradient
        return sums

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by the sum over processes."""
        self.processes.sum_gradients(parameters)

    def align(self, optimizer: Any) -> bool:
        """Give every process the weights and moments of process 0 where they have drifted apart; returns whether they had."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states = [optimizer.state.get(parameter) or {} for parameter in parameters]
        moments = [value for state in states for value in state.values() if isinstance(value, Tensor) and value.dim()]
        return self.processes.align([*parameters, *moments])

    def gathered(self) -> dict[str, Tensor] | None:
        """Weights for a checkpoint, where they are not what the model's own state holds; asked for by all processes."""
        return None


class ShardedModel(WholeModel):
    """FSDP2: a shard of every parameter, gradient and moment in every process; a block is whole while it runs.

    What is found by running the model (its head, its sites) is found before it is cut. The gradient engine passes through the blocks as
    any forward and backward does: frozen parameters have no gradient to reduce. Blocks are those that transformers never splits;
    embedding, head and last norm are whole during a pass. Gradients are summed, not averaged as is FSDP2's habit.
    """

    even = True
    sums_gradients = True

    def __init__(self, model: Any, processes: OneProcess, *, sketches: bool) -> None:
        super().__init__(model, processes)
        if processes.count == 1:
            raise InputError("shard fsdp2 needs several processes: start with torchrun, or leave it out")
        if model is not causal_model(model):
            raise InputError("shard fsdp2 is for whole models; an adapter is small: train it with shard none")
        self._found = search(model) if sketches else None
        self._groups = find_sites(model).input_groups if sketches else None
        names = set(getattr(model, "_no_split_modules", None) or ())
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        if not blocks:
            raise InputError(
                f"{type(model).__name__} does not say which of its modules are blocks; train it with shard none"
            )
        kind = next(model.parameters()).device.type
        mesh = init_device_mesh(kind, (processes.count,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        self._root: Any = fully_shard(_Root(model), mesh=mesh)
        for module in self._modules():
            # A factor of 1 and plain sums: gloo does not know the scaled sums that another factor takes.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self.route.enter = self._enter

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self._root.modules() if isinstance(module, FSDPModule)]

    def _enter(self, call: Callable[..., Any], *arguments: Any) -> Any:
        found = self._root(call, *arguments)
        if not torch.is_grad_enabled():
            for module in self._modules():  # what no backward follows is cut again here
                module.reshard()
        return found

    def engine(self, groups: tuple[InputGroup, ...] | None = None, **options: Any) -> GradientEngine:
        """See `WholeModel.engine`."""
        return GradientEngine(self.model, groups or self._groups, found=self._found, route=self.route, **options)

    def gradients(self, losses: Iterable[Tensor], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """See `WholeModel.gradients`; of the losses of all processes."""
        wanted = {id(parameter) for parameter in parameters}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in wanted]
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            for parameter in others:
                parameter.requires_grad_(False)
            for loss in losses:
                loss.backward()
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
            for parameter, gradient in zip(parameters, before):
                parameter.grad = gradient

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """They are."""

    def align(self, optimizer: Any) -> bool:
        """No two processes hold the same."""
        return False

    def gathered(self) -> dict[str, Tensor] | None:
        """See `WholeModel.gathered`: whole, on the CPU of process 0; elsewhere empty. Tied parameters are one tensor."""
        found: dict[int, Tensor] = {}
        state: dict[str, Tensor] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in found:
                tensor = whole(value.detach())
                found[id(value)] = tensor.cpu() if self.processes.leads else tensor.new_empty(0)
            state[name] = found[id(value)]
        return state


class _Root(nn.Module):
    """What FSDP2 takes for the model: it is entered by a call of any function, since a step never calls the model as such."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a shard; asked for by all processes at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process holds, as `like` lies: itself, or this process's shard of it."""
    if not isinstance(like, DTensor):
        return tensor
    # No process sends: each takes its own part.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
