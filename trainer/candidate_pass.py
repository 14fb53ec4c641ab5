"""What the candidates of a step are compared by: one forward and backward over them, with the factors held for what one pass needs them for.

Legend: N candidates, K sketch dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from schemas.errors import LehrError
from selection_ops.engine import GradientEngine
from selection_ops.exact_gram import exact_gram
from selection_ops.held import HeldBatch
from trainer.batches import StepBatches
from trainer.candidate import Candidate
from trainer.clipping import not_finite
from trainer.live_preconditioner import LivePreconditioner
from trainer.parallel import OneProcess
from trainer.token_scores import TokenScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sketched:
    """What candidates are compared by, in the order of candidates."""

    sketch_NK: Tensor
    loss_N: list[float | None]
    align_N: Tensor
    """Exact alignments with the target; 0 where they were not asked for."""
    score_NT: list[Tensor] | None = None
    """What they are sums of, token by token, where that is asked for."""


class CandidatePass:
    """Sketches candidates with an engine under the live weights, each process its share; where the engine holds factors, they stay until
    `release`."""

    def __init__(
        self,
        engine: GradientEngine,
        batches: StepBatches,
        processes: OneProcess,
        *,
        wide: torch.dtype,
        by_token: bool,
    ) -> None:
        """`wide`: dtype of the sketches; `by_token`: keep alignments token by token too."""
        self._engine, self._batches, self._processes = engine, batches, processes
        self._wide, self._by_token = wide, by_token
        self._held: list[tuple[list[int], HeldBatch]] = []
        self._exact_rows: tuple[int, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Bytes of the factors that are held."""
        return sum(batch.bytes for _, batch in self._held)

    def __call__(self, candidates: Sequence[Candidate], number: int) -> Sketched:
        """Sketches, losses and alignments of step `number`. Raises `LehrError` naming candidates where one is not finite."""
        self.release()
        engine, device = self._engine, self._batches.device
        sketch_NK = torch.zeros(len(candidates), engine.sketch_size, dtype=self._wide, device=device)
        loss_N = torch.zeros(len(candidates), dtype=torch.float64)
        align_N = torch.zeros_like(loss_N)
        scores = TokenScores([item.tokens for item in candidates])
        with engine:
            for indices, batch in self._batches([item.encoded for item in candidates]):
                with self._batches.arithmetic():
                    found = engine.features(batch)
                if found.held is not None:
                    self._held.append((indices, found.held))
                sketch_NK[indices] = found.sketch_BK[: len(indices)]
                loss_N[indices] = found.loss_B[: len(indices)].double().cpu()
                if found.aligned_BT is not None:
                    align_N[indices] = found.aligned_BT[: len(indices)].double().sum(1).cpu()
                    scores.take(indices, found.aligned_BT)
        sketch_NK, loss_N = self._processes.sum(sketch_NK), self._processes.sum(loss_N)
        finite_N = torch.isfinite(loss_N) & torch.isfinite(sketch_NK).all(1).cpu()
        bad = [item for item, finite in zip(candidates, finite_N.tolist()) if not finite]
        if bad:
            raise LehrError(not_finite(number, "loss or gradient", bad))
        return Sketched(
            sketch_NK=sketch_NK,
            loss_N=list(loss_N.tolist()),
            align_N=self._processes.sum(align_N),
            score_NT=scores.of_all(self._processes) if self._by_token else None,
        )

    def interactions(
        self, candidates: Sequence[Candidate], preconditioner: LivePreconditioner, power: float
    ) -> Callable[[Sequence[int]], Tensor]:
        """What makes K of some of the candidates from whole gradients, by what is held."""
        sites, places = self._engine.matrix_sites, {}
        for indices, batch in self._held:
            places.update({index: (batch, place) for place, index in enumerate(indices)})

        def gram(chosen: Sequence[int]) -> Tensor:
            self._exact_rows = tuple(chosen)
            with torch.no_grad():
                return exact_gram(
                    [places[index] for index in chosen],
                    sites,
                    lambda site: preconditioner.form(site, power),
                    [candidates[index].loss_tokens for index in chosen],
                )

        return gram

    def add_weighted(self, share_N: Sequence[float], gradients: dict[str, Tensor]) -> None:
        """Add the sum of share times gradient of the candidates, of the factors held here, to `gradients` by parameter."""
        with torch.no_grad():
            for indices, held in self._held:
                shares = [share_N[index] for index in indices]
                if any(shares):
                    held.add_weighted(torch.tensor(shares, dtype=torch.float64, device=self._batches.device), gradients)

    def release(self) -> tuple[int, ...]:
        """Let go of the factors; the candidates whose interactions were taken from them."""
        rows, self._held, self._exact_rows = self._exact_rows, [], ()
        return rows
