"""How a step is computed, where the model decides what is possible: in one pass or in two, over padded batches or packed ones."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import nn

from schemas.errors import InputError
from schemas.spec import BatchLayout
from selection_ops.engine import GradientEngine
from selection_ops.model import causal_model
from selection_ops.packing import packing_refusal
from selection_ops.sites import MatrixParameter, search

Mode = Literal["one-pass", "two-pass"]
SKIPS_FOREIGN_SAMPLES = ("flash", "flex")
"""Beginnings of the names of attentions that do not compute what a mask of blocks would throw away."""


def one_pass_refusal(model: Any) -> str:
    """Why the gradient of a step cannot be formed from the factors of the pass that the choice was made from; empty where it can."""
    model = causal_model(model)
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return "it has dropout, and the choice is made without"
    if getattr(model, "is_activation_checkpointing", False):
        return "it checkpoints activations, whose factors are not kept"
    missing = {
        name: reason for name, reason in search(model).reasons.items() if model.get_parameter(name).requires_grad
    }
    if missing:
        name, reason = next(iter(missing.items()))
        return f"the factors of {len(missing)} parameters are not known, such as {name} ({reason})"
    return ""


def held_bytes_per_token(model: Any, dtype: str) -> int:
    """Bytes that one pass holds of every token: inputs (shared ones once) and output gradients of the matrices of the blocks, and
    what reaches embedding and head."""
    model = causal_model(model)
    found = search(model)
    shapes = {site.name: site.shape for site in found.matrices if site.blocks}
    numbers = 2 * model.get_input_embeddings().weight.shape[1]
    for group in found.groups:
        held = [shapes[name] for name in group.sites if name in shapes]
        numbers += sum(shape.outputs for shape in held if isinstance(shape, MatrixParameter))
        numbers += next((shape.inputs for shape in held if isinstance(shape, MatrixParameter)), 0)
    return numbers * {"float64": 8, "float32": 4, "bfloat16": 2}[dtype]


def require_one_pass(model: Any) -> None:
    """Raises `InputError` with the reason where a step of this model takes two passes."""
    reason = one_pass_refusal(model)
    if reason:
        raise InputError(f"{type(model).__name__} cannot be trained in one pass: {reason}. Use mode two-pass")


def choose_mode(
    asked: str, model: Any, dtype: str, *, longest: int, candidates: int, granularity: str = "sample"
) -> tuple[Mode, str]:
    """The mode and why: the one asked for, or by `auto` one pass where the model allows it and its factors take a quarter of the memory
    at most.

    Of the model exactly what is trained requires gradient. `longest` tokens of each of `candidates` samples are what a step may hold. Raises `InputError` where one pass was asked for and the
    model does not allow it.
    """
    if asked == "two-pass":
        return "two-pass", "asked for"
    if asked == "auto" and granularity == "token-mask":
        return "two-pass", "granularity token-mask clears the loss of tokens, which no held factors know of"
    if asked == "one-pass":
        require_one_pass(model)
    needed = held_bytes_per_token(model, dtype) * longest * candidates
    holds = f"holds up to {needed / 1e9:.1f} GB of factors"
    if asked == "one-pass":
        return "one-pass", f"asked for; {holds}"
    device = next(model.parameters()).device
    # All there is, not what is free: the mode is part of the training's spec, and must not depend on what else runs.
    whole = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    refusal = one_pass_refusal(model)
    if not refusal and needed > whole / 4:
        refusal = (
            f"one pass would hold up to {needed / 1e9:.1f} GB of factors, more than a quarter of {whole / 1e9:.1f} GB"
        )
    return ("two-pass", refusal) if refusal else ("one-pass", f"the model allows it; {holds}")


def choose_layout(asked: str, model: Any, attention: str, mode: Mode) -> tuple[BatchLayout, str]:
    """How the samples of a batch lie, and why: as asked for, or by `auto` packed where attention skips what lies between samples.

    Raises `InputError` where packing was asked for and the model does not keep packed samples apart.
    """
    if asked == "padded":
        return "padded", "asked for"
    if asked == "auto" and not attention.startswith(SKIPS_FOREIGN_SAMPLES):
        return "padded", f"{attention} attention computes all of a packed row and masks most of it"
    refusal = packing_refusal(GradientEngine(model, proj_rank=4, k=0, seed=0, hold=mode == "one-pass"))
    if refusal and asked == "packed":
        raise InputError(
            f"{type(causal_model(model)).__name__} ({attention} attention) cannot be trained with the layout packed: {refusal}. "
            "Use layout padded or auto"
        )
    return ("padded", refusal) if refusal else ("packed", "the model keeps samples apart")
