"""Which inner product candidates and target are compared in: interactions K and alignments b of one step.

Legend: N candidates, K sketch dimension. Every metric is a power of the preconditioner P on either side:
candidates see P^candidate_power, the target P^target_power; K = Z Z', b = Z u with Z the candidates' sketches and u the
sketch of P^target_power * v, v the gradient of the target's mean loss. Table: `filter-then-weight`, "objective".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from schemas.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """Powers of the preconditioner that candidates and target are multiplied by before they are projected."""

    name: str
    candidate_power: float
    target_power: float

    @property
    def needs_preconditioner(self) -> bool:
        """Whether the optimizer's second moment takes part."""
        return bool(self.candidate_power or self.target_power)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(name="sgd", candidate_power=0.0, target_power=0.0),
        Metric(name="natural", candidate_power=0.5, target_power=0.5),
        Metric(name="target", candidate_power=0.0, target_power=1.0),
        Metric(name="update", candidate_power=1.0, target_power=1.0),
        Metric(name="opus", candidate_power=1.0, target_power=0.0),
    )
}


def get_metric(name: str) -> Metric:
    """The metric called `name`; raises `InputError` listing the known ones."""
    if name not in METRICS:
        raise InputError(f"unknown metric {name!r}: choose one of {', '.join(METRICS)}")
    return METRICS[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """What one step's choice is made from, in float64 on the CPU; K and b come from the same sketches, or either is exact.

    `target_square` is u'u, the scale of the matching error; 0 where b has no single direction behind it.
    """

    metric: str
    gram_NN: Tensor
    align_N: Tensor
    target_square: float
    exact_gram: Callable[[Sequence[int]], Tensor] | None = dataclasses.field(default=None, repr=False, compare=False)
    """Exact interactions of some candidates, where they were asked for: what a filter has kept is then weighted by them."""

    def refined(self, chosen: Sequence[int]) -> Geometry:
        """The same with the exact interactions of `chosen` among one another in place of sketched ones, where they were asked for."""
        if self.exact_gram is None or not chosen:
            return self
        index_S = torch.tensor(list(chosen))
        gram_NN = self.gram_NN.clone()
        gram_NN[index_S[:, None], index_S] = self.exact_gram(chosen)
        return dataclasses.replace(self, gram_NN=gram_NN, exact_gram=None)

    def per_token(self, loss_tokens_N: Sequence[int]) -> Geometry:
        """The same of the candidates' token means: K_ij / (n_i n_j) and b_i / n_i with n loss tokens; one without any stays 0."""
        count_N = torch.tensor(list(loss_tokens_N), dtype=torch.float64).clamp_min(1)
        exact, gram = None, self.exact_gram
        if gram is not None:

            def exact(chosen: Sequence[int]) -> Tensor:
                count_S = count_N[list(chosen)]
                return gram(chosen) / (count_S[:, None] * count_S)

        return dataclasses.replace(
            self,
            gram_NN=self.gram_NN / (count_N[:, None] * count_N),
            align_N=self.align_N / count_N,
            exact_gram=exact,
        )


def geometry(
    metric: str,
    sketch_NK: Tensor,
    direction_K: Tensor | None,
    align_N: Tensor | None = None,
    target_square: float | None = None,
) -> Geometry:
    """Geometry of sum-loss sketches and the metric's target direction, contracted in float64.

    In place of a direction, exact alignments and the square of the direction they were taken with.
    """
    sketch_NK = sketch_NK.detach().to("cpu", torch.float64)
    gram_NN = sketch_NK @ sketch_NK.T
    if direction_K is not None:
        direction_K = direction_K.detach().to("cpu", torch.float64)
        align_N, target_square = sketch_NK @ direction_K, float(direction_K @ direction_K)
    if align_N is None or target_square is None:
        raise ValueError("a geometry needs a direction, or alignments and the direction's square")
    return Geometry(
        metric=metric,
        gram_NN=(gram_NN + gram_NN.T) / 2,
        align_N=align_N.detach().to("cpu", torch.float64),
        target_square=target_square,
    )


def nearest_target(spaces: Sequence[Geometry]) -> Geometry:
    """One geometry of the same candidates against several targets: each is aligned with the target it is most aligned with.

    The largest alignment is no inner product with one direction, so matching error and cosine have no meaning.
    """
    first, *others = spaces
    if not others:
        return first
    align_N = torch.stack([space.align_N for space in spaces]).amax(0)
    return dataclasses.replace(first, align_N=align_N, target_square=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Numbers about one weighted choice, all on sketches.

    `interaction_to_alignment` is |w'Kw / 2| over |b'w|; it is 1/2 for uniform weights under the line search.
    `matching_error` is |Z'w - u|^2 / |u|^2: 1 where the choice captures nothing of the target's drop, 0 where it matches
    the direction; it can exceed 1. `update_target_cosine` is the cosine of Z'w and u.
    """

    interaction_to_alignment: float | None
    matching_error: float | None
    update_target_cosine: float | None


def diagnose(space: Geometry, weight_N: Tensor, *, scaled: bool = True) -> Diagnostics:
    """Diagnostics of weights in the units of the line search.

    Without `scaled` the weights have no scale of their own (a fallback), and only their direction is judged.
    """
    weight_N = weight_N.to(torch.float64)
    interaction = float(weight_N @ space.gram_NN @ weight_N)
    alignment = float(space.align_N @ weight_N)
    scale = (max(interaction, 0.0) * space.target_square) ** 0.5
    return Diagnostics(
        interaction_to_alignment=abs(interaction / 2) / abs(alignment) if scaled and alignment else None,
        matching_error=1 - (alignment - interaction / 2) / (space.target_square / 2)
        if scaled and space.target_square
        else None,
        update_target_cosine=alignment / scale if scale else None,
    )
