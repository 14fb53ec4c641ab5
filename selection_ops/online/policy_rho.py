"""`rho`: train on what can still be learned (RHO-LOSS: Mindermann et al. 2022, arXiv 2206.07137, equation 3)."""

from __future__ import annotations

from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy, keep_highest, known_losses, register


@register("rho")
class ReducibleLoss(Policy):
    """The `n_keep` candidates of the largest reducible loss: that of the trained model less that of the reference model.

    Both are means over the loss tokens: the difference of sums would rank by length.
    """

    needs_losses = True
    needs_reference_losses = True

    def __init__(self, options: PolicyOptions) -> None:
        self._n_keep = options.n_keep

    def choose(self, candidates: Candidates) -> Decision:
        """`n_keep` candidates, weight 1."""
        ids, live = candidates.sample_ids, "give the candidates of a step their losses and loss tokens"
        loss_N = known_losses("rho", "the loss", candidates.loss_N, live, ids)
        tokens_N = known_losses("rho", "loss tokens", candidates.loss_tokens_N, live, ids)
        reference_N = known_losses(
            "rho",
            "a reference loss",
            candidates.reference_loss_N,
            "name a model that was trained on held-out text like the target with reference_model (--reference-model)",
            ids,
        )
        score_N = [
            (loss - reference) / tokens if tokens else 0.0
            for loss, reference, tokens in zip(loss_N, reference_N, tokens_N, strict=True)
        ]
        return keep_highest(candidates, score_N, self._n_keep)
