"""`random`: keep `n_keep` candidates drawn by a hash, so that a resumed step draws the same ones."""

from __future__ import annotations

import torch

from schemas.fingerprint import canonical_json, hash128
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import OVER_BUDGET, Candidates, Decision, register, within_budget


@register("random")
class Random:
    """Orders candidates by the hash of (seed, step, sample_id) and keeps the first `n_keep`."""

    needs_sketches = False

    def __init__(self, options: PolicyOptions) -> None:
        self._n_keep = options.n_keep

    def choose(self, candidates: Candidates) -> Decision:
        """`n_keep` candidates, weight 1."""
        keys = [
            hash128(b"random policy", canonical_json([candidates.seed, candidates.step, sample_id]))
            for sample_id in candidates.sample_ids
        ]
        order = sorted(range(len(keys)), key=lambda index: (keys[index], index))[: self._n_keep]
        kept = within_budget(order, candidates.tokens_N, candidates.token_limit)
        drawn, fitting = set(order), set(kept)
        reasons = tuple(
            "kept" if index in fitting else OVER_BUDGET if index in drawn else "not drawn" for index in range(len(keys))
        )
        weight_S = torch.ones(len(kept), dtype=torch.float64)
        return Decision(kept=kept, weight_S=weight_S, reasons=reasons, limited=len(kept) < len(order))
