"""`filter-then-weight`: a filter against the target's direction, then least-squares weights; greedy and bounded by default.

After "Filter-then-Weight: Online Data Selection and Reweighting for LLM Fine-Tuning" (arXiv 2604.00001), reconstructed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from schemas.errors import InputError
from selection_ops.online.filters import Draw, Filtering, get_filter, line_search, top_by_score
from selection_ops.online.metrics import Geometry, diagnose
from selection_ops.online.options import PolicyOptions
from selection_ops.online.policies import OVER_BUDGET, Candidates, Decision, Policy, register, within_budget
from selection_ops.online.weights import normalise, solve_weights

NO_ALIGNMENT = "no candidate is aligned with the target"
ZERO_WEIGHTS = "every weight came out zero"


@register("filter-then-weight")
class FilterThenWeight(Policy):
    """Filter, weigh, drop zero weights; uniform on the `n_keep` best aligned where that leaves nothing."""

    needs_sketches = True

    def __init__(self, options: PolicyOptions) -> None:
        self._options = options

    def choose(self, candidates: Candidates) -> Decision:
        """The survivors and their weights of mean 1."""
        space = candidates.geometry
        if space is None:
            raise InputError("this policy needs sketches and a target batch")
        options, count = self._options, len(candidates.sample_ids)
        everything = range(count)
        wanted, score_N = self._filter(candidates, space, everything)
        limited = within_budget(wanted, candidates.tokens_N, candidates.token_limit) != wanted
        fitting: Sequence[int] = everything
        if limited:
            # What is longer than all that is left of the budget takes no part, so that it cannot crowd out what fits.
            fitting = [index for index in everything if candidates.tokens_N[index] <= (candidates.token_limit or 0)]
            wanted, score_N = self._filter(candidates, space, fitting)
        chosen = within_budget(wanted, candidates.tokens_N, candidates.token_limit)
        space = space.refined(chosen)
        aligned = bool((space.align_N[torch.tensor(fitting, dtype=torch.long)] > 0).any())
        raw_S, alpha = self._weigh(space, chosen)
        fallback, scaled = "", True
        if aligned and chosen and options.weights == "uniform" and alpha == 0:
            # Equal weights are equal whatever their size; there is only none that would bring the target's loss down.
            raw_S, scaled = torch.ones(len(chosen), dtype=torch.float64), False
        if fitting and not bool((raw_S != 0).any()):
            align_F = space.align_N[torch.tensor(fitting)]
            fallback, scaled = ZERO_WEIGHTS if aligned else NO_ALIGNMENT, False
            wanted = tuple(fitting[index] for index in top_by_score(align_F, options.n_keep))
            chosen = within_budget(wanted, candidates.tokens_N, candidates.token_limit)
            raw_S = torch.ones(len(chosen), dtype=torch.float64)
            limited = limited or chosen != wanted
        kept = tuple(index for index, weight in zip(chosen, raw_S.tolist()) if weight)
        raw_N = torch.zeros(count, dtype=torch.float64)
        raw_N[list(chosen)] = raw_S
        fits = set(fitting)
        reasons = ["left by the filter" if index in fits else OVER_BUDGET for index in everything]
        for index in wanted:
            reasons[index] = OVER_BUDGET
        for index in chosen:
            reasons[index] = "weight 0"
        for index in kept:
            reasons[index] = f"fallback: {fallback}" if fallback else "kept"
        return Decision(
            kept=kept,
            weight_S=normalise(raw_N[list(kept)]),
            reasons=tuple(reasons),
            score_N=score_N,
            alpha=alpha,
            diagnostics=diagnose(space, raw_N, scaled=scaled),
            fallback=fallback,
            limited=limited,
        )

    def _filter(self, candidates: Candidates, space: Geometry, among: Sequence[int]) -> tuple[tuple[int, ...], Tensor]:
        """Indices chosen among `among`, in order, and the score of every candidate (0 outside)."""
        options, score_N = self._options, torch.zeros_like(space.align_N)
        if not among:
            return (), score_N
        index_F = torch.tensor(among, dtype=torch.long)
        how = Filtering(
            n_keep=options.n_keep,
            draw=Draw(seed=candidates.seed, step=candidates.step, sample_ids=candidates.sample_ids).among(among),
            score=options.filter_score,
            temperature=options.filter_temperature,
            ridge=options.ridge,
        )
        found = get_filter(options.filter)(space.gram_NN[index_F][:, index_F], space.align_N[index_F], how)
        score_N[index_F] = found.score_N
        return tuple(among[index] for index in found.chosen), score_N

    def _weigh(self, space: Geometry, chosen: tuple[int, ...]) -> tuple[Tensor, float]:
        index_S = torch.tensor(chosen, dtype=torch.long)
        alpha = line_search(space.gram_NN, space.align_N, chosen)
        if not chosen:
            return torch.zeros(0, dtype=torch.float64), alpha
        weight_S = solve_weights(
            space.gram_NN[index_S][:, index_S],
            space.align_N[index_S],
            alpha,
            scheme=self._options.weights,
            ridge=self._options.ridge,
            bound=self._options.weight_bound,
        )
        return weight_S, alpha
