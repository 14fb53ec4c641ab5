"""`loss`: train on what the model finds hardest, by the loss of the whole sample."""

from __future__ import annotations

from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy, keep_highest, known_losses, register


@register("loss")
class HighestLoss(Policy):
    """The `n_keep` candidates of the largest loss, a sum over loss tokens, so that long samples lead."""

    needs_losses = True

    def __init__(self, options: PolicyOptions) -> None:
        self._n_keep = options.n_keep

    def choose(self, candidates: Candidates) -> Decision:
        """`n_keep` candidates, weight 1."""
        way_out = "give the candidates of a step their losses"
        loss_N = known_losses("loss", "the loss", candidates.loss_N, way_out, candidates.sample_ids)
        return keep_highest(candidates, loss_N, self._n_keep)
