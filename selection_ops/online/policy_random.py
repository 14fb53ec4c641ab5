"""`random`: keep `n_keep` candidates drawn by a hash, so that a resumed step draws the same ones."""

from __future__ import annotations

import torch

from selection_ops.online.filters import Draw
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import OVER_BUDGET, Candidates, Decision, Policy, register, within_budget


@register("random")
class Random(Policy):
    """Orders candidates by the hash of (seed, step, sample_id) and keeps the first `n_keep`."""

    def __init__(self, options: PolicyOptions) -> None:
        self._n_keep = options.n_keep

    def choose(self, candidates: Candidates) -> Decision:
        """`n_keep` candidates, weight 1."""
        draw = Draw(seed=candidates.seed, step=candidates.step, sample_ids=candidates.sample_ids)
        keys = draw.keys(b"random policy")
        order = sorted(range(len(keys)), key=lambda index: (keys[index], index))[: self._n_keep]
        kept = within_budget(order, candidates.tokens_N, candidates.token_limit)
        drawn, fitting = set(order), set(kept)
        reasons = tuple(
            "kept" if index in fitting else OVER_BUDGET if index in drawn else "not drawn" for index in range(len(keys))
        )
        weight_S = torch.ones(len(kept), dtype=torch.float64)
        return Decision(kept=kept, weight_S=weight_S, reasons=reasons, limited=len(kept) < len(order))
