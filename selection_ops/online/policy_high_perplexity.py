"""`high-perplexity`: train on what the model finds hardest, token by token."""

from __future__ import annotations

from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy, keep_highest, known_losses, register


@register("high-perplexity")
class HighPerplexity(Policy):
    """The `n_keep` candidates of the highest perplexity exp(loss / loss tokens); the score is its logarithm."""

    needs_losses = True

    def __init__(self, options: PolicyOptions) -> None:
        self._n_keep = options.n_keep

    def choose(self, candidates: Candidates) -> Decision:
        """`n_keep` candidates, weight 1."""
        way_out = "give the candidates of a step their losses and loss tokens"
        loss_N = known_losses("high-perplexity", "the loss", candidates.loss_N, way_out, candidates.sample_ids)
        tokens_N = known_losses(
            "high-perplexity", "loss tokens", candidates.loss_tokens_N, way_out, candidates.sample_ids
        )
        mean_N = [loss / tokens if tokens else 0.0 for loss, tokens in zip(loss_N, tokens_N, strict=True)]
        return keep_highest(candidates, mean_N, self._n_keep)
