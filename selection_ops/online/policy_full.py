"""`full`: train on everything that is offered, equally weighted."""

from __future__ import annotations

import torch

from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import OVER_BUDGET, Candidates, Decision, Policy, register, within_budget


@register("full")
class Full(Policy):
    """Keeps every candidate; a token budget cuts the last step in the order of the stream."""

    def __init__(self, options: PolicyOptions) -> None:
        pass

    def choose(self, candidates: Candidates) -> Decision:
        """All candidates, weight 1."""
        count = len(candidates.sample_ids)
        kept = within_budget(range(count), candidates.tokens_N, candidates.token_limit)
        chosen = set(kept)
        reasons = tuple("kept" if index in chosen else OVER_BUDGET for index in range(count))
        weight_S = torch.ones(len(kept), dtype=torch.float64)
        return Decision(kept=kept, weight_S=weight_S, reasons=reasons, limited=len(kept) < count)
