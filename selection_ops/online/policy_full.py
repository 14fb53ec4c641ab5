"""`full`: train on everything that is offered, equally weighted."""

from __future__ import annotations

import torch

from selection_ops.online.policies import Candidates, Decision, PolicyOptions, register, within_budget


@register("full")
class Full:
    """Keeps every candidate; a token budget cuts the last step in the order of the stream."""

    needs_sketches = False

    def __init__(self, options: PolicyOptions) -> None:
        pass

    def choose(self, candidates: Candidates) -> Decision:
        """All candidates, weight 1."""
        kept = within_budget(range(len(candidates.sample_ids)), candidates.tokens_N, candidates.token_limit)
        chosen = set(kept)
        reasons = tuple("kept" if i in chosen else "over the token budget" for i in range(len(candidates.sample_ids)))
        return Decision(kept=kept, weight_S=torch.ones(len(kept), dtype=torch.float64), reasons=reasons)
