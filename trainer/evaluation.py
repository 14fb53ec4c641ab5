"""Loss on held-out samples: the token mean over the whole set, whatever the batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from selection_ops.encoding import Encoded
from selection_ops.losses import HeadRoute
from selection_ops.model import evaluating
from trainer.batches import StepBatches
from trainer.parallel import OneProcess


def evaluate(
    route: HeadRoute, samples: Sequence[Encoded], batches: StepBatches, processes: OneProcess | None = None
) -> float | None:
    """Sum of losses over sum of loss tokens, nats per token, without dropout; None for an empty set."""
    tokens, total = sum(sum(item.loss_mask) for item in samples), 0.0
    if not tokens:
        return None
    with evaluating(route.model), torch.no_grad():
        for places, batch in batches(samples):
            with batches.arithmetic():
                total += float(route.sample_losses(batch)[: len(places)].double().sum())
    return float((processes or OneProcess()).sum(torch.tensor(total, dtype=torch.float64))) / tokens
