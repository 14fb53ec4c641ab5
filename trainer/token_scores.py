"""Scores of the tokens of a step's candidates, and what of their loss remains where tokens that score below zero carry none.

The score of the token at position t of sample i is s_it = d_it' V a_it, summed over sites with inputs a and output gradients d, V being what
exact alignments are taken with; over t it sums to b_i. Legend: N candidates, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from selection_ops.online.policies import Decision
from trainer.candidate import Candidate
from trainer.parallel import OneProcess

NOTHING_LEFT = "no token would be left: trained on whole"


class TokenScores:
    """Scores of samples of known lengths, gathered batch by batch, and from the other processes in the end."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._score_NT = [torch.zeros(length, dtype=torch.float64) for length in lengths]

    def take(self, places: Sequence[int], score_BT: Tensor) -> None:
        """Scores of the samples at `places`, the first of a batch; what stands behind a sample's length is padding."""
        for place, score_T in zip(places, score_BT.to("cpu", torch.float64)):
            self._score_NT[place] = score_T[: len(self._score_NT[place])]

    def of_all(self, processes: OneProcess) -> list[Tensor]:
        """[T] of every sample, each taken by one process."""
        flat = processes.sum(torch.cat(self._score_NT))
        return list(flat.split([len(score_T) for score_T in self._score_NT]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masking:
    """Candidates with the loss that remains of them, a decision that says where none would have, and tokens cleared of the kept."""

    candidates: list[Candidate]
    decision: Decision
    masked_N: tuple[int, ...]


def mask_tokens(candidates: Sequence[Candidate], score_NT: Sequence[Tensor], decision: Decision) -> Masking:
    """Clear the loss of the token behind every position of negative score: it is the one that the position predicts.

    A candidate that would be left without loss keeps all of it.
    """
    found: list[Candidate] = []
    reasons, masked_N, kept = list(decision.reasons), [0] * len(candidates), set(decision.kept)
    for place, (item, score_T) in enumerate(zip(candidates, score_NT, strict=True)):
        ahead = [False, *(score_T[:-1] < 0).tolist()]
        left = [carries and not against for carries, against in zip(item.encoded.loss_mask, ahead, strict=True)]
        if any(left[1:]):
            item = dataclasses.replace(item, encoded=dataclasses.replace(item.encoded, loss_mask=left))
        elif place in kept and item.loss_tokens:
            reasons[place] = f"{reasons[place]}; {NOTHING_LEFT}"
        if place in kept:
            masked_N[place] = candidates[place].loss_tokens - item.loss_tokens
        found.append(item)
    decision = dataclasses.replace(decision, reasons=tuple(reasons))
    return Masking(candidates=found, decision=decision, masked_N=tuple(masked_N))
