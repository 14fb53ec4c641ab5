"""`grad-norm`: train on what moves the model most (GraNd: Paul, Ganguli, Dziugaite 2021, arXiv 2107.07075, on live weights)."""

from __future__ import annotations

from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import Candidates, Decision, Policy, keep_highest, known_losses, register


@register("grad-norm")
class GradientNorm(Policy):
    """The `n_keep` candidates whose losses have the largest gradients."""

    needs_norms = True

    def __init__(self, options: PolicyOptions) -> None:
        self._n_keep = options.n_keep

    def choose(self, candidates: Candidates) -> Decision:
        """`n_keep` candidates, weight 1."""
        way_out = "give the candidates of a step the norms of their gradients"
        norm_N = known_losses("grad-norm", "the gradient's norm", candidates.norm_N, way_out, candidates.sample_ids)
        return keep_highest(candidates, norm_N, self._n_keep)
