"""Whether the samples of a batch may stand one behind another in one row, found by doing it.

A model keeps packed samples apart where positions that restart say so to every layer that mixes tokens. transformers forms
block-diagonal causal masks from them for eager, sdpa and flex attention (`masking_utils.find_packed_sequence_indices`) and bounds
of samples for flash attention, as long as the model hands its positions on to them; a convolution, a recurrence or an attention of
the model's own may not look at them, and nothing in a configuration tells. Numbers do.
"""

from __future__ import annotations

import random

import torch

from schemas.errors import InputError
from selection_ops.batching import collate
from selection_ops.encoding import Encoded
from selection_ops.engine import GradientEngine, SampleFeatures

LENGTHS = (6, 11, 3, 8)
"""Tokens of the samples of the trial: a shorter one behind a longer one, a longer one behind a shorter one."""


def packing_refusal(engine: GradientEngine) -> str:
    """Why samples packed into one row do not give what they give padded, losses and sketches of random ones; empty where they do.

    The engine must not be entered. What is compared is the model on its device, with its arithmetic and attention.
    """
    model = engine.model
    rng = random.Random(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    items = [
        Encoded(ids=[rng.randrange(vocabulary) for _ in range(length)], loss_mask=[False] + [True] * (length - 1))
        for length in LENGTHS
    ]
    parameter = next(model.parameters())
    with engine:
        padded = engine.features(collate(items, device=parameter.device))
        try:
            packed = engine.features(collate(items, device=parameter.device, layout="packed"))
        except Exception as error:  # whatever a model raises that was not made for this
            return f"it fails ({type(error).__name__}: {str(error)[:300]})"
    tolerance = _tolerance(parameter.dtype)
    for what, off in _errors(packed, padded):
        if not off <= tolerance:
            return (
                f"a sample's {what} depends on the samples before it or on its place in the row: of random samples it differs by "
                f"{off:.2g} of its size from the padded one, where rounding explains {tolerance:.2g}"
            )
    return ""


def require_packing(engine: GradientEngine) -> None:
    """Raises `InputError` with the reason where samples may not be packed."""
    reason = packing_refusal(engine)
    if reason:
        config = getattr(engine.model, "config", None)
        attention = getattr(config, "_attn_implementation", None) or "its own"
        raise InputError(
            f"{type(engine.model).__name__} ({attention} attention) cannot be scored with the layout packed: {reason}. "
            "Use the layout padded"
        )


def _errors(found: SampleFeatures, wanted: SampleFeatures) -> list[tuple[str, float]]:
    """Largest relative errors of a sample's loss and of its sketch."""
    losses = ((found.loss_B - wanted.loss_B).abs() / wanted.loss_B.abs()).max()
    sketches = ((found.sketch_BK - wanted.sketch_BK).norm(dim=1) / wanted.sketch_BK.norm(dim=1)).max()
    return [("loss", float(losses)), ("gradient", float(sketches))]


def _tolerance(dtype: torch.dtype) -> float:
    # Over tiny models of 17 families that keep samples apart, sketches differ by up to 1.1e-6 in float32 and 0.015 in bfloat16; over
    # four that do not, by 0.38 and more in either.
    return 0.1 if dtype in (torch.bfloat16, torch.float16) else 1e-4
