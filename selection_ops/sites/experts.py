"""Mixtures of experts whose weights are packed, [E, outputs, inputs], as transformers holds them: every expert's matrices are sites.

The forward is our own, expert by expert over the tokens routed to it; a module is known by giving the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from selection_ops.sites.base import Forward, MatrixParameter, Parameter, SiteType, Tape, site_type


@site_type()
class Experts(SiteType):
    """Gated experts: down (act(gate x) * up x), with `gate_up_proj` and `down_proj` for all experts; no biases."""

    blocks = True

    @staticmethod
    def matches(module: Any) -> bool:
        own = dict(module.named_parameters(recurse=False))
        packed = own.keys() == {"gate_up_proj", "down_proj"} and all(p.dim() == 3 for p in own.values())
        return packed and hasattr(module, "act_fn") and _agrees(module)

    @staticmethod
    def parameters(module: Any) -> tuple[Parameter, ...]:
        turned = _transposed(module)
        found = []
        for name in ("gate_up_proj", "down_proj"):
            experts, *shape = getattr(module, name).shape
            outputs, inputs = shape[::-1] if turned else shape
            for index in range(experts):
                part = MatrixParameter(name=f"{name}.{index}", outputs=outputs, inputs=inputs, transposed=turned)
                found.append(part)
        return tuple(found)

    @staticmethod
    def forward(module: Any, call: Forward, tape: Tape) -> Forward:
        def forward(hidden_NI: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
            return _run(module, hidden_NI, top_k_index, top_k_weights, tape)

        return forward


def _transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _run(
    module: Any, hidden_NI: torch.Tensor, index_Nk: torch.Tensor, weight_Nk: torch.Tensor, tape: Tape | None
) -> torch.Tensor:
    turned = _transposed(module)
    result_NI = torch.zeros_like(hidden_NI)
    for expert in range(module.gate_up_proj.shape[0]):
        token_n, place_n = torch.where(index_Nk == expert)
        if not len(token_n):
            continue
        gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
        x_nI = hidden_NI[token_n]
        inner = nn.functional.linear(x_nI, gate_up.T if turned else gate_up)
        gate, up = inner.chunk(2, dim=-1)
        middle = module.act_fn(gate) * up
        out_nI = nn.functional.linear(middle, down.T if turned else down)
        if tape is not None:
            tape.routed(f"gate_up_proj.{expert}", inner, x_nI, token_n)
            tape.routed(f"down_proj.{expert}", out_nI, middle, token_n)
        weighted = out_nI * weight_Nk[token_n, place_n, None]
        result_NI = result_NI.index_add(0, token_n, weighted.to(result_NI.dtype))
    return result_NI


@torch.no_grad()
def _agrees(module: Any) -> bool:
    experts, first, second = module.gate_up_proj.shape
    inputs = first if _transposed(module) else second
    device, dtype = module.gate_up_proj.device, module.gate_up_proj.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, inputs, generator=generator).to(device, dtype)
    index = torch.stack([torch.randperm(experts, generator=generator)[: min(2, experts)] for _ in range(4)]).to(device)
    weight = torch.rand(index.shape, generator=generator).to(device, dtype)
    try:
        wanted = type(module).forward(module, hidden, index, weight)
        found = _run(module, hidden, index, weight, None)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return False
    if wanted.shape != found.shape:
        return False
    # The same products in another order; another layout or activation is off by its own size.
    return bool((wanted - found).double().norm() <= 0.02 * wanted.double().norm())
