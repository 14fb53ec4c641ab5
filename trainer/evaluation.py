"""Loss on held-out samples: the token mean over the whole set, whatever the batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from selection_ops.batching import collate, length_batches
from selection_ops.encoding import Encoded
from selection_ops.losses import HeadRoute


def evaluate(model: Any, samples: Sequence[Encoded], batch_tokens: int, dtype: str) -> float | None:
    """Sum of losses over sum of loss tokens, nats per token, without dropout; None for an empty set."""
    tokens = sum(sum(item.loss_mask) for item in samples)
    if not tokens:
        return None
    device = next(model.parameters()).device
    training, total = model.training, 0.0
    model.eval()
    route = HeadRoute(model)
    try:
        for indices in length_batches([len(item.ids) for item in samples], batch_tokens):
            batch = collate([samples[index] for index in indices], device=device)
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
                total += float(route.sample_losses(batch).double().sum())
    finally:
        model.train(training)
    return total / tokens
