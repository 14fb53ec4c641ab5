"""Rankings: selectors that score every sample by itself. They read scalar columns only.

Shape legend: n samples of the pool.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from schemas.errors import InfeasibleError
from selection_ops.selectors.base import Choice, Selector, selector
from selection_ops.selectors.direct import id_uniform
from selection_ops.selectors.ordering import best_first
from selection_ops.selectors.outliers import loss_per_token
from selection_ops.selectors.problem import Problem
from selection_ops.selectors.rounding import fill_ranked


class Ranking(Selector):
    """Take the samples of largest score that fit the budget; `score` is the whole difference between rankings.

    A token budget is spent in the order of the ranking, passing over samples that no longer fit. With `allow_short`,
    target rankings stop where the score is no longer positive.
    """

    signed: ClassVar[bool] = True
    """Whether a score of zero or less means that a sample does not help."""

    def score(self, problem: Problem) -> np.ndarray:
        """The score of every sample of the pool, larger is better; float64 [n]."""
        raise NotImplementedError

    def choose(self, problem: Problem) -> Choice:
        """See the class."""
        score_n = self.score(problem)
        feasible = problem.feasible()
        most = int(feasible.budget) if feasible.counts_samples else len(score_n)
        ranked_n = best_first(np.where(np.isfinite(score_n), score_n, np.nan), most)
        ranked_n = ranked_n[np.isfinite(score_n[ranked_n])]
        if self.signed and problem.settings.allow_short:
            ranked_n = ranked_n[score_n[ranked_n] > 0.0]
        order_n = fill_ranked(ranked_n, feasible)
        if feasible.equality and len(order_n) < feasible.budget:
            raise InfeasibleError(
                f"selector {self.name!r} has finite scores for {len(ranked_n)} candidates, too few for a budget of "
                f"{problem.budget.amount} samples; lower the budget or allow a short selection"
            )
        # Floors take samples out of turn; the order stays that of the ranking.
        last = float(score_n[order_n].min()) if len(order_n) else None
        return Choice(
            order_n=order_n, weights_n=np.ones(len(order_n)), scores={"score": score_n}, certificate={"threshold": last}
        )


@selector("random")
class Random(Ranking):
    """Uniform without replacement, by a hash of (seed, sample_id): the same whatever the order of rows."""

    needs_target = False
    signed = False

    def score(self, problem: Problem) -> np.ndarray:
        """A uniform number per sample."""
        return id_uniform(problem.settings.seed, problem.sample_id[problem.pool_n])


@selector("loss")
class Loss(Ranking):
    """Largest mean loss per loss token (nats), or smallest with `lowest`."""

    needs_target = False
    signed = False

    def score(self, problem: Problem) -> np.ndarray:
        """Mean loss; nan without loss tokens."""
        mean_n = loss_per_token(problem.candidates)[problem.pool_n]
        return -mean_n if problem.settings.lowest else mean_n


@selector("grad-norm")
class GradNorm(Ranking):
    """Largest norm of the sum-loss gradient, or smallest with `lowest`."""

    needs_target = False
    signed = False

    def score(self, problem: Problem) -> np.ndarray:
        """Gradient norm."""
        norm_n = problem.candidates.grad_norm_N[problem.pool_n].astype(np.float64)
        return -norm_n if problem.settings.lowest else norm_n


@selector("target-cosine")
class TargetCosine(Ranking):
    """Largest cosine with the mean target gradient."""

    def score(self, problem: Problem) -> np.ndarray:
        """<u, g> / ||g||."""
        return problem.column("alignment")


@selector("target-dot")
class TargetDot(Ranking):
    """Largest dot product with the mean target gradient; loud samples lead."""

    def score(self, problem: Problem) -> np.ndarray:
        """<z, g> / ||g||."""
        return problem.column("alignment") * problem.norm_n


@selector("influence")
class Influence(Ranking):
    """Largest z^T (C + delta I)^-1 g."""

    def score(self, problem: Problem) -> np.ndarray:
        """Influence of the full sketch."""
        return problem.column("influence") * problem.norm_n


@selector("influence-cos")
class InfluenceCos(Ranking):
    """Largest z^T A g / sqrt(z^T A z), A = (C + delta I)^-1: the influence without the magnitude."""

    def score(self, problem: Problem) -> np.ndarray:
        """Influence over the root of `quad`; 0 for a zero row."""
        quad_n = problem.column("quad")
        influence_n = problem.column("influence")
        return np.divide(influence_n, np.sqrt(quad_n), out=np.zeros(len(quad_n)), where=quad_n > 0)
